"""One training step as one program: forward, backward, gradient sums, update, balance.

Loss, gradients and counts are computed in one shard_map, where every collective
is a visible call. The update is elementwise optax on whole arrays, sharded as the
parameters are, so it needs none but the global norm's.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Float32, Int32

from moe_ep.config import Config
from moe_ep.dispatch import DispatchCounts, sum_counts
from moe_ep.mesh import ALL_AXES, TOKENS, compiler_options, vary
from moe_ep.model.router import mean_score
from moe_ep.model.transformer import Transformer, by_layer, for_computation, in_stacks
from moe_ep.shapes import Count, Scalar
from moe_ep.train import balance
from moe_ep.train.loss import LossReport, local_loss
from moe_ep.train.optimizer import global_norm, make_optimizer
from moe_ep.train.state import TrainState, abstract_state, platform_of

CHOICES = P(None, None, ALL_AXES)  # micro-batch, layer, token, choice


class BatchReport(NamedTuple):
    """What a batch gave, the same on every device but for the choices, which stay with their tokens."""

    loss: Scalar  # mean cross-entropy, nats
    expert_counts: Int32[Array, "L E"]
    dispatch: DispatchCounts  # summed over devices, layers and micro-batches; waves: the most
    choices: Int32[Array, "A L T K"]


class StepReport(NamedTuple):
    """A batch's report and what the update made of it."""

    batch: BatchReport
    gradient_norm: Scalar
    fits: Array  # bool: the program had waves enough, or drops, and so had the one before; if not, the state is unchanged
    finite: Array  # bool: loss and gradients; if not, the update was skipped
    max_bias: Scalar


def _summarize(report: LossReport, global_tokens: int) -> BatchReport:
    """Sums over devices, layers and micro-batches; the report's leading axis is the micro-batch."""
    layers = report.layers
    expert_counts = jax.lax.psum(jnp.sum(layers.expert_counts, axis=0), ALL_AXES)
    loss = jax.lax.psum(jnp.sum(report.cross_entropy), ALL_AXES) / global_tokens
    return BatchReport(loss, expert_counts, sum_counts(layers.dispatch), layers.choices)


def sum_gradients(gradients: Transformer, specs: Transformer) -> Transformer:
    """Sums each gradient over the axes that hold copies of its parameter, those of layers one by one apart."""

    def add(gradient: Array | tuple, spec: Any) -> Array | tuple:
        if _is_layers(gradient):
            return tuple(jax.tree.map(add, layer, spec) for layer in gradient)
        split = {axis for entry in spec for axis in (entry if isinstance(entry, tuple) else (entry,))}
        copies = tuple(axis for axis in ALL_AXES if axis not in split)
        if not copies:
            return gradient
        summed = jax.lax.psum(gradient, copies)
        # Without a barrier XLA may join the layers' sums to one, which waits for the last.
        return jax.lax.optimization_barrier(summed) if jax.lax.axis_size(copies) > 1 else summed

    with jax.named_scope("sum_gradients"):
        return jax.tree.map(add, gradients, specs, is_leaf=_is_layers)


def _is_layers(part: object) -> bool:
    return isinstance(part, tuple)


def _in_float32(gradients: Transformer) -> Transformer:
    """Sums and updates are float32; where there is nothing to sum, the conversion joins the update's pass."""
    return jax.tree.map(lambda gradient: gradient.astype(jnp.float32), gradients)


def make_gradients(config: Config, specs: Transformer, mesh: Mesh) -> Callable:
    """Returns (parameters, tokens, bias, replay) -> (gradients, BatchReport), over whole arrays.

    Tokens are int32 [batch_sequences, sequence + 1]; replay is None or the choices
    of an earlier report.
    """
    train = config.train
    global_tokens = train.batch_sequences * train.sequence
    arrange, arrange_back = (by_layer, in_stacks) if config.model.unroll else (lambda whole: whole,) * 2

    def on_device(parameters, tokens, bias, replay):
        parameters, bias = arrange(for_computation(vary(parameters))), vary(bias)
        tokens = tokens.reshape(train.accumulation, -1, tokens.shape[-1])

        def loss(parameters, tokens, replay):
            return local_loss(
                parameters,
                tokens,
                bias,
                replay,
                dispatch=config.dispatch,
                global_tokens=global_tokens,
                z_loss=train.router_z_loss,
            )

        def add_micro_batch(total, micro_batch):
            gradients, report = jax.grad(loss, has_aux=True)(parameters, *micro_batch)
            return jax.tree.map(jnp.add, total, _in_float32(gradients)), report

        if train.accumulation == 1:
            first = None if replay is None else replay[0]
            gradients, report = jax.grad(loss, has_aux=True)(parameters, tokens[0], first)
            reports = jax.tree.map(lambda leaf: leaf[None], report)
        else:
            zeros = vary(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), parameters))
            gradients, reports = jax.lax.scan(add_micro_batch, zeros, (tokens, replay))
        return arrange_back(sum_gradients(_in_float32(gradients), specs)), _summarize(reports, global_tokens)

    def call(parameters, tokens, bias, replay):
        # The choices stay with their tokens; all else is the same everywhere.
        report_specs = BatchReport(P(), P(), P(), CHOICES)
        sharded = jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(specs, TOKENS, P(), None if replay is None else CHOICES),
            out_specs=(specs, report_specs),
        )
        return sharded(parameters, tokens, bias, replay)

    return call


