"""What a layer does on one GPU: lists of kernel calls, forward and backward, by phase."""

import dataclasses

from moe_ep.config import AttentionConfig, ModelConfig
from moe_ep.cost.kernels import Work, gemm, memory_pass, row_gather
from moe_ep.cost.units import Number


@dataclasses.dataclass(frozen=True)
class Precision:
    """Types of products and of rows on the network, in bytes a value where they travel or are kept."""

    gemm: str = "bf16"  # "fp8": products of weights in FP8 with BF16 outputs
    weight_bytes: int = 2
    cache_bytes: int = 2
    dispatch_bytes_per_value: Number = 2.0
    combine_bytes_per_value: Number = 2.0


BF16 = Precision()
# FP8 rows carry one float32 scale for every 128 values (DeepSeek-V3 report, section 3.3.2).
FP8 = Precision("fp8", 1, 2, 1 + 4 / 128, 2.0)


def attention_prefill(
    model: ModelConfig, tokens: Number, context: Number, precision: Precision, tp: int, value_dim: int | None = None,
    paged_keys: int = 0,
) -> list[Work]:
    """Returns the forward calls of one layer's attention over whole sequences of `context` tokens, causal.

    Args:
      value_dim: of a head as the fused attention computes it, where that pads values.
      paged_keys: what a sequence's pages hold, where keys are expanded from them and masked; 0: its own tokens.
    """  # fmt: skip
    attention, width = model.attention, model.width
    heads, expanded = attention.heads / tp, expanded_rows(tokens, context, paged_keys)
    calls = _query(attention, width, tokens, heads, precision)
    calls.append(gemm(tokens, width, attention.cache_dim, precision.gemm))
    up = heads * (attention.nope_dim + attention.value_dim)
    calls.append(gemm(expanded, attention.latent_dim, up, precision.gemm))
    core = masked_core if paged_keys else attention_core
    calls.append(core(model, tokens, paged_keys or context, tp, value_dim or attention.value_dim))
    calls.append(gemm(tokens, heads * attention.value_dim, width, precision.gemm))
    # Queries and keys are put together with their rotary parts; norm, residual and quantised inputs.
    assembled = (tokens + expanded) * heads * attention.query_dim * 2 * 2
    return calls + [memory_pass(assembled), block_pass(model, tokens)]


def expanded_rows(tokens: Number, context: Number, paged_keys: int) -> Number:
    """Returns the rows that keys and values are made of: the tokens, or all that their sequences' pages hold."""
    return tokens / context * paged_keys if paged_keys else tokens


def attention_core(model: ModelConfig, tokens: Number, context: Number, tp: int, value_dim: int) -> Work:
    """Returns the scores and values of causal attention."""
    attention = model.attention
    head, heads = attention.query_dim + value_dim, attention.heads / tp
    flops = 2 * tokens * heads * head * context / 2
    return Work("attention", "bf16", flops, 2 * tokens * heads * (2 * head), (context, head / 2))


def masked_core(model: ModelConfig, tokens: Number, keys: Number, tp: int, value_dim: int) -> Work:
    """Returns the scores and values of each token with all keys, those that its mask hides too."""
    causal = attention_core(model, tokens, keys, tp, value_dim)
    return dataclasses.replace(causal, flops=2 * causal.flops)


def attention_decode(
    model: ModelConfig, tokens: Number, verified: int, context: Number, precision: Precision, tp: int
) -> list[Work]:
    """Returns the calls of one layer's absorbed attention for `verified` new tokens of each sequence."""
    attention, width = model.attention, model.width
    heads = attention.heads / tp
    calls = _query(attention, width, tokens, heads, precision)
    calls.append(gemm(tokens, width, attention.cache_dim, precision.gemm))
    calls.append(_absorbed(tokens, attention.nope_dim, attention.latent_dim, heads))
    calls.append(_decode_core(attention, tokens / verified, context, heads * verified, precision))
    calls.append(_absorbed(tokens, attention.latent_dim, attention.value_dim, heads))
    calls.append(gemm(tokens, heads * attention.value_dim, width, precision.gemm))
    return calls + [block_pass(model, tokens)]


def _query(attention: AttentionConfig, width: int, tokens: Number, heads: Number, precision: Precision) -> list[Work]:
    if not attention.query_latent_dim:
        return [gemm(tokens, width, heads * attention.query_dim, precision.gemm)]
    latent = attention.query_latent_dim
    return [
        gemm(tokens, width, latent, precision.gemm),
        gemm(tokens, latent, heads * attention.query_dim, precision.gemm),
    ]


