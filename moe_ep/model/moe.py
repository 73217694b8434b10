"""Feed-forward layers: the dense MLP, and the routed layer."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from moe_ep.config import Activation, DispatchConfig, MoEConfig
from moe_ep.dispatch import DispatchCounts, Exchange, count_experts, exchange_rows, make_exchange
from moe_ep.kernels.grouped_matmul import ExpertWeights, RowGroups, expert_mlp, one_group
from moe_ep.mesh import EXPERT
from moe_ep.model.parameter import matrix
from moe_ep.model.router import Router, Routing
from moe_ep.shapes import Activations, Choices, ExpertCounts, Mask, RouterBias, Rows, Scalar, TokenRows


class MoEReport(NamedTuple):
    """What one routed layer counts on one device, and what it chose."""

    dispatch: DispatchCounts
    expert_counts: ExpertCounts  # assignments of this device's tokens, before any drop
    choices: Choices
    z_loss: Scalar  # sum over this device's tokens of logsumexp(logits)^2


class DenseMLP(nnx.Module):
    """A feed-forward layer that every token meets, without biases."""

    def __init__(
        self,
        key: Array,
        width: int,
        hidden: int,
        activation: Activation,
        *,
        dtype: jnp.dtype,
        output_scale: float,
    ):
        self.activation, self.dtype = activation, dtype
        keys = jax.random.split(key, 3)
        self.w_in = matrix(keys[0], (width, hidden), (None, None), fan_in=width)
        self.w_out = matrix(keys[1], (hidden, width), (None, None), fan_in=hidden, scale=output_scale)
        if activation == "silu_gated":
            self.w_gate = matrix(keys[2], (width, hidden), (None, None), fan_in=width)

    def __call__(self, x: Activations) -> Activations:
        gate = self.w_gate[...].astype(self.dtype)[None] if self.activation == "silu_gated" else None
        weights = ExpertWeights(self.w_in[...].astype(self.dtype)[None], self.w_out[...].astype(self.dtype)[None], gate)
        rows = x.reshape(-1, x.shape[-1])
        groups = one_group(rows.shape[0], tile=rows.shape[0])
        return expert_mlp(rows, weights, groups, activation=self.activation).reshape(x.shape)


class Experts(nnx.Module):
    """This device's experts of one layer; the expert axis splits the layer's."""

    def __init__(self, key: Array, width: int, config: MoEConfig, *, dtype: jnp.dtype, output_scale: float):
        self.activation, self.dtype = config.activation, dtype
        self.implementation = None if config.implementation == "auto" else config.implementation
        keys = jax.random.split(key, 3)
        experts, hidden, axes = config.num_experts, config.hidden, (EXPERT, None, None)
        self.w_in = matrix(keys[0], (experts, width, hidden), axes, fan_in=width)
        self.w_out = matrix(keys[1], (experts, hidden, width), axes, fan_in=hidden, scale=output_scale)
        if config.activation == "silu_gated":
            self.w_gate = matrix(keys[2], (experts, width, hidden), axes, fan_in=width)

    def __call__(self, rows: Rows, groups: RowGroups) -> Rows:
        gate = self.w_gate[...].astype(self.dtype) if self.activation == "silu_gated" else None
        weights = ExpertWeights(self.w_in[...].astype(self.dtype), self.w_out[...].astype(self.dtype), gate)
        with jax.named_scope("experts"):
            return expert_mlp(rows, weights, groups, activation=self.activation, implementation=self.implementation)


class MoE(nnx.Module):
    """The routed layer: router, dispatch to the experts' devices, experts, combine; shared experts beside them."""

    def __init__(
        self,
        key: Array,
        width: int,
        config: MoEConfig,
        *,
        dtype: jnp.dtype,
        output_scale: float,
    ):
        self.config = config
        keys = jax.random.split(key, 3)
        self.router = Router(keys[0], width, config)
        self.experts = Experts(keys[1], width, config, dtype=dtype, output_scale=output_scale)
        if config.shared_experts:
            hidden = config.shared_experts * config.hidden
            self.shared = DenseMLP(
                keys[2], width, hidden, config.activation, dtype=dtype, output_scale=output_scale
            )

    def __call__(
        self,
        x: Activations,
        bias: RouterBias,
        dispatch: DispatchConfig,
        replay: Choices | None = None,
        valid: Mask | None = None,
    ) -> tuple[Activations, MoEReport]:
        """Routes this device's tokens through the whole layer's experts.

        Args:
          x: this device's tokens.
          bias: the balance bias, used for the choice only.
          dispatch: how rows travel, and the waves of this program.
          replay: choices to use instead of the router's own.
          valid: the tokens that are some; the others are sent nowhere and not counted. None: all.
        """
        tokens = x.reshape(-1, x.shape[-1])
        routing = self.route(tokens, bias, replay)
        if valid is not None:
            nowhere = jnp.int32(self.config.num_experts)
            routing = routing._replace(choices=jnp.where(valid.reshape(-1, 1), routing.choices, nowhere))
        exchange = self.exchange(tokens.shape[0], dispatch)
        combined, counts = exchange_rows(tokens, routing.choices, routing.weights, self.experts, exchange)
        output = combined.reshape(x.shape)
        if self.config.shared_experts:
            output = output + self.share(x)
        return output, self.report(routing, counts)

    def exchange(self, tokens: int, dispatch: DispatchConfig) -> Exchange:
        """Returns the static sizes of an exchange of so many tokens on each device."""
        return make_exchange(
            dispatch,
            experts=self.config.num_experts,
            peers=jax.lax.axis_size(EXPERT),
            tokens=tokens,
            top_k=self.config.top_k,
        )

    def route(self, tokens: TokenRows, bias: RouterBias, replay: Choices | None = None) -> Routing:
        """Returns each token's experts and their weights."""
        with jax.named_scope("router"):
            return self.router(tokens, bias, replay)

    def share(self, x: Activations) -> Activations:
        """Returns the output of the experts that every token meets."""
        with jax.named_scope("shared_experts"):
            return self.shared(x)

    def report(self, routing: Routing, counts: DispatchCounts) -> MoEReport:
        """Returns what one exchange counted and chose."""
        log_partition: Float[Array, "t"] = jax.scipy.special.logsumexp(routing.logits, axis=-1)
        return MoEReport(
            dispatch=counts,
            expert_counts=count_experts(routing.choices, self.config.num_experts),
            choices=routing.choices,
            z_loss=jnp.sum(log_partition**2),
        )
