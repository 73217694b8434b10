"""The compile-only GPU against the real one: bytes of the same small programs compiled for both, and a run's peak.

    python -m moe_ep.aot.check --device=absent --set cluster.gpu=h200      anywhere with jax[cuda12], no GPU
    python -m moe_ep.aot.check --device=real                               on the GPU

Each writes its side of <out>/aot_<gpu>_check.json, program by program; with both there
<out>/aot_<gpu>_check.md compares them. Both compile under the same options; the real GPU's training
step also as a run does, tuned, and it is run. Where <out>/train_*.json records a run of the whole
config on that GPU, the absent side compiles its training step too, for the peak.
"""

import json
import os
import pathlib
import sys
import typing
from collections.abc import Callable, Iterator

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from moe_ep import command, override, results
from moe_ep.aot.compile import ABSENT_OPTIONS, absent_mesh, program_of
from moe_ep.aot.topology import use_no_gpu
from moe_ep.checks import check
from moe_ep.config import Config, ConfigError
from moe_ep.hardware import GPUS, gpu_of_device_kind
from moe_ep.kernels import device
from moe_ep.mesh import COMPILER_OPTIONS, make_mesh, peak_bytes, place_batch
from moe_ep.train.state import init_state

PROGRAMS = ("prefill", "decode", "train")
# What makes the config small enough to be compiled three times within a minute.
SMALL = (
    "model.width=2048", "model.hidden=4096", "model.moe.hidden=4096", "model.attention.heads=32",
    "model.vocabulary=8192", "aot.tokens_per_gpu=4096", "aot.context=1024",
)  # fmt: skip
_STEPS = 3
GOALS = {"arguments": 0.0, "outputs": 0.0, "temporaries": 0.02, "peak": 0.05}

Sizes = dict[str, int]
Side = dict[str, typing.Any]  # provenance; and, by how it was compiled, program -> bytes


def absent_side(config: Config, recorded: Config | None) -> Iterator[Side]:
    """Yields the bytes of the small programs, and of a recorded run's training step, compiled for an absent GPU."""
    for name in PROGRAMS:
        yield {"programs": {name: _sizes(_compile(_program(config, name), absent_mesh, ABSENT_OPTIONS))}}
    if recorded is not None:
        yield {"recorded": {"train": _sizes(_compile(recorded, absent_mesh, ABSENT_OPTIONS))}}


def real_side(config: Config) -> Iterator[Side]:
    """Yields the bytes of the small programs compiled for the GPU that is here, and the peak of training on it."""
    for name in PROGRAMS:
        yield {"programs": {name: _sizes(_compile(_program(config, name), _real_mesh, ABSENT_OPTIONS))}}
    step = _compile(_program(config, "train"), _real_mesh, COMPILER_OPTIONS)
    yield {"tuned": {"train": _sizes(step)}, "peak": {"train": _peak(_program(config, "train"), step)}}


def _program(config: Config, name: str) -> Config:
    return override.apply(config, [f"aot.program={name}"])


def _recorded_train(config: Config, run: dict) -> Config:
    """The step of a recorded run."""
    sizes = {"program": "train", "context": run["sequence"], "tokens_per_gpu": run["tokens"]}
    return override.apply(config, [f"aot.{name}={value}" for name, value in sizes.items()])


def _real_mesh(config: Config) -> Mesh:
    return make_mesh(config.mesh, config.cluster, config.model.moe.num_experts)


def _compile(config: Config, mesh_of: Callable[[Config], Mesh], options: dict) -> jax.stages.Compiled:
    print(f"check: compiles {config.aot.program}, width {config.model.width}", file=sys.stderr, flush=True)
    program = program_of(config, mesh_of(config))
    return program.function.lower(*program.arguments).compile(compiler_options=options)


def _sizes(compiled: jax.stages.Compiled) -> Sizes:
    analysis = compiled.memory_analysis()
    alias = analysis.alias_size_in_bytes
    return {
        "arguments": analysis.argument_size_in_bytes,
        "outputs": max(0, analysis.output_size_in_bytes - alias),
        "temporaries": analysis.temp_size_in_bytes,
    }


