"""The real programs, ready to be lowered for devices that are not here."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_ep.config import Config, require
from moe_ep.mesh import ALL_AXES, TOKENS, shardings, vary
from moe_ep.model.kv_cache import CACHE, make_cache, round_up_rows
from moe_ep.model.transformer import Transformer, for_platform
from moe_ep.train.state import abstract_state
from moe_ep.train.step import make_step


class Program(NamedTuple):
    """A function to lower, and the shapes, types and shardings of what it takes."""

    function: Callable
    arguments: tuple
    tokens_per_gpu: int


def make_program(config: Config, mesh: Mesh) -> Program:
    """Returns the program that `config.aot.program` names, sized by `config.aot`.

    Raises:
      ConfigError: there is no such program.
    """
    require(config.aot.program in PROGRAMS, "aot.program", config.aot.program, "one of " + ", ".join(PROGRAMS))
    return PROGRAMS[config.aot.program](config, mesh)


def sequences_per_gpu(config: Config) -> int:
    """Returns the sequences of one GPU's share of the batch.

    Raises:
      ConfigError: the tokens are not whole sequences.
    """
    aot = config.aot
    require(aot.tokens_per_gpu % aot.context == 0, "aot.tokens_per_gpu", aot.tokens_per_gpu,
            f"a multiple of aot.context = {aot.context}")  # fmt: skip
    return aot.tokens_per_gpu // aot.context


def _train(config: Config, mesh: Mesh) -> Program:
    train = dataclasses.replace(
        config.train,
        sequence=config.aot.context,
        batch_sequences=sequences_per_gpu(config) * mesh.size * config.train.accumulation,
    )
    config = dataclasses.replace(config, train=train)
    tokens = jax.ShapeDtypeStruct(
        (train.batch_sequences, train.sequence + 1), jnp.int32, sharding=NamedSharding(mesh, TOKENS)
    )
    return Program(make_step(config, mesh), (abstract_state(config, mesh), tokens), config.aot.tokens_per_gpu)


def _prefill(config: Config, mesh: Mesh) -> Program:
    """Whole prompts through the model; the logits of each prompt's last token."""
    parameters, specs = served_parameters(config, mesh)

    def on_device(parameters, tokens, bias):
        parameters, bias = vary(parameters), vary(bias)
        hidden, report = parameters(tokens, bias, config.dispatch)
        waves = jax.lax.pmax(jnp.max(report.dispatch.waves_needed), ALL_AXES)
        return parameters.logits(hidden[:, -1:]), waves

    function = jax.shard_map(on_device, mesh=mesh, in_specs=(specs, TOKENS, P()), out_specs=(TOKENS, P()))
    batch = sequences_per_gpu(config) * mesh.size
    tokens = jax.ShapeDtypeStruct((batch, config.aot.context), jnp.int32, sharding=NamedSharding(mesh, TOKENS))
    return Program(jax.jit(function), (parameters, tokens, _bias(config, mesh)), config.aot.tokens_per_gpu)


def _decode(config: Config, mesh: Mesh) -> Program:
    """One new token of every sequence; `aot.tokens_per_gpu` are those cached, in sequences of `aot.context`."""
    parameters, specs = served_parameters(config, mesh)
    batch = sequences_per_gpu(config) * mesh.size

    def on_device(parameters, tokens, cache, lengths, bias):
        logits, cache, report = vary(parameters).decode(tokens, cache, lengths, vary(bias), config.dispatch)
        return logits, cache, jax.lax.pmax(jnp.max(report.dispatch.waves_needed), ALL_AXES)

    caches = jax.eval_shape(lambda: make_cache(config.model, batch, round_up_rows(config.aot.context)))
    cache = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, CACHE)), caches
    )
    function = jax.shard_map(
        on_device, mesh=mesh, in_specs=(specs, TOKENS, CACHE, TOKENS, P()), out_specs=(TOKENS, CACHE, P())
    )
    per_sequence = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=NamedSharding(mesh, TOKENS))
    arguments = (parameters, per_sequence, {"cache": cache}, per_sequence, _bias(config, mesh))

    def decode(parameters, tokens, held, lengths, bias):
        return function(parameters, tokens, held["cache"], lengths, bias)

    return Program(jax.jit(decode, donate_argnums=2), arguments, sequences_per_gpu(config))


def _bias(config: Config, mesh: Mesh) -> jax.ShapeDtypeStruct:
    layers_experts = (config.model.moe_layers, config.model.moe.num_experts)
    return jax.ShapeDtypeStruct(layers_experts, jnp.float32, sharding=NamedSharding(mesh, P()))


def served_parameters(config: Config, mesh: Mesh) -> tuple[Transformer, Transformer]:
    """Returns the parameters as they are served, without values, and their PartitionSpecs.

    Matrices are in the type of the computation; router and norms stay float32.
    """
    model = for_platform(config.model, mesh.devices.flat[0].platform)
    shapes = jax.eval_shape(lambda: Transformer(jax.random.key(0), model))
    specs = nnx.get_partition_spec(shapes)

    def serve(path, leaf, sharding):
        name = jax.tree_util.keystr(path)
        kept = "router" in name or "norm" in name
        dtype = jnp.float32 if kept else jnp.dtype(model.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(serve, shapes, shardings(mesh, specs)), specs


PROGRAMS = {"prefill": _prefill, "decode": _decode, "train": _train}
