"""The full-size presets compiled for clusters that are not here: every program, transports compared, limits searched.

    python -m moe_ep.aot.presets                        needs jax[cuda12], no GPU; a quarter of an hour on two cores

Writes a page each, <out>/aot_presets, aot_transports and aot_limits, .json and .md. What was
compiled is kept in <workdir>/rows.jsonl: the same command goes on where a killed one stopped.
"""

import contextlib
import dataclasses
import os
import pathlib
import sys
from collections.abc import Callable, Iterator

from absl import flags

from moe_ep import command, override, results
from moe_ep.aot.compare import choices_of, compare, verdict
from moe_ep.aot.report import PROGRAM_COLUMNS, Columns, limits_columns, part_columns, sent_columns, table
from moe_ep.aot.search import search_limits
from moe_ep.aot.summary import Summarize, dispatch_name, open_kept, summarize_kept
from moe_ep.aot.topology import use_no_gpu
from moe_ep.checks import check
from moe_ep.config import Config, ConfigError
from moe_ep.progress import Finished, Progress

# Two sequences of 1024 in prefill, eight in decode; a training step of a model that fits with its optimizer.
PROGRAMS = {
    "prefill": ("aot.program=prefill", "aot.context=1024", "aot.tokens_per_gpu=2048"),
    "decode": ("aot.program=decode", "aot.context=1024", "aot.tokens_per_gpu=8192"),
    "train": ("aot.program=train", "aot.context=1024", "aot.tokens_per_gpu=2048",
              "model.layers=6", "model.dense_layers=1"),
}  # fmt: skip
SERVED = ("prefill", "decode")

Named = dict[str, Config]  # by config file and program


def programs_of(paths: list[str], names: tuple[str, ...], settings: list[str]) -> Named:
    """Returns the configs' programs, sized as in PROGRAMS unless the settings say otherwise.

    Raises:
      ConfigError: a file or a setting that is wrong.
    """
    return {
        f"{pathlib.Path(path).stem} {name}": check(override.apply(override.load(path), [*PROGRAMS[name], *settings]))
        for path in paths
        for name in names
    }


def overlaps_of(config: Config) -> list[Config]:
    """Returns the config as it is, then with half batches, two chunks and nothing overlapped, each once."""
    transport = config.dispatch.transport
    others = ((transport, "staggered", 1), ("all_to_all", "chunks", 2), (transport, "none", 1))
    choices = [config, *choices_of(config, others)]
    return list({dispatch_name(choice): choice for choice in choices}.values())


def presets_page(programs: Named, summarize: Summarize, progress: Progress) -> tuple[list[dict], str]:
    """Returns a row for each program and overlap, and the page's tables."""
    rows = []
    for name, config in programs.items():
        for index, choice in enumerate(overlaps_of(config)):
            row = {"name": name, "is_default": index == 0, **summarize(choice)}
            progress.done(f"{name}, {dispatch_name(choice)}: {verdict(row)}")
            if index:
                row.pop("collectives")  # those of the defaults are enough for a file
            rows.append(row)
    defaults = [row for row in rows if row["is_default"]]
    return rows, (
        f"{_slowest(rows)} A preset's first row is its default; training steps have 5 MoE layers and a dense one.\n\n"
        f"{table(_NAME | PROGRAM_COLUMNS, rows)}\n"
        f"## Memory by part, GB a GPU (compiled)\n\n{table(_NAME | part_columns(defaults), defaults)}\n"
        "## Sent by one GPU in a step, all collectives, GB (compiled, even routing)\n\n"
        f"{table(_NAME | _DISPATCH | sent_columns(), rows)}"
    )


def _slowest(rows: list[dict]) -> str:
    """Of each program the longest compilation, by the clock and by the time of all cores."""
    texts = []
    for program in dict.fromkeys(row["program"] for row in rows):
        row = max((row for row in rows if row["program"] == program), key=lambda row: row["compile_s"])
        texts.append(f"{program} {row['compile_s']:.0f} s ({row['compile_cpu_s']:.0f} s of all cores)")
    return f"Longest to lower and compile: {', '.join(texts)}; goal for prefill and decode: under 60 s."


def transports_page(programs: Named, summarize: Summarize, progress: Progress) -> tuple[list[dict], str]:
    """Returns a row for each transport and overlap of every program, and the page's tables."""
    rows, tables = [], []
    for name, config in programs.items():
        compared = [{"name": name, **row} for row in compare(config, summarize, progress)]
        for row in compared:
            row.pop("collectives")
        rows += compared
        tables.append(f"## {name}\n\n{table(PROGRAM_COLUMNS, compared)}")
    return rows, "\n".join(tables)