def _absorbed(tokens: Number, k: Number, n: Number, heads: Number) -> Work:
    """One [tokens, k] x [k, n] product per head, in BF16: streaming of weights, like a grouped product."""
    touched = 2 * heads * (k * n + tokens * (k + n))
    return Work("grouped_gemm", "bf16", 2 * heads * tokens * k * n, touched, (tokens, k, n, heads))


def _decode_core(
    attention: AttentionConfig, sequences: Number, context: Number, heads: Number, precision: Precision
) -> Work:
    flops = 2 * sequences * context * heads * (attention.cache_dim + attention.latent_dim)
    touched = sequences * context * attention.cache_dim * precision.cache_bytes
    return Work("mla_decode", "bf16", flops, touched, (sequences, context, heads, attention.cache_dim))


def block_pass(model: ModelConfig, tokens: Number) -> Work:
    """Returns the passes over the residual stream of half a block: norm (read, write), add (2 reads, write)."""
    return memory_pass(tokens * model.width * 2 * 5)


def experts(
    model: ModelConfig, rows: Number, groups: Number, precision: Precision, travelled: bool = True
) -> list[Work]:
    """Returns the calls of the experts of one GPU on `rows` rows spread evenly over `groups` of them.

    travelled: whether rows came from elsewhere; if not, the weighted sum reads results where they are.
    """
    moe, width = model.moe, model.width
    calls = mlp(width, moe.hidden, moe.activation == "silu_gated", rows, groups, precision)
    # Rows are brought into the experts' order (read, write), and results back into that of the senders.
    moved = rows * width * 2 * (precision.dispatch_bytes_per_value + (2 if travelled else 0))
    return calls + [row_gather(moved)]


def mlp(width: int, hidden: int, gated: bool, rows: Number, groups: Number, precision: Precision) -> list[Work]:
    """Returns the two products of `groups` feed-forward layers and the activation's pass where it is not fused."""
    up = hidden * (2 if gated else 1)
    each = rows / groups
    calls = [gemm(each, width, up, precision.gemm, groups), gemm(each, hidden, width, precision.gemm, groups)]
    if gated:
        calls.append(memory_pass(rows * (2 * up + precision.weight_bytes * hidden)))
    return calls


def router(model: ModelConfig, tokens: Number) -> list[Work]:
    """Returns the router's product (float32 on few columns: bound by memory) and the weighted sum of the results."""
    moe, width = model.moe, model.width
    scores = memory_pass(tokens * (width * 2 + moe.num_experts * 4) + width * moe.num_experts * 4)
    combine = row_gather(tokens * width * 2 * (moe.top_k + 1))
    return [scores, combine]


def shared_experts(model: ModelConfig, tokens: Number, precision: Precision) -> list[Work]:
    """Returns the calls of the experts that every token meets; none without any."""
    moe = model.moe
    if not moe.shared_experts:
        return []
    return mlp(model.width, moe.hidden * moe.shared_experts, moe.activation == "silu_gated", tokens, 1, precision)


def dense_layer(model: ModelConfig, tokens: Number, precision: Precision, tp: int) -> list[Work]:
    """Returns the calls of a dense feed-forward layer."""
    gated = model.activation == "silu_gated"
    return mlp(model.width, model.hidden // tp, gated, tokens, 1, precision) + [block_pass(model, tokens)]


def output_head(model: ModelConfig, tokens: Number, tp: int) -> list[Work]:
    """Returns the product that gives logits, in BF16, and the pass over them."""
    logits = model.vocabulary / tp
    return [gemm(tokens, model.width, logits, "bf16"), memory_pass(tokens * logits * (2 + 4))]


def backward(calls: list[Work]) -> list[Work]:
    """Returns the backward of products and passes: two products for each, each pass once more and its gradient."""
    result = []
    for call in calls:
        if call.op in ("gemm", "grouped_gemm"):
            result += [call, call.of_weight_gradient()]
        elif call.op == "attention":
            raised = dataclasses.replace(call, op="attention_backward", flops=2.5 * call.flops, bytes=2 * call.bytes)
            result.append(raised)
        else:
            result.append(dataclasses.replace(call, bytes=1.5 * call.bytes))
    return result
