"""Measures one routed layer, forward and with gradients, by stage and against PyTorch, on one device.

    python -m moe_ep.bench.moe_layer               8 experts of the experiment's size, 8192 tokens, top-2
    python -m moe_ep.bench.moe_layer --sizes=tiny  at sizes for any machine: no measurement

Stages are compiled and timed apart, so their sum is not exactly the whole. Writes
<out>/moe_layer_<device>.{json,md}.
"""

from collections.abc import Callable
import dataclasses
import functools
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_ep import results
from moe_ep.bench import command, energy, kernel_cases, report, torch_moe_layer
from moe_ep.bench.correctness import relative_error
from moe_ep.bench.timing import Contender, measure_in_turns
from moe_ep.config import DispatchConfig, MoEConfig
from moe_ep.dispatch import TRANSPORTS, Exchange, exchange_rows, make_exchange
from moe_ep.model.moe import MoE


@dataclasses.dataclass(frozen=True)
class Sizes:
    """One layer on one device."""

    tokens: int = 8192
    width: int = 7168
    hidden: int = 18432
    experts: int = 8
    top_k: int = 2


SIZES = {"full": Sizes(), "tiny": Sizes(tokens=64, width=32, hidden=64, experts=4)}
SPEEDUP_GOAL, EXPERTS_SHARE_GOAL = 1.15, 0.85


class Layer(NamedTuple):
    """A routed layer with weights in the type it computes in, its tokens, and the sizes of its exchange."""

    module: MoE
    tokens: jax.Array
    exchange: Exchange


def make_layer(sizes: Sizes, seed: int) -> Layer:
    """Returns a layer with random weights and tokens."""
    config, transport = MoEConfig(num_experts=sizes.experts, top_k=sizes.top_k, hidden=sizes.hidden), DispatchConfig()

    @jax.jit
    def make(key):
        module = MoE(key, sizes.width, config, dtype=jnp.dtype(jnp.bfloat16), output_scale=1.0)
        module.experts = jax.tree.map(lambda weights: weights.astype(jnp.bfloat16), module.experts)
        return module

    (tokens,) = kernel_cases.random_rows(seed, (sizes.tokens, sizes.width))
    # Every assignment has a place on one device, so a wave is exact.
    exchange = make_exchange(transport, experts=sizes.experts, peers=1, tokens=sizes.tokens, top_k=sizes.top_k)
    return Layer(make(jax.random.key(seed)), tokens, exchange)


def whole(exchange, module, tokens):
    """The layer as the model runs it, without its counts."""
    routing = module.route(tokens, _no_bias(exchange))
    return exchange_rows(tokens, routing.choices, routing.weights, module.experts, exchange)[0]


def _no_bias(exchange):
    return jnp.zeros(exchange.experts, jnp.float32)


def route(exchange, router, tokens):
    return router(tokens, _no_bias(exchange)).weights


def permute(exchange, tokens, choices):
    transport = TRANSPORTS[exchange.transport]
    (batch,) = transport.send(tokens, transport.plan(choices, exchange), exchange)
    return batch.rows


def run_experts(exchange, experts, rows, groups):
    del exchange
    return experts(rows, groups)


def combine(exchange, outputs, weights, batch, plan):
    return TRANSPORTS[exchange.transport].bring_back([outputs], [batch], weights, plan, exchange)


def in_both_directions(name: str, function: Callable, exchange: Exchange, varied: tuple, fixed: tuple = ()):
    """Returns contenders "name forward" and "name forward+backward", the latter with gradients of what is varied."""
    apply = functools.partial(function, exchange)

    def value_and_gradients(varied, fixed, gradient):
        out, pull_back = jax.vjp(lambda *operands: apply(*operands, *fixed), *varied)
        return out, *pull_back(gradient)

    out = jax.eval_shape(apply, *varied, *fixed)
    gradient = jax.random.normal(jax.random.key(1), out.shape, out.dtype)
    return {
        f"{name} forward": kernel_cases.jax_contender(apply, *varied, *fixed),
        f"{name} forward+backward": kernel_cases.jax_contender(value_and_gradients, varied, fixed, gradient),
    }


