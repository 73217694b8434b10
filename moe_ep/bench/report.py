"""What every recorded measurement carries, and the files it is written to."""

import datetime
import json
import os
import pathlib
import platform
import subprocess

import jax
import jaxlib

from moe_ep.bench import torch_rivals
from moe_ep.kernels import device


def provenance(command: str, commit: str | None) -> dict:
    """Returns date, commit, hardware and versions; `commit` None takes MOE_EP_COMMIT (where no git is), or asks git."""
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or os.environ.get("MOE_EP_COMMIT") or _commit(),
        "device": device.device_kind(),
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "torch": torch_rivals.version(),
        },
    }


def _commit() -> str:
    root = pathlib.Path(__file__).parent
    command = ["git", "rev-parse", "--short=12", "HEAD"]
    git = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return git.stdout.strip() or "unknown"


def file_stem(topic: str) -> str:
    """Returns the name of a result file on this device, without its ending."""
    return f"{topic}_{device.device_kind().lower().replace(' ', '_')}"


def write(folder: str, stem: str, result: dict, markdown: str) -> list[pathlib.Path]:
    """Writes result as JSON and its table as Markdown; returns the paths."""
    directory = pathlib.Path(folder)
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{stem}.json", directory / f"{stem}.md"]
    paths[0].write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    paths[1].write_text(markdown, encoding="utf-8")
    return paths


def heading(title: str, result: dict) -> str:
    """Returns the Markdown lines that say what was measured, when, where and with what."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"# {title}\n\n"
        f"{result['kind']} on {result['device']}, {result['date']}, commit {result['commit']}; {versions}.\n"
        f"`{result['command']}`\n\n"
    )
