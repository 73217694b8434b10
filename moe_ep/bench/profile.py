"""Where a program's time on a GPU goes: a profiler trace joined with the compiled program's named scopes."""

import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CALLS = re.compile(r"calls=%?([\w.\-]+)")
_WRAPPER = re.compile(r"(?:transpose|jvp|vmap|checkpoint|remat|jit)\((.*)\)")
_LOOPS = frozenset({"while", "body", "closed_call", "eval_jaxpr", "checkpoint", "rematted_computation", "shard_map"})


class Kernel(NamedTuple):
    """All launches of one kernel: its name, the scope and direction that made it, seconds and launches a step."""

    name: str
    scope: str
    seconds: float
    launches: float


def kernels_of(folder: pathlib.Path, program: str, steps: int) -> list[Kernel]:
    """Returns the kernels of a trace, longest first.

    Args:
      folder: where `jax.profiler.trace` wrote.
      program: the compiled program's text, whose metadata names each instruction's scope.
      steps: runs of the program in the trace.
    """
    op_names, totals = op_names_of(program), {}
    for path in folder.rglob("*.xplane.pb"):
        for name, instruction, seconds in _launches(path):
            key = (instruction or name, scope_of(op_names.get(instruction or name, "")))
            before = totals.get(key, (0.0, 0))
            totals[key] = (before[0] + seconds, before[1] + 1)
    kernels = [Kernel(*key, seconds / steps, count / steps) for key, (seconds, count) in totals.items()]
    return sorted(kernels, key=lambda kernel: -kernel.seconds)


def span_of(folder: pathlib.Path, steps: int) -> float:
    """Returns seconds a step from the first kernel's start in the trace to the last one's end: with what lies between."""
    starts, ends = [], []
    for event in (event for path in folder.rglob("*.xplane.pb") for event in _events(path)):
        starts.append(event.start_ns)
        ends.append(event.start_ns + event.duration_ns)
    return (max(ends) - min(starts)) * 1e-9 / steps if starts else 0.0


def _launches(path: pathlib.Path) -> Iterator[tuple[str, str, float]]:
    """Yields (kernel, instruction or "", seconds) of every launch on the first GPU."""
    for event in _events(path):
        yield event.name, str(dict(event.stats).get("hlo_op", "")), event.duration_ns * 1e-9


def _events(path: pathlib.Path) -> Iterator:
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        if plane.name.startswith("/device:GPU:0"):
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    yield from line.events


def op_names_of(program: str) -> dict[str, str]:
    """Returns each instruction's op_name; one without takes the first inside the computation that it calls."""
    own, called, first, computation = {}, {}, {}, ""
    for line in program.splitlines():
        if start := _COMPUTATION.match(line):
            computation = start.group(1)
        elif instruction := _INSTRUCTION.match(line):
            name, op_name, calls = instruction.group(1), _OP_NAME.search(line), _CALLS.search(line)
            if op_name:
                own[name] = op_name.group(1)
                first.setdefault(computation, op_name.group(1))
            if calls:
                called[name] = calls.group(1)
    return {name: first.get(body, "") for name, body in called.items()} | own


def scope_of(op_name: str) -> str:
    """Returns the named scopes of an op_name path, "backward" first where differentiation made it; "" for none."""
    *path, _ = op_name.split("/") if "/" in op_name else ("", "")
    scopes = ["backward"] if "transpose(" in op_name else []
    for part in path:
        names = _unwrapped(part)
        scopes += [name for name in names if name not in _LOOPS and "->" not in name and name not in scopes]
    return "/".join(scopes)


def _unwrapped(part: str) -> list[str]:
    if part.startswith("jit("):
        return []
    while wrapper := _WRAPPER.fullmatch(part):
        part = wrapper.group(1)
    return [part] if part else []


def by_scope(kernels: list[Kernel]) -> dict[str, float]:
    """Returns the seconds of each scope, longest first; of what no scope names, the kernels' own names."""
    totals: dict[str, float] = {}
    for kernel in kernels:
        key = kernel.scope or re.sub(r"[\d.]+$", "", kernel.name)[:60]
        totals[key] = totals.get(key, 0.0) + kernel.seconds
    return dict(sorted(totals.items(), key=lambda item: -item[1]))
