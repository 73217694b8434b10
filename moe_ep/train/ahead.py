"""Launches each training step before the last one's report is read, so that the devices never wait for the host."""

import collections
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding

from moe_ep.config import DispatchConfig
from moe_ep.mesh import REPLICATED
from moe_ep.train.state import TrainState
from moe_ep.train.step import StepReport
from moe_ep.train.waves import Waves


class Accepted(NamedTuple):
    """A step whose routing fitted."""

    step: int
    report: StepReport
    attempts: int
    elapsed_ms: float  # since its launch, or since the report before was read


class _Flight(NamedTuple):
    step: int
    tokens: jax.Array
    waves: int
    report: StepReport
    launched: float


class Launcher:
    """Steps in flight, first in first out. The state that `launch` returns is the one after all of them.

    A step whose routing does not fit its program leaves the state as it was, and so
    does every step launched after it; `read` then runs them again, in order, on a
    program with waves enough.

    Args:
      dispatch: with how many waves to begin, and whether rows beyond them are dropped.
      mesh: of the programs.
      programs: waves -> the program of `make_step`.
      say: called with a line for people when a step runs again.
    """

    def __init__(
        self, dispatch: DispatchConfig, mesh: Mesh, programs: Callable[[int], Callable], say: Callable[[str], None]
    ):
        self.waves = Waves(dispatch.waves)
        self._drop, self._programs, self._say = dispatch.drop, programs, say
        self._no_step_before = no_step_before(mesh)
        self._flights: collections.deque[_Flight] = collections.deque()
        self._last_read = 0.0

    def __len__(self) -> int:
        return len(self._flights)

    def launch(self, state: TrainState, tokens: jax.Array, step: int) -> TrainState:
        """Returns the state after the step, without waiting for it; `state` is donated."""
        launched, waves = time.perf_counter(), self.waves.current
        previous_fits = self._flights[-1].report.fits if self._flights else self._no_step_before
        state, report = self._programs(waves)(state, tokens, previous_fits=previous_fits)
        self._flights.append(_Flight(step, tokens, waves, report, launched))
        return state

    def read(self, state: TrainState) -> tuple[TrainState, Accepted]:
        """Waits for the oldest step; returns the state after all in flight, and that step once it fitted."""
        attempts, started = 1, max(self._flights[0].launched, self._last_read)
        while not (flight := self._flights.popleft()).report.fits:
            later, attempts = [flight, *self._flights], attempts + 1
            needed = int(flight.report.batch.dispatch.waves_needed)
            self.waves.accept(needed)
            self._say(
                f"step {flight.step}: the routing needs {needed} waves and the program has {flight.waves}; nothing was "
                f"dropped, the step runs again on a program with {self.waves.current}"
            )
            self._flights.clear()
            for void in later:
                state = self.launch(state, void.tokens, void.step)
        if not self._drop:
            self.waves.accept(int(flight.report.batch.dispatch.waves_needed))
        self._last_read = time.perf_counter()
        return state, Accepted(flight.step, flight.report, attempts, (self._last_read - started) * 1e3)


def no_step_before(mesh: Mesh) -> jax.Array:
    """Returns `previous_fits` of a step that none precedes."""
    return jax.device_put(True, NamedSharding(mesh, REPLICATED))
