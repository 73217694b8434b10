"""Measures the kernels against their rivals and their goals, in one process.

    python -m moe_ep.bench.kernels                    every row, results/kernels_<device>.{json,md}
    python -m moe_ep.bench.kernels --rows=mla,gather  those whose names begin so
    python -m moe_ep.bench.kernels --sizes=tiny       the same rows at sizes for any machine: no measurement

Each row checks ||out - reference|| / ||reference|| of every contender first, on data
drawn anew and into outputs poisoned with NaN, then takes times in turns.
"""

from collections.abc import Iterator
import json
import pathlib
import sys
import time

from absl import flags
import jax

from moe_ep import results
from moe_ep.bench import command, energy, kernel_cases, power, report, tensor_cores
from moe_ep.bench.correctness import poisoned_call, relative_error
from moe_ep.bench.kernel_cases import Case, Goal
from moe_ep.bench.timing import Times, measure_in_turns

SIZES = {"full": kernel_cases.FULL, "tiny": kernel_cases.TINY}
LARGEST_ERROR = 2e-2  # bfloat16 products are within 1e-2 of float32 ones

_ROWS = flags.DEFINE_list("rows", [], "Rows to measure, by the beginnings of their names; all by default.")
_JSON = flags.DEFINE_string("json", None, "Write the result to this file too; - is standard output.")


def copy_bandwidths(sizes: str, samples: int, sample_seconds: float) -> dict[str, float]:
    """Returns bytes read and written a second by the copies of XLA and torch."""
    copies, copy_bytes = kernel_cases.copies(SIZES[sizes])
    times = measure_in_turns(copies, samples, sample_seconds)
    return {name: copy_bytes / value.median for name, value in times.items()}


def measure_rows(
    sizes: str, rows: list[str], seed: int, samples: int, sample_seconds: float, bandwidth: float
) -> Iterator[dict]:
    """Yields the record of each row whose name begins with one of `rows`, of every row if there is none."""
    for row, build in kernel_cases.cases(SIZES[sizes], seed):
        if rows and not row.startswith(tuple(rows)):
            continue
        start = time.perf_counter()
        record = measure(build(), samples, sample_seconds, bandwidth)
        if sizes != "full":
            record["met"] = None
        print(f"{row}: {_verdict(record)} ({time.perf_counter() - start:.0f} s)", file=sys.stderr, flush=True)
        yield record


def measure(case: Case, samples: int, sample_seconds: float, bandwidth: float) -> dict:
    """Returns one row: the errors, times, rates and joules of every contender, and whether the goal is met."""
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
    with power.watch() as watched:
        times = measure_in_turns(correct, samples, sample_seconds)
    joules = energy.measure(correct, times)
    contenders = {
        name: _contender_record(case, error, times.get(name), joules.get(name)) for name, error in errors.items()
    }
    achieved = achievement(case.goal, case.bytes, times, bandwidth)
    return {
        "row": case.row, "flops": case.flops, "bytes": case.bytes,
        "goal": case.goal._asdict(), "achieved": achieved, "met": is_met(case.goal, achieved),
        "contenders": contenders, "unavailable": unavailable, "power": watched,
    }  # fmt: skip


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


def share_of_ceiling(record: dict, ceiling: dict) -> float | None:
    """Returns our rate over that of the tensor cores alone; None where bandwidth is the goal or nothing was measured."""
    rate = record["contenders"]["ours"].get("flops_per_s")
    if not rate or not ceiling or record["goal"]["kind"] == "bandwidth":
        return None
    return rate / ceiling["flops_per_s"]


