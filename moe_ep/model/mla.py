"""Multi-Head Latent Attention: keys and values are expanded from one latent per token.

What is cached of a token is its normed latent and one rotated key that all heads
share (DeepSeek-V2, arXiv:2405.04434, section 2.1).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float

from moe_ep.config import AttentionConfig
from moe_ep.kernels.mla_decode import mla_decode
from moe_ep.mesh import GPU, gpu_capability
from moe_ep.model.kv_cache import Lengths, Pages, read, write
from moe_ep.model.norm import RMSNorm, rotate
from moe_ep.model.parameter import matrix, whole
from moe_ep.shapes import Activations, Mask, Positions, Queries, Values


# Of a whole cache, as many positions as its pages hold.
KeysOfCache = Float[Array, "b S H NO"]
ValuesOfCache = Float[Array, "b S H U"]


class MultiHeadLatentAttention(nnx.Module):
    """One layer's attention.

    Args:
      key: of the parameters' values.
      width: D.
      config: sizes, rotary layout, whether weights are split inside the node.
      dtype: of the computation.
      norm_epsilon: of the latents' norms.
      output_scale: of the output matrix's initial values.
    """

    def __init__(
        self,
        key: Array,
        width: int,
        config: AttentionConfig,
        *,
        dtype: jnp.dtype,
        norm_epsilon: float,
        output_scale: float,
    ):
        self.config = config
        self.dtype = dtype
        split = GPU if config.weights == "split" else None
        keys = jax.random.split(key, 5)
        heads, query_in = config.heads, config.query_latent_dim or width
        if config.query_latent_dim:
            self.query_down = matrix(keys[4], (width, config.query_latent_dim), (split, None), fan_in=width)
            self.query_norm = RMSNorm(config.query_latent_dim, norm_epsilon)
        self.query = matrix(keys[0], (query_in, heads, config.query_dim), (split, None, None), fan_in=query_in)
        self.down = matrix(keys[1], (width, config.cache_dim), (split, None), fan_in=width)
        self.latent_norm = RMSNorm(config.latent_dim, norm_epsilon)
        expanded = config.nope_dim + config.value_dim
        self.up = matrix(
            keys[2], (config.latent_dim, heads, expanded), (split, None, None), fan_in=config.latent_dim
        )
        self.output = matrix(
            keys[3],
            (heads, config.value_dim, width),
            (None, None, split),
            fan_in=heads * config.value_dim,
            scale=output_scale,
        )

    def __call__(self, x: Activations, positions: Positions) -> Activations:
        """Attends causally inside each sequence, with keys and values expanded."""
        return self.prefill(x, positions)[0]

    def prefill(self, x: Activations, positions: Positions) -> tuple[Activations, Float[Array, "b s W"]]:
        """Attends like a call, and returns what is cached of every token too."""
        queries, cached = self.make_queries(x, positions), self.compress(x, positions)
        keys, values = self.expand(cached)
        attend = ATTENTIONS[self.config.implementation]
        attended = attend(queries, keys, values, self.scale)
        return jnp.einsum("bshu,hud->bsd", attended, whole(self.output, self.dtype)), cached

    def extend(
        self, x: Activations, cached: Float[Array, "n rows W"], pages: Pages, starts: Lengths, valid: Mask
    ) -> tuple[Activations, Float[Array, "n rows W"]]:
        """Attends a chunk of each prompt over the cache before it and causally to itself, keys and values expanded.

        Expanding costs a cached row once a chunk, absorbing costs it once a token of
        the chunk: with the reference model expanding is cheaper from about 50 tokens,
        with DeepSeek-V3's latent from about 60.

        Args:
          x: the chunks.
          cached: pages of rows.
          pages: of each sequence.
          starts: tokens that the cache holds of each; the position of its chunk's first token.
          valid: the tokens that are some; the others write nothing and their outputs mean nothing.

        Returns:
          The output, and the cache with the chunks' rows.
        """
        positions = starts[:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)[None, :]
        queries = self.make_queries(x, positions)
        cached = write(cached, pages, positions, self.compress(x, positions), valid)
        keys, values = self.expand(read(cached, pages))
        row = jnp.arange(keys.shape[1], dtype=jnp.int32)
        allowed = row[None, None, :] <= positions[:, :, None]
        attended = MASKED_ATTENTIONS[self.config.implementation](queries, keys, values, self.scale, allowed)
        return jnp.einsum("bshu,hud->bsd", attended, whole(self.output, self.dtype)), cached

    def decode(
        self,
        x: Float[Array, "b 1 D"],
        cached: Float[Array, "n rows W"],
        pages: Pages,
        lengths: Lengths,
        active: Mask | None = None,
    ) -> tuple[Float[Array, "b 1 D"], Float[Array, "n rows W"]]:
        """Attends one new token a sequence over its cache, absorbed: keys and values are never expanded.

        Args:
          x: the new tokens.
          cached: pages of rows.
          pages: of each sequence.
          lengths: tokens that the cache holds of each; the new one's position.
          active: the sequences that there are; the others read and write no row. None: all.

        Returns:
          The output, and the cache with the new tokens' rows.
        """
        positions = lengths[:, None]
        nope, rope = jnp.split(self.make_queries(x, positions)[:, 0], [self.config.nope_dim], axis=-1)
        cached = write(cached, pages, positions, self.compress(x, positions), active)
        read_rows = lengths + 1 if active is None else jnp.where(active[:, 0], lengths + 1, 0)
        up_keys, up_values = jnp.split(whole(self.up, self.dtype), [self.config.nope_dim], axis=-1)
        q_latent = jnp.einsum("bhn,zhn->bhz", nope, up_keys)
        attended = mla_decode(q_latent, rope, cached, read_rows, scale=self.scale, pages=pages)
        values = jnp.einsum("bhz,zhu->bhu", attended, up_values)
        return jnp.einsum("bhu,hud->bd", values, whole(self.output, self.dtype))[:, None], cached

    @property
    def scale(self) -> float:
        return self.config.query_dim**-0.5

    def make_queries(self, x: Activations, positions: Positions) -> Queries:
        """Returns queries in the order [without position, rotated]."""
        if self.config.query_latent_dim:
            x = self.query_norm(x @ whole(self.query_down, self.dtype))
        queries = jnp.einsum("bsd,dhq->bshq", x, whole(self.query, self.dtype))
        nope, rope = jnp.split(queries, [self.config.nope_dim], axis=-1)
        return jnp.concatenate([nope, self._rotate(rope, positions)], axis=-1)

    def compress(self, x: Activations, positions: Positions) -> Float[Array, "b s W"]:
        """Returns what is cached: the normed latent, then the rotated shared key."""
        latent, rope = jnp.split(x @ whole(self.down, self.dtype), [self.config.latent_dim], axis=-1)
        rotated = self._rotate(rope[:, :, None, :], positions)[:, :, 0, :]
        return jnp.concatenate([self.latent_norm(latent), rotated], axis=-1)

    def expand(self, cached: Float[Array, "b s W"]) -> tuple[Queries, Values]:
        """Returns every head's keys and values from what is cached."""
        latent, rope = jnp.split(cached, [self.config.latent_dim], axis=-1)
        expanded = jnp.einsum("bsz,zhe->bshe", latent, whole(self.up, self.dtype))
        nope, values = jnp.split(expanded, [self.config.nope_dim], axis=-1)
        shared = jnp.broadcast_to(rope[:, :, None, :], (*nope.shape[:-1], rope.shape[-1]))
        return jnp.concatenate([nope, shared], axis=-1), values

    def _rotate(self, x: Float[Array, "b s H O"], positions: Positions) -> Float[Array, "b s H O"]:
        return rotate(x, positions, theta=self.config.rope_theta, layout=self.config.rope_layout)


