"""Two lanes, compute and network, walked in the compiler's order with estimated times.

The compute lane runs instructions one after the other. A collective's start puts it
on the network lane, which carries one at a time; its done holds the compute lane
until the network has delivered. What compute waited is exposed, and it is the
transfer that the network carried meanwhile that is exposed: not the one waited for,
where that one queued behind another.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

# The stages whose traffic is the experts': what `hidden_share` is about.
EXCHANGE_SCOPES = ("dispatch", "combine", "exchange")
# Of a MoE layer what stands between its dispatch and its combine; the rest stands between combine and dispatch.
EXPERTS_SCOPES = ("experts", "expert_rows")


@dataclasses.dataclass(frozen=True)
class Estimates:
    """Seconds by prediction, from an entry of the schedule."""

    compute_s: Callable[[dict], float]
    network_s: Callable[[dict], float]


@dataclasses.dataclass(frozen=True)
class Event:
    """One bar of the picture."""

    lane: str  # "compute" or "network"
    name: str
    op: str
    scope: str
    body: str  # the computation, a loop's body, that it stands in
    start_s: float
    end_s: float


class Work(NamedTuple):
    """Compute of one execution of a computation, loops within it included."""

    name: str
    op: str
    scope: str
    seconds: float
    covers: bool = False  # an exchange of that computation is on its way meanwhile

    @property
    def is_experts(self) -> bool:
        return any(name in EXPERTS_SCOPES for name in self.scope.split("/"))


@dataclasses.dataclass
class Transfer:
    """One collective instruction of the program, over all its executions in a step."""

    name: str
    op: str
    scope: str
    body: str
    backward: bool
    count: int
    asynchronous: bool
    sent_same_node_bytes: float  # per execution
    sent_other_node_bytes: float
    groups: int
    group_size: int
    seconds: float  # all executions
    exposed_s: float
    covered_by: list[Work]  # between its start and its done, one execution

    @property
    def sent_bytes(self) -> float:
        """Bytes that one GPU sends in one execution, on average."""
        return self.sent_same_node_bytes + self.sent_other_node_bytes

    @property
    def is_exchange(self) -> bool:
        return self.scope.split("/")[-1] in EXCHANGE_SCOPES

    def add(self, other: "Transfer") -> None:
        """Adds further executions of the same instruction."""
        self.count += other.count
        self.seconds += other.seconds
        self.exposed_s += other.exposed_s

    @property
    def has_products_between(self) -> bool:
        """Whether matrix work is issued between the start and the done."""
        return any(work.op in ("gemm", "grouped_gemm", "attention") for work in self.covered_by)


@dataclasses.dataclass(frozen=True)
class Timeline:
    """A step of the program as predicted; events of a loop are those of one pass through its body."""

    step_s: float
    compute_s: float
    transfers: list[Transfer]
    events: list[Event]
    work: dict[str, list[Work]]  # by computation

    def bound(self) -> float:
        """Returns the most of dispatch and combine that these bytes let this compute hide, at least `hidden_share`.

        In each computation, of a loop its body, two half batches can hide half of the
        exchange behind what stands between dispatch and combine and half behind the rest,
        as far as the seconds of each go (moe_ep.model.staggered). Where a schedule puts
        more than that between its starts and dones, as it may with the gradients of
        weights, that can be hidden as well.
        """
        exchanges = [t for t in self.transfers if t.is_exchange]
        total = sum(t.seconds for t in exchanges)
        bodies = {t.body for t in exchanges}
        coverable = sum(self._coverable_s(body, [t for t in exchanges if t.body == body]) for body in bodies)
        return min(1.0, coverable / total) if total else 1.0

    def _coverable_s(self, body: str, exchanges: list[Transfer]) -> float:
        count, half = exchanges[0].count, sum(t.seconds for t in exchanges) / 2
        sides = [count * sum(work.seconds for work in self.work[body] if work.is_experts is side) for side in (True, False)]
        halves = sum(min(half, seconds) for seconds in sides)
        # The network carries one transfer at a time, between its start and its done: no more is hidden than this.
        scheduled = sum(min(t.seconds, t.count * sum(work.seconds for work in t.covered_by)) for t in exchanges)
        covering = count * sum(work.seconds for work in self.work[body] if work.covers)
        return max(halves, min(scheduled, covering))

    @property
    def network_s(self) -> float:
        return sum(transfer.seconds for transfer in self.transfers)

    def hidden_share(self, *, exchanges_only: bool = True) -> float:
        """Returns the share of the collectives' time that no compute waited for; 1 when there are none."""
        counted = [t for t in self.transfers if t.is_exchange or not exchanges_only]
        total = sum(t.seconds for t in counted)
        return max(0.0, 1.0 - sum(t.exposed_s for t in counted) / total) if total else 1.0


