"""Kernel tables: exact at measured shapes, never under the roofline, scaled between GPUs."""

import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ep.cost import from_tuning
from moe_ep.cost.from_tuning import as_text, table_of
from moe_ep.cost.kernels import TABLES, AssumedKernels, Measurement, gemm, load_table, memory_pass, roofline_seconds
from moe_ep.hardware import GPUS

TABLE = load_table("h200_bf16")


def test_a_measured_shape_takes_its_measured_time():
    seconds = TABLE.seconds(gemm(512, 7168, 18432, "bf16"), GPUS["h200"])
    assert math.isclose(seconds, 0.441e-3 / 2, rel_tol=1e-6)


def test_between_shapes_utilisation_is_interpolated_not_time():
    small, large = (TABLE.seconds(gemm(m, 7168, 18432, "bf16"), GPUS["h200"]) for m in (4096, 8192))
    between = TABLE.time(gemm(6144, 7168, 18432, "bf16"), GPUS["h200"])
    assert small < between.seconds < large
    assert not between.extrapolated
    assert TABLE.time(gemm(65536, 7168, 18432, "bf16"), GPUS["h200"]).extrapolated


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20000), st.integers(8, 20000), st.integers(8, 20000), st.integers(1, 32),
       st.sampled_from(sorted(GPUS)), st.sampled_from(["h200_bf16", "hopper_fp8_deepseek"]))  # fmt: skip
def test_never_below_the_roofline(m, k, n, groups, gpu, name):
    table = load_table(name)
    work = gemm(m, k, n, "bf16", groups)
    assert table.seconds(work, GPUS[gpu]) >= roofline_seconds(work, GPUS[gpu]) * (1 - 1e-9)


def test_memory_bound_work_scales_with_bandwidth_and_compute_bound_with_flops():
    decode, prefill = gemm(8, 7168, 18432, "bf16"), gemm(8192, 7168, 18432, "bf16")
    h100, h200, paper = GPUS["h100"], GPUS["h200"], GPUS["paper_h100"]
    assert TABLE.seconds(decode, h100) / TABLE.seconds(decode, h200) == pytest.approx(4.8 / 3.35)
    assert TABLE.seconds(prefill, paper) / TABLE.seconds(prefill, h200) == pytest.approx(989 / 400)


def test_fewer_streaming_multiprocessors_slow_compute_alone():
    shared = dataclasses.replace(TABLE, compute_share=0.5)
    assert shared.seconds(gemm(8192, 7168, 18432, "bf16"), GPUS["h200"]) == pytest.approx(
        2 * TABLE.seconds(gemm(8192, 7168, 18432, "bf16"), GPUS["h200"])
    )
    assert shared.seconds(memory_pass(1e9), GPUS["h200"]) == TABLE.seconds(memory_pass(1e9), GPUS["h200"])


def test_assumed_efficiencies():
    kernels = AssumedKernels(mfu=0.6, memory_efficiency=0.8)
    gpu = GPUS["paper_h100"]
    assert kernels.seconds(memory_pass(1.8e12 * 0.8), gpu) == pytest.approx(1.0)


def test_a_missing_operation_is_named():
    table = dataclasses.replace(TABLE, rows=tuple(row for row in TABLE.rows if row.op != "memory"))
    with pytest.raises(KeyError, match="no row of op memory"):
        table.seconds(memory_pass(1e6), GPUS["h200"])


def problem(step: str, groups: int, rows: int) -> dict:
    return {"step": step, "groups": groups, "rows": rows, "depth": 7168, "columns": 18432, "inputs": 1}


def contenders(**milliseconds: float) -> dict:
    return {name: {"seconds": 1e-3 * value} for name, value in milliseconds.items()}


TUNING = {
    "entries": [
        {"problem": problem("hidden", 8, 512), "milliseconds": {"dense": 9.0, "tiles": 0.5}},
        {"problem": problem("hidden", 8, 9088), "milliseconds": {"tiles": 3.0}},
        {"problem": problem("weight_gradient", 1, 64), "milliseconds": {"dense": 1.0}},
    ],
}  # fmt: skip
MEASURED = {"device": "NVIDIA H200", "date": "2026-11-24T00:00:00", "commit": "abc", "versions": {"jax": "0"}}
BENCHMARK = MEASURED | {
    "copy_bytes_per_s": {"xla": 3e12, "torch": 4e12},
    "rows": [
        {"row": "grouped_gelu G=8", "flops": 1.0, "bytes": 0.0, "contenders": contenders(ours=3.4, loop_of_mm=3.3)},
        {"row": "grouped_wgrad G=8", "flops": 1.0, "bytes": 0.0, "contenders": contenders(ours=3.5)},
        {"row": "mlp_forward M=4096", "flops": 1.0, "bytes": 0.0, "contenders": contenders(ours=3.2, xla=3.1)},
        {"row": "mla_decode 512+64", "flops": 1e9, "bytes": 1e8, "contenders": contenders(ours=0.1, xla=0.2, torch=0.05)},
        {"row": "gather", "flops": 0.0, "bytes": 1e9, "contenders": contenders(ours=0.25, xla=0.5)},
        {"row": "half_valid_buffer", "flops": 1.0, "bytes": 0.0, "contenders": contenders(ours=1.0)},
    ],
}


