"""Configs: what presets say, typed overrides, derived sizes."""

import dataclasses
import glob
import json

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from moe_ep import override
from moe_ep.checks import check
from moe_ep.config import (
    Config,
    ConfigError,
    DispatchConfig,
    cpu8_tiny,
    flatten,
    to_json,
)
from moe_ep.parameter_counts import active_parameters, forward_flops_per_token, parameters_by_part
from moe_ep.model import mla
from moe_ep.model.transformer import Transformer, for_platform

PRESETS = sorted(glob.glob("configs/*.py"))


def test_presets_are_there():
    names = {path.split("/")[-1].removesuffix(".py") for path in PRESETS}
    assert names >= {"cpu8_tiny", "seed_e16", "seed_e32", "seed_e64", "seed_e128", "baseline_ep4", "baseline_ep8",
                     "baseline_ep16", "single_gpu"}  # fmt: skip


@pytest.mark.parametrize("path", PRESETS)
def test_preset_is_valid_and_its_parameters_are_counted(path):
    config = check(override.load(path))
    model = for_platform(config.model, "cpu")
    shapes = jax.eval_shape(lambda: Transformer(jax.random.key(0), model))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == sum(parameters_by_part(model).values())


@pytest.mark.parametrize(
    ("platform", "settings", "implementation"),
    [
        ("gpu", (), "cudnn"),
        ("cpu", (), "xla"),
        ("gpu", ("model.dtype=float32",), "xla"),
        ("gpu", ("model.attention.nope_dim=53",), "cudnn"),  # 69 is padded to 72
        ("gpu", ("model.attention.nope_dim=128", "model.attention.rope_dim=64"), "xla"),  # DeepSeek-V3's, without a GPU
        ("gpu", ("model.attention.value_dim=136",), "xla"),
    ],
)
def test_attention_is_cudnns_where_it_takes_the_heads(platform, settings, implementation):
    config = override.apply(override.load("configs/seed_e16.py"), settings)
    assert for_platform(config.model, platform).attention.implementation == implementation
    insisting = override.apply(config, ["model.attention.implementation=cudnn"])
    if implementation == "xla":
        with pytest.raises(ConfigError, match="model.attention.implementation=cudnn: allowed is auto or xla: cuDNN takes "):
            for_platform(insisting.model, platform)
    else:
        assert for_platform(insisting.model, platform) == insisting.model


@pytest.mark.parametrize(("capability", "implementation"), [(None, "xla"), ((8, 0), "xla"), ((9, 0), "cudnn"), ((10, 0), "cudnn")])
def test_wide_heads_are_cudnns_from_hopper_on(monkeypatch, capability, implementation):
    monkeypatch.setattr(mla, "gpu_capability", lambda: capability)
    config = override.apply(Config(), ["model.attention.nope_dim=192"]).model
    assert for_platform(config, "gpu").attention.implementation == implementation


def test_weights_per_gpu_of_the_reference_model():
    """SPEC of the experiment: 30.65 + 21.06 + 1.59 + 1.44 GB of BF16 with one expert per layer on a GPU."""
    parts = parameters_by_part(override.load("configs/seed_e128.py").model)
    gigabytes = {name: 2e-9 * count for name, count in parts.items()}
    assert gigabytes["experts"] / 128 == pytest.approx(30.65, abs=0.01)
    assert gigabytes["attention"] == pytest.approx(21.06, abs=0.01)
    assert gigabytes["dense"] == pytest.approx(1.59, abs=0.01)
    assert gigabytes["embedding"] == pytest.approx(1.44, abs=0.01)


def test_active_parameters_leave_out_unchosen_experts_and_the_embedding():
    model = cpu8_tiny().model
    parts = parameters_by_part(model)
    expected = sum(parts.values()) - parts["experts"] * 6 // 8 - parts["embedding"] // 2 - parts["norm"]
    assert active_parameters(model) == expected
    assert forward_flops_per_token(model, 128) > 2 * expected


def test_json_holds_every_field():
    assert json.loads(to_json(Config()))["model"]["moe"]["top_k"] == 2


_LEAVES = [(name, value) for name, _, value in flatten(Config()) if value is not None]


@hypothesis.given(st.sampled_from(_LEAVES))
def test_every_field_takes_its_own_value_back(leaf):
    name, value = leaf
    text = ",".join(str(item) for item in value) if isinstance(value, tuple) else str(value)
    assert override.apply(Config(), [f"{name}={text}"]) == Config()


def test_overrides_are_typed_and_applied_in_turn():
    config = override.apply(Config(), ["mesh.expert=8", "train.steps=1_000", "dispatch.drop=true", "mesh.expert=none"])
    assert (config.mesh.expert, config.train.steps, config.dispatch.drop) == (None, 1000, True)


@hypothesis.given(st.text(max_size=30))
def test_any_text_is_taken_or_refused_with_one_line(text):
    try:
        override.apply(Config(), [text])
    except ConfigError as error:
        assert "--set" in str(error)


@pytest.mark.parametrize(("text", "where"), [
    ("config = 3", "it has 3"),
    ("\nconfig = Nothing()", "line 2: NameError"),
    ("def f(:", "line 1"),
    ("import nowhere_at_all", "line 1: ModuleNotFoundError"),
])  # fmt: skip
def test_a_config_file_that_does_not_make_a_config_is_refused(text, where, tmp_path):
    path = tmp_path / "wrong.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"--config=.*{where}"):
        override.load(str(path))


def test_numbers_of_a_config_must_be_finite_and_positive():
    config = dataclasses.replace(Config(), train=dataclasses.replace(Config().train, steps=-1))
    with pytest.raises(ConfigError, match="train.steps=-1"):
        check(config)
    with pytest.raises(ConfigError, match="finite"):
        check(override.apply(Config(), [f"train.router_z_loss={np.inf}"]))


def test_overlap_auto_staggers_what_is_large_enough_and_splits_in_two():
    auto = DispatchConfig(overlap="auto")
    assert auto.overlap_for(tokens=2048, sequences=2) == "staggered"
    assert auto.overlap_for(tokens=8, sequences=8) == "none"  # decode: half batches would read all weights twice
    assert auto.overlap_for(tokens=512, sequences=512) == "staggered"
    assert auto.overlap_for(tokens=3072, sequences=3) == auto.overlap_for(tokens=1024, sequences=0) == "none"
    assert DispatchConfig(overlap="staggered").overlap_for(tokens=8, sequences=8) == "staggered"
