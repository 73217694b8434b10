"""Counts and times -> named numbers with units; no jax."""

import statistics
from collections.abc import Sequence

import numpy as np

from moe_ep.config import ModelConfig
from moe_ep.parameter_counts import forward_flops_per_token
from moe_ep.hardware import Gpu


def max_over_mean(expert_counts: np.ndarray) -> np.ndarray:
    """Returns each layer's largest expert load over the mean load; 1 is perfect balance.

    Args:
      expert_counts: assignments, [layers, experts], summed over all devices.
    """
    return expert_counts.max(axis=-1) / np.maximum(expert_counts.mean(axis=-1), 1e-9)


def load_cv(expert_counts: np.ndarray) -> np.ndarray:
    """Returns each layer's coefficient of variation of expert load: standard deviation over mean."""
    return expert_counts.std(axis=-1) / np.maximum(expert_counts.mean(axis=-1), 1e-9)


def training_flops_per_token(model: ModelConfig, sequence: int) -> float:
    """Returns the FLOPs of forward and backward of one token, recomputation not counted: three forwards."""
    return 3.0 * forward_flops_per_token(model, sequence)


def phase_flops_per_token(model: ModelConfig, phase: str, context: int) -> float:
    """Returns the FLOPs of one token of "prefill", "decode" or "train".

    Prefill makes logits of each prompt's last token alone; a decoded token meets its
    whole cache, where the formula of a forward pass averages a causal triangle.
    """
    if phase == "train":
        return training_flops_per_token(model, context)
    if phase == "decode":
        return forward_flops_per_token(model, 2 * context)
    return forward_flops_per_token(model, context) - (1 - 1 / context) * 2 * model.vocabulary * model.width


def mfu(tokens_per_s: float, flops_per_token: float, gpu: Gpu | None, devices: int) -> float | None:
    """Returns the model FLOPs a second over the devices' dense BF16 peak; None where the peak is not known (a CPU)."""
    if gpu is None:
        return None
    return tokens_per_s * flops_per_token / (gpu.bf16_flops_per_s * devices)


def median(values: Sequence[float]) -> float | None:
    """Returns the median, None of nothing."""
    return statistics.median(values) if values else None


def human_bytes(count: float) -> str:
    """Returns a byte count in decimal units, as memory and links are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def human_count(count: float) -> str:
    """Returns a count with a thousands' suffix."""
    for unit in ("", " k", " M", " G"):
        if count < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.4g} T"
