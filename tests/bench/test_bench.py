"""The benchmark of whole programs: its grid, its counts, its bytes, and that a killed sweep goes on."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from moe_ep.bench import main, sweep
from moe_ep.bench.bandwidth import COLLECTIVES, check_delivery, make_messages, measure_bandwidth
from moe_ep.bench.grid import Cell, Contender, Layout, config_of, make_cells
from moe_ep.bench.routings import draw_choices
from moe_ep.bench.running import Decode
from moe_ep.bench.steps import summarize, time_steps
from moe_ep.bench.tables import over_best_baseline
from moe_ep.bench.trace import Event
from moe_ep.bench.trace import summarize as summarize_trace
from moe_ep.bench.work import exchange_bytes, gradient_bytes
from moe_ep.config import BenchConfig, ClusterConfig, ConfigError, MeshConfig
from moe_ep.mesh import make_mesh
from moe_ep.progress import Finished, Progress
from tests.train.small import make_config

SMALL = BenchConfig(
    studies=("layouts",), phases=("decode",), baselines=(4,), sequences=(16,), sequences_per_gpu=(2,),
    routing=("zipf:1.0",), turns=2, steps=2,
)  # fmt: skip


def with_bench(config=None, **fields):
    return dataclasses.replace(config or make_config(), bench=dataclasses.replace(SMALL, **fields))


def degrees(cell):
    return [(one.layout.name, one.layout.ep, one.layout.data, one.sequences) for one in cell.contenders]


def test_layouts_take_equal_devices_and_equal_work():
    (cell,) = make_cells(with_bench(baselines=(4, 8, 16)), 16)
    assert degrees(cell) == [("proposed", 16, 1, 2), ("baseline", 8, 2, 2), ("baseline", 4, 4, 2)]
    (cell,) = make_cells(with_bench(baselines=(1,)), 2)  # fewer devices than experts: the widest axis there can be
    assert degrees(cell) == [("baseline", 2, 1, 2), ("baseline", 1, 2, 2)]


def test_scaling_keeps_the_global_batch_or_the_share_of_a_device():
    strong, weak = make_cells(with_bench(studies=("strong", "weak")), 16)
    assert degrees(strong) == [("baseline", 2, 1, 16), ("baseline", 4, 1, 8), ("baseline", 8, 1, 4), ("proposed", 16, 1, 2)]
    assert [(one.layout.experts, one.layout.ep) for one in weak.contenders] == [(2, 2), (4, 4), (8, 8), (16, 16)]
    assert {one.sequences for one in weak.contenders} == {2}


def test_the_dispatch_study_times_each_way_to_travel_alone():
    cells = make_cells(with_bench(studies=("dispatch",), dispatches=("ragged:none", "all_to_all:chunks:2")), 16)
    assert [(degrees(cell), cell.contenders[0].dispatch) for cell in cells] == [
        ([("proposed", 16, 1, 2)], "ragged:none"), ([("proposed", 16, 1, 2)], "all_to_all:chunks:2"),
        ([("baseline", 4, 4, 2)], "ragged:none"), ([("baseline", 4, 4, 2)], "all_to_all:chunks:2"),
    ]  # fmt: skip
    dispatch = config_of(make_config(), cells[1].contenders[0]).dispatch
    assert (dispatch.transport, dispatch.overlap, dispatch.chunks) == ("all_to_all", "chunks", 2)
    odd = make_cells(with_bench(studies=("dispatch",), dispatches=("ragged:staggered", "ragged:none"), sequences_per_gpu=(3,)), 16)
    assert {cell.contenders[0].dispatch for cell in odd} == {"ragged:none"}


@pytest.mark.parametrize("name", ["ragged", "ragged:chunks:2", "pigeon:none"])
def test_a_dispatch_that_cannot_be_is_refused(name):
    with pytest.raises(ConfigError, match=f"bench.dispatches={name}: allowed is TRANSPORT:OVERLAP"):
        make_cells(with_bench(studies=("dispatch",), dispatches=(name,)), 16)


def test_training_steps_of_every_transport_have_the_same_loss(tmp_path):
    config = with_bench(
        studies=("dispatch",), phases=("train",), baselines=(), tokens_per_gpu=(16,), turns=1, steps=1,
        dispatches=("all_to_all:none", "ragged:none"),
    )  # fmt: skip
    result = main.bench(config, tmp_path)
    exact, padded = (row["loss"] for row in result["rows"])
    assert exact == pytest.approx(padded, rel=1e-5) and exact > 0
    assert "| all_to_all, none |" in (tmp_path / "bench.md").read_text()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"devices": (4, 32)}, "bench.devices=32: allowed is at most the 16"),
        ({"phases": ("train",), "tokens_per_gpu": (24,), "sequences": (16,)}, "bench.tokens_per_gpu=24"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        make_cells(with_bench(**fields), 16)


def test_more_chunks_than_rows_are_refused_before_anything_is_timed():
    config = make_config()
    config = dataclasses.replace(config, dispatch=dataclasses.replace(config.dispatch, overlap="chunks", chunks=3))
    with pytest.raises(ConfigError, match="dispatch.chunks=3: allowed is 1 to 2 with 2 tokens"):
        make_cells(with_bench(config), 16)
    make_cells(with_bench(config, sequences_per_gpu=(8,)), 16)


def test_an_unknown_routing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="bench.routing=histogram:x: allowed is a list of uniform"):
        main.bench(with_bench(routing=("histogram:x",)), tmp_path)


def test_drawn_choices_follow_their_shares_and_never_repeat_an_expert():
    config = make_config()
    uniform, skewed = (next(draw_choices(config, name, 4000)) for name in ("uniform", "zipf:1.0"))
    for choices in (uniform, skewed):
        assert choices.shape == (2, 4000, 2) and choices.min() >= 0 and choices.max() < 16
        assert (choices[..., 0] != choices[..., 1]).all()
    counts = [np.bincount(choices[0].ravel(), minlength=16) for choices in (uniform, skewed)]
    assert counts[0].std() < 4 * np.sqrt(500)
    assert counts[1].max() > 2 * counts[1].mean()
    assert (next(draw_choices(config, "text", 10)) == -1).all()


def test_a_step_is_counted_as_it_was_routed():
    """Rows that leave a device, and what fixed and exact transports send of them, by hand."""
    config = make_config(margin_sigmas=0.0)
    layout = Layout("baseline", 16, 4, 2)
    running = Decode(config, Cell("layouts", "decode", 16, (Contender(layout, 3),)), Contender(layout, 3), {})
    running.start("zipf:1.0")
    seconds = time_steps(running.step, 2)
    assert len(seconds) == 2 and min(seconds) > 0
    counted = running.count()
    tokens = layout.devices * 3
    assert counted.expert_counts.sum(axis=1).tolist() == [tokens * 2] * 2
    choices = [np.asarray(batch[1]) for batch in [next(running._batches) for _ in range(4)]]
    own = np.arange(tokens) // 3 % 4
    away = {(choice // 4 != own[None, :, None]).sum() / 8 for choice in choices}
    assert counted.rows_away in away
    assert running.waves >= 2 and counted.rows_dropped == 0  # mean + 1 rows do not hold this routing in one wave
    # C = ceil(3 x 2 / 4) + 1 rows to each of three others, out and back, and a header row; float32 rows of 32.
    rows = 3 * (2 * 3 * running.waves + running.waves)
    assert exchange_bytes(running, "decode", counted) == rows * 2 * 32 * 4
    exact = dataclasses.replace(config.dispatch, transport="ragged")
    running.config = dataclasses.replace(running.config, dispatch=exact)
    assert exchange_bytes(running, "decode", counted) == pytest.approx(2 * counted.rows_away * 32 * 4)
    # Experts stand on two replicas, all else on eight devices.
    held = {name: sum(leaf.nbytes for leaf in leaves) for name, leaves in _leaves(running.parameters).items()}
    ring = held["experts"] / 4 * 2 * 1 / 2 + held["others"] * 2 * 7 / 8
    assert gradient_bytes(running, "train") == pytest.approx(ring)
    assert gradient_bytes(running, "decode") == 0


def _leaves(parameters):
    experts = jax.tree.leaves(parameters.moe.moe.experts)
    return {"experts": experts, "others": [x for x in jax.tree.leaves(parameters) if not any(x is one for one in experts)]}


def test_a_killed_sweep_goes_on(tmp_path, monkeypatch):
    config = with_bench(make_config(), routing=("uniform", "text"))
    config = dataclasses.replace(
        config,
        cluster=ClusterConfig(gpus_per_node=8),
        model=dataclasses.replace(config.model, vocabulary=320, moe=dataclasses.replace(config.model.moe, num_experts=8)),
    )
    monkeypatch.setattr("jax.device_count", lambda: 8)
    whole = main.bench(config, tmp_path)
    assert [(row["layout"], row["ep"], row["routing"]) for row in whole["rows"]] == [
        ("proposed", 8, "uniform"), ("baseline", 4, "uniform"), ("proposed", 8, "text"), ("baseline", 4, "text"),
    ]  # fmt: skip
    for row in whole["rows"]:
        assert row["kind"] == "emulated" and row["tokens_per_s"] > 0 and row["bytes_sent"] > 0
        assert row["ms_per_token_median"] <= row["ms_per_token_p95"] <= row["ms_per_token_p99"]
    lines = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text(lines[0] + lines[1][:40])  # killed while it wrote
    measured = []

    def measure(config, cell, routings, finished, progress, ceilings, served):
        measured.append(routings)
        finished.add(sweep._key(config, cell, routings[0]), whole["rows"][2:])

    monkeypatch.setattr(sweep, "_measure", measure)
    again = main.bench(config, tmp_path)
    assert measured == [["text"]]
    assert again["rows"] == whole["rows"]
    assert json.loads((tmp_path / "bench.json").read_text())["rows"] == again["rows"]
    assert "emulated" in (tmp_path / "bench.md").read_text()
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("bench.layouts.png",))


def test_rows_of_another_config_are_not_taken(tmp_path):
    finished = Finished(tmp_path / "rows.jsonl", writes=True)
    finished.add("one", [{"x": 1}])
    assert Finished(tmp_path / "rows.jsonl", writes=False).get("one") == [{"x": 1}]
    assert Finished(tmp_path / "rows.jsonl", writes=False).get("two") is None


def test_idle_shares_of_a_profile():
    """Two streams: 0-10 and 5-40, 50 us later 90-100; 2 us between kernels is no wait for the host."""
    us = lambda name, start, end: Event(name, start * 1e3, end * 1e3)  # noqa: E731
    summary = summarize_trace([us("a", 0, 10), us("b", 5, 40), us("a", 42, 50), us("c", 90, 100)], steps=2)
    assert (summary["idle_share"], summary["host_idle_share"]) == pytest.approx((0.42, 0.40))
    assert summary["kernels_ms_per_step"] == pytest.approx({"b": 0.0175, "a": 0.009, "c": 0.005})
    assert summarize_trace([], steps=1) == {}


def test_percentiles_and_the_ratio_to_the_best_baseline():
    ms = summarize(np.arange(1, 101).reshape(4, 25) / 1e3)
    assert (ms["median"], ms["p95"], ms["p99"]) == pytest.approx((50.5, 95.05, 99.01))
    same = {"study": "layouts", "phase": "decode", "experts": 8, "devices": 8, "sequence": 1, "tokens_per_microbatch": 1}
    rows = [
        {**same, "layout": layout, "routing": routing, "tokens_per_s": rate}
        for layout, routing, rate in [
            ("proposed", "a", 30.0), ("baseline", "a", 10.0), ("baseline", "a", 20.0), ("proposed", "b", 5.0),
        ]  # fmt: skip
    ]
    assert over_best_baseline(rows) == [1.5, None, None, None]


def test_collectives_deliver_what_they_should(tmp_path):
    """Each collective's own check on 8 devices; a value that is off by one is noticed."""
    config = with_bench(studies=("all_to_all",), smallest_bytes=2**10, largest_bytes=2**10)
    (message,) = make_messages(config, 8)
    assert message.bytes == 2**10
    finished = Finished(tmp_path / "rows.jsonl", writes=True)
    rows = measure_bandwidth(config, [message], finished, Progress("bench", 1, shown=False))
    assert [row["collective"] for row in rows] == ["all_to_all", "all_gather", "psum_scatter", "ragged_all_to_all"]
    for row in rows:
        assert row["correct"] and row["kind"] == "emulated"
        assert row["bus_bytes_per_s"] == pytest.approx(row["algorithm_bytes_per_s"] * 7 / 8)
    mesh = make_mesh(MeshConfig(1, 8), config.cluster, 8, jax.devices()[:8])
    right = COLLECTIVES["all_gather"]["all_gather"]
    off = right._replace(expected=lambda message: right.expected(message) + 1)
    assert bool(check_delivery(right, message, mesh)()) and not bool(check_delivery(off, message, mesh)())
