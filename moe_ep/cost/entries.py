"""Seconds of the entries of a compiled schedule: products with their shapes, passes, collectives.

An entry is a dictionary of the schedule's format (moe_ep/simulate/schedule.py says what is in it).
"""

import typing

import numpy as np

from moe_ep.cost import network
from moe_ep.cost.kernels import AssumedKernels, KernelTable, Work, gemm, memory_pass, row_gather
from moe_ep.cost.network import Fabric, NetworkParameters
from moe_ep.cost.units import Number
from moe_ep.hardware import Gpu

Entry = dict[str, typing.Any]
_EXCHANGES = ("all_to_all", "ragged_all_to_all")
# Named scopes whose passes are this project's kernels; others are XLA's.
_ROW_GATHERS = frozenset({"gather_rows", "weighted_sum_rows"})


def compute_seconds(
    entry: Entry, kernels: KernelTable | AssumedKernels, gpu: Gpu, row_share: Number = 1.0
) -> Number:
    """Returns the seconds of a compute entry, which is one kernel whatever was fused into it.

    Args:
      row_share: the share of a product's rows that its kernel does not skip.
    """
    return kernels.fused_seconds(works_of(entry, row_share), gpu)


def works_of(entry: Entry, row_share: Number = 1.0) -> list[Work]:
    """Returns what a compute entry does; bytes beyond the products' own operands are a pass of their own.

    Args:
      row_share: the share of a product's rows that its kernel does not skip.
    """
    if attention := entry.get("attention"):
        if absorbed := attention.get("absorbed"):
            return [Work("mla_decode", "bf16", attention["flops"], entry["bytes"], tuple(absorbed))]
        op = "attention_backward" if attention["backward"] else "attention"
        return [Work(op, "bf16", attention["flops"], entry["bytes"], (attention["context"], attention["head_dim"]))]
    dtype = entry.get("product_dtype") or ("fp8" if entry.get("dtype", "").startswith("f8") else "bf16")
    known = entry.get("gemms") or _square_product(entry)
    if is_experts(entry) and len(known) == 1:
        return [_expert_product(entry, known[0], row_share)]
    products = [gemm(rows, inner, columns, dtype, batch) for rows, columns, inner, batch in known]
    rest = entry["bytes"] - sum(work.bytes for work in products)
    make = row_gather if _ROW_GATHERS.intersection(entry.get("scope", "").split("/")) else memory_pass
    return products + ([make(rest)] if rest > 0 else [])


def is_experts(entry: Entry) -> bool:
    """True of the experts' own products, whose kernels skip rows that hold no token."""
    return "experts" in entry.get("scope", "").split("/")


def _expert_product(entry: Entry, product: list[Number], row_share: Number) -> Work:
    """A kernel over groups of rows: how many weight matrices it has is what its bytes exceed the rows' by."""
    rows, columns, inner, batch = product
    if entry["scope"].endswith("weight_gradient"):  # [inner, rows] x [inner, columns]: the long side is contracted
        inner *= batch
        groups = max(round((entry["bytes"] / 2 - inner * (rows + columns)) / (rows * columns)), 1)
        return gemm(inner * row_share / groups, rows, columns, "bf16", groups).of_weight_gradient()
    rows *= batch
    groups = max(round((entry["bytes"] / 2 - rows * (inner + columns)) / (inner * columns)), 1)
    return gemm(rows * row_share / groups, inner, columns, "bf16", groups)


def _square_product(entry: Entry) -> list[list[Number]]:
    """Where only FLOPs are known: the square product of as many."""
    side = (entry["flops"] / 2) ** (1 / 3)
    return [[side, side, side, 1]] if side else []


def collective_seconds(entry: Entry, fabric: Fabric, parameters: NetworkParameters) -> Number:
    """Returns the seconds of one execution of a collective under even routing."""
    op, payload, group, stride = entry["op"], entry["bytes"], entry["group_size"], entry.get("group_stride", 1)
    if op in _EXCHANGES:
        return _even_exchange(payload, group, stride, fabric, parameters)
    if op == "all_reduce":
        return network.all_reduce_seconds(payload, group, fabric, parameters, stride)
    if op == "collective_permute":
        return network.send_seconds(payload, fabric, parameters)
    return network.gather_seconds(payload, group, fabric, parameters, stride)


def _even_exchange(payload: Number, group: int, stride: int, fabric: Fabric, parameters: NetworkParameters) -> Number:
    """Every member sends an equal part to every member; groups side by side exchange at the same time."""
    gpus = group * stride
    matrix = np.zeros((gpus, gpus))
    for first in range(stride):
        members = np.arange(first, gpus, stride)
        matrix[np.ix_(members, members)] = payload / group
    return network.all_to_all_seconds(network.direct_traffic(matrix, fabric), fabric, parameters)
