"""Rows by index: the kernels in the GPU interpreter against XLA's gathers, their lowering, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_ep.aot import topology
from moe_ep.config import ClusterConfig
from moe_ep.kernels import device
from moe_ep.kernels.row_gather import api, gather_rows, mosaic_copy, mosaic_sum, weighted_sum_rows, xla

GATHER = jax.jit(gather_rows, static_argnames="implementation")


def random_reads(rows, outputs, reads, seed=0, width=256):
    """Returns bfloat16 rows, weights and indices, some of them past the rows."""
    generator = np.random.default_rng(seed)
    index = generator.integers(0, rows + 2, (outputs, reads)).astype(np.int32)
    index[0, 0] = 2**30
    weights = generator.normal(size=index.shape).astype(np.float32)
    return jnp.asarray(generator.normal(size=(rows, width)), jnp.bfloat16), jnp.asarray(weights), jnp.asarray(index)


def as_numpy(rows, weights, index):
    """The sums in float64, row after row."""
    rows, out = np.asarray(rows, np.float64), np.zeros((len(index), rows.shape[1]))
    for output, (row_weights, row_index) in enumerate(zip(np.asarray(weights, np.float64), np.asarray(index))):
        for weight, source in zip(row_weights, row_index):
            out[output] += weight * rows[source] if source < len(rows) else 0.0
    return out


def interpreted(function, *operands):
    """Returns the kernel's output in the GPU interpreter, and whether it raced."""
    if not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip(f"jax {jax.__version__}: its GPU interpreter lays nothing out and fills nothing")
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    out = function(*operands, interpret=plgpu.InterpretGPUParams(detect_races=True)).block_until_ready()
    return out, gpu_callbacks.get_races().races_found


@pytest.mark.parametrize("reads", [1, 3])
def test_xlas_way_against_numpy(reads):
    rows, weights, index = random_reads(7, 11, reads)
    expected = as_numpy(rows, weights, index)
    out = np.asarray(xla.weighted_sum_rows(rows, weights, index), np.float64)
    assert np.linalg.norm(out - expected) < 3e-3 * np.linalg.norm(expected)
    gathered = np.asarray(GATHER(rows, index[:, 0]), np.float64)
    np.testing.assert_array_equal(gathered, as_numpy(rows, np.ones((11, 1)), index[:, :1]))


# More rows than slots for every block, fewer rows than blocks, and rows that have no halves.
@pytest.mark.parametrize("outputs, width", [(41, 256), (3, 384)])
def test_the_copy_interpreted_is_xlas_gather_and_has_no_race(outputs, width, monkeypatch):
    monkeypatch.setattr(device, "multiprocessors", lambda: 2)
    rows, _, index = random_reads(9, outputs, 1, seed=outputs, width=width)
    out, raced = interpreted(mosaic_copy.gather_rows, rows, index[:, 0])
    np.testing.assert_array_equal(np.asarray(out, np.float32), np.asarray(xla.gather_rows(rows, index[:, 0]), np.float32))
    assert not raced


# Rows of one piece and of several, and pieces of every width of load.
@pytest.mark.parametrize("outputs, reads, width", [(9, 1, 256), (5, 2, 1024), (3, 3, 1536), (2, 7, 512)])
def test_the_sum_interpreted_is_xlas_and_has_no_race(outputs, reads, width, monkeypatch):
    monkeypatch.setattr(mosaic_sum, "_MOST_LOADED", 8)
    rows, weights, index = random_reads(9, outputs, reads, seed=outputs, width=width)
    # An index past the rows adds nothing, whatever lies where it reads instead.
    rows, index = rows.at[0].set(jnp.nan), jnp.maximum(index, 1)
    total, raced = interpreted(mosaic_sum.weighted_sum_rows, rows, weights, index)
    expected = np.asarray(xla.weighted_sum_rows(rows, weights, index), np.float32)
    np.testing.assert_allclose(np.asarray(total, np.float32), expected, rtol=2**-7, atol=1e-6)
    assert np.isfinite(expected).all() and not raced


