"""Fixed-size all-to-all: every pair of devices exchanges the same number of rows.

A slice costs exactly two all-to-alls, one out and one back. The rows that a
segment really holds travel with it, in header rows, so that the receiver can
compact without a third collective.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int32

from moe_ep.dispatch.exchange import DispatchCounts, Exchange, crossed
from moe_ep.dispatch.permute import take_rows, weighted_sum_rows
from moe_ep.dispatch.plan import Compaction, compact, divide, slices_of_queue, slot_in_slices, sort_by_expert, within_slice
from moe_ep.kernels.grouped_matmul import RowGroups
from moe_ep.mesh import EXPERT
from moe_ep.shapes import Choices, Rows, TokenRows, Weights

# A count travels as base-128 digits: whole numbers up to 256 are exact in bfloat16.
_DIGIT_BASE, _DIGITS = 128, 3

PLANS_ALONE = True  # what receivers must know travels with the rows


class Plan(NamedTuple):
    """Where each assignment stands in the buffers of all slices, [slice, destination, row] flattened."""

    assignment_of_slot: Int32[Array, "X M"]  # X slices of M = P x C rows; out of range: no row
    slot_of_assignment: Int32[Array, "t K"]  # out of range: no slice takes it
    counts_of_slice: Int32[Array, "X P e"]
    counts: DispatchCounts


class Batch(NamedTuple):
    """One slice's rows as the experts take them, and the way back."""

    rows: Rows
    groups: RowGroups
    compaction: Compaction


def queue_rows(exchange: Exchange) -> int:
    """Returns C, the rows of one (source, destination) buffer in one wave."""
    mean = exchange.tokens * exchange.top_k / exchange.peers
    return exchange.rows_per_wave(mean, exchange.tokens * min(exchange.top_k, exchange.experts_per_peer))


def network_rows(exchange: Exchange, width: int, rows_away: float) -> float:
    """Returns the rows that a device sends to others in one exchange, out and back: whole buffers, whatever they hold."""
    del rows_away
    out_and_back = 2 * queue_rows(exchange) * exchange.waves
    headers = _header_rows(exchange.experts_per_peer, width) * exchange.slices
    return (exchange.peers - 1) * (out_and_back + headers)


def plan(choices: Choices, exchange: Exchange) -> Plan:
    """Plans the exchange of this device's assignments; the same at any number of waves for those that fit."""
    wave_rows = queue_rows(exchange)
    layout = (exchange.waves, exchange.chunks, wave_rows)
    assignments = choices.size
    ordered = sort_by_expert(choices.reshape(-1), exchange.experts)
    queue_start = ordered.start[:: exchange.experts_per_peer]
    queue_length = jnp.diff(queue_start)

    destination, _ = divide(choices.reshape(-1), exchange.experts_per_peer)
    slice_index, row = slot_in_slices(ordered.place - queue_start[destination], *layout)
    rows = wave_rows // exchange.chunks
    slot = jnp.where(
        (slice_index < exchange.slices) & (destination < exchange.peers),
        (slice_index * exchange.peers + destination) * rows + row,
        exchange.slices * exchange.peers * rows,
    )

    run_start = ordered.start[:-1].reshape(exchange.peers, -1) - queue_start[:-1, None]
    run_end = ordered.start[1:].reshape(exchange.peers, -1) - queue_start[:-1, None]
    assignment_of_slot, counts_of_slice = [], []
    for piece in slices_of_queue(*layout):
        position = piece.positions()[None, :]
        place = jnp.minimum(queue_start[:-1, None] + position, assignments - 1)
        held = position < queue_length[:, None]
        assignment_of_slot.append(jnp.where(held, ordered.order[place], assignments).reshape(-1))
        counts_of_slice.append(piece.rows_before(run_end) - piece.rows_before(run_start))

    sent = jnp.sum(jnp.minimum(queue_length, exchange.waves * wave_rows), dtype=jnp.int32)
    counts = DispatchCounts(
        rows_sent=sent,
        rows_padded=exchange.slices * exchange.peers * rows - sent,
        rows_dropped=queue_start[-1] - sent,
        waves_needed=divide(jnp.max(queue_length) + (wave_rows - 1), wave_rows)[0],
    )
    return Plan(
        jnp.stack(assignment_of_slot), slot.reshape(choices.shape), jnp.stack(counts_of_slice), counts
    )


