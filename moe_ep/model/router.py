"""Which experts a token uses, and with what weight. All in float32."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moe_ep.config import MoEConfig
from moe_ep.model.parameter import matrix
from moe_ep.model.router_logits import logits_of
from moe_ep.shapes import Choices, RouterBias, RouterLogits, TokenRows, Weights


class Routing(NamedTuple):
    """What the router says of each token."""

    choices: Choices
    weights: Weights
    logits: RouterLogits


class Router(nnx.Module):
    """Scores all experts and chooses top-k of score + bias; weights come from the scores alone."""

    def __init__(self, key: Array, width: int, config: MoEConfig):
        self.config = config
        # Small at first: scores start near 1/E, where the balance bias can move choices within a few steps.
        self.matrix = matrix(key, (width, config.num_experts), (None, None), fan_in=width, scale=0.1)

    def __call__(self, x: TokenRows, bias: RouterBias, replay: Choices | None = None) -> Routing:
        """Routes tokens.

        Args:
          x: the tokens.
          bias: added to the scores for the choice only; no gradient flows to it.
          replay: choices to use instead of the router's own where they are not negative; weights are
            still the router's.
        """
        logits = logits_of(x, self.matrix[...].astype(jnp.float32))
        scores = _SCORES[self.config.score](logits)
        choices = choose(jax.lax.stop_gradient(scores) + bias[None, :], self.config)
        choices = choices if replay is None else jnp.where(replay < 0, choices, replay)
        chosen = jnp.take_along_axis(scores, choices, axis=-1)
        return Routing(choices, _weigh(chosen, self.config), logits)


_SCORES = {
    "softmax": lambda logits: jax.nn.softmax(logits, axis=-1),
    "softmax_chosen": lambda logits: logits,
    "sigmoid": jax.nn.sigmoid,
}


def mean_score(config: MoEConfig) -> float:
    """Returns the score of an expert that nothing prefers: the unit of the balance bias."""
    return {"softmax": 1.0 / config.num_experts, "softmax_chosen": 1.0, "sigmoid": 0.5}[config.score]


def choose(ranking: RouterLogits, config: MoEConfig) -> Choices:
    """Returns the top-k experts of each row, inside the kept groups where routing is limited to groups."""
    if config.groups > 1:
        ranking = _mask_groups(ranking, config)
    return jax.lax.top_k(ranking, config.top_k)[1].astype(jnp.int32)


def _mask_groups(ranking: RouterLogits, config: MoEConfig) -> RouterLogits:
    grouped = ranking.reshape(ranking.shape[0], config.groups, -1)
    best = jax.lax.top_k(grouped, 2 if config.group_score == "top2_sum" else 1)[0]
    kept = jax.lax.top_k(jnp.sum(best, axis=-1), config.groups_kept)[1]
    is_kept = jnp.any(kept[:, :, None] == jnp.arange(config.groups)[None, None, :], axis=1)
    # -inf, not 0: a kept score may be negative.
    return jnp.where(is_kept[:, :, None], grouped, -jnp.inf).reshape(ranking.shape)


def _weigh(chosen: Weights, config: MoEConfig) -> Weights:
    if config.score == "softmax_chosen":
        return jax.nn.softmax(chosen, axis=-1) * config.scaling_factor
    if config.normalize:
        chosen = chosen / (jnp.sum(chosen, axis=-1, keepdims=True) + 1e-20)
    return chosen * config.scaling_factor
