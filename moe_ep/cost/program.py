"""What this project's compiled programs do beside the products: casts, copies, paddings, small kernels.

Every term is a pass that stands in the schedules which `--mode=aot` writes; the
simulator's tests hold the sums against recorded ones. Software that is not this
project's has none of these (moe_ep/simulate/scenario.py, Stack.is_compiled).
"""

from moe_ep.config import ModelConfig
from moe_ep.cost.kernels import Work, memory_pass
from moe_ep.cost.units import Number

# Kernels of one layer and micro-batch that do next to nothing, each as long as a launch: positions, places in the
# cache, slices; choices scored, sorted and counted. And of a step: embedding, tokens chosen, counts reported.
_ATTENTION_KERNELS = {"prefill": 5, "decode": 13, "train": 5}
_ROUTING_KERNELS = 29
STEP_KERNELS = 18

# Latent and rotary widths that the project's decode kernel takes (moe_ep/kernels/mla_decode/api.py).
_KERNEL_CACHES = frozenset({(512, 64)})

# Bytes a parameter, in training: float32 master weights and Adam's moments, a BF16 copy made once a step.
_CAST = 4 + 2
_UPDATE = 3 * 4 + 3 * 4  # weight and two moments, read and written; the gradient comes on top, and once more for the norm
# Gradients of layers in a loop: their place in the stack is zeroed, then filled from where they were made.
_STACKED = 2 + (2 + 2)
_ACCUMULATED = (4 + 2) + 4
_WIDENED = 2 + 4
# Activations kept by a loop: their place is zeroed, then filled by a copy.
_KEPT_TWICE = 3
# Float32 logits: read by two reductions, then once more to write their gradient in BF16.
_LOGITS = 2 * 4 + (4 + 2)


def small_kernels(phase: str, routed: bool) -> int:
    """Returns how many small kernels one layer has, in one direction of a micro-batch."""
    return _ATTENTION_KERNELS[phase] + (_ROUTING_KERNELS if routed else 0)


def prefill_passes(model: ModelConfig, tokens: Number, expanded: Number, tp: int) -> list[Work]:
    """Returns the passes of one layer's attention: values padded to the width of keys, as cuDNN wants, and cut after.

    Args:
      expanded: rows that keys and values are made of.
    """
    attention = model.attention
    heads, narrow, wide = attention.heads / tp, attention.value_dim, attention.query_dim
    if narrow >= wide:
        return []
    return [memory_pass(expanded * heads * 2 * (narrow + wide)), memory_pass(tokens * heads * 2 * 2 * narrow)]


def exchange_passes(model: ModelConfig, rows: Number, buffered: Number) -> list[Work]:
    """Returns what an exchange of fixed buffers moves beside the rows: queues are filled, pads and all.

    Args:
      rows: that hold tokens; buffered: those of the buffers.
    """
    moved = rows + buffered + 2 * 2 * max(buffered - rows, 0.0)
    return [memory_pass(moved * model.width * 2)]


def decode_passes(model: ModelConfig, sequences: Number, context: Number, tp: int) -> list[Work]:
    """Returns the passes of one layer's absorbed attention: the up-projection cut in two; the cache brought together.

    Products of one row are sums that read their half where it stands. The kernel reads
    cached rows where they stand; XLA's products want a sequence's rows gathered, and the
    latent cut from them.
    """
    attention = model.attention
    up = attention.heads / tp * attention.latent_dim * (attention.nope_dim + attention.value_dim)
    halves = 2 * 2 * up if sequences > 1 else 0
    cached = sequences * context * attention.cache_dim
    gathered = 0 if (attention.latent_dim, attention.rope_dim) in _KERNEL_CACHES else 2 * 2 * 2 * cached
    return [memory_pass(halves + gathered)]


def head_width(model: ModelConfig) -> int:
    """Returns the size of a value head as the fused attention computes it."""
    return max(model.attention.value_dim, model.attention.query_dim)


def gradient_bytes_a_value(summed: bool) -> int:
    """Returns the bytes of a gradient's value at the update: BF16 unless it was summed over devices or micro-batches."""
    return 4 if summed else 2


def update_bytes(parameters: Number, summed: bool) -> Number:
    """Returns the bytes that one update of so many parameters moves: the cast, clipping's norm, Adam."""
    return parameters * (_CAST + _UPDATE + 2 * gradient_bytes_a_value(summed))


def pass_bytes(parameters: Number, looped: bool, accumulated: bool, widened: bool) -> Number:
    """Returns the bytes that one forward and backward pass moves of gradients, beside the products that make them.

    Args:
      parameters: on this GPU.
      looped: layers stand in a loop and not one after another.
      accumulated: gradients of several micro-batches are added up.
      widened: they are turned into float32 to be summed over devices.
    """
    return parameters * (_STACKED * looped + _ACCUMULATED * accumulated + _WIDENED * widened)


def kept_bytes(saved: Number, looped: bool) -> Number:
    """Returns the bytes moved to keep so many bytes of activations for the backward pass."""
    return saved * _KEPT_TWICE if looped else 0.0


def loss_bytes(model: ModelConfig, tokens: Number) -> Number:
    """Returns the bytes of the passes over logits and their gradient in a training step."""
    return tokens * model.vocabulary * _LOGITS
