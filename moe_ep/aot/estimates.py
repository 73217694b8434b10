"""Predicted seconds of the schedule's entries, from the project's kernel and network models."""

from moe_ep.aot.timeline import Estimates
from moe_ep.config import ClusterConfig
from moe_ep.cost.entries import collective_seconds, compute_seconds
from moe_ep.cost.kernels import KernelTable, load_table
from moe_ep.cost.network import NCCL, Fabric, NetworkParameters

KERNELS = "h200_moe_ep"


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
        return float(compute_seconds(entry, kernels, gpu))

    def network_s(entry: dict) -> float:
        return float(collective_seconds(entry, fabric, network))

    return Estimates(compute_s, network_s)
