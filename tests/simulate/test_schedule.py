"""The engine that walks compiled schedules, by hand on small ones."""

import pytest

from moe_ep.config import Config, ConfigError
from moe_ep.cost.kernels import AssumedKernels
from moe_ep.cost.network import NetworkParameters
from moe_ep.override import apply
from moe_ep.simulate import schedule
from moe_ep.simulate.compiled import FOLDER
from moe_ep.simulate.from_config import fabric_of
from moe_ep.simulate.main import simulate

FABRIC = fabric_of(Config().cluster)
PEAK = AssumedKernels(mfu=1.0, memory_efficiency=1.0)
LINES = NetworkParameters("lines", "line rate, no latency", nic_efficiency=1.0, nvlink_efficiency=1.0, latency_s=0.0)


def compute(name: str, seconds: float) -> dict:
    """A pass over so many bytes as take so long at the memory's full rate."""
    touched = seconds * FABRIC.gpu.memory_bytes_per_s
    return {"kind": "compute", "name": name, "op": "other", "flops": 0, "bytes": touched, "dtype": "bf16", "scope": ""}


def collective(kind: str, name: str, seconds: float, scope: str = "moe/dispatch") -> dict:
    """An all-to-all over two nodes of eight whose NICs are busy so long: half of the bytes leave the node."""
    moved = seconds * FABRIC.nic_bytes_per_s * 2
    return {"kind": kind, "name": name, "op": "all_to_all", "bytes": moved, "group_size": 16, "group_stride": 1,
            "scope": scope}  # fmt: skip


def walk(instructions: list[dict], body: list[dict] | None = None) -> dict:
    document = {"format": schedule.FORMAT, "gpus": 16, "entry": "main",
                "computations": {"main": instructions, "body": body or []}}  # fmt: skip
    return schedule.walk(document, FABRIC, PEAK, LINES)


def test_a_synchronous_collective_holds_compute():
    result = walk([compute("a", 1.0), collective("collective", "x", 2.0), compute("b", 1.0)])
    assert result["step_s"] == pytest.approx(4.0)
    assert result["hidden_share"] == 0


def test_what_stands_between_start_and_done_hides_it():
    result = walk([
        collective("collective_start", "x", 2.0), compute("a", 1.5),
        {"kind": "collective_done", "name": "y", "start": "x"}, compute("b", 1.0),
    ])  # fmt: skip
    assert result["step_s"] == pytest.approx(3.0)
    assert result["hidden_share"] == pytest.approx(0.75)
    assert result["hidden_share_by_scope"]["moe/dispatch"] == pytest.approx(0.75)


def test_collectives_queue_on_the_network():
    result = walk([
        collective("collective_start", "x", 1.0), collective("collective_start", "y", 1.0), compute("a", 0.5),
        {"kind": "collective_done", "name": "yd", "start": "y"},
        {"kind": "collective_done", "name": "xd", "start": "x"},
    ])  # fmt: skip
    assert result["step_s"] == pytest.approx(2.0)


def test_a_loop_repeats_its_body():
    body = [compute("a", 1.0), collective("collective", "x", 0.5)]
    loop = {"kind": "loop", "name": "w", "body": "body", "trip_count": 58}
    result = walk([compute("before", 1.0), loop], body)
    assert result["step_s"] == pytest.approx(1.0 + 58 * 1.5)
    assert result["exposed_s"] == pytest.approx(29.0)


def test_products_take_their_shapes_and_empty_expert_rows_are_skipped():
    product = {"kind": "compute", "name": "g", "op": "gemm", "flops": 2 * 8192 * 7168 * 18432.0, "bytes": 0,
               "gemms": [[8192, 18432, 7168, 1]], "dtype": "bf16", "scope": "moe/experts"}  # fmt: skip
    document = {"format": schedule.FORMAT, "gpus": 16, "entry": "main", "computations": {"main": [product]}}
    whole, half = (schedule.walk(document, FABRIC, PEAK, LINES, share)["step_s"] for share in (1.0, 0.5))
    assert whole == pytest.approx(2 * 8192 * 7168 * 18432 / 400e12)
    assert half == pytest.approx(whole / 2)


def test_a_schedule_is_walked_from_the_config(tmp_path):
    path = FOLDER / "prefill_16_none.json"
    result = simulate(apply(Config(), [f"simulate.schedule={path}"]), tmp_path)
    assert result["gpus"] == 16 and result["tokens_per_s_per_gpu"] > 0
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ConfigError, match="allowed is a JSON object of format moe_ep.schedule/1"):
        simulate(apply(Config(), [f"simulate.schedule={tmp_path / 'other.json'}"]))
