"""Pictures of a benchmark: layouts side by side, scaling curves. matplotlib is imported here alone."""

from pathlib import Path
from typing import Any

_COLOURS = ("#1f5fa8", "#d1642a", "#3c8d53", "#8a5aa8", "#b03a48", "#707070")
_STYLES = ("-", "--", ":", "-.")


def draw(rows: list[dict], folder: Path) -> list[Path]:
    """Draws what the rows have and returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    paths = []
    pictures = {
        "bench.layouts.png": (_side_by_side, ("layouts",)),
        "bench.scaling.png": (_scaling, ("strong", "weak")),
        "bench.full_size.png": (_full_size, ("full size",)),
    }
    for name, (picture, studies) in pictures.items():
        if chosen := [row for row in rows if row["study"] in studies]:
            paths.append(picture(chosen, folder / name))
    return paths


def _side_by_side(rows: list[dict], path: Path) -> Path:
    """A column of panels a phase: tokens/s, and bytes that a device sends for each of its tokens."""
    from matplotlib import pyplot

    phases = list(dict.fromkeys(row["phase"] for row in rows))
    size = (4.6 * len(phases), 6.4)
    figure, panels = pyplot.subplots(2, len(phases), figsize=size, squeeze=False, layout="constrained")
    for column, phase in enumerate(phases):
        chosen = [row for row in rows if row["phase"] == phase]
        _bars(panels[0][column], chosen, lambda row: row["tokens_per_s"])
        _bars(panels[1][column], chosen, lambda row: row["bytes_sent"] / row["tokens_per_microbatch"] / 1e3)
        panels[0][column].set_title(phase)
    panels[0][0].set_ylabel("tokens/s, all devices")
    panels[1][0].set_ylabel("kB sent for a token")
    figure.legend(*panels[0][0].get_legend_handles_labels(), frameon=False, ncols=4, loc="outside lower center")
    figure.suptitle(f"Layouts side by side ({_kinds(rows)})")
    return _save(figure, path)


def _bars(panel: Any, rows: list[dict], height: Any) -> None:
    """Groups of bars: a group for each workload, a colour for each layout."""
    groups = list(dict.fromkeys(_workload(row) for row in rows))
    layouts = list(dict.fromkeys(_layout(row) for row in rows))
    width = 0.8 / len(layouts)
    for index, (layout, colour) in enumerate(zip(layouts, _COLOURS * 3)):
        chosen = [row for row in rows if _layout(row) == layout]
        at = [groups.index(_workload(row)) + (index - (len(layouts) - 1) / 2) * width for row in chosen]
        panel.bar(at, [height(row) for row in chosen], width, color=colour, label=layout)
    panel.set_xticks(range(len(groups)), groups, fontsize=7, rotation=20, ha="right")
    panel.spines[["top", "right"]].set_visible(False)


def _layout(row: dict) -> str:
    if row["layout"] == "proposed":
        return "one expert a device"
    return f"{row['layout']} EP={row['ep']}"


def _workload(row: dict) -> str:
    return f"{row['sequence']} x {row['tokens_per_microbatch']:g}, {row['routing']}"


def _scaling(rows: list[dict], path: Path) -> Path:
    """Tokens/s over devices, a panel for strong and for weak scaling, with the straight line from the first point."""
    from matplotlib import pyplot

    studies = list(dict.fromkeys(row["study"] for row in rows))
    size = (5.2 * len(studies), 4.2)
    figure, panels = pyplot.subplots(1, len(studies), figsize=size, squeeze=False, layout="constrained")
    for panel, study in zip(panels[0], studies, strict=True):
        _curves(panel, [row for row in rows if row["study"] == study])
        panel.set_title(f"{study} scaling")
    panels[0][0].set_ylabel("tokens/s over that of the fewest devices")
    figure.suptitle(f"Scaling over devices ({_kinds(rows)})")
    return _save(figure, path)


def _curves(panel: Any, rows: list[dict]) -> None:
    """A colour a phase, a line style a routing."""
    phases, routings = (list(dict.fromkeys(row[name] for row in rows)) for name in ("phase", "routing"))
    for phase, sequence, routing in dict.fromkeys((row["phase"], row["sequence"], row["routing"]) for row in rows):
        chosen = [row for row in rows if (row["phase"], row["sequence"], row["routing"]) == (phase, sequence, routing)]
        colour = _COLOURS[phases.index(phase) % len(_COLOURS)]
        style = _STYLES[routings.index(routing) % len(_STYLES)]
        relative = [row["tokens_per_s"] / chosen[0]["tokens_per_s"] for row in chosen]
        panel.plot([row["devices"] for row in chosen], relative, style, marker="o", color=colour,
                   label=f"{phase} {sequence}, {routing}")  # fmt: skip
    devices = sorted({row["devices"] for row in rows})
    panel.plot(devices, [count / devices[0] for count in devices], color="black", linewidth=1, label="linear")
    panel.set_xscale("log", base=2)
    panel.set_xticks(devices, [str(count) for count in devices])
    panel.set_xlabel("devices")
    panel.grid(alpha=0.3)
    panel.legend(frameon=False, fontsize=7)


def _full_size(rows: list[dict], path: Path) -> Path:
    """Tokens/s of one expert a device over each baseline's: a panel a phase and reading of the network."""
    from matplotlib import pyplot

    phases, readings = (list(dict.fromkeys(row[name] for row in rows)) for name in ("phase", "network"))
    size = (5.2 * len(phases), 3.2 * len(readings) + 0.8)
    figure, panels = pyplot.subplots(
        len(readings), len(phases), figsize=size, squeeze=False, sharey=True, layout="constrained"
    )
    for line, reading in enumerate(readings):
        for column, phase in enumerate(phases):
            chosen = [row for row in rows if (row["phase"], row["network"]) == (phase, reading)]
            _ratios(panels[line][column], chosen)
            panels[line][column].set_title(f"{phase}, {reading}", fontsize=10)
        panels[line][0].set_ylabel("tokens/s over the baseline's")
    figure.legend(*panels[0][0].get_legend_handles_labels(), frameon=False, ncols=3, loc="outside lower center")
    figure.suptitle(f"One expert a device, full size, {rows[0]['gpu']}: predicted (hatched: the baseline does not fit)")
    return _save(figure, path)


