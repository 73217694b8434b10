"""The search for the largest size that fits, against trying them all."""

import hypothesis
import hypothesis.strategies as st

from moe_ep import override
from moe_ep.aot.report import limits_text
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


def test_noise_in_the_compilers_bytes_costs_few_compilations():
    tried = []

    def bytes_of(size):
        tried.append(size)
        return 55.0 + 0.14 * size + 0.3 * (size % 3 == 0)  # every third program happens to need more

    found = largest_that_fits(bytes_of, lambda size: 55.0 + 0.14 * size, 64.0, 1024)
    assert bytes_of(found) <= 64 < bytes_of(found + 1)
    assert len(tried) <= 8 + 2
    assert max(tried) < 100  # programs far over the memory compile for long


def search(config, weights_gb):
    """Searches with weights and 300 kB a token for a compiler, near enough to the real one."""
    said = []

    def summarize(sized):
        used = weights_gb * 10**9 + 300_000 * sized.aot.tokens_per_gpu
        return {"bytes_per_gpu": {"total": used}, "hidden_share": None}

    limits = search_limits(config, summarize, said.append)
    assert len(said) == len(limits["compiled"])
    return limits


def test_few_compilations_confirm_what_the_formulas_guess():
    limits = search(override.load("configs/seed_e16.py"), weights_gb=55)
    assert limits["tokens_per_gpu"] == 2 * 1024 * (9_000_000_000 // (2 * 1024 * 300_000))
    assert limits["context"] == 128 * (9_000_000_000 // (2 * 128 * 300_000))
    assert len(limits["compiled"]) <= 12  # halving alone needs 22


def test_a_search_says_when_nothing_fits_and_when_it_ended_before_the_memory():
    config = override.load("configs/seed_e16.py")
    assert limits_text(search(config, weights_gb=65)) == (
        "most that fits (compiled): sequences per GPU at context 1024: none; context with 2 sequences per GPU: none"
    )
    roomy = override.apply(config, ["cluster.gpu=b200", "aot.context=128", "aot.tokens_per_gpu=256"])
    assert "at context 128: 4096 or more" in limits_text(search(roomy, weights_gb=5))
