"""Every implementation of the grouped products against the readable reference, and the reference against numpy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from moe_ep.kernels import grouped_matmul as gm
from moe_ep.kernels.grouped_matmul import activations, checks

TILE, TILES = 8, 12


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows in each group, in a buffer of TILES tiles."""

    sizes: tuple[int, ...]

    def groups(self):
        return gm.make_row_groups(jnp.array(self.sizes, jnp.int32), TILE, TILES)

    def occupied(self):
        """The rows of the buffer that carry data, as booleans [R]."""
        occupied = np.zeros(TILES * TILE, bool)
        for first, size in zip(self.first_rows(), self.sizes, strict=True):
            occupied[first : first + size] = True
        return occupied

    def first_rows(self):
        """The row at which each group starts."""
        padded = [-(-size // TILE) * TILE for size in self.sizes]
        return np.cumsum([0, *padded])[:-1]


CASES = {
    "unequal": Case((13, 40, 8, 3)),
    "empty_groups": Case((0, 17, 0, 9)),
    "one_row_groups": Case((1, 1, 1, 1)),
    "all_in_one_group": Case((0, 0, 64, 0)),
    "no_rows": Case((0, 0, 0, 0)),
    "one_group": Case((21,)),
}
NAMES_AND_CASES = [
    (name, case) for name in ("tiled", "scanned") for case in CASES if case != "one_group"
] + [("dense", "one_group")]
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def random_mlp(case, dtype, gated, width=16, hidden=24, poison=0.0):
    """Returns rows and weights; rows past the valid tiles hold `poison`, pad rows zero."""
    keys = jax.random.split(jax.random.key(sum(case.sizes)), 4)
    first = (len(case.sizes), width, hidden)
    rows = jax.random.normal(keys[0], (TILES * TILE, width), dtype)
    skipped = jnp.arange(TILES * TILE) >= case.groups().valid_tiles * TILE
    rows = jnp.where(case.occupied()[:, None], rows, jnp.zeros((), dtype))
    rows = jnp.where(skipped[:, None], jnp.asarray(poison, dtype), rows)
    weights = gm.ExpertWeights(
        w_in=jax.random.normal(keys[1], first, dtype) / 4,
        w_out=jax.random.normal(keys[2], (first[0], hidden, width), dtype) / 5,
        w_gate=jax.random.normal(keys[3], first, dtype) / 4 if gated else None,
    )
    return rows, weights


def relative_error(actual, expected):
    actual, expected = (np.asarray(value, np.float64) for value in (actual, expected))
    return np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-6)


def occupied_loss(rows, weights, groups, occupied, **options):
    """A scalar that reads the rows that carry data and no other; with the output."""
    out = gm.expert_mlp(rows, weights, groups, **options)
    return jnp.sum(jnp.where(occupied[:, None], jnp.sin(out.astype(jnp.float32)), 0.0)), out


@functools.cache
def compiled_gradient(**options):
    """The output and gradients of the loss, compiled once for all cases of one size."""
    gradient = jax.grad(functools.partial(occupied_loss, **options), argnums=(0, 1), has_aux=True)
    return jax.jit(gradient)


def gradients_on_occupied_rows(case, rows, weights, **options):
    """[d_rows, d_weights..., out] of the loss, of rows only those that carry data."""
    occupied = case.occupied()
    results = compiled_gradient(**options)(rows, weights, case.groups(), occupied)
    return [leaf[occupied] if leaf.shape == rows.shape else leaf for leaf in jax.tree.leaves(results)]


@pytest.mark.parametrize("activation", ["gelu", "silu_gated"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_reference_is_each_rows_own_mlp(case, activation):
    rows, weights = random_mlp(case, "float32", activation == "silu_gated")
    options = dict(activation=activation, implementation="reference")
    out = np.asarray(compiled_gradient(**options)(rows, weights, case.groups(), case.occupied())[1])
    act = {"gelu": functools.partial(jax.nn.gelu, approximate=True), "silu_gated": jax.nn.silu}[activation]
    rows, weights = jax.tree.map(np.asarray, (rows, weights))
    for group, (first, size) in enumerate(zip(case.first_rows(), case.sizes, strict=True)):
        x = rows[first : first + size]
        hidden = np.asarray(act(x @ (weights.w_in if weights.w_gate is None else weights.w_gate)[group]))
        hidden = hidden if weights.w_gate is None else hidden * (x @ weights.w_in[group])
        np.testing.assert_allclose(out[first : first + size], hidden @ weights.w_out[group], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation,dtype", [("gelu", "float32"), ("silu_gated", "float32"), ("silu_gated", "bfloat16")])
@pytest.mark.parametrize("name,case", NAMES_AND_CASES)
def test_mlp_and_gradients_equal_the_reference(name, case, activation, dtype):
    case = CASES[case]
    rows, weights = random_mlp(case, dtype, activation == "silu_gated")
    expected, actual = (
        gradients_on_occupied_rows(case, rows, weights, activation=activation, implementation=implementation)
        for implementation in ("reference", name)
    )
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert relative_error(ours, theirs) < TOLERANCE[dtype]


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_matmul_and_gradients_equal_the_reference(activation, name="tiled"):
    case = CASES["unequal"]
    rows, weights = random_mlp(case, "float32", gated=False)

    def loss(x, w, implementation):
        out = gm.grouped_matmul(x, w, case.groups(), activation=activation, implementation=implementation)
        return jnp.sum(jnp.where(case.occupied()[:, None], jnp.cos(out), 0.0))

    expected = jax.grad(functools.partial(loss, implementation="reference"), argnums=(0, 1))(rows, weights.w_in)
    actual = jax.grad(functools.partial(loss, implementation=name), argnums=(0, 1))(rows, weights.w_in)
    assert relative_error(actual[0][case.occupied()], expected[0][case.occupied()]) < 1e-5
    assert relative_error(actual[1], expected[1]) < 1e-5


@pytest.mark.parametrize("name,case", [("tiled", "unequal"), ("scanned", "unequal"), ("dense", "one_group")])
def test_nothing_of_skipped_tiles_is_read(name, case):
    case = CASES[case]
    clean, poisoned = (
        gradients_on_occupied_rows(
            case, *random_mlp(case, "float32", gated=False, poison=value), activation="gelu", implementation=name
        )
        for value in (0.0, np.nan)
    )
    for ours, theirs in zip(poisoned, clean, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("activation", list(activations.ACTIVATIONS))
def test_pullback_is_the_derivative_of_value(activation):
    act = activations.ACTIVATIONS[activation]
    keys = jax.random.split(jax.random.key(3), act.inputs + 1)
    products = tuple(3 * jax.random.normal(key, (64,)) for key in keys[1:])
    gradient = jax.random.normal(keys[0], (64,))
    value, vjp = jax.vjp(act.value, products)
    hidden, d_products = act.pullback(products, gradient)
    np.testing.assert_allclose(hidden, value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(d_products, vjp(gradient)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["reference", "tiled"])
def test_weights_that_vary_over_fewer_axes_get_cotangents_of_their_own_type(name):
    mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    case = CASES["unequal"]
    rows, weights = random_mlp(case, "float32", gated=True)
    rows = jnp.stack([rows * scale for scale in (1.0, 0.5, -1.0, 2.0, 0.1, 1.5, -0.5, 0.7)])
    weights = jax.tree.map(lambda w: jnp.stack([w * scale for scale in (1.0, 0.5, 2.0, -1.0)]), weights)

    def loss(rows, weights, implementation):
        options = dict(activation="silu_gated", implementation=implementation)
        return occupied_loss(rows, weights, case.groups(), case.occupied(), **options)[0]

    def local_gradients(rows, weights):
        local = functools.partial(loss, implementation=name)
        step = jax.checkpoint(lambda r, w: local(r[0], jax.tree.map(lambda leaf: leaf[0], w)))
        return jax.grad(step, argnums=(0, 1))(rows, weights)

    specs = (P(("data", "expert")), jax.tree.map(lambda _: P("expert"), weights))
    sharded = jax.jit(jax.shard_map(local_gradients, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=True))

    def global_loss(rows, weights):
        per_device = [
            loss(rows[device], jax.tree.map(lambda leaf: leaf[device % 4], weights), "reference") for device in range(8)
        ]
        return sum(per_device)

    expected = jax.jit(jax.grad(global_loss, argnums=(0, 1)))(rows, weights)
    actual = sharded(rows, weights)
    assert relative_error(actual[0][:, case.occupied()], expected[0][:, case.occupied()]) < 1e-5
    for ours, theirs in zip(actual[1], expected[1], strict=True):
        assert relative_error(ours, theirs) < 1e-5


def test_scanned_checkpointed_layers_have_the_gradients_of_a_plain_loop():
    case = CASES["unequal"]
    rows, weights = random_mlp(case, "float32", gated=False)
    layers = jax.tree.map(lambda w: jnp.stack([w, -w]), weights)
    layer = functools.partial(gm.expert_mlp, groups=case.groups(), activation="gelu")

    def scanned_loss(layers):
        step = jax.checkpoint(lambda x, w: (x + layer(x, w, implementation="tiled"), None))
        return jnp.sum(jnp.where(case.occupied()[:, None], jax.lax.scan(step, rows, layers)[0], 0.0))

    def plain_loss(layers):
        x = rows
        for index in range(2):
            x = x + layer(x, jax.tree.map(lambda leaf: leaf[index], layers), implementation="reference")
        return jnp.sum(jnp.where(case.occupied()[:, None], x, 0.0))

    for ours, theirs in zip(
        jax.tree.leaves(jax.grad(scanned_loss)(layers)), jax.tree.leaves(jax.grad(plain_loss)(layers)), strict=True
    ):
        assert relative_error(ours, theirs) < 1e-5


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 70), min_size=1, max_size=9), tile=st.sampled_from([1, 8, 32]))
def test_row_groups_place_every_row_in_its_groups_own_tiles(sizes, tile):
    tiles = gm.tiles_needed(sum(sizes), len(sizes), tile)
    groups = gm.make_row_groups(jnp.array(sizes, jnp.int32), tile, max(tiles, 1))
    expected = [group for group, size in enumerate(sizes) for _ in range(-(-size // tile))]
    assert int(groups.valid_tiles) == len(expected) <= max(tiles, 1)
    assert list(np.asarray(groups.tile_group)[: len(expected)]) == expected
    rows = [min(tile, size - first) for size in sizes for first in range(0, size, tile)]
    assert list(np.asarray(groups.tile_rows)) == rows + [0] * (max(tiles, 1) - len(rows))
    starts = np.cumsum([0] + [-(-size // tile) * tile for size in sizes])[:-1]
    np.testing.assert_array_equal(gm.first_rows(jnp.array(sizes, jnp.int32), tile), starts)


def test_tiles_needed_is_reached_by_the_worst_split():
    assert gm.tiles_needed(64, 4, 8) == 4 + 7
    assert max(int(gm.make_row_groups(jnp.array(s), 8, 99).valid_tiles) for s in [(1, 1, 1, 61), (16,) * 4]) == 11


ROWS, WEIGHTS = random_mlp(CASES["unequal"], "float32", gated=False)
WRONG = {
    "rank of rows": (dict(rows=ROWS[None]), "rank 3, not 2"),
    "rank of a weight": (dict(w_in=WEIGHTS.w_in[0]), r"\(16, 24\): rank 2, not 3"),
    "type of a weight": (dict(w_in=WEIGHTS.w_in.astype(jnp.bfloat16)), "w_in has type bfloat16, the rows float32"),
    "type of rows": (dict(rows=ROWS.astype(jnp.int8)), "rows has type int8"),
    "width": (dict(w_in=WEIGHTS.w_in[:, :12]), r"w_in has shape \(4, 12, 24\), not \(any, 16, any\)"),
    "experts": (dict(w_out=WEIGHTS.w_out[:2]), r"w_out has shape \(2, 24, 16\), not \(4, 24, 16\)"),
    "rows and tiles": (dict(rows=ROWS[:-1]), "95 rows are not a multiple of the 12 tiles"),
    "activation": (dict(activation="relu"), "'relu', not one of"),
    "missing gate": (dict(activation="silu_gated"), "needs w_gate"),
    "implementation": (dict(implementation="fast"), "'fast', not one of reference, dense, tiled"),
    "dense with groups": (dict(implementation="dense"), "one group, not 4"),
    "type for mosaic": (dict(implementation="mosaic"), "'mosaic' was given rows of type float32, not bfloat16"),
}


@pytest.mark.parametrize("wrong,message", WRONG.values(), ids=WRONG)
def test_wrong_operands_are_named_with_their_numbers(wrong, message):
    weights = WEIGHTS._replace(**{name: value for name, value in wrong.items() if name.startswith("w_")})
    options = {"activation": "gelu"} | {name: wrong[name] for name in ("activation", "implementation") if name in wrong}
    with pytest.raises(ValueError, match=message):
        gm.expert_mlp(wrong.get("rows", ROWS), weights, CASES["unequal"].groups(), **options)


def test_what_is_no_array_is_said_to_be_none():
    with pytest.raises(ValueError, match="rows is a list, not an array"):
        checks.check_groups([[1.0]], CASES["unequal"].groups())
