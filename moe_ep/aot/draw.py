"""The predicted timeline as a Chrome trace and as a picture of one layer."""

import json
import pathlib
from collections.abc import Sequence

from moe_ep.aot.timeline import Event, Timeline

_LANES = ("compute", "network")
_COLORS = {
    "gemm": "#4878a8",
    "grouped_gemm": "#2f5d8a",
    "attention": "#6aa56e",
    "other": "#b8b8b8",
}
_NETWORK_COLOR = "#d98c3f"


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


def layer_events(timeline: Timeline) -> list[Event]:
    """Returns the events of the first loop body that holds an exchange: one MoE layer; all events without one."""
    exchanges = [t for t in timeline.transfers if t.is_exchange and t.count > 1]
    if not exchanges:
        return timeline.events
    names = {transfer.body for transfer in exchanges}
    return [event for event in timeline.events if event.body in names]


def draw_layer(timeline: Timeline, title: str, path: pathlib.Path) -> None:
    """Draws the two lanes of one MoE layer, its exchanges named."""
    # Imported here: a report without a picture needs no matplotlib.
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    events = layer_events(timeline)
    figure, axes = plt.subplots(figsize=(12, 2.6))
    for event in events:
        _draw_bar(axes, event)
    axes.set_yticks([1, 0], ["compute", "network"])
    axes.set_xlabel("ms, predicted")
    axes.set_title(title, fontsize=10)
    axes.margins(x=0.01)
    _label_colors(axes, events)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_bar(axes, event: Event) -> None:
    y = 1 - _LANES.index(event.lane)
    start_ms, width_ms = event.start_s * 1e3, (event.end_s - event.start_s) * 1e3
    color = _NETWORK_COLOR if event.lane == "network" else _COLORS.get(event.op, _COLORS["other"])
    axes.barh(y, width_ms, left=start_ms, height=0.7, color=color, edgecolor="white", linewidth=0.3)
    if event.lane == "network":
        axes.text(start_ms + width_ms / 2, y, event.scope.split("/")[-1], ha="center", va="center", fontsize=7)


def _label_colors(axes, events: Sequence[Event]) -> None:
    from matplotlib.patches import Patch

    used = {event.op for event in events if event.lane == "compute"}
    handles = [Patch(color=color, label=op) for op, color in _COLORS.items() if op in used]
    axes.legend(handles=[*handles, Patch(color=_NETWORK_COLOR, label="collective")], fontsize=7, ncol=5,
                loc="upper center", bbox_to_anchor=(0.5, -0.28))  # fmt: skip
