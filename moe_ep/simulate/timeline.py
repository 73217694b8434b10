"""The timeline: compute, network and send streams of every rank, tasks with dependencies, barriers at collectives.

Each stream runs its tasks in the order they are listed; a task starts when its
stream is free and what it depends on has ended. A collective starts on all ranks
when the last of them is ready, so the slowest rank sets the pace. How much of the
network is hidden comes out; it is not put in.
"""

import dataclasses

import numpy as np

from moe_ep.cost.units import Number
from moe_ep.simulate.layer import Block
from moe_ep.simulate.step import StageWork

COMPUTE, NETWORK, SEND = "compute", "network", "send"


@dataclasses.dataclass(frozen=True)
class Task:
    """A unit of one stream; `seconds` is a number or one per rank, `after` are indices of earlier tasks."""

    name: str
    stream: str
    seconds: Number | np.ndarray
    after: tuple[int, ...] = ()

    @property
    def is_collective(self) -> bool:
        return self.stream == NETWORK


@dataclasses.dataclass(frozen=True)
class Timeline:
    """When every task ran on every rank, in seconds from the step's start."""

    tasks: list[Task]
    start: np.ndarray  # [tasks, ranks]
    end: np.ndarray

    @property
    def seconds(self) -> Number:
        return float(self.end.max(initial=0.0))

    def busy(self, stream: str) -> np.ndarray:
        """Returns how long each rank's stream worked, [ranks]."""
        chosen = [index for index, task in enumerate(self.tasks) if task.stream == stream]
        return (self.end[chosen] - self.start[chosen]).sum(axis=0)

    def hidden_share(self) -> Number:
        """Returns the share of the network's time that compute covers, of the slowest rank."""
        network = self.busy(NETWORK)
        compute = self.busy(COMPUTE)
        rank = int(np.argmax(compute))
        if network[rank] == 0:
            return 1.0
        exposed = self.seconds - compute[rank]
        return float(np.clip(1 - exposed / network[rank], 0.0, 1.0))


def run(tasks: list[Task], ranks: int) -> Timeline:
    """Runs the tasks and returns when each began and ended."""
    free = {stream: np.zeros(ranks) for stream in (COMPUTE, NETWORK, SEND)}
    start, end = np.zeros((len(tasks), ranks)), np.zeros((len(tasks), ranks))
    for index, task in enumerate(tasks):
        ready = free[task.stream]
        for earlier in task.after:
            ready = np.maximum(ready, end[earlier])
        if task.is_collective:
            ready = np.full(ranks, ready.max())
        start[index] = ready
        end[index] = ready + task.seconds
        free[task.stream] = end[index]
    return Timeline(tasks, start, end)


class _Program:
    """Collects tasks; `add` returns the index that later tasks depend on."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []

    def add(self, name: str, stream: str, seconds: Number | np.ndarray, *after: int | None) -> int:
        known = tuple(index for index in after if index is not None)
        self.tasks.append(Task(name, stream, seconds, known))
        return len(self.tasks) - 1


def forward_timeline(stage: StageWork, overlap: str, chunks: int) -> Timeline:
    """Returns the timeline of a stage's forward pass."""
    return pass_timeline(stage.forward, stage.dense_s, overlap, chunks)


def pass_timeline(blocks: list[Block], dense_s: Number, overlap: str, chunks: int) -> Timeline:
    """Returns the timeline of one pass over the blocks after the dense layers."""
    program = _Program()
    last = program.add("dense layers and head", COMPUTE, dense_s)
    _BUILD[overlap](program, blocks, chunks, last)
    ranks = len(blocks[0].experts) if blocks else 1
    return run(program.tasks, ranks)


def _build_serial(program: _Program, blocks: list[Block], chunks: int, last: int) -> None:
    for index, block in enumerate(blocks):
        gather = program.add(f"gather {index}", NETWORK, block.gather, last)
        attention = program.add(f"attention {index}", COMPUTE, block.attention, gather)
        dispatch = program.add(f"dispatch {index}", NETWORK, block.dispatch, attention)
        experts = program.add(f"experts {index}", COMPUTE, block.experts, dispatch)
        last = program.add(f"combine {index}", NETWORK, block.combine, experts)


