# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # One expert a device, or several?
#
# Reads what `--mode=bench` wrote (`bench.json`; with `--set bench.predict=true` the
# full-size comparison is in it too) and draws the proposed layout against the
# baselines. Every figure says whether it was measured, emulated or predicted: times on
# emulated devices say nothing about GPUs, their bytes and loads do.
#
# Open it with `jupytext --to notebook notebooks/compare_layouts.py`, or in JupyterLab
# with jupytext installed. `MOE_EP_BENCH` names another file.

# %%
import json
import os
from pathlib import Path

import matplotlib.pyplot as plt

ROOT = next(folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "moe_ep").is_dir())
path = Path(os.environ.get("MOE_EP_BENCH", ROOT / "results" / "bench_emulated.json"))
result = json.loads(path.read_text())
rows = result["rows"]
print(f"{path.name}: {result['kind']} on {result['device']}, {result['date']}, commit {result['commit']}; {len(rows)} rows")


# %% [markdown]
# ## The same work by equal devices
#
# A proposed row stands against each baseline that did the same work: phase, experts,
# devices, sequence, tokens, routing, and for predictions the reading of the network.

# %%
WORK = ("study", "phase", "experts", "devices", "sequence", "tokens_per_microbatch", "routing", "network")


def ratios(rows: list[dict], value) -> list[tuple[dict, dict, float]]:
    """Returns (proposed, baseline, the proposed row's value over the baseline's) for equal work."""
    work = lambda row: tuple(row.get(name) for name in WORK)  # noqa: E731
    proposed = {work(row): row for row in rows if row["layout"] == "proposed"}
    others = [row for row in rows if row["layout"] != "proposed" and work(row) in proposed]
    return [(proposed[work(row)], row, value(proposed[work(row)]) / value(row)) for row in others if value(row)]


def bars(panel, pairs, title: str, label) -> None:
    """Draws a ratio a bar; 1 is equal."""
    names = [label(proposed, baseline) for proposed, baseline, _ in pairs]
    panel.barh(names, [ratio for *_, ratio in pairs], color=["#1f5fa8" if r >= 1 else "#d1642a" for *_, r in pairs])
    panel.axvline(1, color="black", linewidth=1)
    panel.invert_yaxis()
    panel.set_title(title, fontsize=10)
    panel.spines[["top", "right"]].set_visible(False)


here = [row for row in rows if row["study"] == "layouts"]
sent = ratios(here, lambda row: row["bytes_sent"] / row["tokens_per_microbatch"])
if sent:
    figure, panel = plt.subplots(figsize=(8, 1 + 0.3 * len(sent)), layout="constrained")
    name = lambda p, b: f"{b['phase']}, {b['routing']}, vs EP {b['ep']} x {b['data']}"  # noqa: E731
    bars(panel, sent, f"bytes sent for a token, proposed over baseline ({here[0]['kind']})", name)
    plt.show()

# %% [markdown]
# ## Load
#
# The busiest expert over the mean: with one expert a device this is how long the others
# wait; with several a device their loads are pooled.

# %%
for row in here:
    if row["layout"] == "proposed":
        print(f"{row['phase']:8} {row['routing']:10} load CV {row['load_cv']:.2f}, max/mean {row['max_over_mean_load']:.2f}")

# %% [markdown]
# ## Full size, predicted
#
# The reference model on as many GPUs as experts. A baseline as a pipeline fits where it
# says so; as replicas its memory is ignored. The error bar is the simulator's.

# %%
full = [row for row in rows if row["study"] == "full size"]
if not full:
    print("no predicted rows: --set bench.predict=true adds them")
for phase in dict.fromkeys(row["phase"] for row in full):
    pairs = ratios([row for row in full if row["phase"] == phase], lambda row: row["tokens_per_s"])
    readings = list(dict.fromkeys(row["network"] for row in full))
    figure, panels = plt.subplots(1, len(readings), figsize=(6 * len(readings), 1 + 0.22 * len(pairs)), layout="constrained")
    for panel, reading in zip(panels, readings, strict=True):
        chosen = [pair for pair in pairs if pair[0]["network"] == reading]
        name = lambda p, b: f"E={b['experts']}, vs EP {b['ep']}, {b['layout'].split(', ')[1]}"  # noqa: E731
        bars(panel, chosen, f"{reading}: tokens/s, proposed over baseline (predicted)", name)
    figure.suptitle(f"{phase}, error bar of each time {full[0]['error_bar']:.0%}")
    plt.show()

# %% [markdown]
# ## Scaling
#
# Tokens/s on more devices over that on the fewest, as the share of linear.

# %%
for study in ("strong", "weak"):
    chosen = [row for row in rows if row["study"] == study]
    series = {}
    for row in chosen:
        series.setdefault((row["phase"], row["routing"]), []).append(row)
    for (phase, routing), points in series.items():
        first = points[0]
        shares = [point["tokens_per_s"] / first["tokens_per_s"] * first["devices"] / point["devices"] for point in points]
        text = ", ".join(f"{point['devices']}: {share:.0%}" for point, share in zip(points, shares, strict=True))
        print(f"{study:6} {phase:8} {routing:10} of linear at devices {text} ({first['kind']})")
