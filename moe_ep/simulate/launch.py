"""The time that no kernel of this project's programs goes under, set by one recorded row.

    python -m moe_ep.simulate.launch     after `moe_ep.cost.from_tuning`; writes it into the kernel table

A decode step of the serving engine has hundreds of kernels that do next to nothing, a
fifth of its time: of the recorded rows it depends most on what one takes. That row is
then no prediction; all others are.
"""

import dataclasses
import json
import pathlib

from moe_ep import command
from moe_ep.cost.from_tuning import as_text
from moe_ep.cost.kernels import TABLES
from moe_ep.cost.units import Number
from moe_ep.simulate.measured import RESULTS, compare_file
from moe_ep.simulate.scenario import own_stack

FILE = "engine_load_nvidia_h200.json"
_WHAT = "decode step of the engine"
_LEAST_S, _MOST_S = 0.2e-6, 20e-6
_ROUNDS = 24


def fit(results: pathlib.Path = RESULTS) -> tuple[Number, str]:
    """Returns the seconds with which the row is predicted as it was measured, and the row's name.

    Raises:
      FileNotFoundError: it is not recorded.
    """
    low, high, what = _LEAST_S, _MOST_S, ""
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        kernels = dataclasses.replace(own_stack().kernels, launch_s=middle)
        row = next(row for row in compare_file(results / FILE, kernels) if row["what"].startswith(_WHAT))
        low, high, what = (low, middle, row["what"]) if row["residual"] > 0 else (middle, high, row["what"])
    return (low + high) / 2, what


def main() -> None:
    """Writes the launch into this project's kernel table."""
    path = TABLES / f"{own_stack().kernels.name}.json"
    table = json.loads(path.read_text())
    launch_s, what = fit()
    path.write_text(as_text(table | {"launch_s": float(f"{launch_s:.4g}"), "launch_set_by": what}))
    print(f"{1e6 * launch_s:.3f} us, set by {what}")


if __name__ == "__main__":
    command.run(main)
