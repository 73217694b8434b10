"""Single-GPU runs that were measured on a device, predicted: what the simulator's own kernels and passes are worth.

    python -m moe_ep.simulate.measured

Reads the recorded runs in results/, predicts each from its config alone and writes
results/simulated_against_measured.json and .md. Kernels come from their benchmark,
passes from the compiler's schedules; one row sets the time that no kernel goes under
(`moe_ep.simulate.launch`) and is no prediction.
"""

import collections.abc
import dataclasses
import json
import pathlib
import shlex
import typing

from moe_ep import command
from moe_ep.checks import check
from moe_ep.config import AttentionConfig, ClusterConfig, Config, MeshConfig, ModelConfig, MoEConfig
from moe_ep.cost import program, work
from moe_ep.cost.kernels import KernelTable, Work
from moe_ep.cost.units import Number
from moe_ep.hardware import GPUS
from moe_ep.override import apply, load
from moe_ep.simulate.from_config import scenario_of
from moe_ep.simulate.predict import predict
from moe_ep.simulate.scenario import Stack, own_stack

RESULTS = pathlib.Path("results")
GOAL = 0.10

Row = dict[str, typing.Any]


def compare(results: pathlib.Path = RESULTS) -> list[Row]:
    """Returns a row for each recorded figure: what, file, measured and predicted, residual, and whether it set anything.

    Args:
      results: where the recorded runs are; files that are not there are left out.
    """
    kernels = own_stack().kernels
    return [row for name in _READERS if (results / name).exists() for row in compare_file(results / name, kernels)]


def compare_file(path: pathlib.Path, kernels: KernelTable) -> list[Row]:
    """Returns the rows of one recorded run, predicted with a kernel table."""
    stack = dataclasses.replace(own_stack(), kernels=kernels)
    record = json.loads(path.read_text())
    return [_row(path, stack, *figure) for figure in _READERS[path.name](record, stack)]


def _row(path: pathlib.Path, stack: Stack, what: str, unit: str, measured: Number, predicted: Number) -> Row:
    return {"what": what, "unit": unit, "measured": round(measured, 3), "predicted": round(float(predicted), 3),
            "residual": round(float(predicted) / measured - 1, 4), "file": path.name,
            "sets": "launch_s" if what == stack.kernels.launch_set_by else ""}  # fmt: skip


Figure = tuple[str, str, Number, Number]


def _training(record: Row, stack: Stack) -> collections.abc.Iterator[Figure]:
    run = record["runs"].get("auto")
    if run is None:  # of another program than the config's own
        return
    path = f"configs/{record['config']}.py"
    config = load(path)
    step, memory = _predicted(stack, config, "train", record["tokens"], record["sequence"])
    yield f"training step of {path}", "ms", 1e3 * run["seconds"], step
    yield f"peak memory of {path}", "GB", run["peak_bytes"] / 1e9, memory


def _predicted(
    stack: Stack, config: Config, phase: str, tokens: Number, context: int, paged_keys: int = 0
) -> tuple[Number, Number]:
    """Returns milliseconds and GB on one GPU, whatever transport and overlap the config has: nothing is sent."""
    sizes = {"phase": phase, "context": context, "tokens_per_gpu": tokens, "sequences_per_gpu": tokens,
             "ignore_memory": True}  # fmt: skip
    scenario = scenario_of(check(apply(config, [f"simulate.{name}={value}" for name, value in sizes.items()])))
    workload = dataclasses.replace(scenario.workload, paged_keys=paged_keys)
    prediction = predict(dataclasses.replace(scenario, workload=workload, stack=stack))
    return 1e3 * prediction.step_s, sum(prediction.bytes_per_gpu.values()) / 1e9


def _serving(record: Row, stack: Stack) -> collections.abc.Iterator[Figure]:
    """Rows of --mode=bench that one device measured; the config is the recorded command's."""
    path, settings = _of_command(record["command"])
    config = apply(load(path), settings)
    for row in record["rows"]:
        if row["kind"] == "measured" and row["devices"] == 1 and row["phase"] in ("prefill", "decode"):
            moe = dataclasses.replace(config.model.moe, num_experts=row["experts"])
            sized = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))
            milliseconds, _ = _predicted(stack, sized, row["phase"], row["tokens_per_microbatch"], row["sequence"])
            what = f"{row['phase']}, {row['tokens_per_microbatch']} {_UNITS[row['phase']]}, context {row['sequence']}"
            yield f"{what}, {row['routing']} routing, {path}", "ms", row["ms_per_step"], milliseconds


