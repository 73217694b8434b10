"""The public gathers: checks and the choice of an implementation. They have no derivative; `dispatch.permute` gives it."""

import jax
import jax.numpy as jnp

from moe_ep.kernels import device
from moe_ep.kernels.row_gather import mosaic_copy, mosaic_sum, xla

_GATHERS = {"xla": xla.gather_rows, "mosaic": mosaic_copy.gather_rows}
_SUMS = {"xla": xla.weighted_sum_rows, "mosaic": mosaic_sum.weighted_sum_rows}
IMPLEMENTATIONS = tuple(_GATHERS)

# Below this many bytes moved, starting the kernel is most of its time; XLA's gather joins what follows it.
_LEAST_BYTES = 2**25
# Narrower rows are pieces too small for a copy or a block to be worth its start.
_LEAST_WIDTH = 1024


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
    refusal = mosaic_copy.refusal(rows)
    name = implementation or choose(rows, index.shape[0], 1, refusal)
    _check_takes(name, refusal)
    return _GATHERS[name](rows, index)


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
    refusal = mosaic_sum.refusal(rows)
    name = implementation or choose(rows, *index.shape, refusal)
    _check_takes(name, refusal)
    return _SUMS[name](rows, weights, index)


def _check(rows, index, rank):
    if rows.ndim != 2:
        raise ValueError(f"rows have shape {rows.shape}: rank {rows.ndim}, not 2")
    if index.ndim != rank or index.dtype != jnp.int32:
        raise ValueError(f"index is {index.dtype}{list(index.shape)}, not int32 of rank {rank}")


def choose(rows, outputs: int, reads: int, refusal: str) -> str:
    """Returns the implementation for so many results of `reads` rows [N, D] each, unless refused, on the device compiled for."""
    width = rows.shape[1]
    moved = outputs * (reads + 1) * width * rows.dtype.itemsize
    fits = not refusal and width >= _LEAST_WIDTH and moved >= _LEAST_BYTES
    return "mosaic" if fits and device.is_hopper(device.device_kind()) else "xla"


def _check_takes(name, refusal):
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {name!r}, not one of {', '.join(IMPLEMENTATIONS)}")
    if name == "mosaic" and refusal:
        raise ValueError(f"implementation 'mosaic' takes {refusal}")
