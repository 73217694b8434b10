"""Where each sequence of a run comes from: a function of the seed and its position alone.

A position counts sequences since the start of training, over all epochs. That
these are pure functions is what makes a run resumable from one number, and the
same on any number of devices and processes.
"""

import functools
from collections.abc import Callable

import numpy as np

SequenceAt = Callable[[int], np.ndarray]  # position -> int32[sequence + 1]


def packed_sequences(stream: np.ndarray, sequence: int, seed: int) -> SequenceAt:
    """Cuts a stream of tokens into sequences and shuffles them anew in every epoch.

    Neighbours share one token, the last target of one and the first input of the
    next, so an epoch predicts each token once; an incomplete last one is left out.

    Args:
      stream: [tokens], of at least sequence + 1.
    """
    count = (len(stream) - 1) // sequence

    @functools.lru_cache(maxsize=2)  # a batch may end one epoch and begin the next
    def shuffled(epoch: int) -> np.ndarray:
        # Raw words of a counter-based generator: numpy keeps those the same across
        # versions, which it does not promise for Generator.permutation.
        words = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(count)
        return np.argsort(words, kind="stable")

    def sequence_at(position: int) -> np.ndarray:
        epoch, place = divmod(position, count)
        start = shuffled(epoch)[place] * sequence
        return stream[start : start + sequence + 1].astype(np.int32)

    return sequence_at


def drawn_sequences(probabilities: np.ndarray, sequence: int, seed: tuple[int, ...]) -> SequenceAt:
    """Draws every token independently; sequences never repeat.

    Args:
      probabilities: float64[vocabulary], of each token.
    """
    key = np.random.SeedSequence(seed).generate_state(2, np.uint64)
    cumulative = np.cumsum(probabilities)
    thresholds = cumulative[:-1] / cumulative[-1]

    def sequence_at(position: int) -> np.ndarray:
        words = np.random.Philox(key=key, counter=[0, 0, position, 0]).random_raw(sequence + 1)
        uniform = (words >> np.uint64(11)) * 2.0**-53  # [0, 1), as numpy makes doubles
        return np.searchsorted(thresholds, uniform, side="right").astype(np.int32)

    return sequence_at


def zipf_probabilities(vocabulary: int, exponent: float) -> np.ndarray:
    """Returns float64[vocabulary]: token i has a share of (i + 1)^-exponent; exponent 0 is uniform."""
    shares = np.arange(1, vocabulary + 1, dtype=np.float64) ** -exponent
    return shares / shares.sum()
