"""Times of several functions of one process, taken in turns so that all see the same clocks and heat."""

from collections.abc import Callable
import itertools
import statistics
import time
from typing import Any, NamedTuple


class Contender(NamedTuple):
    """One way of doing the work.

    launch: starts it and returns its output, which may not be ready.
    wait: returns when that output, and so all work before it, is ready.
    """

    launch: Callable[[], Any]
    wait: Callable[[Any], Any]


class Times(NamedTuple):
    """Seconds a call: median and quartiles over samples of `calls` calls each."""

    median: float
    quartiles: tuple[float, float]
    samples: int
    calls: int

    @property
    def spread(self) -> float:
        """The quartiles' distance as a share of the median."""
        return (self.quartiles[1] - self.quartiles[0]) / self.median


def measure_in_turns(contenders: dict[str, Contender], samples: int, sample_seconds: float) -> dict[str, Times]:
    """Returns the times of each contender.

    A sample launches enough calls back to back to last about `sample_seconds`, so
    the host's part hides behind the device's, and waits once. The order changes with
    every sample so that each follows each other one equally often: who follows a
    contender that leaves the GPU cool is faster.
    """
    calls = {name: _calls_to_fill(contender, sample_seconds) for name, contender in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for order in itertools.islice(itertools.cycle(balanced_orders(list(contenders))), samples):
        # Behind itself, not behind the last of the order before, which would be the same one each time.
        _seconds_a_call(contenders[order[0]], calls[order[0]])
        for name in order:
            seconds[name].append(_seconds_a_call(contenders[name], calls[name]))
    return {name: _summary(values, calls[name]) for name, values in seconds.items()}


def balanced_orders(names: list[str]) -> list[list[str]]:
    """Returns orders in which, taken together, each name directly follows each other one equally often.

    Source: Williams, Experimental designs balanced for the estimation of residual effects of treatments, 1949.
    """
    count = len(names)
    zigzag = [(index + 1) // 2 if index % 2 else (count - index // 2) % count for index in range(count)]
    orders = [[names[(place + shift) % count] for place in zigzag] for shift in range(count)]
    return orders if count % 2 == 0 else orders + [order[::-1] for order in orders]


def _calls_to_fill(contender, sample_seconds):
    contender.wait(contender.launch())  # compiles
    one = _seconds_a_call(contender, 3)
    return min(max(3, round(sample_seconds / one)), 500)


def _seconds_a_call(contender, calls):
    start = time.perf_counter()
    for _ in range(calls):
        out = contender.launch()
    contender.wait(out)
    return (time.perf_counter() - start) / calls


def _summary(values, calls):
    low, median, high = statistics.quantiles(values, n=4)
    return Times(median, (low, high), len(values), calls)
