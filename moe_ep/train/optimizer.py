"""AdamW with clipping, linear warm-up and cosine decay, from optax."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float32

from moe_ep.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the schedule: 0 to the peak over the warm-up, then a cosine to its final fraction at `steps`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if config.warmup_steps else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(steps, config.warmup_steps + 1),
        end_value=config.learning_rate * config.final_fraction,
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """Returns clipping by the global norm, which `update` takes as `norm`, then AdamW; norms' gains are not decayed."""
    return optax.chain(
        clip_by(config.clip_norm),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=_is_matrix,
        ),
    )


def global_norm(gradients: object) -> Float32[jax.Array, ""]:
    """Returns the norm of all gradients together, as `optax.tree.norm`, a layer of a stack at a time.

    Layers that were written out reach the whole stack by padding; a sum over one layer reads its gradient where
    the product left it, at several times the speed of a sum over the padded stack.
    """
    parts = [part for leaf in jax.tree.leaves(gradients) for part in _layers_of(leaf)]
    return jnp.sqrt(sum(jnp.sum(jnp.square(part)) for part in parts))


def _layers_of(leaf: jax.Array) -> list[jax.Array]:
    if leaf.ndim < 3:
        return [leaf]
    return [jax.lax.index_in_dim(leaf, layer, keepdims=False) for layer in range(leaf.shape[0])]


def clip_by(largest: float) -> optax.GradientTransformationExtraArgs:
    """Returns `optax.clip_by_global_norm(largest)` for a norm that is known: `update` takes it as `norm`."""

    def update(gradients, state, parameters=None, *, norm, **_):
        del parameters
        scale = jnp.minimum(1.0, largest / norm)
        return jax.tree.map(lambda gradient: gradient * scale, gradients), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def _is_matrix(parameters: object) -> object:
    def named(path: tuple, _: object) -> bool:
        return not any(getattr(key, "name", None) == "gain" for key in path)

    return jax.tree_util.tree_map_with_path(named, parameters)
