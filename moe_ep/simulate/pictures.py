"""Scaling curves, the break-even map, the memory bar, the search's front. matplotlib is imported here and nowhere else."""

import pathlib
import typing

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.colors import TwoSlopeNorm  # noqa: E402

from moe_ep.cost.units import Number

_COLOURS = ("#1f5fa8", "#d1642a", "#3c8d53", "#8a5aa8", "#b03a48", "#707070", "#2a9d9d", "#a8842c", "#444444")
_NAMES = {"kv_cache": "cache of keys and values", "buffers": "exchange buffers"}
_FIXED = "{gpu}, {experts} experts, top-{top_k}; kernels {kernels}, network {network}, routing {routing}"

Inputs = dict[str, typing.Any]


def heading(what: str, inputs: Inputs) -> str:
    """Returns a picture's title: what it shows, that it is predicted, what it rests on."""
    return f"{what}\npredicted, not measured; {_FIXED.format(**inputs)}"


def curves(rows: list[dict], axis: str, title: str, inputs: Inputs, path: pathlib.Path) -> None:
    """Draws tokens/s per GPU with its error bar, and exposed communication, over one varied input, one line a series.

    Hollow points are counterfactuals with memory ignored; what was not timed is counted below.
    """
    figure, (rate, exposed) = plt.subplots(1, 2, figsize=(11, 4.8))
    drawn = [row for row in rows if "tokens_per_s" in row]
    for colour, series in zip(_COLOURS, dict.fromkeys(row["series"] for row in drawn)):
        chosen = [row for row in drawn if row["series"] == series]
        speed = [row["tokens_per_s_per_gpu"] for row in chosen]
        _line(rate, chosen, speed, colour, series)
        low, high = (np.array(speed) * (1 + sign * inputs["error_bar"]) for sign in (-1, 1))
        rate.fill_between([row["x"] for row in chosen], low, high, color=colour, alpha=0.12, linewidth=0)
        _line(exposed, chosen, [100 * row["exposed_communication_share"] for row in chosen], colour, series)
    rate.set_ylabel("tokens/s per GPU")
    most = max((row["tokens_per_s_per_gpu"] for row in drawn), default=1.0)
    rate.set_ylim(0, 1.1 * (1 + inputs["error_bar"]) * most)
    exposed.set_ylabel("share of the step that waits for communication, %")
    exposed.set_ylim(0, 100)
    for panel in (rate, exposed):
        _axis(panel, axis, sorted({row["x"] for row in drawn}))
    rate.legend(frameon=False, fontsize=9)
    figure.suptitle(heading(title, inputs), fontsize=10)
    figure.text(0.5, -0.01, _notes(rows, inputs), ha="center", va="top", fontsize=8.5, color="#444444")
    _save(figure, path)


def _line(panel: plt.Axes, rows: list[dict], values: list[Number], colour: str, series: str) -> None:
    x = [row["x"] for row in rows]
    panel.plot(x, values, "--" if panel.lines else "-", color=colour, label=series)  # one may hide the other
    for place, value, row in zip(x, values, rows):
        face = colour if row["feasible"] else "white"
        panel.plot([place], [value], "o", color=colour, markerfacecolor=face, markersize=6)


def _axis(panel: plt.Axes, axis: str, ticks: list[Number]) -> None:
    panel.set_xlabel(axis)
    if ticks and ticks[0] > 0 and ticks[-1] > 1:
        panel.set_xscale("log", base=2)
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)


def _notes(rows: list[dict], inputs: Inputs) -> str:
    notes = [f"band: error bar ±{inputs['error_bar']:.0%}, of published systems left out of the fit"]
    if any("tokens_per_s" in row and not row["feasible"] for row in rows):
        notes.append("hollow: does not fit, memory ignored")
    missing = [row["missing_bytes"] for row in rows if "tokens_per_s" not in row]
    if missing:
        notes.append(f"not drawn: {len(missing)} of {len(rows)} points, which need up to {max(missing) / 1e9:.1f} GB more")
    return "; ".join(notes)


