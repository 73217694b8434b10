"""Times the calls that the simulator's kernel table needs and the comparison of kernels does not have.

    python -m moe_ep.bench.calls               every call, results/calls_<device>.{json,md}
    python -m moe_ep.bench.calls --sizes=tiny  the same calls at sizes for any machine: no measurement

Attention as cuDNN makes it at this project's heads, XLA's products of attention and
head, groups of few and of many rows, passes over memory as XLA fuses them. A row is
what `moe_ep.cost.kernels` reads: operation, shape, FLOPs, bytes, seconds.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import sys
from typing import NamedTuple

from absl import app
import jax
import jax.numpy as jnp

from moe_ep.bench import command, power, report
from moe_ep.bench.kernel_cases import jax_contender, random_rows, random_weights
from moe_ep.bench.timing import Contender, measure_in_turns
from moe_ep.cost.kernels import Work, gemm, memory_pass, update_pass
from moe_ep.dispatch.exchange import row_tile
from moe_ep.kernels.grouped_matmul import RowGroups, grouped_matmul
from moe_ep.model.mla import ATTENTIONS, MASKED_ATTENTIONS


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of all calls; attention is of `tokens` tokens, whatever the context."""

    tokens: int = 8192
    heads: int = 128
    head_dims: tuple[int, ...] = (56, 120)
    contexts: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    backward_contexts: tuple[int, ...] = (1024, 2048, 4096)
    chunk: int = 512
    chunk_keys: tuple[int, ...] = (640, 1024)
    # [rows, depth] by [depth, columns].
    products: tuple[tuple[int, int, int], ...] = (
        (8192, 7168, 7168), (8192, 7168, 15360), (8192, 512, 14336), (8192, 7168, 50304),
        (32, 7168, 7168), (32, 7168, 15360), (32, 7168, 50304),
    )  # fmt: skip
    absorbed: tuple[tuple[int, int, int], ...] = ((32, 56, 512), (32, 512, 56))
    groups: int = 8
    group_rows: tuple[int, ...] = (8, 32, 2048, 4096)
    width: int = 7168
    hidden: int = 18432
    pass_values: int = 2**28


SIZES = {
    "full": Sizes(),
    "tiny": Sizes(
        tokens=16, heads=2, head_dims=(8,), contexts=(8,), backward_contexts=(8,), chunk=4, chunk_keys=(8,),
        products=((16, 8, 32),), absorbed=((4, 8, 16),), groups=2, group_rows=(8,), width=16, hidden=32, pass_values=256,
    ),
}  # fmt: skip
# From as many rows on a group's weights are worth a gradient: training has no fewer.
_TRAINED_ROWS = 1024


class Call(NamedTuple):
    """One call: its work as the table knows it, and how it is made."""

    work: Work
    note: str
    contender: Contender


def calls(sizes: Sizes, seed: int) -> Iterator[list[Call]]:
    """Yields the calls by family; a family's arrays are made when it is reached."""
    for dim in sizes.head_dims:
        yield [*_attentions(sizes, seed, dim)]
    yield [*_products(sizes, seed)]
    for rows in sizes.group_rows:
        yield [*_groups(sizes, seed, rows)]
    yield [*_passes(sizes, seed)]