def _peak(config: Config, step: jax.stages.Compiled) -> Sizes:
    """Runs a few training steps on random tokens; returns the most bytes held before the first and after the last."""
    mesh = _real_mesh(config)
    state, sequences = init_state(config, mesh), config.aot.tokens_per_gpu // config.aot.context
    random = np.random.default_rng(0)
    shape = (sequences, config.aot.context + 1)
    tokens = place_batch(random.integers(0, config.model.vocabulary, shape, np.int32), mesh)
    jax.block_until_ready(state)
    before = peak_bytes(mesh)
    for _ in range(_STEPS):
        state, report = step(state, tokens, None)
    jax.block_until_ready(report)
    return {"before": before, "after": peak_bytes(mesh)}


def compare(absent: Side, real: Side) -> list[dict]:
    """Returns a row for each figure that both sides have: program, what, absent, real, difference, goal."""
    rows = []
    for how, suffix in (("programs", ""), ("tuned", ", tuned as in a run")):
        for program, sizes in real.get(how, {}).items():
            compiled = absent["programs"].get(program, {})
            rows += [_row(program + suffix, what, compiled[what], sizes[what]) for what in sizes if what in compiled]
    for program, peak in real.get("peak", {}).items():
        compiled = absent["programs"].get(program)
        if compiled and peak["after"] > peak["before"]:  # else it is that of making the state
            rows.append(_row(f"{program}, run", "peak", sum(compiled.values()), peak["after"]))
    return rows


def _row(program: str, what: str, absent: int, real: int) -> dict:
    difference = absent / real - 1 if real else float(absent != real)
    return {"program": program, "bytes_of": what, "absent": absent, "real": real, "difference": difference,
            "goal": GOALS[what], "within_goal": abs(difference) <= GOALS[what]}  # fmt: skip


def recorded_run(folder: pathlib.Path, stem: str, gpu: str) -> dict | None:
    """Returns device, commit, sizes, steps and peak of a config's training run that `moe_ep.bench.train_step` recorded."""
    for path in sorted(folder.glob(f"train_{stem}_*.json")):
        record = json.loads(path.read_text())
        run, device = record["runs"].get("auto"), gpu_of_device_kind(record["device"])
        if run and run["peak_bytes"] and device and device.name == gpu:
            return {name: record[name] for name in ("device", "commit", "tokens", "sequence")} | {
                "steps": len(run["steps"]), "peak_bytes": run["peak_bytes"]}  # fmt: skip
    return None


def compare_recorded(side: dict, run: dict, config: str) -> dict:
    """Returns the row of a recorded run's peak."""
    name = f"train, {run['steps']} steps of {run['tokens']:,} tokens of `{config}`, recorded at {run['commit']}"
    return _row(name, "peak", sum(side["recorded"]["train"].values()), run["peak_bytes"])


def as_markdown(result: dict) -> str:
    """Returns the comparison as a table, and the last complete one below where a side is missing at this commit."""
    settings = ", ".join(f"`{each}`" for each in result["small"])
    text = (
        "# The compile-only GPU against the real one\n\n"
        "`python -m moe_ep.aot.check --device=absent` on any machine and `--device=real` on the GPU, at one commit, renew "
        f"this page.\nModel of the small programs: `{result['config']}` with {settings}.\nA peak is the allocator's, "
        "measured, against arguments, outputs and temporaries as compiled.\n\n"
    ) + _pair_text(result)
    if result["earlier"] is not None:
        text += "\n## The last measured pair, of the programs as they then were\n\n" + _pair_text(result["earlier"])
    return text


def _pair_text(pair: dict) -> str:
    sides = pair["sides"]
    lines = [_side_line(name, side) for name, side in sides.items()]
    if missing := {"absent", "real"} - set(sides):
        present = next(iter(sides))
        lines.append(f"Compiled for the {present} device alone: the {missing.pop()} half was not run at this commit.\n\n")
        lines.append(_sizes_table(sides[present]["programs"]))
    if pair["rows"]:
        lines.append("| program | bytes of | absent (compiled) | real | difference | goal |\n|---|---|---|---|---|---|\n")
    for row in pair["rows"]:
        goal = "equal" if row["goal"] == 0 else f"within {row['goal']:.0%}"
        verdict = "" if row["within_goal"] else ": missed"
        lines.append(f"| {row['program']} | {row['bytes_of']} | {row['absent']:,} | {row['real']:,} | "
                     f"{row['difference']:+.3%} | {goal}{verdict} |\n")  # fmt: skip
    return "".join(lines)


