"""Every implementation of absorbed decode against the reference, and the reference against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_ep.aot import topology
from moe_ep.config import ClusterConfig
from moe_ep.kernels.mla_decode import api, block, mla_decode, mosaic

SCALE = 0.11


def random_call(lengths, heads, cached, latent, rope, dtype=jnp.float32, past_length=0.0, page=None):
    """Returns positional and keyword arguments of mla_decode; rows past a length hold `past_length`."""
    generator = np.random.default_rng(len(lengths) * cached + heads)
    sequences = len(lengths)
    q_latent, q_rope = (generator.normal(size=(sequences, heads, width)) for width in (latent, rope))
    cache = generator.normal(size=(sequences, cached, latent + rope))
    cache[np.arange(cached)[None, :] >= np.array(lengths)[:, None]] = past_length
    options = {"scale": SCALE}
    if page is not None:
        order = generator.permutation(sequences * cached // page).astype(np.int32)
        pages = np.empty((len(order), page, latent + rope))
        pages[order] = cache.reshape(-1, page, latent + rope)
        cache, options["pages"] = pages, jnp.asarray(order.reshape(sequences, -1))
    arrays = (jnp.asarray(array, dtype) for array in (q_latent, q_rope, cache))
    return (*arrays, jnp.array(lengths, jnp.int32)), options


def dense_attention(q_latent, q_rope, cache, lengths):
    """Attention of one sequence and head after another, in float64; the cache is not paged."""
    q_latent, q_rope, cache = (np.asarray(array, np.float64) for array in (q_latent, q_rope, cache))
    out = np.zeros_like(q_latent)
    for sequence, length in enumerate(np.asarray(lengths)):
        rows = cache[sequence, :length]
        for head in range(q_latent.shape[1]):
            query = np.concatenate([q_latent[sequence, head], q_rope[sequence, head]])
            weights = np.exp(rows @ query * SCALE)
            if length:
                out[sequence, head] = weights / weights.sum() @ rows[:, : q_latent.shape[2]]
    return out


def relative_error(actual, expected):
    actual, expected = (np.asarray(value, np.float64) for value in (actual, expected))
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("implementation, past_length", [("reference", np.nan), ("xla", 1e3)])
def test_ragged_lengths_against_numpy(implementation, past_length):
    operands, options = random_call((5, 0, 8, 1), heads=3, cached=8, latent=6, rope=4, past_length=past_length)
    out = mla_decode(*operands, **options, implementation=implementation)
    np.testing.assert_allclose(out, dense_attention(*operands), atol=2e-6)
    assert not np.any(out[1])


chosen = jax.jit(mla_decode, static_argnames=("scale", "implementation"))


@given(lengths=st.tuples(*[st.integers(0, 12)] * 3), page=st.sampled_from([None, 4]))
def test_the_choice_on_a_cpu_equals_the_reference(lengths, page):
    operands, options = random_call(lengths, heads=2, cached=12, latent=6, rope=2, page=page)
    out = chosen(*operands, **options)
    np.testing.assert_allclose(out, chosen(*operands, **options, implementation="reference"), atol=2e-6)


def test_pages_in_any_order_are_the_contiguous_cache():
    shape = {"heads": 2, "cached": 12, "latent": 6, "rope": 2}
    (q_latent, q_rope, cache, lengths), options = random_call((12, 7), **shape, page=4)
    contiguous = cache[options["pages"]].reshape(2, 12, 8)
    paged = mla_decode(q_latent, q_rope, cache, lengths, **options, implementation="xla")
    np.testing.assert_array_equal(
        paged, mla_decode(q_latent, q_rope, contiguous, lengths, scale=SCALE, implementation="xla")
    )


# What the kernel is tried on: more steps than slots in one piece; pages and pieces,
# of which some are empty, partial, or hold one row.
INTERPRETED = {
    "one_piece": ((200,), mosaic.Tiling(pieces=1, piece_steps=4, cluster=2), {"cached": 256, "heads": 128}),
    "pieces_of_pages": (
        (70, 0),
        mosaic.Tiling(pieces=2, piece_steps=1),
        {"cached": 128, "page": 64, "dtype": jnp.float16},
    ),
}


def interpret(monkeypatch, lengths, tiling, shape):
    """Runs the kernel in the GPU interpreter; returns its output, its arguments and whether it raced."""
    if not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip(f"jax {jax.__version__}: its GPU interpreter knows no transposed shared memory")
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    operands, options = random_call(
        lengths, latent=128, rope=64, past_length=np.nan, **{"heads": 64, "dtype": jnp.bfloat16, **shape}
    )
    monkeypatch.setattr(mosaic, "choose_tiling", lambda *_: tiling)
    params = plgpu.InterpretGPUParams(detect_races=True)
    out = jax.jit(lambda *args: mosaic.mla_decode(*args, SCALE, interpret=params))(*operands, options.get("pages"))
    out.block_until_ready()
    return out, (operands, options), gpu_callbacks.get_races().races_found


@pytest.mark.parametrize("case", INTERPRETED)
def test_the_kernel_interpreted_equals_the_reference_and_has_no_race(case, monkeypatch):
    out, (operands, options), raced = interpret(monkeypatch, *INTERPRETED[case])
    assert not raced
    assert relative_error(out, mla_decode(*operands, **options, implementation="reference")) < 5e-3


def test_the_race_detector_finds_reads_that_the_next_load_may_overtake(monkeypatch):
    def accumulate(totals, weights, columns):
        return [total + jnp.dot(weights, values[...]).astype(jnp.float32) for total, values in zip(totals, columns)]

    monkeypatch.setattr(block, "accumulate_interpreted", accumulate)
    _, _, raced = interpret(monkeypatch, (192,), mosaic.Tiling(pieces=1, piece_steps=3), {"cached": 192})
    assert raced


def full_size_shapes(sequences, latent, rope, page=None, sharding=None, heads=128, cached=4096):
    """Returns abstract operands of mosaic.mla_decode up to its pages."""

    def shape(dtype, *sizes):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    cache = (sequences, cached) if page is None else (sequences * cached // page, page)
    return (
        shape(jnp.bfloat16, sequences, heads, latent),
        shape(jnp.bfloat16, sequences, heads, rope),
        shape(jnp.bfloat16, *cache, latent + rope),
        shape(jnp.int32, sequences),
        None if page is None else shape(jnp.int32, sequences, cached // page),
    )


@pytest.mark.parametrize("sequences, latent, page", [(64, 512, None), (1, 512, 64), (8, 384, 256)])
def test_the_kernel_lowers_for_cuda_at_full_size(sequences, latent, page):
    shapes = full_size_shapes(sequences, latent, 64, page)
    lowered = jax.jit(lambda *args: mosaic.mla_decode(*args, SCALE)).trace(*shapes).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


def test_the_kernel_compiles_for_an_absent_h100():
    try:
        (gpu,) = topology.compile_only_devices(ClusterConfig(gpu="h100"), 1)
    except ValueError as error:
        pytest.skip(str(error))
    shapes = full_size_shapes(64, 512, 64, sharding=jax.sharding.SingleDeviceSharding(gpu))
    compiled = jax.jit(lambda *args: mosaic.mla_decode(*args, SCALE)).lower(*shapes).compile()
    # One pass over the cache: neither scores nor partial outputs pass through memory.
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20


def test_choose_tiling_cuts_only_where_multiprocessors_would_idle():
    assert mosaic.choose_tiling(64, 128, 64, 132) == mosaic.Tiling(pieces=1, piece_steps=64, cluster=2)
    long_and_lonely = mosaic.choose_tiling(1, 128, 64, 132)
    assert long_and_lonely.pieces > 30 and long_and_lonely.pieces * long_and_lonely.piece_steps >= 64


@given(
    sequences=st.integers(1, 300), tiles=st.integers(1, 3), steps=st.integers(1, 200), multiprocessors=st.integers(1, 160)
)
def test_choose_tiling_covers_every_step_and_leaves_no_piece_without_any(sequences, tiles, steps, multiprocessors):
    tiling = mosaic.choose_tiling(sequences, tiles * block.HEADS, steps, multiprocessors)
    assert tiling.pieces * tiling.piece_steps >= steps
    assert (tiling.pieces - 1) * tiling.piece_steps < steps


REFUSED = {
    "float32": ({"dtype": jnp.float32}, "not float32"),
    "heads": ({"heads": 96}, "not 96"),
    "wide_latent": ({"latent": 3584, "rope": 16}, "not 3584 and 16"),
    "narrow_rope": ({"rope": 32}, "not 128 and 32"),
    "cache_rows": ({"cached": 100}, "not 100"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_kernel_says_what_it_does_not_take(case):
    changes, message = REFUSED[case]
    shape = {"heads": 64, "cached": 64, "latent": 128, "rope": 64, "dtype": jnp.bfloat16, **changes}
    operands, options = random_call((3,), **shape)
    with pytest.raises(ValueError, match=message):
        mla_decode(*operands, **options, implementation="mosaic")


def test_sizes_that_do_not_belong_together_are_refused_with_their_numbers():
    (q_latent, q_rope, cache, lengths), options = random_call((3, 2), heads=2, cached=4, latent=6, rope=2)
    for operands, message in [
        ((q_latent, q_rope, cache.astype(jnp.bfloat16), lengths), "one type, not bfloat16, float32"),
        ((q_latent, q_rope[:, :, :1], cache, lengths), "8 wide, not 6 \\+ 1"),
        ((q_latent, q_rope, cache[:1], lengths), "cache is of 1 sequences, q_latent of 2"),
        ((q_latent, q_rope, cache, lengths), "implementation is 'fast', not one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            mla_decode(*operands, **options, implementation="fast")


def test_a_wrong_rank_is_refused_with_the_shape():
    (q_latent, q_rope, cache, lengths), _ = random_call((3, 2), heads=2, cached=4, latent=6, rope=2)
    with pytest.raises(ValueError, match="q_latent has shape \\(2, 6\\): rank 2, not 3"):
        api.check(q_latent[0], q_rope, cache, lengths, None)
    with pytest.raises(ValueError, match="pages has shape \\(2,\\): rank 1, not 2"):
        api.check(q_latent, q_rope, cache, lengths, lengths)
