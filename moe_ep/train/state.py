"""Everything that training carries from step to step, and where it lives on a mesh."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float32, Int32

from moe_ep.config import Config
from moe_ep.mesh import shardings
from moe_ep.model.transformer import Transformer, for_platform
from moe_ep.train.optimizer import make_optimizer


class TrainState(NamedTuple):
    """Whole arrays, sharded over the mesh; all of it is checkpointed."""

    step: Int32[Array, ""]  # updates done
    parameters: Transformer  # float32 master weights
    optimizer: optax.OptState
    bias: Float32[Array, "L E"]  # the balance bias, outside the optimizer
    load: Int32[Array, "L E"]  # assignments since the bias last moved
    balance_interval: Int32[Array, ""]  # steps between moves; 0 until an interval in ms is measured


def make_state(config: Config, platform: str) -> TrainState:
    """Returns the state before the first step; traced, it allocates nothing."""
    parameters = Transformer(jax.random.key(config.seed), for_platform(config.model, platform))
    layers_experts = (config.model.moe_layers, config.model.moe.num_experts)
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules mix types
        optimizer = make_optimizer(config.train.optimizer, config.train.steps).init(parameters)
    return TrainState(
        step=jnp.int32(0),
        parameters=parameters,
        optimizer=optimizer,
        bias=jnp.zeros(layers_experts, jnp.float32),
        load=jnp.zeros(layers_experts, jnp.int32),
        balance_interval=jnp.int32(0 if config.balance.interval_ms else config.balance.interval_steps),
    )


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """Returns the state's shapes, types and shardings, without values."""
    shapes = jax.eval_shape(lambda: make_state(config, platform_of(mesh)))
    placed = shardings(mesh, nnx.get_partition_spec(shapes))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, placed
    )


def init_state(config: Config, mesh: Mesh) -> TrainState:
    """Returns the state before the first step, made where it lives."""
    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    # Run once, so on a CPU time goes to compiling its random bits: a third of it without optimisation.
    options = {"xla_backend_optimization_level": 0} if platform_of(mesh) == "cpu" else None
    make = jax.jit(lambda: make_state(config, platform_of(mesh)), out_shardings=placed, compiler_options=options)
    return make()


def platform_of(mesh: Mesh) -> str:
    """Returns "cpu" or "gpu", of devices that need not be here."""
    return mesh.devices.flat[0].platform
