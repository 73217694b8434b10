"""What was measured fastest, by GPU: the table that the choice of an implementation reads.

`table.json` maps a GPU's model ("h200") to entries of one measured step each (`python -m
moe_ep.bench.tune` writes them). A step of another size takes the nearest entry.
"""

import dataclasses
import functools
import json
import math
import pathlib

from moe_ep.kernels.device import MEASURED_AS, gpu_model
from moe_ep.kernels.grouped_matmul.mosaic_parts import Tiling

PATH = pathlib.Path(__file__).with_name("table.json")


@dataclasses.dataclass(frozen=True)
class Problem:
    """One step's sizes: rows [R, depth] by weights [G, depth, columns], `inputs` products by an activation."""

    step: str
    groups: int
    rows: int
    depth: int
    columns: int
    inputs: int = 1


@dataclasses.dataclass(frozen=True)
class Entry:
    """The fastest implementation of a problem, its tiling where it has one, the medians in ms by name, date and commit."""

    problem: Problem
    implementation: str
    tiling: Tiling | None
    milliseconds: dict[str, float]
    measured: str


def nearest(device_kind: str, problem: Problem) -> Entry | None:
    """Returns the entry of this GPU, step and number of inputs whose sizes are nearest, in octaves; None without any."""
    gpus, model = read(PATH), gpu_model(device_kind)
    measured = gpus.get(model) or gpus.get(MEASURED_AS.get(model), ())
    entries = [entry for entry in measured if _comparable(entry.problem, problem)]
    return min(entries, key=lambda entry: _octaves_between(entry.problem, problem), default=None)


@functools.cache
def read(path: pathlib.Path) -> dict[str, tuple[Entry, ...]]:
    """Returns the entries by GPU."""
    gpus = json.loads(path.read_text())
    return {gpu: tuple(_entry(record) for record in records) for gpu, records in gpus.items()}


def write(path: pathlib.Path, device_kind: str, entries: list[Entry]):
    """Replaces one GPU's part of the table."""
    gpus = json.loads(path.read_text()) if path.exists() else {}
    gpus[gpu_model(device_kind)] = [dataclasses.asdict(entry) for entry in entries]
    path.write_text(_as_json(gpus))
    read.cache_clear()


def _as_json(gpus: dict[str, list[dict]]) -> str:
    # A line an entry, so that a change of the table reads like one.
    parts = (f"{json.dumps(gpu)}: [\n" + ",\n".join(map(json.dumps, entries)) + "\n]" for gpu, entries in gpus.items())
    return "{" + ",\n".join(parts) + "}\n"


def _entry(record):
    tiling = record["tiling"] and Tiling(**record["tiling"])
    return Entry(Problem(**record["problem"]), record["implementation"], tiling, record["milliseconds"], record["measured"])


def _comparable(entry: Problem, problem: Problem) -> bool:
    # One group is another kind of problem than several: it has XLA's dense product as a rival.
    same_kind = (entry.groups == 1) == (problem.groups == 1)
    return same_kind and (entry.step, entry.inputs) == (problem.step, problem.inputs)


def _octaves_between(entry: Problem, problem: Problem) -> float:
    sizes = ("groups", "rows", "depth", "columns")
    return sum(abs(math.log2(getattr(entry, size) / getattr(problem, size))) for size in sizes)
