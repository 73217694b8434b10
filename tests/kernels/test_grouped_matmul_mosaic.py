"""The Hopper kernels without a GPU: interpreted with race detection, lowered for CUDA, compiled for an absent H100."""

import functools
import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_ep.aot.topology import compile_only_devices
from moe_ep.config import ClusterConfig
from moe_ep.kernels import device
from moe_ep.kernels import grouped_matmul as gm
from moe_ep.kernels.grouped_matmul import choice, mosaic, table, tiled
from moe_ep.kernels.grouped_matmul.mosaic_parts import Tiling

OLD_INTERPRETER = jax.__version_info__ < (0, 11)
needs_new_interpreter = pytest.mark.skipif(
    OLD_INTERPRETER, reason="jax 0.10's GPU interpreter has no transposed shared memory"
)
needs_cuda_plugin = pytest.mark.skipif(
    not any(name.startswith("jax-cuda") for name in {d.name for d in importlib.metadata.distributions()}),
    reason="XLA's GPU compiler comes with jax[cuda12]",
)

ROWS, WIDTH, HIDDEN = 512, 128, 256
SIZES = {"unequal_and_empty": (100, 0, 130), "half_tiles": (30, 0, 140), "one_row_groups": (1, 1, 1), "all_in_one_group": (0, 0, 250)}


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels run on the CPU, on two multiprocessors, and a missing barrier raises."""
    monkeypatch.setattr(device, "multiprocessors", lambda: 2)
    if OLD_INTERPRETER:
        from jax._src.pallas.mosaic_gpu.interpret import params
    else:
        from jax.experimental.pallas import mosaic_gpu as params
    with params.force_gpu_interpret_mode(params.InterpretGPUParams(detect_races=True)):
        yield


class Operands:
    """Rows and weights of three groups, pad rows zero, skipped rows NaN."""

    def __init__(self, sizes, activation, tile=128):
        self.groups = gm.make_row_groups(jnp.array(sizes, jnp.int32), tile, ROWS // tile)
        starts = np.cumsum([0] + [-(-size // tile) * tile for size in sizes])
        index = np.arange(ROWS)
        self.valid = index < starts[-1]
        self.occupied = sum((index >= start) & (index < start + size) for start, size in zip(starts, sizes)) > 0
        gated = activation == "silu_gated"
        self.rows, self.d_out = (self._buffer(seed, WIDTH) for seed in (0, 1))
        self.products = tuple(self._buffer(seed, HIDDEN) for seed in (2, 3)[: 1 + gated])
        self.first = tuple(self._weights(seed, WIDTH, HIDDEN) for seed in (4, 5)[: 1 + gated])
        self.w_out = self._weights(6, HIDDEN, WIDTH)

    def _buffer(self, seed, width):
        rows = jax.random.normal(jax.random.key(seed), (ROWS, width), jnp.bfloat16)
        rows = jnp.where(self.occupied[:, None], rows, jnp.zeros((), rows.dtype))
        return jnp.where(self.valid[:, None], rows, jnp.full((), jnp.nan, rows.dtype))

    def _weights(self, seed, *size):
        return jax.random.normal(jax.random.key(seed), (3, *size), jnp.bfloat16) / 10

    def assert_same(self, step, *args, **options):
        """Asserts that the interpreted kernels give what the loop over tiles gives, on valid rows."""
        run = functools.partial(getattr(mosaic, step), tiling=Tiling(columns=128, stages=2, raster_rows=2))
        static = [index for index, arg in enumerate(args) if isinstance(arg, (str, int))]
        actual = jax.jit(run, static_argnums=static)(*args)
        expected = jax.jit(getattr(tiled.STEPS, step), static_argnums=static)(*args)
        for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            kept = self.valid if ours.ndim == 2 else slice(None)
            ours, theirs = (np.asarray(value[kept], np.float64) for value in (ours, theirs))
            assert np.linalg.norm(ours - theirs) <= 5e-3 * np.linalg.norm(theirs)


@pytest.mark.parametrize("sizes,tile", [("unequal_and_empty", 128), ("one_row_groups", 64)])
def test_fused_forward_interpreted(interpreted, sizes, tile):
    operands = Operands(SIZES[sizes], "gelu", tile)
    operands.assert_same("hidden_and_products", operands.rows, operands.first, operands.groups, "gelu")


@needs_new_interpreter
def test_gated_steps_interpreted(interpreted):
    operands = Operands(SIZES["unequal_and_empty"], "silu_gated")
    operands.assert_same("hidden", operands.rows, operands.first, operands.groups, "silu_gated")
    gradients = (operands.d_out, operands.w_out, operands.products, operands.groups, "silu_gated")
    operands.assert_same("product_gradients", *gradients)
    operands.assert_same("rows_gradient", operands.products, operands.first, operands.groups)


@needs_new_interpreter
@pytest.mark.parametrize("sizes,tile", [("unequal_and_empty", 64), ("all_in_one_group", 128), ("half_tiles", 128)])
def test_weight_gradient_interpreted(interpreted, sizes, tile):
    operands = Operands(SIZES[sizes], "gelu", tile)
    operands.assert_same("weight_gradient", operands.rows, operands.products[0], operands.groups, 3)


@needs_new_interpreter
def test_a_weight_gradient_does_not_read_half_tiles_of_pad_rows(interpreted):
    operands = Operands(SIZES["half_tiles"], "gelu")
    has_data = np.repeat(operands.occupied.reshape(-1, 64).any(axis=1), 64)[:, None]
    poisoned = [jnp.where(has_data, rows, jnp.nan) for rows in (operands.rows, operands.products[0])]
    run = jax.jit(functools.partial(mosaic.weight_gradient, tiling=Tiling(columns=128, stages=2)), static_argnums=3)
    clean = run(operands.rows, operands.products[0], operands.groups, 3)
    np.testing.assert_array_equal(run(*poisoned, operands.groups, 3), clean)


def mlp_gradients(rows, weights, groups, activation, implementation):
    """Gradients of the sum of the MLP's output: every kernel of the forward and backward pass."""

    def loss(rows, weights):
        return jnp.sum(gm.expert_mlp(rows, weights, groups, activation=activation, implementation=implementation).astype(jnp.float32))

    return jax.grad(loss, argnums=(0, 1))(rows, weights)


