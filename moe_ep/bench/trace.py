"""What a profile of the JAX profiler says of a device: how long it worked, how long it waited, on what it spent its time."""

import collections
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import jax

# Dependent kernels of one queue follow one another within a few microseconds; what is longer waits for the host.
_LAUNCH_GAP_NS = 10_000
_KERNELS_SHOWN = 12


class Event(NamedTuple):
    """A kernel or copy on a device, in nanoseconds."""

    name: str
    start: float
    end: float


def profile_steps(step: Callable[[], jax.Array], steps: int) -> dict:
    """Returns the idle shares and the kernels' times of so many steps, launched one ahead; {} where no GPU is."""
    step().block_until_ready()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            ahead = step()
            for _ in range(steps):
                current, ahead = ahead, step()
                current.block_until_ready()
            ahead.block_until_ready()
        return summarize(device_events(Path(folder)), steps + 1)


def device_events(folder: Path) -> list[Event]:
    """Returns what the streams of the first GPU ran, from the .xplane.pb below a folder."""
    for path in sorted(folder.rglob("*.xplane.pb")):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            if plane.name.startswith("/device:GPU:0"):
                return [
                    Event(event.name, event.start_ns, event.start_ns + event.duration_ns)
                    for line in plane.lines
                    if line.name.startswith("Stream")
                    for event in line.events
                ]
    return []


def summarize(events: Iterable[Event], steps: int) -> dict:
    """Returns shares of the time from the first to the last event, and the kernels that took most of it.

    idle_share: no stream ran anything. host_idle_share: the same, of waits longer than
    between kernels that are already queued.
    """
    events = sorted(events, key=lambda event: event.start)
    if not events:
        return {}
    end, idle, host_idle = events[0].end, 0.0, 0.0
    for event in events[1:]:
        gap = max(event.start - end, 0.0)
        idle += gap
        host_idle += gap if gap > _LAUNCH_GAP_NS else 0.0
        end = max(end, event.end)
    window = end - events[0].start
    total: dict[str, float] = collections.defaultdict(float)
    for event in events:
        total[event.name] += event.end - event.start
    longest = sorted(total.items(), key=lambda item: -item[1])[:_KERNELS_SHOWN]
    return {
        "idle_share": idle / window,
        "host_idle_share": host_idle / window,
        "ms_per_step": window / steps / 1e6,
        "events_per_step": len(events) / steps,
        "kernels_ms_per_step": {name: ns / steps / 1e6 for name, ns in longest},
    }
