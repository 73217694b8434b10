"""The calls that are timed for the simulator's table: their work is what the simulator charges for them."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_ep.bench import calls
from moe_ep.config import AttentionConfig, ModelConfig
from moe_ep.cost.work import attention_core, backward
from tests.bench.test_kernels import PROVENANCE

TINY = calls.SIZES["tiny"]


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [*calls.measure(TINY, seed=1, samples=2, sample_seconds=0.0)]


def test_every_operation_of_a_step_has_a_row_that_the_table_shows(rows):
    assert {row["op"] for row in rows} == {"attention", "attention_masked", "attention_backward", "gemm", "grouped_gemm",
                                           "memory", "update"}  # fmt: skip
    assert calls.as_markdown(PROVENANCE | {"rows": rows}).count("\n|") == len(rows) + 2
    assert all(row["seconds"] > 0 and row["bytes"] > 0 for row in rows)


def test_attention_does_what_the_simulator_charges():
    model = ModelConfig(attention=AttentionConfig(heads=TINY.heads, nope_dim=6, rope_dim=2, value_dim=8, latent_dim=4))
    charged = attention_core(model, TINY.tokens, 8, tp=1, value_dim=8)
    timed = calls.attention(TINY, 8, 8, 0.5)
    assert (charged.op, charged.flops, charged.bytes, charged.shape) == (timed.op, timed.flops, timed.bytes, timed.shape)
    assert backward([charged])[0] == calls.attention(TINY, 8, 8, 0.5, backward=True)


def test_groups_are_even_and_start_at_tiles():
    gelu, plain = calls._groups(TINY, 0, 8)
    assert gelu.work.shape == (8, TINY.width, TINY.hidden, TINY.groups)
    assert plain.work.shape == (8, TINY.hidden, TINY.width, TINY.groups)
    assert all(bool(jnp.isfinite(call.contender.launch().astype(jnp.float32)).all()) for call in (gelu, plain))


def test_adam_moves_weights_against_the_gradient_and_keeps_moments():
    weights, mean, square = calls._adam(*(jnp.zeros(4, jnp.float32),) * 3, jnp.ones(4, jnp.bfloat16))
    assert np.all(weights < 0)
    np.testing.assert_allclose(mean, 0.1, rtol=1e-5)
    np.testing.assert_allclose(square, 0.05, rtol=1e-5)
