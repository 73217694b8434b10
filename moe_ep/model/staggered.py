"""Two micro-batches half a layer apart, so that one computes while the other's rows travel.

Per layer, four pairs of an exchange and the work that covers it:

    combine(second, previous layer)   attention (first)
    dispatch(first)                   attention (second)
    dispatch(second)                  experts (first)
    combine(first)                    experts (second)

A barrier after each pair keeps the compiler from pulling the pairs apart. A pair has
the collective alone on one side: small kernels between the barriers and the collective
would leave the scheduler, which is greedy, nothing but them to put over it. Router, plan
and packing stand in attention's pair, unless the plan itself needs a collective, which
would queue behind the exchange: then they stand behind the pair. A barrier transposes
to a barrier, so the backward pass has the same pairs in reverse. A body needs the
weights of its own layer only, so the stack is scanned as it is. The first combine moves
zeros: nothing has been computed for it yet.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float32

from moe_ep.config import DispatchConfig, require
from moe_ep.dispatch import TRANSPORTS, Exchange, Experts, Transport
from moe_ep.dispatch.exchange import end_pair
from moe_ep.mesh import vary
from moe_ep.model.block import AttentionHalf, MoEBlock
from moe_ep.model.moe import MoEReport
from moe_ep.model.router import Routing
from moe_ep.shapes import Activations, RouterBias, TokenRows, Weights

# attend(half, x, extra, state) -> (x, kept, state): the attention half of a block on one micro-batch,
# with what this layer has for it (positions, say), what it leaves behind, and what every call
# hands on to the next (a cache that is written in place), None if nothing.
Attend = Callable[[AttentionHalf, Activations, Any, Any], tuple[Activations, Any, Any]]


class _Packed(NamedTuple):
    """A micro-batch whose rows are ready to travel: from its router, or from its experts."""

    rows: Any
    weights: Weights
    plan: Any


class _Exchanger(NamedTuple):
    """The stages of a half batch's exchange; rows and what arrived are whatever the transport makes them."""

    transport: Transport
    exchange: Exchange

    def pack(self, tokens: TokenRows, routing: Routing) -> _Packed:
        plan = self.transport.plan(routing.choices, self.exchange)
        return _Packed(self.transport.pack(tokens, plan, self.exchange), routing.weights, plan)

    def move(self, packed: _Packed) -> Any:
        return self.transport.move(packed.rows, packed.plan, self.exchange)

    def compute(self, experts: Experts, sent: _Packed, arrived: Any) -> _Packed:
        batches = self.transport.receive(arrived, sent.plan, self.exchange)
        outputs = [experts(batch.rows, batch.groups) for batch in batches]
        rows = self.transport.pack_back(outputs, batches, sent.weights, sent.plan, self.exchange)
        return vary(sent._replace(rows=rows))  # as the zeros that the scan starts from

    def move_back(self, packed: _Packed) -> Any:
        return self.transport.move_back(packed.rows, packed.plan, self.exchange)

    def add(self, x: Activations, came_back: Any, packed: _Packed) -> Activations:
        rows = self.transport.combine(came_back, packed.weights, packed.plan, self.exchange)
        return x + rows.reshape(x.shape)


