"""Kernel tables: measured (operation, shape) -> utilisation, and seconds for any shape.

A table row is one measurement. Between rows the *utilisation* (roofline time over
measured time) is interpolated, never the time, so that a shape twice as large
costs about twice as much; outside the rows the nearest utilisation holds and the
answer is marked as extrapolated. Rows bound by the same side of the roofline are
asked alone where there are any: what share of the bandwidth a kernel reaches says
nothing of its share of the FLOP/s. The same utilisation on another GPU means that
memory-bound work scales with its bandwidth and compute-bound work with its FLOP/s.
"""

import dataclasses
import functools
import json
import math
import pathlib
import typing

from moe_ep.cost.units import Number
from moe_ep.hardware import GPUS, Gpu

TABLES = pathlib.Path(__file__).parent / "tables"
_NEIGHBOURS = 4
_PRODUCTS = frozenset({"gemm", "grouped_gemm", "grouped_weight_gradient"})
_BYTES = {"fp8": 1, "bf16": 2, "tf32": 4, "float32": 4}
# Products of these types, if a table has none, reach the share of their peak that BF16's reach of theirs.
_AS_BF16 = ("tf32", "float32")
# Where a table has no rows of an operation: the one that it is closest to.
_LIKE = {"grouped_weight_gradient": "grouped_gemm", "row_gather": "memory"}


@dataclasses.dataclass(frozen=True)
class Work:
    """One kernel call on one GPU: what it does and what it touches.

    `shape` is what neighbours in a table are found by: (rows per group, K, N, groups)
    for products, (context, head size) for attention, (sequences, context, heads, cached
    values a token) for decode's, (bytes,) for memory-bound work.
    """

    op: str  # gemm, grouped_gemm, grouped_weight_gradient, attention, attention_backward, mla_decode, memory, row_gather
    dtype: str
    flops: Number
    bytes: Number
    shape: tuple[Number, ...]

    def of_weight_gradient(self) -> "Work":
        """Returns a product's weight gradient: as many FLOPs and bytes, its own kernel where it is grouped."""
        return dataclasses.replace(self, op="grouped_weight_gradient") if self.op == "grouped_gemm" else self


