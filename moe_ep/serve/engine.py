"""Continuous batching: requests join and leave a running batch, prompts in chunks between the tokens of others.

Every step is one of two compiled programs. The next is dispatched before the tokens
of the one before are read, so the devices do not wait for the host; a sequence that
has just drawn its last token is therefore computed once more, and that is not looked at.
"""

import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float32

from moe_ep.config import DispatchConfig, ModelConfig
from moe_ep.mesh import TOKENS
from moe_ep.model.kv_cache import CACHE, make_cache
from moe_ep.model.transformer import Transformer
from moe_ep.serve.inputs import ChunkInputs, DecodeInputs
from moe_ep.serve.programs import Programs, StepReport, any_routing, holds_any_routing, make_programs, serving_dispatch
from moe_ep.serve.request import Refused, Request, Update
from moe_ep.serve.sampler import Sampler, draw, greedy
from moe_ep.serve.scheduler import Scheduler, Work, no_chunk, no_decode
from moe_ep.serve.size import EngineSize

# Steps on the programs for any routing before the smaller ones are tried again.
_CALM_STEPS = 32


class _InFlight(NamedTuple):
    """A step whose tokens the host has not read, and the slots' tokens before it."""

    work: Work
    before: Array
    report: StepReport
    waves: int  # that its program had


class EngineStatistics(NamedTuple):
    """What an engine has done so far."""

    chunk_steps: int
    decode_steps: int
    steps_run_again: int  # their routing needed more waves than their program had
    tokens_prefilled: int
    tokens_generated: int
    pages_per_device: int
    most_pages_in_use: int  # of any device
    cache_bytes_per_device: int
    programs_compiled: int


