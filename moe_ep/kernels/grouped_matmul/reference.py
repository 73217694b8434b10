"""The slow obvious product: for every group, all rows, those of other groups masked away."""

import jax
import jax.numpy as jnp

from moe_ep.kernels.grouped_matmul import activations
from moe_ep.kernels.grouped_matmul.groups import RowGroups, row_group_of


def grouped_matmul(x: jax.Array, w: jax.Array, groups: RowGroups, activation: str | None) -> jax.Array:
    """Returns [R, N] as `api.grouped_matmul` does, zero in skipped tiles; differentiable as it stands."""
    product = _product_in_float32(x, w, groups)
    return activations.ACTIVATIONS[activation].value((product,)).astype(x.dtype)


def expert_mlp(rows: jax.Array, first: tuple[jax.Array, ...], w_out: jax.Array, groups: RowGroups, activation: str) -> jax.Array:
    """Returns [R, D] as `api.expert_mlp` does, zero in skipped tiles; differentiable as it stands."""
    products = tuple(_product_in_float32(rows, w, groups) for w in first)
    hidden = activations.ACTIVATIONS[activation].value(products).astype(rows.dtype)
    return _product_in_float32(hidden, w_out, groups).astype(rows.dtype)


def _product_in_float32(x, w, groups):
    row_group = row_group_of(groups, x.shape[0])[:, None]
    total = jnp.zeros((x.shape[0], w.shape[2]), jnp.float32)
    for group in range(w.shape[0]):
        masked = jnp.where(row_group == group, x, jnp.zeros((), x.dtype))
        total = total + jnp.matmul(masked, w[group], preferred_element_type=jnp.float32)
    return total
