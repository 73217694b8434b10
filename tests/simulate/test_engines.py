"""The formula against the walk of the compiler's schedule, and against its memory, on recorded compilations of whole programs."""

import dataclasses
import pathlib

import pytest

from moe_ep.checks import check
from moe_ep.cost.program import small_kernels
from moe_ep.override import apply, load
from moe_ep.simulate import compiled
from moe_ep.simulate.engines import compare, row_share, scenario_of_program
from moe_ep.simulate.memory import memory_of
from tests.simulate.record import MEMORY_ONLY, PROGRAMS

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
MEMORY = compiled.memory()


def config_of(name: str):
    config, settings = PROGRAMS[name]
    return check(apply(load(str(CONFIGS / f"{config}.py")), settings))


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name not in MEMORY_ONLY])
def test_formula_and_compiled_schedule_agree(name):
    result = compare(config_of(name), compiled.load(name))
    assert result["walk_s"] == pytest.approx(result["formula_s"], rel=0.05), result
    if name.startswith("prefill") and "single" not in name:
        assert result["walk_hidden_share"] == pytest.approx(result["formula_hidden_share"], abs=0.03)


@pytest.mark.parametrize("experts", [16, 128])
@pytest.mark.parametrize("program", ["prefill", "decode"])
def test_the_presets_choose_the_faster_schedule(program, experts):
    walked = {}
    for overlap in ("none", "staggered"):
        name = f"{program}_{experts}_{overlap}"
        walked[overlap] = compare(config_of(name), compiled.load(name))["walk_s"]
    preset = load(str(CONFIGS / f"seed_e{experts}.py")).dispatch
    chosen = scenario_of_program(dataclasses.replace(config_of(name), dispatch=preset)).layout.overlap
    assert walked[chosen] == min(walked.values())


@pytest.mark.parametrize("name", PROGRAMS)
def test_memory_is_the_compilers_within_three_percent(name):
    held = sum(memory_of(scenario_of_program(config_of(name))).values())
    assert held == pytest.approx(MEMORY[name]["total"], rel=0.03)


def test_every_recorded_figure_is_of_the_settings_that_stand_here():
    assert {name: (figure["config"], tuple(figure["settings"])) for name, figure in MEMORY.items()} == PROGRAMS


def test_rows_that_hold_tokens_are_counted_from_the_schedule():
    program = compiled.load("prefill_128_none")
    allocated = next(entry["gemms"][0][0] for body in program["computations"].values() for entry in body
                     if "experts" in entry.get("scope", "").split("/") and entry.get("gemms"))  # fmt: skip
    assert row_share(program, config_of("prefill_128_none").model) == pytest.approx(2 * 2048 / allocated)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("program", ["single", "16_none", "128_none"])
def test_small_kernels_are_as_many_as_the_compiler_made(phase, program):
    """Those of a routed layer that touch less than a megabyte; the passes that the formula has beside them are few."""
    document = compiled.load(f"{phase}_{program}")
    loops = [entry for entry in document["computations"][document["entry"]] if entry["kind"] == "loop"]
    layer = document["computations"][max(loops, key=lambda loop: loop["trip_count"])["body"]]
    tiny = [entry for entry in layer if entry["kind"] == "compute" and entry["bytes"] < 1e6 and not entry.get("gemms")]
    assert len(tiny) == pytest.approx(small_kernels(phase, routed=True), abs=6)
