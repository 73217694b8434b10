"""An engine's size: what it is told, and otherwise what is of use and fits."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_ep.config import ConfigError, GenerateConfig, ModelConfig, MoEConfig
from moe_ep.cost.micro_batch import MOST_TOKENS, MicroBatchPlan, micro_batch_bytes
from moe_ep.serve.size import choose_size

PLAN = MicroBatchPlan(ModelConfig(moe=MoEConfig(num_experts=16)), sequence=1, active_experts=2, peers=8)
PAGE_BYTES = 64 * 61 * 3600 * 2
LENGTHS = st.lists(st.tuples(st.integers(1, 9000), st.integers(1, 2000)), min_size=1, max_size=6)


@given(LENGTHS, st.integers(1, 16), st.sampled_from([1, 8]), st.floats(0, 100e9))
def test_what_is_chosen_fits_and_larger_memory_never_gives_less(lengths, slots, devices, free_bytes):
    options = GenerateConfig(sequences_per_device=slots)
    try:
        size = choose_size(options, PLAN, lengths, devices, free_bytes)
    except ConfigError:
        return
    step = dataclasses.replace(PLAN, sequence=size.context, caches=False)
    tokens = size.chunk_sequences * size.chunk_tokens
    assert size.pages * PAGE_BYTES + micro_batch_bytes(step, tokens) <= free_bytes
    assert 1 <= size.chunk_sequences <= size.slots <= slots and tokens <= MOST_TOKENS
    assert size.pages <= size.slots * size.pages_per_sequence
    larger = choose_size(options, PLAN, lengths, devices, 2 * free_bytes)
    assert larger.context >= size.context
    if larger.context == size.context and larger.slots == size.slots:
        assert larger.pages >= size.pages


def test_short_prompts_make_small_steps():
    size = choose_size(GenerateConfig(sequences_per_device=8, max_tokens=20), PLAN, [(12, 20)] * 3, 1, 80e9)
    assert (size.slots, size.chunk_sequences, size.chunk_tokens, size.pages, size.context) == (3, 3, 16, 3, 64)


def test_one_line_that_asks_for_the_impossible_does_not_size_the_engine():
    size = choose_size(GenerateConfig(), PLAN, [(12, 20), (5, 10**12)], 1, 80e9)
    assert size.context == 64


def test_what_is_told_is_taken_or_refused():
    options = GenerateConfig(context=1000, prefill_tokens=100, cache_tokens_per_device=640, sequences_per_device=2)
    size = choose_size(options, PLAN, [(500, 100)] * 9, 1, 80e9)
    assert (size.context, size.pages, size.slots, size.chunk_tokens, size.chunk_sequences) == (1024, 10, 2, 100, 1)
    too_much = dataclasses.replace(options, cache_tokens_per_device=10**9)
    with pytest.raises(ConfigError, match="generate.cache_tokens_per_device=1000000000: allowed is at most "):
        choose_size(too_much, PLAN, [(500, 100)], 1, 80e9)
