"""How far an output is from what it should be, with nothing left unwritten."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_ep.bench.timing import Contender


def poisoned_call(contender: Contender):
    """Returns the output of a call whose memory held NaN before: what is not written shows. Outputs are its own, no inputs."""
    out = contender.wait(contender.launch())
    poison = jax.tree.map(_poison, out)
    jax.block_until_ready(poison)
    del out, poison  # The allocator gives the same memory to the next arrays of these sizes.
    return jax.tree.map(_as_jax, contender.wait(contender.launch()))


def _poison(leaf):
    return _fill_with_nan(leaf) if isinstance(leaf, jax.Array) else leaf.fill_(float("nan"))


@functools.partial(jax.jit, donate_argnums=0, keep_unused=True)
def _fill_with_nan(leaf):
    """Writes where the leaf lies, for other memory may not be what the next call is given."""
    return jnp.full_like(leaf, jnp.nan)


def _as_jax(leaf):
    return leaf if isinstance(leaf, jax.Array) else jnp.from_dlpack(leaf.detach())


def relative_error(out, expected) -> float:
    """Returns ||out - expected|| / ||expected||, of several arrays the largest; NaN is infinity."""
    pairs = zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True)
    error = max(float(_relative_error(*pair)) for pair in pairs)
    return error if np.isfinite(error) else float("inf")


@jax.jit
def _relative_error(out, expected):
    expected = expected.astype(jnp.float32)
    difference = out.astype(jnp.float32) - expected
    return jnp.sqrt(jnp.sum(difference**2) / jnp.sum(expected**2))
