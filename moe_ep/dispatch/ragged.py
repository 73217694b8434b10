"""Exact all-to-all: every pair of devices exchanges just the rows it has for each other.

All devices gather one another's counts, a few bytes each, so every sender knows
where its rows belong in every receiver's buffer: they arrive sorted by expert, in
the layout the experts' kernels take, and nothing is padded or compacted. A wave is
what a receiver's buffer holds; rows beyond it wait for the next.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int32

from moe_ep.dispatch.exchange import DispatchCounts, Exchange, crossed
from moe_ep.dispatch.permute import take_rows, weighted_sum_rows
from moe_ep.dispatch.plan import divide, sort_by_expert
from moe_ep.kernels.device import device_kind
from moe_ep.kernels.grouped_matmul import RowGroups, first_rows, make_row_groups, tiles_needed
from moe_ep.mesh import EXPERT, vary
from moe_ep.shapes import Choices, Rows, TokenRows, Weights


PLANS_ALONE = False

SortedRows = Float[Array, "A D"]  # one row an assignment, in the order of their expert


class Runs(NamedTuple):
    """The runs that one device sends in a wave, [peer, expert] flattened: from, how many, to which row there."""

    first_row: Int32[Array, "G"]
    rows: Int32[Array, "G"]
    target_row: Int32[Array, "G"]


class Wave(NamedTuple):
    """One wave's runs: those that go out, and those that this device's experts send back."""

    out: Runs
    back: Runs


class Plan(NamedTuple):
    """Where each assignment stands in the order by expert, and the runs of every wave."""

    assignment_of_row: Int32[Array, "A"]
    row_of_assignment: Int32[Array, "t K"]
    waves: list[Wave]
    groups: list[RowGroups]
    counts: DispatchCounts


class Batch(NamedTuple):
    """One wave's rows as the experts take them."""

    rows: Rows
    groups: RowGroups


def queue_rows(exchange: Exchange) -> int:
    """Returns the rows of a device's expert buffer in one wave."""
    most = exchange.peers * exchange.tokens * min(exchange.top_k, exchange.experts_per_peer)
    return exchange.rows_per_wave(exchange.tokens * exchange.top_k, most)


def network_rows(exchange: Exchange, width: int, rows_away: float) -> float:
    """Returns the rows that a device sends to others in one exchange, out and back: those it has for them."""
    del exchange, width
    return 2 * rows_away


def plan(choices: Choices, exchange: Exchange) -> Plan:
    """Sorts this device's assignments and, from everyone's counts, places every run in its receiver's buffer."""
    ordered = sort_by_expert(choices.reshape(-1), exchange.experts)
    counts = jnp.diff(ordered.start).astype(jnp.int32)
    everyones = _gather(counts).reshape(exchange.peers, exchange.peers, exchange.experts_per_peer)
    capacity, me = queue_rows(exchange), _my_index()
    waves, groups = zip(*(_wave(everyones, wave, capacity, me, exchange) for wave in range(exchange.waves)), strict=True)
    received = jnp.sum(everyones, axis=(0, 2), dtype=jnp.int32)
    sent = sum(jnp.sum(wave.out.rows, dtype=jnp.int32) for wave in waves)
    dispatched = DispatchCounts(
        rows_sent=sent,
        rows_padded=jnp.zeros_like(sent),
        rows_dropped=ordered.start[-1] - sent,
        waves_needed=divide(jnp.max(received) + (capacity - 1), capacity)[0],
    )
    return Plan(ordered.order, ordered.place.reshape(choices.shape), list(waves), list(groups), dispatched)


def _wave(
    everyones: Int32[Array, "P P e"], wave: int, capacity: int, me: Int32[Array, ""], exchange: Exchange
) -> tuple[Wave, RowGroups]:
    """Returns one wave's runs; a receiver's queue is in order of source, then expert."""
    by_receiver = jnp.transpose(everyones, (1, 0, 2)).reshape(exchange.peers, -1)  # [receiver, source x expert]
    end = jnp.cumsum(by_receiver, axis=1, dtype=jnp.int32)
    first, last = wave * capacity, (wave + 1) * capacity
    skipped = jnp.clip(first - (end - by_receiver), 0, by_receiver)  # rows of a run that earlier waves took
    rows = jnp.clip(end, first, last) - jnp.clip(end - by_receiver, first, last)
    rows = rows.reshape(everyones.shape[1], exchange.peers, -1)
    skipped = skipped.reshape(rows.shape)

    tile, tiles = _tiling(exchange)
    per_group = jnp.sum(rows, axis=1, dtype=jnp.int32)  # [receiver, expert]
    start = jax.vmap(lambda sizes: first_rows(sizes, tile))(per_group)
    before = jnp.cumsum(rows, axis=1, dtype=jnp.int32) - rows  # of earlier sources, by expert
    place = start[:, None, :] + before  # [receiver, source, expert]

    # A sender's rows are sorted by (receiver, expert): where each run starts there.
    runs = everyones.reshape(exchange.peers, -1)  # [source, receiver x expert]
    begins = (jnp.cumsum(runs, axis=1, dtype=jnp.int32) - runs).reshape(everyones.shape)
    sender_place = begins + jnp.transpose(skipped, (1, 0, 2))  # [source, receiver, expert]

    groups = make_row_groups(jnp.take(per_group, me, axis=0), tile, tiles, exchange.expected_rows)
    out = Runs(jnp.take(sender_place, me, axis=0), jnp.take(rows, me, axis=1), jnp.take(place, me, axis=1))
    back = Runs(jnp.take(place, me, axis=0), jnp.take(rows, me, axis=0), jnp.take(sender_place, me, axis=1))
    flat = lambda runs: Runs(*(part.reshape(-1) for part in runs))  # noqa: E731
    return Wave(flat(out), flat(back)), groups