def _build_chunked(program: _Program, blocks: list[Block], chunks: int, last: int) -> None:
    """Dispatch of chunk i + 1 is on the network before combine of chunk i, as the compiler schedules it."""
    for index, block in enumerate(blocks):
        gather = program.add(f"gather {index}", NETWORK, block.gather, last)
        attention = program.add(f"attention {index}", COMPUTE, block.attention, gather)
        dispatches: list[int] = []
        for chunk in range(chunks + 1):
            if chunk < chunks:
                dispatches.append(program.add(f"dispatch {index}.{chunk}", NETWORK, block.dispatch, attention))
            if chunk > 0:
                experts = program.add(f"experts {index}.{chunk - 1}", COMPUTE, block.experts, dispatches[chunk - 1])
                last = program.add(f"combine {index}.{chunk - 1}", NETWORK, block.combine, experts)


def _build_staggered(program: _Program, blocks: list[Block], chunks: int, last: int) -> None:
    """Micro-batches A and B half a layer apart; both streams join at the end of every pair."""
    if not blocks:
        return
    first = program.add("gather 0", NETWORK, blocks[0].gather, last)
    joined: tuple[int, ...] = (program.add("attention A0", COMPUTE, blocks[0].attention, first),)
    for index, block in enumerate(blocks):
        following = blocks[index + 1] if index + 1 < len(blocks) else None
        joined = _pair(program, joined, ("dispatch A", block.dispatch), ("attention B", block.attention), index)
        joined = _pair(program, joined, ("dispatch B", block.dispatch), ("experts A", block.experts), index)
        combine = block.combine + (following.gather if following else 0.0)
        joined = _pair(program, joined, ("combine A", combine), ("experts B", block.experts), index)
        attention = following.attention if following else 0.0
        joined = _pair(program, joined, ("combine B", block.combine), ("attention A next", attention), index)


def _pair(program: _Program, joined: tuple[int, ...], network: tuple, compute: tuple, index: int) -> tuple[int, ...]:
    return (
        program.add(f"{network[0]}{index}", NETWORK, network[1], *joined),
        program.add(f"{compute[0]}{index}", COMPUTE, compute[1], *joined),
    )


_BUILD = {
    "none": _build_serial,
    "chunks": _build_chunked,
    "staggered": _build_staggered,
    "forward_backward": _build_serial,
}


def pipeline_seconds(forward_s: Number, backward_s: Number, send_s: Number, stages: int, micro_batches: int) -> Number:
    """Returns the time of a 1F1B pipeline, event by event; each stage warms up, alternates, drains.

    Args:
      forward_s, backward_s: of one micro-batch on one stage; send_s: to a neighbour.
    """
    forward_end = np.full((stages, micro_batches), np.inf)
    backward_end = np.full((stages, micro_batches), np.inf)
    orders = [_one_f_one_b(stage, stages, micro_batches) for stage in range(stages)]
    position, free = [0] * stages, [0.0] * stages
    remaining = sum(len(order) for order in orders)
    while remaining:
        for stage in range(stages):
            while position[stage] < len(orders[stage]):
                kind, batch = orders[stage][position[stage]]
                ready = _ready(kind, stage, batch, stages, forward_end, backward_end, send_s)
                if np.isinf(ready):
                    break
                seconds, ends = (forward_s, forward_end) if kind == "F" else (backward_s, backward_end)
                free[stage] = max(free[stage], ready) + seconds
                ends[stage, batch] = free[stage]
                position[stage] += 1
                remaining -= 1
    return max(free)


def _one_f_one_b(stage: int, stages: int, micro_batches: int) -> list[tuple[str, int]]:
    warm = min(stages - 1 - stage, micro_batches)
    order = [("F", batch) for batch in range(warm)]
    for batch in range(micro_batches - warm):
        order += [("F", warm + batch), ("B", batch)]
    return order + [("B", batch) for batch in range(micro_batches - warm, micro_batches)]


def _ready(
    kind: str, stage: int, batch: int, stages: int, forward_end: np.ndarray, backward_end: np.ndarray, send_s: Number
) -> Number:
    if kind == "F":
        return 0.0 if stage == 0 else forward_end[stage - 1, batch] + send_s
    if stage == stages - 1:
        return forward_end[stage, batch]
    return backward_end[stage + 1, batch] + send_s
