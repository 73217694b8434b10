"""Absorbed latent attention for Hopper: one pass over the cache, nothing expanded.

Long caches are cut in pieces that run on different multiprocessors; each gives a
normalised partial output and the logarithm of its weight, and `combine_pieces`
joins them.
"""

import dataclasses
import functools

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from moe_ep.kernels import device
from moe_ep.kernels.mla_decode import block
from moe_ep.kernels.mla_decode.block import HEADS, MAX_HALF_LATENT, ROWS

SHARED_MEMORY_BYTES = 227 * 1024  # Hopper's opt-in limit for one block

# What starting a piece costs (launch, queries, first load), in steps.
PIECE_OVERHEAD_STEPS = 4


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How one call is cut: `pieces` of `piece_steps` steps of ROWS cache rows.

    cluster: neighbouring tiles of heads that load their sequence's rows together.
    """

    pieces: int
    piece_steps: int
    cluster: int = 1


def mla_decode(q_latent, q_rope, cache, lengths, pages, scale, interpret=None):
    """Returns o_latent [B, H, Z]; arguments as in `api.mla_decode`.

    interpret: GPU interpreter parameters, or None to compile.
    """
    problem = refusal(q_latent, q_rope, cache)
    if problem:
        raise ValueError(f"implementation 'mosaic' takes {problem}")
    sequences, heads, _ = q_latent.shape
    first_rows = _first_rows(sequences, cache.shape[1], pages)
    tiling = choose_tiling(sequences, heads, first_rows.shape[1], device.multiprocessors())
    o_latent, log2_weight = decode_pieces(
        q_latent, q_rope, cache.reshape(-1, cache.shape[2]), first_rows, lengths,
        scale=scale, tiling=tiling, interpret=interpret,
    )  # fmt: skip
    if tiling.pieces == 1:
        return o_latent[0]
    return combine_pieces(o_latent, log2_weight).astype(q_latent.dtype)


def refusal(q_latent, q_rope, cache) -> str:
    """Returns what the kernel would take instead of these arrays, with their numbers; "" if it takes them."""
    heads, latent = q_latent.shape[1:]
    rope = q_rope.shape[2]
    if q_latent.dtype not in (jnp.bfloat16, jnp.float16):
        return f"bfloat16 or float16, not {q_latent.dtype.name}"
    if heads % HEADS:
        return f"a multiple of {HEADS} heads, not {heads}"
    # Rows are loaded in tiles of 64 columns, which a row's width has to be a multiple of.
    if latent % 128 or latent > 2 * MAX_HALF_LATENT or rope % 64:
        return f"latents of a multiple of 128 up to {2 * MAX_HALF_LATENT} and rotary keys of 64, not {latent} and {rope}"
    if cache.shape[1] % ROWS:
        return f"sequences or pages of a multiple of {ROWS} cache rows, not {cache.shape[1]}"
    needed = shared_memory_bytes(latent, rope)
    if needed > SHARED_MEMORY_BYTES:
        return f"{SHARED_MEMORY_BYTES} bytes of shared memory, not {needed} as for {latent} + {rope}"
    return ""


def shared_memory_bytes(latent: int, rope: int) -> int:
    """Returns what a block keeps in shared memory: queries, slots, weights, factors, barriers."""
    two_byte_values = (HEADS + block.SLOTS * ROWS) * (latent + rope) + HEADS * ROWS
    return 2 * two_byte_values + 1024 + 1024


def _first_rows(sequences, rows_per_owner, pages):
    """Returns int32[B, steps], where each step of ROWS rows begins in the cache's rows."""
    steps = jnp.arange(rows_per_owner // ROWS, dtype=jnp.int32) * ROWS
    owners = jnp.arange(sequences, dtype=jnp.int32)[:, None] if pages is None else pages
    return (owners[:, :, None] * rows_per_owner + steps[None, None, :]).reshape(sequences, -1)


def choose_tiling(sequences: int, heads: int, steps: int, multiprocessors: int) -> Tiling:
    """Returns the cut of `steps` that keeps the multiprocessors evenly busy.

    The cost of a cut is its waves times the steps of a wave; of equal cuts the one
    with the fewest pieces to combine is taken.
    """

    def cost(pieces: int) -> int:
        blocks = sequences * (heads // HEADS) * pieces
        waves = -(-blocks // multiprocessors)
        return waves * (-(-steps // pieces) + PIECE_OVERHEAD_STEPS)

    pieces = min(range(1, min(steps, multiprocessors) + 1), key=cost)
    piece_steps = -(-steps // pieces)
    cluster = 2 if heads % (2 * HEADS) == 0 else 1
    return Tiling(pieces=-(-steps // piece_steps), piece_steps=piece_steps, cluster=cluster)


def decode_pieces(q_latent, q_rope, cache_rows, first_rows, lengths, *, scale, tiling, interpret=None):
    """Attends each piece of each sequence.

    Args:
      q_latent: [B, H, Z]; q_rope: [B, H, O].
      cache_rows: [rows, Z + O], sequences or pages one after another.
      first_rows: int32[B, steps], the row where each step of ROWS rows begins.
      lengths: int32[B].
      scale: multiplies the scores.
      tiling: the cut; pieces * piece_steps >= steps.
      interpret: GPU interpreter parameters, or None to compile.
    Returns:
      o_latent [pieces, B, H, Z], zeros where a piece has no rows, float32 unless there
      is one piece, and log2_weight float32[pieces, B, H], -inf there.
    """
    sequences, heads, latent = q_latent.shape
    dtype = q_latent.dtype
    body = functools.partial(
        block.decode_block,
        scale=scale,
        piece_steps=tiling.piece_steps,
        accumulate=block.accumulate_in_place if interpret is None else block.accumulate_interpreted,
    )
    kernel = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(
                (tiling.pieces, sequences, heads, latent), dtype if tiling.pieces == 1 else jnp.float32
            ),
            jax.ShapeDtypeStruct((tiling.pieces, sequences, heads), jnp.float32),
        ),
        scratch_types=block.scratch_types(latent // 2, q_rope.shape[2], dtype),
        grid=(tiling.pieces, sequences, heads // HEADS // tiling.cluster),
        grid_names=("piece", "sequence", "head_tiles"),
        cluster=(tiling.cluster,),
        cluster_names=("cluster",),
        num_threads=block.WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,  # rows are reduced inside a warp
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        **({} if interpret is None else {"interpret": interpret}),
    )
    return kernel(q_latent, q_rope, cache_rows, first_rows, lengths)


def combine_pieces(o_latent, log2_weight):
    """Joins partial softmaxes: [pieces, B, H, Z] and [pieces, B, H] to [B, H, Z]."""
    largest = jnp.max(log2_weight, axis=0, keepdims=True)
    share = jnp.exp2(log2_weight - jnp.where(jnp.isfinite(largest), largest, 0.0))
    total = jnp.sum(share, axis=0, keepdims=True)
    share = share / jnp.where(total > 0, total, 1.0)
    return jnp.sum(o_latent * share[..., None], axis=0)
