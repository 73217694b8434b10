"""Two micro-batches half a layer apart give what one batch gives: values, choices, counts, gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_ep.config import (
    AttentionConfig,
    Config,
    ConfigError,
    DispatchConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    TrainConfig,
)
from moe_ep.mesh import make_mesh
from moe_ep.train.state import abstract_state
from moe_ep.train.step import make_gradients, parameter_specs

DEVICES = 4


def small_config(sequences_per_device=2, **model):
    attention = AttentionConfig(heads=2, nope_dim=4, rope_dim=4, value_dim=4, latent_dim=8)
    moe = MoEConfig(num_experts=DEVICES, top_k=2, hidden=24, shared_experts=1)
    return Config(
        model=ModelConfig(layers=2, dense_layers=0, width=16, hidden=24, vocabulary=64, dtype="float32",
                          attention=attention, moe=moe, **model),
        mesh=MeshConfig(data=1, expert=DEVICES),
        dispatch=DispatchConfig(overlap="none", margin_sigmas=50.0),
        train=TrainConfig(batch_sequences=sequences_per_device * DEVICES, sequence=8),
    )  # fmt: skip


def make_parameters(config, mesh):
    """Returns random values in the model's tree: its own initialisation takes longer to compile than to test."""
    random = np.random.default_rng(0)
    shapes = abstract_state(config, mesh).parameters
    return jax.tree.map(
        lambda leaf: jax.device_put(random.normal(0.0, 0.2, leaf.shape).astype(leaf.dtype), leaf.sharding), shapes
    )


def gradients_of(config, overlap, replay):
    config = dataclasses.replace(config, dispatch=dataclasses.replace(config.dispatch, overlap=overlap))
    mesh = make_mesh(config.mesh, config.cluster, DEVICES, jax.devices()[:DEVICES])
    shape = (config.train.batch_sequences, config.train.sequence + 1)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, config.model.vocabulary, shape), jnp.int32)
    bias = jnp.zeros((config.model.moe_layers, DEVICES), jnp.float32)
    gradients = jax.jit(make_gradients(config, parameter_specs(config, mesh), mesh))
    return gradients(make_parameters(config, mesh), tokens, bias, replay)


def assert_same(one, other):
    (gradients, report), (expected_gradients, expected) = one, other
    np.testing.assert_allclose(report.loss, expected.loss, rtol=1e-5)
    np.testing.assert_array_equal(report.choices, expected.choices)
    np.testing.assert_array_equal(report.expert_counts, expected.expert_counts)
    assert report.dispatch.rows_dropped == expected.dispatch.rows_dropped == 0
    for got, want in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-6)


def test_values_and_gradients_are_those_of_the_whole_batch():
    config = small_config()
    tokens = config.train.batch_sequences * config.train.sequence
    # Replayed choices that no router would make: they must follow their tokens into the halves.
    scores = np.random.default_rng(2).normal(size=(1, config.model.moe_layers, tokens, DEVICES))
    replay = jnp.asarray(np.argsort(scores, axis=-1)[..., : config.model.moe.top_k], jnp.int32)
    assert_same(gradients_of(config, "staggered", replay), gradients_of(config, "none", replay))


def test_odd_batches_are_refused_with_the_number():
    with pytest.raises(ConfigError, match="dispatch.overlap=staggered: allowed is an even number of sequences per device, not 3"):
        gradients_of(small_config(sequences_per_device=3), "staggered", None)
