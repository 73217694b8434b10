"""34 published measurements: the inputs of each, and what this project predicts for it.

Values are given for the calibration half alone, which sets the free parameters
(calibration.py). The held-out half carries no value here.
"""

import dataclasses
import functools
import typing

from moe_ep.cost import work
from moe_ep.cost.network import all_to_all_seconds
from moe_ep.cost.routing import make_routing
from moe_ep.cost.units import Number
from moe_ep.simulate import published
from moe_ep.simulate.layer import Block, make_block, seconds_of
from moe_ep.simulate.predict import predict
from moe_ep.simulate.published import DEEPSEEK_V3, Parameters
from moe_ep.simulate.scenario import Layout, Scenario, Workload
from moe_ep.simulate.step import paired_seconds, stage_work


@dataclasses.dataclass(frozen=True)
class Point:
    """One published measurement.

    Attributes:
      value: as published, of a calibration row; None of a held-out one.
      family: rows of one family share an error bar: all_to_all, gemm, serving, training, ratio.
      assumed: what the source leaves open and this prediction takes.
    """

    id: str
    unit: str
    family: str
    network: str
    source: str
    predict: typing.Callable[[Parameters], Number]
    value: Number | None = None
    assumed: str = ""


@functools.lru_cache(maxsize=None)
def _routing(spec: str, busiest: Number | None = None):
    return dataclasses.replace(make_routing(spec, DEEPSEEK_V3.moe.num_experts, DEEPSEEK_V3.moe.top_k), busiest=busiest)


def _low_latency(parameters: Parameters, gpu: str, ep: int, tokens: Number) -> Block:
    workload = Workload("decode", 4096, sequences_per_gpu=tokens)
    scenario = Scenario(DEEPSEEK_V3, published.cluster(gpu), Layout(ep, ep, transport="ragged"), workload,
                        _routing("balanced"), published.decode_stack(parameters))  # fmt: skip
    return make_block(scenario, 0, tokens, 1, backward=False, overlapped=False)


def _dispatch_us(ep: int) -> typing.Callable[[Parameters], Number]:
    return lambda parameters: 1e6 * _low_latency(parameters, "h800", ep, 128).dispatch


def _combine_us(ep: int) -> typing.Callable[[Parameters], Number]:
    return lambda parameters: 1e6 * _low_latency(parameters, "h800", ep, 128).combine


def _expert_gemm_us(ep: int) -> typing.Callable[[Parameters], Number]:
    """The table counts tokens over the whole expert group: 128 / ep on each GPU."""
    return lambda parameters: 1e6 * _low_latency(parameters, "h100", ep, 128 / ep).slowest_experts


def trace_scenario(parameters: Parameters) -> Scenario:
    """Returns DeepSeek's training trace: EP 64, one sequence of 4096, forward covers backward."""
    layout = Layout(64, 64, overlap="forward_backward", transport="two_level")
    workload = Workload("train", 4096, tokens_per_gpu=4096)
    model = dataclasses.replace(DEEPSEEK_V3, layers=4, dense_layers=0)
    stack = published.training_stack(parameters, fp8=True)
    return Scenario(model, published.cluster("h800"), layout, workload, _routing("balanced"), stack)


def _trace_span_ms(parameters: Parameters) -> Number:
    scenario = trace_scenario(parameters)
    stage = stage_work(scenario)
    layers = dataclasses.replace(stage, dense_s=0.0, dense_backward_s=0.0)
    return 1e3 * scenario.stack.step_factor * paired_seconds(layers)


def _trace_collective_ms(which: str) -> typing.Callable[[Parameters], Number]:
    def milliseconds(parameters: Parameters) -> Number:
        scenario = trace_scenario(parameters)
        block = make_block(scenario, 0, 4096, 1, backward=False, overlapped=True)
        moved = block.dispatch_traffic if which == "dispatch" else block.combine_traffic
        return 1e3 * all_to_all_seconds(moved, scenario.fabric, scenario.stack.network)

    return milliseconds


def _trace_gemm_ms(parameters: Parameters) -> Number:
    """16 calls are, of each of 4 layers, two products forward and their two input gradients."""
    scenario = trace_scenario(parameters)
    calls = work.experts(DEEPSEEK_V3, 4096 * 8, 4, scenario.stack.precision)
    products = [call for call in calls if call.op == "grouped_gemm"]
    return 1e3 * 4 * 2 * seconds_of(scenario, products, overlapped=True)


def _trace_hidden(parameters: Parameters) -> Number:
    """What the span exceeds its compute by is exposed."""
    scenario = trace_scenario(parameters)
    stage = stage_work(scenario)
    network = sum(block.network for block in stage.forward + stage.backward)
    compute = sum(block.attention + block.slowest_experts for block in stage.forward + stage.backward)
    return 1 - min(max(network - compute, 0.0) / network, 1.0)


