"""The real programs, prefill, decode and a training step, with the shapes of what they take: to compile or to time."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int32

from moe_ep.config import Config
from moe_ep.dispatch import DispatchCounts, check_chunks, sum_counts
from moe_ep.hardware import gpu_of_device_kind
from moe_ep.mesh import ALL_AXES, TOKENS, expert_degree, is_present, vary
from moe_ep.model.block import DenseBlock, MoEBlock
from moe_ep.model.kv_cache import CACHE, make_cache, round_up_rows
from moe_ep.model.moe import MoEReport
from moe_ep.model.transformer import Transformer, for_platform
from moe_ep.serve.restore import abstract_parameters
from moe_ep.train.state import abstract_state, platform_of
from moe_ep.train.step import CHOICES, make_step

_SLOP = 95  # percent of the memory left that XLA uses when nothing else is said
CHOICES_OF_LAYERS = P(None, ALL_AXES)  # layer, token, choice


class Program(NamedTuple):
    """A jitted function, and the shapes, types and shardings of what it takes.

    prefill(parameters, tokens, lengths, bias, replay) -> logits, cache, ServedReport
    decode(parameters, tokens, {"cache": cache}, lengths, bias, replay) -> logits, cache, ServedReport; the cache is donated
    train(state, tokens, replay) -> state, StepReport; the state is donated
    """

    function: Callable
    arguments: tuple
    tokens_per_gpu: int


class ServedReport(NamedTuple):
    """What a forward pass moved, the same on every device, and the choices, which stay with their tokens."""

    dispatch: DispatchCounts  # summed over devices and layers; waves: the most
    choices: Int32[Array, "L T K"]


def make_program(config: Config, mesh: Mesh, phase: str, *, sequences: int, context: int, replay: bool = False) -> Program:
    """Returns the program of a phase.

    Args:
      config: of the run; `config.dispatch.waves` are the program's.
      mesh: its devices may be absent.
      phase: a name of PHASES.
      sequences: of each device, in a micro-batch.
      context: tokens of a sequence; in decode those that its cache holds.
      replay: whether it takes choices to use instead of the routers' own; else None is passed.

    Raises:
      ConfigError: the dispatch has more chunks than there are rows to share out.
    """
    program, moe = PHASES[phase](config, mesh, sequences, context, replay), config.model.moe
    check_chunks(config.dispatch, experts=moe.num_experts, peers=expert_degree(mesh), tokens=program.tokens_per_gpu,
                 top_k=moe.top_k)  # fmt: skip
    return program


def _train(config: Config, mesh: Mesh, sequences: int, context: int, replay: bool) -> Program:
    batch = sequences * mesh.size
    accumulation = config.train.accumulation
    train = dataclasses.replace(config.train, sequence=context, batch_sequences=batch * accumulation)
    config = dataclasses.replace(config, train=train)
    tokens = _per_sequence(mesh, train.batch_sequences, context + 1)
    shape = (accumulation, config.model.moe_layers, batch * context, config.model.moe.top_k)
    choices = _int32(mesh, shape, CHOICES) if replay else None
    return Program(make_step(config, mesh), (abstract_state(config, mesh), tokens, choices), sequences * context)


def _prefill(config: Config, mesh: Mesh, sequences: int, context: int, replay: bool) -> Program:
    """Whole prompts through the model: their caches, and the logits of each prompt's last token."""
    parameters, specs = served_parameters(config, mesh)

    def on_device(parameters, tokens, lengths, bias, replay):
        parameters, bias = vary(parameters), vary(bias)
        logits, cache, reports = parameters.prefill(tokens, lengths, bias, config.dispatch, replay)
        return logits, cache, _summarize(reports)

    batch, replay_specs = sequences * mesh.size, CHOICES_OF_LAYERS if replay else None
    function = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(specs, TOKENS, TOKENS, P(), replay_specs),
        out_specs=(TOKENS, CACHE, ServedReport(P(), CHOICES_OF_LAYERS)),
    )
    tokens, lengths = _per_sequence(mesh, batch, context), _per_sequence(mesh, batch)
    choices = _replay(config, mesh, batch * context) if replay else None
    arguments = (parameters, tokens, lengths, _bias(config, mesh), choices)
    options = _count_outputs_once(config, mesh, arguments, jax.eval_shape(function, *arguments))
    return Program(jax.jit(function, compiler_options=options), arguments, sequences * context)


def _count_outputs_once(config: Config, mesh: Mesh, arguments: tuple, outputs: Any) -> dict[str, int] | None:
    """Returns the option by which XLA's scheduler may use the memory that a program of new outputs leaves.

    What it lets itself use is the GPU's memory less arguments and outputs, and what it counts as used has the outputs
    among it (GetSchedulerMemoryLimit in xla/service/gpu/gpu_hlo_schedule.cc): near the memory's end it would give up
    all overlap.
    """
    if platform_of(mesh) != "gpu":
        return None
    kind = mesh.devices.flat[0].device_kind
    gpu = gpu_of_device_kind(kind) if is_present(mesh) else config.cluster.device
    if gpu is None:
        return None
    given = sum(map(shard_bytes, jax.tree.leaves(arguments)))
    made = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(outputs)) / mesh.size
    left = gpu.memory_bytes - given
    return {"xla_gpu_memory_limit_slop_factor": int(_SLOP * left / (left - made))} if made < left else None


