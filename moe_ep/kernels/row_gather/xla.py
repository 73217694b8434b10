"""Both as XLA's gathers: for any shape and device, and what the kernels are checked against."""

import jax.numpy as jnp


def gather_rows(rows, index):
    """Returns [M, D]; arguments as in `api.gather_rows`."""
    return rows.at[index].get(mode="fill", fill_value=0)


def weighted_sum_rows(rows, weights, index):
    """Returns [n, D]; arguments as in `api.weighted_sum_rows`."""
    read = gather_rows(rows, index).astype(jnp.float32)
    return jnp.sum(read * weights[:, :, None], axis=1).astype(rows.dtype)
