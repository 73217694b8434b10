"""Files to documents: text and JSON lines, streamed, with every malformed row counted and placed."""

import collections
import dataclasses
import glob
import json
import logging
import pathlib
from collections.abc import Callable, Iterator

import numpy as np

from moe_ep.config import ConfigError, DataConfig

MAX_ROW_BYTES = 1_000_000  # a longer line is taken for a damaged file, and skipped unread
MAX_MALFORMED_FRACTION = 0.01
PLACES_KEPT = 20  # malformed rows reported one by one; all are counted
TEXT_DOCUMENT_BYTES = 32_768  # a text file without blank lines is cut into documents of this size

Document = str | np.ndarray  # text, or int32[n] token ids


class MalformedRow(ValueError):
    """A row that is no document; the message is the kind of fault, the same for all of one kind."""


@dataclasses.dataclass
class RowTally:
    """Rows read, and the malformed ones: how many of each kind, and where the first were."""

    rows: int = 0
    malformed: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    places: list[str] = dataclasses.field(default_factory=list)

    def add_malformed(self, path: str, line: int, kind: str) -> None:
        self.malformed[kind] += 1
        if len(self.places) < PLACES_KEPT:
            self.places.append(f"{path}:{line}: {kind}")
            logging.getLogger(__name__).warning("malformed row left out: %s", self.places[-1])

    def check(self, path: str) -> None:
        """Raises ConfigError if more than 1 % of the rows were malformed."""
        count = self.malformed.total()
        if count <= MAX_MALFORMED_FRACTION * self.rows:
            return
        kinds = ", ".join(f"{number} {kind}" for kind, number in self.malformed.most_common())
        raise ConfigError(
            f"--set data.path={path}: allowed is at most {MAX_MALFORMED_FRACTION:.0%} malformed rows, "
            f"{count} of {self.rows} are ({count / self.rows:.1%}): {kinds}; the first at {self.places[0]}"
        )


def read_documents(data: DataConfig, vocabulary: int, tally: RowTally) -> Iterator[Document]:
    """Yields the documents of `data.path` in a fixed order, and counts rows into `tally`.

    Raises:
      ConfigError: no such file, or of a kind that is not known.
    """
    for path in find_files(data.path):
        try:
            yield from READERS[path.suffix](path, data.text_field, vocabulary, tally)
        except OSError as error:
            raise ConfigError(f"--set data.path={path}: allowed is a readable file ({error.strerror})") from error


def find_files(path: str) -> list[pathlib.Path]:
    """Returns the files that a data path means: itself, those in a directory, or those of a glob.

    Raises:
      ConfigError: there are none.
    """
    place = pathlib.Path(path)
    if place.is_file():
        found = [place]
    elif place.is_dir():
        found = sorted(place.rglob("*"))
    else:
        found = sorted(map(pathlib.Path, glob.glob(path, recursive=True)))
    files = [file for file in found if file.suffix in READERS and file.is_file()]
    if not files:
        state = "exists but is none of them" if found else "is not there"
        raise ConfigError(
            f'--set data.path={path}: allowed is "", synthetic:uniform, synthetic:zipf:EXPONENT, or '
            f"{' and '.join(READERS)} files, a directory or a glob of them; this {state}"
        )
    return files


def _lines(path: pathlib.Path, tally: RowTally) -> Iterator[tuple[int, bytes]]:
    """Yields (line number, bytes without the line's end), never holding a line of more than MAX_ROW_BYTES."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_ROW_BYTES):
            number += 1
            if len(line) == MAX_ROW_BYTES:
                while not line.endswith(b"\n") and (line := file.readline(MAX_ROW_BYTES)):
                    pass
                tally.rows += 1
                tally.add_malformed(str(path), number, f"{MAX_ROW_BYTES / 1e6:g} MB or more in one line")
                continue
            yield number, line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").rstrip(b"\r\n")


def _read_jsonl(path: pathlib.Path, text_field: str, vocabulary: int, tally: RowTally) -> Iterator[Document]:
    for number, line in _lines(path, tally):
        tally.rows += 1
        try:
            document = _parse_row(line, text_field, vocabulary)
        except MalformedRow as fault:
            tally.add_malformed(str(path), number, str(fault))
        else:
            yield document


def _parse_row(line: bytes, text_field: str, vocabulary: int) -> Document:
    """Returns the text of a JSON row, or its ids where the field is a list of numbers."""
    if not line.strip():
        raise MalformedRow("empty")
    text = _decode(line)
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        raise MalformedRow("broken JSON") from None
    value = row.get(text_field) if isinstance(row, dict) else None
    if isinstance(value, list):
        return _check_ids(value, vocabulary)
    if not isinstance(value, str):
        raise MalformedRow(f"no text in field {text_field!r}")
    if not value.strip():
        raise MalformedRow("empty")
    _encode(value)
    return value


def _decode(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        raise MalformedRow("bad UTF-8") from None


def _encode(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        raise MalformedRow("bad UTF-8") from None


def _check_ids(ids: list, vocabulary: int) -> np.ndarray:
    if not ids:
        raise MalformedRow("empty")
    if not all(type(i) is int for i in ids):
        raise MalformedRow("ids that are no whole numbers")
    if min(ids) < 0 or max(ids) >= vocabulary:
        raise MalformedRow(f"ids beyond the vocabulary of {vocabulary}")
    return np.array(ids, np.int32)


def _read_text(path: pathlib.Path, text_field: str, vocabulary: int, tally: RowTally) -> Iterator[Document]:
    """A blank line ends a document, and so does the line with which it reaches TEXT_DOCUMENT_BYTES."""
    del text_field, vocabulary  # a text file has neither fields nor ids
    document: list[str] = []
    size = 0
    for number, line in _lines(path, tally):
        if line.strip():
            tally.rows += 1
            try:
                document.append(_decode(line))
                size += len(line)
            except MalformedRow as fault:
                tally.add_malformed(str(path), number, str(fault))
        if document and (not line.strip() or size >= TEXT_DOCUMENT_BYTES):
            yield "\n".join(document)
            document, size = [], 0
    if document:
        yield "\n".join(document)


READERS: dict[str, Callable[[pathlib.Path, str, int, RowTally], Iterator[Document]]] = {
    ".txt": _read_text,
    ".jsonl": _read_jsonl,
}
