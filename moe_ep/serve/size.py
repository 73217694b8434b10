"""How large an engine is: every static size of its two programs and its cache."""

import dataclasses
import math
from collections.abc import Sequence

from moe_ep.config import ConfigError, GenerateConfig, ModelConfig, require
from moe_ep.cost.micro_batch import LEAST_TOKENS, MOST_TOKENS, MicroBatchPlan, largest_micro_batch, micro_batch_bytes

_PAGE_ROWS = 64  # the Hopper kernel reads as many at a time
_CHUNK_MULTIPLE = 16  # prompts are cut into chunks of a multiple of so many tokens
_USABLE = 0.9  # of free memory; the rest is the allocator's and the compiler's


@dataclasses.dataclass(frozen=True)
class EngineSize:
    """What one device has.

    Attributes:
      slots: sequences that decode at once.
      chunk_sequences: prompts that go on in one step of prefill.
      chunk_tokens: of each prompt in such a step.
      page_rows: tokens of a page; a multiple of 64 suits every kernel.
      pages: of the cache.
      pages_per_sequence: that a page table has room for.
      queue: requests that may wait, of all devices.
    """

    slots: int
    chunk_sequences: int
    chunk_tokens: int
    page_rows: int
    pages: int
    pages_per_sequence: int
    queue: int = 256

    @property
    def context(self) -> int:
        """Tokens of the longest sequence."""
        return self.pages_per_sequence * self.page_rows

    def pages_for(self, rows: int) -> int:
        """Returns the pages that hold so many rows."""
        return pages_for(rows, self.page_rows)


def pages_for(rows: int, page_rows: int = _PAGE_ROWS) -> int:
    """Returns the pages that hold so many rows."""
    return -(-rows // page_rows)


def choose_size(
    options: GenerateConfig, plan: MicroBatchPlan, lengths: Sequence[tuple[int, int]], devices: int, free_bytes: float
) -> EngineSize:
    """Returns an engine's size: as the options say, and what they leave open as large as is of use and fits.

    The longest requests are left out, one by one, as long as there is not even room
    for a step over one of them: the engine will refuse them. The cache goes first: every slot gets room for the longest sequence as long as the
    least micro-batch still fits beside it; what is then left makes the micro-batch larger.

    Args:
      options: slots, and what the user set.
      plan: of a micro-batch; its sequence and caches are set here.
      lengths: of the requests, each (tokens of prompt, max_tokens).
      devices: that sequences are spread over.
      free_bytes: of a device, weights taken off.

    Raises:
      ConfigError: not even the least micro-batch and a page fit for any of them.
    """
    ordered = sorted(lengths, key=sum)
    while True:
        try:
            return _size_for(options, plan, ordered, devices, free_bytes)
        except ConfigError:
            if len(ordered) == 1:
                raise
        ordered.pop()


def _size_for(
    options: GenerateConfig, plan: MicroBatchPlan, lengths: Sequence[tuple[int, int]], devices: int, free_bytes: float
) -> EngineSize:
    slots = min(options.sequences_per_device, -(-len(lengths) // devices))
    per_sequence = pages_for(options.context or max(map(sum, lengths)))
    plan = dataclasses.replace(plan, sequence=per_sequence * _PAGE_ROWS, caches=False)
    chunk = _round_up(min(max(prompt for prompt, _ in lengths), plan.sequence))
    least, most = (options.prefill_tokens or min(tokens, chunk * slots) for tokens in (LEAST_TOKENS, MOST_TOKENS))
    left = free_bytes * _USABLE - max(micro_batch_bytes(plan, least), _decode_bytes(plan, slots))
    pages = _pages(options, plan.model, slots * per_sequence, left)
    left += micro_batch_bytes(plan, least) - pages * _page_bytes(plan.model)
    tokens = largest_micro_batch(plan, left, least=least, most=most)
    chunk = min(chunk, tokens)
    return EngineSize(slots, min(slots, tokens // chunk), chunk, _PAGE_ROWS, pages, per_sequence)


def _pages(options: GenerateConfig, model: ModelConfig, useful: int, left: float) -> int:
    """Returns the pages of a device: as many as are of use, or as the options ask for, if they fit."""
    asked = pages_for(options.cache_tokens_per_device) if options.cache_tokens_per_device else None
    fitting = math.floor(max(left, 0) / _page_bytes(model))
    require(fitting >= (asked or 1), "generate.cache_tokens_per_device", options.cache_tokens_per_device,
            f"at most {fitting * _PAGE_ROWS}, what the free memory of a device holds beside a step's own; the step's "
            "shrinks with generate.context and generate.sequences_per_device")  # fmt: skip
    return asked or min(useful, fitting)


def _page_bytes(model: ModelConfig) -> int:
    return _PAGE_ROWS * model.layers * model.attention.cache_dim * _value_bytes(model)


def _decode_bytes(plan: MicroBatchPlan, slots: int) -> int:
    """Where no kernel reads pages in place: a layer's rows of every slot, and their scores."""
    attention, value_bytes = plan.model.attention, _value_bytes(plan.model)
    return slots * plan.sequence * (attention.cache_dim * value_bytes + attention.heads * (4 + value_bytes))


def _value_bytes(model: ModelConfig) -> int:
    return 2 if model.dtype == "bfloat16" else 4


def _round_up(tokens: int) -> int:
    return -(-tokens // _CHUNK_MULTIPLE) * _CHUNK_MULTIPLE
