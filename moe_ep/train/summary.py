"""What a person wants to know of a run before its first step."""

from collections.abc import Iterator
from pathlib import Path

from jax.sharding import Mesh

from moe_ep.config import Config
from moe_ep.parameter_counts import active_parameters, forward_flops_per_token, mlp_parameters, parameters_by_part
from moe_ep.dispatch import TRANSPORTS, make_exchange
from moe_ep.hardware import gpu_of_device_kind
from moe_ep.mesh import DATA, GPU, NODE, expert_degree
from moe_ep.metrics import human_bytes, human_count, training_flops_per_token

_BYTES_PER_PARAMETER = {"weights": 4, "gradient": 4, "Adam's moments": 8}


def summarize_run(config: Config, mesh: Mesh, statistics: object, workdir: Path) -> Iterator[str]:
    """Yields lines on device, mesh, parameters, expert memory, active FLOPs, dispatch buffers and data."""
    yield _describe_devices(mesh)
    yield from _describe_model(config, expert_degree(mesh))
    yield _describe_dispatch(config, mesh)
    train = config.train
    yield (
        f"batch      {train.batch_sequences} sequences x {train.sequence} tokens = "
        f"{human_count(train.batch_sequences * train.sequence)} tokens a step, {train.accumulation} micro-batches, "
        f"{train.steps} steps"
    )
    yield f"data       {config.data.path or 'the built-in English (pydoc_data.topics)'}, tokenizer {config.data.tokenizer}"
    if statistics is not None:
        yield f"           {statistics}"
    yield f"workdir    {workdir}"


def _describe_devices(mesh: Mesh) -> str:
    device = mesh.devices.flat[0]
    gpu = gpu_of_device_kind(device.device_kind)
    name = gpu.name if gpu else f"{device.device_kind}, emulated" if mesh.size > 1 else device.device_kind
    degree = expert_degree(mesh)
    return (
        f"devices    {mesh.size} x {name}; mesh data {mesh.shape[DATA]} x node {mesh.shape[NODE]} x gpu "
        f"{mesh.shape[GPU]}, EP = {degree}"
    )


def _describe_model(config: Config, degree: int) -> Iterator[str]:
    model = config.model
    parts = parameters_by_part(model)
    yield (
        f"model      {model.layers} layers ({model.dense_layers} dense, {model.moe_layers} MoE), width {model.width}, "
        f"{model.moe.num_experts} experts, top-{model.moe.top_k}; {human_count(sum(parts.values()))} parameters, "
        f"{human_count(active_parameters(model))} active a token"
    )
    held = model.moe.num_experts // degree
    expert = mlp_parameters(model.width, model.moe.hidden, model.moe.activation)
    per_device = model.moe_layers * held * expert
    trained = per_device * sum(_BYTES_PER_PARAMETER.values())
    yield (
        f"experts    {held} per device and layer, {human_count(expert)} parameters each; "
        f"{human_bytes(per_device * 2)} a device in BF16, {human_bytes(trained)} with gradient and Adam in float32"
    )
    yield (
        f"FLOPs      {human_count(forward_flops_per_token(model, config.train.sequence))} forward, "
        f"{human_count(training_flops_per_token(model, config.train.sequence))} with backward, per token"
    )


def _describe_dispatch(config: Config, mesh: Mesh) -> str:
    train, moe, peers = config.train, config.model.moe, expert_degree(mesh)
    tokens = train.batch_sequences * train.sequence // (mesh.size * train.accumulation)
    exchange = make_exchange(
        config.dispatch, experts=moe.num_experts, peers=peers, tokens=tokens, top_k=moe.top_k
    )
    rows = TRANSPORTS[exchange.transport].queue_rows(exchange)
    mean = tokens * moe.top_k / (peers if exchange.transport == "all_to_all" else 1)
    how = exchange.transport if peers > 1 else "within the device"
    if how == "ragged" and mesh.devices.flat[0].platform == "gpu":
        how += " (far slower than all_to_all between GPUs: results/LOG.md, 2026-11-27)"
    return (
        f"dispatch   {how}, {exchange.waves} wave(s) x {exchange.chunks} chunk(s); a buffer holds {rows} "
        f"rows where {mean:.0f} are expected; {'rows beyond are dropped' if config.dispatch.drop else 'dropless'}"
    )
