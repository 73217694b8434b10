"""Rows times the weights of their group on Hopper: forward and input gradient, the activation fused.

One kernel body serves both. An output tile is the sum over passes of x[pass] @ w[pass],
for one or two accumulators (gated: gate and up side by side on the same rows); its
epilogue works on the float32 accumulators and may read further [R, N] arrays.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_ep.kernels import device
from moe_ep.kernels.grouped_matmul import mosaic_parts as parts
from moe_ep.kernels.grouped_matmul import varying
from moe_ep.kernels.grouped_matmul.groups import RowGroups
from moe_ep.kernels.grouped_matmul.mosaic_parts import CHUNK, DEPTH, Tiling


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
    assert product.accumulators == 1 or not product.sides, "a side's chunk comes in the place of one x and one w tile"
    rows, depth = xs[0].shape
    columns = ws[0].shape[1 if product.transposed else 2]
    body = functools.partial(_body, product, tiling, depth, columns)
    out_types = [jax.ShapeDtypeStruct((rows, columns), xs[0].dtype)] * product.outputs
    tiles = (rows // tiling.rows) * (columns * product.accumulators // tiling.columns)
    ctas = min(tiles, device.multiprocessors())
    kernel = parts.launch(body, product.name, out_types, _scratch(product, tiling, xs[0].dtype), tiling, ctas)
    # A kernel's outputs do not say over which mesh axes they vary: as its operands do.
    return varying.match(tuple(kernel(groups.tile_group, groups.valid_tiles[None], *xs, *ws, *sides)), xs, ws)


def _scratch(product, tiling, dtype):
    width = tiling.columns // product.accumulators
    weight_tile = (width, DEPTH) if product.transposed else (DEPTH, width)
    return {
        "x_ring": parts.swizzled((tiling.stages, tiling.rows, DEPTH), dtype),
        "w_rings": [parts.swizzled((tiling.stages, *weight_tile), dtype) for _ in range(product.accumulators)],
        "slots": parts.store_slots(tiling, dtype),
        **parts.ring_barriers(tiling.stages, 1 + product.accumulators, tiling.consumers),
    }


class _Operands(NamedTuple):
    """References in device memory, by role."""

    xs: Sequence
    ws: Sequence
    sides: Sequence
    outputs: Sequence


def _by_role(product, refs) -> _Operands:
    sizes = (product.passes, product.passes * product.accumulators, product.sides)
    first, second, third = itertools.accumulate(sizes)
    return _Operands(refs[:first], refs[first:second], refs[second:third], refs[third:])


class _Place(NamedTuple):
    """Where an output tile lies: its rows and columns, and the layout tile it is of."""

    rows: Any
    columns: Any
    layout_tile: Any


def _load_step(product, operands, index, group, place, x_ring, w_rings, step, slot, barrier):
    contraction = pl.ds(step * DEPTH, DEPTH)
    plgpu.copy_gmem_to_smem(operands.xs[index].at[place.rows, contraction], x_ring.at[slot], barrier)
    for accumulator, ring in enumerate(w_rings):
        w = operands.ws[index * product.accumulators + accumulator].at[group]
        block = w.at[place.columns, contraction] if product.transposed else w.at[contraction, place.columns]
        plgpu.copy_gmem_to_smem(block, ring.at[slot], barrier)


def _load_side(side, chunk, copies, x_ring, _, slot, barrier):
    """Loads a chunk of a side input in the place of rows, by as many copies as a step of the contraction makes."""
    rows = x_ring.shape[1] // copies
    for part in range(copies):
        part_rows = pl.ds(part * rows, rows)
        plgpu.copy_gmem_to_smem(side.at[part_rows, pl.ds(chunk * CHUNK, CHUNK)], x_ring.at[slot, part_rows], barrier)


def _multiply(product, accumulators, x_ring, own_rows, w_rings, slot):
    for accumulator, ring in zip(accumulators, w_rings, strict=True):
        w = ring.at[slot].transpose((1, 0)) if product.transposed else ring.at[slot]
        plgpu.wgmma(accumulator, x_ring.at[slot, own_rows], w)


def _body(product: RowProduct, tiling: Tiling, depth: int, columns: int, *refs, x_ring, w_rings, slots, full, empty):
    tile_group, valid_tiles, *refs = refs
    operands = _by_role(product, refs)
    width = tiling.columns // product.accumulators
    steps_per_pass = depth // DEPTH
    steps = steps_per_pass * product.passes
    row_tiles_per_layout_tile = operands.xs[0].shape[0] // tile_group.shape[0] // tiling.rows
    row_tiles, column_tiles = valid_tiles[0] * row_tiles_per_layout_tile, columns // width
    ring = {"full": full, "empty": empty, "stages": tiling.stages}

    def place_of(tile):
        row_tile, column_tile = plgpu.planar_snake(tile, (row_tiles, column_tiles), 0, tiling.raster_rows)
        layout_tile = lax.div(row_tile, jnp.int32(row_tiles_per_layout_tile))
        return _Place(pl.ds(row_tile * tiling.rows, tiling.rows), pl.ds(column_tile * width, width), layout_tile)

    def produce():
        def load_tile(tile, step):
            place = place_of(tile)
            group = tile_group[place.layout_tile]
            for index in range(product.passes):
                load = functools.partial(_load_step, product, operands, index, group, place, x_ring, w_rings)
                step = parts.fill_ring(load, steps_per_pass, step, **ring)
            for chunk, side in itertools.product(range(width // CHUNK), operands.sides):
                block = side.at[place.rows, place.columns]
                load = functools.partial(_load_side, block, chunk, 1 + product.accumulators, x_ring)
                step = parts.fill_ring(load, 1, step, **ring)
            return step

        next_step = parts.for_own_tiles(row_tiles * column_tiles, load_tile)
        parts.await_empty(next_step, empty, tiling.stages)

    def consume(warpgroup):
        own_rows = pl.ds(warpgroup * 64, 64)

        def compute_tile(tile, step):
            place = place_of(tile)
            stores = [output.at[place.rows, place.columns].at[own_rows] for output in operands.outputs]

            def accumulate(*accumulators):
                multiply = functools.partial(_multiply, product, accumulators, x_ring, own_rows, w_rings)
                side_step = parts.drain_ring(multiply, product.accumulators, steps, step, **ring)

                def read_sides(chunk):
                    steps_of_chunk = (side_step + chunk * product.sides + side for side in range(product.sides))
                    return tuple(parts.take_stage(x_ring, own_rows, own_step, **ring) for own_step in steps_of_chunk)

                values = [accumulator[...] for accumulator in accumulators]
                parts.store_chunks(values, stores, read_sides, product.epilogue, slots.at[warpgroup])

            pl.run_scoped(accumulate, *[plgpu.ACC((64, width), jnp.float32)] * product.accumulators)
            return step + steps + product.sides * (width // CHUNK)

        parts.for_own_tiles(row_tiles * column_tiles, compute_tile)
        plgpu.wait_smem_to_gmem(0)

    parts.split_roles(tiling, produce, consume)
