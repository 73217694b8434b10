"""Trains a config for some steps with each implementation of the experts: losses, time, MFU, memory, and where time goes.

    XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 python -m moe_ep.bench.train_step --config=configs/single_gpu.py

Every implementation starts from the same values and sees the same tokens. After its
timed steps the first one runs a few more under the profiler, which sees kernels only
with XLA_FLAGS=--xla_gpu_enable_command_buffer= (else whole command buffers). Writes
<out>/train_<config>_<device>.{json,md}.
"""

import dataclasses
import os
import pathlib
import statistics
import sys
import tempfile

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from moe_ep import metrics, override, results
from moe_ep.bench import command, power, profile, report
from moe_ep.checks import check
from moe_ep.config import Config
from moe_ep.data import make_dataset
from moe_ep.hardware import gpu_of_device_kind
from moe_ep.mesh import make_mesh, peak_bytes, place_batch
from moe_ep.train.ahead import Accepted, Launcher, no_step_before
from moe_ep.train.state import init_state
from moe_ep.train.step import make_step

_CONFIG = flags.DEFINE_string("config", "configs/single_gpu.py", "The config file.")
_SET = flags.DEFINE_multi_string("set", [], "name=value, as in moe_ep.run.")
_STEPS = flags.DEFINE_integer("steps", 40, "Steps of each implementation.", lower_bound=3)
_PROFILED = flags.DEFINE_integer("profiled", 2, "Further steps of the first under the profiler.", lower_bound=0)
_IMPLEMENTATIONS = flags.DEFINE_list("implementations", ["auto", "scanned"], "Of the experts' products.")
_LEFT_OUT_S = 0.5e-3  # scopes shorter than this a step are added up


def measure(config: Config, steps: int, profiled: int) -> dict:
    """Returns losses, gradient norms, loads, seconds a step, MFU, peak bytes and power of one run."""
    mesh = make_mesh(config.mesh, config.cluster, config.model.moe.num_experts)
    dataset = _dataset(config)
    state = init_state(config, mesh)
    tokens = place_batch(next(dataset), mesh)
    program = make_step(config, mesh).lower(state, tokens, previous_fits=no_step_before(mesh)).compile()
    launcher = Launcher(config.dispatch, mesh, {config.dispatch.waves: program}.get, _refuse)
    lines = []
    with power.watch() as watched:
        for step in range(steps):
            state = launcher.launch(state, tokens, step)
            tokens = place_batch(next(dataset), mesh)
            while len(launcher) > (step < steps - 1):
                state, accepted = launcher.read(state)
                lines.append(_line(accepted))
    result = _summary(config, lines, mesh) | {"peak_bytes": peak_bytes(mesh), "power": watched}
    return result | {"profile": _profile(program, mesh, state, tokens, profiled) if profiled else None}


def _dataset(config: Config):
    train = config.train
    return make_dataset(
        config.data, vocabulary=config.model.vocabulary, batch_sequences=train.batch_sequences,
        sequence=train.sequence, seed=config.seed, split="train",
    )  # fmt: skip


def _refuse(reason: str) -> None:
    raise SystemExit(f"train_step: {reason}; raise dispatch.waves or dispatch.margin_sigmas")


def _line(accepted: Accepted) -> dict:
    batch = accepted.report.batch
    return {
        "loss": float(batch.loss), "gradient_norm": float(accepted.report.gradient_norm),
        "seconds": accepted.elapsed_ms / 1e3,
        "max_over_mean_load": float(metrics.max_over_mean(np.asarray(batch.expert_counts)).mean()),
    }  # fmt: skip


def _summary(config: Config, lines: list[dict], mesh: Mesh) -> dict:
    seconds = [line["seconds"] for line in lines[1:]]
    low, median, high = statistics.quantiles(seconds, n=4)
    tokens = config.train.batch_sequences * config.train.sequence
    flops = metrics.training_flops_per_token(config.model, config.train.sequence)
    gpu = gpu_of_device_kind(mesh.devices.flat[0].device_kind)
    return {
        "steps": lines, "seconds": median, "quartiles": (low, high), "tokens_per_s": tokens / median,
        "mfu": metrics.mfu(tokens / median, flops, gpu, mesh.size),
    }  # fmt: skip


