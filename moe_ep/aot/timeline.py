"""Two lanes, compute and network, walked in the compiler's order with estimated times.

The compute lane runs instructions one after the other. A collective's start puts it
on the network lane, which carries one at a time; its done holds the compute lane
until the network has delivered. What compute waited is exposed, and it is the
transfer that the network carried meanwhile that is exposed: not the one waited for,
where that one queued behind another.
"""

import dataclasses
from collections.abc import Callable

# The stages whose traffic is the experts': what `hidden_share` is about.
EXCHANGE_SCOPES = ("dispatch", "combine", "exchange")
# The two halves of a MoE layer that an exchange can hide behind, by their scope.
SIDES = ("attention", "experts")


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

    @property
    def side(self) -> str:
        """Of a compute event: which half of a MoE layer it belongs to, or neither (norms, router, packing)."""
        names = self.scope.split("/")
        return next((side for side in SIDES if side in names), "")


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
    # (name, op, scope, seconds) of the compute between its start and its done, one execution.
    covered_by: list[tuple[str, str, str, float]]

    @property
    def sent_bytes(self) -> float:
        """Bytes that one GPU sends in one execution, on average."""
        return self.sent_same_node_bytes + self.sent_other_node_bytes

    @property
    def is_exchange(self) -> bool:
        return self.scope.split("/")[-1] in EXCHANGE_SCOPES

    @property
    def has_products_between(self) -> bool:
        """Whether matrix work is issued between the start and the done."""
        return any(op in ("gemm", "grouped_gemm", "attention") for _, op, _, _ in self.covered_by)


@dataclasses.dataclass(frozen=True)
class Timeline:
    """A step of the program as predicted; events of a loop are those of one pass through its body."""

    step_s: float
    compute_s: float
    transfers: list[Transfer]
    events: list[Event]

    def bound(self) -> float:
        """Returns the most of dispatch and combine that half a batch's attention or experts can stand over.

        In every loop body half of the exchange has attention to hide behind and half
        has the experts, as in moe_ep.model.staggered; what exceeds them is exposed in
        any order. Up to two exchanges outside a loop, the ends of the stack, count as hidden.
        """
        exchanges = [t for t in self.transfers if t.is_exchange]
        total = sum(t.seconds for t in exchanges)
        bodies = [t.body for t in exchanges]
        exposed = sum(self._uncoverable_s(t.body) for t in {t.body: t for t in exchanges}.values()
                      if t.count > 1 or bodies.count(t.body) > 2)  # fmt: skip
        return 1.0 - exposed / total if total else 1.0

    def _uncoverable_s(self, body: str) -> float:
        exchanges = [t for t in self.transfers if t.is_exchange and t.body == body]
        half = sum(t.seconds for t in exchanges) / 2
        work = [(e.side, e.end_s - e.start_s) for e in self.events if e.lane == "compute" and e.body == body]
        covers = [exchanges[0].count * sum(seconds for side, seconds in work if side == wanted) for wanted in SIDES]
        return sum(max(0.0, half - cover) for cover in covers)

    @property
    def network_s(self) -> float:
        return sum(transfer.seconds for transfer in self.transfers)

    def hidden_share(self, *, exchanges_only: bool = True) -> float:
        """Returns the share of the collectives' time that no compute waited for; 1 when there are none."""
        counted = [t for t in self.transfers if t.is_exchange or not exchanges_only]
        total = sum(t.seconds for t in counted)
        return 1.0 - sum(t.exposed_s for t in counted) / total if total else 1.0


def walk(schedule: dict, estimates: Estimates) -> Timeline:
    """Returns the predicted timeline of a schedule (see moe_ep.aot.schedule)."""
    walker = _Walker(schedule["computations"], estimates)
    step_s = walker.walk(schedule["entry"], 0.0, 1)
    return Timeline(step_s, walker.compute_s, walker.transfers, walker.events)


class _Walker:
    def __init__(self, computations: dict[str, list[dict]], estimates: Estimates):
        self.computations, self.estimates = computations, estimates
        self.transfers: list[Transfer] = []
        self.events: list[Event] = []
        self.compute_s = 0.0
        self.network_free_s = 0.0
        self.lane: list[tuple[Transfer, float, float]] = []  # what the network carries, from when to when

    def walk(self, name: str, now: float, times: int) -> float:
        """Walks a computation that runs `times` times in a step; returns when its first run ends."""
        flying: dict[str, tuple[Transfer, float]] = {}
        for entry in self.computations[name]:
            kind = entry["kind"]
            if kind == "compute":
                now = self._compute(entry, name, now, times, [transfer for transfer, _ in flying.values()])
            elif kind == "collective_start":
                flying[entry["name"]] = self._start(entry, name, now, times)
            elif kind == "collective":
                transfer, end = self._start(entry, name, now, times)
                now = self._wait(end, now)
            elif kind == "collective_done":
                now = self._wait(flying.pop(entry["start"])[1], now)
            else:
                now = self._enter(entry, now, times)
        return now

    def _enter(self, entry: dict, now: float, times: int) -> float:
        trips = entry.get("trip_count", 1)
        if trips == 0:
            return now
        end = self.walk(entry["body"], now, times * trips)
        self.network_free_s += (trips - 1) * (end - now)
        return now + trips * (end - now)

    def _compute(self, entry: dict, body: str, now: float, times: int, flying: list[Transfer]) -> float:
        seconds = self.estimates.compute_s(entry)
        self.compute_s += seconds * times
        for transfer in flying:
            transfer.covered_by.append((entry["name"], entry["op"], entry["scope"], seconds))
        self.events.append(Event("compute", entry["name"], entry["op"], entry["scope"], body, now, now + seconds))
        return now + seconds

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
