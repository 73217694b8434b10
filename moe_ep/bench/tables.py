"""The benchmark's result as Markdown: a table a study and phase, each figure with its kind."""

from collections.abc import Callable, Iterable

from moe_ep.bench import report
from moe_ep.metrics import human_bytes

_SAYS = {
    "emulated": "Emulated devices share this machine's cores: their times say nothing about GPUs; their bytes, counts and "
    "loads are those of the layout. Memory is the CPU compiler's.",
    "measured": "Times are of these devices. Memory is the compiler's count for the program of one device.",
    "predicted": "Predicted by the simulator, on no device.",
}
_INTRODUCTIONS = {
    "layouts": "One expert a device (proposed, EP = experts) beside smaller expert axes with data-parallel replicas "
    "(baseline), on equal devices, timed in turns.",
    "dispatch": "Transports and overlaps on the same devices, each alone. Loss: of the last of the untimed steps, which "
    "start from the same values and take the same batches.",
    "strong": "Strong scaling: one model and one global batch on more and more devices.",
    "weak": "Weak scaling: experts and batch grow with the devices, what a device holds and does stays.",
    "full size": "The reference model at full size, as many GPUs as experts. A baseline as a pipeline may fit; as "
    "replicas it is a counterfactual where memory is ignored.",
}

Row = dict
_COLUMNS: dict[str, Callable[[Row], str]] = {
    "layout": lambda row: f"{row['layout']} EP={row['ep']}{_more(row)}",
    "dispatch": lambda row: _dispatch(row) if row["study"] == "dispatch" else "-",
    "devices": lambda row: str(row["devices"]),
    "E": lambda row: str(row["experts"]),
    "sequence": lambda row: str(row["sequence"]),
    "tokens a device": lambda row: f"{row['tokens_per_microbatch']:g}",
    "routing": lambda row: row["routing"] + (f", {row['network']}" if "network" in row else ""),
    "tokens/s": lambda row: f"{row['tokens_per_s']:,.0f}",
    "ms a step": lambda row: _number(row.get("ms_per_step")),
    "ms a token: median, p95, p99": lambda row: " / ".join(
        _number(row[f"ms_per_token_{name}"]) for name in ("median", "p95", "p99")
    ),
    "spread": lambda row: _percent(row.get("spread")),
    "error bar": lambda row: _percent(row.get("error_bar")),
    "MFU": lambda row: _percent(row["mfu"]),
    "memory bandwidth": lambda row: _percent(row["memory_bandwidth_utilisation"]),
    "of the measured copy": lambda row: _percent(row.get("share_of_copy")),
    "of the measured product": lambda row: _percent(row.get("share_of_product")),
    "idle (host)": lambda row: " ".join(
        _percent((row.get("profile") or {}).get(name)) for name in ("idle_share", "host_idle_share")
    ),
    "sent a step": lambda row: human_bytes(row["bytes_sent"]),
    "loss": lambda row: f"{row['loss']:.5f}" if row.get("loss") is not None else "-",
    "memory": lambda row: human_bytes(row["bytes_per_device"]["total"]),
    "load CV": lambda row: _number(row.get("load_cv")),
    "max/mean": lambda row: _number(row["max_over_mean_load"]),
    "kind": lambda row: row["kind"],
}


def as_markdown(result: dict) -> str:
    """Returns the whole result as text."""
    rows = result["rows"]
    lines = [report.heading(_title(rows), result)]
    if "note" in result:
        lines.append(f"{result['note']}\n\n")
    if ceilings := result["ceilings"]:
        lines.append(
            f"Ceilings measured in the same process: copy {ceilings['copy_bytes_per_s'] / 1e9:,.0f} GB/s (read and "
            f"written), bfloat16 product {ceilings['product_flops_per_s'] / 1e12:,.0f} TFLOP/s.\n\n"
        )
    for kind, text in _SAYS.items():
        if any(row["kind"].startswith(kind) for row in rows):
            lines.append(f"{kind.capitalize()}: {text}\n\n")
    if any(row["routing"] in ("uniform", "text") or row["routing"].startswith("zipf") for row in rows):
        lines.append(
            "Routing: uniform and zipf choices are drawn and replayed, the router's work still done; text is the run's "
            "data through its own router at its initial weights. Spread: quartiles of the turns' medians over the "
            "median. Sent: by one device to others, exchanges (buffers as they cross) and gradient sums.\n\n"
        )
    for study in dict.fromkeys(row["study"] for row in rows):
        lines.append(f"## {study.capitalize()}\n\n{_INTRODUCTIONS[study]}\n\n")
        of_study = [row for row in rows if row["study"] == study]
        for phase in dict.fromkeys(row["phase"] for row in of_study):
            lines.append(f"### {phase.capitalize()}\n\n{_table([row for row in of_study if row['phase'] == phase])}\n")
    return "".join(lines)


def _title(rows: list[Row]) -> str:
    if all(row["study"] == "dispatch" for row in rows):
        return "Transports and overlaps"
    layouts = {(row["layout"], row["ep"]) for row in rows}
    if {"proposed", "baseline"} <= {name for name, _ in layouts}:
        return "Proposed layout against baselines"
    return "One layout" if len(layouts) == 1 else "Layouts"


def _table(rows: list[Row]) -> str:
    ratios = over_best_baseline(rows)
    cells = {name: [show(row) for row in rows] for name, show in _COLUMNS.items()}
    cells["over best baseline"] = ["-" if ratio is None else f"{ratio:.2f}x" for ratio in ratios]
    # A column without a figure (what a CPU has no peak for, say) is left out.
    columns = {name: column for name, column in cells.items() if any(set(cell) - set("- ") for cell in column)}
    lines = [_line(columns), _line(["---"] * len(columns))]
    return "".join(lines + [_line(row) for row in zip(*columns.values(), strict=True)])


def over_best_baseline(rows: list[Row]) -> list[float | None]:
    """Returns for each proposed row its tokens/s over the fastest baseline's that did the same work; else None."""
    best: dict[tuple, float] = {}
    for row in rows:
        if row["layout"] != "proposed":
            best[_work(row)] = max(best.get(_work(row), 0.0), row["tokens_per_s"])
    return [
        row["tokens_per_s"] / best[_work(row)] if row["layout"] == "proposed" and _work(row) in best else None
        for row in rows
    ]


def _work(row: Row) -> tuple:
    names = ("study", "phase", "experts", "devices", "sequence", "tokens_per_microbatch", "routing", "network")
    return tuple(row.get(name) for name in names)


def _more(row: Row) -> str:
    stages = row.get("pipeline_stages", 1)
    replicas = f" x {row['data']}" if row["data"] > 1 else ""
    return f"{replicas} x PP {stages}" if stages > 1 else replicas


def _dispatch(row: Row) -> str:
    return f"{row['transport']}, " + (f"{row['chunks']} chunks" if row["overlap"] == "chunks" else row["overlap"])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |\n"
