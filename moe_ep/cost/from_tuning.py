"""Turns what the benchmarks measured into the table of this project's kernels.

    python -m moe_ep.cost.from_tuning nvidia_h200     reads results/{tune,kernels}_nvidia_h200.json

Products bound by compute come from the benchmark of the kernels, whose contenders take
turns on a warm card: that is the rate that a whole program sees, 5-9 % below what the
tuner's short bursts reach before the card's power limit holds them back. Products
bound by memory are the tuner's; caches, rows moved by index and a pass as XLA makes it
the benchmark's. Attention comes from the table of anchors, which says where it was
measured. None of these is a run that the simulator is compared with; what no kernel
goes under is set by one (`python -m moe_ep.simulate.launch`, to be run afterwards).
"""

import json
import pathlib
import re
import sys
import typing

from moe_ep.cost.kernels import TABLES, Work, gemm, memory_pass, row_gather
from moe_ep.hardware import GPUS, gpu_of_device_kind

_ANCHORS = "h200_bf16"
_OWN = "h200_moe_ep"
_FORWARD_STEPS = ("hidden", "product")
_WIDTH, _HIDDEN = 7168, 18432  # of the benchmark's products
_GROUPED_ROWS = 8192  # all groups together
_COPY_BYTES = 2.0 * 2 * 2**30
# Up to so many rows of a group its weights' bytes, not power, set the time.
_MEMORY_BOUND_ROWS = 512

_RESULTS = pathlib.Path("results")

Json = dict[str, typing.Any]


def table_of(anchors: Json, tuning: Json, benchmark: Json) -> Json:
    """Returns the table of the project's kernels.

    Args:
      anchors: a kernel table of the same GPU; its rows stand for operations that nothing else has.
      tuning: of `moe_ep.bench.tune`: `entries` of a problem and medians in milliseconds by name.
      benchmark: of `moe_ep.bench.kernels`: `rows` of a name, FLOPs, bytes and contenders' seconds.
    """
    tuned = [_tuned(entry) for entry in tuning["entries"] if _is_memory_bound(entry["problem"])]
    measured = [row for entry in benchmark["rows"] for row in _measured(entry)]
    copy_s = _COPY_BYTES / benchmark["copy_bytes_per_s"]["xla"]
    rows = tuned + measured + [_row(memory_pass(_COPY_BYTES), copy_s, "copy: xla")]
    replaced = {row["op"] for row in rows}
    return {
        **{name: anchors[name] for name in ("format", "gpu", "launch_s")},
        "name": _OWN,
        "device": benchmark["device"],
        "date": benchmark["date"][:10],
        "commit": benchmark["commit"],
        "versions": ", ".join(f"{name} {version}" for name, version in benchmark["versions"].items()),
        "source": "this project's kernels and XLA on one H200, warm; attention: cuDNN figures of arXiv:2407.08608 on H100",
        "rows": rows + [row for row in anchors["rows"] if row["op"] not in replaced],
    }


def _row(work: Work, seconds: float, note: str) -> Json:
    return {"op": work.op, "dtype": work.dtype, "shape": list(work.shape), "flops": work.flops, "bytes": work.bytes,
            "seconds": seconds, "note": note}  # fmt: skip


def _is_memory_bound(problem: Json) -> bool:
    return problem["step"] in _FORWARD_STEPS and problem["rows"] <= _MEMORY_BOUND_ROWS


def _tuned(entry: Json) -> Json:
    problem, times = entry["problem"], entry["milliseconds"]
    groups, fastest = problem["groups"], min(times, key=times.get)
    columns = problem["columns"] * problem["inputs"]
    work = gemm(problem["rows"] / groups, problem["depth"], columns, "bf16", groups)
    return _row(work, times[fastest] * 1e-3, f"{problem['step']}: {fastest}")


def _measured(entry: Json) -> list[Json]:
    """The faster of ours and XLA's, as the program would choose; rows of other names are not of the table."""
    known = ("ours", "xla")
    times = {name: value["seconds"] for name, value in entry["contenders"].items() if name in known}
    pattern = next((pattern for pattern in _WORKS if re.fullmatch(pattern, entry["row"])), None)
    if pattern is None:
        return []
    fastest = min(times, key=times.get)
    works = _WORKS[pattern](entry, *(int(size) for size in re.fullmatch(pattern, entry["row"]).groups()))
    return [_row(work, times[fastest] / len(works), f"{entry['row']}: {fastest}") for work in works]


def _one_product(entry: Json, rows: int) -> list[Work]:
    return [gemm(rows, _WIDTH, _HIDDEN, "bf16")]


def _two_products(entry: Json, rows: int) -> list[Work]:
    return [gemm(rows, _WIDTH, _HIDDEN, "bf16"), gemm(rows, _HIDDEN, _WIDTH, "bf16")]


def _grouped(entry: Json, groups: int) -> list[Work]:
    return [gemm(_GROUPED_ROWS / groups, _WIDTH, _HIDDEN, "bf16", groups)]


def _weight_gradient(entry: Json, groups: int) -> list[Work]:
    return [gemm(_GROUPED_ROWS / groups, _WIDTH, _HIDDEN, "bf16", groups).of_weight_gradient()]


def _cache_read(entry: Json, latent: int, rope: int) -> list[Work]:
    """64 sequences of 4096 cached tokens, 128 heads."""
    return [Work("mla_decode", "bf16", entry["flops"], entry["bytes"], (64, 4096, 128, latent + rope))]


def _moved_rows(entry: Json) -> list[Work]:
    return [row_gather(entry["bytes"])]


# Name of a benchmark's row -> the calls that its time is shared among.
_WORKS: dict[str, typing.Callable[..., list[Work]]] = {
    r"gemm1_gelu M=(\d+)": _one_product,
    r"mlp_forward M=(\d+)": _two_products,
    r"mlp_decode M=(\d+)": _two_products,
    r"grouped_gelu G=(\d+)": _grouped,
    r"grouped_wgrad G=(\d+)": _weight_gradient,
    r"mla_decode (\d+)\+(\d+)": _cache_read,
    r"gather": _moved_rows,
    r"combine": _moved_rows,
}


def as_text(table: Json) -> str:
    """Returns the table as JSON, a line a row."""
    head = json.dumps({name: value for name, value in table.items() if name != "rows"}, indent=1)
    rows = ",\n".join("  " + json.dumps(row) for row in table["rows"])
    return head[:-2] + ',\n "rows": [\n' + rows + "\n ]\n}\n"


def main(arguments: list[str]) -> None:
    """Writes the table of this project's kernels beside the others; the one argument is the device's name in results/."""
    anchors = _read(TABLES / f"{_ANCHORS}.json")
    devices = sorted(
        path.stem.removeprefix("kernels_") for path in _RESULTS.glob("kernels_*.json") if _is_of(path, anchors["gpu"])
    )
    if len(arguments) != 1 or arguments[0] not in devices:
        allowed = f"one of {', '.join(devices)}, measured on the anchors' GPU"
        print(f"from_tuning {' '.join(arguments)}: allowed is {allowed}", file=sys.stderr)
        sys.exit(2)
    (device,) = arguments
    table = table_of(anchors, *(_read(_RESULTS / f"{topic}_{device}.json") for topic in ("tune", "kernels")))
    (TABLES / f"{_OWN}.json").write_text(as_text(table))


def _read(path: pathlib.Path) -> Json:
    return json.loads(path.read_text())


def _is_of(path: pathlib.Path, gpu: str) -> bool:
    return gpu_of_device_kind(_read(path)["device"]) == GPUS[gpu]


if __name__ == "__main__":
    main(sys.argv[1:])
