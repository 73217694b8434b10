"""Memory: the reference experiment's own arithmetic, part by part."""

import dataclasses

import pytest

from moe_ep.config import ModelConfig, MoEConfig
from moe_ep.cost.memory import MemoryPlan, bytes_per_gpu, parameters_per_gpu

PLAN = MemoryPlan(
    model=ModelConfig(moe=MoEConfig(num_experts=128)), training=False, weight_bytes=2, cache_bytes=2, layer_share=1,
    slots=1, attention_share=1, tokens=0, cached_tokens=0, buffer_rows=0, expert_rows=0,
)  # fmt: skip


def test_weights_of_one_expert_per_gpu():
    gigabytes = {part: 2 * count / 1e9 for part, count in parameters_per_gpu(PLAN).items()}
    assert gigabytes["experts"] == pytest.approx(30.65, abs=0.01)
    assert gigabytes["attention"] == pytest.approx(21.06, abs=0.01)
    assert gigabytes["dense"] == pytest.approx(1.59, abs=0.01)
    assert gigabytes["embedding"] == pytest.approx(1.44, abs=0.01)


def test_the_cache_holds_3600_values_a_token_and_layer():
    cached = dataclasses.replace(PLAN, cached_tokens=8192)
    assert bytes_per_gpu(cached)["kv_cache"] == 8192 * 61 * 3600 * 2


def test_training_holds_sixteen_bytes_a_parameter():
    parts = bytes_per_gpu(dataclasses.replace(PLAN, training=True))
    count = sum(parameters_per_gpu(PLAN).values())
    assert parts["weights"] + parts["gradients"] + parts["optimizer"] == 16 * count


def test_splitting_leaves_less():
    whole, split = bytes_per_gpu(PLAN), bytes_per_gpu(dataclasses.replace(PLAN, attention_share=1 / 8))
    assert whole["weights"] - split["weights"] == pytest.approx(21.06e9 * 7 / 8, rel=1e-3)