@dataclasses.dataclass(frozen=True, eq=False)
class Measurement:
    """A row of a table. Equal only to itself, so that a table's rows are a cheap key."""

    op: str
    dtype: str
    shape: tuple[Number, ...]
    utilisation: Number
    bound: str = ""  # "compute" or "memory"; "" where that is not known of what was published


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call, and whether its shape lies outside all measured ones."""

    seconds: Number
    extrapolated: bool


@dataclasses.dataclass(frozen=True)
class KernelTable:
    """Measurements of one family of kernels.

    Attributes:
      launch_s: what no kernel call goes under, however little it does.
      launch_set_by: the recorded row that set it; "" where it is taken from elsewhere.
    """

    name: str
    source: str
    date: str
    launch_s: Number
    rows: tuple[Measurement, ...]
    # Work runs on this share of the SMs (communication kernels hold the others).
    compute_share: Number = 1.0
    launch_set_by: str = ""

    def seconds(self, work: Work, gpu: Gpu) -> Number:
        """Returns the seconds of one call, never less than the roofline."""
        return self.time(work, gpu).seconds

    def fused_seconds(self, works: typing.Sequence[Work], gpu: Gpu) -> Number:
        """Returns the seconds of one kernel that does several works one after another: launched once."""
        busy = sum(self._busy(work, gpu).seconds for work in works)
        return max(busy, self.launch_s) if busy else 0.0

    def time(self, work: Work, gpu: Gpu) -> Timing:
        """Returns the seconds of one call; nothing to do costs nothing."""
        busy = self._busy(work, gpu)
        return dataclasses.replace(busy, seconds=max(busy.seconds, self.launch_s)) if busy.seconds else busy

    def _busy(self, work: Work, gpu: Gpu) -> Timing:
        if work.flops == 0 and work.bytes == 0:
            return Timing(0.0, False)
        bound = bound_of(work, gpu, self.compute_share)
        utilisation, extrapolated = _utilisation(self.rows, work.op, work.dtype, work.shape, bound)
        return Timing(roofline_seconds(work, gpu, self.compute_share) / utilisation, extrapolated)


def roofline_seconds(work: Work, gpu: Gpu, compute_share: Number = 1.0) -> Number:
    """Returns the larger of FLOPs over peak and bytes over memory bandwidth."""
    return max(work.flops / (peak_flops(gpu, work.dtype) * compute_share), work.bytes / gpu.memory_bytes_per_s)


def bound_of(work: Work, gpu: Gpu, compute_share: Number = 1.0) -> str:
    """Returns the side of the roofline that sets the least time: "compute" or "memory"."""
    compute = work.flops / (peak_flops(gpu, work.dtype) * compute_share)
    return "compute" if compute > work.bytes / gpu.memory_bytes_per_s else "memory"


def peak_flops(gpu: Gpu, dtype: str) -> Number:
    """Returns dense FLOP/s of products of a type on a GPU."""
    return {
        "fp8": gpu.fp8_flops_per_s,
        "bf16": gpu.bf16_flops_per_s,
        "tf32": gpu.tf32_flops_per_s,
        "float32": gpu.fp32_flops_per_s,
    }[dtype]


def gemm(m: Number, k: Number, n: Number, dtype: str, groups: Number = 1, out_bytes: int = 2) -> Work:
    """Returns the work of `groups` products [m, k] x [k, n], all operands read once and the output written once."""
    operand = _BYTES[dtype]
    touched = groups * (operand * (m * k + k * n) + out_bytes * m * n)
    op = "grouped_gemm" if groups > 1 else "gemm"
    return Work(op, dtype, 2.0 * groups * m * k * n, touched, (m, k, n, groups))


def memory_pass(touched_bytes: Number) -> Work:
    """Returns the work of an elementwise pass that reads and writes so many bytes."""
    return Work("memory", "bf16", 0.0, touched_bytes, (touched_bytes,))


def row_gather(touched_bytes: Number) -> Work:
    """Returns the work of moving rows by index, or of adding them up by weight."""
    return dataclasses.replace(memory_pass(touched_bytes), op="row_gather")


@dataclasses.dataclass(frozen=True)
class AssumedKernels:
    """Stands in for a table where a source only assumes one MFU and one share of the memory bandwidth."""

    mfu: Number
    memory_efficiency: Number
    compute_share: Number = 1.0
    launch_s = 0.0

    @property
    def name(self) -> str:
        return f"assumed: MFU {self.mfu:.0%}, memory bandwidth {self.memory_efficiency:.0%}"

    def seconds(self, work: Work, gpu: Gpu) -> Number:
        """Returns the larger of compute and memory time at the assumed efficiencies."""
        compute = work.flops / (peak_flops(gpu, work.dtype) * self.mfu * self.compute_share)
        return max(compute, work.bytes / (gpu.memory_bytes_per_s * self.memory_efficiency))

    def fused_seconds(self, works: typing.Sequence[Work], gpu: Gpu) -> Number:
        """Returns the seconds of one kernel that does several works one after another."""
        return sum(self.seconds(work, gpu) for work in works)


@functools.lru_cache(maxsize=65536)
def _utilisation(
    rows: tuple[Measurement, ...], op: str, dtype: str, shape: tuple[Number, ...], bound: str
) -> tuple[Number, bool]:
    """Returns the inverse-square-distance mean of the nearest rows' utilisations, in log2 of the shape."""
    known = [row for row in rows if row.op == op and row.dtype == dtype]
    if not known and op in _LIKE:
        return _utilisation(rows, _LIKE[op], dtype, shape, bound)
    if not known and dtype in _AS_BF16:
        return _utilisation(rows, op, "bf16", shape, bound)
    if not known:
        raise KeyError(f"the kernel table has no row of op {op} in {dtype}")
    same = [row for row in known if row.bound in (bound, "")] or known
    place = _logs(shape)
    distances = sorted((_distance(_logs(row.shape), place), row.utilisation) for row in same)
    nearest = distances[:_NEIGHBOURS]
    if exact := [utilisation for distance, utilisation in distances if distance < 1e-6]:
        return sum(exact) / len(exact), False
    weights = [distance**-2 for distance, _ in nearest]
    mean = sum(weight * value for weight, (_, value) in zip(weights, nearest)) / sum(weights)
    return mean, _is_outside(place, [_logs(row.shape) for row in same])


def _logs(shape: typing.Sequence[Number]) -> tuple[Number, ...]:
    return tuple(math.log2(max(size, 1.0)) for size in shape)


def _distance(one: typing.Sequence[Number], other: typing.Sequence[Number]) -> Number:
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(one, other)))


def _is_outside(place: tuple[Number, ...], rows: list[tuple[Number, ...]]) -> bool:
    return any(not min(column) <= value <= max(column) for value, column in zip(place, zip(*rows)))


@functools.lru_cache(maxsize=None)
def load_table(name_or_path: str) -> KernelTable:
    """Reads a table: `h200_bf16`, `hopper_fp8_deepseek`, or a path to a JSON of the same form.

    A row has op, dtype, shape, and either seconds with flops and bytes, or utilisation.

    Raises:
      FileNotFoundError, KeyError: no such table, or a row without what it needs.
    """
    path = pathlib.Path(name_or_path)
    if path.suffix != ".json":
        path = TABLES / f"{name_or_path}.json"
    document = json.loads(path.read_text())
    gpu = GPUS[document["gpu"]]
    rows = tuple(_measurement(row, gpu) for row in document["rows"])
    head = (document[name] for name in ("name", "source", "date", "launch_s"))
    return KernelTable(*head, rows, launch_set_by=document.get("launch_set_by", ""))


def _measurement(row: dict[str, typing.Any], gpu: Gpu) -> Measurement:
    op, dtype, shape = row["op"], row["dtype"], tuple(row["shape"])
    if "utilisation" in row:
        bound = bound_of(gemm(*shape[:3], dtype, shape[3]), gpu) if op in _PRODUCTS else ""
        return Measurement(op, dtype, shape, min(row["utilisation"], 1.0), bound)
    work = Work(op, dtype, row["flops"], row["bytes"], shape)
    return Measurement(op, dtype, shape, min(roofline_seconds(work, gpu) / row["seconds"], 1.0), bound_of(work, gpu))
