"""RMSNorm and rotary positions."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int32

from moe_ep.model.parameter import ones


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation with a gain, summed in float32 (Zhang and Sennrich, arXiv:1910.07467)."""

    def __init__(self, size: int, epsilon: float):
        self.gain = ones(size)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*rows size"]) -> Float[Array, "*rows size"]:
        return _normalize(x, self.gain[...].astype(jnp.float32), self.epsilon)


# The backward pass keeps x in its own type alone: float32 copies would be twice to four times its bytes.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def _normalize(x: Array, gain: Array, epsilon: float) -> Array:
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    normed = wide * jax.lax.rsqrt(mean_square + epsilon)
    return (normed * gain.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def _rotate_halves(x: Array, cosine: Array, sine: Array) -> Array:
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


def _rotate_interleaved(x: Array, cosine: Array, sine: Array) -> Array:
    even, odd = x[..., 0::2], x[..., 1::2]
    rotated = jnp.stack([even * cosine - odd * sine, odd * cosine + even * sine], axis=-1)
    return rotated.reshape(x.shape)


_LAYOUTS = {"halves": _rotate_halves, "interleaved": _rotate_interleaved}


def rotate(
    x: Float[Array, "b s H O"], positions: Int32[Array, "b s"], *, theta: float, layout: str
) -> Float[Array, "b s H O"]:
    """Rotates pairs of x by their position's angles, in float32 (Su et al., arXiv:2104.09864).

    Args:
      x: queries or keys; a pair is (i, i + O/2) in layout "halves", (2i, 2i + 1) in "interleaved".
      positions: of each token in its sequence.
      theta: base of the angles' geometric progression.
      layout: "halves" or "interleaved"; checkpoints are made for one of them.
    """
    size = x.shape[-1]
    frequency = theta ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None, :]
    return _LAYOUTS[layout](x.astype(jnp.float32), jnp.cos(angle), jnp.sin(angle)).astype(x.dtype)
