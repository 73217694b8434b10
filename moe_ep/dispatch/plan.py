"""Integers only: which row stands where, by sorting. Memory is linear in tokens x top-k."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Int32

from moe_ep.kernels.grouped_matmul import RowGroups, first_rows, make_row_groups, tiles_needed
from moe_ep.shapes import ExpertCounts


class SortedAssignments(NamedTuple):
    """The (token, choice) pairs of a device in the order of their expert."""

    order: Int32[Array, "A"]  # the flat (token, choice) position at each place of the order
    place: Int32[Array, "A"]  # the inverse: the place of each flat position
    start: Int32[Array, "E1"]  # the place where each expert's run begins, and the end of the last


def sort_by_expert(expert_of_assignment: Int32[Array, "A"], experts: int) -> SortedAssignments:
    """Sorts assignments by expert, stably; an expert id of `experts` or more stands after all runs."""
    assignments = jnp.arange(expert_of_assignment.shape[0], dtype=jnp.int32)
    order = jnp.argsort(expert_of_assignment, stable=True).astype(jnp.int32)
    place = jnp.zeros_like(assignments).at[order].set(assignments, unique_indices=True)
    end = jnp.cumsum(_count(expert_of_assignment, experts), dtype=jnp.int32)
    return SortedAssignments(order, place, jnp.concatenate([jnp.zeros_like(end[:1]), end]))


def count_experts(choices: Int32[Array, "t K"], experts: int) -> ExpertCounts:
    """Returns how many assignments each expert has."""
    return _count(choices.reshape(-1), experts)


def _count(expert_of_assignment: Int32[Array, "A"], experts: int) -> ExpertCounts:
    return jnp.zeros((experts,), jnp.int32).at[expert_of_assignment].add(1, mode="drop")


class SliceOfQueue(NamedTuple):
    """A slice of every queue: within its wave of `rows_per_wave` positions, every `chunks`-th from `chunk` on."""

    wave: int
    chunk: int
    chunks: int
    rows_per_wave: int

    @property
    def rows(self) -> int:
        return self.rows_per_wave // self.chunks

    def positions(self) -> Int32[Array, "C"]:
        """Returns the queue positions that the slice's rows hold."""
        row = jnp.arange(self.rows, dtype=jnp.int32)
        return self.wave * self.rows_per_wave + row * self.chunks + self.chunk

    def rows_before(self, position: Int32[Array, "..."]) -> Int32[Array, "..."]:
        """Returns how many of the slice's rows hold a queue position under the given one."""
        in_wave = jnp.clip(position - self.wave * self.rows_per_wave, 0, self.rows_per_wave)
        return lax.div(in_wave + (self.chunks - 1 - self.chunk), jnp.int32(self.chunks))


def slices_of_queue(waves: int, chunks: int, rows_per_wave: int) -> list[SliceOfQueue]:
    """Returns the slices in the order they are sent: wave by wave, chunk by chunk."""
    return [SliceOfQueue(wave, chunk, chunks, rows_per_wave) for wave in range(waves) for chunk in range(chunks)]


def slot_in_slices(position: Int32[Array, "..."], waves: int, chunks: int, rows_per_wave: int) -> tuple[Array, Array]:
    """Returns (slice, row) of a queue position; slice is `waves x chunks` for one that no wave takes."""
    wave, in_wave = divide(position, rows_per_wave)
    row, chunk = divide(in_wave, chunks)
    return jnp.where(wave < waves, wave * chunks + chunk, waves * chunks), row


def divide(values: Int32[Array, "..."], by: int) -> tuple[Int32[Array, "..."], Int32[Array, "..."]]:
    """Returns quotient and remainder of values that are not negative; `//` would compile a sign's handling too."""
    quotient = lax.div(values, jnp.int32(by))
    return quotient, values - quotient * by


def within_slice(slot: Int32[Array, "..."], index: int, slots: int) -> Int32[Array, "..."]:
    """Returns slots of all slices as slots of one; `slots`, out of range, for those of others."""
    local = slot - index * slots
    return jnp.where((local >= 0) & (local < slots), local, slots)


class Compaction(NamedTuple):
    """Where received rows go so that each group's rows are contiguous and start at a tile."""

    source: Int32[Array, "R"]  # the (segment, row) that each compact row comes from, flat; out of range: pad
    target: Int32[Array, "M"]  # the inverse: the compact row of each (segment, row); out of range: no row
    groups: RowGroups


def compact(counts: Int32[Array, "P e"], rows_per_segment: int, tile: int, expected_rows: int) -> Compaction:
    """Plans the move from segments to the aligned-contiguous layout of the expert kernels.

    A segment comes from one sender; its rows are sorted by expert and stand at its
    front. In the compact buffer rows are sorted by expert, then sender.

    Args:
      counts: rows of each segment for each expert of this device.
      rows_per_segment: the most rows a segment holds.
      tile: rows of a tile; every group starts at a multiple of it.
      expected_rows: of all segments together.
    """
    segments, experts = counts.shape
    tiles = tiles_needed(segments * rows_per_segment, experts, tile)
    group_rows = jnp.sum(counts, axis=0, dtype=jnp.int32)
    groups = make_row_groups(group_rows, tile, tiles, expected_rows)
    run_start = first_rows(group_rows, tile)[None, :] + _exclusive_sum(counts, axis=0)  # of (segment, expert) in the compact buffer
    segment_start = _exclusive_sum(counts, axis=1)  # of (segment, expert) in its segment

    row = jnp.arange(rows_per_segment, dtype=jnp.int32)
    expert_of_row = _runs_over(jnp.cumsum(counts, axis=1, dtype=jnp.int32), rows_per_segment)
    valid = expert_of_row < experts
    expert_of_row = jnp.minimum(expert_of_row, experts - 1)
    shift = jnp.take_along_axis(run_start - segment_start, expert_of_row, axis=1)
    target = jnp.where(valid, row[None, :] + shift, tiles * tile)

    flat = jnp.arange(segments * rows_per_segment, dtype=jnp.int32)
    nowhere = jnp.full((tiles * tile,), segments * rows_per_segment, jnp.int32)
    source = nowhere.at[target.reshape(-1)].set(flat, mode="drop")
    return Compaction(source, target.reshape(-1), groups)


def _runs_over(run_end: Int32[Array, "P e"], rows: int) -> Int32[Array, "P C"]:
    """Returns for every row of a segment how many runs end at it or before."""
    segment = jnp.arange(run_end.shape[0], dtype=jnp.int32)[:, None]
    ends = jnp.zeros((run_end.shape[0], rows), jnp.int32).at[segment, run_end].add(1, mode="drop")
    return jnp.cumsum(ends, axis=1, dtype=jnp.int32)


def _exclusive_sum(values: Array, axis: int = 0) -> Array:
    return (jnp.cumsum(values, axis=axis) - values).astype(values.dtype)
