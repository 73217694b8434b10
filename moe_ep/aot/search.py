"""The largest batch and the longest context that fit: guessed by the memory formulas, confirmed by compiling."""

import dataclasses
from collections.abc import Callable

from moe_ep.aot.summary import Summarize
from moe_ep.config import Config, ConfigError
from moe_ep.cost.memory import total
from moe_ep.simulate.engines import scenario_of_program
from moe_ep.simulate.memory import memory_of

Say = Callable[[str], None]

_CONTEXT_STEP = 128


def largest_that_fits(
    bytes_of: Callable[[int], float], estimate: Callable[[int], float], capacity: float, limit: int
) -> int:
    """Returns the largest n <= limit with bytes_of(n) <= capacity; 0 when even 1 does not fit.

    Args:
      bytes_of: measured bytes of a program of size n, at a price; grows with n.
      estimate: the same by formula, for nothing. What it is off by is taken to lie on
        the line through the measurements at both ends of the bracket, or through the two
        nearest to the capacity; every fourth measurement narrows the bracket instead.
      capacity: bytes there are.
      limit: the largest n of interest.
    """
    fits, fails = 0, limit + 1
    known: dict[int, float] = {}
    while fails - fits > 1:
        guess = _narrow(fits, fails, known)
        if len(known) % 4 != 3:
            ends = [fits, fails] if fits in known and fails in known else sorted(
                known, key=lambda size: abs(known[size] - capacity))[:2]  # fmt: skip
            corrected = _corrected(estimate, {size: known[size] for size in ends})
            guess = min(max(_bisect(corrected, capacity, fits, fails), fits + 1), fails - 1)
        known[guess] = bytes_of(guess)
        fits, fails = (guess, fails) if known[guess] <= capacity else (fits, guess)
    return fits


def _narrow(fits: int, fails: int, known: dict[int, float]) -> int:
    """Halves the bracket; below an end that was never measured, which may be far away, goes up by an eighth."""
    halved = (fits + fails) // 2
    return halved if fails in known else min(halved, fits + max(1, fits // 8))


def _corrected(estimate: Callable[[int], float], known: dict[int, float]) -> Callable[[int], float]:
    """Returns the estimate plus what it is off by at the known sizes, none to two of them."""
    sizes = list(known)
    errors = [known[size] - estimate(size) for size in sizes]
    if len(sizes) < 2:
        return lambda n: estimate(n) + sum(errors)
    slope = (errors[1] - errors[0]) / (sizes[1] - sizes[0])
    return lambda n: estimate(n) + errors[0] + slope * (n - sizes[0])


def _bisect(estimate: Callable[[int], float], capacity: float, fits: int, fails: int) -> int:
    """Returns the largest n from fits to fails - 1 that the estimate says fits; fits when it says none above does."""
    while fails - fits > 1:
        middle = (fits + fails) // 2
        fits, fails = (middle, fails) if estimate(middle) <= capacity else (fits, middle)
    return fits


def search_limits(
    config: Config, summarize: Summarize, say: Say, *, most_sequences: int = 4096, most_context: int = 2**17
) -> dict:
    """Returns the most tokens per GPU at the config's context, and the longest context at its batch; 0 when none fits.

    Args:
      config: the batch and the context that are kept while the other is searched.
      summarize: compiles a config and returns its summary.
      say: is told what was compiled.
      most_sequences: per GPU, the search's end.
      most_context: the search's end; contexts are searched in steps of 128 positions.
    """
    aot = config.aot
    sequences = max(1, aot.tokens_per_gpu // aot.context)
    step = 2 if config.dispatch.overlap in ("auto", "staggered") else 1  # staggered splits a batch in two
    compiled: list[dict] = []

    def search(sizes: Callable[[int], tuple[int, int]], limit: int) -> int:
        capacity = config.cluster.device.memory_bytes
        return largest_that_fits(
            lambda n: _bytes_of(_sized(config, *sizes(n)), summarize, say, compiled),
            lambda n: formula_bytes(_sized(config, *sizes(n))), capacity, limit,
        )  # fmt: skip

    most = step * search(lambda n: (n * step, aot.context), most_sequences // step)
    longest = _CONTEXT_STEP * search(lambda n: (sequences, n * _CONTEXT_STEP), most_context // _CONTEXT_STEP)
    return {
        "sequences": most,
        "tokens_per_gpu": most * aot.context,
        "at_context": aot.context,
        "context": longest,
        "at_sequences": sequences,
        "searched_up_to": {"sequences": most_sequences, "context": most_context},
        "compiled": compiled,
    }


def _bytes_of(config: Config, summarize: Summarize, say: Say, compiled: list[dict]) -> float:
    """Bytes of one program, noted in `compiled`."""
    summary, capacity = summarize(config), config.cluster.device.memory_bytes
    context, used = config.aot.context, summary["bytes_per_gpu"]["total"]
    sequences = config.aot.tokens_per_gpu // context
    compiled.append({"sequences": sequences, "context": context, "total": used, "fits": used <= capacity,
                     "hidden_share": summary["hidden_share"]})  # fmt: skip
    verdict = "fits" if used <= capacity else f"{(used - capacity) / 1e9:.2f} GB too much"
    say(f"{sequences} sequences of {context} per GPU: {used / 1e9:.2f} of {capacity / 1e9:.0f} GB, {verdict}")
    return used


def _sized(config: Config, sequences: int, context: int) -> Config:
    aot = dataclasses.replace(config.aot, tokens_per_gpu=sequences * context, context=context)
    return dataclasses.replace(config, aot=aot)


def formula_bytes(config: Config) -> float:
    """Returns bytes per GPU by the memory formulas, 0 where they do not know the layout: then the search halves."""
    try:
        return float(total(memory_of(scenario_of_program(config))))
    except ConfigError:
        return 0.0
