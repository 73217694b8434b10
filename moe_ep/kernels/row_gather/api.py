"""The public gathers: checks and the choice of an implementation. They have no derivative; `dispatch.permute` gives it."""

import jax
import jax.numpy as jnp

from moe_ep.kernels import device
from moe_ep.kernels.row_gather import mosaic, xla

IMPLEMENTATIONS = {"xla": xla, "mosaic": mosaic}

# Below this many bytes moved, starting the kernel is most of its time; XLA's gather joins what follows it.
_LEAST_BYTES = 2**25


def gather_rows(rows: jax.Array, index: jax.Array, *, implementation: str | None = None) -> jax.Array:
    """Returns rows[index], zeros where the index is not one of a row.

    Args:
      rows: [N, D].
      index: int32 [M].
      implementation: a name of IMPLEMENTATIONS; None takes what is faster here.
    Raises:
      ValueError: a rank, type or size that the implementation does not take.
    """
    _check(rows, index, 1)
    name = _checked(implementation or choose(rows, index.shape[0], 1), rows, 1)
    return IMPLEMENTATIONS[name].gather_rows(rows, index)


def weighted_sum_rows(
    rows: jax.Array, weights: jax.Array, index: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """Returns sum over k of weights[:, k] rows[index[:, k]], added up in float32 and rounded once.

    Args:
      rows: [N, D].
      weights: float32 [n, K].
      index: int32 [n, K]; one that is not a row's adds nothing.
      implementation: a name of IMPLEMENTATIONS; None takes what is faster here.
    Raises:
      ValueError: a rank, type or size that the implementation does not take.
    """
    _check(rows, index, 2)
    if weights.shape != index.shape or weights.dtype != jnp.float32:
        raise ValueError(f"weights are {weights.dtype}{list(weights.shape)}, not float32{list(index.shape)} as the index")
    outputs, reads = index.shape
    name = _checked(implementation or choose(rows, outputs, reads), rows, reads)
    return IMPLEMENTATIONS[name].weighted_sum_rows(rows, weights, index)


def _check(rows, index, rank):
    if rows.ndim != 2:
        raise ValueError(f"rows have shape {rows.shape}: rank {rows.ndim}, not 2")
    if index.ndim != rank or index.dtype != jnp.int32:
        raise ValueError(f"index is {index.dtype}{list(index.shape)}, not int32 of rank {rank}")


def choose(rows, outputs: int, reads: int) -> str:
    """Returns the implementation for so many results of `reads` rows [N, D] each on the device compiled for."""
    moved = outputs * (reads + 1) * rows.shape[1] * rows.dtype.itemsize
    fits = device.is_hopper(device.device_kind()) and not mosaic.refusal(rows, reads)
    return "mosaic" if fits and moved >= _LEAST_BYTES else "xla"


def _checked(name, rows, reads):
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {name!r}, not one of {', '.join(IMPLEMENTATIONS)}")
    if name == "mosaic" and (refusal := mosaic.refusal(rows, reads)):
        raise ValueError(f"implementation 'mosaic' takes {refusal}")
    return name
