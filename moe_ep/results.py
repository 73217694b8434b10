"""What every recorded result opens with, date, commit and versions, and the files it is written to."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys


def provenance(command: str, commit: str | None = None) -> dict:
    """Returns command, date, commit and versions; `commit` None takes MOE_EP_COMMIT (where no git is), or asks git."""
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or os.environ.get("MOE_EP_COMMIT") or _commit(),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
        },
    }


def _commit() -> str:
    root = pathlib.Path(__file__).parent
    command = ["git", "rev-parse", "--short=12", "HEAD"]
    git = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return git.stdout.strip() or "unknown"


def command_line(module: str) -> str:
    """Returns the command as it is recorded: where its files go is of this machine, not of the result."""
    given = [argument for argument in sys.argv[1:] if not argument.startswith(("--out", "--json", "--workdir"))]
    return " ".join([f"python -m {module}", *given])


def versions_text(versions: dict[str, str]) -> str:
    """Returns the versions as they stand under a result's title."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def write(folder: str | pathlib.Path, stem: str, result: dict, markdown: str) -> list[pathlib.Path]:
    """Writes result as JSON and its table as Markdown; returns the paths."""
    directory = pathlib.Path(folder)
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{stem}.json", directory / f"{stem}.md"]
    paths[0].write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    paths[1].write_text(markdown, encoding="utf-8")
    return paths
