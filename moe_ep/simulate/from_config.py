"""A run's config as a scenario: the same model, hardware and placement as the program that runs."""

import dataclasses

from moe_ep.config import ClusterConfig, Config
from moe_ep.cost.kernels import AssumedKernels
from moe_ep.cost.memory import total
from moe_ep.cost.network import NCCL, Fabric
from moe_ep.cost.routing import make_routing
from moe_ep.cost.units import Number
from moe_ep.simulate.memory import memory_of
from moe_ep.simulate.scenario import DoesNotFit, Layout, Scenario, Stack, Workload, check, own_stack

# What the reference experiment assumes of its cluster.
ASSUMED = Stack(
    "assumed by the reference experiment",
    AssumedKernels(mfu=0.60, memory_efficiency=0.80),
    dataclasses.replace(
        NCCL, name="assumed", source="85 % of every link, as the reference experiment assumes; latencies as NCCL's",
        nic_efficiency=0.85, nvlink_efficiency=0.85,
    ),
)  # fmt: skip


def fabric_of(cluster: ClusterConfig) -> Fabric:
    """Returns the cluster's links."""
    return Fabric(cluster.device, cluster.gpus_per_node, cluster.nics_per_node, cluster.nic_gigabits_per_s * 1e9 / 8)


def scenario_of(config: Config) -> Scenario:
    """Returns what a config asks to predict, its batch filled in where it is "the most that fits".

    Raises:
      ConfigError: degrees that do not divide, an unknown routing, no batch that fits.
    """
    simulate, model = config.simulate, config.model
    expert = config.mesh.expert or model.moe.num_experts
    gpus = (config.mesh.data or 1) * expert * simulate.pp
    workload = Workload(
        phase=simulate.phase,
        context=simulate.context,
        tokens_per_gpu=simulate.tokens_per_gpu or 0,
        sequences_per_gpu=simulate.sequences_per_gpu or 0,
        micro_batches=simulate.micro_batches,
    )
    layout = Layout(
        gpus=gpus,
        ep=expert,
        tp=simulate.tp,
        pp=simulate.pp,
        overlap=_overlap(config, workload),
        chunks=config.dispatch.chunks,
        transport=config.dispatch.transport if simulate.transport == "dispatch" else simulate.transport,
        margin_sigmas=config.dispatch.margin_sigmas,
        slots=simulate.slots,
        placement=simulate.placement,
        split_attention_weights=model.attention.weights == "split",
    )
    scenario = Scenario(
        model=model,
        fabric=fabric_of(config.cluster),
        layout=layout,
        workload=workload,
        routing=make_routing(simulate.routing, model.moe.num_experts, model.moe.top_k, config.seed),
        stack=ASSUMED if simulate.efficiency == "assumed" else own_stack(),
        remat=model.remat,
        ignore_memory=simulate.ignore_memory,
    )
    if not workload.tokens:
        scenario = with_most_that_fits(scenario)
        layout = dataclasses.replace(layout, overlap=_overlap(config, scenario.workload))
        scenario = dataclasses.replace(scenario, layout=layout)
    return check(scenario)


def _overlap(config: Config, workload: Workload) -> str:
    """Returns the overlap that is asked for, or else the one that the program of this batch has."""
    dispatch, overlap = config.dispatch, config.simulate.overlap
    if overlap == "dispatch":
        decode = workload.phase == "decode"
        sequences = workload.sequences_per_gpu if decode else workload.tokens_per_gpu // workload.context
        overlap = dispatch.overlap_for(workload.tokens, sequences)
    return "none" if overlap == "chunks" and dispatch.chunks == 1 else overlap


def with_batch(scenario: Scenario, size: Number) -> Scenario:
    """Returns the scenario with so many sequences (decode) or tokens a GPU."""
    name = "sequences_per_gpu" if scenario.workload.phase == "decode" else "tokens_per_gpu"
    return dataclasses.replace(scenario, workload=dataclasses.replace(scenario.workload, **{name: size}))


def with_most_that_fits(scenario: Scenario) -> Scenario:
    """Returns the scenario with the largest power-of-two-and-a-half batch that fits the GPU's memory.

    Raises:
      DoesNotFit: not even one sequence, or one token, fits.
    """
    free = scenario.fabric.gpu.memory_bytes
    sizes = sorted({part * 2**power // 2 for power in range(1, 18) for part in (2, 3)})
    fitting = [size for size in sizes if total(memory_of(with_batch(scenario, size))) <= free]
    if not fitting:
        missing = total(memory_of(with_batch(scenario, sizes[0]))) - free
        raise DoesNotFit(
            f"--set mesh.expert={scenario.layout.ep}: does not fit at any batch: {missing / 1e9:.1f} GB missing of "
            f"{free / 1e9:.1f} GB; allowed is a layout that fits",
            missing,
        )
    return with_batch(scenario, fitting[-1])
