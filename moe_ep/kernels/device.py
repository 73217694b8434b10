"""What is compiled for: the kind of device and its size, of a present or an absent one."""

import jax


def device_kind() -> str:
    """Returns the kind of the device compiled for, such as "cpu" or "NVIDIA H200"."""
    absent = jax.sharding.get_abstract_mesh().abstract_device
    return _default_device().device_kind if absent is None else absent.device_kind


def multiprocessors() -> int:
    """Returns the streaming multiprocessors of the GPU compiled for; a Hopper's 132 where that is no GPU."""
    absent = jax.sharding.get_abstract_mesh().abstract_device
    cores = getattr(_default_device(), "core_count", None) if absent is None else absent.num_cores
    return cores or 132


def _default_device() -> jax.Device:
    default = jax.config.jax_default_device
    return default if isinstance(default, jax.Device) else jax.local_devices()[0]
