"""What a step must do at least: bytes read on a device, bytes sent to others, by formula and by what was counted."""

import math

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from moe_ep.bench.running import Counted, Running
from moe_ep.config import ModelConfig
from moe_ep.parameter_counts import parameters_by_part
from moe_ep.dispatch import TRANSPORTS, make_exchange

# Of each trained parameter, in an update: float32 weight, gradient and two moments read; all but the gradient written.
_UPDATE_BYTES = 4 * 4 + 3 * 4


def least_bytes(running: Running, phase: str, counted: Counted) -> float:
    """Returns the bytes that a device must move through its memory in a step.

    Serving: the weights that the step's tokens meet, once, and in decode the caches.
    Training: those weights once in each of three passes, and the update.
    """
    model, layout = running.config.model, running.contender.layout
    parts = parameters_by_part(model)
    met = float(np.mean(counted.expert_counts > 0))  # experts that no token chose need not be read
    held = parts["experts"] / layout.ep
    others = sum(parts.values()) - parts["experts"] - parts["embedding"] // 2  # of the embedding only rows are read
    value_bytes = 2 if model.dtype == "bfloat16" else 4
    weights = value_bytes * (met * held + others)
    if phase == "train":
        return 3 * weights + _UPDATE_BYTES * (held + others)
    if phase == "prefill":
        return weights
    tokens = running.contender.sequences * running.context
    return weights + tokens * model.layers * model.attention.cache_dim * value_bytes


def exchange_bytes(running: Running, phase: str, counted: Counted) -> float:
    """Returns the bytes that a device sends to others in a step's exchanges, a mean over devices."""
    model, dispatch, layout = running.config.model, running.config.dispatch, running.contender.layout
    if layout.ep == 1:
        return 0.0
    sequences = running.contender.sequences
    tokens = sequences * (1 if phase == "decode" else running.context)
    halves = 2 if dispatch.overlap_for(tokens, sequences) == "staggered" else 1
    exchange = make_exchange(
        dispatch, experts=layout.experts, peers=layout.ep, tokens=tokens // halves, top_k=model.moe.top_k
    ).with_waves(running.waves)
    away = counted.rows_away / model.moe_layers / halves
    rows = TRANSPORTS[dispatch.transport].network_rows(exchange, model.width, away) * halves * model.moe_layers
    return rows * model.width * (2 if model.dtype == "bfloat16" else 4) * _passes(model, phase)


def _passes(model: ModelConfig, phase: str) -> int:
    """The exchanges of a forward pass, those of the backward pass, and of one that is computed again."""
    return 1 if phase != "train" else 3 if model.remat == "block" else 2


def gradient_bytes(running: Running, phase: str) -> float:
    """Returns the bytes that a device sends in the gradients' sums, all-reduced in rings."""
    if phase != "train":
        return 0.0
    return float(sum(_ring_bytes(leaf, running.mesh) for leaf in jax.tree.leaves(running.parameters)))


def _ring_bytes(leaf: jax.Array, mesh: Mesh) -> float:
    assert isinstance(leaf.sharding, NamedSharding)
    held = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    copies = mesh.size * held // (leaf.size * leaf.dtype.itemsize)
    return 2 * (copies - 1) / copies * held
