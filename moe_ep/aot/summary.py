"""The facts of a compiled program under DESIGN's keys, and those of programs already compiled, kept on file."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable

from moe_ep.aot.compile import Compiled, compile_program, gpus_of, overlap_of, peers_of
from moe_ep.aot.schedule import data_dependent_loops
from moe_ep.aot.timeline import Timeline, Transfer
from moe_ep.config import Config, ConfigError
from moe_ep.dispatch.exchange import transport_of
from moe_ep.progress import Finished
from moe_ep.results import provenance

Summarize = Callable[[Config], dict]

OVER_MEMORY = (
    "over its memory XLA computes again what it cannot keep and makes collectives synchronous: "
    "this schedule is not that of a program that fits"
)


def summarize(config: Config, compiled: Compiled) -> dict:
    """Returns what the compiler made of a program, in bytes, seconds and shares.

    Overlap and times of a program over the GPU's memory are None: its schedule is not one
    that could run. What it says stands under `over_memory`.
    """
    memory = compiled.memory
    schedule = _schedule(compiled.timeline)
    return {
        "gpus": compiled.gpus,
        "program": config.aot.program,
        "cluster": dataclasses.asdict(config.cluster),
        "dispatch": dispatch_name(config),
        "overlap": overlap_of(config),
        "transport": transport_of(config.dispatch, peers_of(config)),
        "chunks": config.dispatch.chunks,
        "tokens_per_gpu": config.aot.tokens_per_gpu,
        "context": config.aot.context,
        "compile_s": round(compiled.compile_s, 2),
        "compile_cpu_s": round(compiled.compile_cpu_s, 2),
        "fits": memory.fits,
        "missing_bytes": memory.missing,
        "capacity_bytes": memory.capacity,
        "bytes_per_gpu": {
            "arguments": memory.arguments,
            "outputs": memory.outputs,
            "temporaries": memory.temporaries,
            "total": memory.total,
            "by_part": memory.by_part,
        },
        "loops_counted_once": data_dependent_loops(compiled.schedule),
        "collectives": [_collective(transfer) for transfer in compiled.timeline.transfers],
        "synchronous_exchanges": sum(transfer.count for transfer in compiled.timeline.transfers
                                     if transfer.is_exchange and not transfer.asynchronous),
        "bytes_sent_per_gpu": _sent(compiled.timeline, exchanges_only=False),
        "exchange_bytes_sent_per_gpu": _sent(compiled.timeline, exchanges_only=True),
        **(schedule if memory.fits else dict.fromkeys(schedule)),
        **({} if memory.fits else {"over_memory": {"note": OVER_MEMORY, **schedule}}),
    }


def _schedule(timeline: Timeline) -> dict:
    return {
        "hidden_share": timeline.hidden_share(),
        "hidden_share_bound": timeline.bound(),
        "hidden_share_all_collectives": timeline.hidden_share(exchanges_only=False),
        "exchange_s": sum(transfer.seconds for transfer in timeline.transfers if transfer.is_exchange),
        "predicted_step_s": timeline.step_s,
    }


def _sent(timeline: Timeline, *, exchanges_only: bool) -> dict[str, float]:
    """Bytes that one GPU sends in a step, by the class of link."""
    counted = [transfer for transfer in timeline.transfers if transfer.is_exchange or not exchanges_only]
    return {
        "same_node": sum(transfer.sent_same_node_bytes * transfer.count for transfer in counted),
        "other_node": sum(transfer.sent_other_node_bytes * transfer.count for transfer in counted),
    }


def _collective(transfer: Transfer) -> dict:
    return {
        "op": transfer.op,
        "scope": transfer.scope + (" (backward)" if transfer.backward else ""),
        "count": transfer.count,
        "bytes_per_gpu": transfer.sent_bytes,
        "bytes_same_node": transfer.sent_same_node_bytes,
        "bytes_other_node": transfer.sent_other_node_bytes,
        "groups": transfer.groups,
        "group_size": transfer.group_size,
        "asynchronous": transfer.asynchronous,
        "predicted_s": transfer.seconds,
        "exposed_s": transfer.exposed_s,
        "products_between": transfer.has_products_between,
    }


def open_kept(workdir: pathlib.Path) -> Finished:
    """Returns the programs that a work directory holds, in rows.jsonl.

    Raises:
      ConfigError: it cannot be written, or its rows.jsonl is something else.
    """
    try:
        return Finished(workdir / "rows.jsonl")
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"--workdir={workdir}: allowed is a directory that can be written, whose rows.jsonl is its own ({error})"
        ) from None


def summarize_kept(finished: Finished, say: Callable[[str], None]) -> Summarize:
    """Returns a function from a config to its summary, which compiles only what `finished` does not hold.

    What was compiled at another commit, or by another jax, is compiled again.
    """
    made_by = provenance("")
    made_by = (made_by["commit"], made_by["versions"])

    def summary_of(config: Config) -> dict:
        key = hashlib.sha256(json.dumps([made_by, dataclasses.asdict(config)]).encode()).hexdigest()[:24]
        if (rows := finished.get(key)) is None:
            say(f"compiles {describe(config)}")
            rows = [summarize(config, compile_program(config))]
            finished.add(key, rows)
        return rows[0]

    return summary_of


def describe(config: Config) -> str:
    """Returns a program in a few words: what, how much, on how many GPUs, by which transport and overlap."""
    return f"{config.aot.program}, {size_text(config)}, {gpus_of(config)} x {config.cluster.gpu}, {dispatch_name(config)}"


def size_text(config: Config) -> str:
    """Returns what each GPU computes; in decode a token each of sequences that have `context` in the cache."""
    sequences = config.aot.tokens_per_gpu // config.aot.context
    return f"{sequences} sequence{'s' * (sequences > 1)} of {config.aot.context} tokens per GPU"


def dispatch_name(config: Config) -> str:
    """Returns how rows travel: the transport, and what its exchanges are made to overlap with, "auto" resolved."""
    dispatch = config.dispatch
    chunks = f"{dispatch.chunks} chunks" if dispatch.chunks > 1 else "no overlap"
    overlaps = {"none": "no overlap", "chunks": chunks, "staggered": "staggered"}
    return f"{transport_of(dispatch, peers_of(config))}, {overlaps[overlap_of(config)]}"
