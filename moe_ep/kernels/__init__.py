"""Kernels: arrays in, arrays out; each a folder with a public wrapper, a slow obvious reference and fast versions."""
