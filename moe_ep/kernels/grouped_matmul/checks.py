"""Clear errors, with the numbers, for operands that no implementation takes."""

import jax.numpy as jnp

from moe_ep.kernels.grouped_matmul.activations import ACTIVATIONS

_TYPES = ("float32", "bfloat16", "float16")


def check_groups(rows, groups):
    """Raises ValueError where `groups` does not describe [R, ...] rows."""
    _check_rank("rows", rows, 2)
    tile_group, valid_tiles, tile_rows, _ = groups
    if tile_group.ndim != 1 or valid_tiles.ndim != 0:
        raise ValueError(f"groups have tile_group {tile_group.shape} and valid_tiles {valid_tiles.shape}, not [tiles] and []")
    if tile_rows.shape != tile_group.shape:
        raise ValueError(f"groups have tile_group {tile_group.shape} and tile_rows {tile_rows.shape}, not the same shape")
    for name, value in zip(groups._fields, (tile_group, valid_tiles, tile_rows)):
        if value.dtype != jnp.int32:
            raise ValueError(f"{name} has type {value.dtype}, not int32")
    tiles = tile_group.shape[0]
    if tiles == 0 or rows.shape[0] % tiles:
        raise ValueError(f"{rows.shape[0]} rows are not a multiple of the {tiles} tiles of the groups")


def check_matmul(x, w, activation):
    """Raises ValueError where x [R, K] and w [G, K, N] do not fit."""
    _check_activation(activation, (None, "gelu"))
    _check_type("x", x)
    _check_weight("w", w, x, (x.shape[1], None))


def check_mlp(rows, weights, activation):
    """Raises ValueError where rows [R, D] and the weights do not fit each other or the activation."""
    _check_activation(activation, ("gelu", "silu_gated"))
    gated = ACTIVATIONS[activation].inputs == 2
    if gated != (weights.w_gate is not None):
        raise ValueError(f"activation {activation!r} {'needs' if gated else 'takes no'} w_gate")
    _check_type("rows", rows)
    _check_weight("w_in", weights.w_in, rows, (rows.shape[1], None))
    groups, width, hidden = weights.w_in.shape
    _check_weight("w_out", weights.w_out, rows, (hidden, width), groups)
    if gated:
        _check_weight("w_gate", weights.w_gate, rows, (width, hidden), groups)


def _check_activation(activation, allowed):
    if activation not in allowed:
        raise ValueError(f"activation is {activation!r}, not one of {allowed}")


def _check_type(name, array):
    if array.dtype.name not in _TYPES:
        raise ValueError(f"{name} has type {array.dtype}, not one of {', '.join(_TYPES)}")


def _check_rank(name, array, rank):
    if not hasattr(array, "dtype"):
        raise ValueError(f"{name} is a {type(array).__name__}, not an array")
    if array.ndim != rank:
        raise ValueError(f"{name} has shape {array.shape}: rank {array.ndim}, not {rank}")


def _check_weight(name, w, rows, sizes, groups=None):
    _check_rank(name, w, 3)
    if w.dtype != rows.dtype:
        raise ValueError(f"{name} has type {w.dtype}, the rows {rows.dtype}")
    expected = (groups, *sizes)
    if any(size is not None and size != actual for size, actual in zip(expected, w.shape, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in expected)
        raise ValueError(f"{name} has shape {w.shape}, not ({wanted})")
