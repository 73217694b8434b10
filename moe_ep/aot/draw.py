"""The predicted timeline as a Chrome trace and as a picture of one layer."""

import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from moe_ep.aot.timeline import EXCHANGE_SCOPES, Event, Timeline

_LANES = ("compute", "network")
# Kind of work -> its name in the legend, color, hatching.
_STYLE = {
    "attention": ("attention", "#3f8f5b", None),
    "experts": ("experts", "#2f5d8a", None),
    "other": ("norms, router, packing, other", "#b4b4b4", None),
    "waiting": ("waits for the network", "#ffffff", "//////"),
    "exchange": ("dispatch and combine", "#c8742c", None),
    "collective": ("other collectives", "#7d5ba6", None),
}
_RED = "#b02a2a"
_WIDTH_INCHES, _DPI = 7.2, 300  # two columns of a paper
_TOP_INCHES, _PANEL_INCHES, _BOTTOM_INCHES = 0.5, 1.1, 0.66
_LABEL_INCHES = 0.057  # of a character
_SHORTEST_MS = 1e-6


def write_trace(timeline: Timeline, path: pathlib.Path) -> None:
    """Writes events in the Trace Event Format that Perfetto and chrome://tracing read; times in microseconds."""
    names = [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": tid, "args": {"name": lane}}
        for tid, lane in enumerate(_LANES)
    ]
    bars = [
        {
            "name": event.scope or event.op,
            "cat": event.op,
            "ph": "X",
            "pid": 0,
            "tid": _LANES.index(event.lane),
            "ts": event.start_s * 1e6,
            "dur": (event.end_s - event.start_s) * 1e6,
            "args": {"instruction": event.name, "op": event.op},
        }
        for event in timeline.events
    ]
    path.write_text(json.dumps({"traceEvents": names + bars, "displayTimeUnit": "ms"}))


class Block(NamedTuple):
    """Work of one kind without a break, in ms from the picture's left edge."""

    kind: str
    label: str
    begin: float
    end: float


def layer_bodies(timeline: Timeline) -> dict[str, list[Event]]:
    """Returns the events of each loop body that holds an exchange, forward and backward: one pass, a layer of the stack.

    Without such a loop, all events under the name "".
    """
    exchanges = [transfer for transfer in timeline.transfers if transfer.is_exchange and transfer.count > 1]
    if not exchanges:
        return {"": timeline.events}
    bodies = dict.fromkeys(transfer.body for transfer in exchanges)
    return {body: [event for event in timeline.events if event.body == body] for body in bodies}


def compute_blocks(events: Sequence[Event]) -> list[Block]:
    """Returns the compute lane: neighbors of one part of the model joined, and where it waits for the network."""
    blocks: list[Block] = []
    for event, begin, end in _in_ms(events, "compute"):
        kind = _part_of(event.scope)
        if blocks and blocks[-1].kind == kind and begin - blocks[-1].end < _SHORTEST_MS:
            blocks[-1] = blocks[-1]._replace(end=end)
        else:
            blocks.append(Block(kind, "" if kind == "other" else kind, begin, end))
    # A gap is a wait only while the network carries something: loops over other layers leave gaps as well.
    carried = [(begin, end) for _, begin, end in _in_ms(events, "network")]
    gaps = [(last.end, following.begin) for last, following in zip(blocks, blocks[1:])]
    waits = [(max(gap[0], begin), min(gap[1], end)) for gap in gaps for begin, end in carried]
    return blocks + [Block("waiting", "", begin, end) for begin, end in waits if end - begin > _SHORTEST_MS]


def _part_of(scope: str) -> str:
    """Which half of a MoE layer compute belongs to, or neither (norms, router, packing)."""
    names = scope.split("/")
    return next((part for part in ("attention", "experts") if part in names), "other")


def network_blocks(events: Sequence[Event]) -> list[Block]:
    """Returns the network lane, its exchanges named by their stage."""
    blocks = []
    for event, begin, end in _in_ms(events, "network"):
        stage = event.scope.split("/")[-1]
        is_exchange = stage in EXCHANGE_SCOPES
        label = f"{stage}\n{end - begin:.2f} ms" if is_exchange else ""
        blocks.append(Block("exchange" if is_exchange else "collective", label, begin, end))
    return blocks


def _in_ms(events: Sequence[Event], lane: str) -> list[tuple[Event, float, float]]:
    start = min((event.start_s for event in events), default=0.0)
    return [(event, (event.start_s - start) * 1e3, (event.end_s - start) * 1e3) for event in events if event.lane == lane]


