"""Measures every step of the expert MLP in every tiling on this GPU and rewrites its part of the kernels' table.

    python -m moe_ep.bench.tune                                  every problem
    python -m moe_ep.bench.tune --only_groups=1 --only_rows=64   those alone, the table's other entries kept

Each candidate is first checked against XLA on fresh random data. All of a problem's
candidates are timed in turns, and the fastest by its median is the table's entry.
"""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from moe_ep import results
from moe_ep.bench import command, report
from moe_ep.bench.compiling import compile_all
from moe_ep.bench.timing import Contender, Times, measure_in_turns
from moe_ep.config import ConfigError
from moe_ep.kernels import device
from moe_ep.kernels.grouped_matmul import RowGroups, choice, make_row_groups, mosaic, table, tiles_needed
from moe_ep.kernels.grouped_matmul.mosaic_parts import Tiling
from moe_ep.kernels.grouped_matmul.table import Entry, Problem

_GROUPS = flags.DEFINE_multi_integer("only_groups", [], "Tune problems of so many groups alone; may be repeated.")
_ROWS = flags.DEFINE_multi_integer("only_rows", [], "Tune problems of so many rows alone; may be repeated.")
flags.set_default(command.SAMPLES, 9)
flags.set_default(command.SAMPLE_SECONDS, 0.03)

WIDTH, HIDDEN = 7168, 18432
# By so much XLA must win: its products multiply pad rows and skipped tiles too.
XLA_WINS_BY = 1.01
LARGEST_ERROR = 1e-2  # of bfloat16 results, relative to their norm
_BASELINES = ("dense", "scanned")  # XLA's way, of one group and of several
ACTIVATION = {1: "gelu", 2: "silu_gated"}
WIDE = [Tiling(raster_rows=rows) for rows in (8, 16, 32)]
# Fewer columns where 128 x 256 tiles would not fill the last round of multiprocessors.
FEW_ROWS = [Tiling(), *(Tiling(columns=columns, stages=6) for columns in (128, 192))]
FEWER_ROWS = [
    *FEW_ROWS, Tiling(columns=64, stages=8),
    *(Tiling(consumers=1, columns=columns, stages=stages) for columns, stages in ((128, 8), (192, 6), (256, 5))),
]  # fmt: skip
NARROW = [
    Tiling(consumers=1, columns=columns, stages=stages, raster_rows=1)
    for columns, stages in ((64, 8), (64, 12), (128, 8), (192, 4), (192, 6), (256, 4), (256, 5))
]


def problems() -> Iterator[Problem]:
    """Yields the problems the table holds: one group from decoding to large batches, and eight unequal groups."""
    steps = {
        "hidden": (WIDTH, HIDDEN),
        "hidden_and_products": (WIDTH, HIDDEN),
        "product": (HIDDEN, WIDTH),
        "product_gradients": (WIDTH, HIDDEN),
        "rows_gradient": (HIDDEN, WIDTH),
        "weight_gradient": (WIDTH, HIDDEN),
    }
    forward, activated = ("hidden", "product"), ("hidden", "hidden_and_products", "product_gradients", "rows_gradient")
    for rows in (64, 128, 256, 512, 1024, 2048, 8192):
        yield from (Problem(step, 1, rows, *steps[step]) for step in forward)
    yield from (Problem(step, 1, 4096, *sizes) for step, sizes in steps.items())
    yield from (Problem(step, 1, 4096, *steps[step], inputs=2) for step in activated)
    grouped_rows = tiles_needed(8192, 8, 128) * 128
    yield from (Problem(step, 8, grouped_rows, *sizes) for step, sizes in steps.items())
    yield from (Problem(step, 8, grouped_rows, *steps[step], inputs=2) for step in activated)
    yield from (Problem(step, 8, 8 * 64, *steps[step]) for step in forward)


class Programs(NamedTuple):
    """What measures one problem, compiled: operands from a key and the rows' layout, the candidates, their error."""

    operands: Callable
    candidates: dict[str, Callable]
    error: Callable


