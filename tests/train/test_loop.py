"""Whole runs: what is written, and that an interrupted run continues as if it had not been."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from tests.train.small import make_config, mesh_of

from moe_ep.config import BalanceConfig, ConfigError
from moe_ep.cost.routing import make_routing
from moe_ep.train import loop
from moe_ep.train.checkpoint import Checkpoints
from moe_ep.train.loop import train
from moe_ep.train.state import abstract_state


def loop_config(steps):
    config = make_config()
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vocabulary=320),
        balance=BalanceConfig("sign", rate=0.01, interval_steps=2),
        train=dataclasses.replace(
            config.train, steps=steps, checkpoint_every=2, validation_every=2, validation_batches=1, sample_tokens=0
        ),
    )


def saved_state(config, mesh, workdir, step):
    checkpoints = Checkpoints(workdir / "checkpoints", kept=2)
    state, extra = checkpoints.restore(step, abstract_state(config, mesh))
    checkpoints.close()
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)], extra


def test_an_interrupted_run_continues_bit_for_bit(tmp_path, monkeypatch):
    config = loop_config(steps=4)
    mesh = mesh_of(config, 4)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    result = train(config, mesh, whole)

    monkeypatch.setattr("moe_ep.train.loop._validate", _fail_at_second_call())
    with pytest.raises(KeyboardInterrupt):
        train(config, mesh, broken)
    monkeypatch.undo()
    resumed = train(config, mesh, broken)

    assert resumed["steps"] == 4
    for key in ("loss_first", "loss_last", "validation_loss", "max_over_mean_load", "rows_dropped"):
        assert resumed[key] == result[key]
    expected, expected_extra = saved_state(config, mesh, whole, 4)
    actual, actual_extra = saved_state(config, mesh, broken, 4)
    assert actual_extra == expected_extra
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    check_files(broken, steps=4)
    check_trace(config, broken)


def _fail_at_second_call():
    """Returns a validation that is interrupted at step 4, after step 2 was saved."""
    validate, calls = loop._validate, itertools.count(1)

    def interrupted(run, state, validation):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return validate(run, state, validation)

    return interrupted


def check_files(workdir, steps):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert {"loss", "tokens_per_s", "mfu", "max_over_mean_load", "load_cv", "rows_dropped"} <= set(lines[0])
    assert (workdir / "training.png").read_bytes().startswith(b"\x89PNG")
    assert list((workdir / "tensorboard").iterdir())
    assert json.loads((workdir / "config.json").read_text())["train"]["steps"] == steps
    with np.load(workdir / "expert_load.npz") as load:
        assert load["counts"].shape == (steps, 2, 16)


def check_trace(config, workdir):
    """The last step's choices are what the load counted, and a routing of the simulator."""
    moe, train = config.model.moe, config.train
    path = workdir / "routing_trace.npy"
    assert np.load(path).shape == (config.model.moe_layers, train.batch_sequences * train.sequence, moe.top_k)
    with np.load(workdir / "expert_load.npz") as load:
        counted = load["counts"][-1]
    shares = make_routing(f"trace:{path}", moe.num_experts, moe.top_k).shares
    np.testing.assert_allclose(shares, counted / counted.sum(axis=1, keepdims=True))


def test_another_models_directory_is_refused(tmp_path):
    config = loop_config(steps=1)
    (tmp_path / "config.json").write_text('{"model": {"layers": 99}}')
    with pytest.raises(ConfigError, match="same model"):
        train(config, mesh_of(config, 1), tmp_path)
