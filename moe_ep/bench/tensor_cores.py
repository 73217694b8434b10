"""What the tensor cores do at most where power holds a Hopper GPU back: a large product's inner loop, all else left out.

Two consumers multiply as `grouped_matmul` does, 64 x 256 by wgmma, on a few stages of
operands that stay in shared memory. No loads and no stores are left, so the rate is
what any schedule of these instructions could reach on this device, warm, on such data.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_ep.bench import energy, kernel_cases, power
from moe_ep.bench.correctness import relative_error
from moe_ep.bench.timing import measure_in_turns
from moe_ep.kernels import device
from moe_ep.kernels.grouped_matmul import mosaic_parts as parts
from moe_ep.kernels.grouped_matmul.mosaic_parts import DEPTH, Tiling

_STAGES = 4
_DEPTH, _TILES = 7168, 18  # what a multiprocessor computes of 4096 rows of the reference expert's first product
_WARM_SECONDS = 1.0
_LARGEST_ERROR = 1e-2


def resident_products(x: jax.Array, w: jax.Array, *, depth: int, tiles: int) -> jax.Array:
    """Multiplies the same stages again and again, on every multiprocessor, and stores the last tile.

    Args:
      x: [stages, 128, DEPTH] and
      w: [stages, DEPTH, columns]: the operands, which differ from stage to stage so that bits toggle as in a product.
      depth: of the contraction; each tile starts from zero and takes the stages in turn.
      tiles: that each multiprocessor computes.
    Returns:
      [multiprocessors, 128, columns], all equal: sum over depth / DEPTH steps of x[step % stages] @ w[step % stages].
    """
    tiling = Tiling(columns=w.shape[2], stages=x.shape[0])
    ctas = device.multiprocessors()
    scratch = {
        "x_stages": parts.swizzled(x.shape, x.dtype),
        "w_stages": parts.swizzled(w.shape, w.dtype),
        "slots": parts.store_slots(tiling, x.dtype),
        "full": plgpu.Barrier(num_arrivals=2),
    }
    body = functools.partial(_body, tiling, depth // DEPTH, tiles)
    out_type = jax.ShapeDtypeStruct((ctas, tiling.rows, tiling.columns), x.dtype)
    return parts.launch(body, "resident_products", out_type, scratch, tiling, ctas)(x, w)


def ceiling(seed: int) -> dict:
    """Returns what the first device's tensor cores reach alone, warm; empty where it is no Hopper GPU.

    Keys: flops_per_s; flops, seconds, spread and, where the GPU counts them, joules of a call; error of its result
    against float32; power as `power.watch` gives it. Takes about three seconds.
    """
    if not device.is_hopper(device.device_kind()):
        return {}
    x, w = kernel_cases.random_rows(seed, (_STAGES, 128, DEPTH), (_STAGES, DEPTH, 256))
    contender = kernel_cases.jax_contender(functools.partial(resident_products, depth=_DEPTH, tiles=_TILES), x, w)
    error = relative_error(contender.launch()[0], expected_block(x, w, _DEPTH))
    if error > _LARGEST_ERROR:
        raise RuntimeError(f"products of resident operands differ from float32 by {error:.2g}, more than {_LARGEST_ERROR}")
    measure_in_turns({"warm up": contender}, samples=2, sample_seconds=_WARM_SECONDS / 2)
    with power.watch() as watched:
        times = measure_in_turns({"tensor_cores": contender}, samples=9, sample_seconds=0.1)
    joules = energy.measure({"joules": contender}, {"joules": times["tensor_cores"]})
    seconds = times["tensor_cores"].median
    flops = 2.0 * device.multiprocessors() * _TILES * x.shape[1] * w.shape[2] * _DEPTH
    return {
        "flops_per_s": flops / seconds, "seconds": seconds, "spread": times["tensor_cores"].spread, "flops": flops,
        "error": error, "power": watched, **joules,
    }  # fmt: skip


def expected_block(x: jax.Array, w: jax.Array, depth: int) -> jax.Array:
    """Returns what each multiprocessor's last tile holds, in float32."""
    turns = [len(range(stage, depth // DEPTH, x.shape[0])) for stage in range(x.shape[0])]
    by_stage = jnp.einsum("smk,skn->smn", x.astype(jnp.float32), w.astype(jnp.float32), precision="highest")
    return jnp.einsum("s,smn->mn", jnp.array(turns, jnp.float32), by_stage)


def _body(tiling: Tiling, steps: int, tiles: int, x, w, out, *, x_stages, w_stages, slots, full):
    def produce():
        plgpu.copy_gmem_to_smem(x, x_stages, full)
        plgpu.copy_gmem_to_smem(w, w_stages, full)

    def consume(warpgroup):
        own_rows = pl.ds(warpgroup * 64, 64)
        plgpu.barrier_wait(full)

        def compute_tile(tile, _):
            def accumulate(accumulator):
                def multiply(step, _):
                    stage = lax.rem(step, jnp.int32(tiling.stages))
                    plgpu.wgmma(accumulator, x_stages.at[stage, own_rows], w_stages.at[stage])
                    plgpu.wgmma_wait(1)

                lax.fori_loop(0, steps, multiply, None)
                plgpu.wgmma_wait(0)
                value = accumulator[...]

                @pl.when(tile == tiles - 1)
                def _():
                    block = out.at[lax.axis_index(parts.MULTIPROCESSOR), own_rows]
                    parts.store_chunks([value], [block], parts.no_sides, lambda values, _: values, slots.at[warpgroup])

            pl.run_scoped(accumulate, plgpu.ACC((64, tiling.columns), jnp.float32))

        lax.fori_loop(0, tiles, compute_tile, None)
        plgpu.wait_smem_to_gmem(0)

    parts.split_roles(tiling, produce, consume)
