"""Documents to two streams of token ids, training's and validation's."""

import array
import dataclasses
import functools
import hashlib
import itertools
import pydoc_data.topics
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np

from moe_ep.config import ConfigError, DataConfig
from moe_ep.data.sources import Document, RowTally, read_documents
from moe_ep.data.tokenizer import Tokenizer, make_tokenizer

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")

DOCUMENTS_AT_ONCE = 256  # tokenized together, in parallel where the tokenizer can


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What was read. Documents and tokens are of one split, rows of the whole data."""

    documents: int
    tokens: int  # end_of_text after each document included
    rows: int
    malformed_rows: dict[str, int]  # by kind of fault
    malformed_places: tuple[str, ...]  # "file:line: kind" of the first ones

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.malformed_rows.items())
        left_out = f"{sum(self.malformed_rows.values())} malformed and left out" + (f" ({kinds})" if kinds else "")
        return f"{self.documents:,} documents, {self.tokens:,} tokens; of {self.rows:,} rows read {left_out}"


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokenized documents. A stream is one split's documents in reading order, each ended by end_of_text."""

    tokenizer: Tokenizer
    streams: dict[Split, np.ndarray]  # uint16 or int32 [tokens]
    statistics: dict[Split, Statistics]


@functools.lru_cache(maxsize=1)  # training and validation ask for the same one
def load_corpus(data: DataConfig, vocabulary: int) -> Corpus:
    """Reads and tokenizes `data.path`, and splits it by document.

    Files are streamed; ids are held in memory, at most 2 x 2 bytes a token while
    the splits are taken apart and half of that after (twice as much with a
    vocabulary over 65,536).

    Raises:
      ConfigError: nothing to read, over 1 % of the rows malformed, or a tokenizer
        with more ids than `vocabulary`.
    """
    tokenizer = make_tokenizer(data.tokenizer, vocabulary)
    tally = RowTally()
    documents = read_documents(data, vocabulary, tally) if data.path else _built_in_english(tally)
    tokens, lengths, hashes = _tokenize(documents, tokenizer, vocabulary)
    tally.check(data.path)
    if not len(lengths):
        raise ConfigError(f"--set data.path={data.path}: allowed is data with a document, {tally.rows} rows hold none")
    masks = _split(hashes, lengths, data.validation_fraction)
    streams = {split: _take(tokens, lengths, mask) for split, mask in masks.items()}
    malformed, places = dict(tally.malformed), tuple(tally.places)
    statistics = {
        split: Statistics(int(masks[split].sum()), len(stream), tally.rows, malformed, places)
        for split, stream in streams.items()
    }
    return Corpus(tokenizer, streams, statistics)


def _built_in_english(tally: RowTally) -> Iterator[str]:
    """Yields the topics of Python's `help()`, 0.46 MB of English that every CPython carries."""
    for _, text in sorted(pydoc_data.topics.topics.items()):
        tally.rows += 1
        yield text


def _tokenize(
    documents: Iterable[Document], tokenizer: Tokenizer, vocabulary: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns all ids in one array [tokens], and each document's length and hash [documents]."""
    tokens = array.array("H" if vocabulary <= 2**16 else "i")
    lengths, hashes = array.array("q"), array.array("Q")
    end_of_text = np.array([tokenizer.end_of_text], tokens.typecode).tobytes()
    for group in _groups(documents, DOCUMENTS_AT_ONCE):
        for ids in _encode(group, tokenizer):
            content = ids.astype(tokens.typecode).tobytes()
            tokens.frombytes(content + end_of_text)
            lengths.append(len(ids) + 1)
            hashes.append(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little"))
    return np.frombuffer(tokens, tokens.typecode), np.frombuffer(lengths, np.int64), np.frombuffer(hashes, np.uint64)


def _groups(items: Iterable[Document], size: int) -> Iterator[list[Document]]:
    iterator = iter(items)
    while group := list(itertools.islice(iterator, size)):
        yield group


def _encode(documents: list[Document], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Returns the ids of each document; those that come as ids stay as they are."""
    encoded = iter(tokenizer.encode_many([document for document in documents if isinstance(document, str)]))
    return [next(encoded) if isinstance(document, str) else document for document in documents]


def _split(hashes: np.ndarray, lengths: np.ndarray, validation_fraction: float) -> dict[Split, np.ndarray]:
    """Returns which documents each split has, bool[documents].

    Validation takes documents in the order of their hashes, passing over those that
    would take it beyond its fraction of the tokens, but has one at least. So the
    choice depends on what documents say alone: copies of one never part, and
    neither the seed nor the order of files moves it.
    """
    _, same = np.unique(hashes, return_inverse=True)
    sizes = np.bincount(same, weights=lengths)
    validation = np.zeros(len(sizes), bool)
    room = validation_fraction * lengths.sum()
    for i, size in enumerate(sizes):
        if size <= room:
            validation[i] = True
            room -= size
    if validation_fraction and not validation.any():
        validation[sizes.argmin()] = True
    return {"train": ~validation[same], "validation": validation[same]}


def _take(tokens: np.ndarray, lengths: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns the tokens of the documents where the mask is true."""
    return tokens[np.repeat(mask, lengths)]