def _contender_record(case, error, times, joules):
    record = {"error": error}
    if times is not None:
        record |= {"seconds": times.median, "spread": times.spread, "samples": times.samples, "calls": times.calls}
        record |= {"flops_per_s": case.flops / times.median, "bytes_per_s": case.bytes / times.median}
    if joules is not None:
        record["joules"] = joules
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
    copies = ", ".join(f"{name} {rate / 1e9:.0f} GB/s" for name, rate in result["copy_bytes_per_s"].items())
    lines = [
        report.heading("Kernels against their rivals", result),
        f"Copy (read + write), the faster being the goals' copy bandwidth: {copies}. Times are medians in ms with "
        "the spread of the quartiles; TF is 1e12 FLOP/s; pJ is the board's energy "
        "by its own counter, each contender alone; error is ||out - float32 reference|| / ||reference||.\n\n",
        _ceiling_text(result.get("ceiling")),
        "| row | ours | rivals | goal | achieved | met | power, SM clock, samples held back by the power limit |\n",
        "|---|---|---|---|---|---|---|\n",
    ]
    for record in result["rows"]:
        rivals = [f"{name} {_cell(times)}" for name, times in record["contenders"].items() if name != "ours"]
        rivals += [f"{name}: {reason}" for name, reason in record["unavailable"].items()]
        achieved = "-" if record["achieved"] is None else f"{record['achieved']:.3f}"
        met = {True: "yes", False: "no", None: "-"}[record["met"]]
        ours, goal = _cell(record["contenders"]["ours"]) + _share(record), _goal_text(record["goal"])
        cells = (record["row"], ours, "; ".join(rivals), goal, achieved, met, _power_cell(record["power"]))
        lines.append(f"| {' | '.join(cells)} |\n")
    return "".join(lines)


def _ceiling_text(ceiling) -> str:
    if not ceiling:
        return ""
    return (
        "Tensor cores alone, on random data that stay in shared memory, warm: "
        f"{ceiling['flops_per_s'] / 1e12:.0f} TF ±{ceiling['spread']:.1%}{_energy(ceiling)}, {_power_cell(ceiling['power'])}. "
        "Shares of this ceiling stand beside our rates.\n\n"
    )


def _share(record) -> str:
    share = record.get("share_of_ceiling")
    return "" if share is None else f", {share:.0%} of the ceiling"


def _power_cell(summary) -> str:
    if not summary:
        return "-"
    return f"{summary['watts']:.0f} W, {summary['sm_mhz']:.0f} of {summary['max_sm_mhz']:.0f} MHz, {summary['capped']:.0%}"


def _cell(times) -> str:
    if "seconds" not in times:
        return f"wrong (error {times['error']:.2g})"
    teraflops, gigabytes = times["flops_per_s"] / 1e12, times["bytes_per_s"] / 1e9
    rate = f"{teraflops:.0f} TF" if teraflops else f"{gigabytes:.0f} GB/s"
    return f"{times['seconds'] * 1e3:.3f} ±{times['spread']:.1%}, {rate}{_energy(times)}, error {times['error']:.1e}"


def _energy(times) -> str:
    if "joules" not in times:
        return ""
    unit, rate = ("FLOP", times["flops_per_s"]) if times["flops_per_s"] else ("B", times["bytes_per_s"])
    return f", {1e12 * times['joules'] / times['seconds'] / rate:.3g} pJ/{unit}"


def main() -> None:
    result = command.start("moe_ep.bench.kernels")
    sampling = (command.SAMPLES.value, command.SAMPLE_SECONDS.value)
    result["copy_bytes_per_s"] = copy_bandwidths(command.SIZES.value, *sampling)
    bandwidth = max(result["copy_bytes_per_s"].values())
    result["ceiling"], result["rows"] = tensor_cores.ceiling(result["seed"]), []
    for record in measure_rows(command.SIZES.value, _ROWS.value, result["seed"], *sampling, bandwidth):
        record["share_of_ceiling"] = share_of_ceiling(record, result["ceiling"])
        result["rows"].append(record)  # Written after every row, so that a run cut off leaves what it measured.
        paths = results.write(command.OUT.value, report.file_stem("kernels"), result, as_markdown(result))
    print(f"wrote {', '.join(map(str, paths))}" if result["rows"] else "no such rows", file=sys.stderr)
    if _JSON.value == "-":
        print(json.dumps(result, indent=1))
    elif _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    command.run(main)
