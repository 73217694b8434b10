"""Predictions for clusters that are not here: layouts, timelines, sweeps, published systems, claims. No jax."""
