"""Blocks with a cache: whole prompts that leave their latents behind, chunks of prompts, one new token a sequence.

The cache of a stack is carried through the scan over its layers as one array, all
layers' rows end to end: a layer's row is written in place, and attention reads
where the layer's page table points, so no layer's cache is ever copied out.

A step writes rows from `lengths` on of each sequence, and nothing reads those rows
until the caller moves `lengths` on. So a step whose routing needed more waves than
its program has is simply run again on another program, with the cache that came
back: it writes the same rows once more.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32, Int32

from moe_ep.config import DispatchConfig
from moe_ep.model.block import AttentionHalf, DenseBlock, MoEBlock
from moe_ep.model.kv_cache import LatentCache, Lengths, Pages
from moe_ep.model.moe import MoEReport
from moe_ep.model.staggered import scan_staggered
from moe_ep.shapes import Activations, Mask, Positions

Bias = Float32[Array, "L E"]
Replay = Int32[Array, "L t K"] | None  # choices to use instead of the routers' own, where not negative


def prefill_blocks(
    x: Activations,
    positions: Positions,
    dense: DenseBlock | None,
    moe: MoEBlock,
    bias: Bias,
    dispatch: DispatchConfig,
    replay: Replay = None,
) -> tuple[Activations, LatentCache, MoEReport]:
    """Runs all blocks on whole prompts, keys and values expanded.

    Returns:
      The blocks' output; the latents of every token, as a cache with room for just
      these; every MoE layer's report.
    """

    def dense_step(x: Activations, block: DenseBlock) -> tuple[Activations, Array]:
        x, rows = block.first.prefill(x, positions)
        return block.feed_forward(x), rows

    dense_rows = None
    if dense is not None:
        x, dense_rows = jax.lax.scan(dense_step, x, dense)
    prefill = _PREFILLS[dispatch.overlap_for(positions.size, positions.shape[0])]
    x, rows, reports = prefill(x, positions, moe, bias, dispatch, replay)
    return x, LatentCache(dense_rows, rows), reports


def _prefill_whole(
    x: Activations, positions: Positions, blocks: MoEBlock, bias: Bias, dispatch: DispatchConfig, replay: Replay
) -> tuple[Activations, Array, MoEReport]:
    def step(x: Activations, layer: tuple) -> tuple[Activations, tuple]:
        block, bias, replay = layer
        x, rows = block.first.prefill(x, positions)
        x, report = block.feed_forward(x, bias, dispatch, replay)
        return x, (rows, report)

    x, (rows, reports) = jax.lax.scan(step, x, (blocks, bias, replay))
    return x, rows, reports


def _prefill_halves(
    x: Activations, positions: Positions, blocks: MoEBlock, bias: Bias, dispatch: DispatchConfig, replay: Replay
) -> tuple[Activations, Array, MoEReport]:
    def attend(half: AttentionHalf, x: Activations, positions: Any, state: None) -> tuple[Activations, Array, None]:
        return *half.prefill(x, positions), state

    extras = jnp.broadcast_to(positions[None], (bias.shape[0], *positions.shape))
    x, reports, rows, _ = scan_staggered(attend, x, blocks, bias, replay, extras, lambda step: step, dispatch)
    return x, rows, reports


_PREFILLS = {"none": _prefill_whole, "chunks": _prefill_whole, "staggered": _prefill_halves}


# attend(half, x, rows, pages) -> (x, rows): the attention half of a block over its layer's pages.
AttendPages = Callable[[AttentionHalf, Activations, Array, Pages], tuple[Activations, Array]]


def extend_blocks(
    x: Activations,
    dense: DenseBlock | None,
    moe: MoEBlock,
    cache: LatentCache,
    pages: Pages,
    starts: Lengths,
    valid: Mask,
    bias: Bias,
    dispatch: DispatchConfig,
) -> tuple[Activations, LatentCache, MoEReport]:
    """Runs all blocks on a chunk of each prompt, keys and values expanded from the cache.

    Args:
      x: the chunks.
      dense: the dense stack, or None.
      moe: the MoE stack.
      cache: of the tokens before; donate it, it is written in place.
      pages: of each sequence, in order.
      starts: tokens of each sequence that the cache holds: its chunk's first position.
      valid: the tokens that are some.
      bias: of every MoE layer.
      dispatch: how rows travel; not "staggered".

    Returns:
      The blocks' output; the cache with the new rows; every MoE layer's report.
    """

    def attend(half: AttentionHalf, x: Activations, rows: Array, pages: Pages) -> tuple[Activations, Array]:
        return half.extend(x, rows, pages, starts, valid)

    x, dense_rows = _scan_dense(attend, x, dense, cache.dense, pages)
    x, rows, reports = _scan_moe(attend, x, moe, cache.moe, pages, valid, bias, dispatch, None)
    return x, LatentCache(dense_rows, rows), reports


def decode_blocks(
    x: Activations,
    dense: DenseBlock | None,
    moe: MoEBlock,
    cache: LatentCache,
    pages: Pages,
    lengths: Lengths,
    bias: Bias,
    dispatch: DispatchConfig,
    replay: Replay = None,
    active: Mask | None = None,
) -> tuple[Activations, LatentCache, MoEReport]:
    """Runs all blocks on one new token a sequence, attention absorbed.

    Args:
      x: one position of each sequence.
      dense: the dense stack, or None.
      moe: the MoE stack.
      cache: of the tokens before; donate it, it is written in place.
      pages: of each sequence, in order.
      lengths: tokens of each sequence that the cache holds: the new one's position.
      bias: of every MoE layer.
      dispatch: how rows travel.
      replay: choices to use instead of the routers' own, where they are not negative.
      active: the sequences that there are, None for all; not with "staggered".

    Returns:
      The blocks' output; the cache with the new rows; every MoE layer's report.
    """

    def attend(half: AttentionHalf, x: Activations, rows: Array, pages: Pages) -> tuple[Activations, Array]:
        return half.decode(x, rows, pages, lengths, active)

    x, dense_rows = _scan_dense(attend, x, dense, cache.dense, pages)
    sequences = x.shape[0]
    if dispatch.overlap_for(sequences, sequences) == "staggered":
        x, rows, reports = _decode_halves(x, moe, cache.moe, pages, lengths, bias, dispatch, replay)
    else:
        x, rows, reports = _scan_moe(attend, x, moe, cache.moe, pages, active, bias, dispatch, replay)
    return x, LatentCache(dense_rows, rows), reports


def _scan_dense(
    attend: AttendPages, x: Activations, blocks: DenseBlock | None, cached: Array | None, pages: Pages
) -> tuple[Activations, Array | None]:
    if blocks is None:
        return x, None

    def step(carry: tuple, layer: tuple) -> tuple[tuple, None]:
        x, rows = carry
        block, layer_pages = layer
        x, rows = attend(block.first, x, rows, layer_pages)
        return (block.feed_forward(x), rows), None

    (x, rows), _ = jax.lax.scan(step, (x, _end_to_end(cached)), (blocks, _pages_of_layers(cached, pages)))
    return x, rows.reshape(cached.shape)


def _scan_moe(
    attend: AttendPages,
    x: Activations,
    blocks: MoEBlock,
    cached: Array,
    pages: Pages,
    valid: Mask | None,
    bias: Bias,
    dispatch: DispatchConfig,
    replay: Replay,
) -> tuple[Activations, Array, MoEReport]:
    def step(carry: tuple, layer: tuple) -> tuple[tuple, MoEReport]:
        x, rows = carry
        block, bias, layer_pages, replay = layer
        x, rows = attend(block.first, x, rows, layer_pages)
        x, report = block.feed_forward(x, bias, dispatch, replay, valid)
        return (x, rows), report

    layers = (blocks, bias, _pages_of_layers(cached, pages), replay)
    (x, rows), reports = jax.lax.scan(step, (x, _end_to_end(cached)), layers)
    return x, rows.reshape(cached.shape), reports


def _decode_halves(
    x: Activations,
    blocks: MoEBlock,
    cached: Array,
    pages: Pages,
    lengths: Lengths,
    bias: Bias,
    dispatch: DispatchConfig,
    replay: Replay,
) -> tuple[Activations, Array, MoEReport]:
    """Both halves write into the one cache, each where its sequences' pages are."""

    def attend(half: AttentionHalf, x: Activations, extra: tuple, rows: Array) -> tuple[Activations, None, Array]:
        x, rows = half.decode(x, rows, *extra)
        return x, None, rows

    extras = (_pages_of_layers(cached, pages), jnp.broadcast_to(lengths[None], (bias.shape[0], *lengths.shape)))
    x, reports, _, rows = scan_staggered(
        attend, x, blocks, bias, replay, extras, lambda step: step, dispatch, state=_end_to_end(cached)
    )
    return x, rows.reshape(cached.shape), reports


def _end_to_end(cached: Float[Array, "L n rows W"]) -> Float[Array, "Ln rows W"]:
    return cached.reshape(-1, *cached.shape[2:])


def _pages_of_layers(cached: Float[Array, "L n rows W"], pages: Pages) -> Array:
    """Returns every layer's page table into the stack's pages end to end."""
    layers, owned = cached.shape[:2]
    first = jnp.arange(layers, dtype=jnp.int32) * owned
    return pages[None] + first[:, None, None]
