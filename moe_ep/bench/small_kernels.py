"""Measures what a small kernel costs a program, however little it does: chains of kernels of a decode step's kinds.

    python -m moe_ep.bench.small_kernels               every kind, results/small_kernels_<device>.{json,md}
    python -m moe_ep.bench.small_kernels --sizes=tiny  short chains for any machine: no measurement

A chain's kernels wait for one another and are kept apart by optimization barriers; how
many the compiler made is counted in the compiled program. Microseconds a kernel are what
a long chain takes longer than a short one, over the kernels that it has more, so what
calling a program costs takes no part. Once with XLA's command buffers, as programs run
by default, and once launched one by one.
"""

from collections.abc import Callable
import re
import statistics
import sys
from typing import NamedTuple

from absl import app
import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float32, Int32

from moe_ep import results
from moe_ep.bench import command, report
from moe_ep.bench.timing import Contender, Times, measure_in_turns
from moe_ep.bench.trace import profile_steps


class State(NamedTuple):
    """What flows through a layer that decodes: tokens, places of their choices, scores of the experts; small products."""

    tokens: BFloat16[Array, "T D"]
    places: Int32[Array, "A"]
    scores: Float32[Array, "T E"]
    rows: BFloat16[Array, "T S"]
    weights: BFloat16[Array, "S S"]


class Sizes(NamedTuple):
    """A batch of `tokens`; steps of a short and a long chain; trips of a short and a long loop over every kind twice."""

    tokens: int = 32
    width: int = 7168
    experts: int = 8
    top_k: int = 2
    side: int = 64
    steps: tuple[int, int] = (32, 128)
    trips: tuple[int, int] = (8, 24)


SIZES = {"full": Sizes(), "tiny": Sizes(tokens=4, width=32, side=8, steps=(1, 2), trips=(2, 3))}
# The second: a command buffer of fewer commands than this is not made.
MODES = {"command buffers": {}, "one by one": {"xla_gpu_graph_min_graph_size": 2**30}}
_LENGTHS = ("short", "long")
_PROFILED_CALLS = 5


def make_state(sizes: Sizes, seed: int) -> State:
    """Returns random tokens, scores and rows, and a permutation of places."""
    keys = jax.random.split(jax.random.key(seed), 5)
    return State(
        tokens=jax.random.normal(keys[0], (sizes.tokens, sizes.width), jnp.bfloat16),
        places=jax.random.permutation(keys[1], jnp.arange(sizes.tokens * sizes.top_k, dtype=jnp.int32)),
        scores=jax.random.normal(keys[2], (sizes.tokens, sizes.experts), jnp.float32),
        rows=jax.random.normal(keys[3], (sizes.tokens, sizes.side), jnp.bfloat16),
        weights=jax.random.normal(keys[4], (sizes.side, sizes.side), jnp.bfloat16) * jnp.bfloat16(sizes.side**-0.5),
    )


def _norm(state: State) -> State:
    wide = state.tokens.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
    return state._replace(tokens=(wide * scale).astype(jnp.bfloat16))


def _casts(state: State) -> State:
    wide = jax.lax.optimization_barrier(state.tokens.astype(jnp.float32))
    return state._replace(tokens=wide.astype(jnp.bfloat16))


def _add(state: State) -> State:
    return state._replace(tokens=(state.tokens + jnp.roll(state.tokens, 1, axis=0)) * 0.5)


def _rows_by_index(state: State) -> State:
    return state._replace(tokens=state.tokens[state.places[: len(state.tokens)] % len(state.tokens)])


def _product(state: State) -> State:
    return state._replace(rows=jnp.dot(state.rows, state.weights))


def _softmax(state: State) -> State:
    return state._replace(scores=jax.nn.softmax(state.scores, axis=-1))


def _index_add(state: State) -> State:
    return state._replace(places=(state.places + 1) % len(state.places))


