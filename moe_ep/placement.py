"""Which expert, and which replica of it, lives on which device. numpy only."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """The homes of one layer's experts.

    Attributes:
      slots: int [devices, slots per device], the expert that each slot of each device
        holds. An expert in several slots is replicated; its rows are shared equally.
    """

    num_experts: int
    slots: np.ndarray

    def __post_init__(self) -> None:
        held = np.unique(self.slots)
        if self.slots.ndim != 2 or held.min(initial=0) < 0 or held.max(initial=-1) >= self.num_experts:
            raise ValueError(f"slots hold experts {held.min()}..{held.max()}, the layer has {self.num_experts}")
        if len(held) != self.num_experts:
            missing = np.setdiff1d(np.arange(self.num_experts), held)
            raise ValueError(f"{len(missing)} experts have no device: {missing[:8].tolist()}")

    @property
    def devices(self) -> int:
        return self.slots.shape[0]

    @property
    def replicas(self) -> np.ndarray:
        """How many slots hold each expert, int [experts]."""
        return np.bincount(self.slots.reshape(-1), minlength=self.num_experts)

    def device_share(self) -> np.ndarray:
        """Returns the share of each expert's rows that each device takes, [experts, devices]; rows sum to 1."""
        share = np.zeros((self.num_experts, self.devices))
        device = np.repeat(np.arange(self.devices), self.slots.shape[1])
        np.add.at(share, (self.slots.reshape(-1), device), 1.0)
        return share / share.sum(axis=1, keepdims=True)

    def device_load(self, expert_load: np.ndarray) -> np.ndarray:
        """Returns the load of each device given each expert's, [devices]."""
        return (expert_load[self.slots] / self.replicas[self.slots]).sum(axis=1)


def contiguous(num_experts: int, devices: int, slots_per_device: int | None = None) -> Placement:
    """Returns the placement of the program that runs: expert x on device x // (experts / devices).

    Slots beyond one for each expert begin again with expert 0, whatever the load.

    Raises:
      ValueError: the devices do not divide the experts and no slots are given, or too few slots.
    """
    if slots_per_device is None and num_experts % devices:
        raise ValueError(f"{num_experts} experts cannot be spread evenly over {devices} devices")
    slots = slots_per_device or num_experts // devices
    return Placement(num_experts, (np.arange(devices * slots) % num_experts).reshape(devices, slots))


def balanced(expert_load: np.ndarray, devices: int, slots_per_device: int) -> Placement:
    """Returns a placement with replicas that evens out a load seen in the past.

    Spare slots go, one at a time, to the expert with the most load per replica; then
    replicas, heaviest first, go to the least loaded device with a free slot that does
    not hold the expert yet (the greedy of load balancers such as DeepSeek's EPLB).

    Raises:
      ValueError: fewer slots than experts.
    """
    experts, slots = len(expert_load), devices * slots_per_device
    if slots < experts:
        raise ValueError(f"{devices} devices x {slots_per_device} slots = {slots} cannot hold {experts} experts")
    replicas = np.ones(experts, dtype=int)
    for _ in range(slots - experts):
        per_replica = np.where(replicas < devices, expert_load / replicas, -1.0)
        replicas[int(np.argmax(per_replica))] += 1
    load = np.repeat(expert_load / replicas, replicas)
    return Placement(experts, _pack(np.repeat(np.arange(experts), replicas), load, devices, slots_per_device))


def _pack(items: np.ndarray, load: np.ndarray, devices: int, slots_per_device: int) -> np.ndarray:
    """Greedy: the heaviest item first, onto the least loaded device with a free slot and, if any, without it."""
    held: list[list[int]] = [[] for _ in range(devices)]
    device_load = np.zeros(devices)
    for index in np.argsort(-load, kind="stable"):
        free = [device for device in range(devices) if len(held[device]) < slots_per_device]
        fresh = [device for device in free if items[index] not in held[device]] or free
        device = min(fresh, key=lambda candidate: (device_load[candidate], candidate))
        held[device].append(int(items[index]))
        device_load[device] += load[index]
    return np.array(held)


def co_activated(together: np.ndarray, devices: int, devices_per_node: int) -> Placement:
    """Returns a placement that puts experts often chosen together on one node, without replicas.

    A node is filled greedily: the free expert with the most links starts it, then the
    one most often chosen together with those already there joins.

    Args:
      together: [experts, experts], how often two experts are chosen by the same token.
    """
    experts = len(together)
    if experts % devices or (devices > devices_per_node and devices % devices_per_node):
        raise ValueError(f"{experts} experts do not spread evenly over {devices} devices, {devices_per_node} a node")
    nodes = max(devices // devices_per_node, 1)
    affinity = np.array(together, dtype=float)
    np.fill_diagonal(affinity, 0.0)
    free = np.ones(experts, dtype=bool)
    order: list[int] = []
    for _ in range(nodes):
        members: list[int] = []
        for _ in range(experts // nodes):
            pull = affinity[:, members].sum(axis=1) if members else affinity.sum(axis=1)
            members.append(int(np.argmax(np.where(free, pull, -np.inf))))
            free[members[-1]] = False
        order += members
    return Placement(experts, np.array(order).reshape(devices, experts // devices))


def renumbered(placement: Placement, device_of: np.ndarray) -> Placement:
    """Returns the placement with devices renamed: old device d becomes device_of[d]."""
    slots = np.empty_like(placement.slots)
    slots[device_of] = placement.slots
    return Placement(placement.num_experts, slots)
