"""What the host tells the devices at each step: numpy arrays there, jax arrays in the programs.

All leading axes are split over the devices, so a slot's number in a chunk and the
pages of a table are a device's own.
"""

from typing import Any, NamedTuple

from jaxtyping import Bool, Float32, Int32, UInt32


class Sampling(NamedTuple):
    """How each sequence's tokens are drawn."""

    temperature: Float32[Any, "b"]  # 0: the most likely token
    top_k: Int32[Any, "b"]  # of so many most likely tokens; 0: of all
    top_p: Float32[Any, "b"]  # of the most likely tokens that together have this probability
    seed: UInt32[Any, "b"]


class ChunkInputs(NamedTuple):
    """A chunk of some sequences' prompts, one a row."""

    tokens: Int32[Any, "q s"]
    counts: Int32[Any, "q"]  # tokens of each chunk; 0: no chunk
    starts: Int32[Any, "q"]  # tokens of the prompt before it
    pages: Int32[Any, "q p"]
    slots: Int32[Any, "q"]  # where the token after the chunk goes; past the last slot: nowhere, the prompt goes on
    sampling: Sampling


class DecodeInputs(NamedTuple):
    """Which slots' sequences go on by a token."""

    active: Bool[Any, "b"]
    lengths: Int32[Any, "b"]  # tokens in the cache
    pages: Int32[Any, "b p"]
    sampling: Sampling
