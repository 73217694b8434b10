"""What the compiler made of the full-size programs, recorded in programs/, and the claims that it answers.

`tests/simulate/record.py` renews the records. Memory and bytes are the compiler's own
figures; of its schedule, what stands between a collective's start and end, the
seconds are the simulator's.
"""

import collections
import dataclasses
import functools
import json
import pathlib
import typing

from moe_ep.config import Config
from moe_ep.cost.units import Number
from moe_ep.simulate import schedule
from moe_ep.simulate.engines import row_share
from moe_ep.simulate.reference import NOT, READINGS, REPRODUCED, Row, Setting, row

FOLDER = pathlib.Path(__file__).parent / "programs"
_SIZES = (16, 128)


@functools.lru_cache(maxsize=None)
def memory() -> dict[str, dict[str, typing.Any]]:
    """Returns the memory of each recorded program, in bytes of one GPU: arguments, outputs, temporaries, total."""
    return json.loads((FOLDER / "memory.json").read_text())


def load(name: str) -> dict[str, typing.Any]:
    """Returns the schedule of a recorded program."""
    return schedule.load(str(FOLDER / f"{name}.json"))


def exchanges(name: str) -> tuple[int, Number]:
    """Returns how many exchanges of rows a recorded program's step has, and one GPU's bytes of the largest's operand."""
    document, sizes = load(name), collections.Counter()
    for entry, times in schedule.flat(document, document["entry"]):
        if entry["kind"].startswith("collective") and entry.get("op") in ("all_to_all", "ragged_all_to_all"):
            sizes[entry["bytes"]] += times
    return sum(sizes.values()), max(sizes)


def fits(config: Config) -> Row:
    """The programs of one expert per GPU fit 64 GB."""
    totals, limit = {}, config.cluster.device.memory_bytes
    for phase in ("prefill", "decode"):
        for experts in _SIZES:
            totals[f"{phase}, E={experts}"] = memory()[f"{phase}_{experts}_none"]["total"]
    value = "; ".join(f"{name}: {held / 1e9:.1f} GB" for name, held in totals.items())
    verdict = REPRODUCED if max(totals.values()) <= limit else NOT
    inputs = f"one expert a GPU, attention replicated, 2048 tokens, or 2 sequences of 1024, a GPU; of {limit / 1e9:.0f} GB"
    return row("one expert per GPU fits the GPU, as compiled", "64 GB", None, inputs, value, verdict, "compiled")


def buffers(config: Config) -> Row:
    """64 MB per peer, against what the compiled exchanges send to one."""
    del config
    parts, most = [], 0.0
    for experts in _SIZES:
        count, operand = exchanges(f"prefill_{experts}_staggered")
        most = max(most, operand / experts)
        sizes = f"the largest {operand / 1e6:.1f} MB, {operand / experts / 1e6:.2f} MB a peer"
        parts.append(f"E={experts}: {count} exchanges a step, {sizes}")
    verdict = REPRODUCED if most >= 0.9 * 64e6 else f"{NOT}: they need less"
    inputs = "operands of the compiled all-to-alls, prefill of 2 x 1024 tokens a GPU, staggered"
    return row("communication buffers, as compiled", "64 MB per peer", None, inputs, "; ".join(parts), verdict, "compiled")


def hidden(setting: Setting) -> Row:
    """80 % of communication hidden, by the order in which the compiler issues it."""
    shares = {}
    for experts in _SIZES:
        name = f"prefill_{experts}_staggered"
        shares[f"E={experts}, {_bytes_sent(name)}"] = walk(name, setting, experts)["hidden_share"]
    value = "; ".join(f"{name}: {share:.0%}" for name, share in shares.items())
    enough = [name for name, share in shares.items() if share >= 0.8]
    verdict = REPRODUCED if len(enough) == len(shares) else f"reproduced only if {', '.join(enough)}" if enough else NOT
    inputs = "prefill of 2 x 1024 tokens a GPU, staggered; the compiler's order, seconds by the simulator"
    return row("communication hidden, as compiled", "80 %", setting, inputs, value, verdict, "compiled")


def _bytes_sent(name: str) -> str:
    document = load(name)
    ops = {entry.get("op") for entry, _ in schedule.flat(document, document["entry"])}
    return "exact bytes" if "ragged_all_to_all" in ops else "fixed buffers"


def walk(name: str, setting: Setting, experts: int) -> dict[str, typing.Any]:
    """Returns what the walk of a recorded program says on the setting's cluster."""
    scenario, document = setting.scenario(experts, experts, "prefill", 2048), load(name)
    model = dataclasses.replace(scenario.model, moe=dataclasses.replace(scenario.model.moe, num_experts=experts))
    stack = scenario.stack
    return schedule.walk(document, scenario.fabric, stack.kernels, stack.network, row_share(document, model))


def recompute(config: Config) -> list[Row]:
    """Returns the ledger's compiled rows; of what depends on the network, one for each reading."""
    return [fits(config), buffers(config), *(hidden(Setting(config, reading, assumed=False)) for reading in READINGS)]