def _sizes_table(programs: dict[str, Sizes]) -> str:
    rows = [f"| {program} | {' | '.join(f'{size:,}' for size in sizes.values())} |\n" for program, sizes in programs.items()]
    head = " | ".join(next(iter(programs.values())))
    return f"| program | {head} |\n|---|{'---|' * (head.count('|') + 1)}\n{''.join(rows)}\n"


def _side_line(name: str, side: dict) -> str:
    flags_text = f", XLA_FLAGS `{side['xla_flags']}`" if side["xla_flags"] else ""
    return (
        f"{name}: {side['device']}, {side['date']}, commit {side['commit']}; "
        f"{results.versions_text(side['versions'])}{flags_text}; `{side['command']}`\n\n"
    )


def check_device(which: str, config: Config, stem: str, folder: pathlib.Path) -> Iterator[dict]:
    """Compiles for the absent or the real GPU; yields its side, as it grows, beside what is on file of the other one.

    Args:
      which: "absent" or "real".
      config: its cluster's GPU is the one compared.
      stem: the config's name, by which recorded runs are found.
      folder: of the result files.

    Raises:
      ConfigError: jax without its CUDA plugin.
    """
    path, run = folder / f"aot_{config.cluster.gpu}_check.json", recorded_run(folder, stem, config.cluster.gpu)
    opening = results.provenance(results.command_line("moe_ep.aot.check"))
    sides, earlier = on_file(path, which, opening["commit"])
    small = check(override.apply(config, SMALL))
    if which == "real":
        name, parts = device.device_kind(), real_side(small)
    else:
        name, parts = f"absent {config.cluster.gpu}", absent_side(small, run and _recorded_train(config, run))
    side = sides[which] = {**opening, "xla_flags": os.environ.get("XLA_FLAGS", ""), "device": name}
    for part in parts:
        for how, programs in part.items():
            side.setdefault(how, {}).update(programs)
        rows = _rows(sides, run, stem)
        yield {"config": f"configs/{stem}.py", "small": SMALL, "sides": sides, "rows": rows,
               "earlier": None if len(sides) == 2 else earlier}  # fmt: skip


def on_file(path: pathlib.Path, which: str, commit: str) -> tuple[dict[str, Side], dict | None]:
    """Returns the other side, if it is of this commit, and the last complete pair: its sides and rows."""
    if not path.exists():
        return {}, None
    document = json.loads(path.read_text())
    sides = {name: side for name, side in document["sides"].items() if name != which and side["commit"] == commit}
    pair = {name: document[name] for name in ("sides", "rows")}
    return sides, pair if len(document["sides"]) == 2 else document["earlier"]


def _rows(sides: dict[str, Side], run: dict | None, stem: str) -> list[dict]:
    rows = compare(sides["absent"], sides["real"]) if len(sides) == 2 else []
    if run and "recorded" in sides.get("absent", {}):
        rows.append(compare_recorded(sides["absent"], run, f"configs/{stem}.py"))
    return rows


def on_this_gpu(config: Config) -> Config:
    """Returns the config with the GPU that is here as its cluster's.

    Raises:
      ConfigError: there is none, or one that is not known.
    """
    gpu = gpu_of_device_kind(device.device_kind())
    if gpu is None:
        raise ConfigError(f"--device=real: allowed on a GPU, one of {', '.join(GPUS)}; here is a {device.device_kind()}")
    return override.apply(config, [f"cluster.gpu={gpu.name}"])


def main() -> None:
    """Compiles one side, adds it to the file, and compares when both are there."""
    given = flags.FLAGS
    folder, stem = pathlib.Path(given.out), pathlib.Path(given.config).stem
    config = check(override.apply(override.load(given.config), given.set))
    command.check_folder(given.out)
    if given.device == "absent" or not pathlib.Path("/dev/nvidiactl").exists():
        use_no_gpu()
    config = config if given.device == "absent" else on_this_gpu(config)
    for result in check_device(given.device, config, stem, folder):
        results.write(folder, f"aot_{config.cluster.gpu}_check", result, as_markdown(result))
    print(as_markdown(result))


if __name__ == "__main__":
    flags.DEFINE_enum("device", "absent", ["absent", "real"], "Which of the two to compile for.")
    flags.DEFINE_string("config", "configs/single_gpu.py", "The config file.")
    flags.DEFINE_multi_string("set", [], "name=value, as in moe_ep.run.")
    flags.DEFINE_string("out", "results", "The folder of the result files.")
    command.run(main)
