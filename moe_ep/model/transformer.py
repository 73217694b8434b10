"""Tokens to logits: embedding, the scanned dense stack, the scanned MoE stack, norm, output head."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float32, Int32

from moe_ep.config import DispatchConfig, ModelConfig, require
from moe_ep.dispatch.exchange import CROSSED
from moe_ep.model.block import AttentionHalf, DenseBlock, MoEBlock
from moe_ep.model.decode import decode_blocks, extend_blocks, prefill_blocks
from moe_ep.model.kv_cache import LatentCache, Lengths, Pages, own_pages
from moe_ep.model.mla import cudnn_refusal
from moe_ep.model.moe import MoEReport
from moe_ep.model.norm import RMSNorm
from moe_ep.model.parameter import layers_of, matrix, stack, stack_of
from moe_ep.model.staggered import over_layers, scan_staggered
from moe_ep.shapes import Activations, Logits, Mask, Positions, Tokens


class Transformer(nnx.Module):
    """The whole model; called inside a shard_map over the mesh of `moe_ep.mesh`.

    Args:
      key: of all parameters' values; the same key gives the same model on every mesh.
      config: sizes and types; `attention.implementation` must be resolved (not "auto").
    """

    def __init__(self, key: Array, config: ModelConfig):
        self.config = config
        keys = jax.random.split(key, 4)
        table = (config.vocabulary, config.width)
        self.embedding = matrix(keys[0], table, (None, None), fan_in=1, scale=config.embedding_scale)
        make_dense = lambda key: DenseBlock(key, config)  # noqa: E731
        self.dense = stack(make_dense, keys[1], config.dense_layers) if config.dense_layers else None
        self.moe = stack(lambda key: MoEBlock(key, config), keys[2], config.moe_layers)
        self.norm = RMSNorm(config.width, config.norm_epsilon)
        self.head = matrix(keys[3], (config.width, config.vocabulary), (None, None), fan_in=config.width)

    def __call__(
        self,
        tokens: Tokens,
        bias: Float32[Array, "L E"],
        dispatch: DispatchConfig,
        replay: Int32[Array, "L t K"] | None = None,
    ) -> tuple[Activations, MoEReport]:
        """Returns the normed output of the last block and every MoE layer's report, stacked over layers.

        Args:
          tokens: this device's sequences, each from position 0.
          bias: the balance bias of every MoE layer.
          dispatch: how rows travel, and the waves of this program.
          replay: choices to use instead of the routers' own, where they are not negative.
        """
        x = self.embed(tokens)
        remember = _REMAT[self.config.remat]
        positions = _positions(x)

        @remember
        def dense_step(x: Activations, layer: tuple[DenseBlock]) -> tuple[Activations, None]:
            return layer[0](x, positions), None

        if self.dense is not None:
            x, _ = over_layers(dense_step, x, self.dense)
        scan_blocks = _OVERLAPS[dispatch.overlap_for(positions.size, positions.shape[0])]
        x, reports = scan_blocks(x, self.moe, bias, replay, remember, dispatch)
        return self.norm(x), reports

    def prefill(
        self,
        tokens: Tokens,
        lengths: Lengths,
        bias: Float32[Array, "L E"],
        dispatch: DispatchConfig,
        replay: Int32[Array, "L t K"] | None = None,
    ) -> tuple[Float32[Array, "b V"], LatentCache, MoEReport]:
        """Runs whole prompts.

        Args:
          tokens: this device's prompts, each from position 0; what stands behind a
            prompt's end changes nothing before it.
          lengths: tokens of each prompt.
          bias: the balance bias of every MoE layer.
          dispatch: how rows travel, and the waves of this program.
          replay: choices to use instead of the routers' own, where they are not negative.

        Returns:
          The logits of each prompt's last token; the cache, with room for s tokens
          (`kv_cache.with_rows` makes more); every MoE layer's report.
        """
        x = self.embed(tokens)
        x, cache, reports = prefill_blocks(x, _positions(x), self.dense, self.moe, bias, dispatch, replay)
        return self._logits_of_last(x, lengths), cache, reports

    def extend(
        self,
        tokens: Tokens,
        counts: Lengths,
        cache: LatentCache,
        starts: Lengths,
        bias: Float32[Array, "L E"],
        dispatch: DispatchConfig,
        pages: Pages,
    ) -> tuple[Float32[Array, "b V"], LatentCache, MoEReport]:
        """Runs the next chunk of each prompt; one program serves all prompts and places in them.

        Args:
          tokens: the chunks.
          counts: tokens of each chunk, 0 for none; what stands behind them is sent to
            no expert, counted nowhere and not cached.
          cache: of the tokens before; donate it. Its rows from `starts` on are written.
          starts: tokens before the chunk.
          bias: the balance bias of every MoE layer.
          dispatch: how rows travel, and the waves of this program; not "staggered".
          pages: of each sequence in the cache, in order.

        Returns:
          The logits of each chunk's last token; the cache; every MoE layer's report.
        """
        valid = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :] < counts[:, None]
        x = self.embed(tokens)
        x, cache, reports = extend_blocks(x, self.dense, self.moe, cache, pages, starts, valid, bias, dispatch)
        return self._logits_of_last(x, counts), cache, reports

    def decode(
        self,
        tokens: Int32[Array, "b"],
        cache: LatentCache,
        lengths: Lengths,
        bias: Float32[Array, "L E"],
        dispatch: DispatchConfig,
        pages: Pages | None = None,
        replay: Int32[Array, "L b K"] | None = None,
        active: Bool[Array, "b"] | None = None,
    ) -> tuple[Float32[Array, "b V"], LatentCache, MoEReport]:
        """Runs one new token of each sequence; one program serves all lengths.

        Args:
          tokens: the new ones.
          cache: of the tokens before; donate it. Its rows at `lengths` are written.
          lengths: tokens before the new one, its position.
          bias: the balance bias of every MoE layer.
          dispatch: how rows travel, and the waves of this program.
          pages: of each sequence in the cache, in order; None where each has a page to itself.
          replay: choices to use instead of the routers' own, where they are not negative.
          active: the sequences that there are; the others' tokens are sent to no expert,
            counted nowhere and not cached. None: all; "staggered" takes no other.

        Returns:
          The logits of the next token; the cache; every MoE layer's report.
        """
        pages = own_pages(cache) if pages is None else pages
        x = self.embed(tokens[:, None])
        mask: Mask | None = None if active is None else active[:, None]
        x, cache, reports = decode_blocks(x, self.dense, self.moe, cache, pages, lengths, bias, dispatch, replay, mask)
        return self.logits(self.norm(x))[:, 0], cache, reports

    def _logits_of_last(self, x: Activations, lengths: Lengths) -> Float32[Array, "b V"]:
        last = jnp.take_along_axis(x, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)
        return self.logits(self.norm(last))[:, 0]

    def embed(self, tokens: Tokens) -> Activations:
        """Returns the tokens' rows of the embedding."""
        with jax.named_scope("embedding"):
            # Gathered before rounding: the gradient adds a token's rows up in float32.
            return self.embedding[...][tokens].astype(jnp.dtype(self.config.dtype))

    def logits(self, hidden: Activations) -> Logits:
        """Returns float32 logits over the vocabulary."""
        with jax.named_scope("head"):
            head = self.head[...].astype(hidden.dtype)
            return jnp.einsum("bsd,dv->bsv", hidden, head, preferred_element_type=jnp.float32)


