"""The order in which contenders are timed."""

import collections
import itertools

import pytest

from moe_ep.bench import timing


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
def test_each_contender_follows_each_other_one_equally_often(count):
    names = [str(index) for index in range(count)]
    orders = timing.balanced_orders(names)
    assert all(sorted(order) == names for order in orders)
    followed = collections.Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert set(followed) == set(itertools.permutations(names, 2)) and len(set(followed.values())) <= 1
