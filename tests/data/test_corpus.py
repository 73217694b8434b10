"""Splits: disjoint, complete, of the size asked for, and copies of a document on one side."""

import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from moe_ep.config import DataConfig
from moe_ep.data.corpus import load_corpus

VOCABULARY = 512


def load(tmp_path, texts, **settings):
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    load_corpus.cache_clear()
    return load_corpus(DataConfig(path=str(path), **settings), VOCABULARY)


def documents_of(corpus, split):
    pieces = np.split(corpus.streams[split], np.flatnonzero(corpus.streams[split] == corpus.tokenizer.end_of_text) + 1)
    assert not len(pieces[-1])
    return [corpus.tokenizer.decode(piece) for piece in pieces[:-1]]


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=30), st.floats(0, 0.9))
def test_every_document_is_in_one_split(tmp_path, texts, fraction):
    texts = [text for text in texts if text.isascii()] + ["always", "these"]
    corpus = load(tmp_path, texts, validation_fraction=fraction)
    train, validation = documents_of(corpus, "train"), documents_of(corpus, "validation")
    assert sorted(train + validation) == sorted(texts)
    assert not set(train) & set(validation)
    assert bool(validation) == (fraction > 0)
    for split, documents in (("train", train), ("validation", validation)):
        assert corpus.statistics[split].documents == len(documents)
        assert corpus.statistics[split].tokens == len(corpus.streams[split])


def test_the_split_has_its_fraction_of_the_tokens(tmp_path):
    texts = [f"{i} " * (1 + i % 40) for i in range(1000)]
    corpus = load(tmp_path, texts, validation_fraction=0.1)
    tokens = {split: statistics.tokens for split, statistics in corpus.statistics.items()}
    assert tokens["validation"] / sum(tokens.values()) == pytest.approx(0.1, rel=0.01)


def test_the_order_of_documents_does_not_move_the_split(tmp_path):
    texts = [f"document {i}" for i in range(100)]
    forwards = documents_of(load(tmp_path, texts), "validation")
    backwards = documents_of(load(tmp_path, texts[::-1]), "validation")
    assert forwards == backwards[::-1]


def test_ids_take_two_bytes_where_they_fit():
    assert load_corpus(DataConfig(), 2**16).streams["train"].dtype == np.uint16
    assert load_corpus(DataConfig(), 2**16 + 1).streams["train"].dtype == np.int32


def test_the_built_in_text_is_english():
    corpus = load_corpus(DataConfig(), VOCABULARY)
    assert corpus.statistics["train"].tokens > 300_000
    assert corpus.statistics["validation"].tokens > 10_000
    text = corpus.tokenizer.decode(corpus.streams["train"])
    assert text.count(" the ") > 1000