def _tiling(exchange: Exchange) -> tuple[int, int]:
    return exchange.row_tile, tiles_needed(queue_rows(exchange), exchange.experts_per_peer, exchange.row_tile)


def pack(tokens: TokenRows, plan: Plan, exchange: Exchange) -> SortedRows:
    """Returns this device's rows, one an assignment, in the order of their expert."""
    token_of_row, _ = divide(plan.assignment_of_row, exchange.top_k)
    return take_rows(tokens, token_of_row, plan.row_of_assignment)


def move(rows: SortedRows, plan: Plan, exchange: Exchange) -> list[Rows]:
    """Sends every run to its place in its expert's buffer, one exchange a wave."""
    tile, tiles = _tiling(exchange)
    with jax.named_scope("dispatch"):
        return [_exchange(rows, wave.out, wave.back, tile * tiles) for wave in plan.waves]


def receive(arrived: Sequence[Rows], plan: Plan, exchange: Exchange) -> list[Batch]:
    """Returns what arrived, which stands as the experts take it."""
    del exchange
    return [Batch(rows, groups) for rows, groups in zip(arrived, plan.groups, strict=True)]


def pack_back(
    outputs: Sequence[Rows], batches: Sequence[Batch], weights: Weights, plan: Plan, exchange: Exchange
) -> list[Rows]:
    """Returns the outputs as they are."""
    del batches, weights, plan, exchange
    return list(outputs)


def move_back(outputs: Sequence[Rows], plan: Plan, exchange: Exchange) -> list[SortedRows]:
    """Returns every run to where its sender has it, one exchange a wave."""
    del exchange
    rows = plan.assignment_of_row.shape[0]
    with jax.named_scope("combine"):
        return [
            _exchange(output, wave.back, wave.out, rows)
            for output, wave in zip(outputs, plan.waves, strict=True)
        ]


def combine(returned: Sequence[SortedRows], weights: Weights, plan: Plan, exchange: Exchange) -> TokenRows:
    """Adds each token's choices up by weight; each row came back in one wave, the others hold zeros there."""
    del exchange
    rows = returned[0]
    for later in returned[1:]:
        rows = rows + later
    return weighted_sum_rows(rows, weights, plan.row_of_assignment, plan.assignment_of_row)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _exchange(rows: SortedRows, out: Runs, back: Runs, target_rows: int) -> Rows:
    """Sends runs into the peers' buffers of `target_rows` rows, zero where none arrives; `back` undoes `out`."""
    move_runs = _EXCHANGES["cpu" if device_kind() == "cpu" else "gpu"]
    return crossed(move_runs(rows, out, back, target_rows))


def _exchange_forward(rows, out, back, target_rows):
    return _exchange(rows, out, back, target_rows), (out, back, jnp.zeros((rows.shape[0], 0), rows.dtype))


def _exchange_backward(target_rows, saved, gradient):
    out, back, like = saved
    return _exchange(gradient, back, out, like.shape[0]), None, None


_exchange.defvjp(_exchange_forward, _exchange_backward)


def _move_native(rows: SortedRows, out: Runs, back: Runs, target_rows: int) -> Rows:
    buffer = vary(jnp.zeros((target_rows, rows.shape[1]), rows.dtype))
    return jax.lax.ragged_all_to_all(
        rows, buffer, out.first_row, out.rows, out.target_row, back.rows, axis_name=EXPERT
    )


def _move_emulated(rows: SortedRows, out: Runs, back: Runs, target_rows: int) -> Rows:
    """What the collective does, by gathering everything: XLA:CPU has no ragged all-to-all."""
    del back
    me = jax.lax.axis_index(EXPERT)
    peers = jax.lax.axis_size(EXPERT)
    everyones = jax.lax.all_gather(rows, EXPERT, axis=0)
    # Of every sender, the runs that come here: [sender, expert].
    first, count, target = (
        jax.lax.all_gather(part.reshape(peers, -1), EXPERT, axis=0)[:, me] for part in out
    )
    return _place_runs(everyones, first, count, target, target_rows)


def _place_runs(everyones: Float[Array, "P A D"], first: Array, count: Array, target: Array, target_rows: int) -> Rows:
    """Copies rows [first, first + count) of each sender to [target, target + count); O(runs x rows)."""
    row = jnp.arange(target_rows, dtype=jnp.int32)[None, None, :]
    inside = (row >= target[:, :, None]) & (row < (target + count)[:, :, None])
    sender = jnp.arange(everyones.shape[0], dtype=jnp.int32)[:, None, None]
    source = sender * everyones.shape[1] + first[:, :, None] + row - target[:, :, None]
    index = jnp.sum(jnp.where(inside, source + 1, 0), axis=(0, 1), dtype=jnp.int32) - 1
    flat = everyones.reshape(-1, everyones.shape[-1])
    return flat.at[jnp.where(index < 0, flat.shape[0], index)].get(mode="fill", fill_value=0)


_EXCHANGES = {"gpu": _move_native, "cpu": _move_emulated}


def _gather(values: Array) -> Array:
    with jax.named_scope("counts"):
        return crossed(jax.lax.all_gather(values, EXPERT, axis=0, tiled=True))


def _my_index() -> Int32[Array, ""]:
    return jax.lax.axis_index(EXPERT).astype(jnp.int32)
