"""Predicted seconds of the schedule's entries, from the project's kernel and network models."""

import numpy as np

from moe_ep.aot.timeline import Estimates
from moe_ep.config import ClusterConfig
from moe_ep.cost.kernels import KernelTable, Work, gemm, load_table, memory_pass
from moe_ep.cost.network import (
    NCCL,
    Fabric,
    NetworkParameters,
    all_reduce_seconds,
    all_to_all_seconds,
    direct_traffic,
    gather_seconds,
    send_seconds,
)

_EXCHANGES = ("all_to_all", "ragged_all_to_all")
KERNELS = "h200_bf16"


def make_estimates(
    cluster: ClusterConfig, kernels: KernelTable | None = None, network: NetworkParameters = NCCL
) -> Estimates:
    """Returns the estimates for a cluster.

    Args:
      cluster: GPUs and links.
      kernels: measured utilisations, scaled to the cluster's GPU; None takes this project's own.
      network: what the communication library makes of the links.
    """
    kernels = kernels or load_table(KERNELS)
    gpu = cluster.device
    fabric = Fabric(gpu, cluster.gpus_per_node, cluster.nics_per_node, cluster.nic_gigabits_per_s * 1e9 / 8)

    def compute_s(entry: dict) -> float:
        return float(sum(kernels.seconds(work, gpu) for work in _works(entry)))

    def network_s(entry: dict) -> float:
        return float(collective_seconds(entry, fabric, network))

    return Estimates(compute_s, network_s)


def _works(entry: dict) -> list[Work]:
    """An instruction as kernel calls; bytes beyond the products' own operands count as a pass of their own."""
    products = [gemm(rows, inner, columns, "bf16", groups=batch) for rows, columns, inner, batch in entry["gemms"]]
    if attention := entry["attention"]:
        op = "attention_backward" if attention["backward"] else "attention"
        shape = (attention["context"], attention["head_dim"])
        products = [Work(op, "bf16", attention["flops"], entry["bytes"], shape)]
    rest = entry["bytes"] - sum(work.bytes for work in products)
    return products + ([memory_pass(rest)] if rest > 0 else [])


def collective_seconds(entry: dict, fabric: Fabric, network: NetworkParameters) -> float:
    """Returns the seconds of one execution of a collective under even routing."""
    op, payload, group, stride = entry["op"], entry["bytes"], entry["group_size"], entry["group_stride"]
    if op in _EXCHANGES:
        members = stride * np.arange(group)
        gpus = int(members[-1]) + 1
        matrix = np.zeros((gpus, gpus))
        # Groups side by side share the NICs: every GPU of the span exchanges with its own group.
        for first in range(stride):
            mine = members + first
            mine = mine[mine < gpus]
            matrix[np.ix_(mine, mine)] = payload / group
        return all_to_all_seconds(direct_traffic(matrix, fabric), fabric, network)
    if op == "all_reduce":
        return all_reduce_seconds(payload, group, fabric, network, stride)
    if op == "collective_permute":
        return send_seconds(payload, fabric, network)
    return gather_seconds(payload, group, fabric, network, stride)
