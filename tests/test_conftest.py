"""The strictness that tests/conftest.py promises is really on."""

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from moe_ep import parameter_counts


def test_128_cpu_devices_are_emulated():
    assert [device.platform for device in jax.devices()] == ["cpu"] * 128


def test_dtypes_do_not_promote():
    with pytest.raises(jax.dtypes.TypePromotionError):
        jnp.ones(2, jnp.bfloat16) + jnp.ones(2, jnp.float32)


def test_ranks_do_not_promote():
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((2, 3)) + jnp.ones(3)


def test_annotations_of_moe_ep_are_checked():
    with pytest.raises(jaxtyping.TypeCheckError, match="width"):
        parameter_counts.mlp_parameters(width="wide", hidden=8, activation="gelu")
