"""Real programs compiled for clusters that are not here: what fits, what travels, what hides it."""

import dataclasses
import importlib.util
import json

import pytest

from moe_ep import override
from moe_ep.aot.compile import compile_program
from moe_ep.aot.main import summarize, write_files
from moe_ep.aot.topology import compile_only_devices
from moe_ep.config import ClusterConfig, ConfigError

needs_cuda_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason="needs XLA's GPU compiler: jax[cuda12]"
)


@needs_cuda_compiler
@pytest.mark.parametrize(("experts", "attention_gb"), [(16, 21.06), (128, 21.06)])
def test_full_size_prefill_hides_every_exchange_but_the_last(experts, attention_gb, tmp_path):
    config = override.load(f"configs/seed_e{experts}.py")
    compiled = compile_program(config)
    result = summarize(config, compiled)
    assert (result["gpus"], result["fits"], result["missing_bytes"]) == (experts, True, 0)
    assert result["bytes_per_gpu"]["by_part"]["attention"] / 1e9 == pytest.approx(attention_gb, abs=0.02)
    assert result["bytes_per_gpu"]["by_part"]["experts"] == 58 * 2 * 7168 * 18432 * 2

    exchanges = [transfer for transfer in compiled.timeline.transfers if transfer.is_exchange]
    assert sorted(transfer.count for transfer in exchanges) == [1, 58, 58, 58, 58]
    for transfer in exchanges:
        assert transfer.count == 1 or (transfer.asynchronous and transfer.has_products_between), transfer
    assert result["hidden_share"] >= 0.95

    files = write_files(config, compiled, tmp_path)
    with open(files["trace"], encoding="utf-8") as trace:
        lanes = {event["tid"] for event in json.load(trace)["traceEvents"]}
    assert lanes == {0, 1}


@needs_cuda_compiler
def test_a_layout_that_does_not_fit_says_what_is_missing():
    config = override.apply(override.load("configs/seed_e16.py"), ["mesh.expert=8", "dispatch.overlap=none"])
    result = summarize(config, compile_program(config))
    sizes = result["bytes_per_gpu"]
    assert not result["fits"]
    assert result["missing_bytes"] == sizes["total"] - 64e9 > 0
    assert sizes["by_part"]["experts"] == 2 * 58 * 2 * 7168 * 18432 * 2


def test_clusters_that_cannot_be():
    cluster = ClusterConfig()
    with pytest.raises(ConfigError, match="cluster.gpu=h300: allowed is one of paper_h100"):
        compile_only_devices(dataclasses.replace(cluster, gpu="h300"), 16)
    with pytest.raises(ConfigError, match="cluster.gpus_per_node=8: allowed is a divisor of 12 GPUs"):
        compile_only_devices(cluster, 12)


@needs_cuda_compiler
def test_decode_holds_the_latents_of_its_sequences():
    settings = ["aot.program=decode", "aot.tokens_per_gpu=8192", "dispatch.transport=ragged"]
    config = override.apply(override.load("configs/seed_e16.py"), settings)
    result = summarize(config, compile_program(config))
    assert result["bytes_per_gpu"]["by_part"]["kv_cache"] == 61 * 8192 * 3600 * 2
    assert result["fits"]
    # Eight sequences' rows, two a token, out and back: the exact transport sends no more.
    sent = {c["bytes_per_gpu"] for c in result["collectives"] if c["op"] == "ragged_all_to_all"}
    assert sent == {8 / 2 * 2 * 7168 * 2 * 15 / 16}
