"""One MoE layer on the cluster: seconds of its parts, from routing, placement, kernels and network."""

import dataclasses
import functools
import math

import numpy as np

from moe_ep.parameter_counts import attention_parameters
from moe_ep.cost import network, program, work
from moe_ep.cost import recipe as recipes
from moe_ep.cost.kernels import Work
from moe_ep.cost.network import Traffic
from moe_ep.cost.routing import Routing, buffer_rows, chances_met, most_met, nodes_reached, rows_between, with_busiest
from moe_ep.cost.units import Number
from moe_ep.placement import Placement, balanced, co_activated, contiguous
from moe_ep.simulate.memory import buffered_rows
from moe_ep.simulate.scenario import Scenario


@dataclasses.dataclass(frozen=True)
class Block:
    """One direction of one MoE layer for one micro-batch (or one chunk of it), in seconds.

    Forward it runs attention, dispatch, experts, combine; backward the same parts stand
    for their gradients, in reverse order.

    Attributes:
      attention: everything before the rows leave: attention, router, shared experts.
      experts: of each GPU of the expert group, [P].
      gather: collectives that attention itself needs (split weights, tensor parallelism).
      dispatch_traffic, combine_traffic: bytes at the ports.
    """

    attention: Number
    dispatch: Number
    experts: np.ndarray
    combine: Number
    gather: Number
    dispatch_traffic: Traffic
    combine_traffic: Traffic

    @functools.cached_property
    def slowest_experts(self) -> Number:
        return float(self.experts.max())

    @property
    def network(self) -> Number:
        return self.dispatch + self.combine + self.gather


@dataclasses.dataclass(frozen=True)
class LayerLoad:
    """Rows of one layer: between GPUs, and the busiest GPU over the mean."""

    rows: np.ndarray  # [P, P]
    placement: Placement
    share: np.ndarray  # [experts], as drawn
    active: Number  # experts with rows on the GPU that has most of them, as expected: an expert without is not read

    @property
    def max_over_mean(self) -> Number:
        received = self.rows.sum(axis=0)
        return float(received.max() / max(received.mean(), 1e-300))


def layer_load(scenario: Scenario, layer: int, tokens: Number) -> LayerLoad:
    """Draws a layer's choices and returns the rows between GPUs of one expert group."""
    layout = scenario.layout
    return _layer_load(scenario.routing, layer % len(scenario.routing.shares), tokens, scenario.model.moe.top_k,
                       layout.placement, layout.ep, scenario.slots, scenario.fabric.gpus_per_node)  # fmt: skip


@functools.lru_cache(maxsize=512)
def _layer_load(
    routing: Routing, layer: int, tokens: Number, top_k: int, kind: str, ep: int, slots: int, gpus_per_node: int
) -> LayerLoad:
    placement = place(routing, layer, kind, ep, slots, gpus_per_node)
    counts = routing.counts(layer, tokens, ep, top_k)
    share = counts.sum(axis=0) / max(counts.sum(), 1e-300)
    rows = rows_between(counts, placement)
    if routing.busiest is not None:
        rows = with_busiest(rows, routing.busiest)
    return LayerLoad(rows, placement, share, max(_active(routing, layer, tokens * ep, top_k, counts, placement), 1.0))


def _active(
    routing: Routing, layer: int, tokens: Number, top_k: int, counts: np.ndarray, placement: Placement
) -> Number:
    """Returns the experts with rows on the GPU that has most of them; where counts are exact half a row is half an expert."""
    if routing.sampled:
        met = chances_met(routing.shares[layer], tokens, top_k)
        return most_met(met[placement.slots] / placement.replicas[placement.slots])
    per_slot = counts.sum(axis=0)[placement.slots] / placement.replicas[placement.slots]
    return float(np.minimum(per_slot, 1.0).sum(axis=1).max())


@functools.lru_cache(maxsize=512)
def place(routing: Routing, layer: int, kind: str, ep: int, slots: int, gpus_per_node: int) -> Placement:
    """Returns where a layer's experts live."""
    experts = routing.shares.shape[1]
    if kind == "co_activated":
        return co_activated(routing.together, ep, min(gpus_per_node, ep))
    if kind == "balanced":
        return balanced(routing.shares[layer], ep, slots)
    return contiguous(experts, ep, slots)


