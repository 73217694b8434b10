"""The next token of each sequence, from its logits."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float32, Int32

from moe_ep.serve.inputs import Sampling

LogitRows = Float32[Array, "b V"]
NextTokens = Int32[Array, "b"]


Sampler = Callable[[LogitRows, Sampling, Int32[Array, "b"]], NextTokens]


def greedy(logits: LogitRows, sampling: Sampling, positions: Int32[Array, "b"]) -> NextTokens:
    """Returns the most likely token of each sequence, whatever `sampling` says; the lowest id of equal ones."""
    del sampling, positions
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def draw(logits: LogitRows, sampling: Sampling, positions: Int32[Array, "b"]) -> NextTokens:
    """Draws one token of each sequence.

    Args:
      logits: -inf where a token must not be drawn.
      sampling: of each sequence. top_p counts among the tokens that top_k left.
      positions: of the new tokens. A draw depends on the sequence's seed and the
        position alone: not on its neighbours, its place in the batch, or the mesh.
    """
    return jax.vmap(_draw_one)(logits, sampling, positions)


def _draw_one(logits: Float32[Array, "V"], sampling: Sampling, position: Int32[Array, ""]) -> Int32[Array, ""]:
    vocabulary = logits.shape[0]
    order = jnp.argsort(-logits, stable=True).astype(jnp.int32)
    rank = jnp.arange(vocabulary, dtype=jnp.int32)
    # At temperature 0 the division's result is not used.
    scaled = logits[order] / jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)
    kept = rank < jnp.where(sampling.top_k > 0, sampling.top_k, vocabulary)
    share = jax.nn.softmax(jnp.where(kept, scaled, -jnp.inf))
    # Tokens before this one: the one that reaches top_p is still kept, and so is the first.
    kept &= (jnp.cumsum(share) - share < sampling.top_p) | (rank == 0)
    # The largest of logits + Gumbel noise is a draw from their softmax.
    noise = jax.random.gumbel(jax.random.fold_in(jax.random.key(sampling.seed), position), (vocabulary,))
    drawn = jnp.argmax(jnp.where(kept, scaled + noise, -jnp.inf))
    return order[jnp.where(sampling.temperature > 0, drawn, 0)]
