"""The two programs that serve: a chunk of some prompts, and one token more of every sequence.

Both take the newest token of every slot and the cache, and return them changed; a
slot that a step says nothing of keeps its token, and its rows.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float32, Int32

from moe_ep.config import DispatchConfig, ModelConfig, MoEConfig
from moe_ep.dispatch import TRANSPORTS, make_exchange
from moe_ep.mesh import ALL_AXES, REPLICATED, TOKENS, compiler_options, expert_degree, shardings, vary
from moe_ep.model.kv_cache import CACHE, LatentCache
from moe_ep.model.transformer import Transformer
from moe_ep.serve.inputs import ChunkInputs, DecodeInputs, Sampling
from moe_ep.serve.sampler import Sampler
from moe_ep.shapes import Count

# Larger than any spread of a routing: buffers then hold the worst one.
_ANY_ROUTING_SIGMAS = 1e9


class StepReport(NamedTuple):
    """What the host reads of a step; whole on every device."""

    newest: Int32[Array, "B"]  # each slot's newest token, not in the cache yet
    waves_needed: Count  # more than the program's: the step must be run again on one that has them


class Programs(NamedTuple):
    """Jitted functions over whole arrays, both

    (parameters, bias, newest[B], cache, inputs) -> (newest, cache, StepReport)

    with the cache donated. `waves` is how many they have.
    """

    chunk: Callable[..., tuple[Array, LatentCache, StepReport]]
    decode: Callable[..., tuple[Array, LatentCache, StepReport]]
    waves: int


def serving_dispatch(dispatch: DispatchConfig) -> DispatchConfig:
    """Returns the dispatch that serving uses in its place: nothing is dropped, and no batch is staggered."""
    overlap = "chunks" if dispatch.overlap == "chunks" else "none"
    return dataclasses.replace(dispatch, overlap=overlap, drop=False)


def any_routing(dispatch: DispatchConfig) -> DispatchConfig:
    """Returns the dispatch whose buffers hold any routing, in one wave.

    A program with it is the last resort: it costs min(top-k, experts of a device)
    rows a token and destination, where a routing as even as usual needs few more
    than tokens x top-k / devices.
    """
    return dataclasses.replace(dispatch, waves=1, margin_sigmas=_ANY_ROUTING_SIGMAS)


def holds_any_routing(moe: MoEConfig, dispatch: DispatchConfig, mesh: Mesh, tokens: int) -> bool:
    """Returns whether no routing of `tokens` on each device can need more waves than the dispatch has."""
    rows = [
        TRANSPORTS[one.transport].queue_rows(
            make_exchange(one, experts=moe.num_experts, peers=expert_degree(mesh), tokens=tokens, top_k=moe.top_k)
        )
        for one in (dispatch, any_routing(dispatch))
    ]
    return rows[0] * dispatch.waves >= rows[1]


def make_programs(
    model: ModelConfig, mesh: Mesh, dispatch: DispatchConfig, *, sampler: Sampler, vocabulary: int
) -> Programs:
    """Returns the programs of one model on one mesh.

    Args:
      model: its attention's implementation resolved.
      mesh: sequences are split over all of it.
      dispatch: how rows travel, not "staggered", and the waves of the programs.
      sampler: of `sampler`: greedy or draw.
      vocabulary: ids from here on are padding, and never drawn.
    """

    def choose(logits: Float32[Array, "b V"], sampling: Sampling, positions: Int32[Array, "b"]) -> Int32[Array, "b"]:
        allowed = jnp.arange(logits.shape[-1]) < vocabulary
        with jax.named_scope("sample"):
            return sampler(jnp.where(allowed[None, :], logits, -jnp.inf), sampling, positions)

    def chunk(model: Transformer, bias: Array, newest: Array, cache: LatentCache, inputs: ChunkInputs) -> tuple:
        logits, cache, report = model.extend(
            inputs.tokens, inputs.counts, cache, inputs.starts, bias, dispatch, inputs.pages
        )
        chosen = choose(logits, inputs.sampling, inputs.starts + inputs.counts)
        return newest.at[inputs.slots].set(chosen, mode="drop"), cache, report

    def decode(model: Transformer, bias: Array, newest: Array, cache: LatentCache, inputs: DecodeInputs) -> tuple:
        logits, cache, report = model.decode(
            newest, cache, inputs.lengths, bias, dispatch, inputs.pages, active=inputs.active
        )
        chosen = choose(logits, inputs.sampling, inputs.lengths + 1)
        return jnp.where(inputs.active, chosen, newest), cache, report

    specs = nnx.get_partition_spec(jax.eval_shape(lambda: Transformer(jax.random.key(0), model)))
    return Programs(_jit(chunk, specs, mesh), _jit(decode, specs, mesh), dispatch.waves)


def _jit(on_device: Callable, specs: Transformer, mesh: Mesh) -> Callable:
    def counted(model, bias, newest, cache, inputs) -> tuple:
        newest, cache, report = on_device(vary(model), vary(bias), newest, cache, inputs)
        return newest, cache, jax.lax.pmax(jnp.max(report.dispatch.waves_needed), ALL_AXES)

    placed = (specs, REPLICATED, TOKENS, CACHE, TOKENS)
    sharded = jax.shard_map(counted, mesh=mesh, in_specs=placed, out_specs=(TOKENS, CACHE, REPLICATED))

    def step(model, bias, newest, cache, inputs) -> tuple:
        newest, cache, waves_needed = sharded(model, bias, newest, cache, inputs)
        return newest, cache, StepReport(newest, waves_needed)

    out = (TOKENS, CACHE, REPLICATED)
    return jax.jit(
        step,
        in_shardings=shardings(mesh, placed),
        out_shardings=tuple(NamedSharding(mesh, spec) for spec in out),
        donate_argnums=3,
        compiler_options=compiler_options(mesh.devices.flat[0].platform),
    )
