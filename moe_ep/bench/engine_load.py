"""Measures the serving engine under load: tokens/s, and the share of time that the devices wait for the host.

    python -m moe_ep.bench.engine_load [--sizes=tiny] [--requests=96 --prompt=512 --new_tokens=128 --slots=32]

A model with random weights on all devices. The steps that the engine ran are then run
back to back without it, as many of each program and with as many tokens in every
sequence as on average; what the engine took longer is the host's. Writes
<out>/engine_load_<device>.{json,md}.
"""

import sys
import time
from collections.abc import Callable

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from moe_ep import results
from moe_ep.bench import command, report
from moe_ep.config import Config, cpu8_tiny
from moe_ep.cost.micro_batch import MOST_TOKENS
from moe_ep.mesh import make_mesh
from moe_ep.model.transformer import for_platform
from moe_ep.programs import init_served_parameters
from moe_ep.serve import Engine, EngineSize, EngineStatistics, Request
from moe_ep.serve.inputs import ChunkInputs, DecodeInputs
from moe_ep.serve.sampler import greedy
from moe_ep.serve.scheduler import no_chunk, no_decode
from moe_ep.simulate.measured import ENGINE_MODEL

_FIELDS = {
    name: flags.DEFINE_integer(name, default, help_text, lower_bound=1)
    for name, default, help_text in (
        ("requests", 96, "Requests, all there at the start."),
        ("prompt", 512, "Tokens of a prompt."),
        ("new_tokens", 128, "Tokens of a completion."),
        ("slots", 32, "Sequences of each device that decode at once."),
    )
}
_REPEATS = 3
_GOAL = 0.05