def traffic(scenario: Scenario, load: LayerLoad, tokens: Number, bytes_per_value: Number) -> Traffic:
    """Returns the ports' bytes of a dispatch over the layout's transport."""
    row_bytes = scenario.model.width * bytes_per_value
    return _TRAFFIC[scenario.layout.transport](scenario, load, tokens, row_bytes)


def _ragged(scenario: Scenario, load: LayerLoad, tokens: Number, row_bytes: Number) -> Traffic:
    return network.direct_traffic(load.rows * row_bytes, scenario.fabric)


def _fixed_buffers(scenario: Scenario, load: LayerLoad, tokens: Number, row_bytes: Number) -> Traffic:
    """Every pair sends whole buffers; as many waves as the fullest pair needs."""
    layout, moe = scenario.layout, scenario.model.moe
    capacity = buffer_rows(tokens, moe.top_k, layout.ep, layout.margin_sigmas)
    waves = max(math.ceil(load.rows.max() / capacity), 1)
    sent = np.full_like(load.rows, capacity * waves)
    return network.direct_traffic(sent * row_bytes, scenario.fabric)


def _all_gather(scenario: Scenario, load: LayerLoad, tokens: Number, row_bytes: Number) -> Traffic:
    """Every GPU sends its tokens to all others, and gets partial sums back."""
    return network.direct_traffic(np.full_like(load.rows, tokens * row_bytes), scenario.fabric)


def _two_level(scenario: Scenario, load: LayerLoad, tokens: Number, row_bytes: Number) -> Traffic:
    """A row crosses once to each node that has one of its experts, and is copied on by NVLink there."""
    width = min(scenario.fabric.gpus_per_node, scenario.layout.ep)
    reached = nodes_reached(scenario.model, load.share, load.placement, width)
    to_nodes = np.tile(reached * tokens * row_bytes, (scenario.layout.ep, 1))
    return network.node_aggregated_traffic(to_nodes, load.rows * row_bytes, scenario.fabric)


_TRAFFIC = {"ragged": _ragged, "all_to_all": _fixed_buffers, "all_gather": _all_gather, "two_level": _two_level}


def make_block(scenario: Scenario, layer: int, tokens: Number, chunks: int, backward: bool, overlapped: bool) -> Block:
    """Returns one direction of a layer: attention on `tokens`, the rest on tokens / chunks.

    Args:
      overlapped: communication runs at the same time, on SMs that compute then lacks.
    """
    part = tokens / chunks
    load = layer_load(scenario, layer, part)
    precision, fabric, parameters = scenario.stack.precision, scenario.fabric, scenario.stack.network
    out = traffic(scenario, load, part, precision.dispatch_bytes_per_value)
    back = traffic(scenario, load, part, precision.combine_bytes_per_value).reversed()
    # Rows cross again where the backward pass computes whole blocks again.
    crossings = 2 if backward and scenario.remat == "block" else 1
    out, back = out.scaled(crossings), back.scaled(crossings)
    return Block(
        attention=attention_seconds(scenario, tokens, backward, overlapped),
        dispatch=network.all_to_all_seconds(out, fabric, parameters),
        experts=expert_seconds(scenario, load, backward, overlapped),
        combine=network.all_to_all_seconds(back, fabric, parameters),
        gather=gather_seconds(scenario, tokens),
        dispatch_traffic=out,
        combine_traffic=back,
    )


def seconds_of(scenario: Scenario, calls: list[Work], overlapped: bool) -> Number:
    """Returns the time of calls one after another on one GPU."""
    stack = scenario.stack
    kernels = stack.kernels
    if overlapped and stack.overlap_compute_share != 1.0:
        kernels = dataclasses.replace(kernels, compute_share=stack.overlap_compute_share)
    return sum(kernels.seconds(call, scenario.fabric.gpu) for call in calls)


def attention_seconds(
    scenario: Scenario, tokens: Number, backward: bool, overlapped: bool, routed: bool = True
) -> Number:
    """Returns attention, router and shared experts of one layer; backward with what is computed again."""
    model, stack = scenario.model, scenario.stack
    calls = _attention_calls(scenario, tokens) + [work.block_pass(model, tokens)]
    if routed:
        calls += work.router(model, tokens) + work.shared_experts(model, tokens, stack.precision)
    launches = small_seconds(scenario, program.small_kernels(scenario.workload.phase, routed))
    more = _recipe_calls(scenario, tokens) if backward else []
    seconds = with_backward(scenario, calls, backward, overlapped) + seconds_of(scenario, more, overlapped)
    return seconds + launches * (_passes(scenario) if backward else 1)


