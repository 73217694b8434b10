"""One routed layer's exchange: plan (integers), send, let the experts work, bring back.

A transport is three functions with one signature each; `TRANSPORTS` is the table.
`dispatch` composes them, and a schedule that interleaves two micro-batches may
call the three stages itself.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from moe_ep.dispatch import all_gather, all_to_all
from moe_ep.dispatch.exchange import DispatchCounts, Exchange, make_exchange
from moe_ep.dispatch.plan import count_experts
from moe_ep.kernels.grouped_matmul import RowGroups
from moe_ep.shapes import Choices, Rows, TokenRows, Weights


class Transport(NamedTuple):
    """The stages of an exchange; what passes between them is the transport's own.

    plan(choices, exchange) -> plan, whose `counts` are DispatchCounts; send(tokens,
    plan, exchange) -> batches, each with `rows` and `groups` for the experts, one a
    slice; bring_back(outputs, batches, weights, plan, exchange) -> token rows.
    """

    plan: Callable[..., Any]
    send: Callable[..., Any]
    bring_back: Callable[..., TokenRows]
    queue_rows: Callable[[Exchange], int]


TRANSPORTS = {
    "all_to_all": Transport(all_to_all.plan, all_to_all.send, all_to_all.bring_back, all_to_all.queue_rows),
    "all_gather": Transport(all_gather.plan, all_gather.send, all_gather.bring_back, all_gather.queue_rows),
}

Experts = Callable[[Rows, RowGroups], Rows]


def dispatch(
    tokens: TokenRows, choices: Choices, weights: Weights, experts: Experts, exchange: Exchange
) -> tuple[TokenRows, DispatchCounts]:
    """Sends each token to the experts it chose and returns their outputs added up by weight.

    Args:
      tokens: this device's rows.
      choices: the experts of each row, over the whole layer.
      weights: of each choice.
      experts: this device's experts, applied to rows in the aligned-contiguous layout.
      exchange: the static sizes; tokens.shape[0] is exchange.tokens.

    Returns:
      The combined rows, in the tokens' type, and what was moved.
    """
    transport = TRANSPORTS[exchange.transport]
    plan = transport.plan(choices, exchange)
    batches = transport.send(tokens, plan, exchange)
    outputs = [experts(batch.rows, batch.groups) for batch in batches]
    return transport.bring_back(outputs, batches, weights, plan, exchange), plan.counts


__all__ = ["TRANSPORTS", "DispatchCounts", "Exchange", "Transport", "count_experts", "dispatch", "make_exchange"]
