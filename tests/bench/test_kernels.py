"""The benchmarks measure what they say, at tiny sizes, and judge by the goals."""

import itertools
import json
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_ep import mesh
from moe_ep import results
from moe_ep.bench import correctness, energy, kernel_cases, kernels, moe_layer, power, profile, report, timing
from moe_ep.bench.kernel_cases import Case, Goal
from moe_ep.bench.timing import Contender, Times
from moe_ep.config import ClusterConfig, DispatchConfig, MeshConfig
from moe_ep.dispatch import Exchange

PROVENANCE = {
    "kind": "tiny", "device": "cpu", "date": "today", "commit": "none", "versions": {"jax": "0"}, "command": "x",
}  # fmt: skip


def times(seconds):
    return Times(seconds, (seconds, seconds), 3, 3)


def test_samples_are_taken_in_turns():
    launched = []
    contenders = {name: Contender(lambda name=name: launched.append(name), lambda out: out) for name in ("a", "b")}
    measured = timing.measure_in_turns(contenders, samples=4, sample_seconds=0.0)
    calls = measured["a"].calls
    # The first of a turn runs once more before it, untimed.
    for before, *turn in np.reshape(launched[-4 * 3 * calls :], (4, 3, calls)).tolist():
        assert sorted(turn) == [["a"] * calls, ["b"] * calls] and turn[0] == before
    low, high = measured["a"].quartiles
    assert measured["a"].samples == 4 and low <= measured["a"].median <= high


@pytest.mark.parametrize(
    "goal, ours, achieved, met",
    [
        (Goal("speedup", 1.5, ("slow", "fast")), 2.0, 1.5, True),
        (Goal("speedup", 1.5, ("slow",)), 4.0, 1.25, False),
        (Goal("speedup", 1.5, ("absent",)), 4.0, None, None),
        (Goal("bandwidth", 0.9), 1.0, 0.8, False),
        (Goal("time", 1.05, ("fast",)), 3.0, 1.0, True),
        (Goal("time", 1.05, ("fast",)), 3.3, 1.1, False),
    ],
)
def test_goals_are_judged_against_the_fastest_rival_or_the_bandwidth(goal, ours, achieved, met):
    measured = {"ours": times(ours), "fast": times(3.0), "slow": times(5.0)}
    value = kernels.achievement(goal, 8.0, measured, bandwidth=10.0)
    assert value == (None if achieved is None else pytest.approx(achieved))
    assert kernels.is_met(goal, value) is met


def test_a_wrong_output_is_not_timed():
    right, wrong = jnp.ones(4), jnp.array([1.0, 1.0, 1.0, jnp.nan])
    given = {"ours": wrong, "xla": right}
    contenders = {name: kernel_cases.jax_contender(jnp.copy, out) for name, out in given.items()}
    outputs = dict.fromkeys(contenders, lambda out: out)
    case = Case("row", 1.0, 1.0, Goal("speedup", 1.0, ("xla",)), contenders, lambda: right, outputs)
    record = kernels.measure(case, samples=2, sample_seconds=0.0, bandwidth=1.0)
    assert record["contenders"]["ours"] == {"error": float("inf")}
    assert record["contenders"]["xla"]["error"] == 0 and record["achieved"] is None
    assert "wrong" in kernels.as_markdown({**PROVENANCE, "copy_bytes_per_s": {"xla": 1.0}, "rows": [record]})


def test_poison_is_written_where_the_first_output_lay():
    outputs = []
    contender = Contender(lambda: outputs.append(jnp.arange(3.0) + 1.0) or outputs[-1], jax.block_until_ready)
    np.testing.assert_array_equal(correctness.poisoned_call(contender), [1.0, 2.0, 3.0])
    assert [out.is_deleted() for out in outputs] == [True, False]


def test_relative_error_takes_the_worst_of_several_arrays():
    expected = (jnp.array([3.0, 4.0]), jnp.array([1.0]))
    assert correctness.relative_error((expected[0], jnp.array([1.5])), expected) == pytest.approx(0.5)


