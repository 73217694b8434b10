"""The reports as text."""

from collections.abc import Callable

from moe_ep.aot.summary import OVER_MEMORY, size_text
from moe_ep.aot.timeline import Timeline
from moe_ep.config import Config
from moe_ep.model.mla import cudnn_refusal

_GB = 1e9
_NEARLY_FULL = 0.9  # of the memory: prefill hides all at 96.5 % of it and a quarter at 99.8 %


def aot_table(config: Config, result: dict) -> str:
    """Returns memory, collectives and overlap of one compiled program as a page of text."""
    return "\n".join([_headline(config, result), "", *_memory(config, result), "", *_collectives(result), "",
                      *_overlap(config, result)])  # fmt: skip


def _headline(config: Config, result: dict) -> str:
    cluster = config.cluster
    chosen = ", chosen by dispatch.overlap=auto" if config.dispatch.overlap == "auto" else ""
    return (
        f"{result['program']}: {size_text(config)}, compiled for {result['gpus']} x {cluster.gpu} in "
        f"{result['compile_s']:.1f} s; "
        f"{result['dispatch']}{chosen}"
    )


def _memory(config: Config, result: dict) -> list[str]:
    sizes = result["bytes_per_gpu"]
    capacity = config.cluster.device.memory_bytes
    verdict = "fits" if result["fits"] else f"does not fit: {result['missing_bytes'] / _GB:.2f} GB are missing"
    rows = [f"  {part.replace('_', ' '):<20} {size / _GB:>9.3f} GB" for part, size in sizes["by_part"].items()]
    return [
        "memory per GPU (compiled)",
        *rows,
        f"  {'outputs':<20} {sizes['outputs'] / _GB:>9.3f} GB",
        f"  {'total':<20} {sizes['total'] / _GB:>9.3f} GB of {capacity / _GB:.0f} GB: {verdict}",
    ]


def _collectives(result: dict) -> list[str]:
    heads = ("collective", "scope", "count", "MB/GPU", "same node", "other node", "groups", "ms each", "exposed", "async")
    lines = ["collectives per step (bytes compiled, sent by one GPU, even routing; times predicted)",
             "  {:<18} {:<34} {:>6} {:>9} {:>9} {:>10} {:>9} {:>8} {:>8} {:>5}".format(*heads)]  # fmt: skip
    for row in result["collectives"]:
        lines.append(
            f"  {row['op']:<18} {row['scope'][-34:]:<34} {row['count']:>6} {row['bytes_per_gpu'] / 1e6:>9.3f} "
            f"{row['bytes_same_node'] / 1e6:>9.3f} {row['bytes_other_node'] / 1e6:>10.3f} "
            f"{row['groups']:>4} x {row['group_size']:<3}{row['predicted_s'] / row['count'] * 1e3:>8.3f} "
            f"{row['exposed_s'] / row['count'] * 1e3:>8.3f} {'yes' if row['asynchronous'] else 'no':>5}"
        )
    return lines if result["collectives"] else ["collectives per step: none"]


def _overlap(config: Config, result: dict) -> list[str]:
    cluster = config.cluster
    links = f"{cluster.nics_per_node} NICs of {cluster.nic_gigabits_per_s:.0f} Gb/s per node"
    if not result["fits"]:
        step, share = (result["over_memory"][name] for name in ("predicted_step_s", "hidden_share"))
        return [
            f"no overlap is stated: {OVER_MEMORY}",
            f"(as it stands: {step * 1e3:.2f} ms, {share:.1%} of dispatch and combine hidden; {links})",
        ]
    hidden = (
        f"of dispatch and combine {_share(result['hidden_share'])} hidden (bound {_share(result['hidden_share_bound'])}), of "
        f"all collectives {_share(result['hidden_share_all_collectives'])} ({links})"
        if result["exchange_s"] else "dispatch and combine cross no link"
    )  # fmt: skip
    return [*_notes(config, result), f"predicted step {result['predicted_step_s'] * 1e3:.2f} ms; {hidden}"]


def _notes(config: Config, result: dict) -> list[str]:
    """What a reader must know before the figures of a program that fits."""
    notes = []
    # Decode attends over the cache, by a way of its own.
    chosen = config.model.attention.implementation == "auto" and config.aot.program != "decode"
    if chosen and config.model.dtype == "bfloat16" and (refusal := cudnn_refusal(config.model.attention)):
        notes.append(f"attention over whole sequences is XLA's, which holds all scores: cuDNN takes {refusal}")
    if once := result["loops_counted_once"]:
        notes.append(f"{once} loops run as often as the data says and are counted once: times are too short "
                     f"(model.moe.implementation={config.model.moe.implementation}; auto takes the GPU's kernels)")  # fmt: skip
    if synchronous := result["synchronous_exchanges"]:
        used = result["bytes_per_gpu"]["total"] / result["capacity_bytes"]
        reason = "XLA gives up overlap near the memory's end, before a program stops fitting"
        notes.append(f"{synchronous} dispatches and combines of a step are synchronous"
                     + (f"; {used:.0%} of the memory is in use, and {reason}" if used > _NEARLY_FULL else ""))  # fmt: skip
    return notes


