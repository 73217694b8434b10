"""Layouts against each other: the break-even map, memory by layout, the search for the best one."""

import collections.abc
import dataclasses
import itertools

from moe_ep.config import ConfigError, require
from moe_ep.cost.units import Number
from moe_ep.simulate.cases import SIZES, Case, Row, evaluate, readings, with_nics, with_size
from moe_ep.simulate.from_config import with_batch
from moe_ep.simulate.memory import memory_of
from moe_ep.simulate.scenario import Scenario, check

_BASELINES = (4, 8, 16)


def break_even(base: Scenario) -> list[Row]:
    """Compares one expert per GPU (EP = E on E GPUs) with EP = 4, 8, 16 on as many GPUs, by batch and NIC reading.

    Each baseline is timed as data-parallel replicas of its expert group, which need not
    fit (then labelled "memory ignored"), and as a pipeline of groups, which holds no more
    weights on a GPU than EP = E does. Every layout runs with the better of nothing
    overlapped and two staggered batches.
    """
    base = dataclasses.replace(base, ignore_memory=True)
    batches = (1, 4, 8, 16, 32, 64, 128) if base.workload.phase == "decode" else (128, 256, 512, 1024, 2048, 4096)
    cases: list[Case] = []
    for (reading, nics), size, batch in itertools.product(readings(base.fabric).items(), SIZES, batches):
        sized = with_batch(with_nics(base, nics), batch)
        varied = {"reading": reading, "experts": size, "batch": batch}
        cases.append(({**varied, "baseline": "one expert per GPU"}, with_size(sized, size, size, size)))
        for ep in (ep for ep in _BASELINES if ep < size):
            cases.append(({**varied, "baseline": f"EP {ep} x replicas"}, with_size(sized, size, size, ep)))
            cases.append(({**varied, "baseline": f"EP {ep} x pipeline"}, with_size(sized, size, size, ep, size // ep)))
    rows = _better_overlap(cases)
    wide = {_key(row): row for row in rows if row["baseline"] == "one expert per GPU"}
    for row in rows:
        row["wide_over_this"] = wide[_key(row)]["tokens_per_s"] / row["tokens_per_s"]
    return rows


def _better_overlap(cases: list[Case]) -> list[Row]:
    both = [
        (varied, dataclasses.replace(scenario, layout=dataclasses.replace(scenario.layout, overlap=overlap)))
        for varied, scenario in cases
        for overlap in ("none", "staggered")
    ]
    rows = evaluate(both, "break-even")
    return [max(pair, key=lambda row: row["tokens_per_s"]) for pair in zip(rows[::2], rows[1::2])]


def _key(row: Row) -> tuple:
    return row["reading"], row["experts"], row["batch"]


def memory(base: Scenario) -> list[Row]:
    """Returns bytes of one GPU by part, for EP = 4 up to the number of experts, as replicas and as a pipeline."""
    experts, rows = base.model.moe.num_experts, []
    for ep in (size for size in (4, 8, 16, 32, 64, 128, 256) if size <= experts and experts % size == 0):
        for stages in dict.fromkeys((1, max(experts // ep, 1))):
            layout = dataclasses.replace(base.layout, gpus=experts, ep=ep, pp=stages)
            parts = memory_of(dataclasses.replace(base, layout=layout))
            times = f" x {stages} stages" if stages > 1 else f" x {experts // ep} replicas" if ep < experts else ""
            name = f"EP {ep}{times}"
            limit = base.fabric.gpu.memory_bytes
            rows.append({"layout": name, "bytes_per_gpu": parts, "gpu_bytes": limit,
                         "missing_bytes": max(sum(parts.values()) - limit, 0.0)})  # fmt: skip
    return rows


def search(base: Scenario, latency_ms: Number | None = None) -> list[Row]:
    """Tries EP, stages, overlap, transport and batches on the base's GPUs; best throughput first.

    Only layouts that divide, fit and stay under the latency count; the others follow, with what is missing.

    Raises:
      ConfigError: layouts fit, but none stays under the latency.
    """
    gpus, experts = base.layout.gpus, base.model.moe.num_experts
    rows = evaluate(_layouts(base, gpus, experts), "search")
    if latency_ms is not None:
        least = float(min((row["ms_per_token"] for row in rows if row["feasible"]), default=0.0))
        require(least <= latency_ms, "simulate.latency_ms", latency_ms, f"at least {least:.3g}, the least of all layouts")
        rows = [row for row in rows if row.get("ms_per_token", 0.0) <= latency_ms]
    return sorted(rows, key=lambda row: -row.get("tokens_per_s", 0.0))


def _layouts(base: Scenario, gpus: int, experts: int) -> collections.abc.Iterator[Case]:
    degrees = [size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256) if size <= gpus]
    overlaps = (("none", 1), ("chunks", 2), ("chunks", 4), ("chunks", 8), ("staggered", 1))
    scales = (0.25, 0.5, 1.0, 2.0, 4.0)
    for ep, pp, (overlap, chunks), transport in itertools.product(degrees, degrees, overlaps, ("ragged", "all_to_all")):
        chunked_ragged = chunks > 1 and transport == "ragged"  # which moves a wave at once
        if gpus % (ep * pp) or experts % ep or chunked_ragged:
            continue
        layout = dataclasses.replace(base.layout, ep=ep, pp=pp, overlap=overlap, chunks=chunks, transport=transport,
                                     slots=None, placement="contiguous")  # fmt: skip
        scenario = dataclasses.replace(base, layout=layout)
        try:
            check(scenario)
        except ConfigError:
            continue
        for scale in scales:
            yield {"chunks": chunks}, with_batch(scenario, max(round(base.workload.tokens * scale), 1))


def best(rows: list[Row]) -> Row | None:
    return next((row for row in rows if row["feasible"]), None)
