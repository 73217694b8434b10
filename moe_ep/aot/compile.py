"""Compiles a config's program for its absent cluster and reads what the compiler made of it."""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from moe_ep.aot.estimates import make_estimates
from moe_ep.aot.hlo import Module, parse
from moe_ep.aot.memory import MemoryReport, read_memory
from moe_ep.aot.schedule import read_schedule
from moe_ep.aot.timeline import Timeline, walk
from moe_ep.aot.topology import compile_only_devices
from moe_ep.config import Config, require
from moe_ep.dispatch.exchange import LEAST_ROW_TILE
from moe_ep.kernels.device import is_hopper
from moe_ep.kernels.grouped_matmul import mosaic
from moe_ep.mesh import COMPILER_OPTIONS, make_mesh
from moe_ep.programs import Program, make_program


# Without a GPU autotuning measures nothing: it compiles candidates and takes the first, half of a training
# step's compilation.
ABSENT_OPTIONS = {**COMPILER_OPTIONS, "xla_gpu_autotune_level": 0}


class Compiled(NamedTuple):
    """A program compiled for absent GPUs, and what was read from it."""

    gpus: int
    compile_s: float  # lowering included, by the clock
    compile_cpu_s: float  # the same, summed over the cores
    module: Module
    memory: MemoryReport
    schedule: dict
    timeline: Timeline


def program_of(config: Config, mesh: Mesh) -> Program:
    """Returns the program that `config.aot` names and sizes.

    Raises:
      ConfigError: the tokens are not whole sequences.
    """
    aot = config.aot
    require(aot.tokens_per_gpu % aot.context == 0, "aot.tokens_per_gpu", aot.tokens_per_gpu,
            f"a multiple of aot.context = {aot.context}")  # fmt: skip
    return make_program(config, mesh, aot.program, sequences=aot.tokens_per_gpu // aot.context, context=aot.context)


def overlap_of(config: Config) -> str:
    """Returns the overlap of the program that `config.aot` names, "auto" resolved."""
    aot = config.aot
    sequences = aot.tokens_per_gpu // aot.context
    return config.dispatch.overlap_for(sequences if aot.program == "decode" else aot.tokens_per_gpu, sequences)


def gpus_of(config: Config) -> int:
    """Returns the GPUs that a config's mesh asks for; one expert each where it does not say."""
    return (config.mesh.data or 1) * peers_of(config)


def peers_of(config: Config) -> int:
    """Returns the GPUs on the expert axis; one expert each where the config does not say."""
    return config.mesh.expert or config.model.moe.num_experts


def absent_mesh(config: Config) -> Mesh:
    """Returns the config's mesh on GPUs that can be compiled for but not run on.

    Raises:
      ConfigError: a wrong layout, or jax without its CUDA plugin.
    """
    devices = compile_only_devices(config.cluster, gpus_of(config))
    return make_mesh(config.mesh, config.cluster, config.model.moe.num_experts, devices)


def compile_program(config: Config, on_start: Callable[[], None] = lambda: None) -> Compiled:
    """Compiles the config's program for its cluster and reads memory, collectives and schedule.

    Args:
      config: of the run.
      on_start: called once nothing is wrong, before what takes long.

    Raises:
      ConfigError: a wrong layout, or jax without its CUDA plugin.
    """
    _check_kernels(config)
    gpus, program = gpus_of(config), program_of(config, absent_mesh(config))
    on_start()
    begin, cpu_begin = time.perf_counter(), time.process_time()
    compiled = program.function.lower(*program.arguments).compile(compiler_options=ABSENT_OPTIONS)
    compile_s, cpu_s = time.perf_counter() - begin, time.process_time() - cpu_begin
    module = parse(compiled.as_text())
    memory = read_memory(compiled, module, program.arguments, config.cluster.device.memory_bytes)
    schedule = read_schedule(
        module,
        config.cluster,
        gpus=gpus,
        program=config.aot.program,
        tokens_per_gpu=program.tokens_per_gpu,
        expert_rows=_expert_rows(config, program.tokens_per_gpu),
    )
    return Compiled(gpus, compile_s, cpu_s, module, memory, schedule, walk(schedule, make_estimates(config.cluster)))


def _check_kernels(config: Config) -> None:
    model, moe, gpu = config.model, config.model.moe, config.cluster.gpu
    if moe.implementation != "mosaic":
        return
    require(is_hopper(gpu), "model.moe.implementation", moe.implementation, f"auto on {gpu}: these kernels are Hopper's")
    # Tiles are multiples of it, whatever the layout (Exchange.row_tile).
    refusal = mosaic.refusal(jnp.dtype(model.dtype), LEAST_ROW_TILE, (1, model.width, moe.hidden))
    require(refusal is None, "model.moe.implementation", moe.implementation,
            f"auto here: these kernels were given {refusal}")  # fmt: skip


def _expert_rows(config: Config, tokens: int) -> float:
    """Returns the rows with tokens in one call of the experts, under even routing: of one slice of one half batch."""
    dispatch = config.dispatch
    calls = dispatch.waves * (2 if overlap_of(config) == "staggered" else dispatch.chunks)
    return tokens * config.model.moe.top_k / calls
