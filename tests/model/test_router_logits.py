"""The router's product of BF16 tokens against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_ep.model.router_logits import logits_of


def operands(tokens, width, experts, dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (tokens, width), dtype)
    matrix = jax.random.normal(keys[1], (width, experts), jnp.float32)
    return x, matrix, jax.random.normal(keys[2], (tokens, experts), jnp.float32)


def double(values):
    return np.asarray(values.astype(jnp.float32), np.float64)


def error(actual, expected):
    return np.linalg.norm(double(actual) - expected) / np.linalg.norm(expected)


# Few rows of a width in pieces, few of another width, many rows; fewer than pay for taking the weights apart.
@pytest.mark.parametrize(("tokens", "width", "experts"), [(16, 256, 8), (12, 96, 5), (4096, 64, 16), (4, 256, 8)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_products_are_float32(dtype, tokens, width, experts):
    x, matrix, gradient = operands(tokens, width, experts, dtype)
    logits, pull_back = jax.jit(lambda *operands: jax.vjp(logits_of, *operands))(x, matrix)
    d_x, d_matrix = jax.jit(pull_back)(gradient)
    assert (logits.dtype, d_x.dtype, d_matrix.dtype) == (jnp.float32, dtype, jnp.float32)
    assert error(logits, double(x) @ double(matrix)) < 1e-6
    assert error(d_matrix, double(x).T @ double(gradient)) < 1e-6
    # Rounded once, to the tokens' type.
    expected = double(gradient) @ double(matrix).T
    exact = jnp.asarray(expected, jnp.float32).astype(dtype)
    assert error(d_x, expected) < 1.01 * error(exact, expected) + 1e-6


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_weights_that_devices_share_get_the_sum_of_their_gradients(dtype):
    x, matrix, gradient = operands(32, 256, 8, dtype)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))

    def on_device(x, matrix, gradient):
        return jax.vjp(lambda matrix: logits_of(x, matrix), matrix)[1](gradient)[0]

    specs = (P("data"), P(), P("data"))
    d_matrix = jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=P()))(x, matrix, gradient)
    assert error(d_matrix, double(x).T @ double(gradient)) < 1e-6