def _profile(program, mesh: Mesh, state, tokens, steps: int) -> dict:
    """Returns milliseconds a step by scope and of the longest kernels."""
    before = no_step_before(mesh)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                state, step_report = program(state, tokens, previous_fits=before)
            jax.block_until_ready(step_report)
        kernels = profile.kernels_of(pathlib.Path(folder), program.as_text(), steps)
        span = profile.span_of(pathlib.Path(folder), steps)
    scopes = profile.by_scope(kernels)
    shown = {name: seconds for name, seconds in scopes.items() if seconds >= _LEFT_OUT_S}
    return {
        "busy_ms": 1e3 * sum(scopes.values()), "span_ms": 1e3 * span,
        "scopes_ms": {name: 1e3 * seconds for name, seconds in shown.items()},
        "others_ms": 1e3 * (sum(scopes.values()) - sum(shown.values())),
        "kernels": [kernel._asdict() for kernel in kernels[:60]],
    }


def as_markdown(result: dict) -> str:
    """Returns the runs, their losses step by step, and the first run's profile."""
    runs = result["runs"]
    lines = [report.heading(f"Training `{result['config']}`, by implementation of the experts' products", result)]
    flags_given = f" XLA_FLAGS: `{result['xla_flags'].strip()}`." if result["xla_flags"] else ""
    lines.append(f"{result['tokens']:,} tokens a step, in sequences of {result['sequence']:,}.{flags_given}\n\n")
    lines.append("| experts' products | ms a step, median (quartiles) | tokens/s | MFU | peak memory so far |\n")
    lines.append("|---|---|---|---|---|\n")
    for name, run in runs.items():
        low, high = (f"{1e3 * seconds:.0f}" for seconds in run["quartiles"])
        mfu = "-" if run["mfu"] is None else f"{run['mfu']:.1%}"
        peak = "-" if run["peak_bytes"] is None else metrics.human_bytes(run["peak_bytes"])
        times = f"{1e3 * run['seconds']:.1f} ({low} to {high})"
        lines.append(f"| {name} | {times} | {run['tokens_per_s']:,.0f} | {mfu} | {peak} |\n")
    lines += [f"\n{name}: {power.as_text(run['power'])}.\n" for name, run in runs.items() if run["power"]]
    lines.append("\n## Losses and gradient norms\n\n")
    lines.append(f"| step | {' | '.join(runs)} | norm: {' | norm: '.join(runs)} | load max/mean |\n")
    lines.append("|" + "---|" * (2 * len(runs) + 2) + "\n")
    for step, parts in enumerate(zip(*(run["steps"] for run in runs.values()), strict=True), start=1):
        losses = [f"{part['loss']:.3f}" for part in parts] + [f"{part['gradient_norm']:.2f}" for part in parts]
        lines.append(f"| {step} | {' | '.join(losses)} | {parts[0]['max_over_mean_load']:.2f} |\n")
    return "".join(lines) + _profile_table(next(iter(runs.values()))["profile"])


def _profile_table(profiled: dict | None) -> str:
    if not profiled or not profiled["scopes_ms"]:
        return ""
    rows = profiled["scopes_ms"] | {"all shorter ones": profiled["others_ms"]}
    body = "".join(f"| {name} | {value:.1f} | {value / profiled['busy_ms']:.1%} |\n" for name, value in rows.items())
    return (
        f"\n## Where the time goes\n\nKernels of a step: {profiled['busy_ms']:.1f} ms, by the profiler; "
        f"with the gaps between them {profiled['span_ms']:.1f} ms.\n\n"
        f"| scope | ms | share |\n|---|---|---|\n{body}"
    )


def main() -> None:
    """Measures every implementation and writes the results."""
    provenance = command.start("moe_ep.bench.train_step")
    config = check(override.apply(override.load(_CONFIG.value), _SET.value))
    configs = {name: check(_with_experts(config, name)) for name in _IMPLEMENTATIONS.value}
    stem = pathlib.Path(_CONFIG.value).stem
    train = config.train
    result = provenance | {
        "config": stem, "tokens": train.batch_sequences * train.sequence, "sequence": train.sequence,
        "xla_flags": os.environ.get("XLA_FLAGS", ""), "runs": {},
    }  # fmt: skip
    for name, changed in configs.items():
        first = not result["runs"]
        result["runs"][name] = measure(changed, _STEPS.value, _PROFILED.value if first else 0)
        markdown = as_markdown(result)
        for path in results.write(command.OUT.value, report.file_stem(f"train_{stem}"), result, markdown):
            print(f"wrote {path} after {name}", file=sys.stderr, flush=True)
    print(markdown)


def _with_experts(config: Config, implementation: str) -> Config:
    moe = dataclasses.replace(config.model.moe, implementation=implementation)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))


if __name__ == "__main__":
    command.run(main)