# Used in float32, whatever the computation's type: small, and choices hang on them; or read by the row.
_FLOAT32 = ("router", "gain", "embedding")


def for_computation(parameters: Transformer) -> Transformer:
    """Returns the parameters with every matrix in the type of the computation, as its products read it.

    Differentiating at these gives gradients of their types, each rounded once as its product is written.
    """
    dtype = jnp.dtype(parameters.config.dtype)

    def cast(path: tuple, leaf: Array) -> Array:
        kept = any(part in jax.tree_util.keystr(path) for part in _FLOAT32)
        return leaf if kept else leaf.astype(dtype)

    with jax.named_scope("cast_parameters"):
        return jax.tree_util.tree_map_with_path(cast, parameters)


def by_layer(parameters: Transformer) -> Transformer:
    """Returns the parameters with every stack as a tuple of its layers, which are then written out one after another.

    Differentiating at these gives the gradients of a layer as soon as its backward pass has ended.
    """
    return _change_stacks(layers_of, parameters)


def in_stacks(parameters: Transformer) -> Transformer:
    """Returns what `by_layer` made, gradients too, as stacks again."""
    return _change_stacks(stack_of, parameters)


def _change_stacks(change: Callable, parameters: Transformer) -> Transformer:
    changed = jax.tree.map(lambda leaf: leaf, parameters)
    changed.dense = None if parameters.dense is None else change(parameters.dense)
    changed.moe = change(parameters.moe)
    return changed


def _positions(x: Activations) -> Positions:
    return jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32)[None, :], x.shape[:2])


def _scan_whole(
    x: Activations,
    blocks: MoEBlock | tuple[MoEBlock, ...],
    bias: Array,
    replay: Array | None,
    remember: Callable,
    dispatch: DispatchConfig,
) -> tuple[Activations, MoEReport]:
    positions = _positions(x)

    @remember
    def step(x: Activations, layer: tuple) -> tuple[Activations, MoEReport]:
        block, bias, replay = layer
        return block(x, positions, bias, dispatch, replay)

    return over_layers(step, x, blocks, bias, replay)


def _scan_halves(
    x: Activations,
    blocks: MoEBlock | tuple[MoEBlock, ...],
    bias: Array,
    replay: Array | None,
    remember: Callable,
    dispatch: DispatchConfig,
) -> tuple[Activations, MoEReport]:
    def attend(half: AttentionHalf, x: Activations, _: None, state: None) -> tuple[Activations, None, None]:
        return half(x, _positions(x)), None, state

    x, reports, _, _ = scan_staggered(attend, x, blocks, bias, replay, None, remember, dispatch)
    return x, reports


_OVERLAPS = {"none": _scan_whole, "chunks": _scan_whole, "staggered": _scan_halves}

_KEEP = jax.checkpoint_policies.save_only_these_names(CROSSED)
_REMAT: dict[str, Callable] = {
    "none": lambda step: step,
    "keep_dispatch": lambda step: jax.checkpoint(step, policy=_KEEP, prevent_cse=False),
    "block": lambda step: jax.checkpoint(step, prevent_cse=False),
}


def for_platform(config: ModelConfig, platform: str) -> ModelConfig:
    """Returns the config with attention's implementation resolved for the platform that will run it.

    Args:
      config: of the model.
      platform: "cpu" or "gpu", of the mesh's devices (which need not be here).

    Raises:
      ConfigError: cuDNN is asked for what it does not take.
    """
    refusal = _cudnn_refusal(config, platform)
    chosen = config.attention.implementation
    require(chosen != "cudnn" or not refusal, "model.attention.implementation", chosen, f"auto or xla: cuDNN takes {refusal}")
    if chosen != "auto":
        return config
    attention = dataclasses.replace(config.attention, implementation="xla" if refusal else "cudnn")
    return dataclasses.replace(config, attention=attention)


def _cudnn_refusal(config: ModelConfig, platform: str) -> str:
    if platform != "gpu":
        return "GPUs"
    return cudnn_refusal(config.attention) if config.dtype == "bfloat16" else "bfloat16"