def _select(state: State) -> State:
    return state._replace(places=jnp.where(state.places < len(state.places) // 2, state.places + 1, 0))


def _running_sum(state: State) -> State:
    return state._replace(places=jnp.cumsum(state.places) % len(state.places))


def _scatter(state: State) -> State:
    inside = jnp.clip(state.places, 0, len(state.places) - 1)
    return state._replace(places=jnp.zeros_like(inside).at[inside].set(state.places))


def _gather(state: State) -> State:
    return state._replace(places=state.places[jnp.clip(state.places, 0, len(state.places) - 1)])


# Of the kinds that a routing is sorted and counted by: they read and write a few kilobytes at most.
ROUTING_KINDS: dict[str, Callable[[State], State]] = {
    "softmax": _softmax,
    "index add": _index_add,
    "select": _select,
    "running sum": _running_sum,
    "scatter": _scatter,
    "gather": _gather,
}
KINDS: dict[str, Callable[[State], State]] = {
    "norm of tokens": _norm,
    "casts of tokens": _casts,
    "sum of tokens": _add,
    "tokens by index": _rows_by_index,
    "product": _product,
    **ROUTING_KINDS,
}
ALL_KINDS = "every kind, in a loop"


def every_kind(state: State) -> State:
    """Every kind once, each after the one before."""
    for kind in KINDS.values():
        state = jax.lax.optimization_barrier(kind(state))
    return state


def chain(kind: Callable[[State], State], steps: int) -> Callable[[State], State]:
    """Returns a function of so many steps, one after another."""

    def run(state: State) -> State:
        for _ in range(steps):
            state = jax.lax.optimization_barrier(kind(state))
        return state

    return run


def loop(trips: int) -> Callable[[State], State]:
    """Returns a function of so many trips over every kind twice, as a program runs its layers."""
    body = chain(every_kind, 2)
    return lambda state: jax.lax.fori_loop(0, trips, lambda _, state: body(state), state)


class Program(NamedTuple):
    """A compiled chain: how to launch it, and the kernels that it runs."""

    contender: Contender
    kernels: int


def compile_chains(sizes: Sizes, state: State, options: dict) -> dict[str, tuple[Program, Program]]:
    """Returns the short and the long program of each kind."""

    def compiled(function: Callable[[State], State], trips: int) -> Program:
        program = jax.jit(function).lower(state).compile(options)
        contender = Contender(lambda: program(state), jax.block_until_ready)
        return Program(contender, kernels_of(program.as_text(), trips))

    chains = {name: tuple(compiled(chain(kind, steps), 1) for steps in sizes.steps) for name, kind in KINDS.items()}
    return chains | {ALL_KINDS: tuple(compiled(loop(trips), trips) for trips in sizes.trips)}


def kernels_of(program: str, trips: int) -> int:
    """Returns the kernels and copies that a compiled program's text runs, those of its loop's body `trips` times."""
    counts, bodies, computation, entry = {}, set(), "", ""
    for line in program.splitlines():
        if start := _COMPUTATION.match(line):
            computation = start.group(2)
            entry = computation if start.group(1) else entry
        elif (instruction := _INSTRUCTION.match(line)) and instruction.group(1) not in _NO_KERNELS:
            counts[computation] = counts.get(computation, 0) + 1
        bodies.update(_BODY.findall(line))
    return counts.get(entry, 0) + trips * sum(counts.get(body, 0) for body in bodies)


_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (?:\(.*?\)|\S+) ([a-z\-]+)\(")
_BODY = re.compile(r"body=%?([\w.\-]+)")
_NO_KERNELS = frozenset({"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "opt-barrier"})


def measure(sizes: Sizes, seed: int, samples: int, sample_seconds: float) -> list[dict]:
    """Returns a row for each kind and mode: the kernels of both chains, their seconds, microseconds a kernel."""
    state = jax.block_until_ready(jax.jit(make_state, static_argnums=(0, 1))(sizes, seed))
    chains = {mode: compile_chains(sizes, state, options) for mode, options in MODES.items()}
    named = {
        f"{length} {kind}, {mode}": program.contender
        for mode, kinds in chains.items()
        for kind, pair in kinds.items()
        for length, program in zip(_LENGTHS, pair)
    }
    times = measure_in_turns(named, samples, sample_seconds)
    rows = []
    for mode, kinds in chains.items():
        for kind, pair in kinds.items():
            counted = [(program.kernels, times[f"{length} {kind}, {mode}"]) for length, program in zip(_LENGTHS, pair)]
            rows.append({"mode": mode, "kind": kind, **_slope(*counted)})
        rows[-1]["profile"] = _profile(pair[1].contender)  # of the loop over every kind
    return rows


def _profile(contender: Contender) -> dict:
    return profile_steps(lambda: contender.launch().places, _PROFILED_CALLS)


def _slope(short: tuple[int, Times], long: tuple[int, Times]) -> dict:
    """A chain that the compiler joined into as many kernels as the shorter one says nothing: None."""
    more = long[0] - short[0]
    difference = long[1].median - short[1].median
    apart = sum(times.quartiles[1] - times.quartiles[0] for _, times in (short, long))
    return {
        "kernels": [short[0], long[0]], "seconds": [short[1].median, long[1].median],
        "us_per_kernel": difference / more * 1e6 if more else None, "spread": apart / abs(difference),
    }  # fmt: skip


def summarize(rows: list[dict]) -> dict[str, float]:
    """Returns microseconds of a small kernel by mode: the mean over a routing's kinds."""
    means = {}
    for mode in MODES:
        kinds = [row["us_per_kernel"] for row in rows if row["mode"] == mode and row["kind"] in ROUTING_KINDS]
        means[mode] = statistics.fmean(us for us in kinds if us is not None)
    return means


def as_markdown(result: dict) -> str:
    """Returns the table of a result."""
    means = ", ".join(f"{mean:.2f} us with {mode}" if mode != "one by one" else f"{mean:.2f} us {mode}"
                      for mode, mean in result["us_per_small_kernel"].items())  # fmt: skip
    lines = [
        report.heading("What a small kernel costs", result),
        "Chains of dependent kernels on data of a decode step of {tokens} tokens ({width} wide, {experts} experts, "
        "top-{top_k}), kept apart by optimization barriers. Kernels are counted in the compiled programs; us a kernel is "
        "the difference of the two chains' medians over the difference of their kernels, spread the sum of their "
        "quartiles' distances over the same.\n\n".format(**result["sizes"]),
        f"A small kernel, the mean over {', '.join(ROUTING_KINDS)}: {means}.\n\n",
        "| kind | launched | kernels | ms | us a kernel | spread | GPU idle, events a call |\n|---|---|---|---|---|---|---|\n",
    ]
    for row in result["rows"]:
        kernels, ms = (" and ".join(f"{value:.4g}" for value in pair)
                       for pair in (row["kernels"], [1e3 * seconds for seconds in row["seconds"]]))  # fmt: skip
        seen = row.get("profile")
        profiled = f"{seen['idle_share']:.1%}, {seen['events_per_step']:.0f}" if seen else "-"
        us = "joined" if row["us_per_kernel"] is None else f"{row['us_per_kernel']:.2f}"
        lines.append(f"| {row['kind']} | {row['mode']} | {kernels} | {ms} | {us} | {row['spread']:.1%} | {profiled} |\n")
    return "".join(lines)


def main(argv: list[str]) -> None:
    result = command.start(argv, "moe_ep.bench.small_kernels")
    sizes = SIZES[command.SIZES.value]
    rows = measure(sizes, result["seed"], command.SAMPLES.value, command.SAMPLE_SECONDS.value)
    result |= {"sizes": sizes._asdict(), "us_per_small_kernel": summarize(rows), "rows": rows}
    markdown = as_markdown(result)
    print(markdown)
    for path in results.write(command.OUT.value, report.file_stem("small_kernels"), result, markdown):
        print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    app.run(main)
