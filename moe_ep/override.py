"""`--set a.b=value` onto frozen dataclasses, typed by the fields' annotations; config files."""

import dataclasses
import difflib
import runpy
import traceback
import types
import typing
from typing import Literal

from moe_ep.config import Config, ConfigError


def apply(config: Config, assignments: typing.Sequence[str]) -> Config:
    """Returns the config with each `a.b=value` assigned in turn.

    Raises:
      ConfigError: an unknown field, or a text that is not of the field's type.
    """
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not separator:
            raise ConfigError(f"--set {assignment}: allowed is name=value, for example --set train.steps=100")
        config = _assign(config, name.strip().split("."), text.strip(), name.strip())
    return config


def load(path: str) -> Config:
    """Runs a config file and returns the Config that it names `config`.

    Raises:
      ConfigError: the file is missing, fails to run, or has no `config`.
    """
    try:
        names = runpy.run_path(path)
    except OSError as error:
        raise ConfigError(f"--config={path}: allowed is a readable Python file ({error.strerror})") from error
    except Exception as error:  # whatever a user's file raises is the file's
        reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise ConfigError(f"--config={path}: allowed is a Python file that runs ({_place(error, path)}{reason})") from error
    config = names.get("config")
    if not isinstance(config, Config):
        raise ConfigError(f"--config={path}: allowed is a file that sets config = Config(...), it has {config!r}")
    return config


def _place(error: Exception, path: str) -> str:
    """Returns "line N: " of the config file's last line that led to the error; "" where none ran, as of wrong syntax."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f"line {lines[-1]}: " if lines else ""


def _assign(part: typing.Any, path: list[str], text: str, full_name: str) -> typing.Any:
    hints = typing.get_type_hints(type(part))
    head, rest = path[0], path[1:]
    if head not in hints:
        raise ConfigError(f"--set {full_name}={text}: allowed is {_suggest(head, list(hints))}")
    current = getattr(part, head)
    if dataclasses.is_dataclass(current):
        if not rest:
            fields = ", ".join(f"{full_name}.{field.name}" for field in dataclasses.fields(current))
            raise ConfigError(f"--set {full_name}={text}: allowed is one of its fields, {fields}")
        return dataclasses.replace(part, **{head: _assign(current, rest, text, full_name)})
    if rest:
        raise ConfigError(f"--set {full_name}={text}: allowed is {full_name.removesuffix('.' + '.'.join(rest))}=value")
    return dataclasses.replace(part, **{head: _parse(text, hints[head], full_name)})


def _suggest(name: str, allowed: list[str]) -> str:
    close = difflib.get_close_matches(name, allowed, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return "one of " + ", ".join(allowed) + hint


_BOOLEANS = {"true": True, "false": False, "1": True, "0": False}


def _parse(text: str, kind: typing.Any, name: str) -> typing.Any:
    origin = typing.get_origin(kind)
    if origin is Literal:
        allowed = typing.get_args(kind)
        if text not in allowed:
            raise ConfigError(f"--set {name}={text}: allowed is {_suggest(text, list(allowed))}")
        return text
    if origin in (typing.Union, types.UnionType):
        if text.lower() == "none":
            return None
        (kind,) = (choice for choice in typing.get_args(kind) if choice is not type(None))
        return _parse(text, kind, name)
    if origin is tuple:
        (element,) = {choice for choice in typing.get_args(kind) if choice is not Ellipsis}
        return tuple(_parse(piece.strip(), element, name) for piece in text.split(",") if piece.strip())
    if kind is bool:
        if text.lower() not in _BOOLEANS:
            raise ConfigError(f"--set {name}={text}: allowed is true or false")
        return _BOOLEANS[text.lower()]
    try:
        return kind(text.replace("_", "") if kind in (int, float) else text)
    except ValueError:
        expected = {int: "a whole number", float: "a number"}[kind]
        raise ConfigError(f"--set {name}={text}: allowed is {expected}") from None
