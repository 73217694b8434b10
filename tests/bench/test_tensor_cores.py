"""The kernel that measures the tensor cores' ceiling does multiply, stage after stage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_ep.bench import kernels, tensor_cores
from moe_ep.kernels import device

STAGES, COLUMNS, STEPS = 2, 128, 5
PROVENANCE = {
    "kind": "measured", "device": "x", "date": "today", "commit": "none", "versions": {"jax": "0"}, "command": "x",
}  # fmt: skip


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(device, "multiprocessors", lambda: 2)
    if jax.__version_info__ < (0, 11):
        from jax._src.pallas.mosaic_gpu.interpret import params
    else:
        from jax.experimental.pallas import mosaic_gpu as params
    with params.force_gpu_interpret_mode(params.InterpretGPUParams(detect_races=True)):
        yield


def test_resident_products_are_the_sum_over_the_stages_in_turn(interpreted):
    x = jax.random.normal(jax.random.key(0), (STAGES, 128, 64), jnp.bfloat16)
    w = jax.random.normal(jax.random.key(1), (STAGES, 64, COLUMNS), jnp.bfloat16)
    out = jax.jit(lambda x, w: tensor_cores.resident_products(x, w, depth=STEPS * 64, tiles=2))(x, w)
    by_stage = np.einsum("smk,skn->smn", *(np.asarray(operand, np.float64) for operand in (x, w)))
    expected = sum(by_stage[step % STAGES] for step in range(STEPS))
    np.testing.assert_allclose(tensor_cores.expected_block(x, w, STEPS * 64), expected, rtol=1e-4, atol=1e-3)
    for block in np.asarray(out, np.float64):
        assert np.linalg.norm(block - expected) <= 5e-3 * np.linalg.norm(expected)


def test_no_ceiling_is_made_up_where_there_is_no_hopper():
    assert tensor_cores.ceiling(seed=0) == {}


def test_shares_of_the_ceiling_stand_beside_rates_that_compute_bounds():
    ceiling = {"flops_per_s": 8e14, "seconds": 1e-3, "spread": 0.01, "flops": 8e11, "error": 1e-3, "power": {}, "joules": 0.7}
    row = {"contenders": {"ours": {"flops_per_s": 6e14}}, "goal": {"kind": "speedup"}}
    assert kernels.share_of_ceiling(row, ceiling) == pytest.approx(0.75)
    assert kernels.share_of_ceiling(row, {}) is None
    assert kernels.share_of_ceiling(row | {"goal": {"kind": "bandwidth"}}, ceiling) is None
    assert kernels.share_of_ceiling(row | {"contenders": {"ours": {"error": 1.0}}}, ceiling) is None
    text = kernels.as_markdown(PROVENANCE | {"copy_bytes_per_s": {"xla": 1.0}, "rows": [], "ceiling": ceiling})
    assert "800 TF ±1.0%, 0.875 pJ/FLOP" in text
