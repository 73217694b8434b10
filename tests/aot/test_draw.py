"""The picture of one layer: what is joined, what is a wait, and that over its memory it warns."""

import pytest

from moe_ep.aot.draw import Block, compute_blocks, draw_layer, layer_bodies, network_blocks
from moe_ep.aot.timeline import Event, Timeline, Transfer


def compute(scope, start_ms, end_ms):
    return Event("compute", scope, "gemm", scope, "layers", start_ms / 1e3, end_ms / 1e3)


def network(scope, start_ms, end_ms):
    return Event("network", scope, "all_to_all", scope, "layers", start_ms / 1e3, end_ms / 1e3)


def transfer(scope, body, count=3, backward=False):
    return Transfer(scope, "all_to_all", scope, body, backward, count, True, 0, 1, 1, 16, 1e-3, 0.0, [])


EVENTS = [
    compute("attention", 10, 11), compute("attention/latent", 11, 12), compute("moe/router", 12, 12.5),
    network("moe/dispatch", 12.5, 14.5), compute("moe/experts/up", 14.5, 16), network("moe/counts", 15, 15.5),
    compute("moe/experts/down", 18, 19),
]  # fmt: skip


def test_neighbors_of_one_part_are_joined_and_only_a_busy_network_is_waited_for():
    blocks = [block._replace(begin=round(block.begin, 6), end=round(block.end, 6)) for block in compute_blocks(EVENTS)]
    assert blocks == [
        Block("attention", "attention", 0, 2), Block("other", "", 2, 2.5), Block("experts", "experts", 4.5, 6),
        Block("experts", "experts", 8, 9), Block("waiting", "", 2.5, 4.5),
    ]  # fmt: skip
    assert [(block.kind, block.label) for block in network_blocks(EVENTS)] == [
        ("exchange", "dispatch\n2.00 ms"), ("collective", ""),
    ]  # fmt: skip


def test_a_layer_is_a_pass_through_each_loop_that_exchanges():
    passes = [transfer("moe/dispatch", "layers"), transfer("moe/dispatch", "back", backward=True)]
    loops = Timeline(1.0, 1.0, passes, EVENTS, {})
    assert {body: len(events) for body, events in layer_bodies(loops).items()} == {"layers": 7, "back": 0}
    unrolled = Timeline(1.0, 1.0, [transfer("moe/dispatch", "main", count=1)], EVENTS, {})
    assert list(layer_bodies(unrolled)) == [""]


@pytest.mark.parametrize("warning", ["", "does not fit"])
@pytest.mark.parametrize("events", [EVENTS, [compute("attention", 0, 1)]])
def test_every_timeline_can_be_drawn(events, warning, tmp_path):
    timeline = Timeline(1.0, 1.0, [transfer("moe/dispatch", "layers")], events, {})
    draw_layer(timeline, "prefill", "all hidden", tmp_path / "layer.png", warning=warning)
    assert (tmp_path / "layer.png").read_bytes().startswith(b"\x89PNG")
