"""Who runs when, and where: a queue, each device's slots and pages, and the work of every step.

A request is admitted, first come first served, when a device has a slot and all the
pages that its prompt and its longest completion can fill. So a sequence that has
begun always ends, and memory is bounded, without preemption: a sequence computed
again by chunks would not be bitwise what decoding made of it, and a request's
tokens would depend on its neighbors. The price is that a request which stops
early held pages it did not need.
"""

import collections
import dataclasses
from typing import NamedTuple

import numpy as np

from moe_ep.serve.inputs import ChunkInputs, DecodeInputs, Sampling
from moe_ep.serve.pages import PagePool
from moe_ep.serve.request import Completion, QueueFull, Refused, Request, Update, check_request
from moe_ep.serve.size import EngineSize


@dataclasses.dataclass(eq=False)
class Running:
    """A request that was admitted. `prefilled` and `asked` count what steps were made for, read or not."""

    request: Request
    device: int
    slot: int  # of all devices' slots
    pages: list[int]
    prefilled: int = 0  # tokens of the prompt
    asked: int = 0  # tokens of the completion
    tokens: list[int] = dataclasses.field(default_factory=list)
    arrived_s: list[float] = dataclasses.field(default_factory=list)
    ended: bool = False

    @property
    def prompt_left(self) -> int:
        return len(self.request.prompt) - self.prefilled

    @property
    def goes_on(self) -> bool:
        """Whether a step may be asked for its next token."""
        return self.prompt_left == 0 and self.asked < self.request.max_tokens

    def completion(self, finish: str) -> Completion:
        return Completion(self.request.id, tuple(self.tokens), finish, "", tuple(self.arrived_s))


class Work(NamedTuple):
    """A step: its inputs, and the sequences that it gives a token, each in its slot."""

    inputs: ChunkInputs | DecodeInputs
    receivers: list[Running]


