"""`--mode=bench`: the layouts side by side on the devices at hand, and full size predicted."""

import json
import shutil
import sys
from pathlib import Path

import jax

from moe_ep.bench import report
from moe_ep.bench.bandwidth import as_markdown as bandwidth_table
from moe_ep.bench.bandwidth import make_messages, measure_bandwidth
from moe_ep.bench.ceilings import measure_ceilings
from moe_ep.bench.draw import draw
from moe_ep.bench.grid import make_cells
from moe_ep.bench.predicted import predict_full_size
from moe_ep.bench.routings import check_routing
from moe_ep.bench.sweep import sweep
from moe_ep.bench.tables import as_markdown
from moe_ep.config import Config, ConfigError
from moe_ep.mesh import is_first_process
from moe_ep.progress import Finished, Progress


def bench(config: Config, workdir: Path) -> dict:
    """Times what `config.bench` asks for, prints it as tables, and returns it under DESIGN's keys.

    Writes rows.jsonl as rows are finished, then bench.json, bench.md and pictures,
    into the work directory (all_to_all.json and .md for the bandwidth test); the same
    command goes on where a killed one stopped.

    Raises:
      ConfigError: a routing, device count or grid that cannot be.
    """
    for routing in config.bench.routing:
        check_routing(config, routing)
    first = is_first_process()
    cells = make_cells(config, jax.device_count())
    messages = make_messages(config, jax.device_count())
    finished = _open(workdir, first)
    emulated = jax.default_backend() == "cpu"
    progress = Progress("bench", len(cells) * len(config.bench.routing) + len(messages), shown=first)
    try:
        ceilings = {} if emulated or not cells or not config.bench.ceilings else _measure_ceilings(progress)
        rows = sweep(config, cells, finished, progress, ceilings)
        bandwidth = measure_bandwidth(config, messages, finished, progress)
    finally:
        progress.close()
    result = {
        "kind": "emulated" if emulated else "measured",
        **report.provenance(_command_line(), None),
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "ceilings": ceilings,
        "rows": rows + (predict_full_size(config) if config.bench.predict else []),
        "bandwidth": bandwidth,
    }
    documents = _documents(result)
    print("\n".join(text for text in documents.values()))
    if first:
        result["files"] = _write(config, result, documents, workdir)
    return result


_ROWS_OF = {"bench": "rows", "all_to_all": "bandwidth"}  # the key of each topic's rows
_TABLES = {"bench": as_markdown, "all_to_all": bandwidth_table}


def _documents(result: dict) -> dict[str, str]:
    """Returns the Markdown of what was asked for, by topic."""
    return {topic: table(result) for topic, table in _TABLES.items() if result[_ROWS_OF[topic]]}


def _measure_ceilings(progress: Progress) -> dict[str, float]:
    progress.say("measures the device's copy and product")
    return measure_ceilings()


def _open(workdir: Path, writes: bool) -> Finished:
    try:
        return Finished(workdir / "rows.jsonl", writes)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"--workdir={workdir}: allowed is a directory that can be written, whose rows.jsonl is a benchmark's ({error})"
        ) from None


def _command_line() -> str:
    """The command as it is recorded: where files go is of this machine, not of the measurement."""
    left_out = ("--workdir", "--json", "--profile", "--set=bench.results")
    given = [argument for argument in sys.argv[1:] if not argument.startswith(left_out)]
    for index, argument in enumerate(given):
        if argument.startswith("bench.results="):
            del given[index - 1 : index + 1]
            break
    return " ".join(["python -m moe_ep.run", *given])


def _write(config: Config, result: dict, documents: dict[str, str], workdir: Path) -> list[str]:
    """Writes JSON, Markdown and pictures of each topic; copies them to `config.bench.results` under names of the device."""
    paths = []
    for topic, text in documents.items():
        paths += [workdir / f"{topic}.json", workdir / f"{topic}.md"]
        of_topic = {name: value for name, value in result.items() if name == _ROWS_OF[topic] or name not in _ROWS_OF.values()}
        paths[-2].write_text(json.dumps(of_topic, indent=1) + "\n", encoding="utf-8")
        paths[-1].write_text(text, encoding="utf-8")
    if "bench" in documents:
        paths += draw(result["rows"], workdir)
    print(f"files: {', '.join(str(path) for path in paths)}")
    if config.bench.results:
        folder = Path(config.bench.results)
        folder.mkdir(parents=True, exist_ok=True)
        device = "emulated" if result["kind"] == "emulated" else report.file_stem("").lstrip("_")
        for path in paths:
            topic, _, ending = path.name.partition(".")
            shutil.copy(path, folder / f"{topic}_{device}.{ending}")
    return [str(path) for path in paths]
