"""What training left in a work directory, as serving needs it: config, parameters and bias, on any mesh."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float32

from moe_ep.config import Config, ConfigError, ModelConfig, from_dict
from moe_ep.mesh import REPLICATED, shardings
from moe_ep.model.names import by_path
from moe_ep.model.transformer import Transformer

# Kept in float32, whatever the computation's type: they are small, and choices hang on them.
_FLOAT32 = ("router", "norm")


def trained_config(config: Config, workdir: Path) -> Config:
    """Returns the config with the model and the data that the work directory's run was trained with.

    Raises:
      ConfigError: no run is there, or its config.json is not one of this program.
    """
    path = workdir / "config.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        trained = from_dict(Config, {part: saved[part] for part in ("model", "data")})
    except OSError as error:
        raise ConfigError(f"--workdir={workdir}: allowed is {_ALLOWED}; config.json: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--workdir={workdir}: allowed is {_ALLOWED}; config.json: {error}") from None
    return dataclasses.replace(config, model=trained.model, data=trained.data)


_ALLOWED = "the directory of a --mode=train run, with config.json and a checkpoint under checkpoints/"


def restore(workdir: Path, model: ModelConfig, mesh: Mesh) -> tuple[Transformer, Float32[Array, "L E"]]:
    """Returns the newest checkpoint's parameters, in the types they are served in, and its balance bias.

    Nothing else of the checkpoint is read, and the mesh need not be the training's.

    Raises:
      ConfigError: there is no checkpoint.
    """
    directory = (workdir / "checkpoints").absolute()
    options = ocp.CheckpointManagerOptions(create=False, read_only=True)
    step = None
    if directory.is_dir():
        manager = ocp.CheckpointManager(directory, options=options)
        step = manager.latest_step()
    if step is None:
        raise ConfigError(f"--workdir={workdir}: allowed is {_ALLOWED}; checkpoints/ has none")
    abstract = {"parameters": abstract_parameters(model, mesh), "bias": abstract_bias(model, mesh)}
    named = by_path(abstract)
    arguments = ocp.args.PyTreeRestore(
        named, restore_args=ocp.checkpoint_utils.construct_restore_args(named), partial_restore=True
    )
    restored = manager.restore(step, args=ocp.args.Composite(state=arguments))["state"]
    manager.close()
    served = jax.tree.unflatten(jax.tree.structure(abstract), [restored[name] for name in named])
    return served["parameters"], served["bias"]


def abstract_parameters(model: ModelConfig, mesh: Mesh) -> Transformer:
    """Returns the served parameters' shapes, types and shardings: matrices in the computation's type."""
    shapes = jax.eval_shape(lambda: Transformer(jax.random.key(0), model))
    placed = shardings(mesh, nnx.get_partition_spec(shapes))

    def served(path: tuple, leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        kept = any(part in jax.tree_util.keystr(path) for part in _FLOAT32)
        return jax.ShapeDtypeStruct(leaf.shape, jnp.float32 if kept else jnp.dtype(model.dtype), sharding=sharding)

    return jax.tree_util.tree_map_with_path(served, shapes, placed)


def abstract_bias(model: ModelConfig, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Returns the balance bias's shape, type and sharding."""
    shape = (model.moe_layers, model.moe.num_experts)
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, REPLICATED))
