"""Collectives of a compiled module: who talks to whom, how many bytes, over which links."""

import dataclasses
import math
import re

import numpy as np

from moe_ep.aot.hlo import Computation, Instruction, Module, plain_opcode
from moe_ep.aot.timeline import EXCHANGE_SCOPES

OPCODES = {
    "all-to-all": "all_to_all",
    "ragged-all-to-all": "ragged_all_to_all",
    "all-gather": "all_gather",
    "reduce-scatter": "reduce_scatter",
    "all-reduce": "all_reduce",
    "collective-permute": "collective_permute",
    "collective-broadcast": "collective_broadcast",
}
_EXCHANGES = ("all_to_all", "ragged_all_to_all")
# Names in an op_name path that the program's own scopes do not make.
_WRAPPERS = re.compile(
    r"^(while|body|cond|scan|shard_map|eval_jaxpr|closed_call|checkpoint|rematted_computation|core_call|branch_\d+_fun)$"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction, per execution.

    payload_bytes is one GPU's buffer: what it contributes, of an all-gather what it
    receives. Bytes sent are what leaves one GPU, on average over the group.
    """

    name: str
    op: str
    scope: str
    is_backward: bool
    payload_bytes: float
    group_size: int
    group_stride: int
    groups: int
    nodes_of_group: int
    sent_same_node_bytes: float
    sent_other_node_bytes: float

    @property
    def sent_bytes(self) -> float:
        return self.sent_same_node_bytes + self.sent_other_node_bytes


def read_collective(
    module: Module,
    computation: Computation,
    instruction: Instruction,
    *,
    gpus: int,
    gpus_per_node: int,
    exchange_rows: float = math.inf,
) -> Collective | None:
    """Returns what a collective (or its start) does; None for any other instruction.

    Args:
      module: the instruction's module.
      computation: the instruction's computation.
      instruction: any instruction.
      gpus: of the whole program; GPU i stands in node i // gpus_per_node.
      gpus_per_node: the size of a node.
      exchange_rows: that one GPU has for a ragged all-to-all, under even routing.
    """
    op = OPCODES.get(plain_opcode(module, instruction))
    if op is None or instruction.opcode.endswith("-done"):
        return None
    inner = module.callee(instruction)
    named = inner.root if inner is not None and instruction.opcode == "async-start" else instruction
    members = replica_groups(named.attributes, gpus)
    if op == "collective_permute":
        return _permute(instruction, named, computation, gpus_per_node)
    payload = _payload_bytes(computation, instruction, op, exchange_rows)
    size = members.shape[1]
    nodes = len(set((members[0] // gpus_per_node).tolist()))
    sent = _sent_bytes(op, payload, size)
    other = sent * _other_node_share(op, members[0], gpus_per_node)
    return Collective(
        instruction.name, op, _scope(instruction.op_name or named.op_name, op), is_backward(instruction.op_name), payload,
        size, int(members[0][1] - members[0][0]) if size > 1 else 1, members.shape[0], nodes, sent - other, other,
    )  # fmt: skip


def _payload_bytes(computation: Computation, instruction: Instruction, op: str, exchange_rows: float) -> float:
    operands = [computation.by_name[name] for name in instruction.operands]
    if op == "all_gather":
        given = sum(operand.bytes for operand in operands)
        # A start's result holds its operands as well as what it gathers.
        return instruction.bytes - (given if instruction.opcode.endswith("-start") else 0.0)
    if op == "ragged_all_to_all":  # rows, the result's buffer, then offsets and sizes
        # One of the two is the exact rows of this device's tokens, the other a buffer with room for more; of
        # the rows each wave takes its part.
        rows = min(operands[0].shapes[0].dimensions[0], operands[1].shapes[0].dimensions[0])
        return min(operands[0].bytes, operands[1].bytes) * min(1.0, exchange_rows / rows)
    return sum(operand.bytes for operand in operands)


def _sent_bytes(op: str, payload: float, size: int) -> float:
    share = (size - 1) / size
    return payload * share * (2 if op == "all_reduce" else 1)


def _other_node_share(op: str, members: np.ndarray, gpus_per_node: int) -> float:
    """Share of the sent bytes that leaves the node: by peers for exchanges, by crossings of the ring for the rest."""
    nodes, counts = np.unique(members // gpus_per_node, return_counts=True)
    size = len(members)
    if len(nodes) == 1:
        return 0.0
    if op in _EXCHANGES:
        same = float(np.sum(counts * (counts - 1))) / (size * (size - 1))
        return 1.0 - same
    return len(nodes) / size


def _permute(
    instruction: Instruction, named: Instruction, computation: Computation, gpus_per_node: int
) -> Collective:
    found = re.search(r"source_target_pairs=\{(.*?)\}\}", named.attributes)
    pairs = np.array(re.findall(r"\{(\d+),(\d+)\}", found.group(1) + "}"), int)
    payload = sum(computation.by_name[name].bytes for name in instruction.operands)
    crossing = float(np.mean(pairs[:, 0] // gpus_per_node != pairs[:, 1] // gpus_per_node))
    return Collective(
        instruction.name, "collective_permute", scope_of(instruction.op_name), is_backward(instruction.op_name), payload,
        2, int(abs(pairs[0, 1] - pairs[0, 0])), len(pairs), 1 + int(crossing > 0),
        payload * (1 - crossing), payload * crossing,
    )  # fmt: skip


def replica_groups(attributes: str, gpus: int) -> np.ndarray:
    """Returns the groups as [groups, members], from any of the three ways in which HLO prints them.

    Raises:
      ValueError: a fourth way.
    """
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\]\s*\{(.*?)\}", attributes):
        return _mesh_groups(mesh.group(1), mesh.group(2))
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, dimensions, order = (
            tuple(int(n) for n in part.split(",")) if part else None for part in iota.groups()
        )
        devices = np.arange(np.prod(dimensions)).reshape(dimensions)
        return devices.transpose(order or range(len(dimensions))).reshape(shape)
    if braces := re.search(r"replica_groups=\{(\{[\d,{} ]*\})?\}", attributes):
        groups = re.findall(r"\{([\d, ]+)\}", braces.group(1) or "")
        return np.array([[int(n) for n in group.split(",")] for group in groups]) if groups else np.arange(gpus)[None]
    found = re.search(r"replica_groups=.{0,60}", attributes)
    raise ValueError(f"replica groups are not understood: {found.group() if found else 'none given'}")


def _mesh_groups(axes: str, over: str) -> np.ndarray:
    names, sizes = zip(*re.findall(r"'(\w+)'=(\d+)", axes), strict=True)
    sizes = tuple(int(size) for size in sizes)
    chosen = [names.index(name) for name in re.findall(r"'(\w+)'", over)]
    rest = [axis for axis in range(len(names)) if axis not in chosen]
    devices = np.arange(np.prod(sizes)).reshape(sizes)
    members = int(np.prod([sizes[axis] for axis in chosen]))
    return devices.transpose(rest + chosen).reshape(-1, members)


def scope_of(op_name: str) -> str:
    """Returns the program's own named scopes in an op_name path: `moe/dispatch` of jit(f)/while/body/moe/dispatch/all_to_all.

    Of collectives that XLA combined the scope is the exchange's, if one is among them, else the first one's.
    """
    scopes = [_scopes_of_path(path) for path in _paths(op_name)]
    return next((scope for scope in scopes if scope.split("/")[-1] in EXCHANGE_SCOPES), scopes[0])


def _paths(op_name: str) -> list[str]:
    """Returns the path of each instruction that was combined: a:b, or in_common/(a:b)."""
    common, parted, rest = op_name.partition("/(")
    if parted and rest.endswith(")"):
        return [f"{common}/{path}" for path in rest[:-1].split(":")]
    return op_name.split(":")


def _scopes_of_path(path: str) -> str:
    scopes = []
    for part in path.split("/")[:-1]:
        while found := re.fullmatch(r"(?:transpose|jvp|vmap|remat|checkpoint)\((.*)\)", part):
            part = found.group(1)
        # An einsum's own formula is a name in the path as well.
        if part and "(" not in part and "->" not in part and not _WRAPPERS.match(part):
            scopes.append(part)
    return "/".join(scopes)


def _scope(op_name: str, op: str) -> str:
    """XLA's rewriting of ragged all-to-alls loses their names; only the experts' exchange issues them."""
    return scope_of(op_name) or ("exchange" if op == "ragged_all_to_all" else "")


def is_backward(op_name: str) -> bool:
    """Whether the instruction was made by differentiation's backward pass."""
    return "transpose(" in op_name