def _decode(config: Config, mesh: Mesh, sequences: int, context: int, replay: bool) -> Program:
    """One new token of every sequence, behind the `context` tokens that its cache holds."""
    parameters, specs = served_parameters(config, mesh)
    batch, replay_specs = sequences * mesh.size, CHOICES_OF_LAYERS if replay else None

    def on_device(parameters, tokens, cache, lengths, bias, replay):
        parameters, bias = vary(parameters), vary(bias)
        logits, cache, reports = parameters.decode(tokens, cache, lengths, bias, config.dispatch, replay=replay)
        return logits, cache, _summarize(reports)

    caches = jax.eval_shape(lambda: make_cache(config.model, batch, round_up_rows(context)))
    cache = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, CACHE)), caches
    )
    function = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(specs, TOKENS, CACHE, TOKENS, P(), replay_specs),
        out_specs=(TOKENS, CACHE, ServedReport(P(), CHOICES_OF_LAYERS)),
    )
    tokens, choices = _per_sequence(mesh, batch), _replay(config, mesh, batch) if replay else None
    arguments = (parameters, tokens, {"cache": cache}, tokens, _bias(config, mesh), choices)

    def decode(parameters, tokens, held, lengths, bias, replay):
        return function(parameters, tokens, held["cache"], lengths, bias, replay)

    return Program(jax.jit(decode, donate_argnums=2), arguments, sequences)


def shard_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    """Returns the bytes that one device holds of an array."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _summarize(reports: MoEReport) -> ServedReport:
    return ServedReport(sum_counts(reports.dispatch), reports.choices)


def _int32(mesh: Mesh, shape: tuple[int, ...], spec: P) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, spec))


def _per_sequence(mesh: Mesh, *shape: int) -> jax.ShapeDtypeStruct:
    return _int32(mesh, shape, TOKENS)


def _replay(config: Config, mesh: Mesh, tokens: int) -> jax.ShapeDtypeStruct:
    return _int32(mesh, (config.model.moe_layers, tokens, config.model.moe.top_k), CHOICES_OF_LAYERS)


def _bias(config: Config, mesh: Mesh) -> jax.ShapeDtypeStruct:
    layers_experts = (config.model.moe_layers, config.model.moe.num_experts)
    return jax.ShapeDtypeStruct(layers_experts, jnp.float32, sharding=NamedSharding(mesh, P()))


def served_parameters(config: Config, mesh: Mesh) -> tuple[Transformer, Transformer]:
    """Returns the parameters as they are served, without values, and their PartitionSpecs."""
    served = abstract_parameters(for_platform(config.model, platform_of(mesh)), mesh)
    return served, nnx.get_partition_spec(served)


def init_served_parameters(config: Config, mesh: Mesh) -> Transformer:
    """Returns initial parameters as they are served, with the values that training begins with.

    Layers are made one at a time: a float32 copy of a whole stack may not fit beside it.
    """
    served, _ = served_parameters(config, mesh)
    model = for_platform(config.model, platform_of(mesh))
    key = jax.random.key(config.seed)
    made = jax.tree.map(lambda leaf: leaf, served)
    keys = jax.random.split(key, 4)
    rest = (served.embedding, served.norm, served.head)
    made.embedding, made.norm, made.head = _jit_like(rest, lambda: _outside_stacks(Transformer(key, model)))()
    if model.dense_layers:
        made.dense = _make_stack(lambda key: DenseBlock(key, model), keys[1], served.dense)
    made.moe = _make_stack(lambda key: MoEBlock(key, model), keys[2], served.moe)
    return made


def _outside_stacks(whole: Transformer) -> tuple:
    """Returns what is not in a stack; traced, the stacks are then never made."""
    return whole.embedding, whole.norm, whole.head


def _make_stack(make: Callable[[Array], nnx.Module], key: Array, like: nnx.Module) -> nnx.Module:
    like_leaves, structure = jax.tree.flatten(like)

    def add(leaves: list[Array], key: Array, layer: Array) -> list[Array]:
        made = jax.tree.leaves(make(key))
        return [stack.at[layer].set(new.astype(stack.dtype)) for stack, new in zip(leaves, made, strict=True)]

    leaves = _jit_like(like_leaves, lambda: [jnp.zeros(leaf.shape, leaf.dtype) for leaf in like_leaves])()
    add = _jit_like(like_leaves, add, donate_argnums=0)
    for layer, layer_key in enumerate(jax.random.split(key, like_leaves[0].shape[0])):
        leaves = add(leaves, layer_key, jnp.int32(layer))
    return jax.tree.unflatten(structure, leaves)


def _jit_like(like: Any, make: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Returns `make` jitted, with results in the types and places of `like`."""
    placed = jax.tree.map(lambda leaf: leaf.sharding, like)
    platform = jax.tree.leaves(placed)[0].mesh.devices.flat[0].platform

    def cast(*arguments: Any) -> Any:
        return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), make(*arguments), like)

    # Run a few times at most, so on a CPU time goes to compiling random bits.
    compiler = {"xla_backend_optimization_level": 0} if platform == "cpu" else None
    return jax.jit(cast, out_shardings=placed, compiler_options=compiler, **options)


PHASES = {"prefill": _prefill, "decode": _decode, "train": _train}