def attend_xla(queries: Queries, keys: Queries, values: Values, scale: float) -> Values:
    """Causal attention as two matrix products around a float32 softmax; holds all scores in memory."""
    row = jnp.arange(queries.shape[1])
    return attend_masked_xla(queries, keys, values, scale, (row[:, None] >= row[None, :])[None])


def attend_cudnn(queries: Queries, keys: Queries, values: Values, scale: float) -> Values:
    """Causal attention fused by cuDNN."""
    attended = jax.nn.dot_product_attention(
        *_of_one_width(queries, keys, values), scale=scale, is_causal=True, implementation="cudnn"
    )
    return attended[..., : values.shape[-1]]


def cudnn_refusal(config: AttentionConfig) -> str:
    """Returns why cuDNN's attention does not take heads of these sizes, "" if it does."""
    width = _cudnn_width(config.query_dim, config.value_dim)
    # What jax allows: it looks for a GPU to ask, though one may only be compiled for.
    capability = gpu_capability()
    widest = 256 if capability is not None and capability >= (9, 0) else 128
    where = " where there is no GPU" if capability is None else ""
    return "" if width <= widest else f"heads of at most {widest} values{where}, not {width}"


def _of_one_width(queries: Array, keys: Array, values: Array) -> list[Array]:
    """Pads heads with zeros, which change no product: cuDNN wants one size."""
    width = _cudnn_width(keys.shape[-1], values.shape[-1])
    return [jnp.pad(heads, ((0, 0),) * 3 + ((0, width - heads.shape[-1]),)) for heads in (queries, keys, values)]


def _cudnn_width(query_dim: int, value_dim: int) -> int:
    return -(-max(query_dim, value_dim) // 8) * 8


def attend_masked_xla(
    queries: Queries, keys: KeysOfCache, values: ValuesOfCache, scale: float, allowed: Bool[Array, "#b s S"]
) -> Values:
    """Attention of each query to the keys it is allowed; holds all scores in memory."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", queries, keys, preferred_element_type=jnp.float32) * scale
    share = jax.nn.softmax(jnp.where(allowed[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhqk,bkhu->bqhu", share.astype(values.dtype), values)


def attend_masked_cudnn(
    queries: Queries, keys: KeysOfCache, values: ValuesOfCache, scale: float, allowed: Bool[Array, "#b s S"]
) -> Values:
    """Attention of each query to the keys it is allowed, fused by cuDNN."""
    attended = jax.nn.dot_product_attention(
        *_of_one_width(queries, keys, values), mask=allowed[:, None], scale=scale, implementation="cudnn"
    )
    return attended[..., : values.shape[-1]]


ATTENTIONS = {"xla": attend_xla, "cudnn": attend_cudnn}
MASKED_ATTENTIONS = {"xla": attend_masked_xla, "cudnn": attend_masked_cudnn}
