"""Absorbed attention over latents, written to be believed rather than to be fast."""

import jax
import jax.numpy as jnp


def mla_decode(q_latent, q_rope, cache, lengths, pages, scale):
    """Returns o_latent [B, H, Z]; arguments as in `api.mla_decode`."""
    rows = cache if pages is None else jax.vmap(lambda table: jnp.concatenate(cache[table]))(pages)
    queries = jnp.concatenate([q_latent, q_rope], axis=2)
    return jax.vmap(_attend, in_axes=(0, 0, 0, None, None))(queries, rows, lengths, q_latent.shape[2], scale)


def _attend(queries, rows, length, latent, scale):
    """One sequence: queries [H, W] over the first `length` of rows [S, W]."""
    valid = jnp.arange(rows.shape[0], dtype=jnp.int32) < length
    keys = jnp.where(valid[:, None], rows, jnp.zeros_like(rows)).astype(jnp.float32)
    scores = jnp.matmul(queries.astype(jnp.float32), keys.T, precision="highest") * scale
    weights = jax.nn.softmax(scores, axis=1, where=valid[None, :])
    o_latent = jnp.matmul(weights, keys[:, :latent], precision="highest")
    return jnp.where(length > 0, o_latent, 0.0).astype(queries.dtype)