def at_full_size(reads, sharding=None):
    """Yields each kernel that this jax takes, with abstract operands of a routed layer of 8192 tokens of 7168."""
    shape = lambda dtype, *sizes: jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)  # noqa: E731
    rows, index = shape(jnp.bfloat16, 16384, 7168), shape(jnp.int32, 8192, reads)
    yield mosaic_sum.weighted_sum_rows, (rows, shape(jnp.float32, 8192, reads), index)
    if not mosaic_copy.refusal(rows):
        yield mosaic_copy.gather_rows, (rows, shape(jnp.int32, 16384))


@pytest.mark.parametrize("lanes", [2, 12, 18, 40, 56, 64, 256])
@pytest.mark.parametrize("reads", [1, 2, 8, 200])
def test_pieces_divide_a_row_and_loads_a_piece(lanes, reads):
    piece, load = mosaic_sum.piece_of(lanes, reads)
    assert lanes % piece == 0 and piece % load == 0 and (piece * reads <= 112 or piece == 1)
    assert reads > 2 or load == max(width for width in (2, 4, 8) if lanes % width == 0)


@pytest.mark.parametrize("reads", [1, 2, 8])
def test_the_kernels_lower_for_cuda_at_full_size(reads):
    for function, operands in at_full_size(reads):
        text = jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
        assert "mosaic_gpu" in text


def test_the_kernels_compile_for_an_absent_h100_and_are_chosen_there():
    try:
        (gpu,) = topology.compile_only_devices(ClusterConfig(gpu="h100"), 1)
    except ValueError as error:
        pytest.skip(str(error))
    for function, operands in at_full_size(2, jax.sharding.SingleDeviceSharding(gpu)):
        assert "mosaic" in jax.jit(function).lower(*operands).compile().as_text()


@pytest.mark.parametrize(
    "kind, outputs, width, dtype, chosen",
    [
        ("NVIDIA H200", 8192, 7168, jnp.bfloat16, True), ("NVIDIA H200", 64, 7168, jnp.bfloat16, False),
        ("NVIDIA H200", 8192, 7168, jnp.float32, False), ("NVIDIA H200", 8192, 7100, jnp.bfloat16, False),
        ("NVIDIA H200", 65536, 768, jnp.bfloat16, False), ("NVIDIA H100 80GB HBM3", 65536, 1024, jnp.float16, True),
        ("NVIDIA B200", 8192, 7168, jnp.bfloat16, False), ("cpu", 8192, 7168, jnp.bfloat16, False),
    ],
)  # fmt: skip
def test_the_kernel_is_chosen_for_many_wide_rows_on_hopper(kind, outputs, width, dtype, chosen, monkeypatch):
    monkeypatch.setattr(device, "device_kind", lambda: kind)
    rows = jax.ShapeDtypeStruct((8192, width), dtype)
    assert api.choose(rows, outputs, 1, mosaic_sum.refusal(rows)) == ("mosaic" if chosen else "xla")
    assert api.choose(rows, outputs, 1, "another jax") == "xla"


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda rows, index: gather_rows(rows[0], index), r"rank 1, not 2"),
        (lambda rows, index: gather_rows(rows, index.astype(jnp.float32)), r"index is float32\[4\], not int32 of rank 1"),
        (lambda rows, index: gather_rows(rows, index[:, None]), r"index is int32\[4, 1\], not int32 of rank 1"),
        (lambda rows, index: gather_rows(rows, index, implementation="fast"), r"'fast', not one of xla, mosaic"),
        (lambda rows, index: gather_rows(rows, index, implementation="mosaic"), r"not float32|0.11"),
        (lambda rows, index: weighted_sum_rows(rows, jnp.ones((4, 1)), index[:, None], implementation="mosaic"), r"not float32"),
        (lambda rows, index: weighted_sum_rows(rows, jnp.ones((4, 2), jnp.float32), index[:, None]), r"float32\[4, 2\]"),
    ],
)
def test_what_is_not_taken_is_said_with_its_numbers(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones((8, 256), jnp.float32), jnp.arange(4, dtype=jnp.int32))
