"""The public wrapper: checks, and the choice of an implementation."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int32

from moe_ep.kernels import device
from moe_ep.kernels.mla_decode import mosaic, reference, xla

IMPLEMENTATIONS = {"reference": reference.mla_decode, "xla": xla.mla_decode, "mosaic": mosaic.mla_decode}

# Where "mosaic" was measured faster than "xla", by the GPU's model: widths (latent, rotary).
MOSAIC_IS_FASTER = {"h100": {(512, 64)}, "h200": {(512, 64)}}


def mla_decode(
    q_latent: Float[jax.Array, "b H Z"],
    q_rope: Float[jax.Array, "b H O"],
    cache: Float[jax.Array, "n s W"],
    lengths: Int32[jax.Array, "b"],
    *,
    scale: float,
    pages: Int32[jax.Array, "b p"] | None = None,
    implementation: str | None = None,
) -> Float[jax.Array, "b H Z"]:
    """Attends one query a head over each sequence's cached latents, which are keys and values at once.

    scores = (q_latent . latent + q_rope . key) * scale, their softmax in float32.

    Args:
      q_latent: queries in the latent space, W_UK applied.
      q_rope: rotated part of the queries.
      cache: normed latents, then rotated keys, W = Z + O wide; a sequence a row of
        [b, s, W], or with `pages` pages [n, s, W] in any order. Rows past a
        sequence's length have no weight; "xla" needs them finite.
      lengths: cached tokens of each sequence, the new one included; 0 gives zeros.
      scale: (N + O) ** -0.5 in a model whose heads are N + O wide.
      pages: the pages of each sequence, in order; unused entries name any page.
      implementation: a name of IMPLEMENTATIONS; None takes what was measured fastest
        on this device.
    Returns:
      The latents' weighted sum for each head, of the queries' type; W_UV makes values of it.
    Raises:
      ValueError: sizes or types that do not belong together, or that the named
        implementation does not take.
    """
    check(q_latent, q_rope, cache, lengths, pages)
    name = implementation or _choose(q_latent, q_rope, cache)
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {name!r}, not one of {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[name](q_latent, q_rope, cache, lengths, pages, scale)


def _choose(q_latent, q_rope, cache) -> str:
    model, widths = device.gpu_model(device.device_kind()), (q_latent.shape[2], q_rope.shape[2])
    measured = MOSAIC_IS_FASTER.get(model) or MOSAIC_IS_FASTER.get(device.MEASURED_AS.get(model), ())
    return "mosaic" if widths in measured and not mosaic.refusal(q_latent, q_rope, cache) else "xla"


def check(q_latent, q_rope, cache, lengths, pages):
    """Raises ValueError, with the numbers, where ranks, types or sizes do not belong together."""
    ranks = {"q_latent": (q_latent, 3), "q_rope": (q_rope, 3), "cache": (cache, 3), "lengths": (lengths, 1)}
    for name, (array, rank) in (ranks if pages is None else ranks | {"pages": (pages, 2)}).items():
        if jnp.ndim(array) != rank:
            raise ValueError(f"{name} has shape {jnp.shape(array)}: rank {jnp.ndim(array)}, not {rank}")
    types = {q_latent.dtype.name, q_rope.dtype.name, cache.dtype.name}
    if len(types) > 1:
        raise ValueError(f"q_latent, q_rope and cache must have one type, not {', '.join(sorted(types))}")
    latent, rope, width = q_latent.shape[2], q_rope.shape[2], cache.shape[2]
    if width != latent + rope:
        raise ValueError(f"cache rows are {width} wide, not {latent} + {rope} as the queries are")
    sequences = q_latent.shape[0]
    owner = {"cache": cache} if pages is None else {"pages": pages}
    for name, array in {"q_rope": q_rope, "lengths": lengths, **owner}.items():
        if array.shape[0] != sequences:
            raise ValueError(f"{name} is of {array.shape[0]} sequences, q_latent of {sequences}")
    if q_rope.shape[1] != q_latent.shape[1]:
        raise ValueError(f"q_rope has {q_rope.shape[1]} heads, q_latent {q_latent.shape[1]}")
    for name, array in {"lengths": lengths, "pages": pages}.items():
        if array is not None and array.dtype != jnp.int32:
            raise ValueError(f"{name} is {array.dtype.name}, not int32")
