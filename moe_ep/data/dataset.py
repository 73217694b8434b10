"""Batches of token sequences, resumable at any step."""

import dataclasses
import importlib.util
import zlib
from collections.abc import Callable, Iterator

import numpy as np

from moe_ep.config import ConfigError, DataConfig, require
from moe_ep.data.corpus import SPLITS, Split, Statistics, load_corpus
from moe_ep.data.order import SequenceAt, drawn_sequences, packed_sequences, zipf_probabilities
from moe_ep.data.tokenizer import NumberTokenizer, Tokenizer

BATCHES_READ_AHEAD = 4
ENDLESS = 2**62  # positions


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """A global batch, and which of its rows this process reads."""

    sequences: int  # of the global batch
    sequence: int  # tokens of one
    process_index: int = 0
    process_count: int = 1

    @property
    def rows(self) -> range:
        """This process's rows of the global batch."""
        share = self.sequences // self.process_count
        return range(self.process_index * share, (self.process_index + 1) * share)


class Dataset:
    """An endless iterator over batches int32[rows, sequence + 1]: inputs [:, :-1], targets [:, 1:]."""

    def __init__(
        self,
        sequence_at: SequenceAt,
        shape: BatchShape,
        *,
        tokenizer: Tokenizer,
        statistics: Statistics | None,
        fingerprint: str,
    ):
        self.tokenizer = tokenizer
        self.statistics = statistics  # None: synthetic
        self._sequence_at = sequence_at
        self._shape = shape
        self._fingerprint = fingerprint
        self._start_at(0)

    def _start_at(self, position: int) -> None:
        self._position = position
        self._batches = READ_AHEAD[_reader()](self._batch_at, range(position, ENDLESS, self._shape.sequences))

    def _batch_at(self, position: int) -> np.ndarray:
        return np.stack([self._sequence_at(position + row) for row in self._shape.rows])

    def __iter__(self) -> "Dataset":
        return self

    def __next__(self) -> np.ndarray:
        batch = next(self._batches)
        self._position += self._shape.sequences
        return batch

    def get_state(self) -> dict[str, int | str]:
        """Returns what `set_state` needs to continue after the last batch handed out, as JSON can hold it."""
        return {"sequences_read": self._position, "fingerprint": self._fingerprint}

    def set_state(self, state: dict[str, int | str]) -> None:
        """Continues where `state` was taken; the batch may have another size, the data not.

        Raises:
          ConfigError: the state belongs to other data, seed or sequence length.
        """
        if state["fingerprint"] != self._fingerprint:
            raise ConfigError(
                f"--workdir: the checkpoint was trained on {state['fingerprint']}, this run reads "
                f"{self._fingerprint}; allowed is the same data, seed and train.sequence, or another --workdir"
            )
        self._start_at(int(state["sequences_read"]))


def _read_with_grain(batch_at: Callable[[int], np.ndarray], positions: range) -> Iterator[np.ndarray]:
    """Reads the next batches in a thread, while the devices work."""
    import grain  # here, because machines may lack it, and because it imports jax

    source = grain.MapDataset.range(positions.start, positions.stop, positions.step).map(batch_at)
    return iter(source.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=BATCHES_READ_AHEAD)))


def _read_when_asked(batch_at: Callable[[int], np.ndarray], positions: range) -> Iterator[np.ndarray]:
    """Reads each batch when it is asked for: the same batches, in the same order."""
    return map(batch_at, positions)


READ_AHEAD = {"grain": _read_with_grain, "none": _read_when_asked}


def _reader() -> str:
    return "grain" if importlib.util.find_spec("grain") else "none"


def make_dataset(
    data: DataConfig,
    *,
    vocabulary: int,
    batch_sequences: int,
    sequence: int,
    seed: int,
    split: Split,
    process_index: int = 0,
    process_count: int = 1,
) -> Dataset:
    """Returns the batches of one split; the global batch is the same for any number of processes.

    Args:
      vocabulary: ids of the model; every token is below it.
      batch_sequences: rows of the global batch; a process gets its share of them.
      sequence: tokens a row is trained on.

    Raises:
      ConfigError: the data is missing, malformed, too small, or beyond the vocabulary.
    """
    require(batch_sequences % process_count == 0, "train.batch_sequences", batch_sequences,
            f"a multiple of the {process_count} processes")  # fmt: skip
    shape = BatchShape(batch_sequences, sequence, process_index, process_count)
    if data.path.startswith("synthetic:"):
        return _make_synthetic(data.path, shape, vocabulary, seed, split)
    return _make_packed(data, shape, vocabulary, seed, split)


def _make_packed(data: DataConfig, shape: BatchShape, vocabulary: int, seed: int, split: Split) -> Dataset:
    corpus = load_corpus(data, vocabulary)
    stream = corpus.streams[split]
    if len(stream) <= shape.sequence:
        raise ConfigError(
            f"--set train.sequence={shape.sequence}: allowed is less than the {len(stream)} tokens of the "
            f"{corpus.statistics[split].documents} documents that data.validation_fraction="
            f"{data.validation_fraction} leaves to {split} of data.path={data.path}"
        )
    return Dataset(
        packed_sequences(stream, shape.sequence, seed),
        shape,
        tokenizer=corpus.tokenizer,
        statistics=corpus.statistics[split],
        fingerprint=f"{len(stream)} tokens (crc {zlib.crc32(stream):08x}), sequence {shape.sequence}, seed {seed}",
    )


def _make_synthetic(path: str, shape: BatchShape, vocabulary: int, seed: int, split: Split) -> Dataset:
    probabilities = zipf_probabilities(vocabulary, synthetic_exponent(path))
    return Dataset(
        drawn_sequences(probabilities, shape.sequence, (seed, SPLITS.index(split))),
        shape,
        tokenizer=NumberTokenizer(vocabulary),
        statistics=None,
        fingerprint=f"{path} of {vocabulary} ids ({split}), sequence {shape.sequence}, seed {seed}",
    )


def synthetic_exponent(path: str) -> float:
    """Returns the Zipf exponent that a path like "synthetic:zipf:1.2" names; "synthetic:uniform" is 0.

    Raises:
      ConfigError: it names none.
    """
    _, kind, *parameters = path.split(":")
    if kind == "uniform" and not parameters:
        return 0.0
    if kind == "zipf" and len(parameters) <= 1:
        text = parameters[0] if parameters else "1.0"
        try:
            exponent = float(text)
        except ValueError:
            exponent = -1.0
        if 0 <= exponent < float("inf"):
            return exponent
    raise ConfigError(
        f"--set data.path={path}: allowed is synthetic:uniform or synthetic:zipf:EXPONENT with an exponent of 0 or more"
    )
