"""What `--mode=simulate` and `--mode=claims` call: a config in, one JSON object out, files in the work directory."""

import dataclasses
import json
import math
import pathlib
import typing

from moe_ep.config import Config, ConfigError
from moe_ep.simulate import validation
from moe_ep.simulate.from_config import scenario_of
from moe_ep.simulate.predict import Prediction, predict
from moe_ep.simulate.scenario import DoesNotFit, Scenario

RESULTS = pathlib.Path("results")


def simulate(config: Config, workdir: str | None = None) -> dict[str, typing.Any]:
    """Predicts what `config.simulate` asks for.

    A point of the published measurements, all of them, a schedule of the compiler's, a
    sweep, or the config's own layout. With a work directory, tables, pictures and traces
    are written there; all points are written to results/ where none is given.

    Raises:
      ConfigError: a wrong value or combination; a layout that does not fit (DoesNotFit).
    """
    asked = config.simulate
    folder = pathlib.Path(workdir) if workdir else None
    if asked.point == "all":
        result = validation.predict_all(asked.published_values)
        validation.write(result, folder or RESULTS)
        return result
    if asked.point:
        return validation.predict_point(asked.point)
    if asked.schedule:
        return _walk(config, folder)
    if asked.sweep != "none":
        from moe_ep.simulate.sweep import run_sweep  # matplotlib and progress bars only where they are used

        return run_sweep(config, folder)
    return _one(config, folder)


def _one(config: Config, folder: pathlib.Path | None) -> dict[str, typing.Any]:
    scenario = scenario_of(config)
    result = as_json(scenario, predict(scenario))
    if folder:
        from moe_ep.simulate import pictures, trace

        folder.mkdir(parents=True, exist_ok=True)
        (folder / "simulate.json").write_text(json.dumps(result, indent=1) + "\n")
        (folder / "simulate.md").write_text(table(result) + "\n")
        trace.write(scenario, folder / "trace.json")
        pictures.memory_bar({"this layout": result["bytes_per_gpu"]}, scenario.fabric.gpu.memory_bytes,
                            folder / "memory.png")  # fmt: skip
    return result


def _walk(config: Config, folder: pathlib.Path | None) -> dict[str, typing.Any]:
    from moe_ep.simulate import schedule
    from moe_ep.simulate.from_config import ASSUMED, fabric_of
    from moe_ep.simulate.scenario import own_stack

    stack = ASSUMED if config.simulate.efficiency == "assumed" else own_stack()
    document = schedule.load(config.simulate.schedule)
    result = schedule.walk(document, fabric_of(config.cluster), stack.kernels, stack.network)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "schedule_walk.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def as_json(scenario: Scenario, prediction: Prediction) -> dict[str, typing.Any]:
    """Returns a prediction as the JSON object of `--mode=simulate`, with what it rests on."""
    layout = scenario.layout
    result = {name: _finite(value) for name, value in dataclasses.asdict(prediction).items()}
    result["bytes_per_gpu"] = {**prediction.bytes_per_gpu, "total": sum(prediction.bytes_per_gpu.values())}
    result["error_bar"] = round(validation.fitted()[1]["system"], 4)
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


def infeasible(error: DoesNotFit) -> dict[str, typing.Any]:
    """Returns the row that a sweep shows for a layout that does not fit."""
    return {"feasible": False, "missing_bytes": error.missing_bytes}


def claims(config: Config, workdir: str | None = None) -> dict[str, typing.Any]:
    """Recomputes the reference experiment's claims; writes claims.json and claims.md (to results/ by default)."""
    from moe_ep.simulate import claims as ledger

    result = ledger.recompute(config)
    ledger.write(result, pathlib.Path(workdir) if workdir else RESULTS)
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


__all__ = ["ConfigError", "as_json", "claims", "infeasible", "simulate", "table"]
