"""Kernel tables: exact at measured shapes, never under the roofline, scaled between GPUs."""

import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ep.config import ModelConfig, MoEConfig
from moe_ep.cost.from_tuning import as_text, table_of
from moe_ep.cost.kernels import TABLES, AssumedKernels, gemm, load_table, memory_pass, roofline_seconds
from moe_ep.cost.work import BF16, experts, router
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


def test_tuned_products_become_rows_and_the_rest_stays():
    tuning = {
        "device": "NVIDIA H200", "date": "2026-11-24T00:00:00", "commit": "abc", "versions": {"jax": "0"},
        "entries": [
            {"problem": {"step": "hidden", "groups": 8, "rows": 9088, "depth": 7168, "columns": 18432, "inputs": 1},
             "milliseconds": {"dense": 9.0, "ours": 3.0}},
            {"problem": {"step": "weight_gradient", "groups": 1, "rows": 64, "depth": 8, "columns": 8, "inputs": 1},
             "milliseconds": {"dense": 1.0}},
        ],
    }  # fmt: skip
    anchors = json.loads((TABLES / "h200_bf16.json").read_text())
    table = table_of(tuning, anchors)
    (product, *others) = table["rows"]
    assert product["shape"] == [1024, 7168, 18432, 8] and product["seconds"] == pytest.approx(3e-3)
    assert {row["op"] for row in others} == {"attention", "attention_backward", "mla_decode", "memory"}
    assert json.loads(as_text(table)) == table


def test_the_cache_read_of_the_benchmark_replaces_the_anchor():
    tuning = {"device": "NVIDIA H200", "date": "2026-11-24", "commit": "abc", "versions": {}, "entries": []}
    times = {"ours": {"seconds": 1e-4}, "xla": {"seconds": 2e-4}, "torch": {"seconds": 5e-5}}
    benchmark = {"rows": [{"row": "mla_decode 512+64", "flops": 1e9, "bytes": 1e8, "contenders": times}]}
    table = table_of(tuning, json.loads((TABLES / "h200_bf16.json").read_text()), benchmark)
    (read,) = [row for row in table["rows"] if row["op"] == "mla_decode"]
    assert read["seconds"] == 1e-4 and read["note"].endswith("ours")


def test_the_forward_pass_of_one_layer_on_one_h200_as_measured():
    """13.7 ms: 8192 tokens, 8 experts of 7168 x 18432, top-2 (results/moe_layer_nvidia_h200.json, 2026-11-24)."""
    model, table = ModelConfig(moe=MoEConfig(num_experts=8, top_k=2)), load_table("h200_moe_ep")
    calls = experts(model, 2 * 8192, 8, BF16) + router(model, 8192)
    assert sum(table.seconds(call, GPUS["h200"]) for call in calls) == pytest.approx(13.69e-3, rel=0.10)
