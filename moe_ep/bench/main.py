"""`--mode=bench`: the layouts side by side on the devices at hand, and full size predicted."""

import json
import shutil
import sys
from pathlib import Path

import jax

from moe_ep.bench import report
from moe_ep.bench.draw import draw
from moe_ep.bench.grid import make_cells
from moe_ep.bench.predicted import predict_full_size
from moe_ep.bench.routings import check_routing
from moe_ep.bench.sweep import Finished, Progress, sweep
from moe_ep.bench.tables import as_markdown
from moe_ep.config import Config, ConfigError


def bench(config: Config, workdir: Path) -> dict:
    """Times what `config.bench` asks for, prints it as tables, and returns it under DESIGN's keys.

    Writes rows.jsonl as rows are finished, then bench.json, bench.md and pictures,
    into the work directory; the same command goes on where a killed one stopped.

    Raises:
      ConfigError: a routing, device count or grid that cannot be.
    """
    for routing in config.bench.routing:
        check_routing(config, routing)
    first = jax.process_index() == 0
    cells = make_cells(config, jax.device_count())
    finished = _open(workdir, first)
    progress = Progress(len(cells) * len(config.bench.routing))
    try:
        rows = sweep(config, cells, finished, progress)
    finally:
        progress.close()
    kinds = sorted({row["kind"] for row in rows})
    result = {
        "kind": " and ".join(kinds),
        **report.provenance(_command_line(), None),
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "rows": rows + (predict_full_size(config) if config.bench.predict else []),
    }
    print(as_markdown(result))
    if first:
        result["files"] = _write(config, result, workdir)
    return result


def _open(workdir: Path, writes: bool) -> Finished:
    try:
        return Finished(workdir / "rows.jsonl", writes)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"--workdir={workdir}: allowed is a directory that can be written, whose rows.jsonl is a benchmark's ({error})"
        ) from None


def _command_line() -> str:
    """The command as it is recorded: where files go is of this machine, not of the measurement."""
    given = [argument for argument in sys.argv[1:] if not argument.startswith(("--workdir", "--json"))]
    return " ".join(["python -m moe_ep.run", *given])


def _write(config: Config, result: dict, workdir: Path) -> list[str]:
    (workdir / "bench.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (workdir / "bench.md").write_text(as_markdown(result), encoding="utf-8")
    paths = [workdir / "bench.json", workdir / "bench.md", *draw(result["rows"], workdir)]
    print(f"files: {', '.join(str(path) for path in paths)}")
    if config.bench.results:
        folder = Path(config.bench.results)
        folder.mkdir(parents=True, exist_ok=True)
        for path in paths:
            shutil.copy(path, folder / path.name.replace("bench", _stem(result), 1))
    return [str(path) for path in paths]


def _stem(result: dict) -> str:
    return "bench_emulated" if result["kind"].startswith("emulated") else report.file_stem("bench")
