"""A loop over blocks of rows, each with the weights of its group: no FLOPs for skipped tiles.

The CPU implementation. A block costs one copy of its group's weights, so blocks are
as large as a group allows: the tiles of a group are cut into a ladder of block sizes,
each twice the next, down to one tile.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_ep.kernels.grouped_matmul import steps, varying

# Where measured products on two CPU cores (512 x 2048 float32) stop gaining from longer blocks.
_LARGEST_BLOCK_ROWS = 1024


class _Blocks(NamedTuple):
    """The blocks of one size: the first row and the group of each, and how many there are."""

    rows: int
    first_row: jax.Array
    group: jax.Array
    count: jax.Array


def _forward(x, w, groups):
    def block_product(start, rows, group):
        return jnp.matmul(_rows_at(x, start, rows), _group_of(w, group), preferred_element_type=jnp.float32)

    return _map_blocks(block_product, x, w, groups, w.shape[2])


def _input_gradient(dy, w, groups):
    def block_product(start, rows, group):
        return jnp.einsum("rn,kn->rk", _rows_at(dy, start, rows), _group_of(w, group), preferred_element_type=jnp.float32)

    return _map_blocks(block_product, dy, w, groups, w.shape[1])


def _weight_gradient(x, dy, groups, group_count):
    total = varying.match(jnp.zeros((group_count, x.shape[1], dy.shape[1]), jnp.float32), x, dy, groups)
    for blocks in _ladder(groups, x.shape[0], group_count):

        def add_block(index, total, blocks=blocks):
            group, start = blocks.group[index], blocks.first_row[index]
            operands = (_rows_at(rows, start, blocks.rows) for rows in (x, dy))
            block = jnp.einsum("rk,rn->kn", *operands, preferred_element_type=jnp.float32)
            return lax.dynamic_update_index_in_dim(total, _group_of(total, group) + block, group, axis=0)

        total = lax.fori_loop(0, blocks.count, add_block, total)
    return total.astype(x.dtype)


def _map_blocks(block_product, x, w, groups, columns):
    out = varying.match(jnp.zeros((x.shape[0], columns), x.dtype), x, w, groups)
    for blocks in _ladder(groups, x.shape[0], w.shape[0]):

        def store_block(index, out, blocks=blocks):
            start = blocks.first_row[index]
            product = block_product(start, blocks.rows, blocks.group[index]).astype(out.dtype)
            return lax.dynamic_update_slice_in_dim(out, product, start, axis=0)

        out = lax.fori_loop(0, blocks.count, store_block, out)
    return out


def _ladder(groups, rows, group_count) -> list[_Blocks]:
    """Returns, largest blocks first, a cut of every group's tiles into blocks of 2^n tiles."""
    tiles = groups.tile_group.shape[0]
    tile = rows // tiles
    valid = jnp.arange(tiles, dtype=jnp.int32) < groups.valid_tiles
    members = valid[:, None] & (groups.tile_group[:, None] == jnp.arange(group_count, dtype=jnp.int32)[None, :])
    tiles_left = jnp.sum(members, axis=0, dtype=jnp.int32)
    next_tile = jnp.cumsum(tiles_left) - tiles_left
    ladder = []
    for size in _block_sizes(tile, tiles):
        counts = lax.div(tiles_left, jnp.int32(size))
        ladder.append(_blocks_of(size, tile, tiles, counts, next_tile))
        tiles_left, next_tile = tiles_left - counts * size, next_tile + counts * size
    return ladder


def _block_sizes(tile, tiles):
    sizes = [1]
    while 2 * sizes[0] <= tiles and 2 * sizes[0] * tile <= _LARGEST_BLOCK_ROWS:
        sizes.insert(0, 2 * sizes[0])
    return sizes


def _blocks_of(size, tile, tiles, counts, next_tile):
    ends = jnp.cumsum(counts)
    indices = jnp.arange(tiles // size, dtype=jnp.int32)
    group = jnp.sum(indices[:, None] >= ends[None, :-1], axis=1, dtype=jnp.int32)
    within = indices - (ends - counts)[group]
    return _Blocks(size * tile, (next_tile[group] + within * size) * tile, group, ends[-1])


def _rows_at(x, start, rows):
    return lax.dynamic_slice_in_dim(x, start, rows, axis=0)


def _group_of(w, group):
    return lax.dynamic_index_in_dim(w, group, axis=0, keepdims=False)


STEPS = steps.steps_of(steps.Products(_forward, _input_gradient, _weight_gradient))
