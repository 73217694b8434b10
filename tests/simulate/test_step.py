"""The fast formula and the timeline agree; what holds of every layout: bytes, links, roofline, names of ranks."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_ep.config import AttentionConfig, ModelConfig, MoEConfig
from moe_ep.cost.network import Fabric, all_to_all_seconds
from moe_ep.cost.routing import make_routing
from moe_ep.hardware import GPUS
from moe_ep.placement import renumbered
from moe_ep.simulate import layer
from moe_ep.simulate.predict import predict
from moe_ep.simulate.scenario import Layout, Scenario, Workload, own_stack
from moe_ep.simulate.step import (
    compute_seconds,
    forward_seconds,
    network_seconds,
    paired_seconds,
    stage_work,
    step_seconds,
)
from moe_ep.simulate.timeline import forward_timeline, pass_timeline, pipeline_seconds

MODEL = ModelConfig(
    layers=10, dense_layers=2, width=2048, hidden=4096, vocabulary=1024,
    attention=AttentionConfig(heads=16, latent_dim=256), moe=MoEConfig(num_experts=32, hidden=16384),
)  # fmt: skip


def scenario(
    ep: int = 32, overlap: str = "none", chunks: int = 1, phase: str = "prefill", batch: int = 1024,
    routing: str = "uniform", transport: str = "ragged", gpus: int = 32, pp: int = 1, nics: int = 8,
) -> Scenario:  # fmt: skip
    return Scenario(
        model=MODEL,
        fabric=Fabric(GPUS["h100"], 8, nics, 50e9),
        layout=Layout(gpus, ep, pp=pp, overlap=overlap, chunks=chunks, transport=transport),
        workload=Workload(phase, 1024, tokens_per_gpu=batch, sequences_per_gpu=batch, micro_batches=4),
        routing=make_routing(routing, 32, 2),
        stack=own_stack(),
    )


SCENARIOS = st.builds(
    scenario,
    ep=st.sampled_from([1, 2, 4, 8, 16, 32]),
    overlap=st.sampled_from(["none", "chunks", "staggered"]),
    chunks=st.sampled_from([1, 2, 4]),
    phase=st.sampled_from(["prefill", "decode"]),
    batch=st.sampled_from([4, 64, 1024]),
    routing=st.sampled_from(["balanced", "uniform", "zipf:0.6"]),
    transport=st.sampled_from(["ragged", "all_to_all", "all_gather", "two_level"]),
    nics=st.sampled_from([1, 8]),
)


@given(SCENARIOS)
def test_formula_and_timeline_agree(case):
    """Within 1 %: between the slowest rank of each layer and the slowest rank of each task nothing else lies."""
    stage = stage_work(case)
    chunks = case.layout.chunks if case.layout.overlap == "chunks" else 1
    timeline = forward_timeline(stage, case.layout.overlap, chunks)
    formula = forward_seconds(stage, case.layout.overlap, chunks)
    assert timeline.seconds == pytest.approx(formula, rel=0.01)


@given(SCENARIOS)
def test_a_step_lies_between_its_parts_and_their_sum(case):
    stage = stage_work(case)
    chunks = case.layout.chunks if case.layout.overlap == "chunks" else 1
    seconds = step_seconds(case, stage)
    compute, network = compute_seconds(stage, chunks), network_seconds(stage, chunks)
    assert max(compute, network) * (1 - 1e-9) <= seconds <= (compute + network) * (1 + 1e-9)


@given(SCENARIOS, st.floats(1.0, 8.0), st.floats(1.0, 8.0))
def test_faster_links_never_slow_a_step(case, nic, nvlink):
    gpu = dataclasses.replace(case.fabric.gpu, nvlink_bytes_per_s=case.fabric.gpu.nvlink_bytes_per_s * nvlink)
    fabric = dataclasses.replace(case.fabric, gpu=gpu, nic_bytes_per_s=case.fabric.nic_bytes_per_s * nic)
    faster = dataclasses.replace(case, fabric=fabric)
    assert predict(faster).step_s <= predict(case).step_s * (1 + 1e-9)


@given(SCENARIOS)
def test_never_below_the_roofline(case):
    """No step is faster than its FLOPs, the weights and cache that it reads, or its bytes on either link allow."""
    prediction = predict(case)
    assert prediction.mfu <= 1
    assert prediction.memory_bandwidth_utilisation <= 1
    assert prediction.nic_utilisation <= 1 and prediction.nvlink_utilisation <= 1


@given(SCENARIOS)
def test_alone_on_its_gpus_an_expert_group_does_not_communicate(case):
    alone = dataclasses.replace(case, layout=dataclasses.replace(case.layout, ep=1))
    assert network_seconds(stage_work(alone), case.layout.chunks) == 0
    prediction = predict(alone)
    assert prediction.exposed_communication_share == 0
    assert prediction.nic_utilisation == prediction.nvlink_utilisation == 0


@given(SCENARIOS, st.sampled_from([1, 64, 1000]))
def test_every_byte_sent_is_received(case, tokens):
    load = layer.layer_load(case, 0, tokens)
    moved = layer.traffic(case, load, tokens, 2.0)
    assert moved.nvlink_out.sum() == pytest.approx(moved.nvlink_in.sum())
    assert moved.nic_out.sum() == pytest.approx(moved.nic_in.sum())
    assert load.rows.sum() == pytest.approx(case.layout.ep * tokens * case.model.moe.top_k)
    if case.layout.transport == "ragged":
        crossing = 2.0 * case.model.width * (load.rows.sum() - np.trace(load.rows))
        assert moved.nvlink_out.sum() + moved.nic_out.sum() == pytest.approx(crossing)


@given(SCENARIOS, st.randoms(use_true_random=False), st.sampled_from([64, 1000]))
def test_renumbering_ranks_changes_nothing(case, random, tokens):
    """Nodes change places, and so do the ranks, alike in every node."""
    ep, width = case.layout.ep, min(case.fabric.gpus_per_node, case.layout.ep)
    nodes, ranks = list(range(ep // width)), list(range(width))
    random.shuffle(nodes)
    random.shuffle(ranks)
    rename = np.array([nodes[device // width] * width + ranks[device % width] for device in range(ep)])
    load = layer.layer_load(case, 0, tokens)
    rows = np.empty_like(load.rows)
    rows[np.ix_(rename, rename)] = load.rows
    renamed = layer.LayerLoad(rows, renumbered(load.placement, rename), load.share, load.active)
    before, after = (
        all_to_all_seconds(layer.traffic(case, one, tokens, 2.0), case.fabric, case.stack.network) for one in (load, renamed)
    )
    assert after == pytest.approx(before)
    seconds = [layer.expert_seconds(case, one, False, False).max() for one in (load, renamed)]
    assert seconds[1] == pytest.approx(seconds[0])


def test_staggering_hides_what_compute_can_cover():
    slow = Fabric(GPUS["paper_h100"], 8, 8, 50e9)
    serial, staggered = (
        predict(dataclasses.replace(scenario(batch=4096, overlap=overlap), fabric=slow))
        for overlap in ("none", "staggered")
    )
    assert serial.hidden_communication_share == pytest.approx(0, abs=1e-9)
    assert staggered.hidden_communication_share > 0.5
    assert staggered.step_s < serial.step_s


@pytest.mark.parametrize("chunks, hidden", [(2, 0.5), (4, 0.75)])
def test_chunks_leave_the_first_dispatch_and_the_last_combine(chunks, hidden):
    """Where compute is plenty, 2 of 2n collectives stay exposed."""
    case = scenario(batch=16384, overlap="chunks", chunks=chunks, routing="balanced")
    stage = stage_work(case)
    assert stage.forward[0].slowest_experts > stage.forward[0].dispatch + stage.forward[0].combine
    assert predict(case).hidden_communication_share == pytest.approx(hidden, abs=0.01)
    timeline = forward_timeline(stage, "chunks", chunks)
    assert timeline.hidden_share() == pytest.approx(hidden, abs=0.01)


def test_the_slowest_rank_sets_the_pace():
    stage = stage_work(scenario(routing="balanced"))
    block = stage.forward[0]
    slow = block.experts.copy()
    slow[5] *= 3
    slowed = dataclasses.replace(block, experts=slow)
    longer = pass_timeline([slowed], 0.0, "none", 1).seconds - pass_timeline([block], 0.0, "none", 1).seconds
    assert longer == pytest.approx(2 * block.experts[5])


def test_an_expert_without_rows_is_not_read():
    """Two tokens choose at most four of 32 experts on one GPU."""
    few, all_of_them = (scenario(ep=1, gpus=1, phase="decode", batch=batch) for batch in (2, 64))
    loads = [layer.layer_load(case, 0, case.workload.tokens) for case in (few, all_of_them)]
    assert loads[0].active <= 4 < 30 <= loads[1].active
    seconds = [layer.expert_seconds(case, load, False, False)[0] for case, load in zip((few, all_of_them), loads)]
    assert seconds[0] < 0.25 * seconds[1]


def test_training_computes_three_times_and_communicates_twice_what_prefill_does():
    forward, both = stage_work(scenario(batch=4096)), stage_work(scenario(batch=4096, phase="train"))
    assert network_seconds(both, 1) == pytest.approx(2 * network_seconds(forward, 1))
    in_layers = [dataclasses.replace(stage, dense_s=0.0, dense_backward_s=0.0) for stage in (forward, both)]
    assert compute_seconds(in_layers[1], 1) == pytest.approx(3 * compute_seconds(in_layers[0], 1), rel=0.1)
    assert step_seconds(scenario(phase="train"), both) > 4 * compute_seconds(both, 1)  # four micro-batches


def test_forward_and_backward_cover_each_other():
    case = scenario(phase="train", overlap="forward_backward", batch=4096)
    stage = stage_work(case)
    parts = compute_seconds(stage, 1), network_seconds(stage, 1)
    assert max(parts) <= paired_seconds(stage) * (1 + 1e-9) < sum(parts)


@given(st.integers(1, 6), st.integers(1, 12), st.floats(0.1, 3), st.floats(0.1, 3))
def test_pipeline_formula_is_the_event_by_event_one(stages, micro_batches, forward, backward):
    expected = (max(micro_batches, 1) + stages - 1) * (forward + backward)
    seconds = pipeline_seconds(forward, backward, 0.0, stages, micro_batches)
    if micro_batches >= stages:
        assert seconds == pytest.approx(expected)
    else:  # too few micro-batches: stages overlap less than the formula's full alternation
        assert seconds <= expected * (1 + 1e-9)


def test_a_serving_pipeline_keeps_its_throughput_and_waits_longer():
    whole, split = predict(scenario(ep=8, gpus=8)), predict(scenario(ep=8, gpus=16, pp=2))
    assert split.tokens_per_s_per_gpu == pytest.approx(whole.tokens_per_s_per_gpu, rel=0.25)
    assert split.bytes_per_gpu["weights"] < 0.6 * whole.bytes_per_gpu["weights"]