# What `moe_ep.bench.engine_load` serves, 4.7 G parameters with DeepSeek-V3's latent; its record has the load alone.
ENGINE_MODEL = ModelConfig(
    layers=8,
    dense_layers=1,
    width=4096,
    hidden=8192,
    attention=AttentionConfig(heads=128, nope_dim=56, rope_dim=64, value_dim=56, latent_dim=512),
    moe=MoEConfig(num_experts=8, top_k=2, hidden=8192),
)


# Tokens of a page of the engine's cache (moe_ep.bench.engine_load).
_PAGE = 64


def _engine(record: Row, stack: Stack) -> collections.abc.Iterator[Figure]:
    """The serving engine's two steps, back to back: whole prompts in chunks, and every slot in mid-completion."""
    if record["devices"] != 1:
        return
    load, config = record["load"], Config(model=ENGINE_MODEL, cluster=ClusterConfig(gpu="h200"), mesh=MeshConfig(1, 1))
    chunk = record["tokens_prefilled"] // record["steps"]["chunk"]
    middle = load["prompt"] + load["new_tokens"] // 2
    paged = -(-(load["prompt"] + load["new_tokens"]) // _PAGE) * _PAGE
    for phase, tokens, context, keys, measured in (
        ("prefill", chunk, load["prompt"], paged, record["ms_per_chunk_step"]),
        ("decode", load["slots"], middle, 0, record["ms_per_decode_step"]),
    ):
        what = f"{phase} step of the engine, {tokens} {_UNITS[phase]}, context {context}"
        yield what, "ms", measured, _predicted(stack, config, phase, tokens, context, keys)[0]


_UNITS = {"prefill": "tokens", "decode": "sequences"}


def _of_command(command: str) -> tuple[str, list[str]]:
    """Returns the config file and the settings of a recorded command line."""
    words = shlex.split(command)
    pairs = [word.split("=", 1) for word in words if word.startswith(("--config=", "--set="))]
    pairs += [[flag, value] for flag, value in zip(words, words[1:]) if flag in ("--config", "--set")]
    (path,) = (value for flag, value in pairs if flag == "--config")
    return path, [value for flag, value in pairs if flag == "--set"]


def _layer(record: Row, stack: Stack) -> collections.abc.Iterator[Figure]:
    sizes = record["sizes"]
    calls = _layer_calls(sizes)
    for direction, made in (("forward", calls), ("forward+backward", calls + work.backward(calls))):
        seconds = sum(stack.kernels.seconds(call, GPUS["h200"]) for call in made)
        measured = record["times"][f"ours {direction}"]["seconds"]
        yield f"one MoE layer, {sizes['tokens']} tokens, {direction}", "ms", 1e3 * measured, 1e3 * seconds


def _layer_calls(sizes: Row) -> list[Work]:
    moe = MoEConfig(num_experts=sizes["experts"], top_k=sizes["top_k"], hidden=sizes["hidden"])
    model = ModelConfig(width=sizes["width"], moe=moe)
    rows = sizes["tokens"] * sizes["top_k"]
    experts = work.experts(model, rows, sizes["experts"], work.BF16, travelled=False)
    return experts + work.router(model, sizes["tokens"])


_READERS: dict[str, typing.Callable[[Row, Stack], collections.abc.Iterator[Figure]]] = {
    "train_single_gpu_nvidia_h200.json": _training,
    "moe_layer_nvidia_h200.json": _layer,
    "engine_load_nvidia_h200.json": _engine,
    "serve_nvidia_h200.json": _serving,
    "bench_nvidia_h200.json": _serving,
}


def markdown(rows: list[Row]) -> str:
    """Returns the comparison as Markdown."""
    table = own_stack().kernels
    worst = max((abs(row["residual"]) for row in rows if not row["sets"]), default=0.0)
    lines = [
        "# Single-GPU runs: predicted against measured",
        "",
        "Written by `python -m moe_ep.simulate.measured` from the recorded runs named; predicted from each run's config.",
        f"One row sets what no kernel goes under, {1e6 * table.launch_s:.2f} us; the others set nothing.",
        f"Kernel table: {table.name} ({table.date}). Goal: within {GOAL:.0%}; worst of the predicted {worst:.1%}.",
        "",
        "| what | measured | predicted | residual | recorded in |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['what']} | {row['measured']:.5g} {row['unit']} | {row['predicted']:.5g} {row['unit']} | "
        f"{_residual(row)} | `{row['file']}` |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def _residual(row: Row) -> str:
    return f"sets {row['sets']}" if row["sets"] else f"{row['residual']:+.1%}"


def main() -> None:
    """Writes the comparison beside the recorded runs and prints it."""
    rows, stem = compare(), RESULTS / "simulated_against_measured"
    document = {"kind": "predicted, against measured", "kernels": own_stack().kernels.name, "rows": rows}
    stem.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    stem.with_suffix(".md").write_text(markdown(rows))
    print(markdown(rows))


if __name__ == "__main__":
    command.run(main)
