"""What a call costs in joules, by the GPU's own counter: under a power limit that is what decides the time."""

import contextlib
import ctypes
import functools
import threading
import time
from collections.abc import Callable, Iterator

import jax

from moe_ep.bench import power
from moe_ep.bench.timing import Contender, Times

_SECONDS = 0.4  # that a contender runs alone; the counter is renewed every 20 to 100 ms
_LEAST_RENEWALS = 3
_READ_EVERY_S = 1e-3

Renewals = list[tuple[float, float]]  # when the counter was seen to change, in seconds, and its joules


@functools.cache
def counter() -> Callable[[], float] | None:
    """Returns a function that reads the joules the first visible GPU has used since its driver was loaded; None without one.

    Source: NVML's nvmlDeviceGetTotalEnergyConsumption, in millijoules, of Volta and later.
    """
    if jax.default_backend() != "gpu":
        return None
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    device, millijoules, gpu = ctypes.c_void_p(), ctypes.c_ulonglong(), power.first_gpu()
    find = nvml.nvmlDeviceGetHandleByIndex_v2 if gpu.isdigit() else nvml.nvmlDeviceGetHandleByUUID
    if nvml.nvmlInit_v2() or find(int(gpu) if gpu.isdigit() else gpu.encode(), ctypes.byref(device)):
        return None

    def read() -> float:
        nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(millijoules))
        return millijoules.value * 1e-3

    return None if nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(millijoules)) else read


def measure(contenders: dict[str, Contender], times: dict[str, Times]) -> dict[str, float]:
    """Returns the joules of a call of each contender, which runs alone; nothing where no counter is or it stands still."""
    read = counter()
    if read is None:
        return {}
    costs = {name: _joules_a_call(contender, times[name].median, read) for name, contender in contenders.items()}
    return {name: cost for name, cost in costs.items() if cost is not None}


def _joules_a_call(contender, seconds_a_call, read):
    calls = max(1, round(_SECONDS / seconds_a_call))
    with _watch(read) as renewals:
        start = time.perf_counter()
        for _ in range(calls):
            out = contender.launch()
        contender.wait(out)
        seconds = time.perf_counter() - start
    mean_watts = watts(renewals)
    return mean_watts and mean_watts * seconds / calls


@contextlib.contextmanager
def _watch(read: Callable[[], float]) -> Iterator[Renewals]:
    renewals, ended = [(time.perf_counter(), read())], threading.Event()

    def follow():
        while not ended.wait(_READ_EVERY_S):
            joules = read()
            if joules != renewals[-1][1]:
                renewals.append((time.perf_counter(), joules))

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield renewals
    finally:
        ended.set()
        thread.join()


def watts(renewals: Renewals) -> float | None:
    """Returns the mean power between the first and the last renewal after the opening reading; None of too few."""
    seen = renewals[1:]  # when the counter became what it read at the opening is not known
    if len(seen) < _LEAST_RENEWALS:
        return None
    (start, first), (end, last) = seen[0], seen[-1]
    return (last - first) / (end - start)
