"""A block: attention, then a feed-forward layer, each behind a norm and added to the stream."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from moe_ep.config import DispatchConfig, ModelConfig
from moe_ep.model.kv_cache import Lengths, Pages
from moe_ep.model.mla import MultiHeadLatentAttention
from moe_ep.model.moe import DenseMLP, MoE, MoEReport
from moe_ep.model.norm import RMSNorm
from moe_ep.shapes import Activations, Choices, Mask, Positions, RouterBias


class AttentionHalf(nnx.Module):
    """The first half of a block: x + attention(norm(x)), and the norm that the second half begins with."""

    def __init__(self, key: Array, config: ModelConfig):
        self.norm = RMSNorm(config.width, config.norm_epsilon)
        self.attention = MultiHeadLatentAttention(
            key,
            config.width,
            config.attention,
            dtype=jnp.dtype(config.dtype),
            norm_epsilon=config.norm_epsilon,
            output_scale=residual_scale(config),
        )

    def __call__(self, x: Activations, positions: Positions) -> Activations:
        return self.prefill(x, positions)[0]

    def prefill(self, x: Activations, positions: Positions) -> tuple[Activations, Float[Array, "b s W"]]:
        """Returns the half's output and what is cached of every token."""
        with jax.named_scope("attention"):
            attended, cached = self.attention.prefill(self.norm(x), positions)
            return x + attended, cached

    def extend(
        self, x: Activations, cached: Float[Array, "n rows W"], pages: Pages, starts: Lengths, valid: Mask
    ) -> tuple[Activations, Float[Array, "n rows W"]]:
        """Returns the half's output for a chunk of each prompt, and the cache with its rows."""
        with jax.named_scope("attention"):
            attended, cached = self.attention.extend(self.norm(x), cached, pages, starts, valid)
            return x + attended, cached

    def decode(
        self,
        x: Activations,
        cached: Float[Array, "n rows W"],
        pages: Pages,
        lengths: Lengths,
        active: Mask | None = None,
    ) -> tuple[Activations, Float[Array, "n rows W"]]:
        """Returns the half's output for one new token a sequence, and the cache with its rows."""
        with jax.named_scope("attention"):
            attended, cached = self.attention.decode(self.norm(x), cached, pages, lengths, active)
            return x + attended, cached


class DenseBlock(nnx.Module):
    """A block whose feed-forward layer is dense."""

    def __init__(self, key: Array, config: ModelConfig):
        keys = jax.random.split(key, 2)
        self.first = AttentionHalf(keys[0], config)
        self.norm = RMSNorm(config.width, config.norm_epsilon)
        self.mlp = DenseMLP(
            keys[1],
            config.width,
            config.hidden,
            config.activation,
            dtype=jnp.dtype(config.dtype),
            output_scale=residual_scale(config),
        )

    def __call__(self, x: Activations, positions: Positions) -> Activations:
        return self.feed_forward(self.first(x, positions))

    def feed_forward(self, x: Activations) -> Activations:
        """Returns the second half's output."""
        with jax.named_scope("dense"):
            return x + self.mlp(self.norm(x))


class MoEBlock(nnx.Module):
    """A block whose feed-forward layer is routed."""

    def __init__(self, key: Array, config: ModelConfig):
        keys = jax.random.split(key, 2)
        self.first = AttentionHalf(keys[0], config)
        self.norm = RMSNorm(config.width, config.norm_epsilon)
        self.moe = MoE(
            keys[1],
            config.width,
            config.moe,
            dtype=jnp.dtype(config.dtype),
            output_scale=residual_scale(config),
        )

    def __call__(
        self,
        x: Activations,
        positions: Positions,
        bias: RouterBias,
        dispatch: DispatchConfig,
        replay: Choices | None = None,
    ) -> tuple[Activations, MoEReport]:
        return self.feed_forward(self.first(x, positions), bias, dispatch, replay)

    def feed_forward(
        self,
        x: Activations,
        bias: RouterBias,
        dispatch: DispatchConfig,
        replay: Choices | None = None,
        valid: Mask | None = None,
    ) -> tuple[Activations, MoEReport]:
        """Returns the second half's output and what its routing counted."""
        with jax.named_scope("moe"):
            routed, report = self.moe(self.norm(x), bias, dispatch, replay, valid)
        return x + routed, report


def residual_scale(config: ModelConfig) -> float:
    """Returns the scale of matrices that write to the stream: their 2 x layers sums keep unit variance (GPT-2)."""
    return (2 * config.layers) ** -0.5
