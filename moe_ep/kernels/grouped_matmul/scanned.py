"""A loop over all tiles, its length known to the compiler: on a GPU without kernels for it.

A loop whose length is data makes the host wait for the device at every step, so
skipped tiles are computed too.
"""

import jax.numpy as jnp
from jax import lax

from moe_ep.kernels.grouped_matmul import steps, varying
from moe_ep.kernels.grouped_matmul.groups import row_group_of


def _forward(x, w, groups):
    def tile_product(_, tile):
        rows, group = tile
        return None, jnp.matmul(rows, _group_of(w, group), preferred_element_type=jnp.float32).astype(x.dtype)

    return _scan_tiles(tile_product, None, (x,), groups)[1]


def _input_gradient(dy, w, groups):
    def tile_product(_, tile):
        rows, group = tile
        product = jnp.einsum("rn,kn->rk", rows, _group_of(w, group), preferred_element_type=jnp.float32)
        return None, product.astype(dy.dtype)

    return _scan_tiles(tile_product, None, (dy,), groups)[1]


def _weight_gradient(x, dy, groups, group_count):
    # What skipped rows hold is unspecified, NaN included.
    kept = row_group_of(groups, x.shape[0])[:, None] >= 0
    x, dy = (jnp.where(kept, rows, jnp.zeros((), rows.dtype)) for rows in (x, dy))

    def add_tile(total, tile):
        x_rows, dy_rows, group = tile
        product = jnp.einsum("rk,rn->kn", x_rows, dy_rows, preferred_element_type=jnp.float32)
        return lax.dynamic_update_index_in_dim(total, _group_of(total, group) + product, group, axis=0), None

    zeros = jnp.zeros((group_count, x.shape[1], dy.shape[1]), jnp.float32)
    return _scan_tiles(add_tile, varying.match(zeros, x, dy, groups), (x, dy), groups)[0].astype(x.dtype)


def _scan_tiles(body, carry, operands, groups):
    tiles = groups.tile_group.shape[0]
    split = tuple(rows.reshape(tiles, rows.shape[0] // tiles, rows.shape[1]) for rows in operands)
    carry, out = lax.scan(body, carry, (*split, groups.tile_group))
    return carry, None if out is None else out.reshape(-1, out.shape[-1])


def _group_of(w, group):
    return lax.dynamic_index_in_dim(w, group, axis=0, keepdims=False)


STEPS = steps.steps_of(steps.Products(_forward, _input_gradient, _weight_gradient))
