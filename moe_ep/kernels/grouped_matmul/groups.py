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


@jax.tree_util.register_static
class StaticRows(int):
    """A number of rows that is known when a program is traced: part of a layout, not a value in it."""


class RowGroups(NamedTuple):
    """The map from tiles of rows to groups; a tile is R // len(tile_group) rows.

    tile_group: the group of every tile, ascending over the valid tiles.
    valid_tiles: tiles at this index and after it are skipped; what a product holds
        there is unspecified and must not be read.
    tile_rows: the rows at the front of every tile that carry data; fewer than a tile
        in the last one of a group alone. The others are pad rows: zero, so that a
        sum over rows may leave them out.
    expected_rows: how many rows valid tiles are expected to have, by which a kernel
        is chosen.
    """

    tile_group: Int32[jax.Array, "tiles"]
    valid_tiles: Count
    tile_rows: Int32[jax.Array, "tiles"]
    expected_rows: StaticRows


def make_row_groups(
    group_sizes: Int32[jax.Array, "G"], tile: int, tiles: int, expected_rows: int | None = None
) -> RowGroups:
    """Returns the layout of groups of these sizes in a buffer of `tiles` tiles of `tile` rows.

    The caller makes the buffer large enough (`tiles_needed`): groups past its end
    are not represented.

    Args:
      expected_rows: the sum of the sizes that is expected; None: as many as the buffer holds.
    """
    tile_counts = _tiles_of(group_sizes, tile)
    ends = jnp.cumsum(tile_counts)
    indices = jnp.arange(tiles, dtype=jnp.int32)
    # Comparing with every end counts the groups that are over; the last group also
    # takes the tiles past the valid ones, so that the map always names a group.
    over = jnp.sum(indices[:, None] >= ends[None, :-1], axis=1, dtype=jnp.int32)
    # Of each group, where its first row lies from a tile's first on: the rows within the tile are added up.
    first = ((ends - tile_counts)[None, :] - indices[:, None]) * tile
    rows = jnp.clip(first + group_sizes[None, :], 0, tile) - jnp.clip(first, 0, tile)
    valid_tiles = jnp.minimum(ends[-1], tiles).astype(jnp.int32)
    expected_tiles = tiles if expected_rows is None else tiles_needed(max(expected_rows, 1), group_sizes.shape[0], tile)
    expected = StaticRows(tile * min(tiles, expected_tiles))
    return RowGroups(over, valid_tiles, jnp.sum(rows, axis=1, dtype=jnp.int32), expected)


def one_group(rows: int, tile: int) -> RowGroups:
    """Returns the layout of one group of `rows` rows, all of them data."""
    tiles = rows // tile
    return RowGroups(jnp.zeros(tiles, jnp.int32), jnp.int32(tiles), jnp.full(tiles, tile, jnp.int32), StaticRows(rows))


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
