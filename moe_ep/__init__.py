"""Mixture-of-Experts transformers with large expert parallelism, in JAX."""
