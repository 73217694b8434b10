"""All-to-all and other collectives: bytes on every link, then the busiest link and a latency.

A GPU has an NVLink port (out and in, each at the full one-way rate) and shares or
owns a NIC. What two GPUs of a node exchange crosses their NVLink ports, everything
else crosses one NIC on each side.
"""

import dataclasses
import functools
import math

import numpy as np

from moe_ep.cost.units import Number
from moe_ep.hardware import Gpu


@dataclasses.dataclass(frozen=True)
class NetworkParameters:
    """What a communication library makes of the links.

    Attributes:
      nic_efficiency, nvlink_efficiency: share of the link rate that payload reaches.
      latency_s: of one collective, however few bytes.
      latency_per_round_s: added for every `peers_per_round` peers outside the node.
      wait_s: what ranks of a training or prefill step wait for each other at a collective.
    """

    name: str
    source: str
    nic_efficiency: Number
    nvlink_efficiency: Number
    latency_s: Number
    latency_per_round_s: Number = 0.0
    peers_per_round: int = 32
    wait_s: Number = 0.0


NCCL = NetworkParameters(
    name="nccl",
    source="latencies and the 360 of 450 GB/s of NVLink on Hopper: constants of NCCL's own tuning model (ring, "
    "Simple); NIC share: the 85 % that the reference experiment assumes",
    nic_efficiency=0.85,
    nvlink_efficiency=0.80,
    latency_s=11.8e-6,  # base 8.4 us and one NVLink step of 3.4 us
    latency_per_round_s=14e-6,
)


@dataclasses.dataclass(frozen=True)
class Fabric:
    """The links of a cluster. `gpus_per_node` is the NVLink domain; rates are bytes/s one way."""

    gpu: Gpu
    gpus_per_node: int
    nics_per_node: int
    nic_bytes_per_s: Number

    @property
    def gpus_per_nic(self) -> int:
        return self.gpus_per_node // self.nics_per_node


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes of one collective at every port: NVLink per GPU; NIC per NIC of the cluster."""

    nvlink_out: np.ndarray
    nvlink_in: np.ndarray
    nic_out: np.ndarray
    nic_in: np.ndarray
    peers_outside: int

    @functools.cached_property
    def nic_bytes_per_gpu(self) -> Number:
        """The mean over GPUs of the bytes sent to other nodes."""
        return float(self.nic_out.sum() / len(self.nvlink_out))

    @functools.cached_property
    def nvlink_bytes_per_gpu(self) -> Number:
        """The mean over GPUs of the bytes sent inside the node."""
        return float(self.nvlink_out.mean())

    def scaled(self, factor: Number) -> "Traffic":
        """Returns the traffic of a part of, or of several, such collectives, or of the way back times a factor."""
        return Traffic(
            self.nvlink_out * factor, self.nvlink_in * factor, self.nic_out * factor, self.nic_in * factor,
            self.peers_outside,
        )  # fmt: skip

    def reversed(self) -> "Traffic":
        """Returns the traffic of the way back: what was received is sent."""
        return Traffic(self.nvlink_in, self.nvlink_out, self.nic_in, self.nic_out, self.peers_outside)


def direct_traffic(matrix: np.ndarray, fabric: Fabric) -> Traffic:
    """Returns the ports' bytes when every pair of GPUs exchanges directly.

    Args:
      matrix: [P, P], bytes that GPU i sends to GPU j; the diagonal stays on the GPU.
    """
    gpus = len(matrix)
    node = np.arange(gpus) // fabric.gpus_per_node
    inside = node[:, None] == node[None, :]
    near = np.where(inside, matrix, 0.0)
    np.fill_diagonal(near, 0.0)
    far = np.where(inside, 0.0, matrix)
    return Traffic(
        near.sum(axis=1), near.sum(axis=0),
        _by_nic(far.sum(axis=1), fabric), _by_nic(far.sum(axis=0), fabric),
        max(gpus - fabric.gpus_per_node, 0),
    )  # fmt: skip


def node_aggregated_traffic(to_nodes: np.ndarray, near: np.ndarray, fabric: Fabric) -> Traffic:
    """Returns the ports' bytes when a row crosses to each node once and is copied on by NVLink there.

    Args:
      to_nodes: [P, nodes], bytes that GPU i sends to each node, its own column ignored.
      near: [P, P], bytes that GPU i's rows need on GPU j; those that arrived by NIC are
        forwarded by the GPU of i's rank in j's node, so they load that GPU's port.
    """
    gpus, nodes = to_nodes.shape
    width = fabric.gpus_per_node
    node, rank = np.arange(gpus) // width, np.arange(gpus) % width
    far = np.where(node[:, None] == np.arange(nodes)[None, :], 0.0, to_nodes)
    received = np.zeros(gpus)
    forwarded, delivered = np.zeros(gpus), np.zeros(gpus)
    for source in range(gpus):
        gateways = np.minimum(np.arange(nodes) * width + rank[source], gpus - 1)
        gateways[node[source]] = source
        received[gateways] += far[source]
        through = gateways[node]  # the GPU that holds source's rows in each destination's node
        moved = np.where(through == np.arange(gpus), 0.0, near[source])
        np.add.at(forwarded, through, moved)
        delivered += moved
    return Traffic(
        forwarded, delivered, _by_nic(far.sum(axis=1), fabric), _by_nic(received, fabric),
        max(gpus - width, 0),
    )  # fmt: skip


def _by_nic(per_gpu: np.ndarray, fabric: Fabric) -> np.ndarray:
    share = fabric.gpus_per_nic
    padded = np.zeros(-(-len(per_gpu) // share) * share)
    padded[: len(per_gpu)] = per_gpu
    return padded.reshape(-1, share).sum(axis=1)


def all_to_all_seconds(traffic: Traffic, fabric: Fabric, parameters: NetworkParameters) -> Number:
    """Returns the busiest link's time plus latency; nothing when no byte leaves a GPU."""
    nvlink = max(traffic.nvlink_out.max(), traffic.nvlink_in.max())
    nic = max(traffic.nic_out.max(), traffic.nic_in.max())
    if nvlink == 0 and nic == 0:
        return 0.0
    transfer = max(
        nvlink / (fabric.gpu.nvlink_bytes_per_s * parameters.nvlink_efficiency),
        nic / (fabric.nic_bytes_per_s * parameters.nic_efficiency),
    )
    rounds = math.ceil(traffic.peers_outside / parameters.peers_per_round)
    return transfer + parameters.latency_s + rounds * parameters.latency_per_round_s + parameters.wait_s


