"""Which implementation computes a product: a table of names, and the choice where none is named."""

import jax

from moe_ep.kernels.grouped_matmul import dense, scanned, tiled

IMPLEMENTATIONS = {"dense": dense.STEPS, "tiled": tiled.STEPS, "scanned": scanned.STEPS}
NAMES = ("reference", *IMPLEMENTATIONS)


def choose(rows: int, weight_shape: tuple[int, int, int]) -> str:
    """Returns the implementation for `rows` rows and weights [G, K, N] on the device compiled for."""
    del rows
    if weight_shape[0] == 1:
        return "dense"
    return "tiled" if device_kind() == "cpu" else "scanned"


def check_takes(name: str, dtype, weight_shape: tuple[int, int, int]):
    """Raises ValueError where the named implementation does not exist or does not take these weights."""
    del dtype
    if name not in NAMES:
        raise ValueError(f"implementation is {name!r}, not one of {', '.join(NAMES)}")
    if name == "dense" and weight_shape[0] != 1:
        raise ValueError(f"implementation 'dense' takes weights of one group, not {weight_shape[0]}")


def device_kind() -> str:
    """Returns the kind of the device compiled for, which may be absent, such as "cpu" or "NVIDIA H200"."""
    absent = jax.sharding.get_abstract_mesh().abstract_device
    if absent is not None:
        return absent.device_kind
    default = jax.config.jax_default_device
    return (default if isinstance(default, jax.Device) else jax.local_devices()[0]).device_kind
