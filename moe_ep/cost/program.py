"""What this project's compiled programs do beside the products: casts, copies, paddings, small kernels.

Every term is a pass that stands in the schedules which `--mode=aot` writes; the
simulator's tests hold the sums against recorded ones. Software that is not this
project's has none of these (moe_ep/simulate/scenario.py, Stack.is_compiled).
"""

from moe_ep.config import ModelConfig
from moe_ep.cost.kernels import Work, memory_pass
from moe_ep.cost.units import Number

# Of one layer and micro-batch: sorting and counting choices, indices, masks, slices; each as long as a launch.
SMALL_KERNELS = 36

# Latent and rotary widths that the project's decode kernel takes (moe_ep/kernels/mla_decode/api.py).
_KERNEL_CACHES = frozenset({(512, 64)})

# Bytes a parameter, in training. Master weights, gradients and Adam's moments are float32.
_UPDATE = 4 * 7  # parameter, gradient and two moments read; all but the gradient written
_NORM = 4
_CAST = 4 + 2
# Of layers in a scan: the gradient's place in the stack is zeroed, then filled from BF16.
_GRADIENT = 4 + (2 + 4)
# Of layers in a scan without recomputation: the cast matrix is kept for the backward pass, in zeroed memory.
_KEPT_CAST = 2 + (2 + 2)
_ACCUMULATE = 3 * 4
# Activations kept by a scan: their place is zeroed, then filled by a copy.
_KEPT_TWICE = 3
# Float32 logits: read by two reductions, read and written once to become their gradient.
_LOGITS = 4 * 4


def prefill_passes(model: ModelConfig, tokens: Number, tp: int) -> list[Work]:
    """Returns the passes of one layer's attention: values padded to the width of keys, which cuDNN wants equal."""
    attention = model.attention
    return _padded_values(model, tokens * attention.heads / tp) if attention.value_dim < attention.query_dim else []


def decode_passes(model: ModelConfig, sequences: Number, context: Number, tp: int) -> list[Work]:
    """Returns the passes of one layer's absorbed attention: the up-projection cut in two; the cache brought together.

    The kernel reads cached rows where they stand; XLA's products want a sequence's rows
    gathered, and the latent cut from them.
    """
    attention = model.attention
    up = attention.heads / tp * attention.latent_dim * (attention.nope_dim + attention.value_dim)
    cached = sequences * context * attention.cache_dim
    gathered = 0 if (attention.latent_dim, attention.rope_dim) in _KERNEL_CACHES else 2 * 2 * 2 * cached
    return [memory_pass(2 * 2 * up + gathered)]


def _padded_values(model: ModelConfig, rows: Number) -> list[Work]:
    """Values are padded before the fused attention and cut after it."""
    attention = model.attention
    return [memory_pass(rows * 2 * (attention.value_dim + attention.query_dim)),
            memory_pass(rows * 2 * 2 * attention.value_dim)]  # fmt: skip


def dense_passes(model: ModelConfig, tokens: Number) -> list[Work]:
    """Returns the activation's pass of a dense layer, which XLA does not fuse into a product."""
    return [memory_pass(tokens * 2 * 2 * model.hidden)] if model.activation == "gelu" else []


def head_width(model: ModelConfig) -> int:
    """Returns the size of a value head as the fused attention computes it."""
    return max(model.attention.value_dim, model.attention.query_dim)


def update_bytes(parameters: Number) -> Number:
    """Returns the bytes that one update of so many parameters reads and writes: clipping's norm, Adam."""
    return parameters * (_UPDATE + _NORM)


def pass_bytes(scanned: Number, others: Number, recomputed: bool, accumulated: bool) -> Number:
    """Returns the bytes that one forward and backward pass moves of weights and gradients, beside their products.

    Args:
      scanned: parameters on this GPU of layers that stand in a scan.
      others: parameters of embedding and head.
      recomputed: the backward pass casts again instead of keeping what was cast.
      accumulated: gradients of several micro-batches are added up.
    """
    again = _CAST if recomputed else _KEPT_CAST
    added = _ACCUMULATE * (scanned + others) if accumulated else 0.0
    return scanned * (_CAST + again + _GRADIENT) + others * _CAST + added


def kept_bytes(saved: Number) -> Number:
    """Returns the bytes moved to keep so many bytes of activations for the backward pass."""
    return saved * _KEPT_TWICE


def loss_bytes(model: ModelConfig, tokens: Number) -> Number:
    """Returns the bytes of the passes over logits and their gradient in a training step."""
    return tokens * model.vocabulary * _LOGITS
