"""What holds a GPU's clock back while something is measured: power, clock and temperature, asked of nvidia-smi."""

import contextlib
import os
import shutil
import statistics
import subprocess
from collections.abc import Iterator

_FIELDS = ("power.draw", "power.limit", "clocks.sm", "clocks.max.sm", "temperature.gpu", "clocks_event_reasons.active")
_POWER_CAP = 0x4  # NVML's clocksEventReasonSwPowerCap: the clock is lowered to stay within the power limit


def first_gpu() -> str:
    """Returns the first GPU that this process may use, as nvidia-smi names it: by index or UUID."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip() or "0"


@contextlib.contextmanager
def watch(milliseconds: int = 100) -> Iterator[dict]:
    """Yields a dictionary that holds, once the block has ended, the medians of the samples taken in it.

    Keys: watts, limit_watts, sm_mhz, max_sm_mhz, celsius, and capped, the share of
    samples whose clock was lowered for the power limit. Empty without nvidia-smi.
    """
    summary: dict = {}
    command = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits", "-i", first_gpu()]
    if shutil.which("nvidia-smi") is None:
        yield summary
        return
    with subprocess.Popen([*command, "-lms", str(milliseconds)], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield summary
        finally:
            process.terminate()
            summary.update(summarize(process.communicate()[0]))


def summarize(text: str) -> dict:
    """Returns the medians of nvidia-smi's lines; lines that are cut short or hold no numbers are left out."""
    samples = [sample for line in text.splitlines() if (sample := _sample(line))]
    if not samples:
        return {}
    watts, limit, clock, highest, celsius, reasons = zip(*samples, strict=True)
    return {
        "watts": statistics.median(watts), "limit_watts": limit[0], "sm_mhz": statistics.median(clock),
        "max_sm_mhz": highest[0], "celsius": statistics.median(celsius),
        "capped": sum(bool(reason & _POWER_CAP) for reason in reasons) / len(reasons), "samples": len(samples),
    }  # fmt: skip


def _sample(line: str) -> tuple | None:
    try:
        *numbers, reasons = line.split(",")
        return (*map(float, numbers), int(reasons, 16)) if len(numbers) == len(_FIELDS) - 1 else None
    except ValueError:
        return None


def as_text(summary: dict) -> str:
    """Returns the samples as words, "" without any."""
    if not summary:
        return ""
    return (
        f"{summary['watts']:.0f} of {summary['limit_watts']:.0f} W, SM clock {summary['sm_mhz']:.0f} of "
        f"{summary['max_sm_mhz']:.0f} MHz, held back by the power limit in {summary['capped']:.0%} of "
        f"{summary['samples']} samples, {summary['celsius']:.0f} C"
    )
