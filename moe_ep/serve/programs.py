"""The two programs that serve: prompts to a cache and a first token, and one token more of every sequence."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Float32, Int32

from moe_ep.config import DispatchConfig, ModelConfig
from moe_ep.mesh import TOKENS, vary
from moe_ep.model.kv_cache import CACHE, LatentCache, with_rows
from moe_ep.model.transformer import Transformer
from moe_ep.serve.sampler import Sampler, Sampling

# Larger than any spread of a routing: buffers then hold the worst one.
_ANY_ROUTING_SIGMAS = 1e9


class Sequences(NamedTuple):
    """A batch between two tokens, on the mesh."""

    tokens: Int32[Array, "B"]  # the newest of each sequence, not in the cache yet
    lengths: Int32[Array, "B"]  # tokens in the cache
    cache: LatentCache


class Programs(NamedTuple):
    """Jitted functions over whole arrays.

    prefill(parameters, bias, tokens[B, S], lengths[B], sampling) -> Sequences
    decode(parameters, bias, tokens, lengths, cache, sampling) -> Sequences; the cache is donated
    """

    prefill: Callable[..., Sequences]
    decode: Callable[..., Sequences]


def serving_dispatch(dispatch: DispatchConfig) -> DispatchConfig:
    """Returns the dispatch whose buffers hold any routing, in one wave.

    Serving must neither drop a row nor compile a program in the middle of an answer,
    and its batches are small: the worst routing costs min(top-k, experts of a
    device) rows a token and destination.
    """
    return dataclasses.replace(
        dispatch, overlap="none", chunks=1, waves=1, margin_sigmas=_ANY_ROUTING_SIGMAS, drop=False
    )


def make_programs(
    model: ModelConfig, mesh: Mesh, dispatch: DispatchConfig, *, sampler: Sampler, vocabulary: int, cache_rows: int
) -> Programs:
    """Returns the programs of one model on one mesh.

    Args:
      model: its attention's implementation resolved.
      mesh: sequences are split over all of it.
      dispatch: how rows travel; its buffers are made to hold any routing.
      sampler: of `sampler`: greedy or draw.
      vocabulary: ids from here on are padding, and never drawn.
      cache_rows: room for each sequence.
    """
    dispatch = serving_dispatch(dispatch)

    def choose(logits: Float32[Array, "b V"], sampling: Sampling, positions: Int32[Array, "b"]) -> Int32[Array, "b"]:
        allowed = jnp.arange(logits.shape[-1]) < vocabulary
        with jax.named_scope("sample"):
            return sampler(jnp.where(allowed[None, :], logits, -jnp.inf), sampling, positions)

    def prefill(model: Transformer, bias: Array, tokens: Array, lengths: Array, sampling: Sampling) -> Sequences:
        logits, cache, _ = model.prefill(tokens, lengths, bias, dispatch)
        return Sequences(choose(logits, sampling, lengths), lengths, with_rows(cache, cache_rows))

    def decode(
        model: Transformer, bias: Array, tokens: Array, lengths: Array, cache: LatentCache, sampling: Sampling
    ) -> Sequences:
        logits, cache, _ = model.decode(tokens, cache, lengths, bias, dispatch)
        return Sequences(choose(logits, sampling, lengths + 1), lengths + 1, cache)

    specs = nnx.get_partition_spec(jax.eval_shape(lambda: Transformer(jax.random.key(0), model)))
    sequences = Sequences(TOKENS, TOKENS, CACHE)

    def program(on_device: Callable, in_specs: tuple) -> Callable:
        return jax.shard_map(
            lambda model, bias, *rest: on_device(vary(model), vary(bias), *rest),
            mesh=mesh,
            in_specs=(specs, P(), *in_specs),
            out_specs=sequences,
        )

    return Programs(
        jax.jit(program(prefill, (TOKENS, TOKENS, TOKENS))),
        jax.jit(program(decode, (*sequences, TOKENS)), donate_argnums=4),
    )