def scan_staggered(
    attend: Attend,
    x: Activations,
    blocks: MoEBlock | tuple[MoEBlock, ...],
    bias: Float32[Array, "L E"],
    replay: Array | None,
    extras: Any,
    remember: Callable,
    dispatch: DispatchConfig,
    *,
    state: Any = None,
) -> tuple[Activations, MoEReport, Any, Any]:
    """Runs a stack of MoE blocks on the two halves of a batch.

    Args:
      attend: the attention half of a block.
      x: the batch; its sequences are split in two.
      blocks: stacked over layers, or one by one.
      bias: of every layer.
      replay: [L, t, K] choices to use instead of the routers', or None.
      extras: what attend takes, every leaf [L, b, ...], or None.
      remember: wraps a layer's body: what its backward pass keeps.
      dispatch: how rows travel, and the waves of this program.
      state: what the first call of attend is given.

    Returns:
      The blocks' output; every layer's report; what attend left, leaves [L, b, ...]; the last state.

    Raises:
      ConfigError: the batch on a device does not split in two.
    """
    sequences = x.shape[0]
    require(sequences % 2 == 0, "dispatch.overlap", "staggered", f"an even number of sequences per device, not {sequences}")
    first, second = x[: sequences // 2], x[sequences // 2 :]
    rest = (bias, _split(replay), _split(extras))
    one_layer = _layer(0, blocks, rest)
    exchange = one_layer[0].moe.exchange(first.shape[0] * first.shape[1], dispatch)
    exchanger = _Exchanger(TRANSPORTS[exchange.transport], exchange)
    body = _Body(attend, exchanger)

    computed = jax.tree.map(_zeros, jax.eval_shape(body.compute_one, first, one_layer))
    carry = (first, second, computed, state)
    (first, second, computed, state), (reports, kept) = over_layers(remember(body), carry, blocks, *rest)
    with jax.named_scope("moe"):
        second = exchanger.add(second, exchanger.move_back(computed), computed)
    return jnp.concatenate([first, second]), reports, kept, state


def over_layers(step: Callable, carry: Any, blocks: Any, *rest: Any) -> tuple[Any, Any]:
    """Returns what `jax.lax.scan(step, carry, (blocks, *rest))` does, written out where blocks are a tuple of layers."""
    if not isinstance(blocks, tuple):
        return jax.lax.scan(step, carry, (blocks, *rest))
    outputs = []
    for index in range(len(blocks)):
        carry, output = step(carry, _layer(index, blocks, rest))
        outputs.append(output)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


def _layer(index: int, blocks: Any, rest: tuple) -> tuple:
    cut = functools.partial(jax.lax.index_in_dim, index=index, keepdims=False)
    block = blocks[index] if isinstance(blocks, tuple) else jax.tree.map(cut, blocks)
    return block, *jax.tree.map(cut, rest)


@dataclasses.dataclass(frozen=True)
class _Body:
    """One layer of both micro-batches: (first, second, second's rows of the layer before, state) -> the same, a layer on."""

    attend: Attend
    exchanger: _Exchanger

    def __call__(self, carry: tuple, layer: tuple) -> tuple[tuple, tuple]:
        first, second, computed, state = carry
        block, bias, replays, extras = layer
        stages, experts = self.exchanger, block.moe.experts
        route_beside = _route_and_end_pair if stages.transport.PLANS_ALONE else _end_pair_and_route
        with jax.named_scope("moe"):
            came_back = stages.move_back(computed)
        first, kept, state = self.attend(block.first, first, extras[0], state)
        came_back, (first, routed, report) = route_beside(
            came_back, first, lambda x: self._route(block, x, bias, replays[0])
        )

        with jax.named_scope("moe"):
            second = stages.add(second, came_back, computed)
            arrived = stages.move(routed)
        second, second_kept, state = self.attend(block.first, second, extras[1], state)
        arrived, (second, second_routed, second_report) = route_beside(
            arrived, second, lambda x: self._route(block, x, bias, replays[1])
        )

        with jax.named_scope("moe"):
            second_arrived = stages.move(second_routed)
            first_computed = stages.compute(experts, routed, arrived)
            second_arrived, first_computed = end_pair(second_arrived, first_computed)

            came_back = stages.move_back(first_computed)
            computed = stages.compute(experts, second_routed, second_arrived)
            came_back, computed = end_pair(came_back, computed)
            first = stages.add(first, came_back, first_computed)
        return (first, second, computed, state), (_merge_reports(report, second_report), _join(kept, second_kept))

    def _route(self, block: MoEBlock, x: Activations, bias: RouterBias, replay: Any) -> tuple:
        """Router, plan and packed rows of one micro-batch; shared experts join the stream here."""
        with jax.named_scope("moe"):
            normed = block.norm(x)
            tokens = normed.reshape(-1, normed.shape[-1])
            routing = block.moe.route(tokens, bias, replay)
            packed = self.exchanger.pack(tokens, routing)
            if block.moe.config.shared_experts:
                x = x + block.moe.share(normed)
        return x, packed, block.moe.report(routing, packed.plan.counts)

    def compute_one(self, x: Activations, layer: tuple) -> _Packed:
        """Returns a micro-batch between its experts and its combine, for the shapes of the scan's start."""
        block, bias, replays, _ = layer
        _, routed, _ = self._route(block, x, bias, replays[0])
        return self.exchanger.compute(block.moe.experts, routed, self.exchanger.move(routed))


def _route_and_end_pair(moved: Any, x: Activations, route: Callable) -> tuple[Any, Any]:
    x, routed, report = route(x)
    moved, (x, routed) = end_pair(moved, (x, routed))
    return moved, (x, routed, report)


def _end_pair_and_route(moved: Any, x: Activations, route: Callable) -> tuple[Any, Any]:
    """What a plan gathers must not queue behind the next pair's exchange either."""
    moved, x = end_pair(moved, x)
    x, routed, report = route(x)
    moved, routed = jax.lax.optimization_barrier((moved, routed))
    return moved, (x, routed, report)


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
    return vary(jnp.zeros(like.shape, like.dtype))
