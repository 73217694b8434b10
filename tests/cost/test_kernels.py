"""Kernel tables: exact at measured shapes, never under the roofline, scaled between GPUs."""

import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ep.cost.from_tuning import as_text, table_of
from moe_ep.cost.kernels import TABLES, AssumedKernels, gemm, load_table, memory_pass, roofline_seconds
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
BENCHMARK = {
    "device": "NVIDIA H200", "date": "2026-11-24T00:00:00", "commit": "abc", "versions": {"jax": "0"},
    "copy_bytes_per_s": {"xla": 3e12, "torch": 4e12},
    "rows": [
        {"row": "grouped_gelu G=8", "flops": 1.0, "bytes": 0.0, "contenders": contenders(ours=3.4, loop_of_mm=3.3)},
        {"row": "grouped_wgrad G=8", "flops": 1.0, "bytes": 0.0, "contenders": contenders(ours=3.5)},
        {"row": "mlp_forward M=4096", "flops": 1.0, "bytes": 0.0, "contenders": contenders(ours=3.2, xla=3.1)},
        {"row": "mla_decode 512+64", "flops": 1e9, "bytes": 1e8, "contenders": contenders(ours=0.1, xla=0.2, torch=0.05)},
        {"row": "half_valid_buffer", "flops": 1.0, "bytes": 0.0, "contenders": contenders(ours=1.0)},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def own_rows() -> dict[tuple, dict]:
    table = table_of(TUNING, json.loads((TABLES / "h200_bf16.json").read_text()), BENCHMARK)
    assert json.loads(as_text(table)) == table
    assert table["device"] == "NVIDIA H200" and table["date"] == "2026-11-24"
    return {(row["op"], *row["shape"]): row for row in table["rows"]}


def test_products_bound_by_compute_are_the_warm_benchmarks_and_others_the_tuners(own_rows):
    assert own_rows["grouped_gemm", 64, 7168, 18432, 8]["seconds"] == pytest.approx(0.5e-3)
    assert own_rows["grouped_gemm", 1024, 7168, 18432, 8]["seconds"] == pytest.approx(3.4e-3)
    assert own_rows["grouped_weight_gradient", 1024, 7168, 18432, 8]["seconds"] == pytest.approx(3.5e-3)


def test_a_row_of_two_products_is_shared_and_the_faster_of_ours_and_xla_counts(own_rows):
    for shape in ((7168, 18432), (18432, 7168)):
        assert own_rows["gemm", 4096, *shape, 1]["seconds"] == pytest.approx(1.55e-3)
    assert own_rows["mla_decode", 64, 4096, 128, 576]["seconds"] == pytest.approx(0.1e-3)


def test_passes_are_as_fast_as_xlas_copy_and_the_rest_is_the_anchors(own_rows):
    (copy,) = (row for key, row in own_rows.items() if key[0] == "memory")
    assert copy["bytes"] / copy["seconds"] == pytest.approx(3e12)
    assert {key[0] for key in own_rows} >= {"attention", "attention_backward"}


def test_a_weight_gradient_without_rows_takes_the_grouped_products_utilisation():
    product = gemm(1024, 7168, 18432, "bf16", 8)
    assert TABLE.seconds(product.of_weight_gradient(), GPUS["h200"]) == TABLE.seconds(product, GPUS["h200"])
