"""The benchmark of small kernels: what it times stands apart in the compiled program, and its figures are a slope."""

import jax
import jax.numpy as jnp
import pytest

from moe_ep.bench import small_kernels
from moe_ep.bench.small_kernels import ALL_KINDS, KINDS, MODES, SIZES
from moe_ep.bench.timing import Times
from tests.bench.test_kernels import PROVENANCE

TINY = SIZES["tiny"]


def test_kernels_are_counted_in_the_entry_and_in_the_loop():
    text = """HloModule jit_run
%fused_add (p: s32[4]) -> s32[4] {
  %p = s32[4]{0} parameter(0)
  ROOT %sum = s32[4]{0} add(%p, %p)
}
%body.1 (arg: (s32[], s32[4])) -> (s32[], s32[4]) {
  %arg = (s32[], s32[4]{0}) parameter(0)
  %one = s32[] get-tuple-element(%arg), index=0
  %two = s32[4]{0} get-tuple-element(%arg), index=1
  %next = s32[] fusion(%one), kind=kLoop, calls=%fused_add
  %fusion.2 = s32[4]{0} fusion(%two), kind=kLoop, calls=%fused_add
  ROOT %out = (s32[], s32[4]{0}) tuple(%next, %fusion.2)
}
ENTRY %main (x: s32[4]) -> s32[4] {
  %x = s32[4]{0} parameter(0)
  %copy.1 = s32[4]{0} copy(%x)
  %while.1 = (s32[], s32[4]{0}) while(%copy.1), condition=%condition.1, body=%body.1
  ROOT %get = s32[4]{0} get-tuple-element(%while.1), index=1
}
"""
    assert small_kernels.kernels_of(text, trips=5) == 1 + 5 * 2


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="its compiler for CPUs drops barriers before it joins kernels")
@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_a_chain_stand_apart_in_the_compiled_program(kind):
    state = small_kernels.make_state(TINY, 0)

    def kernels(steps):
        compiled = jax.jit(small_kernels.chain(KINDS[kind], steps)).lower(state).compile()
        return small_kernels.kernels_of(compiled.as_text(), 1)

    counts = [kernels(steps) for steps in (1, 2, 5)]
    assert counts[1] > counts[0] and counts[2] - counts[1] == 3 * (counts[1] - counts[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_keeps_shapes_and_leaves_no_value_that_a_kernel_could_skip(kind):
    before = small_kernels.make_state(TINY, 0)
    after = KINDS[kind](KINDS[kind](before))
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, before)
    assert all(bool(jnp.isfinite(values.astype(jnp.float32)).all()) for values in after)


def test_microseconds_are_of_what_the_long_chain_has_more():
    short, long = Times(3e-4, (2.9e-4, 3.1e-4), 5, 5), Times(5e-4, (4.9e-4, 5.1e-4), 5, 5)
    row = small_kernels._slope((40, short), (140, long))
    assert row["us_per_kernel"] == pytest.approx(2.0)
    assert row["spread"] == pytest.approx(0.2)
    assert small_kernels._slope((40, short), (40, long))["us_per_kernel"] is None


def test_every_kind_is_measured_in_both_modes_and_shown():
    rows = small_kernels.measure(TINY, seed=1, samples=2, sample_seconds=0.0)
    assert [(row["mode"], row["kind"]) for row in rows] == [(mode, kind) for mode in MODES for kind in (*KINDS, ALL_KINDS)]
    mean = small_kernels.summarize(rows)
    result = PROVENANCE | {"sizes": TINY._asdict(), "rows": rows, "us_per_small_kernel": mean}
    table = small_kernels.as_markdown(result)
    assert table.count("\n|") == len(rows) + 2
