"""Network: bytes sent are bytes received, one GPU sends nothing, faster links never slow anything."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ep.cost.network import (
    NCCL,
    Fabric,
    all_reduce_seconds,
    all_to_all_seconds,
    direct_traffic,
    gather_seconds,
    node_aggregated_traffic,
    send_seconds,
)
from moe_ep.hardware import GPUS

FABRIC = Fabric(GPUS["h100"], 4, 4, 50e9)
FREE = dataclasses.replace(NCCL, latency_s=0.0, latency_per_round_s=0.0, nic_efficiency=1.0, nvlink_efficiency=1.0)


def matrices(gpus: int):
    return st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed).uniform(0, 1e6, (gpus, gpus)))


@settings(max_examples=25, deadline=None)
@given(matrices(8), st.sampled_from([1, 2, 4]))
def test_bytes_sent_are_bytes_received(matrix, nics):
    fabric = dataclasses.replace(FABRIC, nics_per_node=nics)
    traffic = direct_traffic(matrix, fabric)
    assert traffic.nvlink_out.sum() == pytest.approx(traffic.nvlink_in.sum())
    assert traffic.nic_out.sum() == pytest.approx(traffic.nic_in.sum())
    off_diagonal = matrix.sum() - np.trace(matrix)
    assert traffic.nvlink_out.sum() + traffic.nic_out.sum() == pytest.approx(off_diagonal)


@settings(max_examples=15, deadline=None)
@given(matrices(8))
def test_aggregated_bytes_are_conserved_and_delivered(matrix):
    to_nodes = np.full((8, 2), 1e5)
    traffic = node_aggregated_traffic(to_nodes, matrix, FABRIC)
    assert traffic.nic_out.sum() == pytest.approx(traffic.nic_in.sum()) == pytest.approx(8e5)
    assert traffic.nvlink_out.sum() == pytest.approx(traffic.nvlink_in.sum())


def test_one_gpu_sends_nothing():
    assert all_to_all_seconds(direct_traffic(np.ones((1, 1)), FABRIC), FABRIC, NCCL) == 0
    assert gather_seconds(1e9, 1, FABRIC, NCCL) == 0


def test_the_busiest_link_decides():
    matrix = np.zeros((8, 8))
    matrix[0, 5] = 50e9  # node 0 to node 1: a second of the NIC
    matrix[0, 1] = 45e9  # a tenth of a second of NVLink
    assert all_to_all_seconds(direct_traffic(matrix, FABRIC), FABRIC, FREE) == pytest.approx(1.0)
    shared = dataclasses.replace(FABRIC, nics_per_node=1)
    matrix[1, 6] = 50e9  # with one NIC in the node it queues behind the other
    assert all_to_all_seconds(direct_traffic(matrix, FABRIC), FABRIC, FREE) == pytest.approx(1.0)
    assert all_to_all_seconds(direct_traffic(matrix, shared), shared, FREE) == pytest.approx(2.0)


@settings(max_examples=25, deadline=None)
@given(matrices(8), st.floats(1, 10), st.floats(1, 10))
def test_faster_links_never_slow_a_collective(matrix, nic, nvlink):
    faster = dataclasses.replace(
        FABRIC, nic_bytes_per_s=50e9 * nic,
        gpu=dataclasses.replace(FABRIC.gpu, nvlink_bytes_per_s=FABRIC.gpu.nvlink_bytes_per_s * nvlink),
    )  # fmt: skip
    for seconds in (
        lambda fabric: all_to_all_seconds(direct_traffic(matrix, fabric), fabric, NCCL),
        lambda fabric: all_reduce_seconds(matrix.sum(), 8, fabric, NCCL),
        lambda fabric: send_seconds(matrix.sum(), fabric, NCCL),
    ):
        assert seconds(faster) <= seconds(FABRIC) * (1 + 1e-12)


@settings(max_examples=15, deadline=None)
@given(matrices(8), st.permutations(range(4)), st.booleans())
def test_renumbering_ranks_inside_nodes_and_nodes_changes_nothing(matrix, order, swap_nodes):
    rename = np.concatenate([np.array(order), 4 + np.array(order)])
    rename = (rename + 4) % 8 if swap_nodes else rename
    renamed = np.empty_like(matrix)
    renamed[np.ix_(rename, rename)] = matrix
    before, after = (all_to_all_seconds(direct_traffic(m, FABRIC), FABRIC, NCCL) for m in (matrix, renamed))
    assert before == pytest.approx(after)


def test_a_gather_across_nodes_is_bound_by_the_nic():
    inside = gather_seconds(450e9, 4, FABRIC, FREE)
    assert inside == pytest.approx(0.75)
    # All of the node's NICs carry the ring's bytes.
    assert gather_seconds(200e9, 8, FABRIC, FREE) == pytest.approx(200e9 * 7 / 8 / 200e9)
    # One member a node: its share of the NICs.
    assert gather_seconds(50e9, 2, FABRIC, FREE, stride=4) == pytest.approx(0.5)
