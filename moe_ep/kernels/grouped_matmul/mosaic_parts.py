"""What the Hopper kernels share: the ring of stages between producer and consumers, and the tiled epilogue.

A kernel runs on warpgroups: consumers multiply (wgmma) and store, and the last
warpgroup only issues TMA loads. They meet at two barriers per stage of the ring,
"full" and "empty". The producer runs ahead into the next tile while the consumers
are in their epilogue.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

WARPGROUP = "warpgroup"
MULTIPROCESSOR = "multiprocessor"
DEPTH = 64  # of the contraction per stage: one 128-byte swizzle of 2-byte values
CHUNK = 64  # rows and columns of one epilogue store
STORE_SLOTS = 2
_SHARED_BYTES = 232448 - 1024  # of a Hopper CTA, less what barriers take
_PRODUCER_REGISTERS = 40
_CONSUMER_REGISTERS = 232  # two consumers and a producer: (2 x 232 + 40) x 128 <= 65536


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a kernel cuts its output: a CTA computes 64 * consumers rows by `columns`.

    stages: of the ring, each DEPTH deep in the contraction.
    raster_rows: row tiles taken one below the other before the next column of tiles: their rows stay in L2, and
      where they are a group's, each weight is read once.
    """

    consumers: int = 2
    columns: int = 256
    stages: int = 4
    raster_rows: int = 16

    @property
    def rows(self) -> int:
        return 64 * self.consumers


def fitted(tiling: Tiling, tile: int, columns: int, accumulators: int) -> Tiling:
    """Returns the tiling cut down to divisors of `tile` rows and `columns` columns and to what fits in shared memory."""
    consumers = 2 if tiling.consumers == 2 and tile % 128 == 0 else 1
    width = tiling.columns
    while columns % (width // accumulators):
        width -= CHUNK * accumulators
    stage_bytes = 2 * DEPTH * (64 * consumers + width)
    slots_bytes = 2 * consumers * STORE_SLOTS * CHUNK * CHUNK
    stages = min(tiling.stages, (_SHARED_BYTES - slots_bytes) // stage_bytes)
    return dataclasses.replace(tiling, consumers=consumers, columns=width, stages=stages)


def swizzled(shape: tuple[int, ...], dtype):
    """Returns shared memory of this shape in the 128-byte swizzle that TMA writes and wgmma reads."""
    elements = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, elements)), plgpu.SwizzleTransform(128)))


def ring_barriers(stages: int, copies: int, consumers: int) -> dict:
    """Returns the barriers of a ring whose stage is filled by `copies` TMA loads."""
    return {
        "full": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
    }


def store_slots(tiling: Tiling, dtype):
    """Returns the shared memory through which each consumer stores its output chunks."""
    return swizzled((tiling.consumers, STORE_SLOTS, CHUNK, CHUNK), dtype)


def split_roles(tiling: Tiling, produce: Callable, consume: Callable):
    """Runs `produce()` on the last warpgroup and `consume(warpgroup)` on the others."""
    warpgroup = lax.axis_index(WARPGROUP)

    def producer():
        if tiling.consumers == 2:
            plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
        produce()

    def consumer():
        if tiling.consumers == 2:
            plgpu.set_max_registers(_CONSUMER_REGISTERS, action="increase")
        consume(warpgroup)

    lax.cond(warpgroup == tiling.consumers, producer, consumer)


def fill_ring(load: Callable, steps, first_step, full, empty, stages: int):
    """Issues `load(step_of_tile, slot, barrier)` for the steps of one tile; returns the ring's next step."""

    def fill(index, step):
        slot = lax.rem(step, jnp.int32(stages))

        @pl.when(step >= stages)
        def _():
            plgpu.barrier_wait(empty.at[slot])

        load(index, slot, full.at[slot])
        return step + 1

    return lax.fori_loop(0, steps, fill, first_step)


