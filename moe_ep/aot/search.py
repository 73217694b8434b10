"""The largest batch and the longest context that fit, by compiling."""

import dataclasses
from collections.abc import Callable

from moe_ep.aot.memory import MemoryReport
from moe_ep.config import Config

Measure = Callable[[Config], MemoryReport]


def largest_that_fits(bytes_of: Callable[[int], float], capacity: float, first: int, limit: int) -> int:
    """Returns the largest n <= limit with bytes_of(n) <= capacity; 0 when even 1 does not fit.

    Bytes grow about linearly, so each guess is the line through the last two
    measurements; the bracket around the answer halves at worst.

    Args:
      bytes_of: measured bytes of a program of size n; grows with n.
      capacity: bytes there are.
      first: where to begin, at least 1.
      limit: the largest n of interest.
    """
    fits, fails = 0, limit + 1
    known: dict[int, float] = {}
    guess = min(max(first, 1), limit)
    while fails - fits > 1:
        known[guess] = bytes_of(guess)
        if known[guess] <= capacity:
            fits = guess
        else:
            fails = guess
        guess = min(max(_line_guess(known, capacity, fits, fails), fits + 1), fails - 1)
    return fits


def _line_guess(known: dict[int, float], capacity: float, fits: int, fails: int) -> int:
    if len(known) < 2:
        (size, used), = known.items()
        return 2 * size if used <= capacity else size // 2
    (low, low_bytes), (high, high_bytes) = sorted(known.items(), key=lambda item: abs(item[1] - capacity))[:2]
    if low_bytes == high_bytes:
        return (fits + fails) // 2
    return int(low + (capacity - low_bytes) * (high - low) / (high_bytes - low_bytes))


def search_limits(config: Config, measure: Measure, *, most_sequences: int = 4096, most_context: int = 2**17) -> dict:
    """Returns the most tokens per GPU at the config's context, and the longest context at its batch.

    Args:
      config: where the search begins; contexts are searched in steps of 128 positions.
      measure: compiles a config and returns its memory.
      most_sequences: per GPU, the search's end.
      most_context: the search's end.
    """
    aot = config.aot
    capacity = config.cluster.device.memory_bytes
    sequences = max(1, aot.tokens_per_gpu // aot.context)
    step = _sequence_step(config)

    def with_sizes(count: int, context: int) -> Config:
        sized = dataclasses.replace(aot, tokens_per_gpu=count * context, context=context)
        return dataclasses.replace(config, aot=sized)

    def bytes_of_batch(n: int) -> float:
        return measure(with_sizes(n * step, aot.context)).total

    def bytes_of_context(n: int) -> float:
        return measure(with_sizes(sequences, 128 * n)).total

    most = step * largest_that_fits(bytes_of_batch, capacity, max(1, sequences // step), most_sequences // step)
    longest = 128 * largest_that_fits(bytes_of_context, capacity, max(1, aot.context // 128), most_context // 128)
    return {
        "tokens_per_gpu": most * aot.context,
        "at_context": aot.context,
        "context": longest,
        "at_sequences": sequences,
    }


def _sequence_step(config: Config) -> int:
    """The staggered schedule splits a batch into two."""
    return 2 if config.dispatch.overlap == "staggered" else 1
