"""Two micro-batches half a layer apart, so that one computes while the other's rows travel.

Per layer, four pairs of an exchange and the work that covers it:

    combine(second, previous layer)   attention, router (first)
    dispatch(first)                   attention, router (second)
    dispatch(second)                  experts (first)
    combine(first)                    experts (second)

A barrier after each pair keeps the compiler from pulling the pairs apart; it
transposes to a barrier, so the backward pass has the same pairs in reverse. A body
needs the weights of its own layer only, so the stack is scanned as it is. The first
combine moves zeros: nothing has been computed for it yet.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float32

from moe_ep.config import DispatchConfig, require
from moe_ep.dispatch import TRANSPORTS, DispatchCounts
from moe_ep.model.block import AttentionHalf, MoEBlock
from moe_ep.model.moe import MoE, MoEReport
from moe_ep.shapes import Activations, RouterBias, Rows, TokenRows, Weights

# attend(half, x, extra) -> (x, kept): the attention half of a block on one micro-batch, with
# what this layer has for it (a cache, say) and what it leaves behind.
Attend = Callable[[AttentionHalf, Activations, Any], tuple[Activations, Any]]


class _Routed(NamedTuple):
    """A micro-batch between its router and its dispatch."""

    tokens: TokenRows
    weights: Weights
    plan: Any


class _Computed(NamedTuple):
    """A micro-batch between its experts and its combine."""

    outputs: list[Rows]
    batches: list[Any]  # without their rows
    weights: Weights
    plan: Any


def scan_staggered(
    attend: Attend,
    x: Activations,
    blocks: MoEBlock,
    bias: Float32[Array, "L E"],
    replay: Array | None,
    extras: Any,
    remember: Callable,
    dispatch: DispatchConfig,
) -> tuple[Activations, MoEReport, Any]:
    """Runs a stack of MoE blocks on the two halves of a batch.

    Args:
      attend: the attention half of a block.
      x: the batch; its sequences are split in two.
      blocks: stacked over layers.
      bias: of every layer.
      replay: [L, t, K] choices to use instead of the routers', or None.
      extras: what attend takes, every leaf [L, b, ...], or None.
      remember: wraps a layer's body: what its backward pass keeps.
      dispatch: how rows travel, and the waves of this program.

    Returns:
      The blocks' output; every layer's report; what attend left, leaves [L, b, ...].

    Raises:
      ConfigError: the batch on a device does not split in two.
    """
    sequences = x.shape[0]
    require(sequences % 2 == 0, "dispatch.overlap", "staggered", f"an even number of sequences per device, not {sequences}")
    first, second = x[: sequences // 2], x[sequences // 2 :]
    layers = (blocks, bias, _split(replay), _split(extras))
    body = _make_body(attend, dispatch)
    first_layer = jax.tree.map(lambda leaf: leaf[0], layers)
    (_, _, in_flight), _ = jax.eval_shape(body, (first, second, None), first_layer)
    start = jax.tree.map(_zeros, in_flight)
    (first, second, in_flight), (reports, kept) = jax.lax.scan(remember(body), (first, second, start), layers)
    second = _combine(blocks.moe, second, in_flight, dispatch)
    return jnp.concatenate([first, second]), reports, kept


def _make_body(attend: Attend, dispatch: DispatchConfig) -> Callable:
    def body(carry, layer):
        first, second, in_flight = carry
        block, bias, replay, extras = layer

        if in_flight is not None:
            second = _combine(block.moe, second, in_flight, dispatch)
        first, first_routed, first_report, first_kept = _enter(attend, block, first, bias, replay[0], extras[0], dispatch)
        second, first, first_routed = jax.lax.optimization_barrier((second, first, first_routed))

        first_batches = _send(block.moe, first_routed, dispatch)
        second, second_routed, second_report, second_kept = _enter(attend, block, second, bias, replay[1], extras[1], dispatch)
        first_batches, second, second_routed = jax.lax.optimization_barrier((first_batches, second, second_routed))

        second_batches = _send(block.moe, second_routed, dispatch)
        first_computed = _compute(block.moe, first_routed, first_batches)
        second_batches, first_computed = jax.lax.optimization_barrier((second_batches, first_computed))

        first = _combine(block.moe, first, first_computed, dispatch)
        second_computed = _compute(block.moe, second_routed, second_batches)
        first, second_computed = jax.lax.optimization_barrier((first, second_computed))

        report = _merge_reports(first_report, second_report)
        return (first, second, second_computed), (report, _join(first_kept, second_kept))

    return body


def _enter(attend: Attend, block: MoEBlock, x: Activations, bias: RouterBias, replay, extra, dispatch):
    """Attention, router and plan of one micro-batch; shared experts join the stream here."""
    x, kept = attend(block.first, x, extra)
    with jax.named_scope("moe"):
        normed = block.norm(x)
        tokens = normed.reshape(-1, normed.shape[-1])
        exchange = block.moe.exchange(tokens.shape[0], dispatch)
        routing = block.moe.route(tokens, bias, replay)
        plan = TRANSPORTS[exchange.transport].plan(routing.choices, exchange)
        if block.moe.config.shared_experts:
            x = x + block.moe.share(normed)
    return x, _Routed(tokens, routing.weights, plan), block.moe.report(routing, plan.counts), kept


def _send(moe: MoE, routed: _Routed, dispatch: DispatchConfig) -> list[Any]:
    exchange = moe.exchange(routed.tokens.shape[0], dispatch)
    with jax.named_scope("moe"):
        return TRANSPORTS[exchange.transport].send(routed.tokens, routed.plan, exchange)


def _compute(moe: MoE, routed: _Routed, batches: list[Any]) -> _Computed:
    with jax.named_scope("moe"):
        outputs = [moe.experts(batch.rows, batch.groups) for batch in batches]
    return _Computed(outputs, [batch._replace(rows=None) for batch in batches], routed.weights, routed.plan)


def _combine(moe: MoE, x: Activations, computed: _Computed, dispatch: DispatchConfig) -> Activations:
    exchange = moe.exchange(computed.weights.shape[0], dispatch)
    with jax.named_scope("moe"):
        bring_back = TRANSPORTS[exchange.transport].bring_back
        rows = bring_back(computed.outputs, computed.batches, computed.weights, computed.plan, exchange)
        return x + rows.reshape(x.shape)


def _merge_reports(first: MoEReport, second: MoEReport) -> MoEReport:
    counts = jax.tree.map(jnp.add, first.dispatch, second.dispatch)
    waves = jnp.maximum(first.dispatch.waves_needed, second.dispatch.waves_needed)
    return MoEReport(
        dispatch=counts._replace(waves_needed=waves),
        expert_counts=first.expert_counts + second.expert_counts,
        choices=jnp.concatenate([first.choices, second.choices]),
        z_loss=first.z_loss + second.z_loss,
    )


def _split(tree: Any) -> tuple[Any, Any]:
    """Splits leaves [L, b, ...] along their batch."""
    half = lambda part: jax.tree.map(lambda leaf: jnp.split(leaf, 2, axis=1)[part], tree)  # noqa: E731
    return half(0), half(1)


def _join(first: Any, second: Any) -> Any:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), first, second)


def _zeros(like: jax.ShapeDtypeStruct) -> Array:
    zeros, axes = jnp.zeros(like.shape, like.dtype), tuple(like.manual_axis_type.varying)
    return jax.lax.pcast(zeros, axes, to="varying") if axes else zeros
