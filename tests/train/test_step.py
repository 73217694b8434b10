"""One step's promises: waves, drops, non-finite gradients, accumulation, the balance rules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tests.train.small import batch, largest_error, make_config, mesh_of

from moe_ep.config import BalanceConfig
from moe_ep.model.names import by_path
from moe_ep.model.parameter import layers_of, stack_of
from moe_ep.model.staggered import over_layers
from moe_ep.model.transformer import for_computation
from moe_ep.train import balance
from moe_ep.train.optimizer import clip_by, global_norm
from moe_ep.train.state import abstract_state, init_state
from moe_ep.train.step import make_gradients, make_step, parameter_specs
from moe_ep.train.waves import Waves


def test_a_step_whose_routing_does_not_fit_changes_nothing():
    config = make_config(margin_sigmas=0.0)
    mesh = mesh_of(config, 8)
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(init_state(config, mesh))]
    after, report = make_step(config, mesh)(init_state(config, mesh), batch(config, mesh))
    assert not report.fits
    assert report.batch.dispatch.waves_needed > 1
    for old, new in zip(before, jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old, np.asarray(new))


def test_a_gradient_that_is_not_finite_changes_nothing():
    config = make_config()
    mesh = mesh_of(config, 2)
    state = init_state(config, mesh)
    state.parameters.head[...] = state.parameters.head[...].at[0, 0].set(jnp.inf)
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
    after, report = make_step(config, mesh)(state, batch(config, mesh))
    assert not report.finite
    for old, new in zip(before, jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old, np.asarray(new))


def test_accumulation_gives_the_gradients_of_the_whole_batch():
    config = make_config()
    mesh = mesh_of(config, 4)
    state, tokens = init_state(config, mesh), batch(config, mesh)
    specs = parameter_specs(config, mesh)

    def gradients(accumulation):
        changed = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulation=accumulation))
        return jax.jit(make_gradients(changed, specs, mesh))(state.parameters, tokens, state.bias, None)

    (whole, whole_report), (parts, parts_report) = gradients(1), gradients(2)
    assert largest_error(parts, whole) < 1e-5
    np.testing.assert_array_equal(parts_report.expert_counts, whole_report.expert_counts)
    assert abs(float(parts_report.loss - whole_report.loss)) < 1e-5


def test_counts_are_of_all_devices():
    config = make_config()
    mesh = mesh_of(config, 4, data=2)
    _, report = make_step(config, mesh)(init_state(config, mesh), batch(config, mesh))
    counts = np.asarray(report.batch.expert_counts)
    assert counts.dtype == np.int32
    np.testing.assert_array_equal(counts.sum(axis=1), [16 * 16 * 2] * 2)
    chosen = np.asarray(report.batch.choices)[0]
    for layer in range(2):
        np.testing.assert_array_equal(counts[layer], np.bincount(chosen[layer].reshape(-1), minlength=16))


COUNTS = jnp.array([[40841, 40840, 40839, 40840]], jnp.int32)


def test_load_fraction_moves_by_the_relative_excess():
    bias = jnp.array([[0.0, 0.1, 0.0, 0.0]], jnp.float32)
    counts = jnp.array([[30, 10, 0, 0]], jnp.int32)
    moved = balance.update(bias, counts, BalanceConfig("load_fraction", rate=0.5), mean_score=0.25)
    np.testing.assert_allclose(moved, [[-0.25, 0.1, 0.125, 0.125]], rtol=1e-6)


def test_sign_sees_a_difference_of_one():
    moved = balance.update(jnp.zeros((1, 4), jnp.float32), COUNTS, BalanceConfig("sign", rate=0.5), mean_score=9.0)
    np.testing.assert_array_equal(moved, [[-0.5, 0.0, 0.5, 0.0]])


def test_interval_is_whole_steps_and_at_least_one():
    assert balance.interval_from_ms(100.0, 26.0) == 4
    assert balance.interval_from_ms(1.0, 26.0) == 1


def test_waves_grow_at_once_and_shrink_after_a_calm():
    waves = Waves(1, calm_steps=3)
    assert not waves.accept(3)
    assert waves.current == 4
    assert [waves.accept(needed) for needed in (2, 2, 3, 1, 2)] == [True] * 5
    assert waves.current == 4
    assert waves.accept(2)
    assert waves.current == 2


@pytest.mark.parametrize("needed", [1, 2])
def test_one_wave_is_the_least(needed):
    waves = Waves(2, calm_steps=1)
    for _ in range(5):
        assert waves.accept(needed)
    assert waves.current == (1 if needed == 1 else 2)


def test_gradients_have_the_type_of_the_product_they_come_from_and_the_update_sees_float32():
    config = make_config()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16", unroll=True))
    mesh = mesh_of(config, 2)
    state = abstract_state(config, mesh)
    types = {str(leaf.dtype) for leaf in jax.tree.leaves(state.parameters)}
    assert types == {"float32"}
    by_name = by_path(jax.eval_shape(for_computation, state.parameters))
    wide = {name.split(".")[-1] for name, leaf in by_name.items() if leaf.dtype == jnp.float32}
    assert wide == {"embedding", "gain", "matrix"}
    assert all("router" in name for name in by_name if name.endswith("matrix"))
    calls = make_gradients(config, parameter_specs(config, mesh), mesh)
    gradients, _ = jax.eval_shape(calls, state.parameters, batch(config, mesh), state.bias, None)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(gradients)} == {"float32"}


def test_layers_written_out_are_the_loop_and_its_gradients():
    def step(x, layer):
        (layer,) = layer
        x = jnp.tanh(x * layer["scale"] + layer["shift"])
        return x, {"sum": jnp.sum(x), "nothing": None}

    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (5,), jnp.float32)
    layers = {name: jax.random.normal(key, (3, 5), jnp.float32) for name, key in zip(("scale", "shift"), keys[1:])}

    def run(x, layers):
        x, out = over_layers(step, x, layers)
        return jnp.sum(x) + jnp.sum(out["sum"] * jnp.arange(3.0)), out

    looped = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)(x, layers)
    value, (x_gradient, by_layer) = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)(x, layers_of(layers))
    assert len(by_layer) == 3
    written = value, (x_gradient, stack_of(by_layer))
    assert jax.tree.structure(looped) == jax.tree.structure(written)
    assert largest_error(written, looped) < 1e-5


def test_a_step_written_out_sums_the_gradients_of_every_layer():
    config = make_config()
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulation=2))
    mesh = mesh_of(config, 2, data=2)
    state, tokens, specs = init_state(config, mesh), batch(config, mesh), parameter_specs(config, mesh)

    def gradients(unroll):
        changed = dataclasses.replace(config, model=dataclasses.replace(config.model, unroll=unroll))
        return jax.jit(make_gradients(changed, specs, mesh))(state.parameters, tokens, state.bias, None)[0]

    looped, written = gradients(False), gradients(True)
    assert jax.tree.structure(looped) == jax.tree.structure(written)
    assert largest_error(written, looped) < 1e-5


def test_the_norm_is_of_all_gradients_and_clipping_scales_by_it():
    keys = jax.random.split(jax.random.key(1), 3)
    shapes = {"stack": (2, 3, 4), "matrix": (5, 6), "gain": (7,)}
    gradients = {name: jax.random.normal(key, shape, jnp.float32) for key, (name, shape) in zip(keys, shapes.items())}
    norm = global_norm(gradients)
    np.testing.assert_allclose(norm, np.sqrt(sum(np.sum(np.square(leaf)) for leaf in gradients.values())), rtol=1e-6)
    for largest in (0.5, 2.0 * float(norm)):
        clip = clip_by(largest)
        clipped, _ = clip.update(gradients, clip.init(gradients), norm=norm)
        expected, _ = optax.clip_by_global_norm(largest).update(gradients, optax.EmptyState())
        assert largest_error(clipped, expected) < 1e-6
