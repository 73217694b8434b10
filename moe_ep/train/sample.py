"""A short sample of text from a model in training, to look at: a window is run again for every token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_ep.config import Config
from moe_ep.data import Tokenizer
from moe_ep.mesh import REPLICATED, TOKENS, place_batch, vary
from moe_ep.train.state import TrainState
from moe_ep.train.step import parameter_specs

_TEMPERATURE = 0.7


def sample_text(config: Config, mesh: Mesh, state: TrainState, tokenizer: Tokenizer, prompt: str) -> str:
    """Returns the prompt and what the model makes of it, `config.train.sample_tokens` more.

    The whole model runs over a window of the training length for each token: simple,
    and the same program on every mesh. Serving has a cache instead.
    """
    window = config.train.sequence
    tokens = list(tokenizer.encode(prompt))[: window // 2] or [0]
    next_logits = _make_next_logits(config, mesh)
    random = np.random.default_rng(config.seed)
    for _ in range(config.train.sample_tokens):
        recent = tokens[-window:]
        padded = np.zeros((mesh.size, window), np.int32)
        padded[:, : len(recent)] = recent
        logits = np.asarray(next_logits(state, place_batch(padded, mesh), jnp.int32(len(recent) - 1)))
        logits = logits[: tokenizer.vocabulary_size] / _TEMPERATURE
        share = np.exp(logits - logits.max())
        tokens.append(int(random.choice(len(share), p=share / share.sum())))
    return tokenizer.decode(np.asarray(tokens, np.int32))


def _make_next_logits(config: Config, mesh: Mesh):
    """Returns the jitted (state, tokens, position) -> float32 [V], after the token at that position."""
    specs = parameter_specs(config, mesh)
    # Every device routes the same padded window: let the buffers hold even the worst routing.
    dispatch = dataclasses.replace(config.dispatch, transport="all_gather", overlap="none", chunks=1, margin_sigmas=1e9)

    def on_device(parameters, bias, tokens, position):
        hidden, _ = parameters(tokens, bias, dispatch)
        logits = parameters.logits(jax.lax.dynamic_slice_in_dim(hidden, position, 1, axis=1))
        return logits[:1, 0]

    sharded = jax.shard_map(
        lambda parameters, bias, tokens, position: on_device(vary(parameters), vary(bias), tokens, position),
        mesh=mesh,
        in_specs=(specs, P(), TOKENS, P()),
        out_specs=TOKENS,
    )
    # On every device, so that each process has the logits and draws the same token.
    return jax.jit(
        lambda state, tokens, position: sharded(state.parameters, state.bias, tokens, position)[0],
        out_shardings=NamedSharding(mesh, REPLICATED),
    )
