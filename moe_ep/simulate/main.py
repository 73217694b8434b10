"""What `--mode=simulate` and `--mode=claims` call: a config in, one JSON object out, files in the work directory."""

import dataclasses
import json
import math
import os
import pathlib
import typing

from moe_ep.config import Config, require
from moe_ep.simulate import validation
from moe_ep.simulate.from_config import ASSUMED, fabric_of, scenario_of
from moe_ep.simulate.predict import Prediction, predict
from moe_ep.simulate.scenario import Scenario, own_stack

def simulate(config: Config, workdir: str | pathlib.Path | None = None) -> dict[str, typing.Any]:
    """Predicts what `config.simulate` asks for, prints it as a table and returns it.

    One of, in this order: a point of the published measurements, or all of them (written
    to `config.simulate.results`); a schedule of the compiler's; a sweep; the config's own
    layout. With a work directory, JSON, Markdown, pictures and a Chrome trace go there.

    Raises:
      ConfigError: a wrong value or combination; a layout that does not fit (DoesNotFit).
    """
    asked = config.simulate
    folder = pathlib.Path(workdir) if workdir else None
    if asked.point:
        result = _points(config)
    elif asked.schedule:
        result = _walk(config)
    elif asked.sweep != "none":
        from moe_ep.simulate.sweep import run_sweep  # progress bars and matplotlib only where they are used

        result = run_sweep(config, folder)
    else:
        result = _one(config, folder)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "simulate.json").write_text(json.dumps(result, indent=1) + "\n")
        (folder / "simulate.md").write_text(table(result) + "\n")
    print(table(result))
    return result


def _points(config: Config) -> dict[str, typing.Any]:
    if config.simulate.point != "all":
        return validation.predict_point(config.simulate.point)
    folder = _results_folder(config)
    result = validation.predict_all(config.simulate.published_values)
    validation.write(result, folder)
    return result


def _results_folder(config: Config) -> pathlib.Path:
    """Returns the folder of the tables, made if it was not there: asked before the work, which would be lost."""
    folder = pathlib.Path(config.simulate.results)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    require(writable, "simulate.results", folder, "a folder that can be written")
    return folder


def _one(config: Config, folder: pathlib.Path | None) -> dict[str, typing.Any]:
    scenario = scenario_of(config)
    result = as_json(scenario, predict(scenario))
    if folder:
        from moe_ep.simulate import trace

        folder.mkdir(parents=True, exist_ok=True)
        trace.write(scenario, folder / "trace.json")
    return result


def _walk(config: Config) -> dict[str, typing.Any]:
    from moe_ep.simulate import engines, schedule

    stack = ASSUMED if config.simulate.efficiency == "assumed" else own_stack()
    document = schedule.load(config.simulate.schedule)
    share = config.simulate.expert_row_share or engines.row_share(document, config.model)
    return schedule.walk(document, fabric_of(config.cluster), stack.kernels, stack.network, share)


def as_json(scenario: Scenario, prediction: Prediction) -> dict[str, typing.Any]:
    """Returns a prediction as the JSON object of `--mode=simulate`, with what it rests on."""
    layout = scenario.layout
    result = {name: _finite(value) for name, value in dataclasses.asdict(prediction).items()}
    result["bytes_per_gpu"] = {**prediction.bytes_per_gpu, "total": sum(prediction.bytes_per_gpu.values())}
    result["error_bar"] = round(validation.bar_of_phase(scenario.workload.phase), 4)
    result["kind"] = "predicted, memory ignored" if prediction.memory_ignored else "predicted"
    result["inputs"] = {
        "gpu": scenario.fabric.gpu.name,
        "gpus": layout.gpus,
        "gpus_per_node": scenario.fabric.gpus_per_node,
        "nics_per_node": scenario.fabric.nics_per_node,
        "nic_bytes_per_s": scenario.fabric.nic_bytes_per_s,
        "layout": dataclasses.asdict(layout),
        "workload": dataclasses.asdict(scenario.workload),
        "routing": scenario.routing.name,
        "kernels": scenario.stack.kernels.name,
        "network": scenario.stack.network.name,
    }
    return result


def _finite(value: typing.Any) -> typing.Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def claims(config: Config, workdir: str | pathlib.Path | None = None) -> dict[str, typing.Any]:
    """Recomputes the reference experiment's claims and prints them; writes claims.json and claims.md.

    The model is the reference experiment's, whatever the config's is; the cluster is the
    config's, in both readings of its NICs. Tables go to `config.simulate.results`, and
    with a work directory pictures too.
    """
    from moe_ep.simulate import claims as ledger

    reference, folder = Config(cluster=config.cluster), _results_folder(config)
    result = ledger.recompute(reference)
    ledger.write(result, folder)
    if workdir:
        ledger.draw(reference, folder)
    print(table(result))
    return result


def table(result: dict[str, typing.Any]) -> str:
    """Returns a result of `simulate` or `claims` as readable text."""
    if "free_parameters" in result:
        return validation.markdown(result)
    if "markdown" in result:
        return result["markdown"]
    if "id" in result:
        return (
            f"{result['id']}: {result['predicted']:.5g} {result['unit']} ± {result['error_bar']:.0%} "
            f"({result['split']}; network {result['network']})"
        )
    lines = []
    for name, value in result.items():
        if name == "bytes_per_gpu":
            value = ", ".join(f"{part} {amount / 1e9:.2f} GB" for part, amount in value.items())
        elif name == "inputs" or isinstance(value, dict):
            value = json.dumps(value)
        elif isinstance(value, float):
            value = f"{value:.4g}"
        lines.append(f"{name:30s} {value}")
    return "\n".join(lines)

