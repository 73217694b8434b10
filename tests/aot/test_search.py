"""The search for the largest size that fits, against trying them all."""

import hypothesis
import hypothesis.strategies as st

from moe_ep import override
from moe_ep.aot.memory import MemoryReport
from moe_ep.aot.search import largest_that_fits, search_limits


@hypothesis.given(
    st.lists(st.integers(0, 1000), min_size=1, max_size=60),
    st.integers(0, 20_000),
    st.floats(0.1, 3.0),
    st.integers(-5000, 5000),
)
def test_largest_that_fits_is_that_of_trying_all(steps, capacity, slope, offset):
    totals = [sum(steps[: size + 1]) for size in range(len(steps))]
    expected = sum(total <= capacity for total in totals)
    found = largest_that_fits(
        lambda size: totals[size - 1], lambda size: slope * totals[size - 1] + offset, capacity, len(totals)
    )
    assert found == expected


def test_few_compilations_confirm_what_the_formulas_guess():
    config = override.load("configs/seed_e16.py")

    def measure(sized):
        """Weights and 300 kB a token, near enough to the compiler's."""
        used = 55_000_000_000 + 300_000 * sized.aot.tokens_per_gpu
        return MemoryReport(used, 0, 0, {}, int(config.cluster.device.memory_bytes))

    limits = search_limits(config, measure)
    assert limits["tokens_per_gpu"] == 2 * 1024 * (9_000_000_000 // (2 * 1024 * 300_000))
    assert limits["context"] == 128 * (9_000_000_000 // (2 * 128 * 300_000))
    assert len(limits["compiled"]) <= 12  # halving alone needs 22
