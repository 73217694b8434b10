"""A model small enough to compile often, with every part of the large one."""

import dataclasses

import jax
import numpy as np

from moe_ep.checks import check
from moe_ep.config import (
    AttentionConfig,
    ClusterConfig,
    Config,
    DispatchConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    TrainConfig,
)
from moe_ep.mesh import make_mesh, place_batch

MODEL = ModelConfig(
    layers=3,
    dense_layers=1,
    width=32,
    hidden=48,
    vocabulary=64,
    dtype="float32",
    remat="none",
    attention=AttentionConfig(heads=4, nope_dim=6, rope_dim=4, value_dim=8, latent_dim=16),
    moe=MoEConfig(num_experts=16, top_k=2, hidden=24),
)


def make_config(**dispatch) -> Config:
    """Returns 16 experts, 16 sequences of 16 tokens, and buffers that hold early, uneven routing in one wave."""
    return check(
        Config(
            model=MODEL,
            dispatch=DispatchConfig(**({"margin_sigmas": 30.0} | dispatch)),
            train=TrainConfig(
                steps=20,
                batch_sequences=16,
                sequence=16,
                optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=5),
            ),
        )
    )


def mesh_of(config: Config, expert: int, data: int = 1, gpus_per_node: int = 8):
    """Returns a mesh over the first expert x data emulated devices."""
    cluster = ClusterConfig(gpus_per_node=gpus_per_node, nics_per_node=1)
    devices = jax.devices()[: expert * data]
    return make_mesh(MeshConfig(data, expert), cluster, config.model.moe.num_experts, devices)


def batch(config: Config, mesh, seed: int = 0):
    """Returns random tokens, the same on every mesh, with a few that are frequent."""
    random = np.random.default_rng(seed)
    shape = (config.train.batch_sequences, config.train.sequence + 1)
    tokens = np.minimum(random.zipf(1.3, shape), config.model.vocabulary - 1)
    return place_batch(tokens.astype(np.int32), mesh)


def with_dispatch(config: Config, **fields) -> Config:
    return dataclasses.replace(config, dispatch=dataclasses.replace(config.dispatch, **fields))


def largest_error(actual, expected) -> float:
    """Returns the largest difference of any leaf relative to that leaf's largest entry."""

    def error(actual, expected):
        actual, expected = np.asarray(actual), np.asarray(expected)
        return float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30))

    return max(jax.tree.leaves(jax.tree.map(error, actual, expected)))
