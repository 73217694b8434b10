"""Sweeps over one config: scaling, batch, context, skew, NICs, the break-even map, and the search for a layout."""

import dataclasses
import itertools
import json
import pathlib
import typing

from moe_ep.config import Config
from moe_ep.cost.routing import make_routing
from moe_ep.simulate import layouts, validation
from moe_ep.simulate.cases import SIZES, Case, Row, evaluate, readings, with_nics, with_size
from moe_ep.simulate.from_config import scenario_of, with_batch
from moe_ep.simulate.scenario import DoesNotFit, Scenario


def _weak(base: Scenario) -> list[Case]:
    """One expert a GPU and layer: what a GPU holds and does stays, GPUs and experts grow together."""
    return [
        ({"series": reading, "x": size}, with_nics(with_size(base, size, size, size), nics))
        for reading, nics in readings(base.fabric).items()
        for size in SIZES
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
    """Whole sequences: a context longer than the tokens of a GPU raises them."""
    cases = []
    for (reading, nics), context in itertools.product(readings(base.fabric).items(), (128, 512, 1024, 2048, 4096, 8192)):
        tokens = max(base.workload.tokens_per_gpu, context)
        workload = dataclasses.replace(base.workload, context=context, tokens_per_gpu=tokens)
        cases.append(({"series": reading, "x": context}, dataclasses.replace(with_nics(base, nics), workload=workload)))
    return cases


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


# Name -> its cases, its axis, its title.
_LINES = {
    "strong": (_strong, "GPUs", "Strong scaling: one model and one global batch on more GPUs"),
    "weak": (_weak, "GPUs = experts", "Weak scaling: one expert of each layer on each GPU"),
    "batch": (_batch, "sequences or tokens per GPU", "Batch"),
    "context": (_context, "context, tokens", "Context"),
    "skew": (_skew, "Zipf exponent of expert popularity (0: all equal)", "Skewed routing"),
    "nics": (_nics, "NICs per node", "NICs of a node"),
}


def line(base: Scenario, kind: str) -> tuple[list[Row], str]:
    """Returns the rows of a sweep over one input, and that input's name."""
    cases, axis, _ = _LINES[kind]
    return evaluate(cases(base), kind), axis


def inputs_of(base: Scenario) -> dict[str, typing.Any]:
    """Returns what a sweep's rows have in common, and their error bars."""
    layout, workload = base.layout, base.workload
    return {
        "gpu": base.fabric.gpu.name, "phase": workload.phase, "experts": base.model.moe.num_experts,
        "top_k": base.model.moe.top_k, "gpus": layout.gpus, "ep": layout.ep, "batch": workload.tokens,
        "context": workload.context, "overlap": layout.overlap, "transport": layout.transport,
        "nic_gigabits_per_s": base.fabric.nic_bytes_per_s * 8e-9, "kernels": base.stack.kernels.name,
        "network": base.stack.network.name, "routing": base.routing.name,
        "error_bar": validation.bar_of_phase(workload.phase), "ratio_bar": validation.fitted()[1]["ratio"],
    }  # fmt: skip


_UNITS = {"decode": "sequences", "prefill": "tokens", "train": "tokens"}


def title_of(kind: str, inputs: dict[str, typing.Any]) -> str:
    """Returns a picture's title: the sweep, the phase, and what does not vary."""
    name = _LINES[kind][2] if kind in _LINES else _TITLES[kind]
    fixed = {"batch": f"{inputs['batch']:g} {_UNITS[inputs['phase']]}/GPU", "context": f"context {inputs['context']}",
             "gpus": f"{inputs['gpus']} GPUs", "ep": f"EP {inputs['ep']}"}  # fmt: skip
    varied = _VARIED.get(kind, (kind,))
    shown = ", ".join(text for part, text in fixed.items() if part not in varied)
    how = "" if kind in _TITLES else f", {inputs['transport']}, overlap {inputs['overlap']}"
    return f"{name}; {inputs['phase']}, {shown}{how}, NICs of {inputs['nic_gigabits_per_s']:g} Gb/s"


_TITLES = {
    "break_even": "Break-even",
    "memory": "Memory by layout",
    "search": "Every layout that divides",
}
_VARIED = {
    "strong": ("gpus", "ep", "batch"),
    "weak": ("gpus", "ep"),
    "break_even": ("gpus", "ep", "batch"),
    "memory": ("ep",),
    "search": ("ep", "batch"),
}


def run_sweep(config: Config, folder: pathlib.Path | None) -> dict[str, typing.Any]:
    """Runs the sweep that the config names; returns its rows and, with a folder, writes JSON, Markdown and a picture.

    Raises:
      ConfigError: the config's own layout does not divide.
    """
    base, kind = scenario_of(config), config.simulate.sweep
    if kind == "break_even":
        rows = layouts.break_even(base)
        result: dict[str, typing.Any] = {"sweep": kind, "rows": rows}
    elif kind == "memory":
        rows = layouts.memory(base)
        result = {"sweep": kind, "rows": rows}
    elif kind == "search":
        rows = layouts.search(base, config.simulate.latency_ms)
        result = {"sweep": kind, "rows": rows[:20], "layouts_tried": len(rows), "best": layouts.best(rows)}
    else:
        rows, axis = line(base, kind)
        result = {"sweep": kind, "x": axis, "rows": rows}
    result["inputs"] = inputs_of(base)
    result["markdown"] = markdown(result["rows"], kind)
    _check_any_fits(kind, rows)
    if folder:
        _write(result, rows, kind, folder)
    return result


def _check_any_fits(kind: str, rows: list[Row]) -> None:
    """Refuses a sweep of which no point fits, with the least that is missing."""
    missing = [row["missing_bytes"] for row in rows if not row.get("tokens_per_s", 1.0 if kind == "memory" else 0.0)]
    if rows and len(missing) == len(rows):
        raise DoesNotFit(
            f"--set simulate.sweep={kind}: no point fits the GPU, at least {min(missing) / 1e9:.1f} GB are missing; "
            "allowed is a smaller batch, another layout, or simulate.ignore_memory=true for a counterfactual",
            min(missing),
        )


def _write(result: dict[str, typing.Any], rows: list[Row], kind: str, folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{kind}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{kind}.md").write_text(result["markdown"])
    draw(kind, rows, result["inputs"], folder / f"{kind}.png")


def draw(kind: str, rows: list[Row], inputs: dict[str, typing.Any], path: pathlib.Path) -> None:
    """Draws the picture of a sweep."""
    from moe_ep.simulate import pictures

    title = title_of(kind, inputs)
    if kind == "break_even":
        pictures.break_even_map(rows, _UNITS[inputs["phase"]], title, inputs, path)
    elif kind == "memory":
        bars = {row["layout"]: row["bytes_per_gpu"] for row in rows}
        pictures.memory_bar(bars, rows[0]["gpu_bytes"], title, inputs, path)
    elif kind == "search":
        pictures.search_front(rows, title, inputs, path)
    else:
        pictures.curves(rows, _LINES[kind][1], title, inputs, path)


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

