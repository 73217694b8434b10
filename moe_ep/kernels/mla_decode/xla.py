"""Absorbed attention over latents as two batched products: for any shape and device.

The cache is read twice and the scores pass through memory.
"""

import jax
import jax.numpy as jnp


def mla_decode(q_latent, q_rope, cache, lengths, pages, scale):
    """Returns o_latent [B, H, Z]; arguments as in `api.mla_decode`. Rows past a length must be finite."""
    rows = cache if pages is None else _gather_pages(cache, pages)
    queries = jnp.concatenate([q_latent, q_rope], axis=2)
    # One product over latent and rotary key: two would write the scores twice.
    scores = jnp.einsum("bhw,bsw->bhs", queries, rows, preferred_element_type=jnp.float32) * scale
    valid = (jnp.arange(rows.shape[1], dtype=jnp.int32)[None, :] < lengths[:, None])[:, None, :]
    weights = jax.nn.softmax(scores, axis=2, where=valid)
    weights = jnp.where(valid, weights, 0.0).astype(rows.dtype)
    latents = rows[:, :, : q_latent.shape[2]]
    return jnp.einsum("bhs,bsz->bhz", weights, latents, preferred_element_type=jnp.float32).astype(q_latent.dtype)


def _gather_pages(cache, pages):
    sequences = pages.shape[0]
    return cache[pages].reshape(sequences, -1, cache.shape[2])
