"""One routed layer's exchange: plan (integers), send, let the experts work, bring back.

A transport is a file of functions with one signature each; `TRANSPORTS` is the table.
`exchange_rows` composes them, and a schedule that interleaves two micro-batches
calls the stages itself: those with collectives stand apart from those without.
"""

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from moe_ep.config import DispatchConfig, require
from moe_ep.dispatch import all_gather, all_to_all, ragged
from moe_ep.dispatch.exchange import DispatchCounts, Exchange, end_pair, make_exchange, sum_counts
from moe_ep.dispatch.plan import count_experts
from moe_ep.kernels.grouped_matmul import RowGroups
from moe_ep.shapes import Choices, Rows, TokenRows, Weights


class Transport(NamedTuple):
    """The stages of an exchange; what passes between them is the transport's own.

    plan(choices, exchange) -> plan, whose `counts` are DispatchCounts
    pack(tokens, plan, exchange) -> packed
    move(packed, plan, exchange) -> arrived: collectives and nothing else
    receive(arrived, plan, exchange) -> batches, each with `rows` and `groups` for the experts, one a slice
    pack_back(outputs, batches, weights, plan, exchange) -> packed
    move_back(packed, plan, exchange) -> came back: collectives and nothing else
    combine(came_back, weights, plan, exchange) -> token rows
    queue_rows(exchange) -> rows that a buffer holds
    network_rows(exchange, width, rows_away) -> rows that a device sends to others, of the `rows_away` it has for them
    PLANS_ALONE: whether `plan` needs nothing of other devices
    """

    plan: Callable[..., Any]
    pack: Callable[..., Any]
    move: Callable[..., Any]
    receive: Callable[..., list[Any]]
    pack_back: Callable[..., Any]
    move_back: Callable[..., Any]
    combine: Callable[..., TokenRows]
    queue_rows: Callable[[Exchange], int]
    network_rows: Callable[[Exchange, int, float], float]
    PLANS_ALONE: bool

    def send(self, tokens: TokenRows, plan: Any, exchange: Exchange) -> list[Any]:
        """Sends tokens to their experts and lays them out there."""
        return self.receive(self.move(self.pack(tokens, plan, exchange), plan, exchange), plan, exchange)

    def bring_back(
        self, outputs: list[Rows], batches: list[Any], weights: Weights, plan: Any, exchange: Exchange
    ) -> TokenRows:
        """Returns the experts' outputs to their tokens and adds them up by weight."""
        packed = self.pack_back(outputs, batches, weights, plan, exchange)
        return self.combine(self.move_back(packed, plan, exchange), weights, plan, exchange)


def _transport(module: ModuleType) -> Transport:
    stages = Transport(*(getattr(module, name) for name in Transport._fields))
    return stages._replace(receive=_at_experts(stages.receive), pack_back=_at_experts(stages.pack_back))


def _at_experts(stage: Callable) -> Callable:
    """Names what is done between the two exchanges, beside the experts' own products."""

    @functools.wraps(stage)
    def named(*arguments: Any) -> Any:
        with jax.named_scope("expert_rows"):
            return stage(*arguments)

    return named


TRANSPORTS = {
    "all_to_all": _transport(all_to_all),
    "all_gather": _transport(all_gather),
    "ragged": _transport(ragged),
}

Experts = Callable[[Rows, RowGroups], Rows]


def exchange_rows(
    tokens: TokenRows, choices: Choices, weights: Weights, experts: Experts, exchange: Exchange
) -> tuple[TokenRows, DispatchCounts]:
    """Sends each token to the experts it chose and returns their outputs added up by weight.

    Args:
      tokens: this device's rows.
      choices: the experts of each row, over the whole layer; a number past the last expert sends it nowhere.
      weights: of each choice.
      experts: this device's experts, applied to rows in the aligned-contiguous layout.
      exchange: the static sizes; tokens.shape[0] is exchange.tokens.

    Returns:
      The combined rows, in the tokens' type, and what was moved.
    """
    transport = TRANSPORTS[exchange.transport]
    plan = transport.plan(choices, exchange)
    in_chunks = _IN_CHUNKS.get(exchange.transport, _at_once)
    send_and_return = in_chunks if exchange.chunks > 1 else _at_once
    return send_and_return(transport, tokens, weights, experts, plan, exchange), plan.counts


