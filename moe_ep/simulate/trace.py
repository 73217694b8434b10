"""A predicted forward pass as a Chrome trace, one row for each stream of a few ranks."""

import json
import pathlib

from moe_ep.simulate.scenario import Scenario
from moe_ep.simulate.step import stage_work
from moe_ep.simulate.timeline import Timeline, forward_timeline


def write(scenario: Scenario, path: pathlib.Path, ranks_shown: int = 4) -> Timeline:
    """Writes the timeline of the stage's forward pass for chrome://tracing or Perfetto; returns it."""
    chunks = scenario.layout.chunks if scenario.layout.overlap == "chunks" else 1
    timeline = forward_timeline(stage_work(scenario), scenario.layout.overlap, chunks)
    events = [
        {
            "name": task.name, "ph": "X", "pid": rank, "tid": task.stream,
            "ts": 1e6 * timeline.start[index, rank],
            "dur": 1e6 * (timeline.end[index, rank] - timeline.start[index, rank]),
        }
        for index, task in enumerate(timeline.tasks)
        for rank in range(min(ranks_shown, timeline.start.shape[1]))
    ]  # fmt: skip
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
    return timeline
