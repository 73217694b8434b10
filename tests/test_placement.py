"""Placement: every expert has a home, shares add up, balancers balance."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ep.placement import Placement, balanced, co_activated, contiguous, renumbered


def test_contiguous_is_the_programs_placement():
    placement = contiguous(8, 4)
    assert placement.slots.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(ValueError, match="8 experts cannot be spread evenly over 3 devices"):
        contiguous(8, 3)


def test_spare_slots_of_contiguous_start_again():
    assert contiguous(6, 4, 2).slots.tolist() == [[0, 1], [2, 3], [4, 5], [0, 1]]


def test_an_expert_without_a_device_is_refused():
    with pytest.raises(ValueError, match=r"1 experts have no device: \[2\]"):
        Placement(3, np.array([[0], [1]]))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.01, 10), min_size=4, max_size=12), st.integers(2, 6), st.integers(0, 3))
def test_replicas_share_equally_and_nothing_is_lost(load, devices, spare):
    load = np.array(load)
    slots = -(-len(load) // devices) + spare
    placement = balanced(load, devices, slots)
    assert placement.slots.shape == (devices, slots)
    np.testing.assert_allclose(placement.device_share().sum(axis=1), 1.0)
    np.testing.assert_allclose(placement.device_load(load), load @ placement.device_share())
    np.testing.assert_allclose(placement.device_load(load).sum(), load.sum())


def test_balanced_beats_contiguous_under_skew():
    load = np.arange(1, 65) ** -0.8
    even = balanced(load, 8, 10).device_load(load)
    plain = contiguous(64, 8).device_load(load)
    assert even.max() / even.mean() < 1.02
    assert plain.max() / plain.mean() > 2


def test_co_activated_experts_share_a_node():
    pairs = np.zeros((8, 8))
    for a, b in ((0, 5), (1, 4), (2, 7), (3, 6)):
        pairs[a, b] = pairs[b, a] = 10
    placement = co_activated(pairs, 4, 1)
    assert {tuple(sorted(slots)) for slots in placement.slots.tolist()} == {(0, 5), (1, 4), (2, 7), (3, 6)}


def test_renumbering_moves_the_slots():
    placement = renumbered(contiguous(4, 4), np.array([2, 0, 3, 1]))
    assert placement.slots[:, 0].tolist() == [1, 3, 0, 2]
