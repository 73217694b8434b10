"""Measures the kernels against their rivals and their goals, in one process.

    python -m moe_ep.bench.kernels                    every row, results/kernels_<device>.{json,md}
    python -m moe_ep.bench.kernels --rows=mla,gather  those whose names begin so
    python -m moe_ep.bench.kernels --sizes=tiny       the same rows at sizes for any machine: no measurement

Each row checks ||out - reference|| / ||reference|| of every contender first, on data
drawn anew and into outputs poisoned with NaN, then takes times in turns.
"""

import json
import os
import secrets
import sys

from absl import app, flags
import jax
import jax.numpy as jnp
import numpy as np

from moe_ep.bench import kernel_cases, report
from moe_ep.bench.kernel_cases import Case, Goal
from moe_ep.bench.timing import Contender, Times, measure_in_turns

SIZES = {"full": kernel_cases.FULL, "tiny": kernel_cases.TINY}
LARGEST_ERROR = 2e-2  # bfloat16 products are within 1e-2 of float32 ones

_ROWS = flags.DEFINE_list("rows", [], "Rows to measure, by the beginnings of their names; all by default.")
_SIZES = flags.DEFINE_enum("sizes", "full", list(SIZES), "The experiment's sizes, or ones for any machine.")
_SAMPLES = flags.DEFINE_integer("samples", 15, "Samples of each contender, taken in turns.", lower_bound=2)
_SAMPLE_SECONDS = flags.DEFINE_float("sample_seconds", 0.03, "What a sample lasts about.", lower_bound=0.0)
_SEED = flags.DEFINE_integer("seed", None, "Of the random data; by default another one every time, and recorded.")
_COMMIT = flags.DEFINE_string("commit", None, "What is recorded as the commit; asked of git by default.")
_OUT = flags.DEFINE_string("out", "results", "The folder of the result files.")
_JSON = flags.DEFINE_string("json", None, "Write the result to this file too; - is standard output.")


def run(sizes: str, rows: list[str], samples: int, sample_seconds: float, seed: int, commit: str | None = None) -> dict:
    """Measures the rows and returns the result as it is recorded."""
    kind = "measured" if sizes == "full" else "tiny sizes, no measurement:"
    result = {"kind": kind, **report.provenance(" ".join(["python -m moe_ep.bench.kernels", *sys.argv[1:]]), commit)}
    copy, copy_bytes = kernel_cases.copy_contender(SIZES[sizes])
    times = measure_in_turns({"copy": copy}, samples, sample_seconds)["copy"]
    bandwidth = copy_bytes / times.median
    del copy
    result |= {"seed": seed, "copy_bytes_per_s": bandwidth, "copy_spread": times.spread, "rows": []}
    chosen = [
        (row, build) for row, build in kernel_cases.cases(SIZES[sizes], seed)
        if not rows or row.startswith(tuple(rows))
    ]  # fmt: skip
    for number, (row, build) in enumerate(chosen, 1):
        record = measure(build(), samples, sample_seconds, bandwidth)
        if sizes != "full":
            record["met"] = None
        result["rows"].append(record)
        print(f"[{number}/{len(chosen)}] {row}: {_verdict(record)}", file=sys.stderr, flush=True)
    return result


def measure(case: Case, samples: int, sample_seconds: float, bandwidth: float) -> dict:
    """Returns one row: the errors, times and rates of every contender, and whether the goal is met."""
    expected = jax.block_until_ready(case.expected())
    errors, unavailable = {}, {}
    for name, contender in case.contenders.items():
        try:
            errors[name] = relative_error(case.outputs[name](poisoned_call(contender)), expected)
        except RuntimeError as error:  # A rival may not support this shape here; ours and XLA must.
            if name in ("ours", "xla"):
                raise
            unavailable[name] = str(error).splitlines()[0][:200]
    del expected
    correct = {name: case.contenders[name] for name in errors if errors[name] <= LARGEST_ERROR}
    times = measure_in_turns(correct, samples, sample_seconds)
    contenders = {name: _contender_record(case, errors[name], times.get(name)) for name in errors}
    achieved = achievement(case.goal, case.bytes, times, bandwidth)
    return {
        "row": case.row, "flops": case.flops, "bytes": case.bytes,
        "goal": case.goal._asdict(), "achieved": achieved, "met": is_met(case.goal, achieved),
        "contenders": contenders, "unavailable": unavailable,
    }  # fmt: skip


def poisoned_call(contender: Contender):
    """Returns the output of a call whose memory held NaN before: what is not written shows."""
    out = contender.wait(contender.launch())
    poison = jax.tree.map(_poison, out)
    jax.block_until_ready(poison)
    del out, poison  # The allocator gives the same memory to the next arrays of these sizes.
    return jax.tree.map(_as_jax, contender.wait(contender.launch()))


def _poison(leaf):
    return jnp.full_like(leaf, jnp.nan) if isinstance(leaf, jax.Array) else leaf.fill_(float("nan"))