def _attentions(sizes: Sizes, seed: int, dim: int) -> Iterator[Call]:
    def split(array, context):
        return array.reshape(sizes.tokens // context, context, sizes.heads, dim)

    kind, scale = "cudnn" if jax.default_backend() == "gpu" else "xla", dim**-0.5
    causal, masked = (functools.partial(table[kind], scale=scale) for table in (ATTENTIONS, MASKED_ATTENTIONS))
    packed = random_rows(seed, *[(sizes.tokens, sizes.heads * dim)] * 4)
    for context in sizes.contexts:
        queries, keys, values, gradient = (split(array, context) for array in packed)
        yield Call(attention(sizes, context, dim, 0.5), "causal", jax_contender(causal, queries, keys, values))
        if context in sizes.backward_contexts:
            _, pull_back = jax.vjp(causal, queries, keys, values)
            backward = attention(sizes, context, dim, 0.5, backward=True)
            yield Call(backward, "causal", jax_contender(lambda pull, gradient: pull(gradient), pull_back, gradient))
    queries, sequences = split(packed[0], sizes.chunk), sizes.tokens // sizes.chunk
    for count in sizes.chunk_keys:
        keys, values = (rows.reshape(sequences, count, sizes.heads, dim)
                        for rows in random_rows(seed + 1, *[(sequences * count, sizes.heads * dim)] * 2))  # fmt: skip
        mask = jnp.arange(count)[None, :] <= count - sizes.chunk + jnp.arange(sizes.chunk)[:, None]
        allowed = jnp.broadcast_to(mask, (sequences, sizes.chunk, count))
        contender = jax_contender(lambda q, k, v, allowed: masked(q, k, v, allowed=allowed), queries, keys, values, allowed)
        work = attention(sizes, count, dim, 1.0, masked=True)
        yield Call(work, f"{sizes.chunk} queries a sequence, a mask of its own", contender)


def attention(
    sizes: Sizes, keys: int, dim: int, share: float, backward: bool = False, masked: bool = False
) -> Work:
    """Returns the work of scores and values of `share` of all pairs of a sequence; the backward pass has five products for two."""
    op = "attention_backward" if backward else "attention_masked" if masked else "attention"
    flops = 2.0 * sizes.tokens * sizes.heads * 2 * dim * keys * share * (2.5 if backward else 1)
    touched = 2.0 * sizes.tokens * sizes.heads * 4 * dim * (2 if backward else 1)
    return Work(op, "bf16", flops, touched, (keys, dim))


def _products(sizes: Sizes, seed: int) -> Iterator[Call]:
    for rows, depth, columns in sizes.products:
        (left,), (right,) = random_rows(seed, (rows, depth)), random_weights(seed + 1, (depth, columns))
        yield Call(gemm(rows, depth, columns, "bf16"), "XLA", jax_contender(jnp.matmul, left, right))
    for rows, depth, columns in sizes.absorbed:
        (left,) = random_rows(seed, (rows, sizes.heads, depth))
        (right,) = random_weights(seed + 1, (sizes.heads, depth, columns))
        product = functools.partial(jnp.einsum, "bhk,hkn->bhn")
        yield Call(gemm(rows, depth, columns, "bf16", sizes.heads), "XLA", jax_contender(product, left, right))


def _groups(sizes: Sizes, seed: int, rows: int) -> Iterator[Call]:
    """Even groups as the experts' kernels get them: each starts at a tile."""
    tile = row_tile(rows * sizes.groups, sizes.groups)
    tiles = -(-rows // tile)
    groups = RowGroups(jnp.repeat(jnp.arange(sizes.groups, dtype=jnp.int32), tiles), jnp.int32(sizes.groups * tiles))
    for depth, columns, activation in ((sizes.width, sizes.hidden, "gelu"), (sizes.hidden, sizes.width, None)):
        (left,) = random_rows(seed, (sizes.groups * tiles * tile, depth))
        (right,) = random_weights(seed + 1, (sizes.groups, depth, columns))
        product = functools.partial(grouped_matmul, activation=activation)
        work = gemm(rows, depth, columns, "bf16", sizes.groups)
        yield Call(work, activation or "plain", jax_contender(product, left, right, groups))
        if rows >= _TRAINED_ROWS:
            (gradient,) = random_rows(seed + 2, (len(left), columns))
            yield Call(work.of_weight_gradient(), "plain", jax_contender(_weight_gradient, left, right, gradient, groups))


def _weight_gradient(rows, weights, gradient, groups):
    # Of the pullback only the weights' gradient is returned, so the compiler drops the rest.
    return jax.vjp(lambda weights: grouped_matmul(rows, weights, groups), weights)[1](gradient)[0]


def _passes(sizes: Sizes, seed: int) -> Iterator[Call]:
    count = sizes.pass_values
    one, other = (rows.reshape(-1) for rows in random_rows(seed, *[(1, count)] * 2))
    wide = [jax.random.normal(jax.random.key(seed + index), (count,), jnp.float32) for index in range(3)]
    yield Call(memory_pass(4.0 * count), "negated", jax_contender(jnp.negative, one))
    yield Call(memory_pass(6.0 * count), "two added", jax_contender(jnp.add, one, other))
    yield Call(memory_pass(6.0 * count), "float32 to bfloat16", jax_contender(lambda x: x.astype(jnp.bfloat16), wide[0]))
    padded = jax_contender(lambda x: jnp.pad(x.reshape(-1, 8), ((0, 0), (0, 8))), one)
    yield Call(memory_pass(6.0 * count), "padded to twice the width", padded)
    yield Call(memory_pass(2.0 * count), "summed up", jax_contender(lambda x: jnp.sum(x, dtype=jnp.float32), one))
    yield Call(update_pass(26.0 * count), "Adam: three float32 arrays and a bfloat16 gradient", jax_contender(_adam, *wide, one))


def _adam(weights, mean, square, gradient):
    gradient = gradient.astype(jnp.float32)
    mean = 0.9 * mean + 0.1 * gradient
    square = 0.95 * square + 0.05 * gradient * gradient
    step = mean / (jnp.sqrt(jnp.abs(square)) + 1e-8) + 0.1 * weights
    return weights - 1e-3 * step, mean, square


def measure(sizes: Sizes, seed: int, samples: int, sample_seconds: float) -> Iterator[dict]:
    """Yields a row of the kernel table for each call; those of a family take turns."""
    for family in calls(sizes, seed):
        named = {f"{call.work.op} {call.work.shape} {call.note}": call for call in family}
        with power.watch() as watched:
            times = measure_in_turns({name: call.contender for name, call in named.items()}, samples, sample_seconds)
        for name, (work, note, _) in named.items():
            print(f"{name}: {1e3 * times[name].median:.3f} ms", file=sys.stderr, flush=True)
            yield {
                "op": work.op, "dtype": work.dtype, "shape": list(work.shape), "flops": work.flops, "bytes": work.bytes,
                "seconds": times[name].median, "spread": times[name].spread, "note": note, "power": watched,
            }  # fmt: skip


def as_markdown(result: dict) -> str:
    """Returns the table of a result."""
    lines = [
        report.heading("Calls of the simulator's kernel table", result),
        "Times are medians in ms with the spread of the quartiles; TF is 1e12 FLOP/s. Shapes: (rows of a group, depth, "
        "columns, groups), (keys, head) of attention, bytes of a pass.\n\n",
        "| operation | shape | how | ms | rate | power, SM clock |\n|---|---|---|---|---|---|\n",
    ]
    for row in result["rows"]:
        rate = f"{row['flops'] / row['seconds'] / 1e12:.0f} TF" if row["flops"] else ""
        rate += f" {row['bytes'] / row['seconds'] / 1e9:.0f} GB/s"
        seen = f"{row['power']['watts']:.0f} W, {row['power']['sm_mhz']:.0f} MHz" if row["power"] else "-"
        lines.append(f"| {row['op']} | {', '.join(f'{size:g}' for size in row['shape'])} | {row['note']} | "
                     f"{1e3 * row['seconds']:.3f} ±{row['spread']:.1%} | {rate} | {seen} |\n")  # fmt: skip
    return "".join(lines)


def main(argv: list[str]) -> None:
    result = command.start(argv, "moe_ep.bench.calls")
    result["rows"] = []
    sizes = SIZES[command.SIZES.value]
    for row in measure(sizes, result["seed"], command.SAMPLES.value, command.SAMPLE_SECONDS.value):
        result["rows"].append(row)  # Written after every row, so that a run cut off leaves what it measured.
        paths = report.write(command.OUT.value, report.file_stem("calls"), result, as_markdown(result))
    print(as_markdown(result))
    print(f"wrote {', '.join(map(str, paths))}", file=sys.stderr)


if __name__ == "__main__":
    app.run(main)