def draw_layer(timeline: Timeline, title: str, note: str, path: pathlib.Path, *, warning: str = "") -> None:
    """Draws one MoE layer as two lanes, compute and network, a panel each for forward and backward.

    Args:
      timeline: of the compiled program.
      title: the picture's first line.
      note: a smaller line under it; `warning`, in red, takes its place.
      path: of the PNG.
      warning: why the schedule does not hold.
    """
    # Imported here: a report without a picture needs no matplotlib.
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bodies = layer_bodies(timeline)
    shown = "the whole step" if "" in bodies else "one MoE layer"
    height = _TOP_INCHES + _BOTTOM_INCHES + _PANEL_INCHES * len(bodies)
    with plt.rc_context({"hatch.linewidth": 0.7}):
        figure, rows = plt.subplots(len(bodies), figsize=(_WIDTH_INCHES, height), squeeze=False)
        kinds = set()
        for axes, (body, events) in zip(rows[:, 0], bodies.items(), strict=True):
            kinds |= _draw_lanes(axes, events)
            axes.set_ylabel(_direction(timeline, body) if body else "", fontsize=8)
        rows[-1, 0].set_xlabel(f"time from the start of {shown.replace('one', 'the')}, ms (predicted)", fontsize=8)
        figure.suptitle(f"{shown[0].upper()}{shown[1:]}: {title}", fontsize=9, x=0.01, y=1 - 0.06 / height, ha="left")
        figure.text(0.01, 1 - 0.26 / height, warning or note, fontsize=7, va="top", color=_RED if warning else "#555555")
        figure.legend(handles=_legend(kinds), loc="lower center", ncol=len(_STYLE), fontsize=7, frameon=False,
                      handlelength=1.2, columnspacing=1.2, borderpad=0.1)  # fmt: skip
        figure.subplots_adjust(left=0.1, right=0.985, top=1 - _TOP_INCHES / height, bottom=_BOTTOM_INCHES / height,
                               hspace=0.35)  # fmt: skip
        figure.savefig(path, dpi=_DPI)
        plt.close(figure)


def _direction(timeline: Timeline, body: str) -> str:
    """What a panel is called where there are several: the passes of a training step."""
    mine = [transfer for transfer in timeline.transfers if transfer.body == body and transfer.is_exchange]
    if not any(transfer.backward for transfer in timeline.transfers):
        return ""
    return "backward" if any(transfer.backward for transfer in mine) else "forward"


def _draw_lanes(axes, events: Sequence[Event]) -> set[str]:
    """Draws both lanes; returns the kinds of work that are in them."""
    lanes = {1: compute_blocks(events), 0: network_blocks(events)}
    longest = max((block.end for blocks in lanes.values() for block in blocks), default=1.0)
    inches = _WIDTH_INCHES * 0.885 / longest  # per ms
    for lane, blocks in lanes.items():
        left, rights = 0.0, [*(block.begin for block in blocks[1:]), longest]
        for block, right in zip(blocks, rights, strict=False):
            _, color, hatch = _STYLE[block.kind]
            axes.barh(lane, block.end - block.begin, left=block.begin, height=0.72, facecolor=color, hatch=hatch,
                      edgecolor=_RED if hatch else "white", linewidth=0.0 if hatch else 0.3)  # fmt: skip
            written_to = _write_label(axes, lane, block, inches, (left, right))
            left = max(block.end, written_to)
    axes.set_yticks([1, 0], ["compute", "network"], fontsize=8)
    axes.set_xlim(0, longest)
    axes.set_ylim(-0.5, 1.5)
    axes.tick_params(axis="x", labelsize=7)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return {block.kind for blocks in lanes.values() for block in blocks}


def _write_label(axes, lane: int, block: Block, inches: float, free: tuple[float, float]) -> float:
    """Writes a block's label into it, or beside it, as far as its lane is free, where there is room for it.

    Returns how far to the right the label reaches, 0 without one.
    """
    needed = _LABEL_INCHES * max(map(len, block.label.split("\n")))
    gap = 0.04 / inches
    places = (
        (block.end - block.begin, (block.begin + block.end) / 2, "center", "white"),
        (free[1] - block.end, block.end + gap, "left", "#444444"),
        (block.begin - free[0], block.begin - gap, "right", "#444444"),
    )
    place = next((place for place in places if block.label and place[0] * inches > needed), None)
    if place is None:
        return 0.0
    _, x, side, color = place
    axes.text(x, lane, block.label, ha=side, va="center", fontsize=6.5, color=color)
    return x + needed / inches * {"left": 1.0, "center": 0.5, "right": 0.0}[side]


def _legend(kinds: set[str]) -> list:
    from matplotlib.patches import Patch

    return [Patch(facecolor=color, hatch=hatch, edgecolor=_RED if hatch else color, linewidth=0, label=label)
            for kind, (label, color, hatch) in _STYLE.items() if kind in kinds]  # fmt: skip
