"""One block of the Hopper kernel: 64 heads of a sequence over a piece of its cache.

Four warpgroups walk over the cache in steps of 64 rows. One loads (TMA), one makes
scores and their softmax, and two hold the output, half of the latent each, because
64 x 512 float32 values fill half of the register file. A cache row is loaded once and
serves both products.

    loads --full--> scores --weights_full--> outputs --free--> loads
                       <-----weights_free-----
"""

import math

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

HEADS = 64  # wgmma's row count: one warpgroup's tile of heads
ROWS = 64  # cache rows per step
SLOTS = 2  # steps of the cache held in shared memory
MAX_HALF_LATENT = 256  # float32 columns that fit a warpgroup's registers
MAX_ACCUMULATOR_COLUMNS = 128  # ptxas refuses wider ones with four warpgroups

SCORES, LOADS, WARPGROUPS = 0, 3, 4  # 1 and 2 hold the output's halves
FACTOR, LOG2_WEIGHT = 0, 1  # rows of what is kept per head
REGISTERS = {"scores": 104, "outputs": 184, "loads": 40}  # 4 x 128 in all; fewer for the outputs spill

ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(1)
LOG2_E = math.log2(math.e)


def scratch_types(half: int, rope: int, dtype) -> dict:
    """Returns what a block keeps in shared memory, for latents of 2 * half and rotary keys of rope."""
    return {
        "q_latent_smem": _tiled((2, HEADS, half), dtype),
        "q_rope_smem": _tiled((HEADS, rope), dtype),
        "latent_smem": _tiled((SLOTS, 2, ROWS, half), dtype),
        "rope_smem": _tiled((SLOTS, ROWS, rope), dtype),
        "weights_smem": _tiled((HEADS, ROWS), dtype),
        "row_smem": plgpu.SMEM((2, HEADS), jnp.float32),
        "queries_full": plgpu.Barrier(num_arrivals=3),
        "rope_full": plgpu.Barrier(num_barriers=SLOTS),
        "latent_full": plgpu.Barrier(num_barriers=SLOTS * 2),
        "latent_free": plgpu.ClusterBarrier(collective_axes=("cluster",), num_barriers=SLOTS * 2),
        "factor_full": plgpu.Barrier(),
        "weights_full": plgpu.Barrier(),
        "weights_free": plgpu.Barrier(num_arrivals=2),
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
    half = scratch["latent_smem"].shape[-1]
    first_step = piece * piece_steps
    rows = jnp.maximum(lengths_ref[sequence] - first_step * ROWS, 0)
    steps = jnp.minimum(lax.div(rows + (ROWS - 1), jnp.int32(ROWS)), piece_steps)

    @pl.when(warpgroup == SCORES)
    def _():
        plgpu.set_max_registers(REGISTERS["scores"], action="decrease")
        _make_weights(log2_weight_ref.at[piece, sequence, heads], rows, steps, scale, **scratch)

    @pl.when(jnp.logical_and(warpgroup != SCORES, warpgroup != LOADS))
    def _():
        plgpu.set_max_registers(REGISTERS["outputs"], action="increase")
        side = warpgroup - 1
        output = o_ref.at[piece, sequence, heads, pl.ds(side * half, half)]
        _make_output(output, side, rows, steps, accumulate, **scratch)

    @pl.when(warpgroup == LOADS)
    def _():
        plgpu.set_max_registers(REGISTERS["loads"], action="decrease")
        _load_queries(q_latent_ref.at[sequence, heads], q_rope_ref.at[sequence, heads], **scratch)

        @pl.loop(0, steps)
        def _(step):
            first_row = pl.multiple_of(first_rows_ref[sequence, first_step + step], ROWS)
            _load_step(cache_ref.at[pl.ds(first_row, ROWS)], step, **scratch)


def _load_queries(q_latent, q_rope, *, q_latent_smem, q_rope_smem, queries_full, **_):
    half = q_latent_smem.shape[-1]
    plgpu.copy_gmem_to_smem(q_rope, q_rope_smem, queries_full)
    for side in range(2):
        columns = q_latent.at[:, pl.ds(side * half, half)]
        plgpu.copy_gmem_to_smem(columns, q_latent_smem.at[side], queries_full)


def _load_step(cache, step, *, latent_smem, rope_smem, rope_full, latent_full, latent_free, **_):
    half, rope = latent_smem.shape[-1], rope_smem.shape[-1]
    slot = lax.rem(step, jnp.int32(SLOTS))
    for side in range(2):

        @pl.when(step >= SLOTS)
        def _():
            plgpu.barrier_wait(latent_free.at[2 * slot + side])
        if side == 0:  # Both outputs follow the scores, so a free half frees the rotary key.
            keys = cache.at[:, pl.ds(2 * half, rope)]
            plgpu.copy_gmem_to_smem(keys, rope_smem.at[slot], rope_full.at[slot], collective_axes="cluster")
        columns = cache.at[:, pl.ds(side * half, half)]
        full = latent_full.at[2 * slot + side]
        plgpu.copy_gmem_to_smem(columns, latent_smem.at[slot, side], full, collective_axes="cluster")


def _make_weights(
    log2_weight, rows, steps, scale,
    *, weights_smem, row_smem, queries_full, factor_full, weights_full, weights_free, **scratch,
):  # fmt: skip
    """Softmax without its division; factors for what was summed before go along."""
    log2_scale = scale * LOG2_E
    plgpu.barrier_wait(queries_full)
    column = plgpu.broadcasted_iota(jnp.int32, (HEADS, ROWS), 1, layout=plgpu.Layout.WGMMA)

    def per_head(value):
        return plgpu.layout_cast(jnp.full((HEADS,), value, jnp.float32), ROW_LAYOUT)

    def step_weights(step, carry):
        maximum, total = carry
        scores = jnp.where(column < rows - step * ROWS, _scores(step, **scratch), -jnp.inf)
        new_maximum = jnp.maximum(maximum, scores.max(axis=1) * log2_scale)
        factor = jnp.exp2(maximum - new_maximum)

        @pl.when(step > 0)
        def _():
            plgpu.barrier_wait(weights_free)

        row_smem[FACTOR] = factor
        plgpu.barrier_arrive(factor_full)  # The outputs are scaled while the weights are made.
        weights = jnp.exp2(scores * log2_scale - lax.broadcast_in_dim(new_maximum, scores.shape, [0]))
        weights_smem[...] = weights.astype(weights_smem.dtype)
        plgpu.barrier_arrive(weights_full)
        return new_maximum, total * factor + weights.sum(axis=1)

    maximum, total = lax.fori_loop(0, steps, step_weights, (per_head(-jnp.inf), per_head(0.0)))

    @pl.when(steps > 0)
    def _():
        plgpu.barrier_wait(weights_free)

    row_smem[FACTOR] = jnp.where(total > 0, 1 / total, 0.0)
    plgpu.barrier_arrive(factor_full)
    row_smem[LOG2_WEIGHT] = maximum + jnp.log(total) * LOG2_E
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(row_smem.at[LOG2_WEIGHT], log2_weight)
    plgpu.wait_smem_to_gmem(0)


def _scores(step, *, q_latent_smem, q_rope_smem, latent_smem, rope_smem, rope_full, latent_full, **_):
    slot = lax.rem(step, jnp.int32(SLOTS))

    def product(scores_ref):
        plgpu.barrier_wait(rope_full.at[slot])
        plgpu.wgmma(scores_ref, q_rope_smem, rope_smem.at[slot].transpose((1, 0)))
        for side in range(2):
            plgpu.barrier_wait(latent_full.at[2 * slot + side])
            latent = latent_smem.at[slot, side].transpose((1, 0))
            plgpu.wgmma(scores_ref, q_latent_smem.at[side], latent)
        return scores_ref[...]

    return pl.run_scoped(product, plgpu.ACC((HEADS, ROWS), jnp.float32))


def _make_output(
    output, side, rows, steps, accumulate,
    *, latent_smem, weights_smem, row_smem, latent_full, latent_free, factor_full, weights_full, weights_free, **_,
):  # fmt: skip
    half = latent_smem.shape[-1]
    width = math.gcd(half, MAX_ACCUMULATOR_COLUMNS)
    starts = range(0, half, width)

    def times_factor(parts):
        plgpu.barrier_wait(factor_full)
        factor = plgpu.layout_cast(row_smem[FACTOR], ROW_LAYOUT)
        factor = lax.broadcast_in_dim(factor, (HEADS, width), [0])
        return [part * factor for part in parts]

    def add_step(step, parts):
        slot = lax.rem(step, jnp.int32(SLOTS))
        latent = latent_smem.at[slot, side]
        parts = times_factor(parts)
        plgpu.barrier_wait(latent_full.at[2 * slot + side])
        plgpu.barrier_wait(weights_full)
        weights = plgpu.layout_cast(weights_smem[...], plgpu.Layout.WGMMA)
        plgpu.barrier_arrive(weights_free)

        @pl.when(rows - step * ROWS < ROWS)
        def _():
            _clear_rows(latent, rows - step * ROWS)

        parts = accumulate(parts, weights, [latent.at[:, pl.ds(start, width)] for start in starts])

        @pl.when(step + SLOTS < steps)  # The last slots are not filled again.
        def _():
            plgpu.barrier_arrive(latent_free.at[2 * slot + side])

        return parts

    zeros = plgpu.layout_cast(jnp.zeros((HEADS, width), jnp.float32), plgpu.Layout.WGMMA)
    parts = lax.fori_loop(0, steps, add_step, [zeros for _ in starts])
    for part, start in zip(times_factor(parts), starts):
        output[:, pl.ds(start, width)] = part.astype(output.dtype)


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


def _clear_rows(latent, valid_rows):
    """Zeroes rows that no sequence owns: their weight is 0, but 0 times NaN is NaN."""
    width = min(latent.shape[-1], 64)
    row = plgpu.broadcasted_iota(jnp.int32, (ROWS, width), 0, layout=plgpu.Layout.WGMMA)
    for start in range(0, latent.shape[-1], width):
        part = latent.at[:, pl.ds(start, width)]
        kept = plgpu.layout_cast(part[...], plgpu.Layout.WGMMA)
        part[...] = jnp.where(row < valid_rows, kept, jnp.zeros_like(kept))
    plgpu.commit_smem()