def _at_once(
    transport: Transport, tokens: TokenRows, weights: Weights, experts: Experts, plan: Any, exchange: Exchange
) -> TokenRows:
    batches = transport.send(tokens, plan, exchange)
    outputs = [experts(batch.rows, batch.groups) for batch in batches]
    return transport.bring_back(outputs, batches, weights, plan, exchange)


def _in_turn(
    transport: Transport, tokens: TokenRows, weights: Weights, experts: Experts, plan: Any, exchange: Exchange
) -> TokenRows:
    """While a slice is computed the next one comes and the last one goes back.

    Barriers keep them apart: fused, the small kernels of all slices would wait for all to arrive.
    """
    packed = transport.pack(tokens, plan, exchange)
    arrived, packed = end_pair(transport.move(packed[:1], plan, exchange), packed[1:])
    came_back, computed = [], []
    for _ in range(exchange.slices):
        moved = transport.move(packed[:1], plan, exchange), transport.move_back(computed, plan, exchange)
        batches = transport.receive(arrived, plan, exchange)
        outputs = [experts(batch.rows, batch.groups) for batch in batches]
        (arrived, back), computed = end_pair(moved, transport.pack_back(outputs, batches, weights, plan, exchange))
        came_back, packed = came_back + back, packed[1:]
    came_back += transport.move_back(computed, plan, exchange)
    return transport.combine(came_back, weights, plan, exchange)


def most_chunks(dispatch: DispatchConfig, *, experts: int, peers: int, tokens: int, top_k: int) -> int:
    """Returns the chunks that an exchange, of sizes as in `make_exchange`, has rows for."""
    sizes = {"experts": experts, "peers": peers, "tokens": tokens, "top_k": top_k}
    whole = make_exchange(dataclasses.replace(dispatch, chunks=1), **sizes)
    return TRANSPORTS[whole.transport].queue_rows(whole)


def check_chunks(dispatch: DispatchConfig, *, tokens: int, **sizes: int) -> None:
    """Checks that the chunks of an exchange, of sizes as in `most_chunks`, hold a row each.

    Raises:
      ConfigError: there are more chunks than a buffer has rows.
    """
    rows = most_chunks(dispatch, tokens=tokens, **sizes)
    require(dispatch.chunks <= rows, "dispatch.chunks", dispatch.chunks,
            f"1 to {rows} with {tokens} tokens per device: a buffer has so many rows, and a chunk at least one")  # fmt: skip


def check_transport(transport: str, mesh: Mesh, field: str = "dispatch.transport") -> None:
    """Checks that a transport, which this field of the config names, runs on devices that are here.

    Raises:
      ConfigError: ragged rows between GPUs of several processes, which XLA of the pinned jax refuses to move or, made
        to, waits for without end (results/LOG.md, 2026-11-27; openxla/xla#33386).
    """
    devices = mesh.devices.flat
    between_processes = devices[0].platform == "gpu" and len({device.process_index for device in devices}) > 1
    require(transport != "ragged" or not between_processes, field, transport,
            "all_to_all or all_gather between GPUs of several processes")  # fmt: skip


# all_gather moves all slices in one collective, and ragged has no chunks.
_IN_CHUNKS = {"all_to_all": _in_turn}


__all__ = [
    "TRANSPORTS", "DispatchCounts", "Exchange", "Transport", "check_chunks", "check_transport", "count_experts", "exchange_rows",
    "make_exchange", "most_chunks", "sum_counts",
]  # fmt: skip
