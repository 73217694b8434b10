"""From a config to the JSON object: layouts, refusals, points, sweeps, schedules, claims."""

import csv
import dataclasses
import json
import subprocess
import sys

import pytest

from moe_ep.config import Config, ConfigError
from moe_ep.override import apply
from moe_ep.simulate import calibration, layouts, validation
from moe_ep.simulate.from_config import scenario_of
from moe_ep.simulate.main import claims, simulate, table
from moe_ep.simulate.points import POINTS
from moe_ep.simulate.scenario import DoesNotFit

KEYS = {
    "feasible", "missing_bytes", "tokens_per_s", "tokens_per_s_per_gpu", "ms_per_token", "mfu", "nic_utilisation",
    "nvlink_utilisation", "bytes_per_gpu", "exposed_communication_share", "bottleneck", "error_bar",
}  # fmt: skip
WIDE = ("model.moe.num_experts=128", "simulate.transport=ragged")


def run(*settings: str) -> dict:
    return simulate(apply(Config(), settings))


def test_one_layout_has_all_keys_and_is_json():
    result = run(*WIDE)
    assert KEYS <= set(result)
    assert result["feasible"] and result["kind"] == "predicted"
    assert json.loads(json.dumps(result))["inputs"]["layout"]["ep"] == 128
    assert "tokens_per_s_per_gpu" in table(result)


def test_files_of_one_layout(tmp_path):
    simulate(apply(Config(), ["model.layers=6"]), str(tmp_path))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["tid"] for event in events} == {"compute", "network"}
    assert all((tmp_path / name).stat().st_size for name in ("simulate.json", "simulate.md"))


def test_what_does_not_fit_is_refused_with_the_missing_bytes_and_timed_only_by_name():
    layout = ("model.moe.num_experts=16", "mesh.expert=8", "mesh.data=2")
    with pytest.raises(DoesNotFit, match=r"does not fit: 8\d\.\d GB a GPU .* of 64.0 GB, 2\d\.\d GB missing") as caught:
        run(*layout)
    assert 20e9 < caught.value.missing_bytes < 30e9
    ignored = run(*layout, "simulate.ignore_memory=true")
    assert ignored["kind"] == "predicted, memory ignored" and not ignored["feasible"]


@pytest.mark.parametrize(
    "setting, message",
    [
        ("mesh.expert=3", "mesh.expert=3: allowed is"),
        ("mesh.expert=12", "mesh.expert=12: allowed is at most, or a multiple of, the 8 GPUs"),
        ("simulate.tp=3", "simulate.tp=3: allowed is a divisor"),
        ("simulate.tp=16", "simulate.tp=16: allowed is a divisor of the 8 GPUs"),
        ("simulate.pp=100", "simulate.pp=100: allowed is at most the 61 layers"),
        ("simulate.routing=skewed", "simulate.routing=skewed: allowed is balanced"),
        ("simulate.placement=co_activated", "only with simulate.routing=trace"),
        ("simulate.overlap=forward_backward", "only with simulate.phase=train"),
        ("simulate.point=nothing", "simulate.point=nothing: allowed is all or one of deepep"),
        ("simulate.schedule=/nowhere", "simulate.schedule=/nowhere: allowed is a schedule"),
    ],
)  # fmt: skip
def test_impossible_layouts_are_refused_with_the_numbers(setting, message):
    with pytest.raises(ConfigError, match=message):
        run(setting)


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    for ask in (simulate, claims):
        with pytest.raises(ConfigError, match="file/results: allowed is a folder that can be written"):
            ask(apply(Config(), ["simulate.point=all", f"simulate.results={tmp_path / 'file' / 'results'}"]))


def test_the_most_that_fits():
    scenario = scenario_of(apply(Config(), [*WIDE, "simulate.phase=decode", "simulate.sequences_per_gpu=none"]))
    assert 16 <= scenario.workload.sequences_per_gpu <= 24  # 9 GB of 0.44 GB each


def test_heads_that_tensor_parallelism_does_not_divide_are_refused():
    with pytest.raises(ConfigError, match="simulate.tp=8: allowed is a divisor of model.attention.heads = 12"):
        run("simulate.tp=8", "model.attention.heads=12")


def test_replicas_take_degrees_that_the_experts_do_not_divide():
    """72 GPUs with four slots each hold 256 experts, 32 of them twice, as in published deployments."""
    deployment = ("model.moe.num_experts=256", "mesh.expert=72", "simulate.ignore_memory=true")
    assert run(*deployment, "simulate.slots=4", "simulate.placement=balanced")["inputs"]["layout"]["ep"] == 72
    with pytest.raises(ConfigError, match="simulate.slots=3: allowed is at least 4: 256 experts on 72 GPUs"):
        run(*deployment, "simulate.slots=3")


def test_replicas_even_out_a_skewed_load():
    skewed = ("model.moe.num_experts=64", "simulate.routing=zipf:0.8", "simulate.ignore_memory=true", "mesh.expert=64")
    plain, replicated = run(*skewed), run(*skewed, "simulate.placement=balanced", "simulate.slots=2")
    assert replicated["max_over_mean_load"] < 0.5 * plain["max_over_mean_load"]
    assert replicated["tokens_per_s"] > plain["tokens_per_s"]


def test_the_fitted_parameters_are_what_the_calibration_rows_give():
    fresh, (stored, _) = calibration.fit(), validation.fitted()
    for name, value in dataclasses.asdict(fresh).items():
        assert getattr(stored, name) == pytest.approx(value, rel=1e-6), name