def break_even_map(rows: list[dict], unit: str, title: str, inputs: Inputs, path: pathlib.Path) -> None:
    """Draws throughput of one expert per GPU over each baseline, experts by batch, one row of panels a NIC reading.

    Ratios closer to 1 than the error bar of ratios are in brackets.
    """
    readings = list(dict.fromkeys(row["reading"] for row in rows))
    baselines = sorted({row["baseline"] for row in rows if "EP" in row["baseline"]}, key=_baseline_order)
    figure, panels = plt.subplots(
        len(readings), len(baselines), figsize=(3.1 * len(baselines), 2.9 * len(readings)), squeeze=False,
        sharex=True, sharey=True, layout="constrained",
    )  # fmt: skip
    for line, reading in enumerate(readings):
        for column, baseline in enumerate(baselines):
            chosen = [row for row in rows if row["reading"] == reading and row["baseline"] == baseline]
            image = _panel(panels[line][column], chosen, rows, inputs["ratio_bar"])
            ignored = any(row["missing_bytes"] > 0 for row in chosen)
            panels[line][column].set_title(f"vs {baseline}" + (", memory ignored" if ignored else ""), fontsize=9)
        panels[line][0].set_ylabel(f"{reading}\nexperts = GPUs")
    for panel in panels[-1]:
        panel.set_xlabel(f"{unit} per GPU")
    figure.colorbar(image, ax=panels, shrink=0.8, label="throughput of one expert per GPU over the baseline's (log2)")
    brackets = f"in brackets: closer to 1 than the error bar of ratios, ±{inputs['ratio_bar']:.0%}"
    figure.suptitle(heading(f"{title}: one expert per GPU wins where blue, loses where red; {brackets}", inputs), fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _baseline_order(name: str) -> tuple[str, int]:
    words = name.split()
    return words[-1], int(words[1])


def _panel(panel: plt.Axes, chosen: list[dict], rows: list[dict], bar: Number):
    experts = sorted({row["experts"] for row in rows})
    batches = sorted({row["batch"] for row in rows})
    ratio = np.full((len(experts), len(batches)), np.nan)
    for row in chosen:
        ratio[experts.index(row["experts"]), batches.index(row["batch"])] = row["wide_over_this"]
    panel.set_facecolor("#dddddd")
    image = panel.imshow(np.log2(ratio), cmap="RdBu", norm=TwoSlopeNorm(0, -2.5, 2.5), aspect="auto", origin="lower")
    for (line, column), value in np.ndenumerate(ratio):
        if np.isfinite(value):
            dark, open_ = abs(np.log2(value)) > 1.6, abs(value - 1) < bar
            panel.text(column, line, f"({value:.2g})" if open_ else f"{value:.2g}", ha="center", va="center", fontsize=7,
                       color="white" if dark else "black")  # fmt: skip
    panel.set_xticks(range(len(batches)), batches, fontsize=7)
    panel.set_yticks(range(len(experts)), experts, fontsize=8)
    return image


def memory_bar(
    layouts: dict[str, dict[str, Number]], limit_bytes: Number, title: str, inputs: Inputs, path: pathlib.Path
) -> None:
    """Draws bytes of one GPU by part, a bar for each layout, against the GPU's memory; the longest bars are cut."""
    figure, panel = plt.subplots(figsize=(10, 2.2 + 0.4 * len(layouts)))
    limit = limit_bytes / 1e9
    parts = [part for part in next(iter(layouts.values())) if any(layout[part] for layout in layouts.values())]
    totals = np.array([sum(layout[part] for part in parts) / 1e9 for layout in layouts.values()])
    edge = 1.12 * max(min(float(totals.max()), 2.5 * limit), limit)
    left = np.zeros(len(layouts))
    for colour, part in zip(_COLOURS, parts):
        width = np.array([layout[part] / 1e9 for layout in layouts.values()])
        panel.barh(list(layouts), width, left=left, color=colour, label=_NAMES.get(part, part), height=0.65)
        left += width
    panel.axvline(limit, color="black", linestyle="--", linewidth=1, label=f"the GPU's {limit:.0f} GB")
    for line, total in enumerate(totals):
        cut = total > 0.9 * edge
        panel.text(0.895 * edge if cut else total + 0.01 * edge, line, f"{total:.1f} GB" + (" →" if cut else ""),
                   va="center", fontsize=8.5, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0})  # fmt: skip
    panel.set_xlim(0, edge)
    panel.invert_yaxis()
    panel.set_xlabel("GB on one GPU, by formula (within 3 % of the compiler's figures for this project's programs)")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, ncol=4, loc="lower center", bbox_to_anchor=(0.45, 1.0), fontsize=8.5)
    figure.suptitle(heading(title, inputs), fontsize=10)
    _save(figure, path)


def search_front(rows: list[dict], title: str, inputs: Inputs, path: pathlib.Path) -> None:
    """Draws every layout that fits by latency and throughput, coloured by EP, and the front that no other beats."""
    figure, panel = plt.subplots(figsize=(9, 5.2))
    fitting = sorted((row for row in rows if row["feasible"]), key=lambda row: row["ms_per_token"])
    for colour, ep in zip(_COLOURS, sorted({row["ep"] for row in fitting})):
        chosen = [row for row in fitting if row["ep"] == ep]
        panel.plot([row["ms_per_token"] for row in chosen], [row["tokens_per_s_per_gpu"] for row in chosen], "o",
                   color=colour, label=f"EP {ep}", markersize=5, alpha=0.75)  # fmt: skip
    front, best = [], 0.0
    for row in fitting:
        if row["tokens_per_s_per_gpu"] > best:
            best = row["tokens_per_s_per_gpu"]
            front.append(row)
    panel.plot([row["ms_per_token"] for row in front], [row["tokens_per_s_per_gpu"] for row in front], "-",
               color="black", linewidth=1, label="no layout is better in both")  # fmt: skip
    panel.set_xlabel("ms per token" + (" that a user waits" if inputs["phase"] == "decode" else ""))
    panel.set_ylabel("tokens/s per GPU")
    panel.set_xscale("log")
    panel.grid(alpha=0.3, which="both")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=8.5)
    figure.suptitle(heading(title, inputs), fontsize=10)
    note = f"{len(fitting)} of {len(rows)} layouts fit; error bar of a throughput ±{inputs['error_bar']:.0%}"
    figure.text(0.5, -0.01, note, ha="center", va="top", fontsize=8.5, color="#444444")
    _save(figure, path)


def _save(figure: plt.Figure, path: pathlib.Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
