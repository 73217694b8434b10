"""Steps launched ahead: accepted once each, in order, whatever their routing needs."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from tests.train.small import batch, make_config, mesh_of

from moe_ep.config import DispatchConfig
from moe_ep.dispatch import DispatchCounts
from moe_ep.train.ahead import Launcher
from moe_ep.train.state import TrainState, init_state
from moe_ep.train.step import BatchReport, StepReport, make_step, with_waves


NO_COUNTS = DispatchCounts(*[0] * len(DispatchCounts._fields))


def recorded(drop=False):
    """Returns waves -> a program whose state's step is the tuple of steps it took; its tokens are (name, waves needed)."""

    def program_of(waves):
        def program(state, tokens, previous_fits):
            name, needed = tokens.tolist()
            fits = bool(previous_fits) and (needed <= waves or drop)
            batch = BatchReport(0.0, None, NO_COUNTS._replace(waves_needed=needed), None)
            report = StepReport(batch, gradient_norm=0.0, fits=fits, finite=True, max_bias=0.0)
            return state._replace(step=(*state.step, name)) if fits else state, report

        return program

    return program_of


def run(launcher, needs, ahead):
    state, accepted = TrainState((), *[None] * 5), []
    for step, needed in enumerate(needs):
        state = launcher.launch(state, jnp.array([step, needed]), step)
        while len(launcher) > (0 if step == len(needs) - 1 else ahead):
            state, one = launcher.read(state)
            accepted.append(one)
    return state.step, accepted


@given(needs=st.lists(st.integers(1, 9), min_size=1, max_size=30), ahead=st.integers(0, 3))
def test_every_step_is_taken_once_and_in_order(needs, ahead):
    config, said = make_config(), []
    launcher = Launcher(DispatchConfig(), mesh_of(config, 1), recorded(), said.append)
    launcher.waves.calm_steps = 2
    steps, accepted = run(launcher, needs, ahead)
    assert list(steps) == [one.step for one in accepted] == list(range(len(needs)))
    assert len(said) == sum(one.attempts - 1 for one in accepted)


def test_a_program_that_drops_never_runs_again():
    launcher = Launcher(DispatchConfig(drop=True), mesh_of(make_config(), 1), recorded(drop=True), print)
    steps, accepted = run(launcher, [9, 1, 9], ahead=1)
    assert steps == (0, 1, 2)
    assert [one.attempts for one in accepted] == [1, 1, 1]
    assert launcher.waves.current == 1


def test_a_step_launched_behind_one_that_does_not_fit_waits_for_its_second_run():
    config = make_config(margin_sigmas=0.0)
    mesh = mesh_of(config, 4)
    programs = {waves: make_step(with_waves(config, waves), mesh) for waves in (1, 2, 4)}
    batches = [batch(config, mesh, seed) for seed in range(2)]
    said = []
    launcher = Launcher(config.dispatch, mesh, programs.get, said.append)
    state = init_state(config, mesh)
    for step, tokens in enumerate(batches):
        state = launcher.launch(state, tokens, step)
    state, first = launcher.read(state)
    state, second = launcher.read(state)
    assert (first.step, second.step) == (0, 1)
    assert "step 0" in said[0]

    one_by_one = init_state(config, mesh)
    for tokens in batches:
        one_by_one, report = programs[launcher.waves.current](one_by_one, tokens, previous_fits=jnp.array(True))
    assert float(second.report.batch.loss) == float(report.batch.loss)
    for mine, other in zip(jax.tree.leaves(state), jax.tree.leaves(one_by_one), strict=True):
        np.testing.assert_array_equal(mine, other)