def pack(tokens: TokenRows, plan: Plan, exchange: Exchange) -> list[Float[Array, "P C1 D"]]:
    """Lays out each slice's rows by destination, behind the counts that travel with them."""
    slots, width = plan.assignment_of_slot.shape[1], tokens.shape[-1]
    header_rows = _header_rows(exchange.experts_per_peer, width)
    packed = []
    for index in range(exchange.slices):
        token_of_slot, _ = divide(plan.assignment_of_slot[index], exchange.top_k)
        slot_of_token = within_slice(plan.slot_of_assignment, index, slots)
        # The rows are gathered to where they stand behind the headers, and the headers put in front of them in place.
        rows = take_rows(
            tokens,
            _with_headers(token_of_slot, exchange.peers, header_rows, tokens.shape[0]),
            _behind_headers(slot_of_token, slots // exchange.peers, header_rows),
        )
        buffer = rows.reshape(exchange.peers, -1, width)
        packed.append(buffer.at[:, :header_rows].set(_encode(plan.counts_of_slice[index], width, tokens.dtype)))
    return packed


def move(packed: Sequence[Float[Array, "P C1 D"]], plan: Plan, exchange: Exchange) -> list[Float[Array, "P C1 D"]]:
    """Sends every slice to its experts' devices, one all-to-all each."""
    del plan, exchange
    with jax.named_scope("dispatch"):
        return [_exchange(buffer) for buffer in packed]


def receive(received: Sequence[Float[Array, "P C1 D"]], plan: Plan, exchange: Exchange) -> list[Batch]:
    """Compacts what arrived into the experts' layout."""
    del plan
    return [_compact_received(buffer, exchange) for buffer in received]


def _compact_received(received: Float[Array, "P C1 D"], exchange: Exchange) -> Batch:
    header_rows = _header_rows(exchange.experts_per_peer, received.shape[-1])
    counts = _decode(received[:, :header_rows], exchange.experts_per_peer)
    rows = received.shape[1] - header_rows
    compaction = compact(counts, rows, exchange.row_tile, exchange.expected_rows)
    readers = _with_headers(compaction.target, exchange.peers, header_rows, compaction.source.shape[0])
    source = _behind_headers(compaction.source, rows, header_rows)
    batch_rows = take_rows(received.reshape(-1, received.shape[-1]), source, readers[:, None])
    return Batch(batch_rows, compaction.groups, compaction)


def _with_headers(index: Int32[Array, "M"], peers: int, header_rows: int, nowhere: int) -> Int32[Array, "N"]:
    """Returns an index of every segment's rows with `nowhere` for the header rows in front of them."""
    return jnp.pad(index.reshape(peers, -1), ((0, 0), (header_rows, 0)), constant_values=nowhere).reshape(-1)


def _behind_headers(row: Int32[Array, "..."], rows_per_segment: int, header_rows: int) -> Int32[Array, "..."]:
    """Returns where rows of segments without headers stand in segments with them; one past all stays past all."""
    segment, _ = divide(row, rows_per_segment)
    return row + (segment + 1) * header_rows


def pack_back(
    outputs: Sequence[Rows], batches: Sequence[Batch], weights: Weights, plan: Plan, exchange: Exchange
) -> list[Float[Array, "P C D"]]:
    """Lays out each slice's outputs by the device they go back to."""
    del weights, plan
    packed = []
    for output, batch in zip(outputs, batches, strict=True):
        readers = batch.compaction.source[:, None]
        segments = take_rows(output, batch.compaction.target, readers)
        packed.append(segments.reshape(exchange.peers, -1, output.shape[-1]))
    return packed


def move_back(packed: Sequence[Float[Array, "P C D"]], plan: Plan, exchange: Exchange) -> list[Float[Array, "P C D"]]:
    """Returns every slice to the devices it came from, one all-to-all each."""
    del plan, exchange
    with jax.named_scope("combine"):
        return [_exchange(buffer) for buffer in packed]


def combine(
    returned: Sequence[Float[Array, "P C D"]], weights: Weights, plan: Plan, exchange: Exchange
) -> TokenRows:
    """Adds each token's choices up by weight."""
    del exchange
    rows = jnp.concatenate(returned).reshape(-1, returned[0].shape[-1])
    return weighted_sum_rows(rows, weights, plan.slot_of_assignment, plan.assignment_of_slot.reshape(-1))


def _exchange(buffer: Float[Array, "P C D"]) -> Float[Array, "P C D"]:
    return crossed(jax.lax.all_to_all(buffer, EXPERT, split_axis=0, concat_axis=0))


def _encode(counts: Int32[Array, "P e"], width: int, dtype: jnp.dtype) -> Float[Array, "P h D"]:
    """Writes counts into as few rows of the buffer's width as hold them."""
    high, low = divide(counts, _DIGIT_BASE)
    digits = jnp.stack([low, *reversed(divide(high, _DIGIT_BASE))], axis=-1).reshape(counts.shape[0], -1)
    header_rows = _header_rows(counts.shape[1], width)
    padded = jnp.pad(digits, ((0, 0), (0, header_rows * width - digits.shape[1])))
    return padded.reshape(-1, header_rows, width).astype(dtype)


def _header_rows(experts: int, width: int) -> int:
    return -(-experts * _DIGITS // width)


def _decode(header: Float[Array, "P h D"], experts: int) -> Int32[Array, "P e"]:
    digits = header.reshape(header.shape[0], -1)[:, : experts * _DIGITS].astype(jnp.int32)
    place_value = _DIGIT_BASE ** jnp.arange(_DIGITS, dtype=jnp.int32)
    return jnp.sum(digits.reshape(-1, experts, _DIGITS) * place_value[None, None, :], axis=2, dtype=jnp.int32)
