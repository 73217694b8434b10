"""Checks of a config's fields and of their combinations, each refused in a line with the flag and what is allowed."""

import typing
from typing import Literal

from moe_ep.config import BenchConfig, Config, ModelConfig, flatten, require
from moe_ep.hardware import GPUS

# Fields that may be zero; every other number in a config must be positive.
_MAY_BE_ZERO = frozenset({
    "model.dense_layers", "model.attention.query_latent_dim", "model.moe.shared_experts",
    "dispatch.margin_sigmas", "balance.rate", "train.router_z_loss", "train.validation_every",
    "train.validation_batches", "train.checkpoint_every", "train.sample_tokens", "seed",
    "train.optimizer.weight_decay", "train.optimizer.warmup_steps", "train.optimizer.final_fraction",
    "train.optimizer.beta1", "train.optimizer.beta2", "data.validation_fraction",
    "generate.temperature", "generate.top_k",
})  # fmt: skip


def check(config: Config) -> Config:
    """Checks every field and every combination of fields; returns the config unchanged.

    Raises:
      ConfigError: one line with the flag, its value and what is allowed.
    """
    for name, kind, value in flatten(config):
        if typing.get_origin(kind) is Literal:
            require(value in typing.get_args(kind), name, value, "one of " + ", ".join(typing.get_args(kind)))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            require(value == value and abs(value) != float("inf"), name, value, "a finite number")
            zero_allowed = name in _MAY_BE_ZERO
            positive = value >= 0 if zero_allowed else value > 0
            require(positive, name, value, "zero or more" if zero_allowed else "more than zero")
    _check_model(config.model)
    _check_layout(config)
    _check_training(config)
    _check_bench(config.bench)
    return config


def _check_model(model: ModelConfig) -> None:
    moe, attention = model.moe, model.attention
    require(model.dense_layers < model.layers, "model.dense_layers", model.dense_layers,
            f"less than model.layers = {model.layers}")  # fmt: skip
    require(moe.top_k <= moe.num_experts, "model.moe.top_k", moe.top_k,
            f"at most model.moe.num_experts = {moe.num_experts}")  # fmt: skip
    require(attention.rope_dim % 2 == 0, "model.attention.rope_dim", attention.rope_dim, "an even number")
    require(moe.num_experts % moe.groups == 0, "model.moe.groups", moe.groups,
            f"a divisor of model.moe.num_experts = {moe.num_experts}")  # fmt: skip
    require(moe.groups_kept <= moe.groups, "model.moe.groups_kept", moe.groups_kept,
            f"at most model.moe.groups = {moe.groups}")  # fmt: skip
    reachable = moe.groups_kept * (moe.num_experts // moe.groups)
    require(moe.top_k <= reachable, "model.moe.top_k", moe.top_k, f"at most the {reachable} experts of the kept groups")
    smallest_group = 2 if moe.groups > 1 and moe.group_score == "top2_sum" else 1
    require(moe.num_experts // moe.groups >= smallest_group, "model.moe.groups", moe.groups,
            "groups of two experts or more with group_score=top2_sum")  # fmt: skip


def _check_layout(config: Config) -> None:
    experts, degree = config.model.moe.num_experts, config.mesh.expert
    if degree is not None and config.simulate.slots is not None:  # replicas: experts need not divide
        check_node_split(degree, config.cluster.gpus_per_node)
    elif degree is not None:
        require(degree <= experts, "mesh.expert", degree, f"at most model.moe.num_experts = {experts}")
        require(experts % degree == 0, "mesh.expert", degree, f"a divisor of model.moe.num_experts = {experts}")
        check_node_split(degree, config.cluster.gpus_per_node)
    cluster = config.cluster
    require(cluster.gpu in GPUS, "cluster.gpu", cluster.gpu, "one of " + ", ".join(GPUS))
    require(cluster.gpus_per_node % cluster.nics_per_node == 0, "cluster.nics_per_node", cluster.nics_per_node,
            f"a divisor of cluster.gpus_per_node = {cluster.gpus_per_node}")  # fmt: skip
    share = config.simulate.expert_row_share
    require(share is None or share <= 1, "simulate.expert_row_share", share, "at most 1")
    chunks, overlap = config.dispatch.chunks, config.dispatch.overlap
    require(chunks == 1 or overlap == "chunks", "dispatch.chunks", chunks, "1 unless dispatch.overlap=chunks")
    require(chunks == 1 or config.dispatch.transport != "ragged", "dispatch.chunks", chunks,
            "1 with dispatch.transport=ragged, which moves a wave at once")  # fmt: skip


def check_node_split(degree: int, gpus_per_node: int) -> None:
    """Checks that an expert axis is a whole number of nodes, or a part of one."""
    require(degree <= gpus_per_node or degree % gpus_per_node == 0, "mesh.expert", degree,
            f"at most, or a multiple of, cluster.gpus_per_node = {gpus_per_node}")  # fmt: skip


def _check_training(config: Config) -> None:
    train, balance = config.train, config.balance
    require(train.batch_sequences % train.accumulation == 0, "train.accumulation", train.accumulation,
            f"a divisor of train.batch_sequences = {train.batch_sequences}")  # fmt: skip
    require(train.optimizer.beta1 < 1, "train.optimizer.beta1", train.optimizer.beta1, "less than 1")
    require(train.optimizer.beta2 < 1, "train.optimizer.beta2", train.optimizer.beta2, "less than 1")
    require(train.optimizer.warmup_steps <= train.steps, "train.optimizer.warmup_steps", train.optimizer.warmup_steps,
            f"at most train.steps = {train.steps}")  # fmt: skip
    require(config.generate.top_p <= 1, "generate.top_p", config.generate.top_p, "at most 1")
    require(config.data.validation_fraction < 1, "data.validation_fraction", config.data.validation_fraction,
            "less than 1")  # fmt: skip
    require(balance.interval_ms is None or balance.interval_steps == 1, "balance.interval_ms", balance.interval_ms,
            "none unless balance.interval_steps=1: give one of the two")  # fmt: skip


def _check_bench(bench: BenchConfig) -> None:
    for name in ("studies", "phases", "sequences", "tokens_per_gpu", "sequences_per_gpu", "routing", "transports",
                 "dispatches"):  # fmt: skip
        require(len(getattr(bench, name)) > 0, f"bench.{name}", "", "at least one")
    for name in ("baselines", "devices", "sequences", "tokens_per_gpu", "sequences_per_gpu"):
        values = getattr(bench, name)
        require(all(value > 0 for value in values), f"bench.{name}", ",".join(map(str, values)), "more than zero, each")
    require(bench.smallest_bytes <= bench.largest_bytes, "bench.smallest_bytes", bench.smallest_bytes,
            f"at most bench.largest_bytes = {bench.largest_bytes}")  # fmt: skip
