"""The search for the largest size that fits, against trying them all."""

import hypothesis
import hypothesis.strategies as st

from moe_ep.aot.search import largest_that_fits


@hypothesis.given(
    st.lists(st.integers(0, 1000), min_size=1, max_size=60), st.integers(0, 20_000), st.integers(1, 80)
)
def test_largest_that_fits_is_that_of_trying_all(steps, capacity, first):
    totals = [sum(steps[: size + 1]) for size in range(len(steps))]
    expected = sum(total <= capacity for total in totals)
    assert largest_that_fits(lambda size: totals[size - 1], capacity, first, len(totals)) == expected
