"""Files to documents: every malformed row is counted, placed, and too many of them stop the run."""

import json

import numpy as np
import pytest

from moe_ep.config import ConfigError, DataConfig
from moe_ep.data.corpus import load_corpus
from moe_ep.data.sources import MAX_ROW_BYTES, TEXT_DOCUMENT_BYTES, RowTally, read_documents

VOCABULARY = 512

# A row of JSON lines, and the kind of fault it is counted as.
MALFORMED = {
    "cut off": (b'{"text": "abc', "broken JSON"),
    "deeply nested": (b"[" * 100_000, "broken JSON"),
    "endless digits": (b'{"text": ' + b"1" * 10_000 + b"}", "broken JSON"),
    "not an object": (b"[1, 2]", "no text in field 'text'"),
    "no field": (b'{"body": "abc"}', "no text in field 'text'"),
    "null": (b'{"text": null}', "no text in field 'text'"),
    "a number": (b'{"text": 5}', "no text in field 'text'"),
    "empty text": (b'{"text": ""}', "empty"),
    "only spaces": (b'{"text": " \\n "}', "empty"),
    "empty line": (b"", "empty"),
    "no ids": (b'{"text": []}', "empty"),
    "huge": (b'{"text": "' + b"x" * MAX_ROW_BYTES + b'"}', "1 MB or more in one line"),
    "huge, many times": (b'{"text": "' + b"x" * (2 * MAX_ROW_BYTES + 7) + b'"}', "1 MB or more in one line"),
    "id beyond": (b'{"text": [1, 2, 512]}', "ids beyond the vocabulary of 512"),
    "negative id": (b'{"text": [-1]}', "ids beyond the vocabulary of 512"),
    "enormous id": (b'{"text": [36893488147419103232]}', "ids beyond the vocabulary of 512"),
    "fractional id": (b'{"text": [1.5]}', "ids that are no whole numbers"),
    "bad UTF-8": (b'{"text": "ab\xff"}', "bad UTF-8"),
    "half a surrogate pair": (b'{"text": "\\ud800"}', "bad UTF-8"),
}


def read(path, vocabulary=VOCABULARY):
    tally = RowTally()
    return list(read_documents(DataConfig(path=str(path)), vocabulary, tally)), tally


def good_rows(count):
    return [json.dumps({"text": f"document {i}"}).encode() for i in range(count)]


@pytest.mark.parametrize("row, kind", MALFORMED.values(), ids=list(MALFORMED))
def test_a_malformed_row_is_counted_and_placed(tmp_path, row, kind):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([*good_rows(3), row, *good_rows(2)]) + b"\n")
    documents, tally = read(path)
    assert documents == [f"document {i}" for i in (0, 1, 2, 0, 1)]
    assert tally.rows == 6
    assert tally.malformed == {kind: 1}
    assert tally.places == [f"{path}:4: {kind}"]


@pytest.mark.parametrize("row, kind", MALFORMED.values(), ids=list(MALFORMED))
def test_one_percent_of_malformed_rows_passes_and_more_stops(tmp_path, row, kind):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([*good_rows(99), row]) + b"\n")
    statistics = load_corpus(DataConfig(path=str(path)), VOCABULARY).statistics["train"]
    assert (statistics.rows, statistics.malformed_rows) == (100, {kind: 1})
    with path.open("ab") as file:
        file.write(row + b"\n")
    load_corpus.cache_clear()
    with pytest.raises(ConfigError, match="2 of 101 are .2.0%.") as caught:
        load_corpus(DataConfig(path=str(path)), VOCABULARY)
    assert f"2 {kind}; the first at {path}:100: {kind}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rows_may_hold_ids(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": [5, 511, 0]}\n{"text": "words"}\n')
    (ids, text), tally = read(path)
    assert ids.dtype == np.int32 and ids.tolist() == [5, 511, 0]
    assert text == "words"
    assert not tally.malformed


def test_the_text_field_is_named_by_the_config(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"body": "words", "text": 3}\n')
    documents = read_documents(DataConfig(path=str(path), text_field="body"), VOCABULARY, RowTally())
    assert list(documents) == ["words"]


def test_blank_lines_separate_the_documents_of_a_text_file(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(b"\xef\xbb\xbfOne line,\r\nanother.\r\n\r\n \nNext,\nto the end")
    documents, tally = read(path)
    assert documents == ["One line,\nanother.", "Next,\nto the end"]
    assert (tally.rows, tally.malformed.total()) == (4, 0)


def test_a_text_file_without_blank_lines_is_cut(tmp_path):
    line = "x" * 1023
    (tmp_path / "book.txt").write_text((line + "\n") * 100)
    documents, _ = read(tmp_path / "book.txt")
    assert "\n".join(documents).split("\n") == [line] * 100
    assert max(map(len, documents)) <= TEXT_DOCUMENT_BYTES + len(line)
    assert len(documents) == 4


def test_malformed_lines_of_a_text_file_are_left_out(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(b"good\nbad \xff\n" + b"y" * MAX_ROW_BYTES + b"\nlast\n")
    documents, tally = read(path)
    assert documents == ["good\nlast"]
    assert tally.rows == 4
    assert tally.places == [f"{path}:2: bad UTF-8", f"{path}:3: 1 MB or more in one line"]


def test_directories_and_globs_are_read_in_the_order_of_their_names(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.jsonl", "ignored.csv"):
        text = f"from {name}"
        (tmp_path / name).write_text(json.dumps({"text": text}) if name.endswith("jsonl") else text)
    assert read(tmp_path)[0] == ["from a.txt", "from b.txt", "from sub/c.jsonl"]
    assert read(tmp_path / "*.txt")[0] == ["from a.txt", "from b.txt"]
    assert read(tmp_path / "**" / "*.jsonl")[0] == ["from sub/c.jsonl"]


@pytest.mark.parametrize("name", ["missing.txt", "table.csv", "empty_directory", "*.none"])
def test_a_path_without_data_is_refused(tmp_path, name):
    (tmp_path / "table.csv").write_text("a,b")
    (tmp_path / "empty_directory").mkdir()
    with pytest.raises(ConfigError, match=r"--set data\.path=.*: allowed is"):
        read(tmp_path / name)


def test_files_without_a_document_are_refused(tmp_path):
    (tmp_path / "blank.txt").write_text("\n\n")
    with pytest.raises(ConfigError, match="0 rows hold none"):
        load_corpus(DataConfig(path=str(tmp_path)), VOCABULARY)
