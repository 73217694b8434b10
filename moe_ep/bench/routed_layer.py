"""Measures a routed layer's step against a dense layer of the same active FLOPs, on one device.

    python -m moe_ep.bench.routed_layer [--tokens=4096 --width=512 --hidden=1024 --experts=8 --top_k=2]

The dense layer's hidden width is top-k x hidden. A step is forward and backward,
gradients of weights and tokens. Routing is uniform: random scores. Writes
<out>/routed_layer_<device>.{json,md}.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
from absl import flags

from moe_ep import results
from moe_ep.bench import command, kernel_cases, report
from moe_ep.bench.timing import measure_in_turns
from moe_ep.config import DispatchConfig
from moe_ep.dispatch import Exchange, exchange_rows, make_exchange
from moe_ep.kernels.grouped_matmul import ExpertWeights, expert_mlp

GOAL = 1.5

_SIZES = {
    name: flags.DEFINE_integer(name, default, help_text, lower_bound=1)
    for name, default, help_text in (
        ("tokens", 4096, "Tokens of the step."),
        ("width", 512, "Width of the model."),
        ("hidden", 1024, "Hidden width of an expert."),
        ("experts", 8, "Experts of the layer."),
        ("top_k", 2, "Experts of a token."),
    )
}
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Samples of each, taken in turns.", lower_bound=3)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """One layer on one device, float32."""

    tokens: int
    width: int
    hidden: int
    experts: int
    top_k: int

    @property
    def step_flops(self) -> float:
        """FLOPs of forward and backward: three times two products of two matrices a chosen expert."""
        return 3 * 2 * 2.0 * self.tokens * self.top_k * self.width * self.hidden


def routed_loss(tokens: jax.Array, weights: ExpertWeights, choices: jax.Array, exchange: Exchange) -> jax.Array:
    """Returns the sum of squares of the routed layer's output."""
    share = jnp.full(choices.shape, 1.0 / choices.shape[1], jnp.float32)
    apply = lambda rows, groups: expert_mlp(rows, weights, groups, activation="gelu")  # noqa: E731
    output, _ = exchange_rows(tokens, choices, share, apply, exchange)
    return jnp.sum(output * output)


def dense_loss(tokens: jax.Array, w_in: jax.Array, w_out: jax.Array) -> jax.Array:
    """Returns the sum of squares of a dense layer's output."""
    output = jax.nn.gelu(tokens @ w_in, approximate=True) @ w_out
    return jnp.sum(output * output)


def measure(sizes: Sizes, seed: int, rounds: int) -> dict:
    """Returns the seconds a step of both and their ratio, with spreads."""
    keys = jax.random.split(jax.random.key(seed), 6)
    normal = lambda key, *shape: jax.random.normal(key, shape, jnp.float32) / sizes.width**0.5  # noqa: E731
    tokens = normal(keys[0], sizes.tokens, sizes.width)
    weights = ExpertWeights(
        normal(keys[1], sizes.experts, sizes.width, sizes.hidden),
        normal(keys[2], sizes.experts, sizes.hidden, sizes.width),
        None,
    )
    w_in = normal(keys[3], sizes.width, sizes.top_k * sizes.hidden)
    w_out = normal(keys[4], sizes.top_k * sizes.hidden, sizes.width)
    scores = jax.random.uniform(keys[5], (sizes.tokens, sizes.experts))
    choices = jax.lax.top_k(scores, sizes.top_k)[1].astype(jnp.int32)
    exchange = make_exchange(
        DispatchConfig(), experts=sizes.experts, peers=1, tokens=sizes.tokens, top_k=sizes.top_k
    )
    routed = lambda tokens, weights, choices: jax.value_and_grad(routed_loss, (0, 1))(  # noqa: E731
        tokens, weights, choices, exchange
    )
    times = measure_in_turns(
        {
            "routed": kernel_cases.jax_contender(routed, tokens, weights, choices),
            "dense": kernel_cases.jax_contender(jax.value_and_grad(dense_loss, (0, 1, 2)), tokens, w_in, w_out),
        },
        rounds,
        sample_seconds=0.0,
    )
    return {
        "seconds": {name: value.median for name, value in times.items()},
        "spread": {name: value.spread for name, value in times.items()},
        "gflop_per_s": {name: sizes.step_flops / value.median / 1e9 for name, value in times.items()},
        "ratio": times["routed"].median / times["dense"].median,
        "goal": GOAL,
    }


def as_markdown(result: dict) -> str:
    """Returns the table of a result."""
    sizes = result["sizes"]
    lines = [
        report.heading("A routed layer against a dense one of the same active FLOPs", result),
        f"{sizes['experts']} experts of {sizes['width']} x {sizes['hidden']}, {sizes['tokens']} tokens, "
        f"top-{sizes['top_k']}, uniform routing, float32, forward and backward, one device.\n\n",
        "| layer | ms | spread | GFLOP/s of active work |\n|---|---|---|---|\n",
    ]
    for name, seconds in result["seconds"].items():
        rate = result["gflop_per_s"][name]
        lines.append(f"| {name} | {seconds * 1e3:.1f} | {result['spread'][name]:.1%} | {rate:.0f} |\n")
    lines.append(f"\nRatio {result['ratio']:.2f}, goal at most {result['goal']}.\n")
    return "".join(lines)


def main() -> None:
    sizes = Sizes(**{name: flag.value for name, flag in _SIZES.items()})
    result = {"kind": "measured", "sizes": dataclasses.asdict(sizes)}
    result |= report.provenance(results.command_line("moe_ep.bench.routed_layer"), None)
    result |= measure(sizes, seed=0, rounds=_ROUNDS.value)
    markdown = as_markdown(result)
    print(markdown)
    for path in results.write(command.OUT.value, report.file_stem("routed_layer"), result, markdown):
        print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    command.run(main)
