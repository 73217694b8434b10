"""Routing against a few lines of numpy."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_ep.config import MoEConfig
from moe_ep.model.router import Router


def route(config, x, bias, key=0):
    router = Router(jax.random.key(key), x.shape[1], config)
    return router(jnp.asarray(x), jnp.asarray(bias)), np.asarray(router.matrix[...])


def scores_of(score, logits):
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return {
        "softmax": exponentials / exponentials.sum(axis=1, keepdims=True),
        "sigmoid": 1 / (1 + np.exp(-logits)),
        "softmax_chosen": logits,
    }[score]


def keep_groups(ranking, groups, kept, best):
    """Returns the ranking with all but the best groups of each row at minus infinity."""
    grouped = ranking.reshape(len(ranking), groups, -1)
    value = np.sort(grouped, axis=2)[:, :, -best:].sum(axis=2)
    masked = np.full_like(grouped, -np.inf)
    for row, order in enumerate(np.argsort(-value, axis=1)[:, :kept]):
        masked[row, order] = grouped[row, order]
    return masked.reshape(ranking.shape)


@hypothesis.given(
    score=st.sampled_from(["softmax", "sigmoid"]),
    groups=st.sampled_from([(1, 1), (4, 2), (2, 1)]),
    group_score=st.sampled_from(["max", "top2_sum"]),
    normalize=st.booleans(),
    spread=st.floats(0.0, 2.0),
    seed=st.integers(0, 2**16),
)
def test_choices_and_weights(score, groups, group_score, normalize, spread, seed):
    config = MoEConfig(
        num_experts=8, top_k=2, score=score, groups=groups[0], groups_kept=groups[1], group_score=group_score,
        normalize=normalize, scaling_factor=2.5,
    )  # fmt: skip
    random = np.random.default_rng(seed)
    x = random.normal(size=(16, 12)).astype(np.float32)
    # A bias below zero makes scores negative: masking with 0 would choose from dropped groups.
    bias = (spread * random.normal(size=8) - 3.0).astype(np.float32)
    routing, matrix = route(config, x, bias)
    scores = scores_of(score, x @ matrix)
    ranking = scores + bias
    if groups[0] > 1:
        ranking = keep_groups(ranking, *groups, best=2 if group_score == "top2_sum" else 1)
    expected = np.argsort(-ranking, axis=1)[:, :2]
    np.testing.assert_array_equal(np.sort(routing.choices, axis=1), np.sort(expected, axis=1))
    weights = np.take_along_axis(scores, np.asarray(routing.choices), axis=1)
    if normalize:
        weights = weights / weights.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(routing.weights, 2.5 * weights, rtol=1e-5)


def test_softmax_of_the_chosen_is_another_function():
    x = np.random.default_rng(0).normal(size=(16, 12)).astype(np.float32)
    config = MoEConfig(num_experts=8, top_k=2, score="softmax_chosen")
    routing, matrix = route(config, x, np.zeros(8, np.float32))
    chosen = np.take_along_axis(x @ matrix, np.asarray(routing.choices), axis=1)
    np.testing.assert_allclose(routing.weights, scores_of("softmax", chosen), rtol=1e-5)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_bias_moves_choices_and_nothing_else(score):
    x = np.random.default_rng(0).normal(size=(16, 12)).astype(np.float32)
    config = MoEConfig(num_experts=8, top_k=2, score=score)
    bias = np.zeros(8, np.float32)
    bias[3] = 5.0
    routing, matrix = route(config, x, bias)
    assert np.all(np.any(np.asarray(routing.choices) == 3, axis=1))
    router = Router(jax.random.key(0), 12, config)
    gradient = jax.grad(lambda bias: jnp.sum(router(jnp.asarray(x), bias).weights[:, 0]))(jnp.asarray(bias))
    np.testing.assert_array_equal(gradient, np.zeros(8))
    weights = np.take_along_axis(scores_of(score, x @ matrix), np.asarray(routing.choices), axis=1)
    np.testing.assert_allclose(routing.weights, weights / weights.sum(axis=1, keepdims=True), rtol=1e-5)


def test_replayed_choices_keep_the_routers_weights():
    x = np.random.default_rng(0).normal(size=(4, 12)).astype(np.float32)
    router = Router(jax.random.key(0), 12, MoEConfig(num_experts=8, top_k=2))
    replay = jnp.array([[0, 1], [2, 3], [4, 5], [6, 7]], jnp.int32)
    routing = router(jnp.asarray(x), jnp.zeros(8, jnp.float32), replay)
    np.testing.assert_array_equal(routing.choices, replay)
    np.testing.assert_allclose(jnp.sum(routing.weights, axis=1), np.ones(4), rtol=1e-6)
