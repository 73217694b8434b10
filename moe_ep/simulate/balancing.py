"""The balancer's rate on a router that is not this project's: load after so many updates, token by token, with numpy."""

import dataclasses

import numpy as np

from moe_ep.cost.units import Number

# Of experts' logits before any bias: what popularity spreads and what a token does.
_POPULARITY, _TOKENS = 0.5, 1.0
_POOLS = 4


@dataclasses.dataclass(frozen=True)
class Balanced:
    """Busiest expert over the mean: over the last half of the updates, the worst of them, without any, and at random."""

    settled: Number
    peak: Number
    unbalanced: Number
    floor: Number


def balance(experts: int, top_k: int, tokens: int, rate: Number, updates: int, seed: int = 0) -> Balanced:
    """Runs `updates` steps of bias += rate (mean - count) / mean on softmax scores, each on `tokens` tokens in all.

    Args:
      rate: in units of the score itself.
    """
    random = np.random.default_rng(seed)
    popularity = _POPULARITY * random.standard_normal(experts)
    pools = [_softmax(popularity + _TOKENS * random.standard_normal((tokens, experts), np.float32)) for _ in range(_POOLS)]
    bias, busiest = np.zeros(experts, np.float32), []
    for update in range(updates):
        counts = _chosen(pools[update % _POOLS] + bias, top_k)
        busiest.append(counts.max() / counts.mean())
        bias += (rate * (1 - counts / counts.mean())).astype(np.float32)
    drawn = random.multinomial(tokens * top_k, np.full(experts, 1 / experts))
    last = busiest[updates // 2 :]
    return Balanced(float(np.mean(last)), float(max(last)), float(busiest[0]), float(drawn.max() / drawn.mean()))


def _softmax(logits: np.ndarray) -> np.ndarray:
    scores = np.exp(logits - logits.max(axis=1, keepdims=True), dtype=np.float32)
    return scores / scores.sum(axis=1, keepdims=True)


def _chosen(scores: np.ndarray, top_k: int) -> np.ndarray:
    """Returns how many tokens chose each expert."""
    chosen = np.argpartition(scores, -top_k, axis=1)[:, -top_k:]
    return np.bincount(chosen.ravel(), minlength=scores.shape[1])