def make_size(prompt: int, new_tokens: int, slots: int) -> EngineSize:
    """Returns an engine that holds `slots` such sequences on a device."""
    per_sequence = -(-(prompt + new_tokens) // 64)
    sequences = max(min(MOST_TOKENS // prompt, slots), 1)
    return EngineSize(slots, sequences, min(prompt, MOST_TOKENS), 64, slots * per_sequence, per_sequence, queue=2**20)


def measure(config: Config, mesh: Mesh, size: EngineSize, requests: list[Request]) -> dict:
    """Returns seconds of the engine's runs and of its steps back to back, and what was done."""
    model = for_platform(config.model, mesh.devices.flat[0].platform)
    bias = np.zeros((model.moe_layers, model.moe.num_experts), np.float32)
    parameters = init_served_parameters(config, mesh)
    engine = Engine(model, parameters, bias, mesh, size, dispatch=config.dispatch, sampler=greedy)
    engine.warm_up()
    seconds, done = [], None
    for _ in range(_REPEATS + 1):
        before = engine.statistics()
        started = time.perf_counter()
        for _ in engine.complete(requests):
            pass
        seconds.append(time.perf_counter() - started)
        done = EngineStatistics(*(now - then for now, then in zip(engine.statistics(), before, strict=True)))
    steps = {
        "chunk": _seconds_of(engine.run_inputs, _full_chunk(size, mesh.size, requests), done.chunk_steps),
        "decode": _seconds_of(engine.run_inputs, _full_decode(size, mesh.size, requests), done.decode_steps),
    }
    wall, back_to_back = float(np.median(seconds[1:])), sum(steps.values())
    newest = engine.run_inputs(_full_decode(size, mesh.size, requests)).newest
    return {
        "seconds": seconds[1:],
        "steps": {"chunk": done.chunk_steps, "decode": done.decode_steps, "run_again": done.steps_run_again},
        "seconds_back_to_back": steps,
        "host_share": max(1 - back_to_back / wall, 0.0),
        "tokens_generated": done.tokens_generated,
        "tokens_prefilled": done.tokens_prefilled,
        "generated_tokens_per_s": done.tokens_generated / wall,
        "ms_per_decode_step": steps["decode"] / done.decode_steps * 1e3,
        "ms_per_chunk_step": steps["chunk"] / done.chunk_steps * 1e3,
        "distinct_tokens": len(np.unique(newest)),  # of a decode step: equal ones in equal contexts go to equal experts
    }


def _seconds_of(run: Callable, inputs: ChunkInputs | DecodeInputs, steps: int) -> float:
    """Returns the median seconds of so many steps in a row."""
    samples = []
    for _ in range(_REPEATS + 1):
        started = time.perf_counter()
        for _ in range(steps):
            report = run(inputs)
        jax.block_until_ready(report)
        samples.append(time.perf_counter() - started)
    return float(np.median(samples[1:]))


def _full_chunk(size: EngineSize, devices: int, requests: list[Request]) -> ChunkInputs:
    """Every row has a chunk; the rows of a device have different pages."""
    inputs = no_chunk(size, devices)
    tokens = np.resize(np.concatenate([request.prompt for request in requests]), inputs.tokens.shape)
    pages = np.tile(_own_pages(size)[: size.chunk_sequences], (devices, 1))
    return inputs._replace(tokens=tokens.astype(np.int32), counts=inputs.counts + size.chunk_tokens, pages=pages)


def _full_decode(size: EngineSize, devices: int, requests: list[Request]) -> DecodeInputs:
    """Every slot goes on, in the middle of its completion."""
    inputs = no_decode(size, devices)
    length = len(requests[0].prompt) + requests[0].max_tokens // 2
    pages = np.tile(_own_pages(size), (devices, 1))
    return inputs._replace(active=~inputs.active, lengths=inputs.lengths + np.int32(length), pages=pages)


def _own_pages(size: EngineSize) -> np.ndarray:
    return np.arange(size.slots * size.pages_per_sequence, dtype=np.int32).reshape(size.slots, -1)


def as_markdown(result: dict) -> str:
    """Returns the table of a result."""
    steps, load, single = result["steps"], result["load"], result["seconds_back_to_back"]
    spread = (max(result["seconds"]) - min(result["seconds"])) / np.median(result["seconds"])
    return report.heading("The serving engine under load", result) + (
        f"{load['requests']} requests of {load['prompt']} + {load['new_tokens']} tokens, {load['slots']} slots, greedy, "
        f"random weights; {result['devices']} device(s); medians of {_REPEATS} runs.\n\n"
        "| what | figure |\n|---|---|\n"
        f"| the whole load | {np.median(result['seconds']):.2f} s (spread {spread:.1%}) |\n"
        f"| generated | {result['generated_tokens_per_s']:,.0f} tokens/s, beside {result['tokens_prefilled']:,} of prompts |\n"
        f"| decode | {steps['decode']} steps of {result['ms_per_decode_step']:.2f} ms back to back |\n"
        f"| prefill | {steps['chunk']} steps of {result['ms_per_chunk_step']:.2f} ms back to back |\n"
        f"| steps back to back, without the engine | {sum(single.values()):.2f} s |\n"
        f"| the host's share of the engine's time | {result['host_share']:.1%} (goal at most {_GOAL:.0%}) |\n"
    )


def main() -> None:
    result = command.start("moe_ep.bench.engine_load")
    load = {name: flag.value for name, flag in _FIELDS.items()}
    config = Config(model=ENGINE_MODEL) if command.SIZES.value == "full" else cpu8_tiny()
    mesh = make_mesh(config.mesh, config.cluster, config.model.moe.num_experts)
    random = np.random.default_rng(result["seed"])
    requests = [
        Request(f"{index}", random.integers(0, config.model.vocabulary, load["prompt"]), load["new_tokens"])
        for index in range(load["requests"])
    ]
    size = make_size(load["prompt"], load["new_tokens"], load["slots"])
    result |= {"load": load, "devices": mesh.size} | measure(config, mesh, size, requests)
    markdown = as_markdown(result)
    print(markdown)
    for path in results.write(command.OUT.value, report.file_stem("engine_load"), result, markdown):
        print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    command.run(main)
