"""The free parameters: seven, each set by the calibration rows named beside it, in this order.

Nothing else is fitted; kernels come from tables and links from data sheets.
Every fit is a formula or a search on one number, so that it can be repeated in
a moment without any row (the leave-one-out errors of validation.py).
"""

import dataclasses
import functools
import typing

import numpy as np

from moe_ep.cost.units import Number
from moe_ep.simulate.points import POINTS, Point, find
from moe_ep.simulate.published import Parameters

_LINKS = ("deepep-ll-dispatch-16", "deepep-ll-dispatch-64", "deepep-ll-combine-16", "deepep-ll-combine-64")

# Parameter -> the calibration rows that set it.
SET_BY = {
    "rdma_efficiency": _LINKS,
    "low_latency_s": _LINKS,
    "wait_s": ("deepseek-trace-dispatch", "deepseek-trace-combine"),
    "expert_launch_s": ("expert-gemm-8", "expert-gemm-128"),
    "train_factor": ("deepseek-trace-span",),
    "serve_factor": ("sglang-prefill-4k-perfect", "sglang-decode-256"),
    "busiest": ("sglang-prefill-2k",),
}


_ROUNDS = 6


def calibration_points() -> dict[str, Point]:
    """Returns the points whose values may be used, by id."""
    return {point.id: point for point in POINTS if point.value is not None}


@functools.lru_cache(maxsize=None)
def fit(without: tuple[str, ...] = ()) -> Parameters:
    """Returns the parameters, fitted without some of the calibration rows (none by default).

    A parameter whose rows are all left out keeps its neutral value.
    """
    rows = {name: [row for row in ids if row not in without] for name, ids in SET_BY.items()}
    parameters = _fit_links(Parameters(), rows["rdma_efficiency"])
    parameters = _fit_added(parameters, "wait_s", rows["wait_s"], 1e-3)
    parameters = _fit_added(parameters, "expert_launch_s", rows["expert_launch_s"], 1e-6)
    parameters = _fit_factor(parameters, "train_factor", rows["train_factor"], slower_is_larger=True)
    for _ in range(_ROUNDS):  # a row of the factor depends on the busiest device, and the other way round
        parameters = _fit_factor(parameters, "serve_factor", rows["serve_factor"], slower_is_larger=False)
        parameters = _fit_busiest(parameters, rows["busiest"])
    return parameters


def _fit_links(parameters: Parameters, rows: list[str]) -> Parameters:
    """Seconds = bytes / (rate x efficiency) + latency, least squares of relative errors over the rows."""
    if len(rows) < 2:
        return parameters
    points = [find(row) for row in rows]
    at_line_rate = np.array([point.predict(Parameters()) for point in points])
    measured = np.array([point.value for point in points])
    terms = np.stack([at_line_rate / measured, 1 / measured], axis=1)
    (slowdown, latency_us), *_ = np.linalg.lstsq(terms, np.ones(len(points)), rcond=None)
    return dataclasses.replace(parameters, rdma_efficiency=float(1 / slowdown), low_latency_s=float(latency_us) * 1e-6)


def _fit_added(parameters: Parameters, name: str, rows: list[str], unit_s: Number) -> Parameters:
    """A time added to each row, least squares of relative errors."""
    if not rows:
        return parameters
    bare = np.array([find(row).predict(parameters) for row in rows])
    measured = np.array([find(row).value for row in rows])
    added = ((measured - bare) / measured**2).sum() / (1 / measured**2).sum()
    return dataclasses.replace(parameters, **{name: max(float(added), 0.0) * unit_s})


def _fit_factor(parameters: Parameters, name: str, rows: list[str], slower_is_larger: bool) -> Parameters:
    """The step over its parts, the rows' geometric mean; a prediction is proportional to it or to its inverse."""
    if not rows:
        return parameters
    neutral = dataclasses.replace(parameters, **{name: 1.0})
    ratio = float(np.exp(np.mean([np.log(find(row).predict(neutral) / find(row).value) for row in rows])))
    return dataclasses.replace(parameters, **{name: 1 / ratio if slower_is_larger else ratio})


def _fit_busiest(parameters: Parameters, rows: list[str]) -> Parameters:
    if not rows:
        return parameters
    point = find(rows[0])

    def excess(busiest: Number) -> Number:
        return point.predict(dataclasses.replace(parameters, busiest=busiest)) - point.value

    return dataclasses.replace(parameters, busiest=_bisect(excess, 1.0, 4.0))


def _bisect(function: typing.Callable[[Number], Number], low: Number, high: Number) -> Number:
    """The zero of a falling function, or the end nearest to it."""
    if function(low) <= 0:
        return low
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > 0 else (low, middle)
    return (low + high) / 2