def stages(layer: Layer) -> dict[str, Contender]:
    """Returns contenders for each stage, on what the stages before it give."""
    module, tokens, exchange = layer
    transport = TRANSPORTS[exchange.transport]

    @jax.jit
    def prepare(module, tokens):
        routing = module.route(tokens, _no_bias(exchange))
        plan = transport.plan(routing.choices, exchange)
        (batch,) = transport.send(tokens, plan, exchange)
        return routing, plan, batch, module.experts(batch.rows, batch.groups)

    routing, plan, batch, outputs = prepare(module, tokens)
    make = functools.partial(in_both_directions, exchange=exchange)
    return {
        **make("router", route, varied=(module.router, tokens)),
        **make("permute", permute, varied=(tokens,), fixed=(routing.choices,)),
        **make("experts", run_experts, varied=(module.experts, batch.rows), fixed=(batch.groups,)),
        **make("combine", combine, varied=(outputs, routing.weights), fixed=(batch, plan)),
    }


def run(sizes: Sizes, seed: int, samples: int, sample_seconds: float) -> dict:
    """Returns the times of the layer, its stages and torch's layer, and how far the two outputs differ."""
    layer = make_layer(sizes, seed)
    contenders = {
        **in_both_directions("ours", whole, layer.exchange, (layer.module, layer.tokens)),
        **torch_moe_layer.contenders(layer.module, layer.tokens, sizes.top_k),
    }
    ours = contenders["ours forward"].launch()
    rivals = [name for name in contenders if name.endswith(" forward") and not name.startswith("ours")]
    differences = {name: relative_error(jnp.from_dlpack(contenders[name].launch().detach()), ours) for name in rivals}
    layers = _measure(contenders, samples, sample_seconds)
    del contenders, ours
    return {
        "sizes": dataclasses.asdict(sizes), "differs_from_ours": differences,
        "times": layers, "stages": _measure(stages(layer), samples, sample_seconds),
    }  # fmt: skip


def _measure(contenders: dict[str, Contender], samples: int, sample_seconds: float) -> dict[str, dict[str, float]]:
    times = measure_in_turns(contenders, samples, sample_seconds)
    joules = energy.measure(contenders, times)
    return {
        name: {"seconds": value.median, "spread": value.spread} | ({"joules": joules[name]} if name in joules else {})
        for name, value in times.items()
    }


def judge(result: dict) -> dict:
    """Returns the experts' share of the stages' time and the speedup over the fastest torch, in each direction."""
    verdict = {}
    for direction in ("forward", "forward+backward"):
        stage_seconds, layers = (
            {name: times["seconds"] for name, times in result[part].items() if name.endswith(f" {direction}")}
            for part in ("stages", "times")
        )
        ours = layers.pop(f"ours {direction}")
        verdict[direction] = {
            "experts_share": stage_seconds[f"experts {direction}"] / sum(stage_seconds.values()),
            "stages_over_whole": sum(stage_seconds.values()) / ours,
            "speedup": min(layers.values()) / ours if layers else None,
        }
    return verdict


def as_markdown(result: dict) -> str:
    """Returns the tables of a result."""
    sizes = result["sizes"]
    lines = [
        report.heading("One routed layer on one device", result),
        f"{sizes['experts']} experts of {sizes['width']} x {sizes['hidden']}, {sizes['tokens']} tokens, "
        f"top-{sizes['top_k']}. Medians in ms, with the spread of the quartiles; joules of the board a call, by its own "
        "counter, each alone.\n\n| what | ms | J |\n|---|---|---|\n",
    ]
    for name, times in {**result["times"], **result["stages"]}.items():
        joules = f"{times['joules']:.3g}" if "joules" in times else "-"
        lines.append(f"| {name} | {times['seconds'] * 1e3:.3f} ±{times['spread']:.1%} | {joules} |\n")
    lines.append(
        f"\n| direction | experts' share (goal {EXPERTS_SHARE_GOAL:.0%}) | "
        f"speedup over torch (goal {SPEEDUP_GOAL}x) | stages / whole |\n|---|---|---|---|\n"
    )
    for direction, verdict in result["verdict"].items():
        speedup = "-" if verdict["speedup"] is None else f"{verdict['speedup']:.3f}x"
        share, ratio = verdict["experts_share"], verdict["stages_over_whole"]
        lines.append(f"| {direction} | {share:.1%} | {speedup} | {ratio:.2f} |\n")
    return "".join(lines)


def main() -> None:
    result = command.start("moe_ep.bench.moe_layer")
    result |= run(SIZES[command.SIZES.value], result["seed"], command.SAMPLES.value, command.SAMPLE_SECONDS.value)
    result["verdict"] = judge(result)
    print(markdown := as_markdown(result))
    for path in results.write(command.OUT.value, report.file_stem("moe_layer"), result, markdown):
        print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    command.run(main)