def small_seconds(scenario: Scenario, kernels: int) -> Number:
    """Returns the seconds of so many kernels that do next to nothing; none in other software than this project's."""
    return kernels * scenario.stack.kernels.launch_s if scenario.stack.is_compiled else 0.0


def _recipe_calls(scenario: Scenario, tokens: Number) -> list[Work]:
    """Attention and shared experts; the routed ones are with their own."""
    recipe, model = scenario.stack.recipe, scenario.model
    if recipe is None:
        return []
    shared = model.moe.shared_experts
    calls = recipes.attention_backward(recipe, model, tokens * scenario.layout.tp, scenario.layout.tp)
    return calls + (recipes.experts_backward(recipe, model, tokens * shared, shared) if shared else [])


def _attention_calls(scenario: Scenario, tokens: Number) -> list[Work]:
    model, workload, precision, tp = scenario.model, scenario.workload, scenario.stack.precision, scenario.layout.tp
    compiled = scenario.stack.is_compiled
    if workload.phase == "decode":
        calls = work.attention_decode(model, tokens * tp, workload.verified, workload.context, precision, tp)
        sequences = tokens * tp / workload.verified
        return calls + (program.decode_passes(model, sequences, workload.context, tp) if compiled else [])
    values = program.head_width(model) if compiled else None
    keys = workload.paged_keys
    calls = work.attention_prefill(model, tokens * tp, workload.context, precision, tp, values, keys)
    expanded = work.expanded_rows(tokens * tp, workload.context, keys)
    return calls + (program.prefill_passes(model, tokens * tp, expanded, tp) if compiled else [])


def _passes(scenario: Scenario) -> int:
    """How often the backward direction runs through a layer: once, and once more where it computes it again."""
    return 1 if scenario.remat == "none" else 2


def expert_seconds(scenario: Scenario, load: LayerLoad, backward: bool, overlapped: bool) -> np.ndarray:
    """Returns the experts' time on each GPU; between the least, mean and most loaded one it is interpolated."""
    rows = load.rows.sum(axis=0)
    nodes = np.unique(np.maximum([rows.min(), rows.mean(), rows.max()], 1e-9))
    launch = scenario.stack.expert_launch_s * (3 if backward else 1)
    seconds = [_experts_on(scenario, node, load.active, backward, overlapped) for node in nodes]
    return np.interp(rows, nodes, seconds) + launch


def _experts_on(scenario: Scenario, rows: Number, active: Number, backward: bool, overlapped: bool) -> Number:
    travelled = scenario.layout.ep > 1 or not scenario.stack.is_compiled
    calls = work.experts(scenario.model, rows, active, scenario.stack.precision, travelled)
    if travelled and scenario.stack.is_compiled and scenario.layout.transport == "all_to_all":
        calls += program.exchange_passes(scenario.model, rows, buffered_rows(scenario))
    seconds = with_backward(scenario, calls, backward, overlapped)
    if backward and scenario.stack.recipe:
        more = recipes.experts_backward(scenario.stack.recipe, scenario.model, rows, active)
        seconds += seconds_of(scenario, more, overlapped)
    return seconds


def with_backward(scenario: Scenario, calls: list[Work], backward: bool, overlapped: bool) -> Number:
    if not backward:
        return seconds_of(scenario, calls, overlapped)
    again = [] if scenario.remat == "none" else calls
    return seconds_of(scenario, work.backward(calls) + again, overlapped)


def gather_seconds(scenario: Scenario, tokens: Number) -> Number:
    """Returns attention's own collectives: split weights gathered, tensor-parallel rows gathered and summed."""
    model, layout, fabric = scenario.model, scenario.layout, scenario.fabric
    parameters = scenario.stack.network
    seconds = 0.0
    if layout.split_attention_weights:
        bytes_gathered = attention_parameters(model.width, model.attention) * scenario.stack.precision.weight_bytes
        seconds += network.gather_seconds(bytes_gathered, min(fabric.gpus_per_node, layout.ep), fabric, parameters)
    if layout.tp > 1:
        rows_bytes = tokens * layout.tp * model.width * 2
        seconds += 2 * network.gather_seconds(rows_bytes, layout.tp, fabric, parameters)
    return seconds
