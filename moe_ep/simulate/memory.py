"""What a scenario's GPU holds: the plan that memory formulas take, and bytes by part."""

from moe_ep.cost import program
from moe_ep.cost.memory import MemoryPlan, bytes_per_gpu
from moe_ep.cost.routing import buffer_rows
from moe_ep.cost.units import Number
from moe_ep.simulate.scenario import Scenario


def memory_of(scenario: Scenario) -> dict[str, Number]:
    """Returns bytes of one GPU by part."""
    return bytes_per_gpu(plan_of(scenario))


def plan_of(scenario: Scenario) -> MemoryPlan:
    """Returns what decides a GPU's memory."""
    layout, workload, model = scenario.layout, scenario.workload, scenario.model
    training, batches = workload.phase == "train", 2 if layout.overlap == "staggered" else 1
    buffered = buffered_rows(scenario)
    node = min(scenario.fabric.gpus_per_node, layout.ep)
    in_flight = min(layout.pp, workload.micro_batches) if training else 1
    decoding, compiled = workload.phase == "decode", scenario.stack.is_compiled
    cached = workload.sequences_per_gpu * layout.pp * workload.context if decoding else workload.tokens
    return MemoryPlan(
        model=model,
        training=training,
        weight_bytes=scenario.stack.precision.weight_bytes,
        cache_bytes=scenario.stack.precision.cache_bytes,
        layer_share=1 / layout.pp,
        slots=scenario.slots,
        attention_share=1 / node if layout.split_attention_weights else 1 / layout.tp,
        tokens=workload.tokens,
        cached_tokens=0.0 if training else cached,  # prefill's are its prompts' own
        buffer_rows=buffered * batches if layout.ep > 1 else 0.0,
        expert_rows=buffered,
        gradient_bytes=program.gradient_bytes_a_value(gradients_are_summed(scenario)) if compiled else 4,
        cast_bytes=2 if compiled else 0,
        saved_layers=model.layers / layout.pp * in_flight if training else 0.0,
        remat=scenario.remat,
    )


def gradients_are_summed(scenario: Scenario) -> bool:
    """True where gradients of several GPUs or micro-batches are added up, in float32."""
    return scenario.layout.stage_gpus > 1 or scenario.workload.micro_batches > 1


def buffered_rows(scenario: Scenario) -> Number:
    """Returns the rows of the buffers of one chunk of one micro-batch."""
    layout, top_k, batches = scenario.layout, scenario.model.moe.top_k, 2 if scenario.layout.overlap == "staggered" else 1
    part = scenario.workload.tokens / batches / (layout.chunks if layout.overlap == "chunks" else 1)
    if layout.transport == "all_to_all":
        return buffer_rows(part, top_k, layout.ep, layout.margin_sigmas) * layout.ep
    return part * layout.ep if layout.transport == "all_gather" else part * top_k * 1.25