def _prefill(gpu: str, context: int, slots: int | None, balanced: bool) -> typing.Callable[[Parameters], Number]:
    def tokens_per_s_per_node(parameters: Parameters) -> Number:
        routing = _routing("balanced", None if balanced else parameters.busiest)
        layout = Layout(32, 32, overlap="staggered", transport="two_level", slots=slots,
                        placement="balanced" if slots else "contiguous")  # fmt: skip
        stack = published.throughput_stack(parameters, parameters.serve_factor)
        workload = Workload("prefill", context, tokens_per_gpu=16384)
        return 8 * _rate(Scenario(DEEPSEEK_V3, published.cluster(gpu), layout, workload, routing, stack))

    return tokens_per_s_per_node


def _rate(scenario: Scenario) -> Number:
    return predict(dataclasses.replace(scenario, ignore_memory=True)).tokens_per_s_per_gpu


# Redundant experts of SGLang's deployment: 32, so 288 slots on 32 or 72 GPUs.
_REDUNDANT_SLOTS = 288
# Second tokens accepted: 85-90 % (arXiv:2412.19437, section 5.4.3).
_MTP_ACCEPTED = 1.875
# Expert popularity of DeepSeek models that AIConfigurator takes when nothing is balanced.
_UNBALANCED = "power_law:1.01"


def _decode_rate(
    parameters: Parameters, gpu: str, ep: int, workload: Workload, slots: int | None, routing, overlap: str
) -> Number:
    placement = "contiguous" if slots is None or routing.busiest is None else "balanced"
    layout = Layout(ep, ep, overlap=overlap, transport="ragged", slots=slots, placement=placement)
    stack = published.decode_stack(parameters)
    return _rate(Scenario(DEEPSEEK_V3, published.cluster(gpu), layout, workload, routing, stack))


