"""Generation from a checkpoint, and the sampler."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_ep.config import ConfigError, GenerateConfig, MeshConfig
from moe_ep.serve import generate as serving
from moe_ep.serve.sampler import Sampling, draw, greedy
from moe_ep.train.loop import train
from tests.train.small import make_config, mesh_of, with_dispatch


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns a config and the directory of two training steps at EP 4."""
    config = make_config()
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vocabulary=320),
        train=dataclasses.replace(
            config.train,
            steps=2,
            validation_every=0,
            sample_tokens=0,
            optimizer=dataclasses.replace(config.train.optimizer, warmup_steps=1),
        ),
    )
    workdir = tmp_path_factory.mktemp("trained")
    train(config, mesh_of(config, 4), workdir)
    return config, workdir


def generate(trained, monkeypatch, expert, **fields):
    config, workdir = trained
    prompts = workdir / "prompts.txt"
    prompts.write_text("The value of\na\n")
    options = GenerateConfig(prompt_file=str(prompts), max_tokens=8, **fields)
    config = dataclasses.replace(config, generate=options, mesh=MeshConfig(data=1, expert=expert))
    monkeypatch.setattr(serving, "make_mesh", lambda *_: mesh_of(config, expert))
    return serving.generate(config, workdir)["completions"]


def test_greedy_text_is_the_same_at_every_ep_degree_and_transport(trained, monkeypatch):
    config, workdir = trained
    alone = generate(trained, monkeypatch, 1)
    assert [completion["prompt"] for completion in alone] == ["The value of", "a"]
    assert all(0 < completion["tokens"] <= 8 for completion in alone)
    gathered = with_dispatch(config, transport="all_gather"), workdir
    for spread in (generate(trained, monkeypatch, 4), generate(gathered, monkeypatch, 4)):
        assert [one["token_ids"] for one in spread] == [one["token_ids"] for one in alone]


def test_a_directory_without_a_checkpoint_is_refused(trained, tmp_path):
    with pytest.raises(ConfigError, match="--workdir"):
        serving.generate(trained[0], tmp_path)


def options(rows, temperature=1.0, top_k=0, top_p=1.0):
    return Sampling(
        jnp.full(rows, temperature, jnp.float32),
        jnp.full(rows, top_k, jnp.int32),
        jnp.full(rows, top_p, jnp.float32),
        jnp.arange(rows, dtype=jnp.uint32),
    )


LOGITS = jnp.log(jnp.array([0.1, 0.5, 0.15, 0.25], jnp.float32))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [0.1, 0.5, 0.15, 0.25]),
        ({"temperature": 0.0}, [0, 1, 0, 0]),
        ({"top_k": 2}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_p": 0.6}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_p": 1e-6}, [0, 1, 0, 0]),
        ({"temperature": 0.5}, np.array([0.01, 0.25, 0.0225, 0.0625]) / 0.345),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(fields, expected):
    rows = 4000
    logits = jnp.broadcast_to(LOGITS[None, :], (rows, 4))
    drawn = jax.jit(draw)(logits, options(rows, **fields), jnp.full(rows, 7, jnp.int32))
    share = np.bincount(np.asarray(drawn), minlength=4) / rows
    np.testing.assert_allclose(share, expected, atol=0.03)


def test_greedy_takes_the_lowest_of_equal_ids():
    logits = jnp.array([[0.0, 2.0, 2.0], [1.0, 0.0, -1.0]], jnp.float32)
    np.testing.assert_array_equal(greedy(logits, options(2), jnp.zeros(2, jnp.int32)), [1, 0])