@pytest.fixture(scope="module")
def own_table() -> dict:
    table = table_of(json.loads((TABLES / "h200_bf16.json").read_text()), TUNING, BENCHMARK)
    assert json.loads(as_text(table)) == table
    return table


@pytest.fixture(scope="module")
def own_rows(own_table) -> dict[tuple, dict]:
    return {(row["op"], *row["shape"]): row for row in own_table["rows"]}


def test_a_table_says_what_it_was_made_of(own_table):
    assert own_table["device"] == "NVIDIA H200" and own_table["date"] == "2026-11-24" and own_table["commit"] == "abc"


def test_another_gpus_times_are_not_read_as_the_anchors(tmp_path, monkeypatch, capsys):
    for device in ("NVIDIA H100 80GB HBM3", "NVIDIA H200"):
        stem = device.lower().replace(" ", "_")
        (tmp_path / f"kernels_{stem}.json").write_text(json.dumps({"device": device}))
    monkeypatch.setattr(from_tuning, "_RESULTS", tmp_path)
    with pytest.raises(SystemExit):
        from_tuning.main(["nvidia_h100_80gb_hbm3"])
    assert "nvidia_h100_80gb_hbm3: allowed is one of nvidia_h200, measured" in capsys.readouterr().err


def test_products_bound_by_compute_are_the_warm_benchmarks_and_others_the_tuners(own_rows):
    assert own_rows["grouped_gemm", 64, 7168, 18432, 8]["seconds"] == pytest.approx(0.5e-3)
    assert own_rows["grouped_gemm", 1024, 7168, 18432, 8]["seconds"] == pytest.approx(3.4e-3)
    assert own_rows["grouped_weight_gradient", 1024, 7168, 18432, 8]["seconds"] == pytest.approx(3.5e-3)


def test_a_row_of_two_products_is_shared_and_the_faster_of_ours_and_xla_counts(own_rows):
    for shape in ((7168, 18432), (18432, 7168)):
        assert own_rows["gemm", 4096, *shape, 1]["seconds"] == pytest.approx(1.55e-3)
    assert own_rows["mla_decode", 64, 4096, 128, 576]["seconds"] == pytest.approx(0.1e-3)


def test_what_set_the_launch_is_read_with_it(tmp_path):
    document = json.loads((TABLES / "h200_bf16.json").read_text())
    (tmp_path / "set.json").write_text(json.dumps(document | {"launch_s": 1e-6, "launch_set_by": "a row"}))
    table = load_table(str(tmp_path / "set.json"))
    assert (table.launch_s, table.launch_set_by) == (1e-6, "a row")
    assert TABLE.launch_set_by == ""


def test_rows_moved_by_a_kernel_say_nothing_of_xlas_passes(own_rows):
    (one,) = (row for key, row in own_rows.items() if key[0] == "memory")
    assert one["bytes"] / one["seconds"] == pytest.approx(3e12)
    assert own_rows["row_gather", 1e9]["seconds"] == pytest.approx(0.25e-3)


def test_what_no_benchmark_has_is_the_anchors_and_what_one_has_is_not(own_rows):
    assert [key for key in own_rows if key[0] == "mla_decode"] == [("mla_decode", 64, 4096, 128, 576)]
    assert {key[0] for key in own_rows} >= {"attention", "attention_backward"}


def test_a_weight_gradient_without_rows_takes_the_grouped_products_utilisation():
    product = gemm(1024, 7168, 18432, "bf16", 8)
    assert TABLE.seconds(product.of_weight_gradient(), GPUS["h200"]) == TABLE.seconds(product, GPUS["h200"])


def test_rows_bound_by_the_other_side_of_the_roofline_are_not_asked():
    """At 64 rows a group reading the weights sets the time, at 4096 the products do."""
    reads = Measurement("grouped_gemm", "bf16", (64, 7168, 18432, 8), 0.9, "memory")
    multiplies = Measurement("grouped_gemm", "bf16", (4096, 7168, 18432, 8), 0.6, "compute")
    table, gpu = dataclasses.replace(TABLE, rows=(reads, multiplies)), GPUS["h200"]
    for rows, utilisation in ((16, 0.9), (180, 0.9), (300, 0.6), (1024, 0.6)):
        work = gemm(rows, 7168, 18432, "bf16", 8)
        assert table.seconds(work, gpu) == pytest.approx(roofline_seconds(work, gpu) / utilisation)


def test_what_is_fused_into_a_kernel_is_launched_with_it():
    gpu, product, little = GPUS["h200"], gemm(8192, 7168, 18432, "bf16"), memory_pass(4.0)
    apart = TABLE.seconds(product, gpu) + TABLE.seconds(little, gpu)
    assert apart - TABLE.fused_seconds([product, little], gpu) == pytest.approx(TABLE.launch_s, rel=1e-3)
    assert TABLE.fused_seconds([little, little], gpu) == TABLE.launch_s
    assert TABLE.fused_seconds([], gpu) == 0.0
