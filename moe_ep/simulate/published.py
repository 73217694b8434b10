"""Published systems as scenarios: DeepSeek-V3, the clusters it ran on, and the software's parameters."""

import dataclasses
import functools

from moe_ep.config import AttentionConfig, ModelConfig, MoEConfig
from moe_ep.cost.kernels import load_table
from moe_ep.cost.network import Fabric, NetworkParameters
from moe_ep.cost.recipe import DEEPSEEK, MEGATRON_BF16
from moe_ep.cost.work import BF16, FP8
from moe_ep.hardware import GPUS
from moe_ep.simulate.scenario import Stack

# arXiv:2412.19437, section 4.2, and the published config.json.
DEEPSEEK_V3 = ModelConfig(
    layers=61,
    dense_layers=3,
    width=7168,
    hidden=18432,
    activation="silu_gated",
    vocabulary=129280,
    attention=AttentionConfig(
        heads=128, nope_dim=128, rope_dim=64, value_dim=128, latent_dim=512, query_latent_dim=1536,
        rope_layout="interleaved",
    ),
    moe=MoEConfig(
        num_experts=256, top_k=8, hidden=2048, activation="silu_gated", shared_experts=1, score="sigmoid",
        scaling_factor=2.5, groups=8, groups_kept=4,
    ),
)  # fmt: skip

# SMs that DeepEP's throughput kernels take from compute (arXiv:2412.19437, section 3.2.2: 20 of 132).
_OVERLAP_COMPUTE_SHARE = 112 / 132
# DeepEP README: NVLink reaches about 160 of H800's 200 GB/s.
_NVLINK_EFFICIENCY = 0.8


@dataclasses.dataclass(frozen=True)
class Parameters:
    """The free parameters, each set by calibration rows alone (see calibration.py for which).

    Attributes:
      rdma_efficiency: share of the NIC's rate that DeepEP's payload reaches.
      low_latency_s: of one low-latency dispatch or combine, however few bytes.
      wait_s: that ranks wait for each other at a dispatch or combine of the throughput kernels.
      expert_launch_s: of one call of the experts in decode, beyond its products.
      train_factor, serve_factor: a measured step over the sum of its parts.
      busiest: load of the busiest GPU over the mean that a load balancer leaves in live traffic.
    """

    rdma_efficiency: float = 1.0
    low_latency_s: float = 0.0
    wait_s: float = 0.0
    expert_launch_s: float = 0.0
    train_factor: float = 1.0
    serve_factor: float = 1.0
    busiest: float = 1.0


def low_latency_network(parameters: Parameters) -> NetworkParameters:
    """Returns DeepEP's low-latency kernels: one message per token and expert, one-sided RDMA."""
    return NetworkParameters(
        name="deepep_low_latency",
        source="fitted to DeepEP's published EP 16 and 64",
        nic_efficiency=parameters.rdma_efficiency,
        nvlink_efficiency=_NVLINK_EFFICIENCY,
        latency_s=parameters.low_latency_s,
    )


def throughput_network(parameters: Parameters) -> NetworkParameters:
    """Returns DeepEP's throughput kernels: a row crosses once to each node; ranks wait for each other."""
    return NetworkParameters(
        name="deepep_throughput",
        source="NIC share as of the low-latency kernels; wait fitted to DeepSeek's training trace",
        nic_efficiency=parameters.rdma_efficiency,
        nvlink_efficiency=_NVLINK_EFFICIENCY,
        latency_s=0.0,
        wait_s=parameters.wait_s,
    )


def decode_stack(parameters: Parameters) -> Stack:
    """Returns FP8 kernels and low-latency collectives; RDMA leaves all SMs to compute."""
    return Stack(
        "DeepSeek-class decode", load_table("hopper_fp8_deepseek"), low_latency_network(parameters), FP8,
        step_factor=parameters.serve_factor, expert_launch_s=parameters.expert_launch_s,
    )  # fmt: skip


def throughput_stack(parameters: Parameters, factor: float) -> Stack:
    """Returns FP8 kernels and throughput collectives, which hold 20 SMs while they overlap."""
    return Stack(
        "DeepSeek-class throughput", load_table("hopper_fp8_deepseek"), throughput_network(parameters), FP8,
        step_factor=factor, overlap_compute_share=_OVERLAP_COMPUTE_SHARE,
    )  # fmt: skip


@functools.lru_cache(maxsize=None)
def cluster(gpu: str, nvlink_domain: int = 8) -> Fabric:
    """Returns a cluster with one 400 Gb/s NIC for each GPU."""
    return Fabric(GPUS[gpu], nvlink_domain, nvlink_domain, 50e9)


def training_stack(parameters: Parameters, fp8: bool) -> Stack:
    """Returns the throughput stack of a training step, as DeepSeek's in FP8 or with every product and row in BF16."""
    stack = throughput_stack(parameters, parameters.train_factor)
    if fp8:
        return dataclasses.replace(stack, recipe=DEEPSEEK)
    return dataclasses.replace(stack, kernels=load_table("h200_bf16"), precision=BF16, recipe=MEGATRON_BF16)
