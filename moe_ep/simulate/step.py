"""The fast formula: seconds of one step, in closed form over the layers of a stage."""

import dataclasses

from moe_ep.parameter_counts import parameters_by_part
from moe_ep.cost import network, program, work
from moe_ep.cost.kernels import memory_pass
from moe_ep.cost.memory import parameters_per_gpu, saved_bytes
from moe_ep.cost.units import Number
from moe_ep.simulate.layer import Block, attention_seconds, make_block, small_seconds, with_backward
from moe_ep.simulate.memory import gradients_are_summed, plan_of
from moe_ep.simulate.scenario import Scenario


@dataclasses.dataclass(frozen=True)
class StageWork:
    """What one pipeline stage does for one micro-batch, before overlap.

    Attributes:
      forward, backward: blocks of the stage's MoE layers. With chunks a block's dispatch,
        experts and combine are of one chunk; with two batches a block is of one of them.
      dense_s, dense_backward_s: dense layers, the output head, and passes that belong to no layer.
      update_s: optimizer and the sum of gradients over replicas, once a step.
      send_s: activations to the next stage.
      batches: micro-batches that march together (staggered: 2).
    """

    forward: list[Block]
    backward: list[Block]
    dense_s: Number
    dense_backward_s: Number
    update_s: Number
    send_s: Number
    batches: int


def pairs_forward_with_backward(scenario: Scenario) -> bool:
    """True where the forward pass of one micro-batch covers the backward pass of another (as in DualPipe)."""
    return scenario.layout.overlap == "forward_backward"


def stage_work(scenario: Scenario) -> StageWork:
    """Evaluates every distinct layer once; the stage's layers take them in turn."""
    layout, workload, model = scenario.layout, scenario.workload, scenario.model
    batches = 2 if layout.overlap == "staggered" else 1
    tokens = workload.tokens / batches
    chunks = layout.chunks if layout.overlap == "chunks" else 1
    overlapped = layout.overlap != "none"
    layers = stage_layers(scenario)
    distinct = min(len(scenario.routing.shares), layers)

    def blocks(backward: bool) -> list[Block]:
        made = [make_block(scenario, layer, tokens, chunks, backward, overlapped) for layer in range(distinct)]
        return [made[layer % distinct] for layer in range(layers)]

    training = workload.phase == "train"
    return StageWork(
        forward=blocks(backward=False),
        backward=blocks(backward=True) if training else [],
        dense_s=batches * _dense_seconds(scenario, tokens, False),
        dense_backward_s=batches * _dense_seconds(scenario, tokens, True) + _kept_seconds(scenario) if training else 0.0,
        update_s=_update_seconds(scenario) if training else 0.0,
        send_s=_send_seconds(scenario),
        batches=batches,
    )


