"""One group: plain XLA dots over all rows."""

import jax.numpy as jnp

from moe_ep.kernels.grouped_matmul import steps
from moe_ep.kernels.grouped_matmul.groups import row_group_of


def _forward(x, w, groups):
    del groups  # rows of skipped tiles are computed as well: one large product is faster than a loop
    return jnp.matmul(x, w[0], preferred_element_type=jnp.float32).astype(x.dtype)


def _input_gradient(dy, w, groups):
    dy = _without_skipped_rows(dy, groups)
    return jnp.einsum("rn,kn->rk", dy, w[0], preferred_element_type=jnp.float32).astype(dy.dtype)


def _weight_gradient(x, dy, groups, group_count):
    del group_count
    x, dy = (_without_skipped_rows(rows, groups) for rows in (x, dy))
    return jnp.einsum("rk,rn->kn", x, dy, preferred_element_type=jnp.float32).astype(x.dtype)[None]


def _without_skipped_rows(rows, groups):
    # What skipped rows hold is unspecified, NaN included, and must not reach a sum over rows.
    kept = row_group_of(groups, rows.shape[0]) >= 0
    return jnp.where(kept[:, None], rows, jnp.zeros((), rows.dtype))


STEPS = steps.steps_of(steps.Products(_forward, _input_gradient, _weight_gradient))