def test_the_rows_are_those_of_the_goal_table():
    rows = {row for row, _ in kernel_cases.cases(kernel_cases.FULL, seed=0)}
    assert {row.split()[0] for row in rows} == {
        "gemm1_gelu", "mlp_forward", "mlp_forward_backward", "grouped_gelu", "grouped_wgrad", "mlp_decode",
        "mla_decode", "gather", "combine", "half_valid_buffer",
    }  # fmt: skip
    assert {"grouped_gelu G=16", "mla_decode 512+64", "mlp_decode M=64", "gemm1_gelu M=8192"} < rows


def test_rows_run_and_every_contender_is_right(tmp_path):
    chosen = ["grouped_wgrad", "mla", "combine"]
    copies = kernels.copy_bandwidths("tiny", samples=2, sample_seconds=0.0)
    records = kernels.measure_rows("tiny", chosen, seed=3, samples=2, sample_seconds=0.0, bandwidth=copies["xla"])
    result = {**PROVENANCE, "copy_bytes_per_s": copies, "rows": list(records)}
    assert [record["row"].split()[0] for record in result["rows"]] == ["grouped_wgrad", "mla_decode", "combine"]
    for record in result["rows"]:
        assert all(contender["error"] < kernels.LARGEST_ERROR for contender in record["contenders"].values()), record
        assert record["met"] is None and not record["unavailable"]
    paths = results.write(str(tmp_path), report.file_stem("kernels"), result, kernels.as_markdown(result))
    assert [path.name for path in paths] == ["kernels_cpu.json", "kernels_cpu.md"]
    assert len(json.loads(paths[0].read_text())["rows"]) == len(result["rows"])


def test_full_sizes_without_a_gpu_end_with_code_2_and_one_line():
    command, environment = [sys.executable, "-m", "moe_ep.bench.kernels"], {**os.environ, "JAX_PLATFORMS": "cpu"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("moe_ep: --sizes=full: needs a GPU, this is cpu")


def test_the_layer_that_is_measured_is_the_model_s():
    layer = moe_layer.make_layer(moe_layer.SIZES["tiny"], seed=5)
    one = mesh.make_mesh(MeshConfig(1, 1), ClusterConfig(), layer.exchange.experts, jax.local_devices()[:1])
    bias = jnp.zeros(layer.exchange.experts, jnp.float32)

    def model(module, tokens):
        return module(tokens[None], bias, DispatchConfig())[0][0]

    specs = {"mesh": one, "in_specs": mesh.REPLICATED, "out_specs": mesh.REPLICATED, "check_vma": False}
    expected = jax.jit(jax.shard_map(model, **specs))(layer.module, layer.tokens)
    out = jax.jit(moe_layer.whole, static_argnums=0)(layer.exchange, layer.module, layer.tokens)
    assert correctness.relative_error(out, expected) < 1e-2


def test_the_layer_is_measured_whole_and_by_stage(monkeypatch):
    def forward_twice(name, function, exchange, varied, fixed=()):
        forward = kernel_cases.jax_contender(lambda *operands: function(exchange, *operands), *varied, *fixed)
        return {f"{name} forward": forward, f"{name} forward+backward": forward}

    monkeypatch.setattr(moe_layer, "in_both_directions", forward_twice)  # compiling the gradients takes a minute
    result = moe_layer.run(moe_layer.SIZES["tiny"], seed=5, samples=2, sample_seconds=0.0)
    names = {name.split()[0] for name in result["stages"]}
    assert names == {"router", "permute", "experts", "combine"}
    result = {**PROVENANCE, **result, "verdict": moe_layer.judge(result)}
    for verdict in result["verdict"].values():
        assert 0 < verdict["experts_share"] < 1 and verdict["speedup"] is None
    assert "| experts forward+backward |" in moe_layer.as_markdown(result)


def test_both_directions_are_the_output_and_the_gradients_of_what_is_varied():
    exchange = Exchange(experts=1, peers=1, tokens=1, top_k=1)
    x, y = jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])
    made = moe_layer.in_both_directions("product", lambda _, x, y: x * y, exchange, varied=(x,), fixed=(y,))
    out, gradient = made["product forward+backward"].launch()
    np.testing.assert_array_equal(out, made["product forward"].launch())
    np.testing.assert_allclose(gradient / y, jax.random.normal(jax.random.key(1), (2,), jnp.float32), rtol=1e-6)


