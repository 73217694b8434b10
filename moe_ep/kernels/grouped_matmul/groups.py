"""Which rows of an expert buffer belong to which group: the aligned-contiguous layout.

Rows are sorted by group and every group starts at a multiple of the row tile, so a
tile belongs to one group and a kernel needs neither masks nor boundary tiles
computed twice. An empty group takes no tile.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Int32

from moe_ep.shapes import Count


class RowGroups(NamedTuple):
    """The map from tiles of rows to groups; a tile is R // len(tile_group) rows.

    tile_group: the group of every tile, ascending over the valid tiles.
    valid_tiles: tiles at this index and after it are skipped; what a product holds
        there is unspecified and must not be read.
    """

    tile_group: Int32[jax.Array, "tiles"]
    valid_tiles: Count


def make_row_groups(group_sizes: Int32[jax.Array, "G"], tile: int, tiles: int) -> RowGroups:
    """Returns the layout of groups of these sizes in a buffer of `tiles` tiles of `tile` rows.

    The caller makes the buffer large enough (`tiles_needed`): groups past its end
    are not represented.
    """
    ends = jnp.cumsum(_tiles_of(group_sizes, tile))
    indices = jnp.arange(tiles, dtype=jnp.int32)
    # Comparing with every end counts the groups that are over; the last group also
    # takes the tiles past the valid ones, so that the map always names a group.
    over = jnp.sum(indices[:, None] >= ends[None, :-1], axis=1, dtype=jnp.int32)
    return RowGroups(tile_group=over, valid_tiles=jnp.minimum(ends[-1], tiles).astype(jnp.int32))


def first_rows(group_sizes: Int32[jax.Array, "G"], tile: int) -> Int32[jax.Array, "G"]:
    """Returns the row at which each group starts."""
    tiles = _tiles_of(group_sizes, tile)
    return (jnp.cumsum(tiles) - tiles) * tile


def tiles_needed(rows: int, groups: int, tile: int) -> int:
    """Returns the tiles that hold any split of `rows` rows into `groups` groups."""
    occupied = min(rows, groups)
    return occupied + (rows - occupied) // tile


def row_group_of(groups: RowGroups, rows: int) -> Int32[jax.Array, "R"]:
    """Returns the group of every row, -1 for rows of skipped tiles."""
    tiles = groups.tile_group.shape[0]
    valid = jnp.arange(tiles, dtype=jnp.int32) < groups.valid_tiles
    return jnp.repeat(jnp.where(valid, groups.tile_group, -1), rows // tiles)


def _tiles_of(group_sizes, tile):
    return lax.div(group_sizes.astype(jnp.int32) + (tile - 1), jnp.int32(tile))
