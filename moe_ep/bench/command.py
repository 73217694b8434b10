"""What the measuring commands share: their flags, their checks, and how they start."""

import os
import secrets
from collections.abc import Callable

from absl import flags
import jax

from moe_ep import command, results
from moe_ep.bench import report
from moe_ep.config import ConfigError

SIZES = flags.DEFINE_enum("sizes", "full", ["full", "tiny"], "The experiment's sizes, or ones for any machine.")
SAMPLES = flags.DEFINE_integer("samples", 15, "Samples of each contender, taken in turns.", lower_bound=2)
SAMPLE_SECONDS = flags.DEFINE_float("sample_seconds", 0.05, "What a sample lasts about.", lower_bound=0.0)
SEED = flags.DEFINE_integer("seed", None, "Of the random data; by default another one every time, and recorded.")
COMMIT = flags.DEFINE_string("commit", None, "What is recorded as the commit; asked of git by default.")
OUT = flags.DEFINE_string("out", "results", "The folder of the result files.")


def run(main: Callable[[], None]) -> None:
    """Calls `main` with the flags parsed and a folder that results can be written to; else ends with code 2 and a line."""

    def checked() -> None:
        command.check_folder(OUT.value)
        main()

    command.run(checked)


def start(module: str) -> dict:
    """Returns what a result opens with.

    Raises:
      ConfigError: full sizes are asked for and there is no GPU.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory of the same GPU
    if SIZES.value == "full" and jax.default_backend() != "gpu":
        raise ConfigError(f"--sizes=full: needs a GPU, this is {jax.default_backend()}; --sizes=tiny runs anywhere")
    return {
        "kind": "measured" if SIZES.value == "full" else "tiny sizes, no measurement:",
        **report.provenance(results.command_line(module), COMMIT.value),
        "seed": secrets.randbelow(2**31) if SEED.value is None else SEED.value,
    }
