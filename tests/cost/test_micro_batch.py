"""The dynamic micro-batch: it fits, nothing larger does, and it moves the right way with each of its arguments."""

import dataclasses
import math

from hypothesis import given
from hypothesis import strategies as st

from moe_ep.config import ModelConfig, MoEConfig, cpu8_tiny
from moe_ep.cost.micro_batch import LEAST_TOKENS, MOST_TOKENS, MicroBatchPlan, largest_micro_batch, micro_batch_bytes

FULL = ModelConfig(moe=MoEConfig(num_experts=128))
PLANS = st.builds(
    MicroBatchPlan,
    model=st.sampled_from([FULL, cpu8_tiny().model]),
    sequence=st.integers(1, 16384),
    active_experts=st.integers(1, 16),
    peers=st.sampled_from([1, 8, 128]),
    margin_sigmas=st.sampled_from([0.0, 5.0, math.inf]),
    caches=st.booleans(),
    fused_attention=st.booleans(),
)
FREE_BYTES = st.floats(0, 60e9)


@given(PLANS, FREE_BYTES)
def test_it_fits_and_the_next_larger_does_not(plan, free_bytes):
    tokens = largest_micro_batch(plan, free_bytes)
    assert tokens == 0 or LEAST_TOKENS <= tokens <= MOST_TOKENS
    if tokens:
        assert micro_batch_bytes(plan, tokens) <= free_bytes
    if tokens < MOST_TOKENS:
        assert micro_batch_bytes(plan, tokens + 64 if tokens else LEAST_TOKENS) > free_bytes


@given(PLANS, FREE_BYTES, st.floats(0, 60e9), st.integers(0, 16384), st.integers(0, 16))
def test_more_memory_never_shrinks_it_and_longer_sequences_or_more_experts_never_grow_it(
    plan, free_bytes, more_bytes, longer, experts
):
    tokens = largest_micro_batch(plan, free_bytes)
    assert largest_micro_batch(plan, free_bytes + more_bytes) >= tokens
    longer_plan = dataclasses.replace(plan, sequence=plan.sequence + longer)
    assert largest_micro_batch(longer_plan, free_bytes) <= tokens
    fuller_plan = dataclasses.replace(plan, active_experts=plan.active_experts + experts)
    assert largest_micro_batch(fuller_plan, free_bytes) <= tokens


@given(PLANS, FREE_BYTES, st.integers(1, 512), st.integers(0, 4096))
def test_its_bounds_are_arguments(plan, free_bytes, least, span):
    tokens = largest_micro_batch(plan, free_bytes, least=least, most=least + span)
    assert tokens == 0 or least <= tokens <= least + span


def test_what_the_full_model_leaves_of_64_gb_takes_two_sequences_of_2048():
    # Weights of one expert a layer leave 9.3 GB (SPEC: 54.7 of 64); a cached token costs 439,200 bytes.
    plan = MicroBatchPlan(FULL, sequence=2048, active_experts=1, peers=128, margin_sigmas=5.0)
    tokens = largest_micro_batch(plan, 9.3e9)
    assert tokens == MOST_TOKENS
    held = tokens + 2048
    assert micro_batch_bytes(plan, tokens) > held * 439_200
    assert largest_micro_batch(plan, 2e9) < MOST_TOKENS
