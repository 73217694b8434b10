"""What each GPU holds: the compiler's own totals, and which part of the model the bytes belong to."""

import dataclasses

import jax

from moe_ep.aot.collectives import scope_of
from moe_ep.aot.hlo import Computation, Instruction, Module
from moe_ep.aot.timeline import EXCHANGE_SCOPES
from moe_ep.programs import shard_bytes

# First match wins; names are those of the programs' arguments.
_PARTS = (
    ("optimizer", "optimizer"),
    ("cache", "kv_cache"),
    ("router", "router"),
    ("shared", "shared_experts"),
    ("experts", "experts"),
    ("attention", "attention"),
    ("embedding", "embedding"),
    ("head", "embedding"),
    ("mlp", "dense"),
)
PARTS = tuple(dict.fromkeys(part for _, part in _PARTS)) + ("other_arguments", "dispatch_buffers", "other_temporaries")
# Their result is (a part of) their operand, so they hold no memory of their own.
_ALIASES = frozenset({"bitcast", "tuple", "get-tuple-element", "opt-barrier", "while", "dynamic-update-slice"})


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """Bytes per GPU of one compiled program."""

    arguments: int
    outputs: int  # those that do not lie in an argument's memory
    temporaries: int
    by_part: dict[str, int]
    capacity: int

    @property
    def total(self) -> int:
        return self.arguments + self.outputs + self.temporaries

    @property
    def missing(self) -> int:
        """Bytes over the GPU's memory; 0 when the program fits."""
        return max(0, self.total - self.capacity)

    @property
    def fits(self) -> bool:
        return self.missing == 0


def read_memory(compiled: jax.stages.Compiled, module: Module, arguments: object, capacity: float) -> MemoryReport:
    """Returns the memory of a compiled program.

    Args:
      compiled: the program.
      module: its parsed text.
      arguments: the tree of ShapeDtypeStructs, with shardings, that it was lowered with.
      capacity: bytes of one GPU.
    """
    analysis = compiled.memory_analysis()
    temporaries = analysis.temp_size_in_bytes
    parts = dict.fromkeys(PARTS, 0)
    parts.update(arguments_by_part(arguments))
    parts["dispatch_buffers"] = min(int(peak_exchange_bytes(module)), temporaries)
    parts["other_temporaries"] = temporaries - parts["dispatch_buffers"]
    outputs = max(0, analysis.output_size_in_bytes - analysis.alias_size_in_bytes)
    return MemoryReport(
        analysis.argument_size_in_bytes, outputs, temporaries, {k: v for k, v in parts.items() if v}, int(capacity)
    )


def arguments_by_part(arguments: object) -> dict[str, int]:
    """Returns bytes per GPU of each part of the model in a tree of arguments."""
    parts: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(arguments):
        part = part_of(jax.tree_util.keystr(path))
        parts[part] = parts.get(part, 0) + shard_bytes(leaf)
    return parts


def part_of(path: str) -> str:
    """Returns the part that an argument's path belongs to."""
    return next((part for name, part in _PARTS if name in path), "other_arguments")


def peak_exchange_bytes(module: Module) -> float:
    """Returns the most bytes that buffers of the exchange (dispatch and combine) hold at once, by liveness."""
    return max((_peak_exchange_of(computation) for computation in _scheduled(module)), default=0.0)


def _scheduled(module: Module) -> list[Computation]:
    bodies = [module.callee(i, "body") for c in module.computations.values() for i in c.instructions
              if i.opcode == "while"]  # fmt: skip
    return [module.entry, *bodies]


def _peak_exchange_of(computation: Computation) -> float:
    last_use = _last_uses(computation)
    live: dict[str, tuple[int, float]] = {}
    peak = 0.0
    for position, instruction in enumerate(computation.instructions):
        named = scope_of(instruction.op_name).split("/")[-1] in EXCHANGE_SCOPES
        is_exchange = named or instruction.opcode.startswith("ragged-all-to-all")
        if is_exchange and instruction.opcode not in _ALIASES and not instruction.opcode.endswith("-done"):
            live[instruction.name] = (last_use.get(instruction.name, position), _own_bytes(computation, instruction))
        peak = max(peak, sum(size for end, size in live.values() if end >= position))
        live = {name: (end, size) for name, (end, size) in live.items() if end > position}
    return peak


def _own_bytes(computation: Computation, instruction: Instruction) -> float:
    """An asynchronous start's result also holds its operands, which are not its own."""
    if not instruction.opcode.endswith("-start"):
        return instruction.bytes
    borrowed = sum(computation.by_name[name].bytes for name in instruction.operands)
    return max(0.0, instruction.bytes - borrowed)


def _last_uses(computation: Computation) -> dict[str, int]:
    """The position at which each value is last read, through tuples, bitcasts and asynchronous pairs."""
    last: dict[str, int] = {}
    for position in range(len(computation.instructions) - 1, -1, -1):
        instruction = computation.instructions[position]
        forwards = instruction.opcode in _ALIASES or instruction.opcode.endswith(("-start", "-done"))
        use = max(position, last.get(instruction.name, position)) if forwards else position
        for operand in instruction.operands:
            last[operand] = max(last.get(operand, 0), use)
    return last
