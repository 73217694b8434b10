"""All-gather: every device sees all tokens, computes its own experts, and the sums are scattered back.

Bytes do not depend on the routing, and are P / K times those of an exact exchange:
for small expert axes, and as the simplest thing that is right. The experts' row
buffer is fixed in size and filled in waves, as in all_to_all, so routing may be
as uneven as it likes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int32

from moe_ep.dispatch.exchange import DispatchCounts, Exchange, crossed
from moe_ep.dispatch.permute import take_rows, weighted_sum_rows
from moe_ep.dispatch.plan import compact, divide, slices_of_queue, slot_in_slices, sort_by_expert, within_slice
from moe_ep.kernels.grouped_matmul import RowGroups
from moe_ep.mesh import EXPERT
from moe_ep.shapes import Choices, Rows, TokenRows, Weights

_NOWHERE = jnp.iinfo(jnp.int32).max  # out of range of any buffer: reads zeros

PLANS_ALONE = False


EveryonesRows = Float[Array, "T D"]  # of all devices' tokens


class Plan(NamedTuple):
    """Where each of all devices' assignments stands in this device's expert buffers, [slice, row] flattened."""

    assignment_of_row: Int32[Array, "X R"]  # out of range: a pad row
    row_of_assignment: Int32[Array, "T K"]  # T = P x t tokens; out of range: another device's
    groups: list[RowGroups]  # of each slice
    counts: DispatchCounts


class Batch(NamedTuple):
    """One slice's rows as the experts take them."""

    rows: Rows
    groups: RowGroups


def queue_rows(exchange: Exchange) -> int:
    """Returns the rows of a device's expert buffer in one wave."""
    mean = exchange.tokens * exchange.top_k
    most = exchange.peers * exchange.tokens * min(exchange.top_k, exchange.experts_per_peer)
    return exchange.rows_per_wave(mean, most)


def network_rows(exchange: Exchange, width: int, rows_away: float) -> float:
    """Returns the rows that a device sends to others in one exchange: its tokens to all, and its sums for all."""
    del width, rows_away
    return 2 * (exchange.peers - 1) * exchange.tokens


def plan(choices: Choices, exchange: Exchange) -> Plan:
    """Gathers all devices' choices and plans this device's share of the experts' work."""
    wave_rows = queue_rows(exchange)
    layout = (exchange.waves, exchange.chunks, wave_rows)
    choices = _gather(choices, exchange)
    assignments = choices.size
    local = choices.reshape(-1) - _first_expert(exchange)
    mine = (local >= 0) & (local < exchange.experts_per_peer)
    ordered = sort_by_expert(jnp.where(mine, local, exchange.experts_per_peer), exchange.experts_per_peer)
    length = ordered.start[-1]

    slice_of_assignment, slot = slot_in_slices(ordered.place, *layout)
    row_of_assignment, assignment_of_row, groups = jnp.full((assignments,), _NOWHERE, jnp.int32), [], []
    for index, piece in enumerate(slices_of_queue(*layout)):
        counts = piece.rows_before(ordered.start[1:]) - piece.rows_before(ordered.start[:-1])
        compaction = compact(counts[None, :], piece.rows, exchange.row_tile, exchange.expected_rows)
        place = piece.positions()
        assignment_of_slot = jnp.where(place < length, ordered.order[jnp.minimum(place, assignments - 1)], assignments)
        rows = compaction.source.shape[0]
        assignment_of_row.append(assignment_of_slot.at[compaction.source].get(mode="fill", fill_value=assignments))
        row = index * rows + compaction.target.at[slot].get(mode="clip")
        row_of_assignment = jnp.where(mine & (slice_of_assignment == index), row, row_of_assignment)
        groups.append(compaction.groups)

    received = jnp.int32((exchange.peers - 1) * exchange.tokens)
    dispatched = DispatchCounts(
        rows_sent=received,
        rows_padded=jnp.zeros_like(received),
        rows_dropped=jnp.maximum(length - exchange.waves * wave_rows, 0),
        waves_needed=divide(length + (wave_rows - 1), wave_rows)[0],
    )
    return Plan(jnp.stack(assignment_of_row), row_of_assignment.reshape(choices.shape), groups, dispatched)


def pack(tokens: TokenRows, plan: Plan, exchange: Exchange) -> TokenRows:
    """Returns the tokens as they are: everyone receives them all."""
    del plan, exchange
    return tokens


def move(tokens: TokenRows, plan: Plan, exchange: Exchange) -> EveryonesRows:
    """Gathers all devices' tokens, once for all slices."""
    del plan
    with jax.named_scope("dispatch"):
        return _gather(tokens, exchange)


def receive(everyones: EveryonesRows, plan: Plan, exchange: Exchange) -> list[Batch]:
    """Lays out each slice's rows for the experts."""
    rows = plan.assignment_of_row.shape[1]
    batches = []
    for index, groups in enumerate(plan.groups):
        readers = within_slice(plan.row_of_assignment, index, rows)
        token_of_row, _ = divide(plan.assignment_of_row[index], exchange.top_k)
        batches.append(Batch(take_rows(everyones, token_of_row, readers), groups))
    return batches


def pack_back(
    outputs: Sequence[Rows], batches: Sequence[Batch], weights: Weights, plan: Plan, exchange: Exchange
) -> EveryonesRows:
    """Adds this device's experts up for every token of all devices."""
    del batches
    return weighted_sum_rows(
        jnp.concatenate(outputs), _gather(weights, exchange), plan.row_of_assignment, plan.assignment_of_row.reshape(-1)
    )


def move_back(partial: EveryonesRows, plan: Plan, exchange: Exchange) -> TokenRows:
    """Scatters the sums to the tokens' own devices, adding up over the experts' devices."""
    del plan
    if exchange.peers == 1:
        return partial
    with jax.named_scope("combine"):
        return crossed(jax.lax.psum_scatter(partial, EXPERT, scatter_dimension=0, tiled=True))


def combine(sums: TokenRows, weights: Weights, plan: Plan, exchange: Exchange) -> TokenRows:
    """Returns the sums as they are: they were added up before they were sent."""
    del weights, plan, exchange
    return sums


def _gather(values: Array, exchange: Exchange) -> Array:
    if exchange.peers == 1:
        return values
    return crossed(jax.lax.all_gather(values, EXPERT, axis=0, tiled=True))


def _first_expert(exchange: Exchange) -> Int32[Array, ""]:
    if exchange.peers == 1:
        return jnp.int32(0)
    return jax.lax.axis_index(EXPERT).astype(jnp.int32) * exchange.experts_per_peer
