"""What published training recipes do in a backward pass beside its products; `moe_ep.cost.program` has this project's."""

import dataclasses

from moe_ep.config import ModelConfig
from moe_ep.parameter_counts import attention_parameters, mlp_parameters
from moe_ep.cost.kernels import Work, gemm, memory_pass
from moe_ep.cost.units import Number


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a published system trains.

    Attributes:
      gradient_bytes: of a weight's gradient, which every micro-batch is added to.
      requantised: FP8 products of gradients take their operands in tiles along the other axis.
      recomputed: norms and MLA's up-projections are computed again in the backward pass.
    """

    gradient_bytes: int
    requantised: bool
    recomputed: bool


# arXiv:2412.19437: section 3.2.3 recomputes RMSNorm and MLA's up-projections; 3.3.1 and 3.3.3 keep weight gradients, into
# which a batch is accumulated, in FP32; 3.3.2 and 3.5.2 quantise in 1x128 tiles, in 128x1 for the weights' gradients.
DEEPSEEK = Recipe(gradient_bytes=4, requantised=True, recomputed=True)
# Megatron-LM accumulates into main gradients in FP32 (accumulate_allreduce_grads_in_fp32).
MEGATRON_BF16 = Recipe(gradient_bytes=4, requantised=False, recomputed=False)

_WRITTEN = 2  # bytes of a BF16 gradient, which the product's own bytes have


def attention_backward(recipe: Recipe, model: ModelConfig, tokens: Number, tp: int) -> list[Work]:
    """Returns what a layer's attention does more in its backward pass."""
    attention, width, heads = model.attention, model.width, model.attention.heads / tp
    query_input = attention.query_latent_dim or width
    queries, values = heads * attention.query_dim, heads * attention.value_dim
    expanded = heads * (attention.nope_dim + attention.value_dim)
    calls = [_accumulated(recipe, attention_parameters(width, attention) / tp)]
    if recipe.requantised:
        inputs = width + attention.query_latent_dim + attention.latent_dim + values
        outputs = attention.query_latent_dim + queries + attention.cache_dim + expanded + width
        calls.append(memory_pass(tokens * (inputs * _TURNED + outputs * _BOTH_WAYS)))
    if recipe.recomputed:
        calls += [gemm(tokens, query_input, queries, "fp8"), gemm(tokens, attention.latent_dim, expanded, "fp8")]
        calls.append(memory_pass(2 * tokens * width * 2 * 2))  # two norms
    return calls


def experts_backward(recipe: Recipe, model: ModelConfig, rows: Number, groups: Number) -> list[Work]:
    """Returns what `groups` experts do more in their backward pass on so many rows.

    Rows of both directions cross the network in FP8 and are turned; the activation's
    gradient pass writes its results in both layouts, of which one is counted with it.
    """
    moe, width = model.moe, model.width
    calls = [_accumulated(recipe, groups * mlp_parameters(width, moe.hidden, moe.activation))]
    if recipe.requantised:
        calls.append(memory_pass(rows * (2 * width * _TURNED + moe.hidden)))
    return calls


# FP8 read and written along the other axis; BF16 read and written in FP8 along both.
_TURNED, _BOTH_WAYS = 1 + 1, 2 + 1 + 1


def _accumulated(recipe: Recipe, parameters: Number) -> Work:
    """Sums read and written where the product alone writes a BF16 gradient."""
    return memory_pass(parameters * (2 * recipe.gradient_bytes - _WRITTEN))
