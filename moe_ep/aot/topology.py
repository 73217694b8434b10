"""Compile-only GPUs: XLA's description of a cluster that is not here.

XLA:GPU compiles for absent GPUs given a topology and a `GpuTargetConfigProto` in
text form. Limits that all of Hopper and Blackwell share are those of the CUDA C++
Programming Guide, table "Technical Specifications per Compute Capability"; the
rest comes from moe_ep.hardware. XLA keeps files of the same kind for its own
tests: openxla/xla, xla/backends/gpu/target_config/specs.
"""

import os
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from moe_ep.config import ClusterConfig, ConfigError, require
from moe_ep.hardware import GPUS, Gpu

# XLA plans a program for this share of a device's memory when nothing else is said
# (xla/service/gpu/gpu_hlo_schedule.cc). What is said here is the memory divided by
# it, or a program that fills the GPU would be rematerialised and lose its overlap.
_XLA_PLANNED_SHARE = 0.8

# What such a device calls itself; kernels are chosen by it.
_DEVICE_KINDS = {
    "paper_h100": "NVIDIA H100 80GB HBM3",
    "h100": "NVIDIA H100 80GB HBM3",
    "h800": "NVIDIA H800",
    "h200": "NVIDIA H200",
    "b200": "NVIDIA B200",
    "gb200": "NVIDIA GB200",
}


def use_no_gpu() -> None:
    """Settles jax for a command that only compiles, before it asks for a device.

    Without it jax prints its plugin's traceback where no GPU is, and the compiler remarks
    on devices that it cannot measure.
    """
    jax.config.update("jax_platforms", "cpu")
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"


def target_config_text(gpu: Gpu) -> str:
    """Returns the GPU as XLA's GpuTargetConfigProto in text form."""
    major, minor = gpu.compute_capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  core_count: {gpu.streaming_multiprocessors}  fpus_per_core: 128
  memory_bandwidth: {int(gpu.memory_bytes_per_s)}  l2_cache_size: {gpu.l2_bytes}
  clock_rate_ghz: {gpu.clock_hz / 1e9}
  device_memory_size: {int(gpu.memory_bytes / _XLA_PLANNED_SHARE)}
  cuda_compute_capability {{ major: {major}  minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9  minor: 10  patch: 0 }}
runtime_version {{ major: 12  minor: 9 }}
device_description_str: "{_DEVICE_KINDS[gpu.name]}"
"""


def compile_only_devices(cluster: ClusterConfig, gpus: int) -> Sequence[jax.Device]:
    """Returns `gpus` devices of the cluster that can be compiled for but not run on.

    Raises:
      ConfigError: an unknown GPU, GPUs that are not whole nodes, or jax without its CUDA plugin.
    """
    require(cluster.gpu in GPUS, "cluster.gpu", cluster.gpu, "one of " + ", ".join(GPUS))
    per_node = min(gpus, cluster.gpus_per_node)
    require(gpus % per_node == 0, "cluster.gpus_per_node", cluster.gpus_per_node, f"a divisor of {gpus} GPUs")
    try:
        topology = topologies.get_topology_desc(
            platform="cuda",
            target_config=target_config_text(GPUS[cluster.gpu]),
            topology=f"1x{gpus // per_node}x{per_node}",
        )
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"compiling for absent GPUs needs XLA's GPU compiler: scripts/setup cuda12, or pip install "
            f"'jax[cuda12]=={jax.__version__}' ({reason})"
        ) from error
    return topology.devices