def _as_jax(leaf):
    return leaf if isinstance(leaf, jax.Array) else jnp.from_dlpack(leaf.detach())


def relative_error(out, expected) -> float:
    """Returns ||out - expected|| / ||expected||, of several arrays the largest; NaN is infinity."""
    pairs = zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True)
    error = max(float(_relative_error(*pair)) for pair in pairs)
    return error if np.isfinite(error) else float("inf")


@jax.jit
def _relative_error(out, expected):
    expected = expected.astype(jnp.float32)
    difference = out.astype(jnp.float32) - expected
    return jnp.sqrt(jnp.sum(difference**2) / jnp.sum(expected**2))


def achievement(goal: Goal, byte_count: float, times: dict[str, Times], bandwidth: float) -> float | None:
    """Returns what the goal speaks of: a speedup, a share of the bandwidth, or a ratio of times; None if unmeasured."""
    if "ours" not in times:
        return None
    ours = times["ours"].median
    if goal.kind == "bandwidth":
        return byte_count / ours / bandwidth
    against = [times[name].median for name in goal.against if name in times]
    if not against:
        return None
    return min(against) / ours if goal.kind == "speedup" else ours / min(against)


def is_met(goal: Goal, achieved: float | None) -> bool | None:
    """Returns whether the goal is met; None if it was not measured."""
    if achieved is None:
        return None
    return achieved <= goal.value if goal.kind == "time" else achieved >= goal.value


def _contender_record(case, error, times):
    record = {"error": error}
    if times is not None:
        record |= {"seconds": times.median, "spread": times.spread, "samples": times.samples, "calls": times.calls}
        record |= {"flops_per_s": case.flops / times.median, "bytes_per_s": case.bytes / times.median}
    return record


def _verdict(record) -> str:
    ours = record["contenders"]["ours"]
    if "seconds" not in ours:
        return f"WRONG, error {ours['error']:.2g}"
    achieved = "no rival here" if record["achieved"] is None else f"{record['achieved']:.3f}"
    word = {True: "met", False: "not met", None: "not judged"}[record["met"]]
    return f"{ours['seconds'] * 1e3:.3f} ms, {_goal_text(record['goal'])}: {achieved}, {word}"


def _goal_text(goal) -> str:
    return {"speedup": "at least {value}x", "bandwidth": "{value:.0%} of copy bandwidth", "time": "at most {value}x"}[
        goal["kind"]
    ].format(**goal)


def as_markdown(result: dict) -> str:
    """Returns the table of a result."""
    lines = [
        report.heading("Kernels against their rivals", result),
        f"Copy (read + write): {result['copy_bytes_per_s'] / 1e9:.0f} GB/s. Times are medians in ms with the spread of "
        "the quartiles; TF is 1e12 FLOP/s; error is ||out - float32 reference|| / ||reference||.\n\n",
        "| row | ours | rivals | goal | achieved | met |\n|---|---|---|---|---|---|\n",
    ]
    for record in result["rows"]:
        rivals = [f"{name} {_cell(times)}" for name, times in record["contenders"].items() if name != "ours"]
        rivals += [f"{name}: {reason}" for name, reason in record["unavailable"].items()]
        achieved = "-" if record["achieved"] is None else f"{record['achieved']:.3f}"
        met = {True: "yes", False: "no", None: "-"}[record["met"]]
        cells = (record["row"], _cell(record["contenders"]["ours"]), "; ".join(rivals), _goal_text(record["goal"]), achieved, met)
        lines.append(f"| {' | '.join(cells)} |\n")
    return "".join(lines)


def _cell(times) -> str:
    if "seconds" not in times:
        return f"wrong (error {times['error']:.2g})"
    rate = f", {times['flops_per_s'] / 1e12:.0f} TF" if times["flops_per_s"] else f", {times['bytes_per_s'] / 1e9:.0f} GB/s"
    return f"{times['seconds'] * 1e3:.3f} ±{times['spread']:.1%}{rate}, error {times['error']:.1e}"


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"what is {argv[1]!r}? Only flags are taken")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory of the same GPU
    if _SIZES.value == "full" and jax.default_backend() != "gpu":
        print(f"--sizes=full: needs a GPU, this is {jax.default_backend()}; --sizes=tiny runs anywhere", file=sys.stderr)
        return 2
    seed = secrets.randbelow(2**31) if _SEED.value is None else _SEED.value
    result = run(_SIZES.value, _ROWS.value, _SAMPLES.value, _SAMPLE_SECONDS.value, seed, _COMMIT.value)
    for path in report.write(_OUT.value, report.file_stem("kernels"), result, as_markdown(result)):
        print(f"wrote {path}", file=sys.stderr)
    if _JSON.value == "-":
        print(json.dumps(result, indent=1))
    elif _JSON.value:
        with open(_JSON.value, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    app.run(main)