def parameter_specs(config: Config, mesh: Mesh) -> Transformer:
    """Returns the PartitionSpec of every parameter, as stated where it is made."""
    return nnx.get_partition_spec(abstract_state(config, mesh).parameters)


def with_waves(config: Config, waves: int) -> Config:
    """Returns the config of the program with this many waves."""
    return dataclasses.replace(config, dispatch=dataclasses.replace(config.dispatch, waves=waves))


def make_step(config: Config, mesh: Mesh) -> Callable:
    """Returns the jitted (state, tokens, replay=None, previous_fits=None) -> (state, StepReport); the state is donated.

    The program has `config.dispatch.waves` waves. When the routing needs more (and
    drops are not asked for), or a gradient is not finite, the returned state equals
    the one passed in. So it does where `previous_fits`, the `fits` of the step before,
    is false: this step can be launched before that one's report is read.
    """
    gradients_of = make_gradients(config, parameter_specs(config, mesh), mesh)
    optimizer = make_optimizer(config.train.optimizer, config.train.steps)
    unit = mean_score(config.model.moe)

    def step(state: TrainState, tokens: Int32[Array, "B S1"], replay=None, previous_fits=None):
        gradients, report = gradients_of(state.parameters, tokens, state.bias, replay)
        with jax.named_scope("update"), jax.numpy_dtype_promotion("standard"):
            norm = global_norm(gradients)
            updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.parameters, norm=norm)
            parameters = optax.apply_updates(state.parameters, updates)
        load, step_done = state.load + report.expert_counts, state.step + 1
        due = step_done % jnp.maximum(state.balance_interval, 1) == 0
        moved = balance.update(state.bias, load, config.balance, unit)
        after = state._replace(
            step=step_done,
            parameters=parameters,
            optimizer=optimizer_state,
            bias=jnp.where(due, moved, state.bias),
            load=jnp.where(due, jnp.zeros_like(load), load),
        )
        fits = (report.dispatch.waves_needed <= config.dispatch.waves) | config.dispatch.drop
        fits = fits if previous_fits is None else fits & previous_fits
        finite = jnp.isfinite(report.loss) & jnp.isfinite(norm)
        accepted = fits & finite
        with jax.named_scope("update"):  # one pass with the optimizer's
            after = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), after, state)
        return after, StepReport(report, norm, fits, finite, jnp.max(jnp.abs(after.bias)))

    return jax.jit(step, donate_argnums=0, compiler_options=_options(mesh))


def _options(mesh: Mesh) -> dict | None:
    """What the compiler is given: options that order compute and communication, of which one device has none."""
    return compiler_options(platform_of(mesh)) if mesh.size > 1 else None


def make_evaluate(config: Config, mesh: Mesh) -> Callable:
    """Returns the jitted (parameters, tokens, bias) -> (mean loss, waves needed); counts no load."""
    specs = parameter_specs(config, mesh)
    global_tokens = config.train.batch_sequences * config.train.sequence

    def on_device(parameters, tokens, bias) -> tuple[Float32[Array, ""], Count]:
        parameters, bias = vary(parameters), vary(bias)
        _, report = local_loss(
            parameters, tokens, bias, None, dispatch=config.dispatch, global_tokens=global_tokens, z_loss=0.0
        )
        summary = _summarize(jax.tree.map(lambda leaf: leaf[None], report), global_tokens)
        return summary.loss, summary.dispatch.waves_needed

    return jax.jit(
        jax.shard_map(on_device, mesh=mesh, in_specs=(specs, TOKENS, P()), out_specs=(P(), P())),
        compiler_options=_options(mesh),
    )