def _ratios(panel: Any, rows: list[dict]) -> None:
    proposed = {row["experts"]: row["tokens_per_s"] for row in rows if row["layout"] == "proposed"}
    baselines = list(dict.fromkeys(_layout(row) for row in rows if row["layout"] != "proposed"))
    sizes, width = list(proposed), 0.8 / len(baselines)
    for index, (baseline, colour) in enumerate(zip(baselines, _COLOURS * 3)):
        for row in rows:
            if _layout(row) == baseline:
                at = sizes.index(row["experts"]) + (index - (len(baselines) - 1) / 2) * width
                ratio = proposed[row["experts"]] / row["tokens_per_s"]
                panel.bar(at, ratio - 1, width, bottom=1, color=colour,
                          hatch=None if row["feasible"] else "///", edgecolor="white")  # fmt: skip
        panel.bar(0, 0, bottom=1, color=colour, label=baseline)
    panel.axhline(1, color="black", linewidth=1)
    panel.set_yscale("log", base=2)
    panel.yaxis.set_major_formatter("{x:g}x")
    panel.set_xticks(range(len(sizes)), [f"E={size}" for size in sizes])
    panel.spines[["top", "right"]].set_visible(False)


def _kinds(rows: list[dict]) -> str:
    kinds = sorted({row["kind"] for row in rows})
    note = ": times say nothing about GPUs" if kinds == ["emulated"] else ""
    return ", ".join(kinds) + note


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
