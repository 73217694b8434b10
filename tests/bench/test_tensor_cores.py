"""The kernel that measures the tensor cores' ceiling does multiply, stage after stage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_ep.bench import tensor_cores
from moe_ep.kernels import device

STAGES, COLUMNS, STEPS = 2, 128, 5


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
    for block in np.asarray(out, np.float64):
        assert np.linalg.norm(block - expected) <= 5e-3 * np.linalg.norm(expected)


def test_flops_are_those_of_the_product_that_is_imitated():
    tiles = tensor_cores.tiles_of(2.0 * 4096 * 7168 * 18432, depth=7168)
    assert tiles == 18  # 2304 tiles of 128 x 256 on 132 multiprocessors
    assert tensor_cores.resident_flops(7168, tiles) == 2.0 * (18 * 132 * 128) * 256 * 7168
