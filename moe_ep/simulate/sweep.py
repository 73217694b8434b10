"""Sweeps over one config: scaling, batch, context, skew, NICs, the break-even map, and the search for a layout."""

import collections.abc
import dataclasses
import itertools
import json
import pathlib
import typing

from moe_ep.config import Config, ConfigError
from moe_ep.cost.network import Fabric
from moe_ep.cost.routing import make_routing
from moe_ep.cost.units import Number
from moe_ep.simulate.from_config import scenario_of, with_batch
from moe_ep.simulate.memory import memory_of
from moe_ep.simulate.predict import predict
from moe_ep.simulate.scenario import DoesNotFit, Scenario, check

Row = dict[str, typing.Any]
# A name for each varied input, and the scenario that has it.
Case = tuple[dict[str, typing.Any], Scenario]

_SIZES = (16, 32, 64, 128)
_BASELINES = (4, 8, 16)


def evaluate(cases: collections.abc.Iterable[Case], title: str) -> list[Row]:
    """Predicts every case, with a progress bar on standard error; one that does not fit says what is missing."""
    from tqdm import tqdm

    return [_row(varied, scenario) for varied, scenario in tqdm(list(cases), desc=title, unit="layout", leave=False)]


def _row(varied: dict[str, typing.Any], scenario: Scenario) -> Row:
    layout = scenario.layout
    row = {**varied, "gpus": layout.gpus, "ep": layout.ep, "pp": layout.pp, "overlap": layout.overlap,
           "transport": layout.transport, "batch_per_gpu": scenario.workload.tokens}  # fmt: skip
    try:
        prediction = predict(scenario)
    except DoesNotFit as error:
        return {**row, "feasible": False, "missing_bytes": error.missing_bytes}
    row.update(
        feasible=prediction.feasible,
        missing_bytes=prediction.missing_bytes,
        tokens_per_s=prediction.tokens_per_s,
        tokens_per_s_per_gpu=prediction.tokens_per_s_per_gpu,
        ms_per_token=prediction.ms_per_token,
        mfu=prediction.mfu,
        nic_utilisation=prediction.nic_utilisation,
        exposed_communication_share=prediction.exposed_communication_share,
        max_over_mean_load=prediction.max_over_mean_load,
        bytes_per_gpu=sum(prediction.bytes_per_gpu.values()),
        bottleneck=prediction.bottleneck,
        kind="predicted, memory ignored" if prediction.memory_ignored else "predicted",
    )
    return row


def with_size(scenario: Scenario, experts: int, gpus: int, ep: int, pp: int = 1) -> Scenario:
    """Returns the scenario with another number of experts, GPUs, EP degree and stages."""
    moe = dataclasses.replace(scenario.model.moe, num_experts=experts)
    routing = scenario.routing
    if experts != scenario.model.moe.num_experts:
        routing = make_routing(scenario.routing.name, experts, moe.top_k)
    return dataclasses.replace(
        scenario,
        model=dataclasses.replace(scenario.model, moe=moe),
        layout=dataclasses.replace(scenario.layout, gpus=gpus, ep=ep, pp=pp),
        routing=routing,
    )


def with_nics(scenario: Scenario, nics_per_node: int) -> Scenario:
    """Returns the scenario with another number of NICs in a node."""
    return dataclasses.replace(scenario, fabric=dataclasses.replace(scenario.fabric, nics_per_node=nics_per_node))


def readings(fabric: Fabric) -> dict[str, int]:
    """Returns the two readings of a cluster's NICs: one for each GPU, one for each node."""
    return {"NIC per GPU": fabric.gpus_per_node, "NIC per node": 1}


def _weak(base: Scenario) -> list[Case]:
    """One expert a GPU and layer: what a GPU holds and does stays, GPUs and experts grow together."""
    return [
        ({"series": reading, "x": size}, with_nics(with_size(base, size, size, size), nics))
        for reading, nics in readings(base.fabric).items()
        for size in _SIZES
    ]


def _strong(base: Scenario) -> list[Case]:
    """One model and one global batch on more GPUs, at EP = min(GPUs, experts); memory is ignored: time is asked."""
    experts, total = base.model.moe.num_experts, base.workload.tokens * base.layout.gpus
    sizes = [size for size in (8, 16, 32, 64, 128, 256) if size <= 2 * experts]
    base = dataclasses.replace(base, ignore_memory=True)
    return [
        ({"series": reading, "x": size},
         with_batch(with_nics(with_size(base, experts, size, min(size, experts)), nics), max(total / size, 1)))
        for reading, nics in readings(base.fabric).items() for size in sizes
    ]  # fmt: skip


def _batch(base: Scenario) -> list[Case]:
    sizes = [2**power for power in (range(0, 8) if base.workload.phase == "decode" else range(8, 14))]
    return [
        ({"series": reading, "x": size}, with_batch(with_nics(base, nics), size))
        for reading, nics in readings(base.fabric).items()
        for size in sizes
    ]


def _context(base: Scenario) -> list[Case]:
    return [
        ({"series": reading, "x": context},
         dataclasses.replace(with_nics(base, nics), workload=dataclasses.replace(base.workload, context=context)))
        for reading, nics in readings(base.fabric).items() for context in (128, 512, 1024, 2048, 4096, 8192)
    ]  # fmt: skip


