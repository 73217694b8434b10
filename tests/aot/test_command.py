"""The commands: what is not installed, what cannot be, what is kept when a run is killed, what the pages say."""

import json
import subprocess
import sys

import pytest

from moe_ep import override
from moe_ep.aot import check, presets, summary
from moe_ep.aot.compare import CHOICES, choices_of, compare
from moe_ep.aot.compile import compile_program
from moe_ep.aot.report import aot_table
from moe_ep.aot.summary import summarize_kept
from moe_ep.config import ConfigError
from moe_ep.progress import Finished, Progress

WITHOUT_PLUGIN = """
import importlib.metadata, runpy, sys
sys.modules["jax_plugins"] = None
importlib.metadata.entry_points = lambda **_: ()
runpy.run_module("moe_ep.run", run_name="__main__")
"""


def test_without_the_gpu_compiler_one_line_says_what_to_install(tmp_path):
    command = [sys.executable, "-c", WITHOUT_PLUGIN, "--mode=aot", "--config=configs/seed_e16.py", f"--workdir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "scripts/setup cuda12, or pip install 'jax[cuda12]==" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_kernels_of_another_gpu_are_refused():
    config = override.apply(
        override.load("configs/seed_e16.py"), ["cluster.gpu=b200", "model.moe.implementation=mosaic"]
    )
    with pytest.raises(ConfigError, match="model.moe.implementation=mosaic: allowed is auto on b200"):
        compile_program(config)


def made_up(config):
    """A summary without a compiler: what fits at up to 4096 tokens."""
    fits = config.aot.tokens_per_gpu <= 4096
    total = 50_000_000_000 + (0 if fits else 20_000_000_000)
    share = 0.5 if fits else None
    links = {"same_node": 1e9, "other_node": 2e9}
    return {
        "program": config.aot.program, "dispatch": summary.dispatch_name(config), "collectives": [],
        "fits": fits, "missing_bytes": 0 if fits else 6_000_000_000, "compile_s": 1.0, "compile_cpu_s": 1.5, "hidden_share": share, "hidden_share_bound": share, "exchange_s": share,
        "predicted_step_s": share,
        "bytes_per_gpu": {"total": total, "outputs": 0, "temporaries": 1, "by_part": {"experts": 2}},
        "exchange_bytes_sent_per_gpu": links, "bytes_sent_per_gpu": links,
    }  # fmt: skip


def test_what_was_compiled_is_kept_and_not_compiled_again(monkeypatch, tmp_path):
    config, compiled = override.load("configs/seed_e16.py"), []
    monkeypatch.setattr(summary, "compile_program", lambda config: compiled.append(config))
    monkeypatch.setattr(summary, "summarize", lambda config, _: made_up(config))
    for _ in range(2):  # the second is the same command again
        finished = Finished(tmp_path / "rows.jsonl")
        rows = compare(config, summarize_kept(finished, lambda _: None), Progress("compare", len(CHOICES), shown=False))
        assert [row["dispatch"] for row in rows][-1] == "ragged, staggered"
        assert len(compiled) == len(CHOICES)
    odd = override.apply(config, ["aot.tokens_per_gpu=3072"])
    compare(odd, summarize_kept(finished, lambda _: None), Progress("compare", 1, shown=False))
    assert {one.dispatch.overlap for one in compiled[len(CHOICES) :]} == {"none", "chunks"}
    few = override.apply(override.load("configs/seed_e128.py"), ["aot.program=decode", "aot.tokens_per_gpu=8192"])
    assert [one.dispatch.chunks for one in choices_of(few)] == [1, 2, 1, 1, 1, 1, 1]  # buffers of three rows
    other = override.apply(config, ["aot.context=512"])
    summarize_kept(finished, lambda _: None)(other)
    assert compiled[-1] == other


def test_one_gpu_is_said_to_send_nothing():
    alone = override.apply(override.load("configs/seed_e16.py"), ["mesh.expert=1"])
    assert summary.describe(alone).endswith("1 x paper_h100, all_gather, staggered")
    assert "all_to_all" in summary.describe(override.load("configs/seed_e16.py"))


@pytest.mark.parametrize(("program", "said"), [("prefill", True), ("train", True), ("decode", False)])
def test_a_program_that_attends_over_whole_sequences_says_when_cudnn_does_not(program, said):
    settings = ["model.attention.value_dim=136", "aot.tokens_per_gpu=4096", f"aot.program={program}"]
    config = override.apply(override.load("configs/seed_e16.py"), settings)
    result = made_up(config) | {
        "gpus": 16, "loops_counted_once": 0, "synchronous_exchanges": 0, "hidden_share_all_collectives": 0.5,
    }  # fmt: skip
    assert ("cuDNN takes heads of at most 128 values" in aot_table(config, result)) == said


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("name", presets.PAGES)
def test_every_page_has_a_row_of_each_program_and_says_what_does_not_fit(name, fits):
    page = presets.PAGES[name]
    programs = presets.programs_of(["configs/seed_e16.py"], page.programs, [f"aot.tokens_per_gpu={4096 if fits else 8192}"])
    rows, text = page.make(programs, made_up, Progress(name, 1, shown=False))
    assert {row["name"] for row in rows} == {f"seed_e16 {program}" for program in page.programs}
    assert len(rows) == sum(map(page.rows_of, programs.values()))
    assert name == "limits" or text.count("6.00 GB missing") == (0 if fits else len(rows))
    assert "(compiled)" in text


def test_the_two_devices_are_compared_byte_by_byte(tmp_path):
    sizes = {"arguments": 100, "outputs": 0, "temporaries": 1000}
    real = {"programs": {"train": sizes | {"temporaries": 990}, "decode": sizes},
            "peak": {"train": {"before": 500, "after": 1089}}}  # fmt: skip
    rows = check.compare({"programs": {"train": sizes}}, real)  # decode was not compiled yet
    assert [(row["bytes_of"], row["within_goal"]) for row in rows] == [
        ("arguments", True), ("outputs", True), ("temporaries", True), ("peak", True),
    ]  # fmt: skip
    assert not check.compare({"programs": {"prefill": sizes}}, real)  # nor is the step whose peak was measured
    real["programs"]["train"] |= {"arguments": 101, "temporaries": 970}
    assert [row["within_goal"] for row in check.compare({"programs": {"train": sizes}}, real)] == [False, True, False, True]

    steps = {"auto": {"peak_bytes": 7, "steps": [{}, {}]}}
    run = {"device": "NVIDIA H200", "commit": "abc", "tokens": 64, "sequence": 8, "runs": steps}
    (tmp_path / "train_small_nvidia_h200.json").write_text(json.dumps(run))
    assert check.recorded_run(tmp_path, "small", "h200")["peak_bytes"] == 7
    assert check.recorded_run(tmp_path, "small", "h100") is None


def test_a_measured_pair_stays_on_the_page_until_the_next_is_complete(tmp_path):
    path = tmp_path / "check.json"
    assert check.on_file(path, "absent", "new") == ({}, None)
    sides = {name: {"commit": "old"} for name in ("absent", "real")}
    pair = {"sides": sides, "rows": [1]}
    path.write_text(json.dumps(pair | {"earlier": None}))
    assert check.on_file(path, "absent", "old") == ({"real": {"commit": "old"}}, pair)
    assert check.on_file(path, "absent", "new") == ({}, pair)
    path.write_text(json.dumps({"sides": {"absent": {"commit": "new"}}, "rows": [], "earlier": pair}))
    assert check.on_file(path, "real", "new") == ({"absent": {"commit": "new"}}, pair)