def test_the_experts_share_and_the_speedup_are_of_the_same_direction():
    ways = ("forward", "forward+backward")
    stages = {f"{stage} {way}": {"seconds": cost} for stage, cost in {"router": 1.0, "experts": 2.0}.items() for way in ways}
    layers = {"ours forward": 2.0, "ours forward+backward": 6.0, "torch forward": 3.0, "torch forward+backward": 6.6}
    verdict = moe_layer.judge({"stages": stages, "times": {name: {"seconds": value} for name, value in layers.items()}})
    assert verdict["forward"]["speedup"] == 1.5 and verdict["forward+backward"]["speedup"] == pytest.approx(1.1)
    np.testing.assert_allclose(verdict["forward"]["experts_share"], 2 / 3)


def test_a_profile_names_kernels_by_the_scopes_that_made_them():
    text = "\n".join([
        "%fused (p: f32[]) -> f32[] {", '  ROOT %call.1 = f32[] custom-call(p), metadata={op_name="jit(step)/jvp(moe)/experts/x"}', "}",
        "ENTRY %main (p: f32[]) -> f32[] {", "  %slice_fusion.2 = f32[] fusion(p), kind=kCustom, calls=%fused",
        '  %reduce.3 = f32[] reduce(p), metadata={op_name="jit(step)/transpose(jvp(moe))/while/body/router/reduce_sum"}', "}",
    ])  # fmt: skip
    names = profile.op_names_of(text)
    assert profile.scope_of(names["slice_fusion.2"]) == "moe/experts"
    assert profile.scope_of(names["reduce.3"]) == "backward/moe/router"
    kernels = [
        profile.Kernel("a.1", "moe", 1.0, 1.0), profile.Kernel("b.7", "", 2.0, 1.0), profile.Kernel("b.8", "", 0.5, 1.0),
        profile.Kernel("c", "moe", 0.25, 2.0),
    ]  # fmt: skip
    assert profile.by_scope(kernels) == {"b": 2.5, "moe": 1.25}


def test_watts_are_between_renewals_of_the_counter_and_the_opening_reading_is_none():
    assert energy.watts([(0.0, 5.0), (0.07, 10.0), (0.17, 80.0), (0.27, 150.0)]) == pytest.approx(700.0)
    assert energy.watts([(0.0, 5.0), (0.07, 10.0), (0.17, 80.0)]) is None


def test_joules_of_a_call_are_shown_where_a_counter_is(monkeypatch):
    contenders = {"ours": Contender(lambda: time.sleep(0.01), lambda out: out)}
    assert energy.measure(contenders, {"ours": times(0.01)}) == {}  # no GPU here
    for visible, first in ((None, "0"), ("", "0"), ("3,1", "3"), ("GPU-8a56, GPU-11", "GPU-8a56")):
        with monkeypatch.context() as patch:
            patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
            if visible is not None:
                patch.setenv("CUDA_VISIBLE_DEVICES", visible)
            assert power.first_gpu() == first
    monkeypatch.setattr(energy, "counter", lambda: itertools.count().__next__)  # another joule with every reading
    monkeypatch.setattr(energy, "_SECONDS", 0.05)
    measured = {"ours": {"error": 0.0, "seconds": 2.0, "spread": 0.0, "flops_per_s": 5e12, "bytes_per_s": 0.0}}
    assert energy.measure(contenders, {"ours": times(0.01)})["ours"] > 0
    assert kernels._cell(measured["ours"] | {"joules": 20.0}) == "2000.000 ±0.0%, 5 TF, 2 pJ/FLOP, error 0.0e+00"
    assert kernels._cell(measured["ours"]) == "2000.000 ±0.0%, 5 TF, error 0.0e+00"


def test_power_samples_that_are_cut_short_are_left_out():
    lines = "650.1, 700.00, 1500, 1980, 60, 0x0000000000000004\n690.3, 700.00, 1700, 1980, 62, 0x0\n[N/A], 700, 1\n640.0, 70"
    summary = power.summarize(lines)
    assert summary["samples"] == 2 and summary["capped"] == 0.5
    assert summary["watts"] == pytest.approx(670.2) and summary["sm_mhz"] == 1600 and summary["limit_watts"] == 700
    assert power.summarize("") == {} and power.as_text({}) == ""