def _skew(base: Scenario) -> list[Case]:
    moe, exponents = base.model.moe, (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
    routings = {exponent: make_routing(f"zipf:{exponent}", moe.num_experts, moe.top_k) for exponent in exponents}
    return [
        ({"series": reading, "x": exponent}, dataclasses.replace(with_nics(base, nics), routing=routing))
        for reading, nics in readings(base.fabric).items()
        for exponent, routing in routings.items()
    ]


def _nics(base: Scenario) -> list[Case]:
    width = base.fabric.gpus_per_node
    counts = [count for count in (1, 2, 4, 8, 16) if width % count == 0]
    return [({"series": "this layout", "x": count}, with_nics(base, count)) for count in counts]


_LINES = {
    "strong": (_strong, "GPUs"),
    "weak": (_weak, "GPUs = experts"),
    "batch": (_batch, "sequences or tokens per GPU"),
    "context": (_context, "context, tokens"),
    "skew": (_skew, "Zipf exponent of expert popularity"),
    "nics": (_nics, "NICs per node"),
}


def line(base: Scenario, kind: str) -> tuple[list[Row], str]:
    """Returns the rows of a sweep over one input, and that input's name."""
    cases, axis = _LINES[kind]
    return evaluate(cases(base), kind), axis


def inputs_of(base: Scenario) -> dict[str, str]:
    """Returns what a sweep's rows have in common."""
    return {"gpu": base.fabric.gpu.name, "phase": base.workload.phase, "kernels": base.stack.kernels.name,
            "network": base.stack.network.name, "routing": base.routing.name}  # fmt: skip


def run_sweep(config: Config, folder: pathlib.Path | None) -> dict[str, typing.Any]:
    """Runs the sweep that the config names; returns its rows and, with a folder, writes JSON, Markdown and a picture.

    Raises:
      ConfigError: the config's own layout does not divide.
    """
    base, kind = scenario_of(config), config.simulate.sweep
    if kind == "break_even":
        rows = break_even(base)
        result: dict[str, typing.Any] = {"sweep": kind, "rows": rows}
    elif kind == "memory":
        rows = memory(base)
        result = {"sweep": kind, "rows": rows}
    elif kind == "search":
        rows = search(base, config.simulate.latency_ms)
        result = {"sweep": kind, "rows": rows[:20], "layouts_tried": len(rows), "best": _best(rows)}
    else:
        rows, axis = line(base, kind)
        result = {"sweep": kind, "x": axis, "rows": rows}
    result["inputs"] = inputs_of(base)
    result["markdown"] = markdown(result["rows"], kind)
    if folder:
        _write(result, rows, kind, folder)
    return result


def _write(result: dict[str, typing.Any], rows: list[Row], kind: str, folder: pathlib.Path) -> None:
    from moe_ep.simulate import pictures

    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{kind}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{kind}.md").write_text(result["markdown"])
    if kind == "break_even":
        pictures.break_even_map(rows, result["inputs"]["phase"], folder / f"{kind}.png")
    elif kind == "memory":
        bars = {row["layout"]: row["bytes_per_gpu"] for row in rows}
        pictures.memory_bar(bars, rows[0]["gpu_bytes"], folder / f"{kind}.png")
    elif kind in _LINES:
        pictures.curves(rows, _LINES[kind][1], result["inputs"], folder / f"{kind}.png")


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
    for (reading, nics), size, batch in itertools.product(readings(base.fabric).items(), _SIZES, batches):
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
            name = f"EP {ep}" + (f" x {stages} stages" if stages > 1 else f" x {experts // ep} replicas")
            limit = base.fabric.gpu.memory_bytes
            rows.append({"layout": name, "bytes_per_gpu": parts, "gpu_bytes": limit,
                         "missing_bytes": max(sum(parts.values()) - limit, 0.0)})  # fmt: skip
    return rows


def search(base: Scenario, latency_ms: Number | None = None) -> list[Row]:
    """Tries EP, stages, overlap, transport and batches on the base's GPUs; best throughput first.

    Only layouts that divide, fit and stay under the latency count; the others follow, with what is missing.
    """
    gpus, experts = base.layout.gpus, base.model.moe.num_experts
    rows = evaluate(_layouts(base, gpus, experts), "search")
    rows = [row for row in rows if latency_ms is None or row.get("ms_per_token", 0.0) <= latency_ms]
    return sorted(rows, key=lambda row: -row.get("tokens_per_s", 0.0))


def _layouts(base: Scenario, gpus: int, experts: int) -> collections.abc.Iterator[Case]:
    degrees = [size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256) if size <= gpus]
    overlaps = (("none", 1), ("chunks", 2), ("chunks", 4), ("staggered", 1))
    scales = (0.25, 0.5, 1.0, 2.0, 4.0)
    for ep, pp, (overlap, chunks), transport in itertools.product(degrees, degrees, overlaps, ("ragged", "all_to_all")):
        if gpus % (ep * pp) or experts % ep:
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


def _best(rows: list[Row]) -> Row | None:
    return next((row for row in rows if row["feasible"]), None)


def markdown(rows: list[Row], title: str) -> str:
    """Returns rows as a Markdown table, numbers to four digits."""
    names = [name for name in rows[0] if name not in ("bottleneck",)] if rows else []
    for row in rows:
        names += [name for name in row if name not in names and name != "bottleneck"]
    lines = [f"# {title}", "", "| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(_cell(row.get(name)) for name in names) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: typing.Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{part} {amount / 1e9:.1f} GB" for part, amount in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)