def coverage_table(timeline: Timeline) -> str:
    """Returns, for every collective, the work that runs between its start and its done."""
    lines = ["what runs between start and done (predicted ms; the three longest)"] if timeline.transfers else []
    for transfer in timeline.transfers:
        longest = sorted(transfer.covered_by, key=lambda work: -work.seconds)[:3]
        works = ", ".join(f"{work.op} {work.scope} {work.seconds * 1e3:.3f}" for work in longest) or "nothing"
        side = " (backward)" if transfer.backward else ""
        lines.append(f"  {transfer.count:>4} x {transfer.scope or transfer.op}{side}: {works}")
    return "\n".join(lines)


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.2f}"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{max(share, 0.0):.1%}"


def _verdict(row: dict) -> str:
    return "fits" if row["fits"] else f"{row['missing_bytes'] / _GB:.2f} GB missing"


Columns = dict[str, Callable[[dict], str]]

# What any page says of a compiled program. Seconds of compiling are measured on the machine that compiled, bytes are
# the compiler's, overlap and times are predicted along its schedule.
PROGRAM_COLUMNS: Columns = {
    "transport, overlap": lambda row: row["dispatch"],
    "lower + compile, s (measured)": lambda row: f"{row['compile_s']:.1f}",
    "of all cores, s (measured)": lambda row: f"{row['compile_cpu_s']:.1f}",
    "GB a GPU (compiled)": lambda row: f"{row['bytes_per_gpu']['total'] / _GB:.2f}",
    "dispatch buffers, GB (compiled)": lambda row: f"{row['bytes_per_gpu']['by_part'].get('dispatch_buffers', 0) / _GB:.3f}",
    "temporaries, GB (compiled)": lambda row: f"{row['bytes_per_gpu']['temporaries'] / _GB:.3f}",
    "fits (compiled)": _verdict,
    "dispatch and combine, GB inside the node (compiled)": lambda row: _sent_gb(row, "same_node"),
    "GB between nodes (compiled)": lambda row: _sent_gb(row, "other_node"),
    "ms on the network (predicted)": lambda row: _milliseconds(row["exchange_s"]),
    "hidden (predicted)": lambda row: _share(row["hidden_share"]),
    "bound (predicted)": lambda row: _share(row["hidden_share_bound"]),
    "step, ms (predicted)": lambda row: _milliseconds(row["predicted_step_s"]),
}


def _sent_gb(row: dict, link: str) -> str:
    return f"{row['exchange_bytes_sent_per_gpu'][link] / _GB:.3f}"


def part_columns(rows: list[dict]) -> Columns:
    """Returns a column of GB for each part of the memory that any of the rows has, outputs and total last."""
    parts = dict.fromkeys(part for row in rows for part in row["bytes_per_gpu"]["by_part"])

    def of_part(part: str) -> Callable[[dict], str]:
        return lambda row: f"{row['bytes_per_gpu']['by_part'].get(part, 0) / _GB:.3f}"

    def of_all(name: str) -> Callable[[dict], str]:
        return lambda row: f"{row['bytes_per_gpu'][name] / _GB:.3f}"

    return {part.replace("_", " "): of_part(part) for part in parts} | {name: of_all(name) for name in ("outputs", "total")}


def sent_columns() -> Columns:
    """Returns a column for each class of links that a step's collectives cross."""

    def of(link: str) -> Callable[[dict], str]:
        return lambda row: f"{row['bytes_sent_per_gpu'][link] / _GB:.3f}"

    return {"inside the node": of("same_node"), "between nodes": of("other_node")}


def limits_columns() -> Columns:
    """Returns the largest sizes that fit, each with the share of the exchange that is hidden there."""
    return {
        "most sequences a GPU (compiled)": lambda row: _at_least(row["sequences"], row["searched_up_to"]["sequences"]),
        "at context": lambda row: str(row["at_context"]),
        "hidden there (predicted)": lambda row: _hidden_at(row, row["sequences"], row["at_context"]),
        "longest context (compiled)": lambda row: _at_least(row["context"], row["searched_up_to"]["context"]),
        "with sequences": lambda row: str(row["at_sequences"]),
        "hidden there too (predicted)": lambda row: _hidden_at(row, row["at_sequences"], row["context"]),
        "programs compiled": lambda row: str(len(row["compiled"])),
    }


def _hidden_at(limits: dict, sequences: int, context: int) -> str:
    at = (each for each in limits["compiled"] if (each["sequences"], each["context"]) == (sequences, context))
    return _share(next(at, {"hidden_share": None})["hidden_share"])


def table(columns: Columns, rows: list[dict]) -> str:
    """Returns rows as a Markdown table, padded to be read as text too."""
    cells = [list(columns), *([show(row) for show in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]) + "\n"


def limits_text(limits: dict) -> str:
    """Returns the largest sizes that fit."""
    sequences = _at_least(limits["sequences"], limits["searched_up_to"]["sequences"])
    context = _at_least(limits["context"], limits["searched_up_to"]["context"])
    return (
        f"most that fits (compiled): sequences per GPU at context {limits['at_context']}: {sequences}; "
        f"context with {limits['at_sequences']} sequences per GPU: {context}"
    )


def _at_least(found: int, end: int) -> str:
    """The search ends somewhere: what fits there is not the most."""
    return f"{found} or more" if found >= end else str(found) if found else "none"
