"""The two engines on one program: the formula from its config, the walk of the schedule that the compiler made of it."""

import typing

from moe_ep.checks import check
from moe_ep.config import Config, ModelConfig
from moe_ep.cost.entries import is_experts
from moe_ep.cost.memory import total
from moe_ep.cost.units import Number
from moe_ep.override import apply
from moe_ep.simulate import schedule
from moe_ep.simulate.from_config import scenario_of
from moe_ep.simulate.memory import memory_of
from moe_ep.simulate.predict import predict
from moe_ep.simulate.scenario import Scenario

# Of a layer's experts in a forward pass; a schedule's row counts are those of its forward products.
_PRODUCTS = 2


def scenario_of_program(config: Config) -> Scenario:
    """Returns the scenario of what `config.aot` compiles, memory ignored, every expert with its exact share of rows."""
    aot = config.aot
    sizes = {
        "phase": aot.program,
        "tokens_per_gpu": aot.tokens_per_gpu,
        "sequences_per_gpu": aot.tokens_per_gpu // aot.context,
        "context": aot.context,
        "routing": "balanced",
        "ignore_memory": True,
    }
    return scenario_of(check(apply(config, [f"simulate.{name}={value}" for name, value in sizes.items()])))


def compare(config: Config, compiled: dict[str, typing.Any]) -> dict[str, Number]:
    """Returns seconds, hidden share and bytes of one GPU, by formula and by the compiler's schedule.

    Args:
      config: with `aot` as the program was compiled.
      compiled: its schedule.
    """
    scenario = scenario_of_program(config)
    share = row_share(compiled, config.model)
    walked = schedule.walk(compiled, scenario.fabric, scenario.stack.kernels, scenario.stack.network, share)
    prediction = predict(scenario)
    return {
        "formula_s": float(prediction.step_s),
        "walk_s": float(walked["step_s"]),
        "formula_hidden_share": float(prediction.hidden_communication_share),
        "walk_hidden_share": float(walked["hidden_share"]),
        "expert_row_share": share,
        "formula_bytes": float(total(memory_of(scenario))),
    }


def row_share(compiled: dict[str, typing.Any], model: ModelConfig) -> Number:
    """Returns the share of the experts' rows that hold tokens, were routing even: kernels skip the others."""
    products = _expert_products(compiled)
    allocated = sum(times * rows * groups for entry, times in products for rows, _, _, groups in entry["gemms"][:1])
    needed = compiled["tokens_per_gpu"] * model.moe.top_k * model.moe_layers * _PRODUCTS
    return min(needed / allocated, 1.0) if allocated else 1.0


def _expert_products(compiled: dict) -> typing.Iterator[tuple[dict, int]]:
    for entry, times in schedule.flat(compiled, compiled["entry"]):
        if is_experts(entry) and entry.get("gemms") and not entry.get("backward"):
            yield entry, times
