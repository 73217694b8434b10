"""The sweep over cells and routings: what is finished is kept, and the same command goes on with the rest."""

import dataclasses
import hashlib
import json
import time

import jax

from moe_ep.bench.grid import Cell, Layout
from moe_ep.bench.rows import make_row
from moe_ep.bench.running import RUNNING
from moe_ep.bench.steps import time_in_turns
from moe_ep.bench.trace import profile_steps
from moe_ep.config import Config
from moe_ep.model.transformer import Transformer
from moe_ep.progress import Finished, Progress, Rows


def sweep(
    config: Config, cells: list[Cell], finished: Finished, progress: Progress, ceilings: dict[str, float]
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
    progress: Progress,
    ceilings: dict[str, float],
    served: dict[Layout, Transformer],
) -> None:
    """Builds the cell's contenders once and times them in turns, routing by routing."""
    progress.say(f"{_name(cell)}: makes the values of {len(cell.contenders)} layouts")
    for layout in set(served) - {one.layout for one in cell.contenders}:
        del served[layout]
    running = {str(one.layout): RUNNING[cell.phase](config, cell, one, served) for one in cell.contenders}
    for name, one in running.items():
        progress.say(f"{_name(cell)}: compiles {name}")
        begin = time.perf_counter()
        one.compiled  # noqa: B018: asked for so that what compiles and what runs can be told apart
        progress.say(f"{_name(cell)}: compiled {name} in {time.perf_counter() - begin:.1f} s, runs")
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
            f"{_name(cell)}, {routing}: {fastest['layout']} EP={fastest['ep']} {fastest['tokens_per_s']:,.0f} tokens/s, "
            f"{fastest['ms_per_step']:.2f} ms a step"
        )


def _name(cell: Cell) -> str:
    tokens = cell.tokens_per_microbatch(cell.contenders[-1])
    one = cell.contenders[-1]
    which = f" {one.layout}, {one.dispatch}" if one.dispatch else ""
    return f"{cell.study} {cell.phase} {cell.context} x {tokens}{which}"


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
