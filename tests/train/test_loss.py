"""The head's cross-entropy and its gradients against plain differentiation in float32."""

import jax
import jax.numpy as jnp
import pytest

from moe_ep.model.norm import RMSNorm
from moe_ep.train.loss import head_cross_entropy


def _plain(hidden, head, targets):
    logits = jnp.einsum("bsd,dv->bsv", hidden, head, precision="highest")
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("dtype, largest", [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
def test_the_heads_loss_and_gradients_are_those_of_the_plain_expression(dtype, largest):
    keys = jax.random.split(jax.random.key(3), 4)
    hidden = jax.random.normal(keys[0], (2, 5, 32), jnp.float32).astype(dtype)
    head = (0.3 * jax.random.normal(keys[1], (32, 11), jnp.float32)).astype(dtype)
    targets = jnp.array([[0, 10, 3, 3, 9], [10, 0, 1, 2, 10]], jnp.int32)
    weights = jax.random.normal(keys[2], (2, 5), jnp.float32)

    def value_and_gradients(function, hidden, head):
        loss = lambda hidden, head: jnp.sum(weights * function(hidden, head, targets))  # noqa: E731
        return jax.value_and_grad(loss, argnums=(0, 1))(hidden, head)

    loss, gradients = value_and_gradients(head_cross_entropy, hidden, head)
    wide = hidden.astype(jnp.float32), head.astype(jnp.float32)
    expected_loss, expected = value_and_gradients(_plain, *wide)
    assert abs(float(loss - expected_loss)) <= largest * max(abs(float(expected_loss)), 1.0)
    for actual, right, operand in zip(gradients, expected, (hidden, head), strict=True):
        assert actual.dtype == operand.dtype
        error = jnp.linalg.norm(actual.astype(jnp.float32) - right) / jnp.linalg.norm(right)
        assert float(error) < largest


def test_a_norm_keeps_its_input_for_the_backward_pass_and_nothing_wider():
    norm = RMSNorm(32, 1e-6)
    _, pull_back = jax.vjp(norm, jnp.ones((4, 32), jnp.bfloat16))
    kept = [leaf for leaf in jax.tree.leaves(pull_back) if hasattr(leaf, "size") and leaf.size >= 4 * 32]
    assert [leaf.dtype for leaf in kept] == [jnp.bfloat16]
