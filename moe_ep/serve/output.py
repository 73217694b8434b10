"""Completions as they come: text on a terminal, JSON lines elsewhere."""

import json
from collections.abc import Sequence
from typing import Protocol, runtime_checkable, TextIO


@runtime_checkable
class Output(Protocol):
    """Where a batch's completions go."""

    def show(self, index: int, result: dict, ended: bool) -> None:
        """Takes a prompt's completion so far; calls after its end change nothing."""


def open_output(stream: TextIO, prompts: Sequence[str]) -> Output:
    """Returns the output that suits the stream, for one batch of prompts."""
    return Terminal(stream, prompts) if stream.isatty() else JsonLines(stream)


class JsonLines:
    """A line for each completion, when it has ended."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._written: set[int] = set()

    def show(self, index: int, result: dict, ended: bool) -> None:
        if ended and index not in self._written:
            self._written.add(index)
            print(json.dumps(result), file=self._stream, flush=True)


class Terminal:
    """Prompts in order, each followed by its text as far as it is known; later ones wait for their turn."""

    def __init__(self, stream: TextIO, prompts: Sequence[str]):
        self._stream, self._prompts = stream, prompts
        self._latest = [("", False)] * len(prompts)
        self._turn, self._shown = 0, 0
        self._write(prompts[0])

    def show(self, index: int, result: dict, ended: bool) -> None:
        self._latest[index] = (result["text"], ended)
        while self._turn < len(self._prompts):
            text, ended = self._latest[self._turn]
            # A token may end inside a character; what is no text yet waits for the next.
            ready = text if ended else text.rstrip("\ufffd")
            self._write(ready[self._shown :])
            self._shown = max(self._shown, len(ready))
            if not ended:
                return
            self._turn, self._shown = self._turn + 1, 0
            self._write("\n" + "".join(self._prompts[self._turn : self._turn + 1]))

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