def _sglang_decode(
    parameters: Parameters, workload: Workload, balancer: bool = True, overlap: str = "staggered"
) -> Number:
    routing = _routing("balanced", parameters.busiest) if balancer else _routing(_UNBALANCED)
    return 8 * _decode_rate(parameters, "h100", 72, workload, _REDUNDANT_SLOTS // 72, routing, overlap)


_DECODE_256 = Workload("decode", 2000, sequences_per_gpu=256)
_DECODE_MTP = Workload("decode", 4000, sequences_per_gpu=128, verified=2, accepted=_MTP_ACCEPTED)


def _tbo_ratio(parameters: Parameters) -> Number:
    return _sglang_decode(parameters, _DECODE_256) / _sglang_decode(parameters, _DECODE_256, overlap="none")


def _eplb_ratio(parameters: Parameters) -> Number:
    return _sglang_decode(parameters, _DECODE_256) / _sglang_decode(parameters, _DECODE_256, balancer=False)


def _profile_decode(parameters: Parameters) -> Number:
    workload = Workload("decode", 4096, sequences_per_gpu=128)
    return 8 * _decode_rate(parameters, "h800", 128, workload, None, _routing("balanced"), "staggered")


def _vllm(parameters: Parameters) -> Number:
    routing = _routing("balanced", parameters.busiest)
    return _decode_rate(parameters, "h200", 32, _DECODE_256, _REDUNDANT_SLOTS // 32, routing, "staggered")


def _training(
    gpu: str, layout: Layout, micro_batches: int, tokens: Number, fp8: bool, domain: int = 8
) -> typing.Callable[[Parameters], Number]:
    def tokens_per_s_per_gpu(parameters: Parameters) -> Number:
        stack = published.training_stack(parameters, fp8)
        workload = Workload("train", 4096, tokens_per_gpu=tokens, micro_batches=micro_batches)
        fabric = published.cluster(gpu, domain)
        return _rate(Scenario(DEEPSEEK_V3, fabric, layout, workload, _routing("balanced"), stack))

    return tokens_per_s_per_gpu


_PRETRAIN = Layout(2048, 64, pp=16, overlap="forward_backward", transport="two_level", schedule="dualpipe")
_MEGATRON_H100 = Layout(1024, 64, tp=2, pp=8, overlap="forward_backward", transport="two_level", interleaved=4)
_MEGATRON_GB200 = Layout(256, 64, pp=4, transport="ragged", interleaved=4)

_DEEPEP, _TRACE = "deepseek-ai/DeepEP docs/legacy.md", "deepseek-ai/profile-data train.json"
_AIC = "ai-dynamo/aiconfigurator tables"
_LMSYS, _PROFILE = "LMSYS 2025-05-05", "deepseek-ai/profile-data via LMSYS"
_LOW, _HIGH = "deepep_low_latency", "deepep_throughput"
_TOKENS = "128 tokens over the whole expert group, as the table's own collector counts"
_DISPATCHES = {8: None, 16: 118, 32: None, 64: 173, 128: None, 256: None}
_COMBINES = {16: 195, 32: None, 64: 314, 128: None, 256: None}
_GEMMS = {8: 530, 32: None, 64: None, 128: 54}

POINTS: tuple[Point, ...] = (
    *(Point(f"deepep-ll-dispatch-{ep}", "us", "all_to_all", _LOW, _DEEPEP, _dispatch_us(ep), value)
      for ep, value in _DISPATCHES.items()),
    *(Point(f"deepep-ll-combine-{ep}", "us", "all_to_all", _LOW, _DEEPEP, _combine_us(ep), value)
      for ep, value in _COMBINES.items()),
    Point("deepseek-trace-span", "ms", "training", _HIGH, _TRACE, _trace_span_ms, 128.5),
    Point("deepseek-trace-dispatch", "ms", "all_to_all", _HIGH, _TRACE, _trace_collective_ms("dispatch"), 3.88),
    Point("deepseek-trace-combine", "ms", "all_to_all", _HIGH, _TRACE, _trace_collective_ms("combine"), 6.18),
    Point("deepseek-trace-gemm", "ms", "gemm", "none", _TRACE, _trace_gemm_ms, 22.9),
    Point("deepseek-trace-hidden", "fraction", "ratio", _HIGH, _TRACE, _trace_hidden, 0.96),
    *(Point(f"expert-gemm-{ep}", "us", "gemm", "none", _AIC, _expert_gemm_us(ep), value, _TOKENS)
      for ep, value in _GEMMS.items()),
    Point("sglang-prefill-1k", "tokens/s", "serving", _HIGH, _LMSYS, _prefill("h100", 1024, 9, False)),
    Point("sglang-prefill-2k", "tokens/s", "serving", _HIGH, _LMSYS, _prefill("h100", 2048, 9, False), 54543),
    Point("sglang-prefill-4k", "tokens/s", "serving", _HIGH, _LMSYS, _prefill("h100", 4096, 9, False)),
    Point("sglang-prefill-4k-perfect", "tokens/s", "serving", _HIGH, _LMSYS, _prefill("h100", 4096, 9, True), 59337),
    Point("sglang-decode-256", "tokens/s", "serving", _LOW, _LMSYS, lambda p: _sglang_decode(p, _DECODE_256), 22282),
    Point("sglang-decode-128-mtp", "tokens/s", "serving", _LOW, _LMSYS, lambda p: _sglang_decode(p, _DECODE_MTP),
          assumed="two tokens verified a step, 1.875 kept (arXiv:2412.19437, section 5.4.3)"),
    Point("sglang-tbo-decode", "ratio", "ratio", _LOW, _LMSYS, _tbo_ratio),
    Point("sglang-eplb-decode", "ratio", "ratio", _LOW, _LMSYS, _eplb_ratio,
          assumed="unbalanced popularity as AIConfigurator takes it: power law 1.01"),
    Point("deepseek-profile-prefill", "tokens/s", "serving", _HIGH, _PROFILE, _prefill("h800", 4096, None, True)),
    Point("deepseek-profile-decode", "tokens/s", "serving", _LOW, _PROFILE, _profile_decode),
    Point("deepseek-pretrain", "tokens/s", "training", _HIGH, "arXiv:2412.19437",
          _training("h800", _PRETRAIN, 15360 // 128, 4096, fp8=True)),
    Point("megatron-h100-1024", "tokens/s", "training", _HIGH, "NVIDIA-NeMo/Megatron-Bridge performance summary",
          _training("h100", _MEGATRON_H100, 8192 // 64, 2048, fp8=False),
          assumed="BF16; forward covers backward; 4 virtual stages; DeepEP"),
    Point("megatron-gb200-256", "tokens/s", "training", _HIGH, "NVIDIA-NeMo/Megatron-Bridge performance summary",
          _training("gb200", _MEGATRON_GB200, 4096 // 64, 4096, fp8=False, domain=64),
          assumed="EP 64 inside one NVLink domain; nothing overlapped; 4 virtual stages"),
    Point("vllm-h200-wide", "tokens/s", "serving", _LOW, "vLLM blog 2025-12-17", _vllm,
          assumed="EP 32, 256 sequences a GPU, 32 redundant experts"),
)  # fmt: skip


def find(point_id: str) -> Point | None:
    """Returns the point of that id, None where there is none."""
    return next((point for point in POINTS if point.id == point_id), None)