def stage_layers(scenario: Scenario) -> int:
    """Returns the MoE layers of the slowest stage: one without dense layers or head, where there are several."""
    model, stages = scenario.model, scenario.layout.pp
    return model.moe_layers if stages == 1 else min(-(-model.layers // stages), model.moe_layers)


def _dense_seconds(scenario: Scenario, tokens: Number, backward: bool) -> Number:
    """Dense layers and the head; the slowest of several stages has none of them."""
    model, workload = scenario.model, scenario.workload
    if scenario.layout.pp > 1:
        return 0.0
    calls = work.dense_layer(model, tokens, scenario.stack.precision, 1)
    attention = attention_seconds(scenario, tokens, backward, False, routed=False)
    dense = with_backward(scenario, calls, backward, False) + attention
    logits = tokens / workload.context if workload.phase == "prefill" else tokens
    head = with_backward(scenario, work.output_head(model, logits, 1), backward, False)
    return model.dense_layers * dense + head + small_seconds(scenario, program.STEP_KERNELS)


def _kept_seconds(scenario: Scenario) -> Number:
    """What a compiled training pass moves beside its products: gradients, kept activations, the loss."""
    if not scenario.stack.is_compiled:
        return 0.0
    plan, layout = plan_of(scenario), scenario.layout
    looped, several = not scenario.model.unroll, scenario.workload.micro_batches > 1
    moved = program.pass_bytes(sum(parameters_per_gpu(plan).values()), looped, several, layout.stage_gpus > 1)
    one_batch = dataclasses.replace(plan, saved_layers=plan.model.layers / layout.pp)
    moved += program.kept_bytes(saved_bytes(one_batch), looped)
    logits = program.loss_bytes(plan.model, plan.tokens) if layout.pp == 1 else 0.0
    return _pass_time(scenario, moved + logits)


def _pass_time(scenario: Scenario, touched: Number) -> Number:
    return scenario.stack.kernels.seconds(memory_pass(touched), scenario.fabric.gpu)


def _update_seconds(scenario: Scenario) -> Number:
    """Gradients summed over the replicas of each part, and the passes over what a GPU holds."""
    model, layout, fabric, parameters = scenario.model, scenario.layout, scenario.fabric, scenario.stack.network
    parts = parameters_by_part(model)
    experts = parts["experts"] * scenario.slots / model.moe.num_experts / layout.pp
    rest = (sum(parts.values()) - parts["experts"]) / layout.pp
    seconds = network.all_reduce_seconds(experts * 4, layout.expert_replicas, fabric, parameters, layout.ep)
    seconds += network.all_reduce_seconds(rest * 4, layout.stage_gpus, fabric, parameters)
    return seconds + _pass_time(scenario, program.update_bytes(experts + rest, gradients_are_summed(scenario)))


def _send_seconds(scenario: Scenario) -> Number:
    if scenario.layout.pp == 1:
        return 0.0
    sent = scenario.workload.tokens * scenario.model.width * 2
    return network.send_seconds(sent, scenario.fabric, scenario.stack.network)


def forward_seconds(stage: StageWork, overlap: str, chunks: int) -> Number:
    """Returns the time of the forward pass of a stage's micro-batch (both of them, with two batches)."""
    return stage.dense_s + _pass_seconds(stage.forward, overlap, chunks)


def backward_seconds(stage: StageWork, overlap: str, chunks: int) -> Number:
    """Returns the time of the backward pass of a stage's micro-batch."""
    return stage.dense_backward_s + _pass_seconds(stage.backward, overlap, chunks)


def _pass_seconds(blocks: list[Block], overlap: str, chunks: int) -> Number:
    return _PASS[overlap](blocks, chunks)


def _serial(blocks: list[Block], chunks: int) -> Number:
    return sum(b.attention + b.gather + b.dispatch + b.slowest_experts + b.combine for b in blocks)


def _chunked(blocks: list[Block], chunks: int) -> Number:
    return sum(b.attention + b.gather + chunked_seconds(b, chunks) for b in blocks)


def chunked_seconds(block: Block, chunks: int) -> Number:
    """Returns dispatch, experts and combine in chunks; the network serves dispatch i + 1 before combine i."""
    network_free = compute_free = 0.0
    arrived = []
    for chunk in range(chunks + 1):
        if chunk < chunks:
            network_free += block.dispatch
            arrived.append(network_free)
        if chunk > 0:
            compute_free = max(compute_free, arrived[chunk - 1]) + block.slowest_experts
            network_free = max(network_free, compute_free) + block.combine
    return network_free


def _staggered(blocks: list[Block], chunks: int) -> Number:
    """Two batches, half a layer apart: four pairs of compute and network a layer, each joined at its end."""
    if not blocks:
        return 0.0
    seconds = blocks[0].attention + blocks[0].gather
    for block, following in zip(blocks, [*blocks[1:], None]):
        next_attention = following.attention if following else 0.0
        next_gather = following.gather if following else 0.0
        seconds += max(block.dispatch, block.attention)
        seconds += max(block.slowest_experts, block.dispatch)
        seconds += max(block.combine + next_gather, block.slowest_experts)
        seconds += max(block.combine, next_attention)
    return seconds


_PASS = {"none": _serial, "chunks": _chunked, "staggered": _staggered, "forward_backward": _serial}


def paired_seconds(stage: StageWork) -> Number:
    """Returns one forward and one backward pass that cover each other: per layer the busier of compute and network."""
    seconds = stage.dense_s + stage.dense_backward_s
    for ahead, back in zip(stage.forward, stage.backward):
        compute = ahead.attention + ahead.slowest_experts + back.attention + back.slowest_experts
        seconds += max(compute, ahead.network + back.network)
    return seconds


def compute_seconds(stage: StageWork, chunks: int) -> Number:
    """Returns the compute of a stage's micro-batch on its slowest GPU, were nothing to wait for."""
    blocks = stage.forward + stage.backward
    layers = sum(block.attention + chunks * block.slowest_experts for block in blocks)
    return stage.dense_s + stage.dense_backward_s + stage.batches * layers


def network_seconds(stage: StageWork, chunks: int) -> Number:
    """Returns the collectives of a stage's micro-batch, were nothing to wait for."""
    blocks = stage.forward + stage.backward
    return sum(stage.batches * chunks * (block.dispatch + block.combine) + block.gather for block in blocks)


def step_seconds(scenario: Scenario, stage: StageWork) -> Number:
    """Returns the step: one forward pass, or all micro-batches of a training step with its update.

    Of a pipeline that serves it is the period at which a stage takes the next micro-batch.
    1F1B idles (stages - 1) micro-batches, divided by the virtual stages of each GPU;
    DualPipe (stages / 2 - 1) x (F&B + B - 3 W) (DeepSeek-V3 report, table 2; W, the
    weights' gradient, costs as much as F).
    """
    layout, workload = scenario.layout, scenario.workload
    chunks = layout.chunks if layout.overlap == "chunks" else 1
    forward = forward_seconds(stage, layout.overlap, chunks)
    factor = scenario.stack.step_factor
    if workload.phase != "train":
        return factor * max(forward, stage.send_s)
    backward = backward_seconds(stage, layout.overlap, chunks)
    micro_batches = workload.micro_batches
    pair = paired_seconds(stage) if pairs_forward_with_backward(scenario) else forward + backward
    if layout.schedule == "dualpipe":
        idle = max(layout.pp / 2 - 1, 0) * max(pair + backward - 3 * forward, 0.0)
    else:
        idle = (layout.pp - 1) / layout.interleaved * (forward + backward) + 2 * (layout.pp - 1) * stage.send_s
    return factor * (micro_batches * pair + idle + stage.update_s)
