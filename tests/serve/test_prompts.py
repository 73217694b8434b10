"""Prompts from users: each line has one answer of its own, shown where people and programs look."""

import io
import json

import pytest

from moe_ep.config import ConfigError, GenerateConfig
from moe_ep.data.tokenizer import ByteTokenizer
from moe_ep.serve import Completion, Update
from moe_ep.serve.output import Answers, JsonLines, Terminal
from moe_ep.serve.prompts import make_requests, read_prompts

TOKENIZER, OPTIONS = ByteTokenizer(), GenerateConfig(max_tokens=5, temperature=0.5)


def ask(*lines, are_json=True):
    return list(make_requests(list(lines), are_json, OPTIONS, TOKENIZER, seed=0))


def test_a_line_of_text_is_a_prompt_whatever_it_looks_like():
    asked = ask("The value", '{"prompt": 1}', are_json=False)
    assert [one.prompt for one in asked] == ["The value", '{"prompt": 1}']
    first = asked[0].request
    assert (first.prompt, first.max_tokens, first.temperature, first.stop) == (list(b"The value"), 5, 0.5, (256,))
    assert asked[0].request.seed != asked[1].request.seed
    assert asked[0].request.seed == ask("other", are_json=False)[0].request.seed  # of the run's seed and the line's number


def test_a_line_of_json_says_what_differs():
    (asked,) = ask('{"prompt": "a", "id": 7, "max_tokens": 2, "temperature": 0, "top_k": 3, "top_p": 0.5, "seed": 11}')
    request = asked.request
    assert (request.id, request.max_tokens, request.temperature, request.top_k, request.top_p, request.seed) == (
        "7", 2, 0, 3, 0.5, 11
    )  # fmt: skip


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "allowed is a JSON object"),
        ("", "allowed is a JSON object"),
        ("[" * 100_000, "allowed is a JSON object"),
        ("[1]", 'a JSON object with a "prompt"'),
        ('{"id": "a"}', 'a JSON object with a "prompt"'),
        ('{"prompt": 5}', "prompt=5: allowed is a string"),
        ('{"prompt": "a", "max_tokns": 1}', "max_tokns=1: allowed keys are prompt, id, max_tokens"),
        ('{"prompt": "a", "max_tokens": true}', "max_tokens=true: allowed is a whole number"),
        ('{"prompt": "a", "max_tokens": 1.5}', "max_tokens=1.5: allowed is a whole number"),
        ('{"prompt": "a", "temperature": "hot"}', 'temperature="hot": allowed is a number'),
        ('{"prompt": "a", "id": null}', "id=null: allowed is a string or a whole number"),
    ],
    ids=lambda value: value[:20],
)
def test_a_malformed_line_is_one_answer_and_the_others_go_on(line, message):
    before, wrong, after = ask('{"prompt": "x"}', line, '{"prompt": "y"}')
    assert wrong.request is None and message in wrong.error and wrong.error.startswith("line 2: ")
    assert (before.request.id, after.request.id) == ("line 1", "line 3")


def test_the_later_of_two_equal_ids_is_refused():
    first, second = ask('{"prompt": "x", "id": "7"}', '{"prompt": "y", "id": 7}')
    assert first.request is not None
    assert second.request is None and second.error == "line 2: id '7' is an earlier line's"


def test_prompts_come_from_one_place(tmp_path, monkeypatch):
    text, objects = tmp_path / "prompts.txt", tmp_path / "PROMPTS.JSONL"
    text.write_bytes(b"a\r\n\nb c\n")
    objects.write_text('{"prompt": "a"}')
    assert read_prompts(GenerateConfig(prompt="p")) == (["p"], False)
    assert read_prompts(GenerateConfig(prompt_file=str(text))) == (["a", "", "b c"], False)
    assert read_prompts(GenerateConfig(prompt_file=str(text), prompt_format="jsonl"))[1]
    assert read_prompts(GenerateConfig(prompt_file=str(objects))) == (['{"prompt": "a"}'], True)
    monkeypatch.setattr("sys.stdin", io.StringIO("from standard input\n"))
    assert read_prompts(GenerateConfig()) == (["from standard input"], False)
    with pytest.raises(ConfigError, match="this has none"):
        read_prompts(GenerateConfig())
    with pytest.raises(ConfigError, match="allowed is one of generate.prompt and this"):
        read_prompts(GenerateConfig(prompt="p", prompt_file=str(text)))
    with pytest.raises(ConfigError, match="No such file"):
        read_prompts(GenerateConfig(prompt_file=str(tmp_path / "none.txt")))


def answer(output_of, capsys, path):
    """Three prompts, the second refused; the third ends before the first."""
    asked = ask('{"prompt": "x"}', "oops", '{"prompt": "z"}')
    stream = path.open("w", encoding="utf-8")
    answers = Answers(asked, TOKENIZER, output_of(stream, [one.prompt for one in asked]))
    answers.take(Update("line 3", (67,), Completion("line 3", (67,), "length", "", (1.0,))))
    answers.take(Update("line 1", (0xC3,)))  # the first half of a character
    assert answers.open_ids == ["line 1"] and answers.tokens_of("line 1") == (0xC3,)
    shown = path.read_text(encoding="utf-8")
    tokens = (0xC3, 0xA9, 65)
    answers.take(Update("line 1", tokens[1:], Completion("line 1", tokens, "stop", "", (1.0, 1.25, 1.5))))
    answers.close()
    assert "3 prompts answered (1 refused): 4 tokens" in capsys.readouterr().err
    stream.close()
    return answers.results, shown, path.read_text(encoding="utf-8")


def test_programs_get_a_line_for_each_answer(capsys, tmp_path):
    results, _, shown = answer(lambda stream, _: JsonLines(stream), capsys, tmp_path / "shown")
    assert [json.loads(line)["id"] for line in shown.splitlines()] == ["line 2", "line 3", "line 1"]
    assert sorted(map(str, map(json.loads, shown.splitlines()))) == sorted(map(str, results))
    first, second, third = results
    assert (first["prompt"], first["text"], first["tokens"], first["ms_per_token"]) == ("x", "\u00e9A", 3, 250.0)
    assert (first["finish"], first["error"]) == ("stop", None)
    assert second["finish"] == "refused" and "JSON object" in second["error"] and second["tokens"] == 0
    assert third["ms_per_token"] is None


def test_people_get_prompts_in_order_and_no_half_characters(capsys, tmp_path):
    _, half, whole = answer(Terminal, capsys, tmp_path / "shown")
    assert half == "x"
    lines = whole.splitlines()
    assert lines[0] == "x\u00e9A" and lines[1].startswith("oops [line 2: ") and lines[2] == "zC"
