"""Routing: shares, draws, buffers, and how many nodes a token reaches."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ep.config import ConfigError, ModelConfig, MoEConfig
from moe_ep.cost.routing import (
    buffer_rows,
    capped,
    chances_met,
    make_routing,
    most_met,
    nodes_reached,
    rows_between,
    with_busiest,
)
from moe_ep.placement import balanced, contiguous


@pytest.mark.parametrize("spec", ["balanced", "uniform", "zipf:0.6", "power_law:1.2"])
def test_every_source_sends_all_its_assignments(spec):
    routing = make_routing(spec, 16, 2)
    counts = routing.counts(1, 100, 4, 2)
    np.testing.assert_allclose(counts.sum(axis=1), 200)
    np.testing.assert_allclose(rows_between(counts, contiguous(16, 4)).sum(), 800)


def test_one_expert_per_gpu_loses_what_pooling_gives():
    routing = make_routing("zipf:0.6", 128, 2)
    counts = routing.counts(0, 128, 128, 2)
    alone = rows_between(counts, contiguous(128, 128)).sum(axis=0)
    pooled = contiguous(128, 8).device_load(counts.sum(axis=0))
    assert 7.5 < alone.max() / alone.mean() < 9
    assert pooled.max() / pooled.mean() < 1.6


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=8, max_size=20), st.integers(1, 4))
def test_no_expert_has_more_than_every_token(weights, top_k):
    share = capped(np.array(weights), top_k)
    assert share.sum() == pytest.approx(1.0)
    assert share.max() <= 1 / top_k + 1e-9


def test_buffers_of_the_program():
    assert buffer_rows(1024, 2, 128, 5.0) == 37  # 16 + 20 + 1
    assert buffer_rows(8, 2, 128, 5.0) == 2


def test_nodes_reached_is_exact_for_equal_shares():
    """Top-2 of 16 experts on two nodes: both on one node with probability 2 x (8 x 7) / (16 x 15)."""
    model = ModelConfig(moe=MoEConfig(num_experts=16, top_k=2))
    reached = nodes_reached(model, np.full(16, 1 / 16), contiguous(16, 16), 8)
    np.testing.assert_allclose(reached, 1 - 8 * 7 / (16 * 15))
    limited = ModelConfig(moe=MoEConfig(num_experts=256, top_k=8, groups=8, groups_kept=4))
    reached = nodes_reached(limited, np.full(256, 1 / 256), contiguous(256, 64), 8)
    assert 3.5 < reached.sum() <= 4  # at most the four kept groups, one a node


def test_nodes_reached_with_replicas_counts_all_homes():
    model = ModelConfig(moe=MoEConfig(num_experts=8, top_k=2))
    reached = nodes_reached(model, np.full(8, 1 / 8), balanced(np.ones(8), 8, 2), 4)
    assert np.all((reached > 0.6) & (reached < 1))


def test_the_busiest_device_is_imposed():
    rows = with_busiest(np.ones((4, 4)), 1.5)
    received = rows.sum(axis=0)
    assert received.max() / received.mean() == pytest.approx(1.5)
    assert rows.sum() == pytest.approx(16)


def test_a_trace_gives_counts_and_pairs(tmp_path):
    np.save(tmp_path / "trace.npy", np.array([[[0, 1], [0, 1], [2, 3]]]))
    routing = make_routing(f"trace:{tmp_path / 'trace.npy'}", 4, 2)
    np.testing.assert_allclose(routing.shares, [[2 / 6, 2 / 6, 1 / 6, 1 / 6]])
    assert routing.together[0, 1] == 2 and routing.together[0, 2] == 0


@pytest.mark.parametrize("spec", ["zipf:x", "zipf:-1", "other", "histogram:/nowhere"])
def test_a_wrong_routing_is_named(spec):
    with pytest.raises(ConfigError, match="simulate.routing"):
        make_routing(spec, 8, 2)


def test_the_device_with_most_experts_met_is_the_mean_of_drawn_ones():
    generator = np.random.default_rng(0)
    chances = generator.uniform(size=(6, 5))
    drawn = (generator.uniform(size=(20000, 6, 5)) < chances).sum(axis=2).max(axis=1)
    assert most_met(chances) == pytest.approx(drawn.mean(), abs=0.03)
    assert most_met(np.full((1, 8), 0.9)) == pytest.approx(7.2)


def test_a_token_meets_distinct_experts():
    assert chances_met(np.full(8, 1 / 8), tokens=8, top_k=2) == pytest.approx(1 - 0.75**8)
    assert chances_met(np.array([0.5, 0.5, 0.0]), tokens=1, top_k=2) == pytest.approx([1.0, 1.0, 0.0])


@pytest.mark.parametrize("data, message", [
    ({"a": 1}, "a readable file of numbers"),
    ([1, 2, 3], "4 counts a layer, not 3"),
    ([0, 0, 0, 0], "not all zero in a layer"),
    ([1, 2, 3, -1], "counts of zero and more"),
])  # fmt: skip
def test_histograms_that_are_none_are_refused(data, message, tmp_path):
    (tmp_path / "counts.json").write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=message):
        make_routing(f"histogram:{tmp_path / 'counts.json'}", 4, 2)


@pytest.mark.parametrize("trace", [np.zeros((0, 2), int), np.ones((3, 2)), np.array([1, 2]), np.full((3, 2), 4)])
def test_traces_that_are_none_are_refused(trace, tmp_path):
    np.save(tmp_path / "trace.npy", trace)
    with pytest.raises(ConfigError, match="from 0 to 3, at least one token"):
        make_routing(f"trace:{tmp_path / 'trace.npy'}", 4, 2)


def test_a_trace_whose_token_chooses_an_expert_twice_is_refused(tmp_path):
    np.save(tmp_path / "trace.npy", np.array([[0, 1], [2, 2]]))
    with pytest.raises(ConfigError, match="at most once"):
        make_routing(f"trace:{tmp_path / 'trace.npy'}", 4, 2)