def test_at_most_eight_parameters_each_set_by_calibration_rows():
    known = set(calibration.calibration_points())
    assert all(rows and set(rows) <= known for rows in calibration.SET_BY.values())
    listed = validation.predict_all()["free_parameters"]
    assert len(listed) <= 8 and all(entry["set_by"] for entry in listed)


def test_all_points_are_predicted_and_compared_where_values_are_given(tmp_path):
    with open(tmp_path / "values.csv", "w", newline="") as file:
        csv.writer(file).writerows([["id", "value"], ["deepep-ll-dispatch-8", "1000"], ["expert-gemm-8", "1"]])
    values = f"simulate.published_values={tmp_path / 'values.csv'}"
    result = simulate(apply(Config(), ["simulate.point=all", values, f"simulate.results={tmp_path}"]))
    rows = {row["id"]: row for row in result["rows"]}
    assert len(rows) == len(POINTS) == 34
    assert all(row["predicted"] > 0 and row["error_bar"] > 0 for row in rows.values())
    compared = rows["deepep-ll-dispatch-8"]
    assert compared["residual"] == pytest.approx(compared["predicted"] / 1000 - 1, abs=1e-3)
    assert rows["expert-gemm-8"]["measured"] == 530  # a calibration value is not replaced
    written = list(csv.DictReader(open(tmp_path / "validation.csv")))
    assert [row["id"] for row in written] == [point.id for point in POINTS]


def test_calibration_residuals_are_within_the_goals():
    result = validation.predict_all()
    rows = {row["id"]: row for row in result["rows"]}
    assert result["mean_absolute_error"]["calibration all_to_all"] <= 0.05
    assert abs(rows["expert-gemm-8"]["residual"]) <= 0.04


def test_one_point_from_a_shell_takes_no_jax_and_no_second():
    program = (
        "import sys; from moe_ep.config import Config; from moe_ep.override import apply;"
        "from moe_ep.simulate.main import simulate;"
        "print(simulate(apply(Config(), ['simulate.point=sglang-decode-256']))['predicted']);"
        "sys.exit(any(name in sys.modules for name in ('jax', 'matplotlib', 'tqdm')))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_a_line_sweep_marks_what_does_not_fit(tmp_path):
    result = simulate(apply(Config(), [*WIDE, "simulate.sweep=batch", "simulate.phase=decode"]), str(tmp_path))
    feasible = {row["x"]: row["feasible"] for row in result["rows"] if row["series"] == "NIC per GPU"}
    assert feasible[1] and not feasible[128]
    assert (tmp_path / "batch.png").stat().st_size and (tmp_path / "batch.json").exists()


def test_search_finds_a_layout_that_fits_and_keeps_the_latency():
    base = scenario_of(apply(Config(), ["model.layers=8", "model.moe.num_experts=4", "simulate.phase=decode"]))
    rows = layouts.search(base, latency_ms=20.0)
    best = rows[0]
    assert best["feasible"] and best["ms_per_token"] <= 20.0
    assert all(row["tokens_per_s"] <= best["tokens_per_s"] for row in rows if row["feasible"])
    with pytest.raises(ConfigError, match="simulate.latency_ms=0.001: allowed is at least"):
        layouts.search(base, latency_ms=0.001)


@pytest.fixture(scope="module")
def ledger(tmp_path_factory) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe_ep.simulate.claims.SIZES", (16, 64))
        return claims(apply(Config(), [f"simulate.results={tmp_path_factory.mktemp('claims')}"]))


def test_claims_have_every_key_and_reading(ledger):
    assert all(set(row) >= {"claim", "source_value", "reading", "value", "verdict", "kind"} for row in ledger["rows"])
    readings = {row["reading"].split(",")[0] for row in ledger["rows"]}
    assert readings == {"NIC per GPU", "NIC per node", "either"}
    assert "| claim | source |" in table(ledger)


def test_every_claim_says_whether_it_is_measured_compiled_or_simulated(ledger):
    assert {row["kind"].split(",")[0] for row in ledger["rows"]} == {"measured", "compiled", "simulated"}
    rows = {(row["claim"], row["reading"].split(",")[0]): row for row in ledger["rows"] if row["kind"] == "compiled"}
    assert rows["one expert per GPU fits the GPU, as compiled", "either"]["verdict"] == "reproduced"
    assert rows["communication hidden, as compiled", "NIC per GPU"]["verdict"] == "reproduced"
    assert rows["communication hidden, as compiled", "NIC per node"]["verdict"] == "not reproduced"


def test_the_balancers_rate_settles_few_experts_and_swings_many(ledger):
    (row,) = (row for row in ledger["rows"] if row["claim"] == "balancing rate")
    assert row["verdict"] == "reproduced only if E=16" and "E=128" in row["value"]


def test_claims_agree_with_first_principles(ledger):
    rows = {(row["claim"], row["reading"]): row for row in ledger["rows"]}
    constants = "NIC per node, source’s constants"
    assert "prefill 53." in rows["scaling to 128 GPUs", constants]["value"]
    assert rows["use of the network", constants]["value"] == "85%"
    assert rows["both at once, E = 16", constants]["verdict"] == "not reproduced"
    assert rows["KV compression", "either"]["value"] == "3.98x"
    assert "2 sequences" in rows["KV cache limits long sequences", "either"]["value"]
