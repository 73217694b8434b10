"""Pages and slots under any stream of requests: without devices, which here answer with made-up tokens."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_ep.serve.inputs import ChunkInputs
from moe_ep.serve.pages import PagePool
from moe_ep.serve.request import QueueFull, Refused, Request
from moe_ep.serve.scheduler import Scheduler
from moe_ep.serve.size import EngineSize

VOCABULARY, END = 50, 0


@given(st.integers(0, 12), st.lists(st.tuples(st.booleans(), st.integers(0, 6)), max_size=40))
def test_a_page_has_one_holder_and_none_is_lost(pages, actions):
    pool, held = PagePool(pages), []
    for takes, count in actions:
        if takes and count <= pool.free:
            held.append(pool.take(count))
        elif not takes and held:
            pool.give_back(held.pop(count % len(held)))
        owned = [page for taken in held for page in taken]
        assert len(set(owned)) == len(owned) == pool.in_use
        assert pool.in_use + pool.free == pages
        assert set(owned) <= set(range(pages))


def test_a_pool_refuses_what_it_has_not():
    pool = PagePool(2)
    with pytest.raises(ValueError, match="3 pages asked for, 2 of 2 are free"):
        pool.take(3)
    taken = pool.take(2)
    pool.give_back(taken)
    with pytest.raises(ValueError, match="not all of them are held"):
        pool.give_back(taken)


SIZES = st.builds(
    EngineSize,
    slots=st.integers(1, 3),
    chunk_sequences=st.integers(1, 3),
    chunk_tokens=st.integers(1, 8),
    page_rows=st.integers(1, 5),
    pages=st.integers(4, 10),
    pages_per_sequence=st.integers(1, 6),
    queue=st.integers(1, 4),
)


# Tokens of the prompt, and max_tokens.
LENGTHS = st.lists(st.tuples(st.integers(0, 14), st.integers(1, 10)), min_size=1, max_size=12)


def make_requests(lengths):
    """Every token of a prompt is the number of its request, from 1 on."""
    return [
        Request(f"r{index}", [1 + index] * prompt, max_tokens=tokens, stop=(END,))
        for index, (prompt, tokens) in enumerate(lengths)
    ]


class Devices:
    """Stands for the programs: checks what a step is given and gives made-up tokens."""

    def __init__(self, scheduler, devices, random):
        self.scheduler, self.devices, self.random = scheduler, devices, random
        self.size = scheduler.size
        self.cached = {}  # (device, page, row) -> (id, position): what stands in the cache

    def run(self, work):
        chunk = isinstance(work.inputs, ChunkInputs)
        (self._check_chunk if chunk else self._check_decode)(work)
        return self.random.integers(0, VOCABULARY, self.size.slots * self.devices).astype(np.int32)

    def _check_chunk(self, work):
        inputs, ending = work.inputs, {run.request.prompt[0]: run for run in work.receivers}
        for row in np.flatnonzero(inputs.counts):
            device, count, start = row // self.size.chunk_sequences, inputs.counts[row], inputs.starts[row]
            assert np.all(inputs.tokens[row, :count] > 0) and count <= self.size.chunk_tokens
            name = inputs.tokens[row, 0]
            for position in range(start):
                assert self._at(device, inputs.pages[row], position) == (name, position)
            for position in range(start, start + count):
                self._write(device, inputs.pages[row], position, name)
            slot = ending[name].slot - device * self.size.slots if name in ending else self.size.slots
            assert inputs.slots[row] == slot

    def _check_decode(self, work):
        inputs = work.inputs
        assert set(np.flatnonzero(inputs.active)) == {run.slot for run in work.receivers}
        for run in work.receivers:
            name, length = run.request.prompt[0], inputs.lengths[run.slot]
            assert length == len(run.request.prompt) + run.asked - 2  # the last asked token is not cached yet
            for position in range(length):
                assert self._at(run.device, inputs.pages[run.slot], position) == (name, position)
            self._write(run.device, inputs.pages[run.slot], length, name)

    def _place(self, device, pages, position):
        return device, pages[position // self.size.page_rows], position % self.size.page_rows

    def _at(self, device, pages, position):
        return self.cached[self._place(device, pages, position)]

    def _write(self, device, pages, position, name):
        self.cached[self._place(device, pages, position)] = (name, position)


@given(SIZES, st.integers(1, 3), LENGTHS, st.integers(0, 2**16))
def test_every_request_has_one_answer_and_reads_only_its_own_rows(size, devices, lengths, seed):
    """Steps are read one late and requests cancelled at random, as an engine and its users do."""
    random, requests = np.random.default_rng(seed), make_requests(lengths)
    scheduler = Scheduler(size, devices, VOCABULARY)
    machine, answers, coming, in_flight = Devices(scheduler, devices, random), {}, list(requests), []
    refused = set()

    def record(updates):
        for update in updates:
            if update.completion:
                assert update.id not in answers
                answers[update.id] = update.completion

    for _ in range(2000):
        while coming:
            try:
                scheduler.submit(coming[0])
            except QueueFull:
                break
            except Refused:
                refused.add(coming[0].id)
            coming.pop(0)
        if random.random() < 0.05:
            update = scheduler.cancel(f"r{random.integers(0, len(requests))}")
            record([update] if update else [])
        work = scheduler.next_work()
        if work:
            in_flight.append((work, machine.run(work)))
        if len(in_flight) > (1 if work else 0):
            record(scheduler.accept(*in_flight.pop(0), 0.0))
        if not (coming or in_flight or scheduler.running or scheduler.waiting):
            break
    assert refused.isdisjoint(answers) and refused | set(answers) == {request.id for request in requests}
    assert all(pool.in_use == 0 and pool.most_in_use <= size.pages for pool in scheduler.pools)
    for request in requests:
        rows = len(request.prompt) + request.max_tokens - 1
        never = not request.prompt or rows > size.context or size.pages_for(rows) > size.pages
        assert (request.id in refused) == never
        if not never:
            completion = answers[request.id]
            whole = completion.finish == "length"
            assert (len(completion.tokens) == request.max_tokens) if whole else len(completion.tokens) < request.max_tokens
            assert END not in completion.tokens


def make_scheduler(**fields):
    size = {"slots": 1, "chunk_sequences": 1, "chunk_tokens": 4, "page_rows": 4, "pages": 3, "pages_per_sequence": 4}
    return Scheduler(EngineSize(**(size | {"queue": 2} | fields)), 1, VOCABULARY)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("a", []), "the prompt is empty"),
        (Request("a", [50]), r"token \[50\] of the prompt: allowed is 0 to 49"),
        (Request("a", [-1]), "allowed is 0 to 49"),
        (Request("a", [1], max_tokens=0), "max_tokens=0: allowed is 1 or more"),
        (Request("a", [1], temperature=-1.0), "temperature=-1.0"),
        (Request("a", [1], temperature=float("nan")), "temperature=nan"),
        (Request("a", [1], top_p=0.0), "top_p=0.0"),
        (Request("a", [1], seed=2**32), "seed=4294967296"),
        (Request("a", [1] * 10, max_tokens=8), "10 tokens of prompt and max_tokens=8 need 17 rows of cache: allowed is 16"),
        (Request("a", [1] * 10, max_tokens=4), "need 4 pages of 4 rows: allowed is 3, the cache of a device"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_request_that_can_never_run_is_refused_with_the_numbers(request_, message):
    scheduler = make_scheduler()
    with pytest.raises(Refused, match=message):
        scheduler.submit(request_)
    assert not isinstance(pytest.raises(Refused, scheduler.submit, request_).value, QueueFull)
    assert scheduler.waiting == 0


def test_ids_and_the_queue_are_guarded():
    scheduler = make_scheduler()
    scheduler.submit(Request("a", [1], max_tokens=4))
    with pytest.raises(Refused, match="id 'a' is another request's that has not ended"):
        scheduler.submit(Request("a", [1], max_tokens=4))
    scheduler.submit(Request("b", [1], max_tokens=4))
    with pytest.raises(QueueFull, match="2 requests wait, the most allowed"):
        scheduler.submit(Request("c", [1], max_tokens=4))
    assert scheduler.next_work() is not None
    with pytest.raises(Refused, match="id 'a'"):
        scheduler.submit(Request("a", [1], max_tokens=4))  # it runs now
    assert scheduler.cancel("nobody") is None
    assert scheduler.cancel("b").completion.finish == "cancelled"


def test_nobody_overtakes_a_request_that_waits_for_pages():
    scheduler = make_scheduler(slots=3)
    for id, tokens in (("a", 5), ("long", 12), ("short", 1)):
        if scheduler.waiting == 2:
            scheduler.next_work()
        scheduler.submit(Request(id, [1], max_tokens=tokens))
    scheduler.next_work()
    assert (scheduler.running, scheduler.waiting) == (1, 2)
