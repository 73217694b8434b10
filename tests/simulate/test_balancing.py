"""The balancer's rule on drawn routings."""

import pytest

from moe_ep.simulate.balancing import balance


def test_without_a_rate_the_load_stays_as_it_was_drawn():
    load = balance(8, 2, 512, rate=0.0, updates=4)
    assert load.settled == pytest.approx(load.unbalanced, rel=0.1)


def test_a_small_rate_settles_near_even_draws_and_a_large_one_swings():
    small, large = (balance(16, 2, 2048, rate, updates=200) for rate in (0.002, 0.2))
    assert small.unbalanced > 1.5 and small.peak < 1.2 * small.floor
    assert large.settled > 1.5 * small.settled


def test_a_seed_decides_the_draw():
    assert balance(8, 2, 256, 0.01, 5, seed=1) == balance(8, 2, 256, 0.01, 5, seed=1)
    assert balance(8, 2, 256, 0.01, 5, seed=1) != balance(8, 2, 256, 0.01, 5, seed=2)