class Engine:
    """Completes requests.

    Args:
      model: its attention's implementation resolved (`for_platform`).
      parameters: of the model, on the mesh.
      bias: the balance bias of every MoE layer.
      mesh: sequences are spread over all of it.
      size: of one device's share.
      dispatch: how rows travel. A step whose routing does not fit is run again on a program for any routing.
      vocabulary: token ids are below it; None: the model's.
      sampler: `draw`, or `greedy` where no request has a temperature, which saves the sorting.
    """

    def __init__(
        self,
        model: ModelConfig,
        parameters: Transformer,
        bias: Float32[Array, "L E"],
        mesh: Mesh,
        size: EngineSize,
        *,
        dispatch: DispatchConfig,
        vocabulary: int | None = None,
        sampler: Sampler = draw,
    ):
        self.size = size
        self._parameters, self._bias, self._mesh = parameters, bias, mesh
        self._sampler, self._devices = sampler, mesh.size
        vocabulary = vocabulary or model.vocabulary
        self._scheduler = Scheduler(size, mesh.size, vocabulary)
        dispatch = serving_dispatch(dispatch)
        usual = make_programs(model, mesh, dispatch, sampler=sampler, vocabulary=vocabulary)
        self._programs = [usual]
        steps = (size.slots, size.chunk_sequences * size.chunk_tokens)
        if not all(holds_any_routing(model.moe, dispatch, mesh, tokens) for tokens in steps):
            widest = any_routing(dispatch)
            self._programs.append(make_programs(model, mesh, widest, sampler=sampler, vocabulary=vocabulary))
        self._wide_steps_left = 0
        self._newest, self._cache = self._empty_state(model)
        self._in_flight: list[_InFlight] = []
        self._ended: list[Update] = []  # outside of steps
        self._counts = {"chunk_steps": 0, "decode_steps": 0, "steps_run_again": 0, "prefilled": 0, "generated": 0}

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self._scheduler.waiting

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return self._scheduler.running

    @property
    def has_room(self) -> bool:
        """Whether `submit` would queue a request."""
        return self.waiting < self.size.queue

    @property
    def idle(self) -> bool:
        """Whether every request has been answered."""
        return not (self.waiting or self.running or self._in_flight or self._ended)

    def warm_up(self) -> None:
        """Compiles every program; afterwards none is compiled any more."""
        for programs in self._programs:
            for _ in range(2):  # what a program returned may be placed unlike what it was first given
                self.run_inputs(no_chunk(self.size, self._devices), programs)
                self.run_inputs(no_decode(self.size, self._devices), programs)
        jax.block_until_ready(self._cache)

    def run_inputs(self, inputs: ChunkInputs | DecodeInputs, programs: Programs | None = None) -> StepReport:
        """Runs one step as it is given, which changes cache and newest tokens: while no request is in the engine.

        Args:
          inputs: of the step.
          programs: to run it on; None: the usual ones.
        """
        programs = programs or self._programs[0]
        program = programs.chunk if isinstance(inputs, ChunkInputs) else programs.decode
        self._newest, self._cache, report = program(
            self._parameters, self._bias, self._newest, self._cache, inputs
        )
        return report

    def submit(self, request: Request) -> None:
        """Queues a request.

        Raises:
          Refused: it is not one, its id is taken, or it could never fit; nothing else changes.
          QueueFull: `size.queue` requests wait.
        """
        if request.temperature > 0 and self._sampler is greedy:
            raise Refused(request.id, f"temperature={request.temperature}: allowed is 0, this engine is greedy")
        self._scheduler.submit(request)

    def cancel(self, id: str) -> bool:
        """Ends a request, which the next step answers with the tokens it has; False if there is none of this id."""
        update = self._scheduler.cancel(id)
        if update:
            self._ended.append(update)
        return update is not None

    def step(self) -> list[Update]:
        """Dispatches the next step, reads the one before, and returns what that brought."""
        updates, self._ended = self._ended, []
        work = self._scheduler.next_work()
        if work:
            self._dispatch(work)
        if len(self._in_flight) > (1 if work else 0):
            updates += self._read()
        return updates

    def complete(self, requests: Iterable[Request]) -> Iterator[Update]:
        """Answers requests, which are drawn as there is room for them, and yields what comes as it comes.

        A request that is refused is one update with its completion.
        """
        coming, more = iter(requests), True
        while more or not self.idle:
            while more and self.has_room:
                request = next(coming, None)
                if request is None:
                    more = False
                    break
                try:
                    self.submit(request)
                except Refused as refusal:
                    yield Update(request.id, (), refusal.completion)
            yield from self.step()

    def statistics(self) -> EngineStatistics:
        """Returns what has been done since the engine was made."""
        counts, pools = self._counts, self._scheduler.pools
        jitted = [program for programs in self._programs for program in (programs.chunk, programs.decode)]
        return EngineStatistics(
            chunk_steps=counts["chunk_steps"],
            decode_steps=counts["decode_steps"],
            steps_run_again=counts["steps_run_again"],
            tokens_prefilled=counts["prefilled"],
            tokens_generated=counts["generated"],
            pages_per_device=self.size.pages,
            most_pages_in_use=max(pool.most_in_use for pool in pools),
            cache_bytes_per_device=sum(leaf.nbytes for leaf in jax.tree.leaves(self._cache)) // self._devices,
            programs_compiled=sum(program._cache_size() for program in jitted),
        )

    def _empty_state(self, model: ModelConfig) -> tuple:
        def make():
            newest = jnp.zeros(self.size.slots * self._devices, jnp.int32)
            return newest, make_cache(model, self.size.pages * self._devices, self.size.page_rows)

        placed = (NamedSharding(self._mesh, TOKENS), NamedSharding(self._mesh, CACHE))
        return jax.jit(make, out_shardings=placed)()

    def _dispatch(self, work: Work) -> None:
        self._run(work, self._programs[-1 if self._wide_steps_left else 0])
        self._wide_steps_left = max(self._wide_steps_left - 1, 0)
        if isinstance(work.inputs, ChunkInputs):
            self._counts["chunk_steps"] += 1
            self._counts["prefilled"] += int(work.inputs.counts.sum())
        else:
            self._counts["decode_steps"] += 1

    def _run(self, work: Work, programs: Programs) -> None:
        before = self._newest
        report = self.run_inputs(work.inputs, programs)
        report.newest.copy_to_host_async()
        self._in_flight.append(_InFlight(work, before, report, programs.waves))

    def _read(self) -> list[Update]:
        if int(self._in_flight[0].report.waves_needed) > self._in_flight[0].waves:
            self._run_again()
        step = self._in_flight.pop(0)
        newest = np.asarray(step.report.newest)
        updates = self._scheduler.accept(step.work, newest, time.perf_counter())
        self._counts["generated"] += sum(len(update.tokens) for update in updates)
        return updates

    def _run_again(self) -> None:
        """Runs what is in flight again for any routing: later steps built on the tokens of the first."""
        steps, self._in_flight = self._in_flight, []
        self._newest = steps[0].before
        for step in steps:
            self._run(step.work, self._programs[-1])
        self._wide_steps_left = _CALM_STEPS
        self._counts["steps_run_again"] += len(steps)
