"""Bytes on one GPU, part by part, each by formula."""

import dataclasses

from moe_ep.config import ModelConfig
from moe_ep.parameter_counts import attention_parameters, mlp_parameters
from moe_ep.cost.units import Number

# Of each trained parameter: float32 master weight and Adam's two moments.
_MASTER_BYTES, _ADAM_BYTES = 4, 8


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """What decides a GPU's memory.

    Attributes:
      layer_share: the share of all layers that a pipeline stage holds (1 / stages).
      slots: experts of one layer on this GPU, replicas counted.
      attention_share: the share of attention's weights on this GPU (1: replicated).
      tokens: tokens in flight on this GPU at once (all micro-batches of a step).
      cached_tokens: tokens whose keys and values stay on this GPU.
      buffer_rows: rows of all (source, destination) buffers in flight, one direction; 0 where nothing is sent.
      expert_rows: rows of the compact buffer that the experts read at once.
      gradient_bytes: of a parameter's gradient; cast_bytes: of its copy in the type of the computation.
      saved_layers: layers of all micro-batches in flight whose activations a training
        step keeps for its backward pass.
      remat: what that pass computes again (ModelConfig.remat), so need not be kept.
    """

    model: ModelConfig
    training: bool
    weight_bytes: int
    cache_bytes: int
    layer_share: Number
    slots: int
    attention_share: Number
    tokens: Number
    cached_tokens: Number
    buffer_rows: Number
    expert_rows: Number
    gradient_bytes: int = 4
    cast_bytes: int = 0
    saved_layers: Number = 0.0
    remat: str = "keep_dispatch"


def parameters_per_gpu(plan: MemoryPlan) -> dict[str, Number]:
    """Returns parameters held by one GPU, by part; embeddings stand on the first and last stage."""
    model, moe = plan.model, plan.model.moe
    expert = mlp_parameters(model.width, moe.hidden, moe.activation)
    layers = plan.layer_share
    norms = 2 * model.width + model.attention.latent_dim + model.attention.query_latent_dim
    return {
        "experts": layers * model.moe_layers * plan.slots * expert,
        "attention": layers * model.layers * attention_parameters(model.width, model.attention) * plan.attention_share,
        "dense": layers * model.dense_layers * mlp_parameters(model.width, model.hidden, model.activation),
        "shared": layers * model.moe_layers * moe.shared_experts * expert,
        "router": layers * model.moe_layers * model.width * moe.num_experts,
        "embedding": (2 if layers == 1 else 1) * model.vocabulary * model.width,
        "norm": layers * model.layers * norms + model.width,
    }


def bytes_per_gpu(plan: MemoryPlan) -> dict[str, Number]:
    """Returns bytes of one GPU by part: weights, gradients, optimizer, kv_cache, activations, buffers."""
    parameters = parameters_per_gpu(plan)
    count = sum(parameters.values())
    small = parameters["router"] + parameters["norm"]  # kept in float32
    inference = (count - small) * plan.weight_bytes + small * 4
    parts = {"weights": count * _MASTER_BYTES if plan.training else inference}
    if plan.training:
        parts["gradients"] = count * plan.gradient_bytes
        parts["optimizer"] = count * _ADAM_BYTES
    attention, layers = plan.model.attention, plan.layer_share * plan.model.layers
    parts["kv_cache"] = plan.cached_tokens * layers * attention.cache_dim * plan.cache_bytes
    parts["buffers"] = _buffers(plan)
    parts["activations"] = _activations(plan, parts["buffers"])
    return parts


def _activations(plan: MemoryPlan, buffers: Number) -> Number:
    """The residual stream, one attention block's inputs, the logits of training, and what it saves of each layer.

    A forward pass alone needs attention's memory and the exchange's in turn, so the larger of both.
    """
    if not plan.training:
        return max(_block(plan) - buffers, plan.tokens * plan.model.width * 2)
    parameters = sum(parameters_per_gpu(plan).values())
    needed = _block(plan) + plan.tokens * plan.model.vocabulary * 4 + saved_bytes(plan)
    if plan.model.unroll:  # a layer's activations go as its gradients come
        needed = max(needed - plan.gradient_bytes * parameters, _block(plan))
    return needed + plan.cast_bytes * parameters


def saved_bytes(plan: MemoryPlan) -> Number:
    """Returns the bytes of activations that a training step keeps for its backward pass."""
    return plan.saved_layers * _SAVED[plan.remat](plan, _block(plan))


def _block(plan: MemoryPlan) -> Number:
    """What attention reads and makes: stream, norm, queries, keys, values, output."""
    attention = plan.model.attention
    heads = attention.heads * (2 * attention.query_dim + 2 * attention.value_dim)
    return plan.tokens * 2 * (4 * plan.model.width + heads + attention.cache_dim)


def _saved_residual(plan: MemoryPlan, block: Number) -> Number:
    """The input of the block."""
    return plan.tokens * plan.model.width * 2


def _saved_rows(plan: MemoryPlan, block: Number) -> Number:
    """Also what crossed the network: received rows and returned results of the MoE layers."""
    share = plan.model.moe_layers / plan.model.layers
    return _saved_residual(plan, block) + share * 2 * plan.buffer_rows * plan.model.width * 2


def _saved_all(plan: MemoryPlan, block: Number) -> Number:
    """Everything: attention's inputs, the rows, and the experts' hidden rows."""
    gate = 2 if plan.model.moe.activation == "silu_gated" else 1
    return block + _saved_rows(plan, block) + plan.expert_rows * (1 + gate) * plan.model.moe.hidden * 2


_SAVED = {"block": _saved_residual, "keep_dispatch": _saved_rows, "none": _saved_all}


def _buffers(plan: MemoryPlan) -> Number:
    """Sent and received rows, the compact rows, their hidden rows and results."""
    model, moe = plan.model, plan.model.moe
    gate = 2 if moe.activation == "silu_gated" else 1
    return 2 * (2 * plan.buffer_rows * model.width + plan.expert_rows * (2 * model.width + gate * moe.hidden))


def total(parts: dict[str, Number]) -> Number:
    """Returns the sum over parts."""
    return sum(parts.values())
