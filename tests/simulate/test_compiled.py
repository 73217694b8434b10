"""Recorded programs as the ledger reads them."""

import pytest

from moe_ep.config import Config
from moe_ep.simulate import compiled, schedule
from moe_ep.simulate.reference import Setting


def test_exchanges_of_loops_are_counted_as_often_as_they_run():
    """58 layers of two half batches, each sent and brought back; one pair stands half outside the loop."""
    count, largest = compiled.exchanges("prefill_16_staggered")
    assert 58 * 4 <= count <= 58 * 4 + 4
    assert 2 * 1024 * 7168 * 2 <= largest < 2 * (2 * 1024 * 7168 * 2)  # top-2 of half a batch, and its margin


def test_instructions_of_nested_loops():
    bodies = {
        "main": [{"kind": "loop", "body": "outer", "trip_count": 3}, {"kind": "compute"}],
        "outer": [{"kind": "call", "body": "inner"}],
        "inner": [{"kind": "loop", "body": "leaf", "trip_count": 2}],
        "leaf": [{"kind": "done"}],
    }
    assert [*schedule.flat({"computations": bodies}, "main")] == [({"kind": "done"}, 6), ({"kind": "compute"}, 1)]


def test_a_shared_nic_hides_less():
    shares = [compiled.walk("prefill_128_staggered", Setting(Config(), reading, False), 128)["hidden_share"]
              for reading in ("NIC per GPU", "NIC per node")]  # fmt: skip
    assert shares[0] > 0.95 > 2 * shares[1]


def test_recorded_memory_is_arguments_outputs_and_temporaries():
    for name, held in compiled.memory().items():
        parts = held["arguments"] + held["outputs"] + held["temporaries"]
        assert held["total"] == pytest.approx(parts), name
