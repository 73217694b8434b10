"""Rows by index for Hopper: through shared memory by TMA, many in flight, none through registers to be copied.

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
_STORES = 2  # rows on their way out of a weighted sum


def refusal(rows, reads: int) -> str:
    """Returns what the kernels would take instead of these rows, `reads` of them a result; "" if they take them."""
    if not hasattr(plgpu, "OOBFillMode"):
        return "a jax of 0.11 or later"
    width = rows.shape[1]
    if rows.dtype not in (jnp.bfloat16, jnp.float16):
        return f"bfloat16 or float16, not {rows.dtype.name}"
    if width % LANES or width > 256 * LANES:
        return f"rows of a multiple of {LANES} values up to {256 * LANES}, not {width}"
    if _groups(width, reads) < 2:
        return f"two times {reads} rows and {_STORES} results in {_BLOCK_BYTES} bytes, not rows of {width} values"
    return ""


def gather_rows(rows, index, interpret=None):
    """Returns [M, D]; arguments as in `api.gather_rows`."""
    lanes = rows.shape[1] // LANES
    pieces = 1 if lanes % 2 else 2
    slots = min(_MOST_SLOTS * pieces, _BLOCK_BYTES * pieces // (2 * rows.shape[1]))
    scratch = {
        "ring": plgpu.SMEM((slots, lanes // pieces, LANES), rows.dtype),
        "full": plgpu.Barrier(num_barriers=slots),
    }
    body = functools.partial(_gather, slots, index.shape[0])
    return _run(body, "gather_rows", scratch, index.shape[0], rows, (index,), interpret)


def weighted_sum_rows(rows, weights, index, interpret=None):
    """Returns [n, D]; arguments as in `api.weighted_sum_rows`."""
    outputs, reads = index.shape
    groups = min(_MOST_SLOTS, _groups(rows.shape[1], reads))
    scratch = {
        "ring": plgpu.SMEM((groups, reads, *_lanes(rows)[1:]), rows.dtype),
        "results": plgpu.SMEM((_STORES, *_lanes(rows)[1:]), rows.dtype),
        "full": plgpu.Barrier(num_arrivals=reads, num_barriers=groups),
    }
    body = functools.partial(_weighted_sum, groups, reads, outputs)
    return _run(body, "weighted_sum_rows", scratch, outputs, rows, (index.reshape(-1), weights.reshape(-1)), interpret)


def _groups(width, reads):
    return (_BLOCK_BYTES // (2 * width) - _STORES) // reads


def _lanes(rows):
    return rows.shape[0], rows.shape[1] // LANES, LANES


def _run(body, name, scratch, outputs, rows, numbers, interpret):
    out_type = jax.ShapeDtypeStruct((outputs, *_lanes(rows)[1:]), rows.dtype)
    kernel = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=(min(outputs, BLOCKS * device.multiprocessors()),),
        grid_names=("block",),
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **({} if interpret is None else {"interpret": interpret}),
    )
    out = kernel(rows.reshape(_lanes(rows)), *numbers).reshape(outputs, rows.shape[1])
    return varying.match(out, rows, numbers)


def _own(outputs):
    """Returns how many outputs this block has, and the function from their count to the output."""
    block, blocks = lax.axis_index("block"), jnp.int32(lax.axis_size("block"))
    count = lax.div(outputs - block + blocks - 1, blocks)
    return count, lambda own: block + own * blocks


def _load(source, slot, barrier):
    plgpu.copy_gmem_to_smem(source, slot, barrier, oob_mode=plgpu.OOBFillMode.ZEROS)


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
        _load(rows.at[index[row], columns], ring.at[slot], full.at[slot])

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


def _weighted_sum(groups, reads, outputs, rows, index, weights, out, *, ring, results, full):
    count, row_of = _own(outputs)

    def load(own):
        slot = lax.rem(own, jnp.int32(groups))
        for read in range(reads):
            _load(rows.at[index[row_of(own) * reads + read]], ring.at[slot, read], full.at[slot])

    @pl.loop(0, lax.min(count, jnp.int32(groups)))
    def _(own):
        load(own)

    @pl.loop(0, count)
    def _(own):
        slot, result = lax.rem(own, jnp.int32(groups)), results.at[lax.rem(own, jnp.int32(_STORES))]
        weight_of = [weights[row_of(own) * reads + read] for read in range(reads)]
        plgpu.barrier_wait(full.at[slot])
        total = weight_of[0] * ring[slot, 0].astype(jnp.float32)
        for read in range(1, reads):
            total += weight_of[read] * ring[slot, read].astype(jnp.float32)
        plgpu.wait_smem_to_gmem(_STORES - 1, wait_read_only=True)
        result[...] = total.astype(result.dtype)
        plgpu.commit_smem()  # Every thread has read the slot by now as well.
        plgpu.copy_smem_to_gmem(result, out.at[row_of(own)])

        @pl.when(own + groups < count)
        def _():
            load(own + groups)

    plgpu.wait_smem_to_gmem(0)
