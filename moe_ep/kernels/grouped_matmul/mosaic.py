"""The Hopper implementation: every step of the expert MLP's forward and backward pass one kernel."""

import functools

from moe_ep.kernels import device
from moe_ep.kernels.grouped_matmul import activations, mosaic_weights, table
from moe_ep.kernels.grouped_matmul.mosaic_parts import CHUNK, DEPTH, Tiling, fitted
from moe_ep.kernels.grouped_matmul.mosaic_rows import RowProduct, row_product
from moe_ep.kernels.grouped_matmul.steps import Steps

_TYPES = ("bfloat16", "float16")


def refusal(dtype, tile: int, weight_shape: tuple[int, int, int]) -> str | None:
    """Returns why these kernels do not take rows of this type in tiles of this size and such weights; None if they do."""
    if dtype.name not in _TYPES:
        return f"rows of type {dtype}, not {' or '.join(_TYPES)}"
    if tile % CHUNK:
        return f"a row tile of {tile}, not a multiple of {CHUNK}"
    if any(size % (2 * DEPTH) for size in weight_shape[1:]):
        return f"weights {tuple(weight_shape)} whose last sizes are not multiples of {2 * DEPTH}"
    return None


def hidden(rows, first, groups, activation, tiling=None):
    """As `Steps.hidden`; a tiling of None is the table's."""
    return _row_product("hidden", _forward(activation, False), (rows,), first, (), groups, tiling)[0]


def hidden_and_products(rows, first, groups, activation, tiling=None):
    """As `Steps.hidden_and_products`; a tiling of None is the table's."""
    name = "hidden_and_products"
    out, *products = _row_product(name, _forward(activation, True), (rows,), first, (), groups, tiling)
    return out, tuple(products)


def product(x, w, groups, tiling=None):
    """As `Steps.product`; a tiling of None is the table's."""
    return _row_product("product", _forward(None, False), (x,), (w,), (), groups, tiling)[0]


def product_gradients(d_out, w_out, products, groups, activation, tiling=None):
    """As `Steps.product_gradients`; a tiling of None is the table's."""
    name = "product_gradients"
    out, *d_products = _row_product(name, _pullback(activation), (d_out,), (w_out,), products, groups, tiling)
    return out, tuple(d_products)


def rows_gradient(d_products, first, groups, tiling=None):
    """As `Steps.rows_gradient`; a tiling of None is the table's."""
    return _row_product("rows_gradient", _input_gradient(len(first)), d_products, first, (), groups, tiling)[0]


def weight_gradient(x, dy, groups, group_count, tiling=None):
    """As `Steps.weight_gradient`; a tiling of None is the table's."""
    problem = table.Problem("weight_gradient", group_count, groups.expected_rows, x.shape[1], dy.shape[1])
    # A tile of the output is cut from x's columns, which are multiples of two chunks.
    tiling = fitted(tiling or _tabled_tiling(problem), 2 * CHUNK, dy.shape[1], accumulators=1)
    return mosaic_weights.weight_gradient(x, dy, groups, group_count, tiling)


STEPS = Steps(hidden, hidden_and_products, product, product_gradients, rows_gradient, weight_gradient)


def _row_product(step, kernel, xs, ws, sides, groups, tiling):
    group_count, *sizes = ws[0].shape
    depth, columns = reversed(sizes) if kernel.transposed else sizes
    problem = table.Problem(step, group_count, groups.expected_rows, depth, columns, kernel.inputs)
    tile = xs[0].shape[0] // groups.tile_group.shape[0]
    tiling = fitted(tiling or _tabled_tiling(problem), tile, columns, kernel.accumulators)
    return row_product(kernel, xs, ws, sides, groups, tiling)


def _tabled_tiling(problem):
    entry = table.nearest(device.device_kind(), problem)
    return Tiling() if entry is None or entry.tiling is None else entry.tiling


@functools.cache
def _forward(activation, keep_products):
    act = activations.ACTIVATIONS[activation]

    def epilogue(products, _):
        return (act.value(products), *(products if keep_products else ()))

    return RowProduct("grouped_forward", 1, act.inputs, 0, 1 + act.inputs * keep_products, False, epilogue)


@functools.cache
def _pullback(activation):
    act = activations.ACTIVATIONS[activation]

    def epilogue(gradients, products):
        out, d_products = act.pullback(products, gradients[0])
        return (out, *d_products)

    return RowProduct("grouped_pullback", 1, 1, act.inputs, 1 + act.inputs, True, epilogue)


@functools.cache
def _input_gradient(passes):
    return RowProduct("grouped_input_gradient", passes, 1, 0, 1, True, lambda gradients, _: gradients)
