"""The compiler's schedule as plain data: what is issued, in which order, with which FLOPs and bytes.

The dictionary (format "moe_ep.schedule/1") is also what the simulator reads. A
computation is the list of its instructions in issue order; numbers are per GPU and
per single execution, loops carry their trip count; one that runs as often as the data says is
marked and counted once.
"""

import dataclasses
import math

from moe_ep.aot.collectives import Collective, is_backward, read_collective, scope_of
from moe_ep.aot.hlo import Computation, Instruction, Module, is_done, is_start, trip_count
from moe_ep.aot.work import FREE_OPCODES, PRODUCT_DTYPES, Work, work_of
from moe_ep.config import ClusterConfig

FORMAT = "moe_ep.schedule/1"


def read_schedule(
    module: Module, cluster: ClusterConfig, *, gpus: int, program: str, tokens_per_gpu: int, expert_rows: float = math.inf
) -> dict:
    """Returns the schedule of a compiled module.

    Args:
      module: the parsed module.
      cluster: where it runs; nodes decide which bytes cross them.
      gpus: of the program.
      program: its name, reported only.
      tokens_per_gpu: reported only.
      expert_rows: rows with tokens in one exchange and one call of the experts' kernels
        under even routing: ragged transports send no others, kernels skip their tiles.
    """
    reader = _Reader(module, cluster, gpus, expert_rows)
    reader.read(module.entry)
    return {
        "format": FORMAT,
        "program": program,
        "gpus": gpus,
        "gpus_per_node": cluster.gpus_per_node,
        "gpu": cluster.gpu,
        "tokens_per_gpu": tokens_per_gpu,
        "entry": module.entry.name,
        "computations": reader.computations,
    }


def data_dependent_loops(schedule: dict) -> int:
    """Returns how many loops of a schedule run as often as the data says, and are counted once in it."""
    entries = (entry for computation in schedule["computations"].values() for entry in computation)
    return sum(entry.get("data_dependent", False) for entry in entries)


class _Reader:
    """Collects the computations that the entry reaches."""

    def __init__(self, module: Module, cluster: ClusterConfig, gpus: int, expert_rows: float):
        self.module, self.cluster, self.gpus = module, cluster, gpus
        self.expert_rows = expert_rows
        self.computations: dict[str, list[dict]] = {}

    def read(self, computation: Computation) -> str:
        if computation.name not in self.computations:
            self.computations[computation.name] = []
            entries = (self._entry(computation, instruction) for instruction in computation.instructions)
            self.computations[computation.name] = [entry for entry in entries if entry is not None]
        return computation.name

    def _entry(self, computation: Computation, instruction: Instruction) -> dict | None:
        if instruction.opcode == "while":
            body = self.read(self.module.callee(instruction, "body"))
            trips = trip_count(self.module, instruction)
            entry = {"kind": "loop", "name": instruction.name, "body": body, "trip_count": trips}
            return entry if trips is not None else {**entry, "trip_count": 1, "data_dependent": True}
        if instruction.opcode == "call":
            body = self.read(self.module.callee(instruction, "to_apply"))
            return {"kind": "call", "name": instruction.name, "body": body}
        if is_done(instruction):
            return self._done(computation, instruction)
        collective = self._collective(computation, instruction)
        if collective is None:
            return self._compute(computation, instruction)
        asynchronous = is_start(instruction) and not _is_synchronous(instruction)
        return {
            "kind": "collective_start" if asynchronous else "collective",
            "name": collective.name,
            "op": collective.op,
            "bytes": collective.payload_bytes,
            "group_size": collective.group_size,
            "group_stride": collective.group_stride,
            "scope": collective.scope,
            "backward": collective.is_backward,
            "groups": collective.groups,
            "sent_same_node_bytes": collective.sent_same_node_bytes,
            "sent_other_node_bytes": collective.sent_other_node_bytes,
        }

    def _collective(self, computation: Computation, instruction: Instruction) -> Collective | None:
        return read_collective(
            self.module,
            computation,
            instruction,
            gpus=self.gpus,
            gpus_per_node=self.cluster.gpus_per_node,
            exchange_rows=self.expert_rows,
        )

    def _done(self, computation: Computation, instruction: Instruction) -> dict | None:
        start = computation.by_name[instruction.operands[0]]
        if self._collective(computation, start) is None or _is_synchronous(start):
            return None
        return {"kind": "collective_done", "name": instruction.name, "start": start.name}

    def _compute(self, computation: Computation, instruction: Instruction) -> dict | None:
        if instruction.opcode in FREE_OPCODES:
            return None
        work = work_of(self.module, computation, instruction, self.expert_rows)
        op = _operation(instruction, work)
        op_name = self._op_name(instruction)
        return {
            "kind": "compute",
            "name": instruction.name,
            "op": op,
            "flops": work.flops,
            "bytes": work.memory_bytes,
            "gemms": [[gemm.rows, gemm.columns, gemm.inner, gemm.batch] for gemm in work.gemms],
            "product_dtype": next((dtype for dtype in PRODUCT_DTYPES if any(g.dtype == dtype for g in work.gemms)), ""),
            "attention": dataclasses.asdict(work.attention) if work.attention else None,
            "dtype": next((shape.element for shape in instruction.shapes if shape.element != "s8"), ""),
            "scope": scope_of(op_name),
            "backward": is_backward(op_name),
        }

    def _op_name(self, instruction: Instruction) -> str:
        """A fusion may have no name of its own, or that of a slice: then the name in it with the longest scope."""
        inner = self.module.callee(instruction)
        if inner is None or scope_of(instruction.op_name):
            return instruction.op_name
        names = (self._op_name(nested) for nested in inner.instructions)
        return max(names, key=lambda name: len(scope_of(name)), default="")


def _operation(instruction: Instruction, work: Work) -> str:
    if work.attention:
        return "attention"
    if work.gemms and "mosaic" in instruction.target:
        return "grouped_gemm"
    return "gemm" if work.gemms else "other"


def _is_synchronous(instruction: Instruction) -> bool:
    return bool(instruction.backend_config.get("collective_backend_config", {}).get("is_sync", False))
