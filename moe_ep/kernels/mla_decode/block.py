"""One block of the Hopper kernel: 64 heads of a sequence over a piece of its cache.

The cache is walked in steps of 64 rows, which take turns in two slots of shared
memory; a row is loaded once and serves both products. Each slot has a warpgroup that
loads its rows, makes scores of them and the softmax's weights, so that one slot's
softmax runs beside the other's products. Two more warpgroups hold the output, half of
the latent each, because 64 x 512 float32 values fill half of the register file.

    slot's warpgroup: load -> scores -> maximum -> factor -> weights -> wait for latent_free
    outputs:          wait for factor, scale; wait for weights, add weights @ rows -> latent_free
"""

import math

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

HEADS = 64  # wgmma's row count: one warpgroup's tile of heads
ROWS = 64  # cache rows per step
SLOTS = 2  # steps of the cache held in shared memory
WARPGROUPS = SLOTS + 2
REGISTERS = {"slots": 80, "outputs": 176}  # 4 x 128 in all
MAX_LATENT = 512  # float32 columns that fit two warpgroups' registers

# Rows of what is kept per head: the running maximum and the sum of each slot, the
# factor of each slot's latest step, and what the whole piece weighs.
MAXIMUM, TOTAL, FACTOR, LOG2_WEIGHT, PER_HEAD = 0, 2, 4, 6, 7

ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(1)
LOG2_E = math.log2(math.e)


def chunk_width(latent: int) -> int:
    """Returns the columns that are loaded and multiplied at a time: ptxas refuses wider accumulators than 128."""
    return 128 if latent % 256 == 0 else 64


def scratch_types(latent: int, rope: int, dtype) -> dict:
    """Returns what a block keeps in shared memory."""
    width = chunk_width(latent)
    chunks = latent // width
    return {
        "q_latent_smem": _tiled((chunks, HEADS, width), dtype),
        "q_rope_smem": _tiled((HEADS, rope), dtype),
        "latent_smem": _tiled((SLOTS, chunks, ROWS, width), dtype),
        "rope_smem": _tiled((SLOTS, ROWS, rope), dtype),
        "weights_smem": _tiled((HEADS, ROWS), dtype),
        "per_head_smem": plgpu.SMEM((PER_HEAD, HEADS), jnp.float32),
        "queries_full": plgpu.Barrier(num_arrivals=chunks + 1),
        "rope_full": plgpu.Barrier(num_barriers=SLOTS),
        "latent_full": plgpu.Barrier(num_barriers=SLOTS * chunks),
        "latent_free": plgpu.ClusterBarrier(collective_axes=("cluster",), num_barriers=SLOTS, num_arrivals=2),
        "maximum_full": plgpu.Barrier(num_barriers=SLOTS),
        "factor_full": plgpu.Barrier(num_barriers=SLOTS),
        "weights_full": plgpu.Barrier(num_barriers=SLOTS),
        "weights_free": plgpu.Barrier(num_barriers=SLOTS, num_arrivals=2),
        "totals_full": plgpu.Barrier(num_arrivals=SLOTS),
    }


