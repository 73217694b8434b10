"""The benchmark's pages say on top what they hold and how it was made."""

import json
import pathlib

import pytest

from moe_ep.bench.tables import as_markdown

RESULTS = pathlib.Path(__file__).parents[2] / "results"
TITLES = {
    "bench_emulated": "Proposed layout against baselines",
    "bench_dispatch_nvidia_h200": "Transports and overlaps",
    "serve_nvidia_h200": "One layout",
}


def recorded(stem: str) -> dict:
    return json.loads((RESULTS / f"{stem}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("stem", TITLES)
def test_the_title_says_what_the_page_holds(stem):
    for page in as_markdown(recorded(stem)), (RESULTS / f"{stem}.md").read_text(encoding="utf-8"):
        assert page.startswith(f"# {TITLES[stem]}\n")


def test_layouts_of_one_kind_are_not_set_against_another():
    result = recorded("bench_emulated")
    baselines = [row for row in result["rows"] if row["layout"] == "baseline"]
    assert as_markdown(result | {"rows": baselines}).startswith("# Layouts\n")


def test_several_commands_and_a_note_stand_under_the_title():
    result = recorded("bench_dispatch_nvidia_h200")
    text = as_markdown(result)
    assert all(f"`{command}`\n\n" in text for command in result["command"]) and f"{result['note']}\n\n" in text
