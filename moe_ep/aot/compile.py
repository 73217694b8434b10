"""Compiles a config's program for its absent cluster and reads what the compiler made of it."""

import time
from typing import NamedTuple

from moe_ep.aot.estimates import make_estimates
from moe_ep.aot.hlo import Module, parse
from moe_ep.aot.memory import MemoryReport, read_memory
from moe_ep.aot.programs import make_program
from moe_ep.aot.schedule import read_schedule
from moe_ep.aot.timeline import Timeline, walk
from moe_ep.aot.topology import COMPILER_OPTIONS, compile_only_devices
from moe_ep.config import Config
from moe_ep.mesh import make_mesh


class Compiled(NamedTuple):
    """A program compiled for absent GPUs, and what was read from it."""

    gpus: int
    compile_s: float
    module: Module
    memory: MemoryReport
    schedule: dict
    timeline: Timeline


def compile_program(config: Config) -> Compiled:
    """Compiles the config's program for its cluster and reads memory, collectives and schedule.

    Raises:
      ConfigError: a wrong layout, or jax without its CUDA plugin.
    """
    experts = config.model.moe.num_experts
    gpus = (config.mesh.data or 1) * (config.mesh.expert or experts)
    mesh = make_mesh(config.mesh, config.cluster, experts, compile_only_devices(config.cluster, gpus))
    program = make_program(config, mesh)
    begin = time.perf_counter()
    lowered = program.function.lower(*program.arguments)
    compiled = lowered.compile(compiler_options=COMPILER_OPTIONS)
    compile_s = time.perf_counter() - begin
    module = parse(compiled.as_text())
    memory = read_memory(compiled, module, program.arguments, config.cluster.device.memory_bytes)
    schedule = read_schedule(
        module, config.cluster, gpus=gpus, program=config.aot.program, tokens_per_gpu=program.tokens_per_gpu
    )
    return Compiled(gpus, compile_s, module, memory, schedule, walk(schedule, make_estimates(config.cluster)))
