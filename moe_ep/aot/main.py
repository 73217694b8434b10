"""`--mode=aot`: compile a real program for the cluster that is not here, and say what the compiler made of it."""

import json
import pathlib
import sys

from moe_ep.aot.compare import choices_of, compare
from moe_ep.aot.compile import Compiled, compile_program
from moe_ep.aot.draw import draw_layer, write_trace
from moe_ep.aot.report import PROGRAM_COLUMNS, aot_table, coverage_table, limits_text, table
from moe_ep.aot.search import search_limits
from moe_ep.aot.summary import describe, open_kept, summarize, summarize_kept
from moe_ep.aot.topology import use_no_gpu
from moe_ep.config import Config
from moe_ep.progress import Finished, Progress


def aot(config: Config, workdir: pathlib.Path) -> dict:
    """Compiles, prints the reports, writes trace, picture, schedule and page into `workdir`, and returns the result.

    What a comparison or a search compiled is kept in rows.jsonl: the same command goes on where a killed one stopped.

    Raises:
      ConfigError: a wrong layout, jax without its CUDA plugin, or a work directory that cannot be written.
    """
    use_no_gpu()
    finished = open_kept(workdir)
    compiled = compile_program(config, lambda: _say(f"compiles {describe(config)}"))
    result = summarize(config, compiled)
    pages = [aot_table(config, result), coverage_table(compiled.timeline)]
    print("\n".join(filter(None, pages)), flush=True)
    result["files"] = write_files(config, compiled, workdir)
    for name, study in _STUDIES.items():
        if getattr(config.aot, name):
            result[_KEYS[name]], page = study(config, finished)
            pages.append(page)
            print(page, flush=True)
    page = workdir / f"{_stem(config, compiled.gpus)}.txt"
    page.write_text("\n\n".join(pages) + "\n", encoding="utf-8")
    result["files"]["page"] = str(page)
    print("\n".join(f"{kind}: {path}" for kind, path in result["files"].items()))
    return result


def _compare(config: Config, finished: Finished) -> tuple[list[dict], str]:
    progress = Progress("compare", len(choices_of(config)))
    try:
        rows = compare(config, summarize_kept(finished, progress.say), progress)
    finally:
        progress.close()
    return rows, "transports and overlaps compared\n" + table(PROGRAM_COLUMNS, rows)


def _search(config: Config, finished: Finished) -> tuple[dict, str]:
    def say(text: str) -> None:
        _say(f"search  {text}")

    limits = search_limits(config, summarize_kept(finished, say), say)
    return limits, limits_text(limits)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# Flags of config.aot -> what they ask for, and under which key of the result it stands.
_STUDIES = {"compare": _compare, "search": _search}
_KEYS = {"compare": "comparison", "search": "limits"}


def write_files(config: Config, compiled: Compiled, workdir: pathlib.Path) -> dict[str, str]:
    """Writes the schedule, a Chrome trace and a picture of one layer; returns their paths."""
    workdir.mkdir(parents=True, exist_ok=True)
    stem = _stem(config, compiled.gpus)
    paths = {kind: workdir / f"{stem}{ending}" for kind, ending in
             {"schedule": ".schedule.json", "trace": ".trace.json", "picture": ".png"}.items()}  # fmt: skip
    paths["schedule"].write_text(json.dumps(compiled.schedule))
    write_trace(compiled.timeline, paths["trace"])
    title, note, warning = _captions(config, compiled)
    draw_layer(compiled.timeline, title, note, paths["picture"], warning=warning)
    return {kind: str(path) for kind, path in paths.items()}


def _stem(config: Config, gpus: int) -> str:
    return f"aot_{config.aot.program}_{gpus}"


def _captions(config: Config, compiled: Compiled) -> tuple[str, str, str]:
    """The picture's title, what is predicted of its schedule, and why that does not hold where it does not."""
    cluster, memory, timeline = config.cluster, compiled.memory, compiled.timeline
    hidden = (
        f"{timeline.hidden_share():.1%} of dispatch and combine hidden (bound {timeline.bound():.1%})"
        if any(transfer.is_exchange for transfer in timeline.transfers) else "dispatch and combine cross no link"
    )  # fmt: skip
    note = (
        f"{config.model.moe_layers} MoE layers, compiled; predicted: {hidden}; {cluster.nics_per_node} NICs of {cluster.nic_gigabits_per_s:.0f} "
        f"Gb/s per node of {cluster.gpus_per_node} GPUs"
    )
    warning = "" if memory.fits else (
        f"Does not fit, {memory.missing / 1e9:.1f} GB are missing of {memory.capacity / 1e9:.0f} GB: no overlap is stated, "
        "XLA makes exchanges synchronous there"
    )  # fmt: skip
    return describe(config), note, warning
