"""One group: plain XLA dots over all rows.

Matrix units add up in float32 and round once on writing; asking for a float32
result would write it to memory, twice the bytes, and convert it there.
"""

import jax.numpy as jnp

from moe_ep.kernels.grouped_matmul import steps
from moe_ep.kernels.grouped_matmul.groups import row_group_of


def _forward(x, w, groups):
    del groups  # rows of skipped tiles are computed as well: one large product is faster than a loop
    return jnp.matmul(x, w[0])


def _input_gradient(dy, w, groups):
    dy = _without_skipped_rows(dy, groups)
    return jnp.einsum("rn,kn->rk", dy, w[0])


def _weight_gradient(x, dy, groups, group_count):
    del group_count
    x, dy = (_without_skipped_rows(rows, groups) for rows in (x, dy))
    return jnp.einsum("rk,rn->kn", x, dy)[None]


def _without_skipped_rows(rows, groups):
    # What skipped rows hold is unspecified, NaN included, and must not reach a sum over rows.
    kept = row_group_of(groups, rows.shape[0]) >= 0
    return jnp.where(kept[:, None], rows, jnp.zeros((), rows.dtype))


STEPS = steps.steps_of(steps.Products(_forward, _input_gradient, _weight_gradient))
