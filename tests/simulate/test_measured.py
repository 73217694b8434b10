"""Single-GPU runs recorded on a device, predicted from their configs."""

import json
import pathlib

import pytest

from moe_ep.simulate.measured import GOAL, compare, markdown

RESULTS = pathlib.Path(__file__).parents[2] / "results"


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return compare(RESULTS)


def test_every_recorded_step_is_predicted_within_the_goal(rows):
    assert {"training", "one MoE layer"} <= {row["what"].split(" step")[0].split(",")[0] for row in rows}
    for row in rows:
        assert abs(row["residual"]) <= GOAL, row


def test_measured_memory_is_predicted_within_three_percent(rows):
    memory = [row for row in rows if row["unit"] == "GB"]
    assert memory
    for row in memory:
        assert row["residual"] == pytest.approx(0, abs=0.03), row


def test_what_is_written_in_results_is_what_the_simulator_says_now(rows):
    written = json.loads((RESULTS / "simulated_against_measured.json").read_text())["rows"]
    assert {row["what"]: row["predicted"] for row in written} == pytest.approx({r["what"]: r["predicted"] for r in rows})
    assert "| what | measured | predicted |" in markdown(rows)


def test_a_folder_without_recorded_runs_has_no_rows(tmp_path):
    assert compare(tmp_path) == []
