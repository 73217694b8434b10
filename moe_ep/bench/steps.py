"""Times of single steps, of several contenders in turns, while the host stays a step ahead of the devices."""

import random
import time
from collections.abc import Callable

import jax
import numpy as np

Step = Callable[[], jax.Array]


def time_in_turns(steps: dict[str, Step], turns: int, steps_a_turn: int) -> dict[str, np.ndarray]:
    """Returns seconds of each step, float64[turns, steps_a_turn] a contender; contenders change places every turn."""
    seconds: dict[str, list[list[float]]] = {name: [] for name in steps}
    order, shuffle = list(steps), random.Random(0).shuffle
    for _ in range(turns):
        shuffle(order)
        for name in order:
            seconds[name].append(time_steps(steps[name], steps_a_turn))
    return {name: np.array(turn) for name, turn in seconds.items()}


def time_steps(step: Step, count: int) -> list[float]:
    """Returns the seconds between the ends of `count` steps that follow one another, after two that are not timed.

    The next step is launched before the last is waited for, as in serving and
    training: the host's part shows only where it is longer than the devices'.
    """
    step().block_until_ready()
    ahead = step()
    seconds, last = [], 0.0
    for index in range(count + 1):
        current, ahead = ahead, step() if index < count else None
        current.block_until_ready()
        now = time.perf_counter()
        if index:
            seconds.append(now - last)
        last = now
    return seconds


def summarize(seconds: np.ndarray) -> dict[str, float]:
    """Returns median, 95th and 99th percentile of the steps in ms, and the quartiles of the turns' medians as a share."""
    ms = seconds.reshape(-1) * 1e3
    median, p95, p99 = np.percentile(ms, (50, 95, 99))
    low, high = np.percentile(np.median(seconds, axis=1) * 1e3, (25, 75))
    return {"median": float(median), "p95": float(p95), "p99": float(p99), "spread": float((high - low) / median)}