def abstract_mlp(groups, rows, width, hidden, gated, sharding=None):
    """Shapes of an MLP's operands in tiles of 128 rows."""
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    first, out = shape((groups, width, hidden), jnp.bfloat16), shape((groups, hidden, width), jnp.bfloat16)
    tiles = shape((rows // 128,), jnp.int32)
    layout = gm.RowGroups(tiles, shape((), jnp.int32), tiles, gm.StaticRows(rows))
    return shape((rows, width), jnp.bfloat16), gm.ExpertWeights(first, out, first if gated else None), layout


@needs_cuda_plugin
@pytest.mark.parametrize("activation,gpu", [("gelu", "h200"), ("silu_gated", "h100")])
def test_full_size_mlp_compiles_for_an_absent_gpu(activation, gpu):
    mesh = jax.sharding.Mesh(np.array(compile_only_devices(ClusterConfig(gpu=gpu), 1)), ("x",))
    operands = abstract_mlp(4, 8192, 7168, 18432, activation == "silu_gated", NamedSharding(mesh, P()))
    # Inside shard_map the choice sees the absent device, not the CPU.
    step = functools.partial(mlp_gradients, activation=activation, implementation=None)
    step = jax.shard_map(step, mesh=mesh, in_specs=P(), out_specs=P())
    text = jax.jit(step).lower(*operands).compile().as_text()
    for kernel in ("grouped_forward", "grouped_pullback", "grouped_input_gradient", "grouped_weight_gradient"):
        assert kernel in text


def lowered(step, *args):
    """The step for CUDA: layouts, swizzles and the limit on shared memory are checked."""
    static = [index for index, arg in enumerate(args) if isinstance(arg, (str, int))]
    return jax.jit(step, static_argnums=static).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def operands_of(problem: table.Problem):
    """The abstract operands of a problem's step."""
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.bfloat16)  # noqa: E731
    tile = 64 if problem.rows <= 64 * problem.groups else 128
    tiles = jax.ShapeDtypeStruct((problem.rows // tile,), jnp.int32)
    layout = gm.RowGroups(tiles, jax.ShapeDtypeStruct((), jnp.int32), tiles, gm.StaticRows(problem.rows))
    rows, output = shape(problem.rows, problem.depth), shape(problem.rows, problem.columns)
    w, w_transposed = shape(problem.groups, problem.depth, problem.columns), shape(problem.groups, problem.columns, problem.depth)
    activation = {1: "gelu", 2: "silu_gated"}[problem.inputs]
    return {
        "hidden": (rows, (w,) * problem.inputs, layout, activation),
        "hidden_and_products": (rows, (w,) * problem.inputs, layout, activation),
        "product": (rows, w, layout),
        "product_gradients": (rows, w_transposed, (output,) * problem.inputs, layout, activation),
        "rows_gradient": ((rows,) * problem.inputs, (w_transposed,) * problem.inputs, layout),
        "weight_gradient": (rows, output, layout, problem.groups),
    }[problem.step]


# Of entries with the same kernel, which differ in rows alone, one.
TILED_ENTRIES = {
    (entry.problem.step, entry.problem.groups, entry.problem.inputs, entry.tiling): entry
    for entries in table.read(table.PATH).values()
    for entry in entries
    if entry.tiling is not None
}


@pytest.mark.parametrize(
    "entry", TILED_ENTRIES.values(), ids=lambda entry: "-".join(map(str, vars(entry.problem).values()))
)
def test_every_tiling_of_the_table_lowers_for_cuda_at_full_size(entry):
    step = functools.partial(getattr(mosaic, entry.problem.step), tiling=entry.tiling)
    assert "mosaic_gpu" in lowered(step, *operands_of(entry.problem))


def test_the_nearest_entry_is_of_the_same_step_and_kind(tmp_path, monkeypatch):
    problems = [table.Problem("product", groups, rows, 512, 512) for groups in (1, 8) for rows in (512, 8192)]
    entries = [table.Entry(problem, "mosaic", Tiling(stages=index + 2), {}, "") for index, problem in enumerate(problems)]
    table.write(tmp_path / "table.json", "NVIDIA H200", entries)
    monkeypatch.setattr(table, "PATH", tmp_path / "table.json")
    nearest = functools.partial(table.nearest, "NVIDIA H200")
    assert nearest(table.Problem("product", 2, 700, 512, 512)) == entries[2]
    assert nearest(table.Problem("product", 1, 9000, 512, 1024)) == entries[1]
    assert nearest(table.Problem("hidden", 1, 9000, 512, 512)) is None
    # A GH200 has the H200's processor, and until it is measured its tiles; a B200 has neither.
    assert table.nearest("NVIDIA GH200 480GB", problems[0]) == entries[0]
    assert table.nearest("NVIDIA B200", problems[0]) is None
    table.write(tmp_path / "table.json", "NVIDIA GH200 480GB", entries[1:2])
    assert table.nearest("NVIDIA GH200 480GB", problems[0]) == entries[1]


@pytest.mark.parametrize(
    "kind,dtype,tile,groups,chosen",
    [
        ("cpu", "float32", 128, 4, "tiled"),
        ("cpu", "bfloat16", 128, 1, "dense"),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 128, 4, "scanned"),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 128, 4, "tuned"),
        ("paper_h100", "bfloat16", 64, 1, "tuned"),
        ("NVIDIA H200", "bfloat16", 8, 4, "scanned"),
        ("NVIDIA H200", "float32", 128, 1, "dense"),
    ],
)
def test_the_choice_follows_the_device_and_what_the_kernels_take(monkeypatch, kind, dtype, tile, groups, chosen):
    monkeypatch.setattr(device, "device_kind", lambda: kind)
    rows = jax.ShapeDtypeStruct((512, 256), jnp.dtype(dtype))
    layout = jax.eval_shape(lambda: gm.one_group(512, tile))
    assert choice.choose(rows, layout, (groups, 256, 256)) == chosen


@pytest.mark.parametrize("buffer_tiles,kernel", [(2, False), (11, True)])
def test_the_rows_expected_choose_and_no_dense_product_multiplies_a_buffer_of_more(monkeypatch, buffer_tiles, kernel):
    asked = []

    def nearest(kind, problem):
        asked.append((kind, problem.rows))
        return table.Entry(problem, "dense", None, {}, "")

    monkeypatch.setattr(device, "device_kind", lambda: "NVIDIA H200")
    monkeypatch.setattr(table, "nearest", nearest)
    layout = jax.eval_shape(lambda: gm.make_row_groups(jnp.array([250], jnp.int32), 128, buffer_tiles, expected_rows=251))
    x, w = jax.ShapeDtypeStruct((128 * buffer_tiles, 256), jnp.bfloat16), jax.ShapeDtypeStruct((1, 256, 256), jnp.bfloat16)
    program = str(jax.make_jaxpr(functools.partial(gm.grouped_matmul, activation="gelu"))(x, w, layout))
    assert set(asked) == {("NVIDIA H200", 256)}
    assert ("grouped_forward" in program) == kernel


@pytest.mark.parametrize(
    "tile,width,message",
    [(32, 256, "a row tile of 32, not a multiple of 64"), (128, 200, r"weights \(2, 200, 256\) whose last sizes")],
)
def test_operands_the_kernels_do_not_take_are_named_with_their_numbers(tile, width, message):
    groups = gm.make_row_groups(jnp.array([60, 4], jnp.int32), tile, 8)
    x, w = jnp.zeros((8 * tile, width), jnp.bfloat16), jnp.zeros((2, width, 256), jnp.bfloat16)
    with pytest.raises(ValueError, match=message):
        gm.grouped_matmul(x, w, groups, implementation="mosaic")
