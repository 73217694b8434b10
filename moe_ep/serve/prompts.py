"""Prompts as users give them, from a flag, a file or standard input, as requests: each line its own answer."""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moe_ep.config import ConfigError, GenerateConfig
from moe_ep.data import Tokenizer
from moe_ep.serve.request import Request


@dataclasses.dataclass(frozen=True)
class Asked:
    """One line: its prompt, and the request that it makes, or why it makes none."""

    id: str
    prompt: str
    request: Request | None
    error: str = ""


def read_prompts(options: GenerateConfig) -> tuple[list[str], bool]:
    """Returns the lines of the flag, or else of the file, or else of standard input; and whether they are JSON.

    Raises:
      ConfigError: none of them has a line, or there are two sources.
    """
    if options.prompt and options.prompt_file:
        raise ConfigError(f"--set generate.prompt_file={options.prompt_file}: allowed is one of generate.prompt and this")
    if options.prompt:
        return [options.prompt], False
    try:
        text = Path(options.prompt_file).read_text(encoding="utf-8") if options.prompt_file else _standard_input()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"--set generate.prompt_file={options.prompt_file}: allowed is a text file ({reason})") from None
    lines = text.split("\n")
    lines = [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]
    if not lines:
        raise ConfigError(
            f"--set generate.prompt_file={options.prompt_file}: allowed is a file (or standard input) with a prompt a "
            "line, this has none; or --set generate.prompt=TEXT"
        )
    named_jsonl = options.prompt_file.lower().endswith(".jsonl")
    return lines, options.prompt_format == "jsonl" or (options.prompt_format == "auto" and named_jsonl)


def _standard_input() -> str:
    return "" if sys.stdin.isatty() else sys.stdin.read()


def make_requests(
    lines: list[str], are_json: bool, options: GenerateConfig, tokenizer: Tokenizer, seed: int
) -> Iterator[Asked]:
    """Yields what each line asks.

    Args:
      lines: prompts, or JSON objects with one.
      are_json: which of the two.
      options: what a line does not say.
      tokenizer: of the model.
      seed: of the run; a line's own comes from it and the line's number.
    """
    ids: set[str] = set()
    for number, line in enumerate(lines, 1):
        try:
            fields = _parse_object(line) if are_json else {"prompt": line}
        except ValueError as error:
            yield Asked(f"line {number}", line, None, f"line {number}: {error}")
            continue
        asked = _ask(fields, number, options, tokenizer, seed)
        if asked.id in ids:
            asked = dataclasses.replace(asked, request=None, error=f"line {number}: id {asked.id!r} is an earlier line's")
        ids.add(asked.id)
        yield asked


def _ask(fields: dict, number: int, options: GenerateConfig, tokenizer: Tokenizer, seed: int) -> Asked:
    id, prompt = str(fields.get("id", f"line {number}")), fields["prompt"]
    drawn = np.random.SeedSequence([seed, number]).generate_state(1)
    request = Request(
        id=id,
        prompt=tokenizer.encode(prompt).tolist(),
        max_tokens=fields.get("max_tokens", options.max_tokens),
        temperature=fields.get("temperature", options.temperature),
        top_k=fields.get("top_k", options.top_k),
        top_p=fields.get("top_p", options.top_p),
        seed=fields.get("seed", int(drawn[0])),
        stop=(tokenizer.end_of_text,),
    )
    return Asked(id, prompt, request)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or isinstance(value, float)


# The keys of a line: whether a value is of the right type, and what that is called.
_KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "prompt": (lambda value: isinstance(value, str), "a string"),
    "id": (lambda value: isinstance(value, str) or _is_whole(value), "a string or a whole number"),
    "max_tokens": (_is_whole, "a whole number"),
    "temperature": (_is_number, "a number"),
    "top_k": (_is_whole, "a whole number"),
    "top_p": (_is_number, "a number"),
    "seed": (_is_whole, "a whole number"),
}


def _parse_object(line: str) -> dict:
    """Returns a line's fields.

    Raises:
      ValueError: it is no JSON object, or one with a key or a value that is not allowed.
    """
    try:
        fields = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"allowed is a JSON object ({error})") from None
    if not isinstance(fields, dict) or "prompt" not in fields:
        raise ValueError('allowed is a JSON object with a "prompt"')
    for key, value in fields.items():
        if key not in _KEYS:
            raise ValueError(f"{key}={json.dumps(value)}: allowed keys are {', '.join(_KEYS)}")
        is_right, kind = _KEYS[key]
        if not is_right(value):
            raise ValueError(f"{key}={json.dumps(value)}: allowed is {kind}")
    return fields
