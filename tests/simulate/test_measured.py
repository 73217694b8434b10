"""Single-GPU runs recorded on a device, predicted from their configs."""

import json
import pathlib

import pytest

from moe_ep.simulate import launch
from moe_ep.simulate.measured import GOAL, compare, markdown
from moe_ep.simulate.scenario import own_stack

RESULTS = pathlib.Path(__file__).parents[2] / "results"


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return compare(RESULTS)


def test_every_recorded_step_is_predicted_within_the_goal(rows):
    kinds = {row["what"].split(" step")[0].split(",")[0] for row in rows}
    assert {"one MoE layer", "prefill", "decode"} <= kinds
    assert not [row for row in rows if abs(row["residual"]) > GOAL]


def test_one_row_sets_the_launch_and_it_is_what_a_fresh_fit_gives(rows):
    launch_s, what = launch.fit(RESULTS)
    assert own_stack().kernels.launch_s == pytest.approx(launch_s, rel=2e-3)
    assert [row["what"] for row in rows if row["sets"]] == [what] == [own_stack().kernels.launch_set_by]
    assert f"sets launch_s | `{launch.FILE}`" in markdown(rows)


def test_measured_memory_is_predicted_within_three_percent(rows):
    for row in (row for row in rows if row["unit"] == "GB"):
        assert row["residual"] == pytest.approx(0, abs=0.03), row


def test_what_is_written_in_results_is_what_the_simulator_says_now(rows):
    written = json.loads((RESULTS / "simulated_against_measured.json").read_text())["rows"]
    assert {row["what"]: row["predicted"] for row in written} == pytest.approx({r["what"]: r["predicted"] for r in rows})
    assert "| what | measured | predicted |" in markdown(rows)


def test_rows_of_the_benchmark_are_predicted_from_their_command(tmp_path, monkeypatch):
    """One row that is this project's, others of more devices, of training, emulated."""
    monkeypatch.chdir(RESULTS.parent)
    row = {"kind": "measured", "devices": 1, "phase": "decode", "tokens_per_microbatch": 64, "sequence": 2048,
           "experts": 8, "routing": "uniform", "ms_per_step": 3.0}  # fmt: skip
    others = [row | {"devices": 2}, row | {"phase": "train"}, row | {"kind": "emulated"}]
    command = "python -m moe_ep.run --mode=bench --config=configs/single_gpu.py --set model.layers=3"
    record = {"command": command, "rows": [row, *others]}
    (tmp_path / "serve_nvidia_h200.json").write_text(json.dumps(record))
    (only,) = compare(tmp_path)
    assert 3.0 < only["predicted"] < 4.5 and only["measured"] == 3.0
    assert only["what"].startswith("decode, 64 sequences, context 2048")


def test_a_folder_without_recorded_runs_has_no_rows(tmp_path):
    assert compare(tmp_path) == []
