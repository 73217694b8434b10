"""The cache of latents: what every layer keeps of each token, in rows of one sequence or in pages.

A token costs W = Z + O values a layer, its normed latent and its rotated key. Rows
of a sequence stand together, [L, b, S, W], or in pages that a table names in order,
[L, n, rows, W]; a sequence to itself is a page as long as the sequence.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int32

from moe_ep.config import ModelConfig
from moe_ep.mesh import ALL_AXES
from moe_ep.shapes import Mask, Positions

# Sequences, or the pages that hold them, are split like the tokens.
CACHE = PartitionSpec(None, ALL_AXES)

Pages = Int32[Array, "b p"]
Lengths = Int32[Array, "b"]

# The Hopper kernel reads this many rows at a time; any multiple suits the others too.
ROWS_MULTIPLE = 64


class LatentCache(NamedTuple):
    """The rows of every layer, of the dense stack (None if there is none) and of the MoE stack."""

    dense: Float[Array, "Ld n rows W"] | None
    moe: Float[Array, "Lm n rows W"]

    @property
    def rows(self) -> int:
        """Rows of one sequence, or of one page."""
        return self.moe.shape[2]


def make_cache(model: ModelConfig, sequences: int, rows: int) -> LatentCache:
    """Returns an empty cache of `sequences` (or pages) x `rows`, finite as the kernels want it."""
    shape = (sequences, rows, model.attention.cache_dim)
    dtype = jnp.dtype(model.dtype)
    dense = jnp.zeros((model.dense_layers, *shape), dtype) if model.dense_layers else None
    return LatentCache(dense, jnp.zeros((model.moe_layers, *shape), dtype))


def bytes_per_token(model: ModelConfig) -> int:
    """Returns the bytes that all layers together cache of one token."""
    return model.layers * model.attention.cache_dim * jnp.dtype(model.dtype).itemsize


def round_up_rows(tokens: int) -> int:
    """Returns the least number of rows that holds so many tokens and suits every kernel."""
    return -(-tokens // ROWS_MULTIPLE) * ROWS_MULTIPLE


def with_rows(cache: LatentCache, rows: int) -> LatentCache:
    """Returns the cache with room for `rows` tokens of each sequence, the new ones zero."""

    def widen(layers: Array) -> Array:
        return jnp.pad(layers, ((0, 0), (0, 0), (0, rows - layers.shape[2]), (0, 0)))

    return jax.tree.map(widen, cache)


def own_pages(cache: LatentCache) -> Pages:
    """Returns the table of a cache whose sequences each have a page to themselves."""
    return jnp.arange(cache.moe.shape[1], dtype=jnp.int32)[:, None]


def write(
    cached: Float[Array, "n rows W"],
    pages: Pages,
    positions: Positions,
    new: Float[Array, "b s W"],
    valid: Mask | None = None,
) -> Float[Array, "n rows W"]:
    """Writes rows of each sequence at their positions; one past its pages, or not valid, is not written."""
    rows = jnp.int32(cached.shape[1])
    index, row = jax.lax.div(positions, rows), jax.lax.rem(positions, rows)
    page = jnp.take_along_axis(pages, index, axis=1, mode="fill", fill_value=cached.shape[0])
    page = page if valid is None else jnp.where(valid, page, cached.shape[0])
    return cached.at[page, row].set(new, mode="drop")


def read(cached: Float[Array, "n rows W"], pages: Pages) -> Float[Array, "b s W"]:
    """Returns the rows of each sequence's pages, s = p x rows of them, in order."""
    return cached[pages].reshape(pages.shape[0], -1, cached.shape[2])
