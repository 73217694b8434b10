"""Next-token cross-entropy of one device's tokens, and what the routed layers counted."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32, Int32

from moe_ep.config import DispatchConfig
from moe_ep.model.moe import MoEReport
from moe_ep.model.transformer import Transformer
from moe_ep.shapes import Activations, Scalar, Tokens


class LossReport(NamedTuple):
    """Sums over one device's tokens, and its MoE layers' reports stacked over layers."""

    cross_entropy: Scalar
    layers: MoEReport


@jax.custom_vjp
def head_cross_entropy(
    hidden: Activations, head: Float[Array, "D V"], targets: Tokens
) -> Float32[Array, "b s"]:
    """Returns the cross-entropy of softmax(hidden @ head) at each position, in nats.

    Logits and losses are float32. The logits' gradient is made in one pass and rounded to
    hidden's type, so that both of the head's gradients are products of that type:
    differentiating the plain expression multiplies in float32, at half the speed or less.

    Args:
      hidden: of the last norm, in the type of the computation.
      head: of hidden's type.
      targets: the token to predict at each position.
    """
    return _head_cross_entropy_forward(hidden, head, targets)[0]


def _head_cross_entropy_forward(hidden, head, targets):
    with jax.named_scope("head"):
        logits = jnp.einsum("bsd,dv->bsv", hidden, head, preferred_element_type=jnp.float32)
        log_partition = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return log_partition - chosen, (hidden, head, targets, logits, log_partition)


def _head_cross_entropy_backward(saved, gradient):
    hidden, head, targets, logits, log_partition = saved
    with jax.named_scope("head"):
        # A comparison with every index, not a scatter: it joins the pass that makes the softmax.
        is_target = targets[..., None] == jnp.arange(logits.shape[-1], dtype=targets.dtype)[None, None, :]
        softmax = jnp.exp(logits - log_partition[..., None])
        d_logits = (gradient[..., None] * (softmax - is_target.astype(jnp.float32))).astype(hidden.dtype)
        d_hidden = jnp.einsum("bsv,dv->bsd", d_logits, head)
        d_head = jnp.einsum("bsd,bsv->dv", hidden, d_logits)
    return d_hidden, d_head, None


head_cross_entropy.defvjp(_head_cross_entropy_forward, _head_cross_entropy_backward)


def local_loss(
    model: Transformer,
    tokens: Int32[Array, "b s1"],
    bias: Float32[Array, "L E"],
    replay: Int32[Array, "L t K"] | None,
    *,
    dispatch: DispatchConfig,
    global_tokens: int,
    z_loss: float,
) -> tuple[Scalar, LossReport]:
    """Returns this device's share of the global mean loss: summed over devices it is the loss.

    Args:
      model: on this device.
      tokens: sequences with one token more than the model sees; targets are shifted by one.
      bias: the balance bias of every MoE layer.
      replay: router choices to use instead of the routers' own.
      dispatch: how rows travel, and the waves of this program.
      global_tokens: targets of the whole batch on all devices.
      z_loss: weight of mean logsumexp(router logits)^2 (ST-MoE, arXiv:2202.08906).
    """
    hidden, layers = model(tokens[:, :-1], bias, dispatch, replay)
    head = model.head[...].astype(hidden.dtype)
    total = jnp.sum(head_cross_entropy(hidden, head, tokens[:, 1:]))
    loss = (total + z_loss * jnp.sum(layers.z_loss)) / global_tokens
    return loss, LossReport(total, layers)
