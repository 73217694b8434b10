"""What every recorded measurement carries beside its date and commit: the device, and torch beside jax."""

from moe_ep import results
from moe_ep.bench import torch_rivals
from moe_ep.kernels import device


def provenance(command: str, commit: str | None) -> dict:
    """Returns date, commit, hardware and versions; `commit` None takes MOE_EP_COMMIT (where no git is), or asks git."""
    opening = results.provenance(command, commit)
    versions = opening["versions"] | {"torch": torch_rivals.version()}
    return opening | {"device": device.device_kind(), "versions": versions}


def file_stem(topic: str) -> str:
    """Returns the name of a result file on this device, without its ending."""
    return f"{topic}_{device.device_kind().lower().replace(' ', '_')}"


def heading(title: str, result: dict) -> str:
    """Returns the Markdown lines that say what was measured, when, where and with what; `command` may be several."""
    versions = results.versions_text(result["versions"])
    commands = [result["command"]] if isinstance(result["command"], str) else result["command"]
    return (
        f"# {title}\n\n"
        f"{result['kind']} on {result['device']}, {result['date']}, commit {result['commit']}; {versions}.\n"
    ) + "".join(f"`{command}`\n\n" for command in commands)
