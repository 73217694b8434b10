"""Next-token cross-entropy of one device's tokens, and what the routed layers counted."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float32, Int32

from moe_ep.config import DispatchConfig
from moe_ep.model.moe import MoEReport
from moe_ep.model.transformer import Transformer
from moe_ep.shapes import Logits, Scalar, Tokens


class LossReport(NamedTuple):
    """Sums over one device's tokens, and its MoE layers' reports stacked over layers."""

    cross_entropy: Scalar
    layers: MoEReport


def cross_entropy(logits: Logits, targets: Tokens) -> Float32[Array, "b s"]:
    """Returns each position's cross-entropy in nats."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


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
    total = jnp.sum(cross_entropy(model.logits(hidden), tokens[:, 1:]))
    loss = (total + z_loss * jnp.sum(layers.z_loss)) / global_tokens
    return loss, LossReport(total, layers)
