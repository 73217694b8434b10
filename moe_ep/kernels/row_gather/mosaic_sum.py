"""Rows added up by index and weight for Hopper: a block reads its piece of one result's rows straight into registers.

All of a block's loads are in flight at once. Blocks are small and many, and the GPU starts one
where another ends. Measured faster than rows dealt out beforehand that come by TMA (results/LOG.md).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_ep.kernels.grouped_matmul import varying

LANES = 128  # of a row as the kernel sees it, [D / LANES, LANES]: one for each thread of a block
_MOST_LOADED = 112  # values that a thread has on their way, which are half as many registers
_LOADS = (1, 2, 4, 8)  # values of 16 bits that a thread loads at a time


def refusal(rows) -> str:
    """Returns what the kernel would take instead of these rows; "" if it takes them."""
    if rows.dtype not in (jnp.bfloat16, jnp.float16):
        return f"bfloat16 or float16, not {rows.dtype.name}"
    if rows.shape[1] % (2 * LANES):
        return f"rows of a multiple of {2 * LANES} values, not {rows.shape[1]}"
    return ""


def weighted_sum_rows(rows, weights, index, interpret=None):
    """Returns [n, D]; arguments as in `api.weighted_sum_rows`."""
    (outputs, reads), lanes = index.shape, rows.shape[1] // LANES
    piece, load = piece_of(lanes, reads)
    kernel = plgpu.kernel(
        functools.partial(_weighted_sum, reads, piece, load),
        out_type=jax.ShapeDtypeStruct((outputs, lanes, LANES), rows.dtype),
        grid=(outputs * (lanes // piece),),
        grid_names=("block",),
        kernel_name="weighted_sum_rows",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **({} if interpret is None else {"interpret": interpret}),
    )
    numbers = (index.reshape(-1), weights.reshape(-1))
    out = kernel(rows.reshape(rows.shape[0], lanes, LANES), *numbers).reshape(outputs, rows.shape[1])
    return varying.match(out, rows, numbers)


def piece_of(lanes: int, reads: int) -> tuple[int, int]:
    """Returns (lanes of a block's piece, values of a load) for rows of so many lanes, `reads` of them a result."""
    most = max(_MOST_LOADED // reads, 1)
    load = max(values for values in _LOADS if lanes % values == 0 and values <= most)
    return max(piece for piece in range(load, lanes + 1, load) if lanes % piece == 0 and piece <= most), load


def _weighted_sum(reads, piece, load, rows, index, weights, out):
    output, columns = _place(piece, out)
    own = [output * reads + read for read in range(reads)]
    values = [_read(rows, index[place], columns, load).astype(jnp.float32) for place in own]
    terms = [weights[place] * value for place, value in zip(own, values)]
    out[output, columns] = sum(terms[1:], terms[0]).astype(out.dtype)


def _place(piece, out):
    """Returns the output and the lanes of it that this block makes."""
    block, pieces = lax.axis_index("block"), jnp.int32(out.shape[1] // piece)
    return lax.div(block, pieces), pl.ds(lax.rem(block, pieces) * piece, piece)


def _read(rows, source, columns, load):
    """Returns rows[source, columns], zeros if there is no such row."""
    known = (source >= 0) & (source < rows.shape[0])
    values = rows[jnp.where(known, source, 0), columns]
    values = plgpu.layout_cast(values, plgpu.Layout.WG_STRIDED(values.shape, vec_size=load))
    return jnp.where(jnp.broadcast_to(known, values.shape), values, jnp.zeros_like(values))