def _tiled(shape, dtype):
    swizzle = plgpu.find_swizzle(shape[-1] * jnp.dtype(dtype).itemsize * 8)
    tile = (8, swizzle // jnp.dtype(dtype).itemsize)
    transforms = (plgpu.TilingTransform(tile), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def decode_block(
    q_latent_ref, q_rope_ref, cache_ref, first_rows_ref, lengths_ref, o_ref, log2_weight_ref,
    *, scale, piece_steps, accumulate, **scratch,
):  # fmt: skip
    """The kernel's body, run by every warpgroup; refs as `mosaic.decode_pieces` names them."""
    piece = lax.axis_index("piece")
    sequence = lax.axis_index("sequence")
    head_tile = lax.axis_index("head_tiles") * lax.axis_size("cluster") + lax.axis_index("cluster")
    heads = pl.ds(head_tile * HEADS, HEADS)
    warpgroup = lax.axis_index("warpgroup")
    first_step = piece * piece_steps
    rows = jnp.maximum(lengths_ref[sequence] - first_step * ROWS, 0)
    steps = jnp.minimum(lax.div(rows + (ROWS - 1), jnp.int32(ROWS)), piece_steps)

    @pl.when(warpgroup < SLOTS)
    def _():
        plgpu.set_max_registers(REGISTERS["slots"], action="decrease")

        def load(step):
            first_row = pl.multiple_of(first_rows_ref[sequence, first_step + step], ROWS)
            _load_rows(cache_ref.at[pl.ds(first_row, ROWS)], warpgroup, **scratch)

        @pl.when(warpgroup == 0)
        def _():
            _load_queries(q_latent_ref.at[sequence, heads], q_rope_ref.at[sequence, heads], **scratch)

        _walk_slot(warpgroup, load, rows, steps, scale * LOG2_E, **scratch)

        @pl.when(warpgroup == 0)
        def _():
            _write_log2_weight(log2_weight_ref.at[piece, sequence, heads], **scratch)

    @pl.when(warpgroup >= SLOTS)
    def _():
        plgpu.set_max_registers(REGISTERS["outputs"], action="increase")
        side = warpgroup - SLOTS
        half = q_latent_ref.shape[-1] // 2
        output = o_ref.at[piece, sequence, heads, pl.ds(side * half, half)]
        _make_output(output, side, rows, steps, accumulate, **scratch)


def _load_queries(q_latent, q_rope, *, q_latent_smem, q_rope_smem, queries_full, **_):
    chunks, _, width = q_latent_smem.shape
    plgpu.copy_gmem_to_smem(q_rope, q_rope_smem, queries_full)
    for chunk in range(chunks):
        columns = q_latent.at[:, pl.ds(chunk * width, width)]
        plgpu.copy_gmem_to_smem(columns, q_latent_smem.at[chunk], queries_full)


def _load_rows(cache, slot, *, latent_smem, rope_smem, rope_full, latent_full, **_):
    """Loads a step's rows for every block of the cluster, in the order in which scores take them."""
    _, chunks, _, width = latent_smem.shape
    keys = cache.at[:, pl.ds(chunks * width, rope_smem.shape[-1])]
    plgpu.copy_gmem_to_smem(keys, rope_smem.at[slot], rope_full.at[slot], collective_axes="cluster")
    for chunk in range(chunks):
        columns = cache.at[:, pl.ds(chunk * width, width)]
        full = latent_full.at[slot * chunks + chunk]
        plgpu.copy_gmem_to_smem(columns, latent_smem.at[slot, chunk], full, collective_axes="cluster")


def _walk_slot(
    slot, load, rows, steps, log2_scale,
    *, weights_smem, per_head_smem, queries_full, latent_free, maximum_full, factor_full, weights_full, weights_free,
    totals_full, **scratch,
):  # fmt: skip
    """Makes the weights of every second step: the softmax without its division, and the factor for what was summed."""
    other = 1 - slot

    def per_head(value):
        return plgpu.layout_cast(jnp.full((HEADS,), value, jnp.float32), ROW_LAYOUT)

    @pl.when(slot < steps)
    def _():
        load(slot)

    per_head_smem[MAXIMUM + slot] = per_head(-jnp.inf)

    @pl.when(slot == SLOTS - 1)  # Step 0 follows a step of slot 1 like any other.
    def _():
        plgpu.barrier_arrive(maximum_full.at[slot])

    plgpu.barrier_wait(queries_full)
    column = plgpu.broadcasted_iota(jnp.int32, (HEADS, ROWS), 1, layout=plgpu.Layout.WGMMA)

    def make_step(turn, carry):
        own_maximum, total = carry
        step = turn * SLOTS + slot
        scores = jnp.where(column < rows - step * ROWS, _scores(slot, **scratch), -jnp.inf)
        highest = scores.max(axis=1) * log2_scale
        plgpu.barrier_wait(maximum_full.at[other])
        before = plgpu.layout_cast(per_head_smem[MAXIMUM + other], ROW_LAYOUT)
        maximum = jnp.maximum(before, highest)
        per_head_smem[MAXIMUM + slot] = maximum
        per_head_smem[FACTOR + slot] = jnp.exp2(before - maximum)

        @pl.when(step + 1 < steps)
        def _():
            plgpu.barrier_arrive(maximum_full.at[slot])

        plgpu.barrier_arrive(factor_full.at[slot])  # The outputs are scaled while the weights are made.
        weights = jnp.exp2(scores * log2_scale - lax.broadcast_in_dim(maximum, scores.shape, [0]))

        @pl.when(step > 0)
        def _():
            plgpu.barrier_wait(weights_free.at[other])

        weights_smem[...] = weights.astype(weights_smem.dtype)
        plgpu.barrier_arrive(weights_full.at[slot])

        @pl.when(step + SLOTS < steps)
        def _():
            plgpu.barrier_wait(latent_free.at[slot])
            load(step + SLOTS)

        return maximum, total * jnp.exp2(own_maximum - maximum) + weights.sum(axis=1)

    turns = lax.div(steps + (SLOTS - 1) - slot, jnp.int32(SLOTS))
    _, total = lax.fori_loop(0, turns, make_step, (per_head(-jnp.inf), per_head(0.0)))
    per_head_smem[TOTAL + slot] = total
    plgpu.barrier_arrive(totals_full)


def _scores(slot, *, q_latent_smem, q_rope_smem, latent_smem, rope_smem, rope_full, latent_full, **_):
    chunks = q_latent_smem.shape[0]

    def product(scores_ref):
        plgpu.barrier_wait(rope_full.at[slot])
        plgpu.wgmma(scores_ref, q_rope_smem, rope_smem.at[slot].transpose((1, 0)))
        for chunk in range(chunks):
            plgpu.barrier_wait(latent_full.at[slot * chunks + chunk])
            plgpu.wgmma(scores_ref, q_latent_smem.at[chunk], latent_smem.at[slot, chunk].transpose((1, 0)))
        return scores_ref[...]

    return pl.run_scoped(product, plgpu.ACC((HEADS, ROWS), jnp.float32))


def _make_output(
    output, side, rows, steps, accumulate,
    *, latent_smem, weights_smem, per_head_smem, latent_full, latent_free, factor_full, weights_full, weights_free,
    totals_full, **_,
):  # fmt: skip
    chunks, _, width = latent_smem.shape[1:]
    own = chunks // 2

    def scaled(parts, factor):
        factor = lax.broadcast_in_dim(factor, (HEADS, width), [0])
        return [part * factor for part in parts]

    def add_step(step, parts):
        slot = lax.rem(step, jnp.int32(SLOTS))
        plgpu.barrier_wait(factor_full.at[slot])
        parts = scaled(parts, plgpu.layout_cast(per_head_smem[FACTOR + slot], ROW_LAYOUT))
        for chunk in range(own):
            plgpu.barrier_wait(latent_full.at[slot * chunks + side * own + chunk])
        plgpu.barrier_wait(weights_full.at[slot])
        weights = plgpu.layout_cast(weights_smem[...], plgpu.Layout.WGMMA)

        @pl.when(step + 1 < steps)
        def _():
            plgpu.barrier_arrive(weights_free.at[slot])

        columns = [latent_smem.at[slot, side * own + chunk] for chunk in range(own)]

        @pl.when(rows - step * ROWS < ROWS)
        def _():
            _clear_rows(columns, rows - step * ROWS)

        parts = accumulate(parts, weights, columns)

        @pl.when(step + SLOTS < steps)
        def _():
            plgpu.barrier_arrive(latent_free.at[slot])

        return parts

    zeros = plgpu.layout_cast(jnp.zeros((HEADS, width), jnp.float32), plgpu.Layout.WGMMA)
    parts = lax.fori_loop(0, steps, add_step, [zeros for _ in range(own)])
    plgpu.barrier_wait(totals_full)
    _, total = _maximum_and_total(per_head_smem)
    for chunk, part in enumerate(scaled(parts, jnp.where(total > 0, 1 / total, 0.0))):
        output[:, pl.ds(chunk * width, width)] = part.astype(output.dtype)


def accumulate_in_place(totals, weights, columns):
    """Each total + weights @ its columns, in the total's own registers."""

    def add_products(refs):
        for ref, values in zip(refs, columns):
            plgpu.wgmma(ref, weights, values)

    return pl.run_state(add_products)([plgpu.ACC.init(total) for total in totals])


def accumulate_interpreted(totals, weights, columns):
    """The same for the interpreter, which knows neither run_state nor weights in registers."""
    products = [jnp.dot(weights, values[...], preferred_element_type=jnp.float32) for values in columns]
    plgpu.commit_smem()  # wgmma's reads are ordered before the next load; these have to be.
    return [total + product for total, product in zip(totals, products)]


def _clear_rows(columns, valid_rows):
    """Zeroes rows that no sequence owns: their weight is 0, but 0 times NaN is NaN."""
    for chunk in columns:
        for start in range(0, chunk.shape[-1], 64):
            part = chunk.at[:, pl.ds(start, 64)]
            row = plgpu.broadcasted_iota(jnp.int32, part.shape, 0, layout=plgpu.Layout.WGMMA)
            kept = plgpu.layout_cast(part[...], plgpu.Layout.WGMMA)
            part[...] = jnp.where(row < valid_rows, kept, jnp.zeros_like(kept))
    plgpu.commit_smem()


def _maximum_and_total(per_head_smem):
    """Joins the slots: (log2 of the scale, sum of weights at that scale); (-inf, 0) without rows."""
    maxima = [plgpu.layout_cast(per_head_smem[MAXIMUM + slot], ROW_LAYOUT) for slot in range(SLOTS)]
    totals = [plgpu.layout_cast(per_head_smem[TOTAL + slot], ROW_LAYOUT) for slot in range(SLOTS)]
    maximum = jnp.maximum(*maxima)
    total = sum(jnp.where(total > 0, total * jnp.exp2(own - maximum), 0.0) for own, total in zip(maxima, totals))
    return maximum, total


def _write_log2_weight(log2_weight, *, per_head_smem, totals_full, **_):
    plgpu.barrier_wait(totals_full)
    maximum, total = _maximum_and_total(per_head_smem)
    per_head_smem[LOG2_WEIGHT] = maximum + jnp.log(total) * LOG2_E
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(per_head_smem.at[LOG2_WEIGHT], log2_weight)
    plgpu.wait_smem_to_gmem(0)
