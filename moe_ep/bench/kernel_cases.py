"""The rows of the kernels' goal table: shapes, contenders, what is right, and the goal of each.

Shapes are those of the reference experiment's expert (width 7168, hidden 18432) and
of DeepSeek-V3's attention; TINY has the same rows at sizes that any machine runs,
to try the benchmark itself.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_ep.bench import torch_rivals
from moe_ep.bench.timing import Contender
from moe_ep.dispatch import permute
from moe_ep.kernels.grouped_matmul import ExpertWeights, RowGroups, expert_mlp, first_rows, grouped_matmul, tiles_needed
from moe_ep.kernels.grouped_matmul import make_row_groups, one_group
from moe_ep.kernels import row_gather
from moe_ep.kernels.mla_decode import mla_decode


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of all rows."""

    width: int = 7168
    hidden: int = 18432
    gemm_rows: tuple[int, ...] = (2048, 4096, 8192)
    mlp_rows: int = 4096
    decode_rows: tuple[int, ...] = (8, 32, 64)
    grouped_rows: int = 8192
    groups: tuple[int, ...] = (2, 4, 8, 16)
    wgrad_groups: tuple[int, ...] = (8, 16)
    tile: int = 128
    tokens: int = 8192
    top_k: int = 2
    sequences: int = 64
    heads: int = 128
    cached: int = 4096
    latents: tuple[tuple[int, int], ...] = ((512, 64), (3584, 16))
    copy_values: int = 2**30


FULL = Sizes()
TINY = Sizes(
    width=64, hidden=128, gemm_rows=(16,), mlp_rows=16, decode_rows=(8,), grouped_rows=64, groups=(4,), wgrad_groups=(4,),
    tile=8, tokens=32, sequences=2, heads=4, cached=64, latents=((32, 16),), copy_values=2**12,
)  # fmt: skip


class Goal(NamedTuple):
    """What a row is measured by.

    kind: "speedup", at least `value` times as fast as the fastest rival in `against`;
      "bandwidth", at least `value` of the measured copy bandwidth; "time", at most
      `value` times as long as the one rival.
    """

    kind: str
    value: float
    against: tuple[str, ...] = ()


class Case(NamedTuple):
    """One row: `contenders["ours"]` against the others; `outputs` makes comparable arrays of an output."""

    row: str
    flops: float
    bytes: float
    goal: Goal
    contenders: dict[str, Contender]
    expected: Callable[[], Any]
    outputs: dict[str, Callable[[Any], Any]]


