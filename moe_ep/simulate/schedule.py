"""The second engine: walks the schedule that the compiler made, with the same kernel and network models.

A schedule is JSON, format "moe_ep.schedule/1", as `--mode=aot` writes it:

    {"format": "moe_ep.schedule/1", "program": "prefill", "gpus": 128, "gpus_per_node": 8,
     "gpu": "paper_h100", "tokens_per_gpu": 2048, "entry": "main",
     "computations": {"main": [INSTRUCTION, ...], "body.1": [INSTRUCTION, ...]}}

A computation lists its instructions in scheduled order, the order in which they
are issued on the compute stream. An instruction is one of

    {"kind": "compute", "name", "op", "flops", "bytes", "dtype", "scope", "gemms", "attention"}
        op: gemm, grouped_gemm, attention or other; bytes read and written in memory;
        gemms: [[rows, columns, inner, batch], ...] where the products' shapes are known, and
        "product_dtype": fp8, bf16, tf32 or float32, at whose rate they run (absent: bf16);
        attention: {"flops", "context", "head_dim", "backward"} of a fused attention, or null; also
        "absorbed": [sequences, context, heads, cached values a token] where one token a sequence
        reads a cache of latents
    {"kind": "collective" | "collective_start", "name", "op", "bytes", "group_size", "group_stride", "scope"}
        op: all_to_all, ragged_all_to_all, all_gather, reduce_scatter, all_reduce, collective_permute;
        bytes: one GPU's operand, of an all_gather its output. A plain collective holds the
        compute stream until it has ended; a start enters the network stream.
    {"kind": "collective_done", "name", "start"}      the compute stream waits for that start
    {"kind": "loop", "name", "body", "trip_count"}, {"kind": "call", "name", "body"}

Numbers are one GPU's and one execution's; unknown ones are 0.
"""

import dataclasses
import json
import typing

from moe_ep.config import ConfigError
from moe_ep.cost.entries import collective_seconds, compute_seconds, is_experts
from moe_ep.cost.kernels import AssumedKernels, KernelTable
from moe_ep.cost.network import Fabric, NetworkParameters
from moe_ep.cost.units import Number

FORMAT = "moe_ep.schedule/1"


@dataclasses.dataclass
class Walk:
    """Clocks and totals in seconds; `exposed` is what compute waited for the network, by scope."""

    compute_free: Number = 0.0
    network_free: Number = 0.0
    compute: Number = 0.0
    network: dict[str, Number] = dataclasses.field(default_factory=dict)
    exposed: dict[str, Number] = dataclasses.field(default_factory=dict)
    ends: dict[str, tuple[Number, str]] = dataclasses.field(default_factory=dict)

    def scaled_onto(self, body: "Walk", times: int) -> None:
        """Adds `times` executions of a body that was walked once from a standstill."""
        start = max(self.compute_free, self.network_free) if body.network else self.compute_free
        self.compute_free = start + times * max(body.compute_free, body.network_free)
        self.network_free = max(self.network_free, self.compute_free if body.network else 0.0)
        self.compute += times * body.compute
        for mine, theirs in ((self.network, body.network), (self.exposed, body.exposed)):
            for scope, seconds in theirs.items():
                mine[scope] = mine.get(scope, 0.0) + times * seconds


def load(path: str) -> dict[str, typing.Any]:
    """Reads a schedule.

    Raises:
      ConfigError: the file is missing, or not of this format.
    """
    try:
        document = json.loads(open(path).read())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--set simulate.schedule={path}: allowed is a schedule of --mode=aot ({error})") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ConfigError(f"--set simulate.schedule={path}: allowed is a JSON object of format {FORMAT}")
    return document


def walk(
    schedule: dict[str, typing.Any],
    fabric: Fabric,
    kernels: KernelTable | AssumedKernels,
    parameters: NetworkParameters,
    expert_row_share: Number = 1.0,
) -> dict[str, typing.Any]:
    """Returns step, compute and network seconds, what is hidden of each scope's collectives, and the bottleneck.

    Args:
      expert_row_share: the share of the experts' rows that hold tokens, where their
        kernels skip the others; 1 times every row that the program allocates.
    """
    schedule = {**schedule, "expert_row_share": expert_row_share}
    result = _walk_computation(schedule, schedule["entry"], fabric, kernels, parameters)
    step = max(result.compute_free, result.network_free)
    total, exposed = sum(result.network.values()), sum(result.exposed.values())
    hidden = {
        scope: 1 - min(result.exposed.get(scope, 0.0) / seconds, 1.0)
        for scope, seconds in result.network.items()
        if seconds
    }
    return {
        "program": schedule.get("program", ""),
        "gpus": schedule["gpus"],
        "step_s": step,
        "compute_s": result.compute,
        "network_s": total,
        "exposed_s": exposed,
        "hidden_share": 1 - min(exposed / total, 1.0) if total else 1.0,
        "hidden_share_by_scope": hidden,
        "network_s_by_scope": result.network,
        "exposed_communication_share": exposed / step if step else 0.0,
        "bottleneck": "network" if exposed > result.compute else "compute",
        "tokens_per_s_per_gpu": schedule.get("tokens_per_gpu", 0) / step if step else 0.0,
    }


def flat(
    schedule: dict[str, typing.Any], name: str, times: int = 1
) -> typing.Iterator[tuple[dict[str, typing.Any], int]]:
    """Yields the instructions of a computation and of those that it runs, with how often each is executed."""
    for entry in schedule["computations"][name]:
        if entry["kind"] in ("loop", "call"):
            yield from flat(schedule, entry["body"], times * entry.get("trip_count", 1))
        else:
            yield entry, times


def _walk_computation(schedule, name: str, fabric: Fabric, kernels, parameters: NetworkParameters) -> Walk:
    state = Walk()
    for instruction in schedule["computations"][name]:
        kind = instruction["kind"]
        if kind in ("loop", "call"):
            body = _walk_computation(schedule, instruction["body"], fabric, kernels, parameters)
            state.scaled_onto(body, instruction.get("trip_count", 1))
        elif kind == "compute":
            seconds = compute_seconds(instruction, kernels, fabric.gpu, _row_share(schedule, instruction))
            state.compute_free += seconds
            state.compute += seconds
        elif kind == "collective_done":
            _wait(state, *state.ends[instruction["start"]])
        else:
            _collective(state, instruction, collective_seconds(instruction, fabric, parameters))
    return state


def _collective(state: Walk, instruction: dict, seconds: Number) -> None:
    scope = instruction.get("scope", "")
    begin = max(state.network_free, state.compute_free)
    state.network_free = begin + seconds
    state.network[scope] = state.network.get(scope, 0.0) + seconds
    state.ends[instruction["name"]] = (state.network_free, scope)
    if instruction["kind"] == "collective":
        _wait(state, state.network_free, scope)


def _wait(state: Walk, end: Number, scope: str) -> None:
    waited = max(end - state.compute_free, 0.0)
    state.exposed[scope] = state.exposed.get(scope, 0.0) + waited
    state.compute_free += waited


def _row_share(schedule: dict[str, typing.Any], instruction: dict) -> Number:
    return schedule["expert_row_share"] if is_experts(instruction) else 1.0
