"""The dynamic micro-batch: the most tokens that a step of prefill can take in the memory that is free."""

import dataclasses
import math

from moe_ep.config import ModelConfig
from moe_ep.cost.memory import MemoryPlan, bytes_per_gpu
from moe_ep.cost.units import Number

# The reference experiment's: micro-batches of 512 to 4096 tokens.
LEAST_TOKENS, MOST_TOKENS = 512, 4096
_STEP = 64  # tokens; sizes between its multiples fill no tile of a kernel
_TILE = 128  # rows of an expert's tile, of which each expert leaves one part empty
_LOGITS_BYTES = 4


@dataclasses.dataclass(frozen=True)
class MicroBatchPlan:
    """What decides how much memory a micro-batch of prefill works in, on one GPU.

    Attributes:
      model: its sizes and type.
      sequence: tokens of a sequence, whose keys and values are expanded at once.
      active_experts: of a layer, on this GPU.
      peers: GPUs that a layer's experts are spread over.
      margin_sigmas: of the exchange's buffers; infinite: they hold any routing.
      caches: whether the tokens' cache must find room too, or has its own.
      fused_attention: scores are never held in memory.
    """

    model: ModelConfig
    sequence: int
    active_experts: int
    peers: int
    margin_sigmas: float = math.inf
    caches: bool = True
    fused_attention: bool = True


def micro_batch_bytes(plan: MicroBatchPlan, tokens: int) -> Number:
    """Returns the bytes that a micro-batch of so many tokens takes beside the weights, by formula.

    Its sequences are whole but the last, so they hold at most tokens + sequence tokens.
    """
    model, attention = plan.model, plan.model.attention
    value_bytes = 2 if model.dtype == "bfloat16" else 4
    held = tokens + plan.sequence
    rows = _buffer_rows(plan, tokens)
    memory = MemoryPlan(
        model=model,
        training=False,
        weight_bytes=value_bytes,
        cache_bytes=value_bytes,
        layer_share=1,
        slots=plan.active_experts,
        attention_share=1,
        tokens=tokens,
        cached_tokens=held if plan.caches else 0,
        buffer_rows=rows,
        expert_rows=rows + plan.active_experts * _TILE,
    )
    parts = bytes_per_gpu(memory)
    expanded = held * attention.heads * (attention.query_dim + attention.value_dim) * value_bytes
    scores = 0 if plan.fused_attention else tokens * plan.sequence * attention.heads * (4 + value_bytes)
    logits = (tokens // plan.sequence + 1) * model.vocabulary * _LOGITS_BYTES
    working = (parts["activations"] + parts["buffers"]) * value_bytes / 2  # those formulas are in BF16
    return parts["kv_cache"] + working + expanded + scores + logits


def largest_micro_batch(
    plan: MicroBatchPlan, free_bytes: Number, *, least: int = LEAST_TOKENS, most: int = MOST_TOKENS
) -> int:
    """Returns the largest micro-batch that fits.

    Args:
      plan: what decides its memory.
      free_bytes: of the GPU, weights and everything else resident taken off.
      least: tokens; 0 is returned where not even these fit.
      most: tokens; more are not returned even where they fit.

    Returns:
      `least` plus a multiple of 64 tokens, or `most`, or 0.
    """
    if micro_batch_bytes(plan, least) > free_bytes:
        return 0
    if micro_batch_bytes(plan, most) <= free_bytes:
        return most
    fits, too_many = 0, -(-(most - least) // _STEP)  # steps above the least
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if micro_batch_bytes(plan, least + middle * _STEP) <= free_bytes else (fits, middle)
    return least + fits * _STEP


def _buffer_rows(plan: MicroBatchPlan, tokens: int) -> Number:
    """Rows of all peers' buffers, one direction: mean + margin sqrt(mean) + 1 each, never more than there can be."""
    most = tokens * min(plan.model.moe.top_k, plan.active_experts)
    mean = tokens * plan.model.moe.top_k / plan.peers
    return plan.peers * min(mean + plan.margin_sigmas * math.sqrt(mean) + 1, most)
