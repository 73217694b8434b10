"""Published training recipes: passes counted by hand on a small model."""

import dataclasses

from moe_ep.config import AttentionConfig, ModelConfig, MoEConfig
from moe_ep.cost.recipe import DEEPSEEK, MEGATRON_BF16, attention_backward, experts_backward

MODEL = ModelConfig(
    width=16,
    attention=AttentionConfig(heads=2, nope_dim=4, rope_dim=2, value_dim=3, latent_dim=8, query_latent_dim=5),
    moe=MoEConfig(num_experts=4, hidden=32, activation="silu_gated"),
)


def test_every_recipe_adds_up_gradients_in_float32():
    (only,) = experts_backward(MEGATRON_BF16, MODEL, rows=100, groups=2)
    assert (only.op, only.bytes) == ("memory", 2 * 3 * 16 * 32 * (4 + 4 - 2))  # read and written, less the BF16 write
    assert len(attention_backward(MEGATRON_BF16, MODEL, tokens=10, tp=1)) == 1


def test_fp8_operands_are_written_along_both_axes():
    _, turned = experts_backward(DEEPSEEK, MODEL, rows=100, groups=2)
    assert turned.bytes == 100 * (2 * 16 * 2 + 32)
    _, turned, *_ = attention_backward(DEEPSEEK, MODEL, tokens=10, tp=1)
    inputs, outputs = 16 + 5 + 8 + 2 * 3, 5 + 2 * 6 + (8 + 2) + 2 * (4 + 3) + 16
    assert turned.bytes == 10 * (2 * inputs + 4 * outputs)


def test_up_projections_are_computed_again():
    *_, queries, expanded, norms = attention_backward(DEEPSEEK, MODEL, tokens=10, tp=1)
    assert queries.shape == (10, 5, 12, 1) and expanded.shape == (10, 8, 14, 1)
    assert norms.bytes == 2 * 10 * 16 * 4
    kept = attention_backward(dataclasses.replace(DEEPSEEK, recomputed=False), MODEL, tokens=10, tp=1)
    assert not any(call.flops for call in kept)
