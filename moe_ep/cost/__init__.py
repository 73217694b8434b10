"""Bytes, FLOPs and seconds by formula: kernels, network, memory. No jax."""
