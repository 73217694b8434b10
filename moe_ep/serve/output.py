"""Answers as they come: text on a terminal, JSON lines elsewhere, progress beside them."""

import json
import sys
import time
from collections.abc import Sequence
from typing import Protocol, TextIO, runtime_checkable

from moe_ep.data import Tokenizer
from moe_ep.serve.prompts import Asked
from moe_ep.serve.request import Completion, Update


@runtime_checkable
class Output(Protocol):
    """Where the answers go."""

    streams: bool  # whether it wants answers that have not ended

    def show(self, index: int, result: dict, ended: bool) -> None:
        """Takes a prompt's answer so far, and its end once."""


def open_output(stream: TextIO, prompts: Sequence[str]) -> Output:
    """Returns the output that suits the stream."""
    return Terminal(stream, prompts) if stream.isatty() else JsonLines(stream)


class JsonLines:
    """A line for each answer, when it has ended."""

    streams = False

    def __init__(self, stream: TextIO):
        self._stream = stream

    def show(self, index: int, result: dict, ended: bool) -> None:
        print(json.dumps(result), file=self._stream, flush=True)


class Terminal:
    """Prompts in order, each followed by its text as far as it is known; later ones wait for their turn."""

    streams = True

    def __init__(self, stream: TextIO, prompts: Sequence[str]):
        self._stream, self._prompts = stream, prompts
        self._latest = [("", "", False)] * len(prompts)  # text, what is said behind it, whether it has ended
        self._turn, self._shown = 0, 0
        self._write(prompts[0])

    def show(self, index: int, result: dict, ended: bool) -> None:
        remark = {"refused": f" [{result['error']}]", "cancelled": " [cancelled]"}.get(result["finish"], "")
        self._latest[index] = (result["text"], remark, ended)
        while self._turn < len(self._prompts):
            text, remark, ended = self._latest[self._turn]
            # A token may end inside a character; what is no text yet waits for the next.
            ready = text if ended else text.rstrip("\ufffd")
            self._write(ready[self._shown :])
            self._shown = max(self._shown, len(ready))
            if not ended:
                return
            self._turn, self._shown = self._turn + 1, 0
            self._write(remark + "\n" + "".join(self._prompts[self._turn : self._turn + 1]))

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


class Answers:
    """Every prompt's answer, in order; what was no request is answered at once.

    Args:
      asked: the prompts.
      tokenizer: makes text of tokens.
      output: is shown every answer.
    """

    def __init__(self, asked: Sequence[Asked], tokenizer: Tokenizer, output: Output):
        self._asked, self._tokenizer, self._output = asked, tokenizer, output
        self._results: list[dict | None] = [None] * len(asked)
        self._open = {one.id: index for index, one in enumerate(asked) if one.request}
        self._tokens: dict[str, list[int]] = {id: [] for id in self._open}
        self._bar, self._started_s, self._generated = _open_bar(len(asked), output), time.perf_counter(), 0
        for index, one in enumerate(asked):
            if one.request is None:
                self._end(index, Completion(one.id, (), "refused", one.error))

    @property
    def results(self) -> list[dict]:
        """All answers; there is one for each prompt once none is open."""
        return [result for result in self._results if result is not None]

    @property
    def open_ids(self) -> list[str]:
        """The requests without an answer."""
        return list(self._open)

    def tokens_of(self, id: str) -> tuple[int, ...]:
        """Returns the tokens that an open request has so far."""
        return tuple(self._tokens[id])

    def take(self, update: Update) -> None:
        """Records what a step brought a request, and shows it."""
        self._tokens[update.id] += update.tokens
        self._generated += len(update.tokens)
        index = self._open[update.id]
        if update.completion:
            del self._open[update.id], self._tokens[update.id]
            self._end(index, update.completion)
        elif self._output.streams:
            partial = Completion(update.id, self.tokens_of(update.id), "length")
            self._output.show(index, self._result(self._asked[index].prompt, partial), False)

    def close(self) -> None:
        """Says on standard error what was done."""
        if self._bar is not None:
            self._bar.close()
        seconds = time.perf_counter() - self._started_s
        finishes = [result["finish"] for result in self.results]
        counts = ", ".join(
            f"{finishes.count(finish)} {finish}" for finish in ("refused", "cancelled") if finish in finishes
        )
        print(
            f"{len(finishes)} prompts answered{f' ({counts})' if counts else ''}: {self._generated} tokens in "
            f"{seconds:.1f} s, {self._generated / seconds:,.0f} tokens/s",
            file=sys.stderr,
        )

    def _end(self, index: int, completion: Completion) -> None:
        result = self._result(self._asked[index].prompt, completion)
        self._results[index] = result
        self._output.show(index, result, True)
        if self._bar is not None:
            self._bar.update(1)

    def _result(self, prompt: str, completion: Completion) -> dict:
        ids, arrived_s = completion.tokens, completion.arrived_s
        between = len(arrived_s) - 1
        return {
            "id": completion.id,
            "prompt": prompt,
            "text": self._tokenizer.decode(ids),
            "tokens": len(ids),
            "token_ids": list(ids),
            "ms_per_token": (arrived_s[-1] - arrived_s[0]) / between * 1e3 if between > 0 else None,
            "finish": completion.finish,
            "error": completion.message or None,
        }


def _open_bar(prompts: int, output: Output):
    """Returns a progress bar on standard error, None where the text itself shows progress or nobody looks."""
    if output.streams or not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:  # a GPU machine may lack it
        return None
    return tqdm(total=prompts, unit="prompt", dynamic_ncols=True)
