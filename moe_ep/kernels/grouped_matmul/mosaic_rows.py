"""Rows times the weights of their group on Hopper: forward and input gradient, the activation fused.

One kernel body serves both. An output tile is the sum over passes of x[pass] @ w[pass],
for one or two accumulators (gated: gate and up side by side on the same rows); its
epilogue works on the float32 accumulators and may read further [R, N] arrays.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_ep.kernels import device
from moe_ep.kernels.grouped_matmul import mosaic_parts as parts
from moe_ep.kernels.grouped_matmul import varying
from moe_ep.kernels.grouped_matmul.groups import RowGroups
from moe_ep.kernels.grouped_matmul.mosaic_parts import DEPTH, Tiling


@dataclasses.dataclass(frozen=True)
class RowProduct:
    """What one kernel computes: passes x accumulators products, an epilogue, its outputs.

    transposed: the weights are [G, N, K] and multiplied by their transpose.
    epilogue: (accumulator chunks, side chunks) -> output chunks, float32.
    outputs: how many [R, N] arrays the epilogue gives.
    """

    name: str
    passes: int
    accumulators: int
    sides: int
    outputs: int
    transposed: bool
    epilogue: Callable

    @property
    def inputs(self) -> int:
        """How many products the activation of this step takes."""
        return max(self.passes, self.accumulators, self.sides)


def row_product(
    product: RowProduct, xs: tuple, ws: tuple, sides: tuple, groups: RowGroups, tiling: Tiling
) -> tuple[jax.Array, ...]:
    """Runs the kernel: xs [R, K] one per pass, ws [G, K, N] one per pass and accumulator, sides [R, N]."""
    rows, depth = xs[0].shape
    columns = ws[0].shape[1 if product.transposed else 2]
    out_types = [jax.ShapeDtypeStruct((rows, columns), xs[0].dtype)] * product.outputs
    tiles = pl.cdiv(rows, tiling.rows) * (columns * product.accumulators // tiling.columns)
    ctas = min(tiles, device.multiprocessors() * tiling.ctas_per_multiprocessor)
    schedule, paired = _row_schedule(groups, rows, tiling)
    body = functools.partial(_body, product, tiling, depth, columns, paired)
    scratch = _scratch(product, tiling, paired, xs[0].dtype)
    kernel = parts.launch(body, product.name, out_types, scratch, tiling, ctas)
    # A kernel's outputs do not say over which mesh axes they vary: as its operands do.
    return varying.match(tuple(kernel(*schedule, *xs, *ws, *sides)), xs, ws)


def _row_schedule(groups: RowGroups, rows: int, tiling: Tiling) -> tuple[tuple[jax.Array, ...], bool]:
    """Returns how many row tiles there are, the group, first block of 64 rows and blocks of each; and if any may differ.

    A layout tile of 64 rows is half of what two consumers compute at once: they take
    two neighbours of one group, and the last of an odd number alone.
    """
    tiles = groups.tile_group.shape[0]
    tiles_per_layout_tile, rest = divmod(rows // tiles, tiling.rows)
    if not rest:
        count = groups.valid_tiles[None] * tiles_per_layout_tile
        first_block = jnp.arange(tiles * tiles_per_layout_tile, dtype=jnp.int32) * tiling.consumers
        group = jnp.repeat(groups.tile_group, tiles_per_layout_tile)
        return (count, group, first_block, jnp.full_like(first_block, tiling.consumers)), False
    index = jnp.arange(tiles, dtype=jnp.int32)
    group, valid = groups.tile_group, index < groups.valid_tiles
    same_group = (group[:, None] == group[None, :]) & valid[None, :]
    earlier = index[None, :] < index[:, None]
    starts = valid & (jnp.sum(same_group & earlier, axis=1) % 2 == 0)
    rank = jnp.sum(starts[None, :] & earlier, axis=1, dtype=jnp.int32)
    first_block = jnp.sum(jnp.where((rank[None, :] == index[:, None]) & starts[None, :], index[None, :], 0), axis=1, dtype=jnp.int32)
    has_second = jnp.any(same_group & (index[None, :] == index[:, None] + 1), axis=1)
    blocks = 1 + has_second[first_block].astype(jnp.int32)
    return (jnp.sum(starts, dtype=jnp.int32)[None], group[first_block], first_block, blocks), True


def _scratch(product, tiling, paired, dtype):
    width = tiling.columns // product.accumulators
    weight_tile = (width, DEPTH) if product.transposed else (DEPTH, width)
    return {
        "x_ring": parts.swizzled((tiling.stages, tiling.rows, DEPTH), dtype),
        "w_rings": [parts.swizzled((tiling.stages, *weight_tile), dtype) for _ in range(product.accumulators)],
        "slots": parts.store_slots(tiling, dtype),
        **parts.ring_barriers(tiling.stages, 1 + paired + product.accumulators, tiling.consumers),
    }


def _body(
    product: RowProduct, tiling: Tiling, depth: int, columns: int, paired: bool, *refs, x_ring, w_rings, slots, full, empty
):
    (count, tile_group, first_block, blocks), refs = refs[:4], refs[4:]
    xs, refs = refs[: product.passes], refs[product.passes :]
    ws, refs = refs[: product.passes * product.accumulators], refs[product.passes * product.accumulators :]
    sides, outputs = refs[: product.sides], refs[product.sides :]
    width = tiling.columns // product.accumulators
    steps_per_pass = depth // DEPTH
    steps = steps_per_pass * product.passes
    row_tiles, column_tiles = count[0], columns // width

    def position(tile):
        row_tile, column_tile = plgpu.planar_snake(tile, (row_tiles, column_tiles), 1, tiling.raster_width)
        return row_tile, pl.ds(column_tile * width, width)

    def load_rows(x, block, contraction, slot, barrier):
        if not paired:
            rows = x.at[pl.ds(block * 64, tiling.rows), contraction]
            plgpu.copy_gmem_to_smem(rows, x_ring.at[slot], barrier)
            return
        last = x.shape[0] // 64 - 1
        for half in range(2):
            rows = x.at[pl.ds(lax.min(block + half, jnp.int32(last)) * 64, 64), contraction]
            plgpu.copy_gmem_to_smem(rows, x_ring.at[slot, pl.ds(half * 64, 64)], barrier)

    def load_pass(index, group, block, column_slice, step, slot, barrier):
        contraction = pl.ds(step * DEPTH, DEPTH)
        load_rows(xs[index], block, contraction, slot, barrier)
        for accumulator, ring in enumerate(w_rings):
            w = ws[index * product.accumulators + accumulator].at[group]
            part = w.at[column_slice, contraction] if product.transposed else w.at[contraction, column_slice]
            plgpu.copy_gmem_to_smem(part, ring.at[slot], barrier)

    def produce():
        def load_tile(tile, step):
            row_tile, column_slice = position(tile)
            for index in range(product.passes):
                load = functools.partial(load_pass, index, tile_group[row_tile], first_block[row_tile], column_slice)
                step = parts.fill_ring(load, steps_per_pass, step, full, empty, tiling.stages)
            return step

        next_step = parts.for_own_tiles(row_tiles * column_tiles, load_tile)
        parts.await_empty(next_step, empty, tiling.stages)

    def consume(warpgroup):
        own_rows = pl.ds(warpgroup * 64, 64)

        def multiply(accumulators, slot):
            for accumulator, ring in zip(accumulators, w_rings, strict=True):
                w = ring.at[slot].transpose((1, 0)) if product.transposed else ring.at[slot]
                plgpu.wgmma(accumulator, x_ring.at[slot, own_rows], w)

        def compute_tile(row_tile, column_slice, step):
            row_slice = pl.ds((first_block[row_tile] + warpgroup) * 64, 64)

            def accumulate(*accumulators):
                run = functools.partial(multiply, accumulators)
                stores, reads = ([ref.at[row_slice, column_slice] for ref in refs] for refs in (outputs, sides))
                first_reads = parts.load_sides(reads, 0)
                parts.drain_ring(run, product.accumulators, steps, step, full, empty, tiling.stages)
                values = [accumulator[...] for accumulator in accumulators]
                parts.store_chunks(values, stores, reads, first_reads, product.epilogue, slots.at[warpgroup])

            pl.run_scoped(accumulate, *[plgpu.ACC((64, width), jnp.float32)] * product.accumulators)

        def take_tile(tile, step):
            row_tile, column_slice = position(tile)
            compute = functools.partial(compute_tile, row_tile, column_slice, step)
            if paired:
                skip = functools.partial(parts.pass_ring, steps, step, full, empty, tiling.stages)
                lax.cond(warpgroup < blocks[row_tile], compute, skip)
            else:
                compute()
            return step + steps

        parts.for_own_tiles(row_tiles * column_tiles, take_tile)
        plgpu.wait_smem_to_gmem(0)

    parts.split_roles(tiling, produce, consume)