class Scheduler:
    """Decides; it knows no device and no clock.

    Args:
      size: of one device's share.
      devices: that sequences are spread over.
      vocabulary: token ids are below it.
    """

    def __init__(self, size: EngineSize, devices: int, vocabulary: int):
        self.size = size
        self.pools = [PagePool(size.pages) for _ in range(devices)]
        self._vocabulary = vocabulary
        self._waiting: collections.OrderedDict[str, Request] = collections.OrderedDict()
        self._running: dict[str, Running] = {}  # in order of admission
        self._free_slots = [list(range(size.slots - 1, -1, -1)) for _ in range(devices)]
        self._by_slot = no_decode(size, devices)
        self._chunk_was_last = False

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def submit(self, request: Request) -> None:
        """Queues a request.

        Raises:
          Refused: it is not one, its id is taken, or it could never fit.
          QueueFull: as many wait as may.
        """
        check_request(request, self._vocabulary)
        if request.id in self._waiting or request.id in self._running:
            raise Refused(request.id, f"id {request.id!r} is another request's that has not ended")
        self._check_fits(request)
        if self.waiting >= self.size.queue:
            raise QueueFull(request.id, f"the queue is full: {self.waiting} requests wait, the most allowed")
        self._waiting[request.id] = request

    def cancel(self, id: str) -> Update | None:
        """Ends a request; returns its last update, None if there is none of this id."""
        if id in self._waiting:
            del self._waiting[id]
            return Update(id, (), Completion(id, (), "cancelled"))
        run = self._running.get(id)
        return self._end(run, "cancelled", ()) if run else None

    def next_work(self) -> Work | None:
        """Admits whom there is room for and returns the next step, None when nobody waits for one.

        Where prompts and completions both wait they take turns, so neither stops the other.
        """
        self._admit()
        makers = (self._decode, self._chunk) if self._chunk_was_last else (self._chunk, self._decode)
        for make in makers:
            if work := make():
                self._chunk_was_last = isinstance(work.inputs, ChunkInputs)
                return work
        return None

    def accept(self, work: Work, newest: np.ndarray, now_s: float) -> list[Update]:
        """Takes the tokens that a step gave.

        Args:
          work: the step.
          newest: each slot's token after it.
          now_s: when they were read.
        """
        return [self._take(run, int(newest[run.slot]), now_s) for run in work.receivers if not run.ended]

    def _take(self, run: Running, token: int, now_s: float) -> Update:
        if token in run.request.stop:
            return self._end(run, "stop", ())
        run.tokens.append(token)
        run.arrived_s.append(now_s)
        if len(run.tokens) == run.request.max_tokens:
            return self._end(run, "length", (token,))
        return Update(run.request.id, (token,))

    def _end(self, run: Running, finish: str, tokens: tuple[int, ...]) -> Update:
        """Frees slot and pages. Steps in flight may still write there: those that follow write later."""
        run.ended = True
        del self._running[run.request.id]
        self.pools[run.device].give_back(run.pages)
        self._free_slots[run.device].append(run.slot - run.device * self.size.slots)
        return Update(run.request.id, tokens, run.completion(finish))

    def _check_fits(self, request: Request) -> None:
        size, rows = self.size, _rows_needed(request)
        if rows > size.context:
            raise Refused(
                request.id,
                f"{len(request.prompt)} tokens of prompt and max_tokens={request.max_tokens} need {rows} rows of cache: "
                f"allowed is {size.context}, the longest sequence of this engine",
            )
        if size.pages_for(rows) > size.pages:
            raise Refused(
                request.id,
                f"{len(request.prompt)} tokens of prompt and max_tokens={request.max_tokens} need {size.pages_for(rows)} "
                f"pages of {size.page_rows} rows: allowed is {size.pages}, the cache of a device",
            )

    def _admit(self) -> None:
        while self._waiting:
            request = next(iter(self._waiting.values()))
            pages = self.size.pages_for(_rows_needed(request))
            able = [
                device for device, pool in enumerate(self.pools) if pool.free >= pages and self._free_slots[device]
            ]
            if not able:
                return  # nobody overtakes: otherwise long requests would wait for ever
            # Slots first: devices compute in step, so an empty one gains nothing.
            device = max(able, key=lambda device: (len(self._free_slots[device]), self.pools[device].free))
            del self._waiting[request.id]
            self._start(request, device, pages)

    def _start(self, request: Request, device: int, pages: int) -> None:
        slot = device * self.size.slots + self._free_slots[device].pop()
        run = Running(request, device, slot, self.pools[device].take(pages))
        self._running[request.id] = run
        self._by_slot.pages[slot] = 0
        self._by_slot.pages[slot, :pages] = run.pages
        sampling = self._by_slot.sampling
        sampling.temperature[slot], sampling.top_k[slot] = request.temperature, request.top_k
        sampling.top_p[slot], sampling.seed[slot] = request.top_p, request.seed

    def _chunk(self) -> Work | None:
        rows = self._rows_of_chunk()
        if not any(rows):
            return None
        inputs, receivers = no_chunk(self.size, len(self.pools)), []
        for device, runs in enumerate(rows):
            for row, run in enumerate(runs, device * self.size.chunk_sequences):
                self._fill_row(inputs, row, run)
                if run.prompt_left == 0:
                    run.asked = 1
                    receivers.append(run)
        return Work(inputs, receivers)

    def _rows_of_chunk(self) -> list[list[Running]]:
        """Returns each device's sequences whose prompts go on, the longest here first."""
        rows: list[list[Running]] = [[] for _ in self.pools]
        for run in self._running.values():
            if run.prompt_left and len(rows[run.device]) < self.size.chunk_sequences:
                rows[run.device].append(run)
        return rows

    def _fill_row(self, inputs: ChunkInputs, row: int, run: Running) -> None:
        count = min(self.size.chunk_tokens, run.prompt_left)
        inputs.tokens[row, :count] = run.request.prompt[run.prefilled : run.prefilled + count]
        inputs.counts[row], inputs.starts[row] = count, run.prefilled
        inputs.pages[row] = self._by_slot.pages[run.slot]
        for field, by_slot in zip(inputs.sampling, self._by_slot.sampling, strict=True):
            field[row] = by_slot[run.slot]
        run.prefilled += count
        if run.prompt_left == 0:
            inputs.slots[row] = run.slot - run.device * self.size.slots
            self._by_slot.lengths[run.slot] = run.prefilled

    def _decode(self) -> Work | None:
        receivers = [run for run in self._running.values() if run.goes_on]
        if not receivers:
            return None
        slots, by_slot = [run.slot for run in receivers], self._by_slot
        # Copies: a step may still be reading its inputs when the next is made.
        sampling = Sampling(*(field.copy() for field in by_slot.sampling))
        inputs = DecodeInputs(by_slot.active.copy(), by_slot.lengths.copy(), by_slot.pages.copy(), sampling)
        inputs.active[slots] = True
        by_slot.lengths[slots] += 1
        for run in receivers:
            run.asked += 1
        return Work(inputs, receivers)


def no_chunk(size: EngineSize, devices: int) -> ChunkInputs:
    """Returns the inputs of a step that computes no prompt."""
    rows = size.chunk_sequences * devices
    return ChunkInputs(
        tokens=np.zeros((rows, size.chunk_tokens), np.int32),
        counts=np.zeros(rows, np.int32),
        starts=np.zeros(rows, np.int32),
        pages=np.zeros((rows, size.pages_per_sequence), np.int32),
        slots=np.full(rows, size.slots, np.int32),
        sampling=_no_sampling(rows),
    )


def no_decode(size: EngineSize, devices: int) -> DecodeInputs:
    """Returns the inputs of a step in which no sequence goes on."""
    slots = size.slots * devices
    pages = np.zeros((slots, size.pages_per_sequence), np.int32)
    return DecodeInputs(np.zeros(slots, bool), np.zeros(slots, np.int32), pages, _no_sampling(slots))


def _rows_needed(request: Request) -> int:
    """All tokens but the last, which nothing attends to."""
    return len(request.prompt) + request.max_tokens - 1


def _no_sampling(rows: int) -> Sampling:
    return Sampling(
        np.zeros(rows, np.float32), np.zeros(rows, np.int32), np.ones(rows, np.float32), np.zeros(rows, np.uint32)
    )
