"""The sweep over cells and routings: what is finished is kept, and the same command goes on with the rest."""

import dataclasses
import hashlib
import json
import sys
from pathlib import Path

import jax

from moe_ep.bench.grid import Cell, Layout
from moe_ep.bench.rows import make_row
from moe_ep.bench.running import RUNNING
from moe_ep.bench.steps import time_in_turns
from moe_ep.bench.trace import profile_steps
from moe_ep.config import Config
from moe_ep.model.transformer import Transformer

Rows = list[dict]


class Finished:
    """Rows of the work directory, a line of JSON for what was measured together.

    Args:
      path: of the lines; a killed run may leave half a line at the end.
      writes: whether this process adds lines.
    """

    def __init__(self, path: Path, writes: bool):
        text = path.read_bytes() if path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        self._rows: dict[str, Rows] = {entry["key"]: entry["rows"] for entry in map(json.loads, whole.splitlines())}
        self._file = None
        if writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")
            self._file.truncate(len(whole))

    def get(self, key: str) -> Rows | None:
        return self._rows.get(key)

    def add(self, key: str, rows: Rows) -> None:
        self._rows[key] = rows
        if self._file is not None:
            self._file.write(json.dumps({"key": key, "rows": rows}) + "\n")
            self._file.flush()


def sweep(
    config: Config, cells: list[Cell], finished: Finished, progress: "Progress", ceilings: dict[str, float]
) -> Rows:
    """Returns the rows of all cells and routings, measuring those that are not finished yet."""
    rows: Rows = []
    served: dict[Layout, Transformer] = {}  # one cell's parameters, for the next if it has the same layouts
    for cell in cells:
        missing = [routing for routing in config.bench.routing if finished.get(_key(config, cell, routing)) is None]
        if missing:
            _measure(config, cell, missing, finished, progress, ceilings, served)
        for routing in config.bench.routing:
            rows += finished.get(_key(config, cell, routing))
            if routing not in missing:
                progress.done(f"{_name(cell)}, {routing}: kept from before")
    return rows


def _measure(
    config: Config,
    cell: Cell,
    routings: list[str],
    finished: Finished,
    progress: "Progress",
    ceilings: dict[str, float],
    served: dict[Layout, Transformer],
) -> None:
    """Builds the cell's contenders once and times them in turns, routing by routing."""
    progress.say(f"{_name(cell)}: compiles {len(cell.contenders)} layouts")
    for layout in set(served) - {one.layout for one in cell.contenders}:
        del served[layout]
    running = {str(one.layout): RUNNING[cell.phase](config, cell, one, served) for one in cell.contenders}
    for routing in routings:
        for one in running.values():
            one.start(routing)
        bench = config.bench
        seconds = time_in_turns({name: one.step for name, one in running.items()}, bench.turns, bench.steps)
        rows = [make_row(cell, one, routing, seconds[name], ceilings) for name, one in running.items()]
        if bench.profile:
            for row, one in zip(rows, running.values(), strict=True):
                row["profile"] = profile_steps(one.step, bench.steps)
        finished.add(_key(config, cell, routing), rows)
        fastest = max(rows, key=lambda row: row["tokens_per_s"])
        progress.done(
            f"{_name(cell)}, {routing}: {fastest['layout']} EP={fastest['ep']} {fastest['tokens_per_s']:,.0f} tokens/s"
        )


def _name(cell: Cell) -> str:
    tokens = cell.tokens_per_microbatch(cell.contenders[-1])
    return f"{cell.study} {cell.phase} {cell.context} x {tokens}"


def _key(config: Config, cell: Cell, routing: str) -> str:
    inputs = dataclasses.asdict(config)
    asked = inputs.pop("bench")
    for unread in ("generate", "aot", "simulate"):
        inputs.pop(unread)
    return make_key(inputs, asked["turns"], asked["steps"], asked["profile"], cell, routing)


def make_key(*inputs: object) -> str:
    """Returns what tells a measurement from every other: its inputs, the devices and jax."""
    parts = [*inputs, jax.local_devices()[0].device_kind, jax.process_count(), jax.__version__]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


class Progress:
    """A bar over measurements on a terminal, a line each elsewhere; both on standard error."""

    def __init__(self, total: int, shown: bool = True):
        self._total, self._done, self._shown = total, 0, shown
        self._bar = _open_bar(total) if shown and sys.stderr.isatty() else None

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.set_description_str(text)
        elif self._shown:
            print(f"bench {self._done}/{self._total}  {text}", file=sys.stderr, flush=True)

    def done(self, text: str) -> None:
        self._done += 1
        if self._bar is not None:
            self._bar.update()
        self.say(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _open_bar(total: int):
    try:
        from tqdm import tqdm
    except ImportError:  # a GPU machine may lack it; lines instead
        return None
    return tqdm(total=total, unit="row set", dynamic_ncols=True)
