"""How commands start and refuse: a wrong flag or value ends with exit code 2 and one line."""

import os
import pathlib
import sys
from collections.abc import Callable

from absl import app, flags

from moe_ep.config import ConfigError


def run(main: Callable[[], None]) -> None:
    """Parses the flags that are defined and calls `main`."""
    app.run(lambda _: _call(main), flags_parser=parse)


def check_folder(out: str) -> None:
    """Refuses a folder that results cannot be written to, before the work and not after it.

    Raises:
      ConfigError: it cannot be made, or not be written.
    """
    try:
        pathlib.Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out={out}: allowed is a folder that can be written ({error.strerror})") from None
    if not os.access(out, os.W_OK):
        raise ConfigError(f"--out={out}: allowed is a folder that can be written")


def _call(main: Callable[[], None]) -> None:
    try:
        main()
    except ConfigError as error:
        refuse(str(error))


def parse(argv: list[str], allowed: str = "see --help") -> list[str]:
    """Returns the program's name alone once the flags are parsed; anything else is refused, with what is `allowed`."""
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        refuse(str(error))
    if len(rest) > 1:
        refuse(f"{rest[1]}: allowed are flags only, {allowed}")
    return rest


def refuse(message: str) -> None:
    """Ends with exit code 2 and one line."""
    print("moe_ep: " + " ".join(message.split()), file=sys.stderr, flush=True)
    sys.exit(2)
