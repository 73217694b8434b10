"""The static sizes of one routed layer's exchange, and what it counts."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from moe_ep.config import DispatchConfig
from moe_ep.mesh import ALL_AXES
from moe_ep.shapes import Count

LEAST_ROW_TILE = 64  # that a GPU kernel takes


@dataclasses.dataclass(frozen=True)
class Exchange:
    """How many rows one device's buffers hold; every size is known when the program is traced.

    A queue is what one device has for one destination. Queues are sent in waves,
    and a wave in chunks; a (wave, chunk) pair is a slice, one dispatch and one
    combine on the network. Chunks take a queue's rows in turn (row i goes to chunk
    i mod chunks), so that all chunks of a wave carry equal load.
    """

    experts: int  # of a layer
    peers: int  # devices on the expert axis
    tokens: int  # on this device
    top_k: int
    transport: str = "all_to_all"
    waves: int = 1
    chunks: int = 1
    margin_sigmas: float = 5.0

    @property
    def experts_per_peer(self) -> int:
        return self.experts // self.peers

    @property
    def slices(self) -> int:
        return self.waves * self.chunks

    @property
    def expected_rows(self) -> int:
        """The rows of a slice that a device's experts get if all get as many."""
        return self.tokens * self.top_k // self.slices

    @property
    def row_tile(self) -> int:
        """The tile of the experts' rows: 128, or the least for smaller groups."""
        return 128 if self.expected_rows >= 128 * self.experts_per_peer else LEAST_ROW_TILE

    def rows_per_wave(self, mean: float, most: int) -> int:
        """Returns the rows of a queue that one wave takes: mean + margin sqrt(mean) + 1, never over the most there can be."""
        rows = min(math.ceil(mean + self.margin_sigmas * math.sqrt(mean)) + 1, most)
        return -(-rows // self.chunks) * self.chunks

    def with_waves(self, waves: int) -> "Exchange":
        return dataclasses.replace(self, waves=waves)


class DispatchCounts(NamedTuple):
    """What one device's exchange of one layer moved; add up over devices and layers, but take the most of waves.

    rows_sent are real rows, rows_padded the rest of the buffers that crossed with
    them, rows_dropped the assignments beyond the program's waves.
    """

    rows_sent: Count
    rows_padded: Count
    rows_dropped: Count
    waves_needed: Count


def sum_counts(counts: DispatchCounts) -> DispatchCounts:
    """Returns the totals of counts stacked over layers, over all devices too; of waves the most."""
    totals = jax.tree.map(lambda count: jax.lax.psum(jnp.sum(count), ALL_AXES), counts)
    return totals._replace(waves_needed=jax.lax.pmax(jnp.max(counts.waves_needed), ALL_AXES))


def make_exchange(dispatch: DispatchConfig, *, experts: int, peers: int, tokens: int, top_k: int) -> Exchange:
    """Returns the sizes for `tokens` on each of `peers` devices."""
    return Exchange(
        experts=experts,
        peers=peers,
        tokens=tokens,
        top_k=top_k,
        transport=transport_of(dispatch, peers),
        waves=dispatch.waves,
        chunks=dispatch.chunks if dispatch.overlap == "chunks" else 1,
        margin_sigmas=dispatch.margin_sigmas,
    )


def transport_of(dispatch: DispatchConfig, peers: int) -> str:
    """Returns the transport that is used: on one device no row travels, each is gathered once, as all_gather's receivers do."""
    return dispatch.transport if peers > 1 else "all_gather"


# What arrived by a collective, under the name by which a backward pass may keep it.
CROSSED = "crossed_the_network"


def crossed(values: Array) -> Array:
    """Names what a collective delivered, so that a backward pass that computes a layer again need not send again."""
    return checkpoint_name(values, CROSSED)


def end_pair(moved: Any, work: Any) -> tuple[Any, Any]:
    """Lets nothing that follows use either what was moved or the work beside it before both are done.

    A barrier transposes to a barrier, so a backward pass has the same pairs in reverse.
    """
    # A backward pass keeps what was moved. It is stored after the work: storing it first
    # would end the exchange first.
    moved, _ = jax.lax.optimization_barrier((moved, work))
    return jax.lax.optimization_barrier((jax.tree.map(crossed, moved), work))