def gather_seconds(
    bytes_gathered: Number, group: int, fabric: Fabric, parameters: NetworkParameters, stride: int = 1
) -> Number:
    """Returns the time of an all-gather, or of a reduce-scatter, of so many bytes over a group.

    Every GPU receives (group - 1) / group of the bytes; inside a node over NVLink, across
    nodes in a ring whose slowest link is the NIC, which each of the node's GPUs loads
    when the group has one member per node (stride = GPUs per node).

    Args:
      bytes_gathered: the whole gathered array (of a reduce-scatter: the array reduced), per GPU.
      group: members of the group; stride: distance between neighbouring members.
    """
    if group <= 1 or bytes_gathered == 0:
        return 0.0
    moved = bytes_gathered * (group - 1) / group
    spans_nodes = group * stride > fabric.gpus_per_node
    if not spans_nodes:
        rate = fabric.gpu.nvlink_bytes_per_s * parameters.nvlink_efficiency
        return moved / rate + parameters.latency_s
    members_in_node = max(fabric.gpus_per_node // stride, 1)
    # Rings enter a node once for all its members; groups side by side share the NICs.
    nics_for_group = max(fabric.nics_per_node * members_in_node / fabric.gpus_per_node, 1e-9)
    rate = fabric.nic_bytes_per_s * parameters.nic_efficiency * nics_for_group
    rate = min(rate, fabric.gpu.nvlink_bytes_per_s * parameters.nvlink_efficiency) if members_in_node > 1 else rate
    rounds = math.ceil(group * stride / fabric.gpus_per_node / parameters.peers_per_round)
    return moved / rate + parameters.latency_s + rounds * parameters.latency_per_round_s


def all_reduce_seconds(
    reduced_bytes: Number, group: int, fabric: Fabric, parameters: NetworkParameters, stride: int = 1
) -> Number:
    """Returns the time of an all-reduce as a reduce-scatter and an all-gather."""
    return 2 * gather_seconds(reduced_bytes, group, fabric, parameters, stride)


def send_seconds(sent_bytes: Number, fabric: Fabric, parameters: NetworkParameters) -> Number:
    """Returns the time of a send to another node when all GPUs of the node send at once."""
    if sent_bytes == 0:
        return 0.0
    transfer = sent_bytes * fabric.gpus_per_nic / (fabric.nic_bytes_per_s * parameters.nic_efficiency)
    return transfer + parameters.latency_s + parameters.latency_per_round_s
