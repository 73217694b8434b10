"""The weight gradient by groups on Hopper: x^T dy over the rows of each group."""

import functools

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


def weight_gradient(x: jax.Array, dy: jax.Array, groups: RowGroups, group_count: int, tiling: Tiling) -> jax.Array:
    """Runs the kernel: x [R, K], dy [R, N] -> [G, K, N], zero for a group without rows."""
    rows, depth = x.shape
    columns = dy.shape[1]
    body = functools.partial(_body, tiling)
    out_type = jax.ShapeDtypeStruct((group_count, depth, columns), x.dtype)
    scratch = {
        "x_ring": parts.swizzled((tiling.stages, DEPTH, tiling.rows), x.dtype),
        "dy_ring": parts.swizzled((tiling.stages, DEPTH, tiling.columns), x.dtype),
        "slots": parts.store_slots(tiling, x.dtype),
        **parts.ring_barriers(tiling.stages, 2, tiling.consumers),
    }
    kernel = parts.launch(body, "grouped_weight_gradient", out_type, scratch, tiling, device.multiprocessors())
    return varying.match(kernel(*_steps_of_groups(groups, group_count, rows), x, dy), x, dy)


def _steps_of_groups(groups, group_count, rows):
    """Returns the first step of each group, DEPTH rows each, and how many steps it has: none of pad rows alone."""
    tiles = groups.tile_group.shape[0]
    steps_per_tile = rows // tiles // DEPTH
    valid = jnp.arange(tiles, dtype=jnp.int32) < groups.valid_tiles
    members = valid[:, None] & (groups.tile_group[:, None] == jnp.arange(group_count, dtype=jnp.int32)[None, :])
    group_tiles = jnp.sum(members, axis=0, dtype=jnp.int32)
    steps_of_tile = lax.div(groups.tile_rows + (DEPTH - 1), jnp.int32(DEPTH))
    steps = jnp.sum(jnp.where(members, steps_of_tile[:, None], 0), axis=0, dtype=jnp.int32)
    return steps_per_tile * (jnp.cumsum(group_tiles) - group_tiles), steps


def _body(tiling: Tiling, first_steps, step_counts, x, dy, out, *, x_ring, dy_ring, slots, full, empty):
    group_count, depth, columns = out.shape
    row_tiles, column_tiles = depth // tiling.rows, columns // tiling.columns
    tiles_per_group = row_tiles * column_tiles

    def position(tile):
        group = lax.div(tile, jnp.int32(tiles_per_group))
        within = lax.rem(tile, jnp.int32(tiles_per_group))
        return group, *plgpu.planar_snake(within, (row_tiles, column_tiles), 0, tiling.raster_rows)

    def produce():
        def load_tile(tile, ring_step):
            group, row_tile, column_tile = position(tile)
            row_slice = pl.ds(row_tile * tiling.rows, tiling.rows)
            column_slice = pl.ds(column_tile * tiling.columns, tiling.columns)
            first_step = first_steps[group]

            def load(step, slot, barrier):
                contraction = pl.ds((first_step + step) * DEPTH, DEPTH)
                plgpu.copy_gmem_to_smem(x.at[contraction, row_slice], x_ring.at[slot], barrier)
                plgpu.copy_gmem_to_smem(dy.at[contraction, column_slice], dy_ring.at[slot], barrier)

            return parts.fill_ring(load, step_counts[group], ring_step, full, empty, tiling.stages)

        next_step = parts.for_own_tiles(group_count * tiles_per_group, load_tile)
        parts.await_empty(next_step, empty, tiling.stages)

    def consume(warpgroup):
        own_columns = pl.ds(warpgroup * 64, 64)
        chunk_count = tiling.columns // CHUNK

        def stores(tile, chunks):
            """Returns what stores each chunk of a tile."""
            group, row_tile, column_tile = position(tile)
            block = out.at[group, pl.ds(row_tile * tiling.rows + warpgroup * 64, 64)]

            def store(index, chunk):
                if index == 0:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                columns = pl.ds(column_tile * tiling.columns + index * CHUNK, CHUNK)
                parts.store_chunk(chunk, block.at[:, columns], slots.at[warpgroup, index % parts.STORE_SLOTS])

            return [functools.partial(store, index, chunk) for index, chunk in enumerate(chunks)]

        def compute_tile(tile, carry):
            ring_step, held_tile, held = carry
            steps = step_counts[lax.div(tile, jnp.int32(tiles_per_group))]
            store_held = stores(lax.max(held_tile, 0), held)

            def accumulate(accumulator):
                def multiply(slot):
                    own_x = x_ring.at[slot, :, own_columns].transpose((1, 0))
                    plgpu.wgmma(accumulator, own_x, dy_ring.at[slot])

                drain = functools.partial(parts.drain_ring, multiply, 1, steps, ring_step, full, empty, tiling.stages)

                def store_first():
                    @pl.when(held_tile >= 0)
                    def _():
                        for store in store_held:
                            store()

                    return drain()

                store_under = (held_tile >= 0) & (steps >= chunk_count)
                next_step = lax.cond(store_under, lambda: drain(under=store_held), store_first)
                value = accumulator[...]
                chunks = (value[:, index * CHUNK : (index + 1) * CHUNK] for index in range(chunk_count))
                return next_step, tile, tuple(chunk.astype(out.dtype) for chunk in chunks)

            return pl.run_scoped(accumulate, plgpu.ACC((64, tiling.columns), jnp.float32))

        # A tile is held in registers and stored under the next one's products, or the tensor cores would wait for it.
        nothing = (jnp.zeros((64, CHUNK), out.dtype),) * chunk_count
        _, last_tile, last = parts.for_own_tiles(
            group_count * tiles_per_group, compute_tile, (jnp.int32(0), jnp.int32(-1), nothing)
        )

        @pl.when(last_tile >= 0)
        def _():
            for store in stores(last_tile, last):
                store()

        plgpu.wait_smem_to_gmem(0)

    parts.split_roles(tiling, produce, consume)
