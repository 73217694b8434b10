"""Turns what `moe_ep.bench.tune` and `moe_ep.bench.kernels` measured into the table of this project's kernels.

    python -m moe_ep.cost.from_tuning results/tune_nvidia_h200.json results/kernels_nvidia_h200.json

It takes the fastest time of every forward product, and the fastest of ours and XLA's
cache reads; attention and memory passes come from the table of anchors, which says
where they were measured.
"""

import json
import pathlib
import sys
import typing

from moe_ep.cost.kernels import TABLES, gemm

_FORWARD_STEPS = ("hidden", "product")
_ANCHORS = "h200_bf16"
_OWN = "h200_moe_ep"


def table_of(
    tuning: dict[str, typing.Any], anchors: dict[str, typing.Any], benchmark: dict[str, typing.Any] | None = None
) -> dict[str, typing.Any]:
    """Returns the table: tuned products, measured cache reads, and of the anchors the rest.

    Args:
      tuning: `device`, `date`, `commit`, `versions`, and `entries` of a problem (step,
        groups, rows, depth, columns, inputs) and medians in milliseconds by name.
      anchors: a kernel table of the same GPU.
      benchmark: `rows` of a name, FLOPs, bytes and contenders' seconds; its cache reads replace the anchors'.
    """
    products = [_row(entry) for entry in tuning["entries"] if entry["problem"]["step"] in _FORWARD_STEPS]
    reads = [_cache_read(row) for row in (benchmark or {"rows": []})["rows"] if row["row"] in _CACHE_READS]
    replaced = {"gemm", "grouped_gemm"} | ({"mla_decode"} if reads else set())
    others = [row for row in anchors["rows"] if row["op"] not in replaced]
    return {
        **{name: anchors[name] for name in ("format", "gpu", "launch_s")},
        "name": _OWN,
        "device": tuning["device"],
        "date": tuning["date"][:10],
        "commit": tuning["commit"],
        "versions": ", ".join(f"{name} {version}" for name, version in tuning["versions"].items()),
        "source": "products: this project's kernels on one H200; the rest: " + anchors["source"],
        "rows": products + reads + others,
    }


def _row(entry: dict[str, typing.Any]) -> dict[str, typing.Any]:
    problem, times = entry["problem"], entry["milliseconds"]
    groups, fastest = problem["groups"], min(times, key=times.get)
    columns = problem["columns"] * problem["inputs"]
    work = gemm(_rows_with_tokens(problem) / groups, problem["depth"], columns, "bf16", groups)
    return {
        "op": work.op, "dtype": "bf16", "shape": list(work.shape), "flops": work.flops, "bytes": work.bytes,
        "seconds": times[fastest] * 1e-3, "note": f"{problem['step']}: {fastest}",
    }  # fmt: skip


# Name of a benchmark's row -> sequences, cached tokens, heads.
_CACHE_READS = {"mla_decode 512+64": (64, 4096, 128)}


def _cache_read(row: dict[str, typing.Any]) -> dict[str, typing.Any]:
    seconds = {name: row["contenders"][name]["seconds"] for name in ("ours", "xla")}
    fastest = min(seconds, key=seconds.get)
    return {
        "op": "mla_decode", "dtype": "bf16", "shape": list(_CACHE_READS[row["row"]]), "flops": row["flops"],
        "bytes": row["bytes"], "seconds": seconds[fastest], "note": f"{row['row']}: {fastest}",
    }  # fmt: skip


def _rows_with_tokens(problem: dict[str, typing.Any]) -> int:
    """Groups of up to 64 rows are timed full; larger ones are unequal, with a tile to spare for each but one."""
    rows, groups = problem["rows"], problem["groups"]
    return rows if rows <= 64 * groups else rows - 128 * (groups - 1)


def as_text(table: dict[str, typing.Any]) -> str:
    """Returns the table as JSON, a line a row."""
    head = json.dumps({name: value for name, value in table.items() if name != "rows"}, indent=1)
    rows = ",\n".join("  " + json.dumps(row) for row in table["rows"])
    return head[:-2] + ',\n "rows": [\n' + rows + "\n ]\n}\n"


def main(tuning_path: str, benchmark_path: str) -> None:
    """Writes the table of this project's kernels beside the others."""
    anchors, tuning, benchmark = (
        json.loads(pathlib.Path(path).read_text())
        for path in (TABLES / f"{_ANCHORS}.json", tuning_path, benchmark_path)
    )
    table = table_of(tuning, anchors, benchmark)
    (TABLES / f"{_OWN}.json").write_text(as_text(table))


if __name__ == "__main__":
    main(*sys.argv[1:])