def cases(sizes: Sizes, seed: int) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Yields (row, builder of its case); building one makes its arrays, fresh from `seed`."""
    for rows in sizes.gemm_rows:
        yield f"gemm1_gelu M={rows}", functools.partial(_gemm_gelu, sizes, seed, rows)
    yield f"mlp_forward M={sizes.mlp_rows}", functools.partial(_mlp_forward, sizes, seed, sizes.mlp_rows)
    yield f"mlp_forward_backward M={sizes.mlp_rows}", functools.partial(_mlp_forward_backward, sizes, seed)
    for groups in sizes.groups:
        yield f"grouped_gelu G={groups}", functools.partial(_grouped_gelu, sizes, seed, groups)
    for groups in sizes.wgrad_groups:
        yield f"grouped_wgrad G={groups}", functools.partial(_grouped_wgrad, sizes, seed, groups)
    for rows in sizes.decode_rows:
        yield f"mlp_decode M={rows}", functools.partial(_mlp_decode, sizes, seed, rows)
    for latent, rope in sizes.latents:
        yield f"mla_decode {latent}+{rope}", functools.partial(_mla_decode, sizes, seed, latent, rope)
    yield "gather", functools.partial(_gather, sizes, seed)
    yield "combine", functools.partial(_combine, sizes, seed)
    yield "half_valid_buffer", functools.partial(_half_valid_buffer, sizes, seed)


def copies(sizes: Sizes) -> tuple[dict[str, Contender], float]:
    """Returns copies through device memory, as XLA and torch make them, and the bytes that one reads and writes."""
    values = jax.random.normal(jax.random.key(0), (sizes.copy_values,), jnp.bfloat16)
    return {"xla": jax_contender(jnp.negative, values), **torch_rivals.copy(values)}, 2.0 * values.nbytes


def jax_contender(function: Callable, *args) -> Contender:
    compiled = jax.jit(function)
    return Contender(lambda: compiled(*args), jax.block_until_ready)


# What is right is computed once: searching for the fastest way to would take longer.
reference_jit = functools.partial(jax.jit, compiler_options={"xla_gpu_autotune_level": 0})


def random_rows(seed: int, *shapes: tuple[int, ...]) -> list[jax.Array]:
    """Returns bfloat16 arrays of standard normal entries."""
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [_normal(key, shape) for key, shape in zip(keys, shapes)]


@functools.partial(jax.jit, static_argnums=1)
def _normal(key, shape):
    return jax.random.normal(key, shape, jnp.bfloat16)


def random_weights(seed: int, *shapes: tuple[int, ...]) -> list[jax.Array]:
    """Returns bfloat16 matrices whose products with standard normal rows are near scale one."""
    return [array * jnp.bfloat16(array.shape[-2] ** -0.5) for array in random_rows(seed, *shapes)]


def _product32(x, w):
    return jnp.matmul(x.astype(jnp.float32), w.astype(jnp.float32), precision="highest")


def _gelu_product32(x, w):
    return jax.nn.gelu(_product32(x, w), approximate=True)


def _case(row, flops, byte_count, goal, contenders, expected, outputs=None):
    same = {name: outputs.get(name, _identity) if outputs else _identity for name in contenders}
    return Case(row, flops, byte_count, goal, contenders, expected, same)


def _identity(out):
    return out


def _gemm_gelu(sizes, seed, rows):
    (x,) = random_rows(seed, (rows, sizes.width))
    (w,) = random_weights(seed + 1, (sizes.width, sizes.hidden))
    groups = one_group(rows, min(rows, sizes.tile))
    contenders = {
        "ours": jax_contender(lambda x, w, g: grouped_matmul(x, w[None], g, activation="gelu"), x, w, groups),
        "xla": jax_contender(lambda x, w: jax.nn.gelu(x @ w, approximate=True), x, w),
        **torch_rivals.gemm_gelu(x, w),
    }
    goal = Goal("speedup", 1.15, ("xla", "cublaslt_fused"))
    flops = 2.0 * rows * sizes.width * sizes.hidden
    return _case(
        f"gemm1_gelu M={rows}", flops, x.nbytes + w.nbytes + 2.0 * rows * sizes.hidden, goal, contenders,
        lambda: reference_jit(_gelu_product32)(x, w),
    )  # fmt: skip


def _mlp_arrays(sizes, seed, rows):
    return (
        *random_rows(seed, (rows, sizes.width)),
        *random_weights(seed + 1, (sizes.width, sizes.hidden), (sizes.hidden, sizes.width)),
    )


def _our_mlp(x, w_in, w_out, groups):
    return expert_mlp(x, ExpertWeights(w_in[None], w_out[None]), groups, activation="gelu")


def _xla_mlp(x, w_in, w_out):
    return jax.nn.gelu(x @ w_in, approximate=True) @ w_out


def _mlp32(x, w_in, w_out):
    return _product32(_gelu_product32(x, w_in), w_out)


def _mlp_forward(sizes, seed, rows, goal=Goal("speedup", 1.12, ("xla",)), row="mlp_forward"):
    x, w_in, w_out = _mlp_arrays(sizes, seed, rows)
    groups = one_group(rows, min(rows, sizes.tile))
    contenders = {
        "ours": jax_contender(_our_mlp, x, w_in, w_out, groups),
        "xla": jax_contender(_xla_mlp, x, w_in, w_out),
        **torch_rivals.mlp_forward(x, w_in, w_out),
    }
    flops = 4.0 * rows * sizes.width * sizes.hidden
    return _case(
        f"{row} M={rows}", flops, float(w_in.nbytes + w_out.nbytes), goal, contenders,
        lambda: reference_jit(_mlp32)(x, w_in, w_out),
    )  # fmt: skip


def _mlp_decode(sizes, seed, rows):
    return _mlp_forward(sizes, seed, rows, Goal("bandwidth", 0.95), "mlp_decode")


def _mlp_forward_backward(sizes, seed):
    rows = sizes.mlp_rows
    x, w_in, w_out = _mlp_arrays(sizes, seed, rows)
    (d_out,) = random_rows(seed + 2, (rows, sizes.width))
    groups = one_group(rows, min(rows, sizes.tile))

    def ours(x, w_in, w_out, d_out, groups):
        out, pull_back = jax.vjp(lambda *operands: _our_mlp(*operands, groups), x, w_in, w_out)
        return out, *pull_back(d_out)

    def with_gradients(function, x, w_in, w_out, d_out):
        out, pull_back = jax.vjp(function, x, w_in, w_out)
        return out, *pull_back(d_out.astype(out.dtype))

    contenders = {
        "ours": jax_contender(ours, x, w_in, w_out, d_out, groups),
        "xla": jax_contender(functools.partial(with_gradients, _xla_mlp), x, w_in, w_out, d_out),
        **torch_rivals.mlp_forward_backward(x, w_in, w_out, d_out),
    }
    flops = 12.0 * rows * sizes.width * sizes.hidden
    return _case(
        f"mlp_forward_backward M={rows}", flops, 0.0, Goal("speedup", 1.10, ("xla",)), contenders,
        lambda: reference_jit(functools.partial(with_gradients, _mlp32))(x, w_in, w_out, d_out),
    )  # fmt: skip


class _Grouped(NamedTuple):
    """Rows of unequal groups: without pad rows for the rivals, aligned to tiles for ours."""

    rows: jax.Array
    aligned: jax.Array
    place: jax.Array  # the aligned row of each row
    groups: RowGroups


def _make_grouped(sizes: Sizes, seed: int, group_count: int) -> tuple[_Grouped, np.ndarray]:
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(sizes.grouped_rows, generator.dirichlet(np.ones(group_count))).astype(np.int32)
    (rows,) = random_rows(seed, (sizes.grouped_rows, sizes.width))
    tiles = tiles_needed(sizes.grouped_rows, group_count, sizes.tile)
    starts = np.asarray(first_rows(jnp.asarray(counts), sizes.tile))
    within = np.concatenate([np.arange(count) for count in counts])
    place = jnp.asarray(np.repeat(starts, counts) + within, jnp.int32)
    aligned = jnp.zeros((tiles * sizes.tile, sizes.width), jnp.bfloat16).at[place].set(rows)
    groups = make_row_groups(jnp.asarray(counts), sizes.tile, tiles)
    return _Grouped(rows, aligned, place, groups), counts


def _expected_by_tile(grouped: _Grouped, w: jax.Array):
    """gelu(rows @ their group's matrix) in float32, aligned; tile by tile, so that one small program serves all sizes."""
    tiles = grouped.groups.tile_group.shape[0]
    rows = grouped.aligned.reshape(tiles, -1, grouped.aligned.shape[1])
    by_tile = jax.lax.map(lambda tile: _gelu_product32(tile[0], w[tile[1]]), (rows, grouped.groups.tile_group))
    return by_tile.reshape(-1, w.shape[2])


def _expected_wgrad(grouped: _Grouped, d_aligned: jax.Array, group_count: int):
    """rows^T @ d_out of each group in float32, tile by tile; pad rows are zero."""
    tiles = grouped.groups.tile_group.shape[0]
    rows = grouped.aligned.reshape(tiles, -1, grouped.aligned.shape[1])
    d_rows = d_aligned.reshape(tiles, -1, d_aligned.shape[1])

    def add_tile(tile, total):
        return total.at[grouped.groups.tile_group[tile]].add(_product32(rows[tile].T, d_rows[tile]))

    zeros = jnp.zeros((group_count, rows.shape[2], d_rows.shape[2]), jnp.float32)
    return jax.lax.fori_loop(0, tiles, add_tile, zeros)


def _grouped_gelu(sizes, seed, group_count):
    grouped, counts = _make_grouped(sizes, seed, group_count)
    (w,) = random_weights(seed + 1, (group_count, sizes.width, sizes.hidden))
    contenders = {
        "ours": jax_contender(
            lambda x, w, g: grouped_matmul(x, w, g, activation="gelu"), grouped.aligned, w, grouped.groups
        ),
        **torch_rivals.grouped_gelu(grouped.rows, w, counts),
    }
    return _case(
        f"grouped_gelu G={group_count}", 2.0 * sizes.grouped_rows * sizes.width * sizes.hidden, 0.0,
        Goal("speedup", 1.10, ("grouped_mm", "loop_of_mm")), contenders,
        lambda: reference_jit(_expected_by_tile)(grouped, w)[grouped.place],
        {"ours": lambda out: out[grouped.place]},
    )  # fmt: skip


def _grouped_wgrad(sizes, seed, group_count):
    grouped, counts = _make_grouped(sizes, seed, group_count)
    (w,) = random_weights(seed + 1, (group_count, sizes.width, sizes.hidden))
    (d_out,) = random_rows(seed + 2, (sizes.grouped_rows, sizes.hidden))
    d_aligned = jnp.zeros((grouped.aligned.shape[0], sizes.hidden), jnp.bfloat16).at[grouped.place].set(d_out)

    def ours(x, w, d_out, groups):
        # Of the pullback only the weights' gradient is returned, so the compiler drops the rest.
        return jax.vjp(lambda w: grouped_matmul(x, w, groups), w)[1](d_out)[0]

    contenders = {
        "ours": jax_contender(ours, grouped.aligned, w, d_aligned, grouped.groups),
        **torch_rivals.grouped_wgrad(grouped.rows, d_out, counts),
    }
    return _case(
        f"grouped_wgrad G={group_count}", 2.0 * sizes.grouped_rows * sizes.width * sizes.hidden, 0.0,
        Goal("speedup", 1.15, ("grouped_mm",)), contenders,
        lambda: reference_jit(_expected_wgrad, static_argnums=2)(grouped, d_aligned, group_count),
    )  # fmt: skip


def _half_valid_buffer(sizes, seed):
    (x,) = random_rows(seed, (sizes.grouped_rows, sizes.width))
    (w,) = random_weights(seed + 1, (1, sizes.width, sizes.hidden))
    half = sizes.grouped_rows // 2
    full_groups = one_group(sizes.grouped_rows, sizes.tile)
    groups = full_groups._replace(valid_tiles=jnp.int32(half // sizes.tile))
    product = functools.partial(grouped_matmul, activation="gelu")
    contenders = {
        "ours": jax_contender(product, x, w, groups),
        "valid_rows_alone": jax_contender(product, x[:half], w, one_group(half, sizes.tile)),
    }
    return _case(
        "half_valid_buffer", 2.0 * half * sizes.width * sizes.hidden, 0.0,
        Goal("time", 1.05, ("valid_rows_alone",)), contenders,
        lambda: reference_jit(_gelu_product32)(x[:half], w[0]),
        {"ours": lambda out: out[:half]},
    )  # fmt: skip


def _mla_decode(sizes, seed, latent, rope):
    q_latent, q_rope, cache = random_rows(
        seed, (sizes.sequences, sizes.heads, latent), (sizes.sequences, sizes.heads, rope),
        (sizes.sequences, sizes.cached, latent + rope),
    )  # fmt: skip
    lengths = jnp.full(sizes.sequences, sizes.cached, jnp.int32)
    operands = (q_latent, q_rope, cache, lengths)
    scale = (latent + rope) ** -0.5
    named = {name: functools.partial(mla_decode, scale=scale, implementation=name) for name in ("reference", "xla")}
    contenders = {
        "ours": jax_contender(functools.partial(mla_decode, scale=scale), *operands),
        "xla": jax_contender(named["xla"], *operands),
        **torch_rivals.mla_decode(q_latent, q_rope, cache, scale),
    }
    flops = 2.0 * sizes.sequences * sizes.heads * sizes.cached * (2 * latent + rope)
    byte_count = float(cache.nbytes + 2 * q_latent.nbytes + q_rope.nbytes)
    goal = Goal("speedup", 2.2 if latent <= 512 else 1.3, ("xla",))
    return _case(
        f"mla_decode {latent}+{rope}", flops, byte_count, goal, contenders, lambda: reference_jit(named["reference"])(*operands)
    )


def _token_rows(sizes, seed):
    """Returns (rows of tokens x top_k, the place of each, the reader of each place)."""
    places = np.random.default_rng(seed).permutation(sizes.tokens * sizes.top_k).astype(np.int32)
    readers = np.argsort(places).astype(np.int32)
    return jnp.asarray(places.reshape(sizes.tokens, sizes.top_k)), jnp.asarray(readers)


def _gather(sizes, seed):
    (tokens,) = random_rows(seed, (sizes.tokens, sizes.width))
    places, readers = _token_rows(sizes, seed)
    index = readers // sizes.top_k
    contenders = {
        "ours": jax_contender(permute.take_rows, tokens, index, places),
        "xla": jax_contender(functools.partial(row_gather.gather_rows, implementation="xla"), tokens, index),
        **torch_rivals.gather(tokens, index),
    }
    byte_count = 2.0 * index.size * sizes.width * tokens.dtype.itemsize
    return _case("gather", 0.0, byte_count, Goal("bandwidth", 0.90), contenders, lambda: tokens[index])


def _combine(sizes, seed):
    (rows,) = random_rows(seed, (sizes.tokens * sizes.top_k, sizes.width))
    places, readers = _token_rows(sizes, seed)
    weights = jax.random.uniform(jax.random.key(seed), places.shape, jnp.float32)
    contenders = {
        "ours": jax_contender(permute.weighted_sum_rows, rows, weights, places, readers),
        "xla": jax_contender(functools.partial(row_gather.weighted_sum_rows, implementation="xla"), rows, weights, places),
        **torch_rivals.combine(rows, weights, places),
    }
    byte_count = (1 + 1 / sizes.top_k) * rows.nbytes
    return _case(
        "combine", 0.0, byte_count, Goal("bandwidth", 0.90), contenders,
        lambda: jnp.einsum("tkd,tk->td", rows[places].astype(jnp.float32), weights, precision="highest"),
    )  # fmt: skip
