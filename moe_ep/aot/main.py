"""`--mode=aot`: compile a real program for the cluster that is not here, and say what the compiler made of it."""

import dataclasses
import json
import pathlib

from moe_ep.aot.compare import compare
from moe_ep.aot.compile import Compiled, compile_program, overlap_of
from moe_ep.aot.draw import draw_layer, write_trace
from moe_ep.aot.report import aot_table, comparison_table, coverage_table, limits_line
from moe_ep.aot.search import search_limits
from moe_ep.aot.timeline import Transfer
from moe_ep.config import Config


def aot(config: Config, workdir: pathlib.Path | None = None) -> dict:
    """Compiles, prints the reports, writes trace, picture and schedule into `workdir`, and returns the result.

    Raises:
      ConfigError: a wrong layout, or jax without its CUDA plugin.
    """
    compiled = compile_program(config)
    result = summarize(config, compiled)
    print(aot_table(config, result))
    print(coverage_table(compiled.timeline))
    if workdir is not None:
        result["files"] = write_files(config, compiled, workdir)
        print("\n".join(f"{kind}: {path}" for kind, path in result["files"].items()))
    if config.aot.compare:
        result["comparison"] = compare(config)
        print(comparison_table(result["comparison"]))
    if config.aot.search:
        result["limits"] = search_limits(config, lambda sized: compile_program(sized).memory)
        print(limits_line(result["limits"]))
    return result


def summarize(config: Config, compiled: Compiled) -> dict:
    """Returns the facts of a compiled program under DESIGN's keys, in bytes, seconds and shares."""
    memory, timeline = compiled.memory, compiled.timeline
    return {
        "gpus": compiled.gpus,
        "program": config.aot.program,
        "cluster": dataclasses.asdict(config.cluster),
        "overlap": overlap_of(config),
        "transport": config.dispatch.transport,
        "tokens_per_gpu": config.aot.tokens_per_gpu,
        "context": config.aot.context,
        "compile_s": round(compiled.compile_s, 2),
        "fits": memory.fits,
        "missing_bytes": memory.missing,
        "bytes_per_gpu": {
            "arguments": memory.arguments,
            "outputs": memory.outputs,
            "temporaries": memory.temporaries,
            "total": memory.total,
            "by_part": memory.by_part,
        },
        "collectives": [_collective(transfer) for transfer in timeline.transfers],
        "hidden_share": timeline.hidden_share(),
        "hidden_share_bound": timeline.bound(),
        "hidden_share_all_collectives": timeline.hidden_share(exchanges_only=False),
        "predicted_step_s": timeline.step_s,
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


def write_files(config: Config, compiled: Compiled, workdir: pathlib.Path) -> dict[str, str]:
    """Writes the schedule, a Chrome trace and a picture of one layer; returns their paths."""
    workdir.mkdir(parents=True, exist_ok=True)
    stem = f"aot_{config.aot.program}_{compiled.gpus}"
    paths = {kind: workdir / f"{stem}{ending}" for kind, ending in
             {"schedule": ".schedule.json", "trace": ".trace.json", "picture": ".png"}.items()}  # fmt: skip
    paths["schedule"].write_text(json.dumps(compiled.schedule))
    write_trace(compiled.timeline, paths["trace"])
    title = (
        f"{config.aot.program}, {compiled.gpus} x {config.cluster.gpu}, {config.dispatch.transport}, "
        f"overlap {overlap_of(config)}: {compiled.timeline.hidden_share():.0%} of the exchange hidden (predicted)"
    )
    draw_layer(compiled.timeline, title, paths["picture"])
    return {kind: str(path) for kind, path in paths.items()}