def walk(schedule: dict, estimates: Estimates) -> Timeline:
    """Returns the predicted timeline of a schedule (see moe_ep.aot.schedule)."""
    walker = _Walker(schedule["computations"], estimates)
    step_s = walker.walk(schedule["entry"], 0.0, 1)
    return Timeline(step_s, walker.compute_s, walker.transfers, walker.events, walker.work)


class _Walker:
    def __init__(self, computations: dict[str, list[dict]], estimates: Estimates):
        self.computations, self.estimates = computations, estimates
        self.transfers: list[Transfer] = []
        self.events: list[Event] = []
        self.work: dict[str, list[Work]] = {}
        self.compute_s = 0.0
        self.network_free_s = 0.0
        self.lane: list[tuple[Transfer, float, float]] = []  # what the network carries, from when to when

    def walk(self, name: str, now: float, times: int) -> float:
        """Walks a computation that runs `times` times in a step; returns when its first run ends."""
        flying: dict[str, tuple[Transfer, float]] = {}
        self.work[name] = []
        for entry in self.computations[name]:
            kind, done = entry["kind"], []
            if kind == "compute":
                now, done = self._compute(entry, name, now, times)
            elif kind == "collective_start":
                flying[entry["name"]] = self._start(entry, name, now, times)
            elif kind == "collective":
                transfer, end = self._start(entry, name, now, times)
                now = self._wait(end, now)
            elif kind == "collective_done":
                now = self._wait(flying.pop(entry["start"])[1], now)
            else:
                now, done = self._enter(entry, now, times)
            covers = any(transfer.is_exchange for transfer, _ in flying.values())
            self.work[name] += [work._replace(covers=covers) for work in done]
            for transfer, _ in flying.values():
                transfer.covered_by += done
        return now

    def _enter(self, entry: dict, now: float, times: int) -> tuple[float, list[Work]]:
        trips, body = entry.get("trip_count", 1), entry["body"]
        if trips == 0:
            return now, []
        transfers, events = len(self.transfers), len(self.events)
        end = self.walk(body, now, times)
        if trips > 1:
            # The first pass may find the network busy with what was sent before the loop; all others are like the second.
            del self.events[events:]
            first = self.transfers[transfers:]
            del self.transfers[transfers:]
            again = self.walk(body, end, times * (trips - 1))
            for transfer, before in zip(self.transfers[transfers:], first, strict=True):
                transfer.add(before)
            self.network_free_s += (trips - 2) * (again - end)
            end += (trips - 1) * (again - end)
        return end, [work._replace(seconds=trips * work.seconds) for work in self.work[body]]

    def _compute(self, entry: dict, body: str, now: float, times: int) -> tuple[float, list[Work]]:
        work = Work(entry["name"], entry["op"], entry["scope"], self.estimates.compute_s(entry))
        end = now + work.seconds
        self.compute_s += work.seconds * times
        self.events.append(Event("compute", work.name, work.op, work.scope, body, now, end))
        return end, [work]

    def _start(self, entry: dict, body: str, now: float, times: int) -> tuple[Transfer, float]:
        seconds = self.estimates.network_s(entry)
        begin = max(now, self.network_free_s)
        self.network_free_s = begin + seconds
        transfer = Transfer(
            name=entry["name"],
            op=entry["op"],
            scope=entry["scope"],
            body=body,
            backward=entry["backward"],
            count=times,
            asynchronous=entry["kind"] == "collective_start",
            sent_same_node_bytes=entry["sent_same_node_bytes"],
            sent_other_node_bytes=entry["sent_other_node_bytes"],
            groups=entry["groups"],
            group_size=entry["group_size"],
            seconds=seconds * times,
            exposed_s=0.0,
            covered_by=[],
        )
        self.transfers.append(transfer)
        self.lane.append((transfer, begin, begin + seconds))
        self.events.append(Event("network", entry["name"], entry["op"], entry["scope"], body, begin, begin + seconds))
        return transfer, begin + seconds

    def _wait(self, end: float, now: float) -> float:
        """Waits until the network has delivered; what it carries meanwhile is exposed."""
        for transfer, begins, ends in self.lane:
            transfer.exposed_s += max(0.0, min(ends, end) - max(begins, now)) * transfer.count
        now = max(now, end)
        self.lane = [carried for carried in self.lane if carried[2] > now]
        return now
