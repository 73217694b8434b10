"""What is compiled for: the kind of device and its size, of a present or an absent one."""

import re

import jax

HOPPER = ("h100", "h200", "h800", "h20", "gh200")

# The same processor on other boards. What was measured on the second is taken for the first until that is
# measured: an inference, good for tiles and products, less so where memory decides.
MEASURED_AS = {"h800": "h100", "gh200": "h200"}


def gpu_model(kind: str) -> str | None:
    """Returns "h200" for "NVIDIA H200", for an absent device's "h200" and the like; None for no GPU."""
    found = re.search(r"(?<![a-z])[a-z]{1,2}\d{2,3}(?!\d)", kind.lower())
    return found and found.group()


def is_hopper(kind: str) -> bool:
    """Returns whether the kernels for Hopper compile for a device of this kind."""
    return gpu_model(kind) in HOPPER


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
