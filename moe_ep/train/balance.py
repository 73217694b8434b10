"""The rules that move the router's bias towards equal load, on counts of all data shards."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float32, Int32

from moe_ep.config import BalanceConfig

Bias = Float32[Array, "L E"]
Counts = Int32[Array, "L E"]


def _excess(counts: Counts) -> Float32[Array, "L E"]:
    """Returns (mean - count) / mean, the mean over a layer's experts: positive where an expert has too little."""
    counts = counts.astype(jnp.float32)
    mean = jnp.mean(counts, axis=1, keepdims=True)
    return (mean - counts) / jnp.maximum(mean, 1.0)


def _load_fraction(bias: Bias, counts: Counts, rate: float, mean_score: float) -> Bias:
    return bias + rate * mean_score * _excess(counts)


def _sign(bias: Bias, counts: Counts, rate: float, mean_score: float) -> Bias:
    del mean_score
    return bias + rate * jnp.sign(_excess(counts))


def _keep(bias: Bias, counts: Counts, rate: float, mean_score: float) -> Bias:
    del counts, rate, mean_score
    return bias


# load_fraction: the reference experiment's rule, alpha (mean - count) / mean in units of
# the mean score, so that a rate means the same at every batch and every E. sign:
# DeepSeek-V3's (arXiv:2412.19437, section 2.1.2), in units of the score itself.
RULES: dict[str, Callable[[Bias, Counts, float, float], Bias]] = {
    "load_fraction": _load_fraction,
    "sign": _sign,
    "none": _keep,
}


def update(bias: Bias, counts: Counts, config: BalanceConfig, mean_score: float) -> Bias:
    """Returns the bias after one update.

    Args:
      bias: of every MoE layer.
      counts: assignments since the last update, summed over all devices before this call.
      config: rule and rate.
      mean_score: the unit of load_fraction's rate.
    """
    return RULES[config.rule](bias, counts, config.rate, mean_score)


def interval_from_ms(interval_ms: float, ms_per_step: float) -> int:
    """Returns the whole number of steps, at least one, that is nearest to the interval."""
    return max(round(interval_ms / ms_per_step), 1)
