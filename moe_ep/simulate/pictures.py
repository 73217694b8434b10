"""Scaling curves, the break-even map, the memory bar. matplotlib is imported here and nowhere else."""

import pathlib
import typing

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.colors import TwoSlopeNorm  # noqa: E402

from moe_ep.cost.units import Number

_COLOURS = ("#1f5fa8", "#d1642a", "#3c8d53", "#8a5aa8", "#b03a48", "#707070")


def curves(rows: list[dict], axis: str, inputs: dict[str, typing.Any], path: pathlib.Path) -> None:
    """Draws tokens/s per GPU and exposed communication over one varied input, one line a series."""
    figure, (rate, exposed) = plt.subplots(1, 2, figsize=(10, 4))
    drawn = [row for row in rows if "tokens_per_s" in row]
    for colour, series in zip(_COLOURS, dict.fromkeys(row["series"] for row in drawn)):
        chosen = [row for row in drawn if row["series"] == series]
        x = [row["x"] for row in chosen]
        rate.plot(x, [row["tokens_per_s_per_gpu"] for row in chosen], "o-", color=colour, label=series)
        exposed.plot(x, [100 * row["exposed_communication_share"] for row in chosen], "o-", color=colour)
    rate.set_ylabel("tokens/s per GPU")
    rate.set_ylim(0, 1.1 * max((row["tokens_per_s_per_gpu"] for row in drawn), default=1.0))
    exposed.set_ylabel("step exposed to communication, %")
    exposed.set_ylim(0, 100)
    for panel in (rate, exposed):
        panel.set_xlabel(axis)
        if drawn and min(row["x"] for row in drawn) > 0 and max(row["x"] for row in drawn) > 1:
            panel.set_xscale("log", base=2)
            ticks = sorted({row["x"] for row in drawn})
            panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    if drawn:
        rate.legend(frameon=False)
    title = "Predicted: {phase} on {gpu}, kernels {kernels}, network {network}"
    figure.suptitle(title.format(**inputs), fontsize=10)
    _save(figure, path)


def break_even_map(rows: list[dict], phase: str, path: pathlib.Path) -> None:
    """Draws throughput of one expert per GPU over each baseline, experts by batch, one row of panels a NIC reading."""
    readings = list(dict.fromkeys(row["reading"] for row in rows))
    baselines = sorted({row["baseline"] for row in rows if "EP" in row["baseline"]}, key=_baseline_order)
    figure, panels = plt.subplots(
        len(readings), len(baselines), figsize=(3.1 * len(baselines), 2.9 * len(readings)), squeeze=False,
        sharex=True, sharey=True, layout="constrained",
    )  # fmt: skip
    for line, reading in enumerate(readings):
        for column, baseline in enumerate(baselines):
            chosen = [row for row in rows if row["reading"] == reading and row["baseline"] == baseline]
            image = _panel(panels[line][column], chosen, rows)
            panels[line][column].set_title(f"vs {baseline}", fontsize=9)
        panels[line][0].set_ylabel(f"{reading}\nexperts = GPUs")
    for panel in panels[-1]:
        panel.set_xlabel("batch per GPU")
    figure.colorbar(image, ax=panels, shrink=0.8, label="throughput of one expert per GPU over the baseline's (log2)")
    figure.suptitle(f"Predicted, {phase}: where one expert per GPU wins (blue) and loses (red)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _baseline_order(name: str) -> tuple[str, int]:
    words = name.split()
    return words[-1], int(words[1])


def _panel(panel: plt.Axes, chosen: list[dict], rows: list[dict]):
    experts = sorted({row["experts"] for row in rows})
    batches = sorted({row["batch"] for row in rows})
    ratio = np.full((len(experts), len(batches)), np.nan)
    for row in chosen:
        ratio[experts.index(row["experts"]), batches.index(row["batch"])] = row["wide_over_this"]
    panel.set_facecolor("#dddddd")
    image = panel.imshow(np.log2(ratio), cmap="RdBu", norm=TwoSlopeNorm(0, -2.5, 2.5), aspect="auto", origin="lower")
    for (line, column), value in np.ndenumerate(ratio):
        if np.isfinite(value):
            dark = abs(np.log2(value)) > 1.6
            panel.text(column, line, f"{value:.2g}", ha="center", va="center", fontsize=7,
                       color="white" if dark else "black")  # fmt: skip
    panel.set_xticks(range(len(batches)), batches, fontsize=7)
    panel.set_yticks(range(len(experts)), experts, fontsize=8)
    return image


def memory_bar(layouts: dict[str, dict[str, Number]], limit_bytes: Number, path: pathlib.Path) -> None:
    """Draws bytes of one GPU by part, a bar for each layout, against the GPU's memory; the longest bars are cut."""
    figure, panel = plt.subplots(figsize=(9, 1.6 + 0.4 * len(layouts)))
    limit = limit_bytes / 1e9
    parts = [part for part in next(iter(layouts.values())) if part != "total"]
    totals = np.array([sum(layout[part] for part in parts) / 1e9 for layout in layouts.values()])
    edge = 1.12 * max(min(float(totals.max()), 2.5 * limit), limit)
    left = np.zeros(len(layouts))
    for colour, part in zip(_COLOURS, parts):
        width = np.array([layout[part] / 1e9 for layout in layouts.values()])
        panel.barh(list(layouts), width, left=left, color=colour, label=part, height=0.65)
        left += width
    panel.axvline(limit, color="black", linestyle="--", linewidth=1, label=f"the GPU's {limit:.0f} GB")
    for line, total in enumerate(totals):
        cut = total > 0.9 * edge
        panel.text(0.895 * edge if cut else total + 0.01 * edge, line, f"{total:.1f} GB" + (" →" if cut else ""),
                   va="center", fontsize=8.5, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0})  # fmt: skip
    panel.set_xlim(0, edge)
    panel.invert_yaxis()
    panel.set_xlabel("GB on one GPU (by formula)")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, ncol=len(parts) + 1, loc="lower center", bbox_to_anchor=(0.45, 1.0), fontsize=8.5)
    _save(figure, path)


def _save(figure: plt.Figure, path: pathlib.Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
