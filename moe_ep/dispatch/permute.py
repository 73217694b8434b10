"""Moving rows by index, with gathers in both directions of differentiation.

The transpose of a gather is a scatter-add, which GPUs do an order of magnitude
slower. A dispatch knows both its map and the inverse, so each function here takes
both and differentiates into a gather. An index out of range reads zeros.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32, Int32

from moe_ep.kernels import row_gather


@jax.custom_vjp
def take_rows(
    rows: Float[Array, "n D"], index: Int32[Array, "m"], readers: Int32[Array, "n J"]
) -> Float[Array, "m D"]:
    """Returns rows[index].

    Args:
      rows: what is read.
      index: the row that each output row reads; out of range reads zeros.
      readers: the inverse, the output rows that read each input row; out of range where there are fewer than J.
    """
    del readers
    return row_gather.gather_rows(rows, index)


def _take_rows_forward(rows, index, readers):
    return take_rows(rows, index, readers), readers


def _take_rows_backward(readers, gradient):
    if readers.shape[1] == 1:
        return row_gather.gather_rows(gradient, readers[:, 0]), None, None
    return row_gather.weighted_sum_rows(gradient, jnp.ones(readers.shape, jnp.float32), readers), None, None


take_rows.defvjp(_take_rows_forward, _take_rows_backward)


@jax.custom_vjp
def weighted_sum_rows(
    rows: Float[Array, "m D"],
    weights: Float32[Array, "n K"],
    index: Int32[Array, "n K"],
    reader: Int32[Array, "m"],
) -> Float[Array, "n D"]:
    """Returns sum over k of weights[:, k] rows[index[:, k]], accumulated in float32.

    Args:
      rows: what is read.
      weights: of each read.
      index: the row of each read; out of range adds nothing.
      reader: the inverse, the flat (n, k) position that reads each row; out of range where none does.
    """
    del reader
    return row_gather.weighted_sum_rows(rows, weights, index)


def _weighted_sum_rows_forward(rows, weights, index, reader):
    return weighted_sum_rows(rows, weights, index, reader), (rows, weights, index, reader)


def _weighted_sum_rows_backward(residuals, gradient):
    rows, weights, index, reader = residuals
    weight_of_row = weights.reshape(-1).at[reader].get(mode="fill", fill_value=0)
    token_of_row = jax.lax.div(reader, jnp.int32(weights.shape[1]))
    rows_gradient = row_gather.weighted_sum_rows(gradient, weight_of_row[:, None], token_of_row[:, None])
    read = rows.at[index].get(mode="fill", fill_value=0).astype(jnp.float32)
    weights_gradient = jnp.sum(read * gradient.astype(jnp.float32)[:, None, :], axis=2)
    return rows_gradient, weights_gradient, None, None


weighted_sum_rows.defvjp(_weighted_sum_rows_forward, _weighted_sum_rows_backward)
