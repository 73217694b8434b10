"""Rows copied by index for Hopper: through shared memory by TMA, many in flight, none through registers.

A block takes every so many-th output row, or half row, which spreads them more evenly.
Loads run ahead of what is stored, so that the memory always has several to fetch; an index
past the rows is filled with zeros by the copy engine.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_ep.kernels import device
from moe_ep.kernels.grouped_matmul import varying

LANES = 128  # of a row as the copy engine sees it, [D / LANES, LANES]; a copy takes 256 at most of each
BLOCKS = 2  # on a multiprocessor, so that one loads while the other waits for its turn
_BLOCK_BYTES = 227 * 1024 // BLOCKS - 1024  # of shared memory for each, less what barriers take
_MOST_SLOTS = 8


def refusal(rows) -> str:
    """Returns what the kernel would take instead of these rows; "" if it takes them."""
    if not hasattr(plgpu, "OOBFillMode"):
        return "a jax of 0.11 or later"
    width = rows.shape[1]
    if rows.dtype not in (jnp.bfloat16, jnp.float16):
        return f"bfloat16 or float16, not {rows.dtype.name}"
    if width % LANES or 2 * 2 * width > _BLOCK_BYTES:
        return f"rows of a multiple of {LANES} values, two of them in {_BLOCK_BYTES} bytes, not {width} values"
    return ""


def gather_rows(rows, index, interpret=None):
    """Returns [M, D]; arguments as in `api.gather_rows`."""
    outputs, lanes = index.shape[0], rows.shape[1] // LANES
    pieces = 1 if lanes % 2 else 2
    slots = min(_MOST_SLOTS * pieces, _BLOCK_BYTES * pieces // (2 * rows.shape[1]))
    kernel = plgpu.kernel(
        functools.partial(_gather, slots, outputs),
        out_type=jax.ShapeDtypeStruct((outputs, lanes, LANES), rows.dtype),
        scratch_types={
            "ring": plgpu.SMEM((slots, lanes // pieces, LANES), rows.dtype),
            "full": plgpu.Barrier(num_barriers=slots),
        },
        grid=(min(outputs, BLOCKS * device.multiprocessors()),),
        grid_names=("block",),
        kernel_name="gather_rows",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **({} if interpret is None else {"interpret": interpret}),
    )
    out = kernel(rows.reshape(rows.shape[0], lanes, LANES), index).reshape(outputs, rows.shape[1])
    return varying.match(out, rows, index)


def _own(outputs):
    """Returns how many outputs this block has, and the function from their count to the output."""
    block, blocks = lax.axis_index("block"), jnp.int32(lax.axis_size("block"))
    count = lax.div(outputs - block + blocks - 1, blocks)
    return count, lambda own: block + own * blocks


def _gather(slots, outputs, rows, index, out, *, ring, full):
    lanes = ring.shape[1]
    pieces = jnp.int32(rows.shape[1] // lanes)
    count, piece_of = _own(outputs * pieces)
    ahead = max(slots * 3 // 4, 1)

    def place(own):
        piece = piece_of(own)
        return lax.div(piece, pieces), pl.ds(lax.rem(piece, pieces) * lanes, lanes)

    def load(own):
        slot = lax.rem(own, jnp.int32(slots))
        row, columns = place(own)
        source = rows.at[index[row], columns]
        plgpu.copy_gmem_to_smem(source, ring.at[slot], full.at[slot], oob_mode=plgpu.OOBFillMode.ZEROS)

    @pl.loop(0, lax.min(count, jnp.int32(ahead)))
    def _(own):
        load(own)

    @pl.loop(0, count)
    def _(own):
        slot = lax.rem(own, jnp.int32(slots))
        plgpu.barrier_wait(full.at[slot])
        plgpu.copy_smem_to_gmem(ring.at[slot], out.at[*place(own)])

        @pl.when(own + ahead < count)
        def _():
            # The slot that is loaded next was read by the store `slots - ahead` before this one.
            plgpu.wait_smem_to_gmem(slots - ahead, wait_read_only=True)
            load(own + ahead)

    plgpu.wait_smem_to_gmem(0)