def compiled(chosen: list[Problem]) -> dict[Problem, Programs]:
    """Returns the programs of each problem."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    waiting, tuned_by_xla = {}, set()
    for problem in chosen:
        groups, make = jax.eval_shape(lambda: make_groups(problem, 0)), functools.partial(make_operands, problem)
        runs, operands = candidates(problem), jax.eval_shape(make, key, groups)
        baseline = next(iter(runs))
        out = jax.eval_shape(runs[baseline], *operands)
        tuned_by_xla.add((problem, baseline))
        waiting |= {(problem, name): functools.partial(_compiled, run, *operands) for name, run in runs.items()}
        waiting[problem, make_operands] = functools.partial(_compiled, jax.jit(make), key, groups)
        waiting[problem, relative_error] = functools.partial(_compiled, jax.jit(relative_error), out, out, groups)
    done = compile_all(waiting, tuned_by_xla)

    def programs(problem):
        runs = {name: done[problem, name] for name in candidates(problem)}
        return Programs(done[problem, make_operands], runs, done[problem, relative_error])

    return {problem: programs(problem) for problem in chosen}


def _compiled(jitted, *operands):
    return jitted.lower(*operands).compile()


def tune(problem: Problem, programs: Programs, seed: int, samples: int, sample_seconds: float, measured: str) -> Entry:
    """Returns the fastest of XLA and the kernels for this problem."""
    groups = make_groups(problem, seed)
    operands = programs.operands(jax.random.key(seed), groups)
    contenders = {
        name: Contender(functools.partial(run, *operands), jax.block_until_ready)
        for name, run in programs.candidates.items()
    }
    baseline, *kernels = contenders
    expected = contenders[baseline].launch()
    tilings = dict(zip(kernels, tilings_of(problem), strict=True))
    for name in kernels:
        error = float(programs.error(contenders[name].launch(), expected, groups))
        if not error < LARGEST_ERROR:
            raise SystemExit(f"{name} of {problem} differs from XLA by {error}, more than {LARGEST_ERROR}")
    times = measure_in_turns(contenders, samples, sample_seconds)
    milliseconds = {name: round(1e3 * time.median, 4) for name, time in times.items()}
    fastest = fastest_of(milliseconds)
    _print_row(problem, times)
    return Entry(problem, baseline if fastest == baseline else "mosaic", tilings.get(fastest), milliseconds, measured)


def fastest_of(milliseconds: dict[str, float]) -> str:
    """Returns the name of the fastest, XLA's, the first, only if it is by more than noise."""
    xla = next(iter(milliseconds))
    return min(milliseconds, key=lambda name: milliseconds[name] * (XLA_WINS_BY if name == xla else 1.0))


def candidates(problem: Problem) -> dict[str, Callable]:
    """Returns XLA's way first, then the kernels in each tiling, as functions of `make_operands`' result."""
    baseline = _BASELINES[problem.groups > 1]
    runs = {baseline: jax.jit(_with_static(getattr(choice.IMPLEMENTATIONS[baseline], problem.step), problem))}
    for tiling in tilings_of(problem):
        name = f"{tiling.consumers}x64x{tiling.columns}, {tiling.stages} stages, {tiling.raster_rows} tiles a column"
        step = functools.partial(getattr(mosaic, problem.step), tiling=tiling)
        runs[name] = jax.jit(_with_static(step, problem))
    return runs


def tilings_of(problem: Problem) -> list[Tiling]:
    """Returns the tilings worth trying: narrow ones where reading the weights is all the work."""
    if problem.rows <= 64 * problem.groups:
        return NARROW
    if problem.rows <= 1024:
        return FEWER_ROWS
    return FEW_ROWS if problem.rows <= 2048 else WIDE


def make_operands(problem: Problem, key: jax.Array, groups: RowGroups) -> tuple:
    """Returns random operands of the step, pad rows zero, the layout of the rows last."""
    keys = jax.random.split(key, 4)
    tile = problem.rows // groups.tile_rows.shape[0]
    holds_data = (jnp.arange(tile)[None, :] < groups.tile_rows[:, None]).reshape(-1, 1)

    def normal(key, shape, scale=1.0):
        return (scale * jax.random.normal(key, shape, jnp.float32)).astype(jnp.bfloat16)

    rows = jnp.where(holds_data, normal(keys[0], (problem.rows, problem.depth)), jnp.bfloat16(0))
    output = jnp.where(holds_data, normal(keys[1], (problem.rows, problem.columns)), jnp.bfloat16(0))
    if problem.step == "weight_gradient":
        return rows, output, groups
    transposed = problem.step.endswith(("product_gradients", "rows_gradient"))
    size = (problem.columns, problem.depth) if transposed else (problem.depth, problem.columns)
    weights = tuple(normal(key, (problem.groups, *size), problem.depth**-0.5) for key in keys[2 : 2 + problem.inputs])
    return {
        "product": (rows, weights[0], groups),
        "product_gradients": (rows, weights[0], (output,) * problem.inputs, groups),
        "rows_gradient": ((rows,) * problem.inputs, weights, groups),
    }.get(problem.step, (rows, weights, groups))


