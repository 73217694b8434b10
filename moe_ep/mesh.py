"""Mesh axes, and the meshes of real, emulated and compile-only devices.

"data" replicates the model; "node" x "gpu" is the expert axis, along which each
layer's experts are spread. Tokens are split over all three.
"""

import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe_ep.checks import check_node_split
from moe_ep.config import ClusterConfig, ConfigError, MeshConfig, require

DATA, NODE, GPU = "data", "node", "gpu"
EXPERT = (NODE, GPU)
ALL_AXES = (DATA, NODE, GPU)
TOKENS = PartitionSpec(ALL_AXES)  # the leading axis of every batch
REPLICATED = PartitionSpec()

# Under which this project compiles for GPUs, real or absent.
COMPILER_OPTIONS = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    # The scheduler takes an exchange for five library calls' time, however short they are, and would start it
    # no earlier than that.
    "xla_gpu_experimental_collective_start_as_early_as_possible": True,
    # One chunk's dispatch and another's combine stand over the same work, as do the waves of an exchange.
    "xla_gpu_experimental_parallel_collective_overlap_limit": 3,
    # The dot merger joins products that share an operand: it concatenates a layer's
    # weights in every layer, and undoes chunks.
    "xla_gpu_dot_merger_threshold_mb": 0,
    # cuBLAS reads a layer's weights where they lie in the stack; Triton's fusions get a copy.
    "xla_gpu_enable_triton_gemm": False,
}


def join_processes(coordinator: str, processes: int | None, process: int | None) -> None:
    """Makes this process one of several that share all their devices; before anything else is asked of jax.

    Args:
      coordinator: HOST:PORT of process 0; or "auto" where jax finds all by itself (Slurm, Open MPI, Kubernetes).
      processes: how many there are; given with HOST:PORT.
      process: this one's number, from 0; given with HOST:PORT.

    Raises:
      ConfigError: numbers that do not belong together, or an "auto" where jax finds nothing.
    """
    if coordinator == "auto":
        _allow(processes is None and process is None, "coordinator", coordinator, "auto without --processes and --process")
        try:
            jax.distributed.initialize()
        except (ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"--coordinator=auto: allowed where jax finds the others, else HOST:PORT ({reason})") from error
        return
    host, _, port = coordinator.rpartition(":")
    _allow(bool(host) and port.isdigit(), "coordinator", coordinator, "HOST:PORT or auto")
    _allow(processes is not None and processes > 0, "processes", processes, "their number, with --coordinator=HOST:PORT")
    _allow(process is not None and 0 <= process < processes, "process", process, f"0 to {processes - 1}")
    jax.distributed.initialize(coordinator, processes, process)


def _allow(condition: bool, flag: str, value: object, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"--{flag}={value}: allowed is {allowed}")


def is_first_process() -> bool:
    """Returns whether this process is the one that prints and writes files."""
    return jax.process_index() == 0


def mesh_shape(mesh: MeshConfig, cluster: ClusterConfig, experts: int, device_count: int) -> tuple[int, int, int]:
    """Returns the sizes of (data, node, gpu) that use every device.

    Args:
      mesh: degrees; None takes what the devices leave.
      cluster: the number of GPUs in a node splits the expert axis.
      experts: experts of a layer, a multiple of the expert axis's size.
      device_count: devices at hand.

    Raises:
      ConfigError: the degrees do not multiply to the devices, or do not divide the experts.
    """
    expert = mesh.expert or max(device_count // (mesh.data or 1), 1)
    data = mesh.data or max(device_count // expert, 1)
    flag, value = ("mesh.data", data) if mesh.expert is None and mesh.data else ("mesh.expert", expert)
    require(data * expert == device_count, flag, value,
            f"mesh.data x mesh.expert = {device_count} devices, not {data} x {expert}")  # fmt: skip
    require(experts % expert == 0, "mesh.expert", expert,
            f"a divisor of model.moe.num_experts = {experts} (give mesh.expert, the rest becomes mesh.data)")  # fmt: skip
    check_node_split(expert, cluster.gpus_per_node)
    gpu = min(expert, cluster.gpus_per_node)
    return data, expert // gpu, gpu


def make_mesh(
    mesh: MeshConfig, cluster: ClusterConfig, experts: int, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Returns the mesh over the given devices, or over all that jax sees."""
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(mesh, cluster, experts, len(devices))
    return Mesh(np.asarray(devices).reshape(shape), ALL_AXES, axis_types=(AxisType.Auto,) * 3)


def expert_degree(mesh: Mesh) -> int:
    """Returns the size of the expert axis (EP)."""
    return mesh.shape[NODE] * mesh.shape[GPU]


def shardings(mesh: Mesh, specs: object) -> object:
    """Returns a tree of NamedShardings for a tree of PartitionSpecs."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
    )


def gpu_capability() -> tuple[int, int] | None:
    """Returns the CUDA compute capability of the GPU that jax runs on here; None without one, or if it is not NVIDIA's."""
    if jax.default_backend() != "gpu":
        return None
    major, _, minor = jax.local_devices()[0].compute_capability.partition(".")
    return (int(major), int(minor)) if minor else None


def peak_bytes(mesh: Mesh) -> int | None:
    """Returns the most bytes that this process's first device has held, None where it does not count (a CPU)."""
    statistics = mesh.local_devices[0].memory_stats()
    return statistics["peak_bytes_in_use"] if statistics else None


def is_present(mesh: Mesh) -> bool:
    """Returns whether the mesh's devices are here, not those of a cluster that is only compiled for."""
    return mesh.devices.flat[0] in jax.devices()


def free_bytes(mesh: Mesh) -> float:
    """Returns the bytes that each of this process's devices has free; emulated ones share half of the machine's."""
    statistics = [device.memory_stats() for device in mesh.local_devices]
    if all(statistics):
        return min(each["bytes_limit"] - each["bytes_in_use"] for each in statistics)
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return available / 2 / len(mesh.local_devices)


def compiler_options(platform: str) -> dict[str, bool | int] | None:
    """Returns what programs are compiled with on "gpu" or "cpu"."""
    return COMPILER_OPTIONS if platform == "gpu" else None


def vary(tree: object) -> object:
    """Marks every array, inside shard_map, as each device's own.

    What is computed from them, gradients among it, stays local until it is summed by
    a visible call; without the mark jax would sum gradients where the array is used.
    """

    def mark(values: jax.Array) -> jax.Array:
        missing = tuple(axis for axis in ALL_AXES if axis not in jax.typeof(values).manual_axis_type.varying)
        return jax.lax.pcast(values, missing, to="varying") if missing else values

    return jax.tree.map(mark, tree)


def place_batch(values: np.ndarray, mesh: Mesh, spec: PartitionSpec = TOKENS) -> jax.Array:
    """Returns a global array on the mesh, its rows split over all devices; every process passes the same."""
    return jax.make_array_from_callback(values.shape, NamedSharding(mesh, spec), lambda index: values[index])


def some_devices(count: int) -> Sequence[jax.Device]:
    """Returns `count` of the devices that jax sees, as many of each process.

    Raises:
      ConfigError: there are not so many, or they cannot be shared out evenly.
    """
    processes = jax.process_count()
    require(count % processes == 0 and count <= jax.device_count(), "bench.devices", count,
            f"a multiple of the {processes} processes, at most {jax.device_count()} devices")  # fmt: skip
    each = count // processes
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return [device for index in range(processes) for device in
            [one for one in devices if one.process_index == index][:each]]  # fmt: skip
