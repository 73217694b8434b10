"""Which implementation computes a step: a table of names, and the choice where none is named."""

from moe_ep.kernels import device
from moe_ep.kernels.grouped_matmul import dense, mosaic, scanned, table, tiled
from moe_ep.kernels.grouped_matmul.groups import RowGroups
from moe_ep.kernels.grouped_matmul.steps import Steps


def choose(rows, groups, weight_shape: tuple[int, int, int]) -> str:
    """Returns the implementation for rows [R, K] in these groups and weights [G, K, N] on the device compiled for."""
    kind = device.device_kind()
    if device.is_hopper(kind) and mosaic.refusal(rows.dtype, _tile(rows, groups), weight_shape) is None:
        return "tuned"
    if weight_shape[0] == 1:
        return "dense"
    return "tiled" if kind == "cpu" else "scanned"


def check_takes(name: str, rows, groups, weight_shape: tuple[int, int, int]):
    """Raises ValueError where the named implementation does not exist or does not take these operands."""
    if name not in NAMES:
        raise ValueError(f"implementation is {name!r}, not one of {', '.join(NAMES)}")
    if name == "dense" and weight_shape[0] != 1:
        raise ValueError(f"implementation 'dense' takes weights of one group, not {weight_shape[0]}")
    refusal = mosaic.refusal(rows.dtype, _tile(rows, groups), weight_shape) if name in ("mosaic", "tuned") else None
    if refusal is not None:
        raise ValueError(f"implementation {name!r} was given {refusal}")


def _tile(rows, groups):
    return rows.shape[0] // groups.tile_group.shape[0]


def _fastest(step: str, layout: RowGroups, groups: int, rows: int, depth: int, columns: int, inputs: int = 1):
    problem = table.Problem(step, groups, layout.expected_rows, depth, columns, inputs)
    entry = table.nearest(device.device_kind(), problem)
    if entry is not None:
        name = entry.implementation
    else:
        # Nothing measured here: cuBLAS for a dense product, our kernels where XLA would loop.
        name = "dense" if groups == 1 else "mosaic"
    if name == "dense" and problem.rows < rows:
        name = "mosaic"  # cuBLAS would multiply the whole buffer
    return getattr(IMPLEMENTATIONS[name], step)


def _hidden(rows, first, groups, activation):
    step = _fastest("hidden", groups, first[0].shape[0], *rows.shape, first[0].shape[2], len(first))
    return step(rows, first, groups, activation)


def _hidden_and_products(rows, first, groups, activation):
    step = _fastest("hidden_and_products", groups, first[0].shape[0], *rows.shape, first[0].shape[2], len(first))
    return step(rows, first, groups, activation)


def _product(x, w, groups):
    return _fastest("product", groups, w.shape[0], *x.shape, w.shape[2])(x, w, groups)


def _product_gradients(d_out, w_out, products, groups, activation):
    step = _fastest("product_gradients", groups, w_out.shape[0], *d_out.shape, w_out.shape[1], len(products))
    return step(d_out, w_out, products, groups, activation)


def _rows_gradient(d_products, first, groups):
    step = _fastest("rows_gradient", groups, first[0].shape[0], *d_products[0].shape, first[0].shape[1], len(first))
    return step(d_products, first, groups)


def _weight_gradient(x, dy, groups, group_count):
    return _fastest("weight_gradient", groups, group_count, *x.shape, dy.shape[1])(x, dy, groups, group_count)


IMPLEMENTATIONS = {
    "dense": dense.STEPS,
    "tiled": tiled.STEPS,
    "scanned": scanned.STEPS,
    "mosaic": mosaic.STEPS,
    # Each step by the implementation that the table of this GPU says is fastest.
    "tuned": Steps(_hidden, _hidden_and_products, _product, _product_gradients, _rows_gradient, _weight_gradient),
}
NAMES = ("reference", *IMPLEMENTATIONS)