def limits_page(programs: Named, summarize: Summarize, progress: Progress) -> tuple[list[dict], str]:
    """Returns the largest batch and the longest context of every program, and the page's table."""
    rows = []
    for name, config in programs.items():
        limits = search_limits(config, summarize, progress.say)
        rows.append({"name": name, "dispatch": f"{config.dispatch.transport}, {config.dispatch.overlap}", **limits})
        progress.done(f"{name}: {limits['tokens_per_gpu']} tokens per GPU, context {limits['context']}")
    return rows, _NEAR_MEMORY + table(_NAME | _DISPATCH | limits_columns(), rows)


_NEAR_MEMORY = (
    "XLA gives up overlap at the memory's end, before a program stops fitting: at the largest size little may be hidden, and "
    "a smaller one may be faster.\n\n"
)
_NAME: Columns = {"program": lambda row: row["name"]}
_DISPATCH: Columns = {"transport, overlap": lambda row: row["dispatch"]}


@dataclasses.dataclass(frozen=True)
class Page:
    """A title, the programs that it is about, how many rows they make, and what makes it."""

    title: str
    programs: tuple[str, ...]
    all_configs: bool
    rows_of: Callable[[Config], int]
    make: Callable[[Named, Summarize, Progress], tuple[list[dict], str]]


PAGES = {
    "presets": Page("Full-size presets compiled for GPUs that are not here", tuple(PROGRAMS), True,
                    lambda config: len(overlaps_of(config)), presets_page),
    "transports": Page("Transports and overlaps compared", SERVED, False,
                       lambda config: len(choices_of(config)), transports_page),
    "limits": Page("The most that fits", SERVED, False, lambda _: 1, limits_page),
}  # fmt: skip


def write_page(name: str, paths: list[str], settings: list[str], finished: Finished, folder: str) -> list[pathlib.Path]:
    """Compiles what a page needs and is not kept, writes it, and returns its paths.

    Args:
      name: of PAGES.
      paths: config files; a page that is not about all of them takes the first and the last.
      settings: name=value for all of them.
      finished: programs compiled before, and those of this page.
      folder: of the result files.
    """
    page, opening = PAGES[name], results.provenance(results.command_line("moe_ep.aot.presets"))
    paths = paths if page.all_configs else list(dict.fromkeys([paths[0], paths[-1]]))
    programs = programs_of(paths, page.programs, settings)
    with _progress(name, sum(map(page.rows_of, programs.values()))) as progress:
        rows, text = page.make(programs, summarize_kept(finished, progress.say), progress)
    result = {"kind": "compiled and predicted", **opening, "cores": len(os.sched_getaffinity(0)),
              "load_average": os.getloadavg()[-1], "rows": rows}  # fmt: skip
    markdown = f"# {page.title}\n\n{_heading(result, next(iter(programs.values())))}\n\n{text}"
    return results.write(folder, f"aot_{name}", result, markdown)


@contextlib.contextmanager
def _progress(name: str, total: int) -> Iterator[Progress]:
    progress = Progress(name, total)
    try:
        yield progress
    finally:
        progress.close()


def _heading(result: dict, config: Config) -> str:
    cluster, versions = config.cluster, results.versions_text(result["versions"])
    return (
        f"XLA:GPU for absent GPUs on {result['cores']} CPU cores without a GPU (load average of the last 15 minutes "
        f"{result['load_average']:.1f}), {result['date']}, commit {result['commit']}; {versions}.\n`{result['command']}`\n\n"
        f"Cluster: {cluster.gpu} ({cluster.device.memory_bytes / 1e9:.0f} GB), {cluster.gpus_per_node} a node, "
        f"{cluster.nics_per_node} NICs of {cluster.nic_gigabits_per_s:.0f} Gb/s a node. Bytes are the compiler's, of one "
        "GPU and one step; overlap and times are predicted along its schedule by the kernel and network models; seconds "
        "to compile are this machine's, and longer where its cores are shared. Over its memory a program has no overlap "
        "to state."
    )


def main() -> None:
    """Writes the pages that were asked for."""
    given = flags.FLAGS
    for name in given.pages or [""]:
        if name not in PAGES:
            raise ConfigError(f"--pages={name}: allowed are {', '.join(PAGES)}")
    if not given.configs:
        raise ConfigError("--configs=: allowed is at least one config file")
    use_no_gpu()
    command.check_folder(given.out)
    finished = open_kept(pathlib.Path(given.workdir))
    for name in given.pages:
        for path in write_page(name, given.configs, given.set, finished, given.out):
            print(f"wrote {path}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    flags.DEFINE_list("pages", list(PAGES), "Which pages to write.")
    flags.DEFINE_list(
        "configs", [f"configs/seed_e{experts}.py" for experts in (16, 32, 64, 128)],
        "Config files of the presets' page; the other pages take the first and the last.",
    )  # fmt: skip
    flags.DEFINE_multi_string("set", [], "name=value for all of them, as in moe_ep.run.")
    flags.DEFINE_string("out", "results", "The folder of the result files.")
    flags.DEFINE_string("workdir", "runs/aot_presets", "Where compiled programs are kept.")
    command.run(main)
