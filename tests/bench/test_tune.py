"""The tuner compiles all candidates first, writes the fastest, and keeps the other GPUs' entries."""

import functools
import json

import jax
import numpy as np
import pytest

from moe_ep.bench import compiling, tune
from moe_ep.kernels import device
from moe_ep.kernels.grouped_matmul import dense, mosaic, table
from moe_ep.kernels.grouped_matmul.table import Problem

OPENING = {"kind": "measured", "device": "a", "date": "2026-01-02T03", "commit": "c", "versions": {"jax": "0"}, "command": "x"}


@pytest.fixture
def on_an_h100(tmp_path, monkeypatch):
    """An H100 whose kernels are XLA's products, and a table of its own that holds an H200's entries."""
    monkeypatch.setattr(device, "device_kind", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(mosaic, "product", lambda *operands, tiling: dense.STEPS.product(*operands))
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"h200": json.loads(table.PATH.read_text())["h200"][:2]}))
    monkeypatch.setattr(table, "PATH", path)
    return tmp_path


def test_every_candidate_is_compiled_measured_and_written(on_an_h100):
    problem = Problem("product", 1, 64, 32, 16)
    programs = tune.compiled([problem])[problem]
    assert list(programs.candidates) == list(tune.candidates(problem))
    entry = tune.tune(problem, programs, seed=1, samples=2, sample_seconds=0.0, measured="today")
    fastest = tune.fastest_of(entry.milliseconds)
    assert (entry.implementation == "dense") == (fastest == "dense") == (entry.tiling is None)
    paths = tune.write(str(on_an_h100), OPENING, [entry])
    assert [path.name for path in paths] == ["tune_nvidia_h100_80gb_hbm3.json", "tune_nvidia_h100_80gb_hbm3.md"]
    assert table.nearest("NVIDIA H100 80GB HBM3", problem) == entry == tune.known_entries()[problem]
    assert len(table.read(table.PATH)["h200"]) == 2
    assert f"| {fastest} | today |" in paths[1].read_text()


def test_a_candidate_that_differs_from_xla_ends_the_tuning(on_an_h100, monkeypatch):
    problem = Problem("product", 1, 64, 32, 16)
    monkeypatch.setattr(mosaic, "product", lambda *operands, tiling: 1.1 * dense.STEPS.product(*operands))
    with pytest.raises(SystemExit, match="differs from XLA by 0.1"):
        tune.tune(problem, tune.compiled([problem])[problem], seed=1, samples=2, sample_seconds=0.0, measured="today")


def test_xla_is_taken_where_it_wins_by_more_than_noise():
    assert tune.fastest_of({"dense": 1.0, "a": 1.005, "b": 1.2}) == "a"
    assert tune.fastest_of({"dense": 1.0, "a": 1.02, "b": 1.2}) == "dense"
    assert tune.fastest_of({"dense": 1.0, "a": 0.99, "b": 0.98}) == "b"


@pytest.mark.parametrize("entry", [entry for entries in table.read(table.PATH).values() for entry in entries])
def test_what_the_table_chooses_follows_from_its_times(entry):
    fastest = tune.fastest_of(entry.milliseconds)
    tiling = entry.tiling
    chosen = f"{tiling.consumers}x64x{tiling.columns}, {tiling.stages} stages, " if tiling else entry.implementation
    assert fastest.startswith(chosen)
    assert (entry.implementation == "mosaic") == (tiling is not None)


def test_pad_rows_are_zero_and_no_others():
    problem = Problem("weight_gradient", 3, 8 * 128, 4, 2)
    groups = tune.make_groups(problem, seed=1)
    rows, output, _ = tune.make_operands(problem, jax.random.key(0), groups)
    for values in (rows, output):
        data = np.asarray(values != 0).any(axis=1).reshape(8, 128).sum(axis=1)
        np.testing.assert_array_equal(data, groups.tile_rows)
    assert 0 < int(groups.tile_rows.sum()) < problem.rows


def test_what_xla_tunes_compiles_one_after_another_and_all_answers_have_their_names():
    running, most = [], []

    def compilation(name):
        if name < 4:
            running.append(name)
            most.append(len(running))
        program = jax.jit(lambda x: x + name).lower(1).compile()
        if name < 4:
            running.remove(name)
        return program

    programs = compiling.compile_all({name: functools.partial(compilation, name) for name in range(8)}, range(4))
    assert {name: int(program(1)) for name, program in programs.items()} == {name: 1 + name for name in range(8)}
    assert most == [1] * 4