def drain_ring(multiply: Callable, products: int, steps, first_step, full, empty, stages: int, under: Sequence[Callable] = ()):
    """Issues `multiply(slot)`, `products` wgmma each, for the steps of one tile; returns the ring's next step.

    A stage is handed back one step late, so that the tensor cores always have the
    next product queued.

    Args:
      under: called one a step while the first steps' products run; no more than there are steps.
    """

    def drain(index, step, work=lambda: None):
        slot = lax.rem(step, jnp.int32(stages))
        plgpu.barrier_wait(full.at[slot])
        multiply(slot)
        work()
        plgpu.wgmma_wait(products)

        @pl.when(index > 0)
        def _():
            plgpu.barrier_arrive(empty.at[lax.rem(step - 1, jnp.int32(stages))])

        return step + 1

    step = first_step
    for index, work in enumerate(under):
        step = drain(index, step, work)
    next_step = lax.fori_loop(len(under), steps, drain, step)
    plgpu.wgmma_wait(0)

    @pl.when(steps > 0)
    def _():
        plgpu.barrier_arrive(empty.at[lax.rem(next_step - 1, jnp.int32(stages))])

    return next_step


def await_empty(next_step, empty, stages: int):
    """Waits until the consumers have handed back every stage the producer filled."""

    def wait(step, _):
        plgpu.barrier_wait(empty.at[lax.rem(step, jnp.int32(stages))])

    lax.fori_loop(lax.max(next_step - stages, jnp.int32(0)), next_step, wait, None)


def for_own_tiles(tiles, body: Callable, carry=None):
    """Calls `body(tile, carry) -> carry` for each of this CTA's tiles; by default the ring's next step is carried, from 0 on."""
    ctas = jnp.int32(lax.axis_size(MULTIPROCESSOR))
    own = lax.axis_index(MULTIPROCESSOR)
    carry = jnp.int32(0) if carry is None else carry
    count = lax.div(tiles - own + ctas - 1, ctas)
    return lax.fori_loop(0, count, lambda index, carry: body(own + index * ctas, carry), carry)


def take_stage(ring, own_rows, step, full, empty, stages: int) -> jax.Array:
    """Returns a consumer's own rows of the stage that holds this step, widened, in registers, and hands the stage back."""
    slot = lax.rem(step, jnp.int32(stages))
    plgpu.barrier_wait(full.at[slot])
    value = ring[slot, own_rows].astype(jnp.float32)
    plgpu.barrier_arrive(empty.at[slot])
    return value


def store_chunks(accumulators: Sequence[jax.Array], outputs: Sequence, read_sides: Callable, epilogue: Callable, slots):
    """Stores `epilogue(accumulator chunks, side chunks)` to the outputs, one chunk after another.

    Args:
      accumulators: float32 [64, columns] values of this consumer.
      outputs: device-memory references [64, columns] to store to.
      read_sides: index of a chunk -> float32 [64, CHUNK] values the epilogue takes beside the accumulators.
      epilogue: chunks -> one float32 chunk per output.
      slots: this consumer's shared memory [STORE_SLOTS, CHUNK, CHUNK].
    """
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    stored = 0
    for chunk in range(accumulators[0].shape[1] // CHUNK):
        columns = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
        values = epilogue(tuple(value[:, columns] for value in accumulators), read_sides(chunk))
        for output, value in zip(outputs, values, strict=True):
            store_chunk(value, output.at[:, columns], slots.at[stored % STORE_SLOTS])
            stored += 1


def no_sides(chunk: int) -> tuple:
    """The `read_sides` of an epilogue that takes the accumulators alone."""
    del chunk
    return ()


def store_chunk(chunk, output, slot):
    """Stores a chunk through a slot whose last store was STORE_SLOTS stores ago."""
    plgpu.wait_smem_to_gmem(STORE_SLOTS - 1, wait_read_only=True)
    slot[...] = chunk.astype(output.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(slot, output)


def launch(body: Callable, name: str, out_types, scratch: dict, tiling: Tiling, ctas: int):
    """Returns the kernel of this body on `ctas` CTAs."""
    return plgpu.kernel(
        body,
        out_type=out_types,
        scratch_types=scratch,
        grid=(ctas,),
        grid_names=(MULTIPROCESSOR,),
        num_threads=tiling.consumers + 1,
        thread_name=WARPGROUP,
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )
