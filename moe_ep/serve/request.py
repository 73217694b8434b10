"""What is asked of an engine and what it answers."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

_SEEDS = 2**32


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to complete.

    Attributes:
      id: the caller's name for it, unlike any other request's in the engine.
      prompt: token ids, one or more.
      max_tokens: of the completion.
      temperature: 0 always takes the most likely token.
      top_k: draw from so many most likely tokens; 0: from all.
      top_p: draw from the most likely tokens that together have this probability.
      seed: of the draws, below 2**32. They depend on it and on the position alone.
      stop: tokens that end the completion, itself without them.
    """

    id: str
    prompt: Sequence[int]
    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[int, ...] = ()


class Completion(NamedTuple):
    """The answer to a request; every request gets one."""

    id: str
    tokens: tuple[int, ...]
    finish: Literal["stop", "length", "cancelled", "refused"]
    message: str = ""  # why it was refused
    arrived_s: tuple[float, ...] = ()  # when the host read each token, on the clock of time.perf_counter


class Update(NamedTuple):
    """What a step brought a request: new tokens, and its completion once it has ended."""

    id: str
    tokens: tuple[int, ...]
    completion: Completion | None = None


class Refused(ValueError):
    """The engine does not take a request, and nothing of it is kept; the message says why, with the numbers."""

    def __init__(self, id: str, message: str):
        super().__init__(message)
        self.id = id

    @property
    def completion(self) -> Completion:
        """The answer that stands for the refusal."""
        return Completion(self.id, (), "refused", str(self))


class QueueFull(Refused):
    """As many requests wait as may; the same one can be submitted again after some steps."""


def check_request(request: Request, vocabulary: int) -> None:
    """Checks a request by itself.

    Raises:
      Refused: a value that no engine of this vocabulary takes.
    """
    outside = [token for token in request.prompt if not 0 <= token < vocabulary]
    wrong = [
        (len(request.prompt) == 0, "the prompt is empty: allowed is one token or more"),
        (outside, f"token {outside[:1]} of the prompt: allowed is 0 to {vocabulary - 1}"),
        (request.max_tokens < 1, f"max_tokens={request.max_tokens}: allowed is 1 or more"),
        (not 0 <= request.temperature < float("inf"), f"temperature={request.temperature}: allowed is 0 or more"),
        (request.top_k < 0, f"top_k={request.top_k}: allowed is 0 or more"),
        (not 0 < request.top_p <= 1, f"top_p={request.top_p}: allowed is more than 0 and at most 1"),
        (not 0 <= request.seed < _SEEDS, f"seed={request.seed}: allowed is 0 to {_SEEDS - 1}"),
    ]
    for is_wrong, message in wrong:
        if is_wrong:
            raise Refused(request.id, message)