def make_groups(problem: Problem, seed: int) -> RowGroups:
    """Returns full groups for decoding and for one group, else unequal ones that fit in the problem's tiles."""
    tile = 64 if problem.rows <= 64 * problem.groups else 128
    if problem.groups == 1 or problem.rows <= 64 * problem.groups:
        sizes = np.full(problem.groups, problem.rows // problem.groups)
    else:
        generator = np.random.default_rng(seed)
        rows = problem.rows - (tile - 1) * problem.groups
        sizes = generator.multinomial(rows, generator.dirichlet(np.ones(problem.groups)))
    return make_row_groups(jnp.asarray(sizes, jnp.int32), tile, problem.rows // tile)


def relative_error(out, expected, groups: RowGroups) -> jax.Array:
    """Returns the largest ||out - expected|| / ||expected|| over the outputs' valid rows."""

    def error(ours, theirs):
        if ours.ndim == 2:
            tile = ours.shape[0] // groups.tile_group.shape[0]
            kept = (jnp.arange(ours.shape[0]) < groups.valid_tiles * tile)[:, None]
            ours, theirs = (jnp.where(kept, value, jnp.zeros((), value.dtype)) for value in (ours, theirs))
        ours, theirs = (value.astype(jnp.float32) for value in (ours, theirs))
        return jnp.linalg.norm(ours - theirs) / jnp.linalg.norm(theirs)

    return jnp.max(jnp.stack(jax.tree.leaves(jax.tree.map(error, out, expected))))


def _with_static(step, problem):
    if problem.step == "weight_gradient":
        return functools.partial(step, group_count=problem.groups)
    if problem.step in ("product", "rows_gradient"):
        return step
    return functools.partial(step, activation=ACTIVATION[problem.inputs])


def _print_row(problem: Problem, times: dict[str, Times]):
    cells = "; ".join(f"{name} {1e3 * time.median:.3f} ms ±{time.spread:.1%}" for name, time in times.items())
    tqdm.write(f"{' '.join(map(str, dataclasses.astuple(problem)))}: {cells}")


def as_markdown(result: dict) -> str:
    """Returns the entries as a table."""
    columns = "step groups rows depth columns inputs chosen measured".split()
    lines = [f"| {' | '.join(columns)} | medians in ms |", "|" + "---|" * 9]
    for entry in result["entries"]:
        sizes = " | ".join(str(value) for value in entry["problem"].values())
        times = "; ".join(f"{name}: {value:.3f}" for name, value in entry["milliseconds"].items())
        by_kernels = entry["implementation"] == "mosaic"
        names = [name for name in entry["milliseconds"] if (name not in _BASELINES) == by_kernels]
        chosen = min(names, key=entry["milliseconds"].get)
        lines.append(f"| {sizes} | {chosen} | {entry['measured']} | {times} |")
    return report.heading("Tilings of the expert MLP's steps", result) + "\n".join(lines) + "\n"


def main() -> None:
    """Tunes and writes the table and the results, after every problem what is known by then."""
    _check_place()
    opening = command.start("moe_ep.bench.tune")
    chosen = selected()
    programs = compiled(chosen)
    entries = known_entries()
    sampling = (opening["seed"], command.SAMPLES.value, command.SAMPLE_SECONDS.value)
    for problem in tqdm(chosen, "measuring", unit="problem", disable=None):
        measured = f"{opening['date'][:10]} {opening['commit']}"
        entries[problem] = tune(problem, programs.pop(problem), *sampling, measured)
        paths = write(command.OUT.value, opening, [entries[known] for known in problems() if known in entries])
    print(f"wrote {table.PATH}, {', '.join(map(str, paths))}", file=sys.stderr)


def _check_place():
    if command.SIZES.value != "full":
        raise ConfigError(f"--sizes={command.SIZES.value}: allowed is full, the table's sizes")
    kind = device.device_kind()
    if not device.is_hopper(kind):
        raise ConfigError(f"moe_ep.bench.tune: the kernels run on Hopper GPUs, this is {kind}")


def selected() -> list[Problem]:
    """Returns the problems that the flags ask for.

    Raises:
      ConfigError: there are none.
    """
    groups, rows = (set(flag.value) for flag in (_GROUPS, _ROWS))
    chosen = [
        problem
        for problem in problems()
        if problem.groups in (groups or {problem.groups}) and problem.rows in (rows or {problem.rows})
    ]
    allowed = ", ".join(sorted({f"{problem.rows} rows in {problem.groups}" for problem in problems()}))
    if not chosen:
        raise ConfigError(f"--only_groups={sorted(groups)} --only_rows={sorted(rows)}: no such problem; allowed are {allowed}")
    return chosen


def known_entries() -> dict[Problem, Entry]:
    """Returns this GPU's part of the table as it stands."""
    entries = table.read(table.PATH).get(device.gpu_model(device.device_kind()), ())
    return {entry.problem: entry for entry in entries}


def write(out: str, opening: dict, entries: list[Entry]) -> list[pathlib.Path]:
    """Writes the entries to the table and, after what a result opens with, to the results in `out`; returns their paths."""
    table.write(table.PATH, device.device_kind(), entries)
    result = opening | {"entries": [dataclasses.asdict(entry) for entry in entries]}
    return results.write(out, report.file_stem("tune"), result, as_markdown(result))


if __name__ == "__main__":
    command.run(main)
