"""One prediction: a scenario in, throughput, latency, memory, utilisations and the bottleneck out."""

import dataclasses
import math

from moe_ep.parameter_counts import mlp_parameters
from moe_ep.cost.kernels import peak_flops
from moe_ep.cost.memory import total
from moe_ep.cost.units import Number
from moe_ep.metrics import phase_flops_per_token
from moe_ep.simulate.layer import layer_load
from moe_ep.simulate.memory import memory_of
from moe_ep.simulate.scenario import DoesNotFit, Scenario, check
from moe_ep.simulate.step import StageWork, compute_seconds, network_seconds, stage_work, step_seconds


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a layout is predicted to do.

    `ms_per_token` is what a user waits: one step in decode (times the stages of a
    pipeline), the step over the tokens of a sequence in prefill and training. MFU counts
    the model's FLOPs (3x forward in training, nothing computed again) over the peak of
    the products' type.
    """

    feasible: bool
    missing_bytes: Number
    step_s: Number
    tokens_per_s: Number
    tokens_per_s_per_gpu: Number
    ms_per_token: Number
    time_to_first_token_s: Number
    mfu: Number
    nic_utilisation: Number
    nvlink_utilisation: Number
    memory_bandwidth_utilisation: Number
    bytes_per_gpu: dict[str, Number]
    exposed_communication_share: Number
    hidden_communication_share: Number
    max_over_mean_load: Number
    bottleneck: str
    memory_ignored: bool


def predict(scenario: Scenario) -> Prediction:
    """Returns the prediction.

    Raises:
      ConfigError: degrees that do not divide.
      DoesNotFit: the layout needs more memory than the GPU has, and that is not ignored.
    """
    check(scenario)
    parts = memory_of(scenario)
    missing = max(total(parts) - scenario.fabric.gpu.memory_bytes, 0.0)
    if missing and not scenario.ignore_memory:
        raise DoesNotFit(_refusal(scenario, parts, missing), missing)
    stage = stage_work(scenario)
    return _assemble(scenario, stage, parts, missing)


def _refusal(scenario: Scenario, parts: dict[str, Number], missing: Number) -> str:
    gpu, layout = scenario.fabric.gpu, scenario.layout
    listed = ", ".join(f"{name} {value / 1e9:.1f}" for name, value in parts.items() if value >= 5e7)
    return (
        f"--set mesh.expert={layout.ep}: does not fit: {total(parts) / 1e9:.1f} GB a GPU ({listed}) of "
        f"{gpu.memory_bytes / 1e9:.1f} GB, {missing / 1e9:.1f} GB missing; allowed is a layout that fits, "
        "or simulate.ignore_memory=true for a counterfactual"
    )


def _assemble(scenario: Scenario, stage: StageWork, parts: dict[str, Number], missing: Number) -> Prediction:
    layout, workload, fabric = scenario.layout, scenario.workload, scenario.fabric
    chunks = layout.chunks if layout.overlap == "chunks" else 1
    seconds = step_seconds(scenario, stage)
    training = workload.phase == "train"
    times = workload.micro_batches if training else 1
    # In a pipeline that trains a step is all micro-batches through all stages.
    rate_per_gpu = workload.tokens_kept / seconds / layout.pp
    flops = phase_flops_per_token(scenario.model, workload.phase, workload.context)
    network_s, compute_s = times * network_seconds(stage, chunks), times * compute_seconds(stage, chunks)
    busy = seconds / scenario.stack.step_factor
    exposed = min(max(busy - compute_s, 0.0), network_s)
    nic, nvlink = _bytes_sent(stage, chunks, times)
    return Prediction(
        feasible=missing == 0,
        missing_bytes=missing,
        step_s=seconds,
        tokens_per_s=rate_per_gpu * layout.gpus,
        tokens_per_s_per_gpu=rate_per_gpu,
        ms_per_token=_ms_per_token(scenario, seconds),
        time_to_first_token_s=seconds * layout.pp if workload.phase == "prefill" else math.nan,
        mfu=rate_per_gpu * flops / peak_flops(fabric.gpu, scenario.stack.precision.gemm),
        nic_utilisation=nic * fabric.gpus_per_nic / fabric.nic_bytes_per_s / seconds,
        nvlink_utilisation=nvlink / fabric.gpu.nvlink_bytes_per_s / seconds,
        memory_bandwidth_utilisation=_weights_read(scenario, parts) / seconds / fabric.gpu.memory_bytes_per_s,
        bytes_per_gpu=parts,
        exposed_communication_share=exposed / busy,
        hidden_communication_share=round(1 - exposed / network_s, 9) if network_s else 1.0,
        max_over_mean_load=layer_load(scenario, 0, workload.tokens).max_over_mean,
        bottleneck=_bottleneck(scenario, compute_s, network_s, exposed),
        memory_ignored=missing > 0,
    )


def _ms_per_token(scenario: Scenario, seconds: Number) -> Number:
    layout, workload = scenario.layout, scenario.workload
    if workload.phase == "decode":
        return 1e3 * seconds * layout.pp / workload.accepted
    return 1e3 * seconds / workload.tokens_kept


def _bytes_sent(stage: StageWork, chunks: int, micro_batches: int) -> tuple[Number, Number]:
    """Returns mean bytes of a GPU over its NIC and over NVLink in a step."""
    times = chunks * stage.batches * micro_batches
    blocks = stage.forward + stage.backward
    nic = sum(b.dispatch_traffic.nic_bytes_per_gpu + b.combine_traffic.nic_bytes_per_gpu for b in blocks)
    nvlink = sum(b.dispatch_traffic.nvlink_bytes_per_gpu + b.combine_traffic.nvlink_bytes_per_gpu for b in blocks)
    return nic * times, nvlink * times


def _weights_read(scenario: Scenario, parts: dict[str, Number]) -> Number:
    """Weights once for each pass, the cache once: what a step cannot do without.

    Not of the embedding, of which it reads a few rows, nor of experts that no token chose.
    """
    model, layout, value_bytes = scenario.model, scenario.layout, scenario.stack.precision.weight_bytes
    embedding = model.vocabulary * model.width if layout.pp == 1 else 0
    idle = scenario.slots - min(_active_experts(scenario), scenario.slots)
    expert = mlp_parameters(model.width, model.moe.hidden, model.moe.activation)
    unread = (embedding + idle * expert * model.moe_layers / layout.pp) * value_bytes
    if scenario.workload.phase == "train":
        return (parts["weights"] / 2 - unread) * 3 * scenario.workload.micro_batches
    return parts["weights"] - unread + parts["kv_cache"] / layout.pp


def _active_experts(scenario: Scenario) -> Number:
    """Of a layer on one GPU, in one part of a micro-batch."""
    layout, layers = scenario.layout, len(scenario.routing.shares)
    parts = 2 if layout.overlap == "staggered" else layout.chunks if layout.overlap == "chunks" else 1
    tokens = scenario.workload.tokens / parts
    return sum(layer_load(scenario, layer, tokens).active for layer in range(layers)) / layers


def _bottleneck(scenario: Scenario, compute_s: Number, network_s: Number, exposed: Number) -> str:
    if exposed > 0.5 * (compute_s + exposed):
        link = "NIC" if scenario.layout.ep > scenario.fabric.gpus_per_node else "NVLink"
        return f"network ({link}): fewer bytes a token, faster links or more overlap would lift it"
    if exposed > 0.1 * (compute_s + exposed):
        return "exposed all-to-all: overlap (staggered) or fewer padded bytes would lift it"
    if scenario.workload.phase == "decode":
        return "memory bandwidth: reading weights and cache; a larger batch or wider EP would lift it"
    return "compute: faster kernels would lift it"
