"""Making a parameter: its values, its type and the mesh axes that split it, in one call.

Modules are plain pytrees: `jax.tree.map`, `jax.jit` and `lax.scan` take them as
they are, and `nnx.get_partition_spec` reads the axes stated here. Values are made
in float32 from the key alone, so a parameter is the same on every mesh.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moe_ep.mesh import GPU

MeshAxes = tuple[str | tuple[str, ...] | None, ...]


def matrix(key: Array, shape: tuple[int, ...], axes: MeshAxes, *, fan_in: int, scale: float = 1.0) -> nnx.Param:
    """Returns a float32 parameter drawn from a normal of standard deviation scale / sqrt(fan_in)."""
    values = jax.random.normal(key, shape, jnp.float32) * (scale / math.sqrt(fan_in))
    return nnx.Param(values, out_sharding=axes, eager_sharding=False)


def ones(size: int) -> nnx.Param:
    """Returns a float32 vector of ones on every device."""
    return nnx.Param(jnp.ones((size,), jnp.float32), out_sharding=(None,), eager_sharding=False)


def stack(make: Callable[[Array], nnx.Module], key: Array, layers: int) -> nnx.Module:
    """Returns `layers` modules as one, every parameter with a leading layer axis that is not split."""
    annotated = nnx.transform_metadata(make, in_axes=0, out_axes=0, partition=None)
    return jax.vmap(annotated)(jax.random.split(key, layers))


def layers_of(stacked: Any) -> tuple:
    """Returns the modules of a stack, or other trees whose leaves lead with the layer, each a static slice of it."""
    layers = range(jax.tree.leaves(stacked)[0].shape[0])
    return tuple(
        jax.tree.map(lambda leaf: jax.lax.index_in_dim(leaf, layer, keepdims=False), stacked)  # noqa: B023
        for layer in layers
    )


def stack_of(layers: tuple) -> Any:
    """Returns modules as the stack that `layers_of` takes apart, each padded to the whole.

    Padding joins the pass that reads the stack; concatenating would be a pass of its own.
    """

    def pad(layer: int, leaf: Array) -> Array:
        others = [(layer, len(layers) - 1 - layer, 0)] + [(0, 0, 0)] * leaf.ndim
        return jax.lax.pad(leaf[None], jnp.zeros((), leaf.dtype), others)

    padded = [jax.tree.map(functools.partial(pad, layer), module) for layer, module in enumerate(layers)]
    return functools.reduce(functools.partial(jax.tree.map, jnp.add), padded)


def whole(parameter: nnx.Param, dtype: jnp.dtype) -> Array:
    """Returns a parameter in the type of the computation, gathered inside the node if it is split over "gpu"."""
    values = parameter[...].astype(dtype)
    axes = parameter.get_metadata()["out_sharding"]
    # A stacked parameter's axes have a leading entry for the layers, which the scan took off.
    axes = axes[len(axes) - values.ndim :]
    if GPU not in axes:
        return values
    with jax.named_scope("gather_weights"):
        return jax.lax.all_gather(values, GPU, axis=axes.index(GPU), tiled=True)
