"""The command line: wrong input ends with exit code 2 and one line; results go where they are asked to."""

import json
import subprocess
import sys

import pytest

WRONG = [
    (["--mode=trian"], "mode"),
    (["--nosuchflag=1"], "nosuchflag"),
    (["--devices=-1"], "devices"),
    (["--devices=many"], "devices"),
    (["--devices=100000"], "devices"),
    (["stray"], "stray"),
    (["--config=configs/nowhere.py"], "--config=configs/nowhere.py"),
    (["--config=README.md"], "--config=README.md"),
    (["--set", "train.steps"], "train.steps"),
    (["--set", "train.steps=ten"], "train.steps=ten"),
    (["--set", "train.steps=0"], "train.steps=0"),
    (["--set", "train.stepz=10"], "steps"),
    (["--set", "trian.steps=10"], "train"),
    (["--set", "train=10"], "train.steps"),
    (["--set", "seed.value=1"], "seed"),
    (["--set", "dispatch.drop=perhaps"], "true or false"),
    (["--set", "dispatch.transport=carrier_pigeon"], "all_to_all"),
    (["--set", "dispatch.overlap=none", "--set", "dispatch.chunks=2"], "dispatch.chunks=2"),
    (["--set", "model.moe.top_k=9"], "model.moe.num_experts = 8"),
    (["--set", "model.moe.groups=3"], "model.moe.groups=3"),
    (["--set", "model.attention.rope_dim=7"], "an even number"),
    (["--set", "model.dense_layers=4"], "model.layers = 4"),
    (["--set", "model.moe.top_k=nan"], "whole number"),
    (["--set", "train.optimizer.learning_rate=nan"], "finite"),
    (["--set", "mesh.expert=3"], "divisor"),
    (["--set", "mesh.expert=16"], "model.moe.num_experts = 8"),
    (["--set", "cluster.gpu=h9000"], "paper_h100"),
    (["--set", "cluster.nics_per_node=3"], "cluster.gpus_per_node = 8"),
    (["--set", "train.accumulation=3"], "train.batch_sequences = 16"),
    (["--set", "train.optimizer.beta2=1"], "less than 1"),
    (["--set", "balance.interval_ms=100", "--set", "balance.interval_steps=2"], "balance.interval_ms"),
    (["--json=/"], "--json=/"),
    (["--processes=2"], "--processes=2"),
    (["--coordinator=nowhere", "--processes=2", "--process=0"], "HOST:PORT"),
    (["--json=/proc/nowhere/result.json"], "--json=/proc/nowhere/result.json"),
    (["--json=README.md/result.json"], "--json=README.md/result.json"),
    (["--devices=3"], "mesh.expert=3"),
    (["--devices=8", "--set", "mesh.data=3", "--set", "mesh.expert=2"], "8 devices"),
    (["--devices=8", "--set", "train.batch_sequences=12"], "train.batch_sequences=12"),
    (["--devices=2", "--set", "data.path=/no/such/file.txt"], "/no/such/file.txt"),
    (["--devices=2", "--set", "model.vocabulary=100"], "100"),
    (["--devices=2", "--workdir=/proc/nowhere"], "--workdir=/proc/nowhere"),
]


def run(*arguments, **options):
    command = [sys.executable, "-m", "moe_ep.run", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


@pytest.mark.parametrize(("arguments", "named"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_wrong_input_is_one_line_and_exit_code_2(arguments, named, tmp_path):
    workdir = [] if any(argument.startswith("--workdir") for argument in arguments) else [f"--workdir={tmp_path}"]
    done = run(*arguments, *workdir)
    assert done.returncode == 2
    assert named in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_json_on_standard_output_stands_alone(tmp_path):
    small = ["train.steps=2", "train.sample_tokens=0", "train.validation_every=0", "train.optimizer.warmup_steps=1",
             "model.layers=2", "model.width=32", "model.attention.latent_dim=16", "train.sequence=32"]  # fmt: skip
    settings = [word for setting in small for word in ("--set", setting)]
    done = run("--json=-", "--devices=1", f"--workdir={tmp_path}", *settings)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    keys = ("loss_first loss_last steps tokens_per_s ms_per_step mfu max_over_mean_load load_cv rows_dropped "
            "parameters workdir")  # fmt: skip
    assert set(keys.split()) <= set(result)
    assert result["steps"] == 2
    assert "step 2/2" in done.stderr
