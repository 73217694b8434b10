"""Tokenizers: lossless, bounded by the model's vocabulary, deaf to forged ends of text."""

import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers

from moe_ep.config import ConfigError
from moe_ep.data import make_tokenizer
from moe_ep.data.tokenizer import ByteTokenizer, NumberTokenizer

TEXT = "Nothing is lost silently; errors carry the numbers. Naïve café, 東京, 🙂.\n\tEnd."


def train_tokenizer(path, special_tokens):
    """Writes a byte-level BPE tokenizer.json of 300 ids."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 20, trainer)
    tokenizer.save(str(path))
    return str(path)


@pytest.fixture
def bpe_path(tmp_path):
    return train_tokenizer(tmp_path / "tokenizer.json", ["<|endoftext|>"])


@hypothesis.given(st.text())
def test_bytes_are_lossless(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bytes_leave_out_what_is_no_text():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([104, tokenizer.end_of_text, 105, 300]) == "hi"
    assert tokenizer.decode("é".encode()[:1]) == "\ufffd"


def test_a_tokenizer_file_is_lossless(bpe_path):
    tokenizer = make_tokenizer(bpe_path, 300)
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.int32 and len(ids) < len(TEXT.encode())
    assert tokenizer.decode([*ids, tokenizer.end_of_text]) == TEXT


def test_a_document_cannot_end_itself(bpe_path):
    tokenizer = make_tokenizer(bpe_path, 300)
    ids = tokenizer.encode("before<|endoftext|>after")
    assert tokenizer.end_of_text == 0
    assert 0 not in ids
    assert tokenizer.decode(ids) == "before<|endoftext|>after"


def test_an_end_of_text_is_added_where_none_is_named(tmp_path):
    tokenizer = make_tokenizer(train_tokenizer(tmp_path / "t.json", []), 1000)
    assert tokenizer.end_of_text == tokenizer.vocabulary_size - 1
    assert tokenizer.encode(TEXT).max() < tokenizer.end_of_text


def test_ids_with_gaps_count_up_to_the_last(bpe_path):
    with open(bpe_path) as file:
        definition = json.load(file)
    definition["model"]["vocab"]["far"] = 5000
    with open(bpe_path, "w") as file:
        json.dump(definition, file)
    assert make_tokenizer(bpe_path, 5001).vocabulary_size == 5001


@pytest.mark.parametrize("vocabulary", [256, 299])
def test_more_ids_than_the_model_has_are_refused_with_both_numbers(bpe_path, vocabulary):
    name, ids = ("bytes", 257) if vocabulary == 256 else (bpe_path, 300)
    with pytest.raises(ConfigError, match=rf"model\.vocabulary={vocabulary}: allowed is at least {ids}"):
        make_tokenizer(name, vocabulary)


@pytest.mark.parametrize("content", [None, b"", b"{}", b'{"model": 3}', b"\xff\xfe"])
def test_what_is_no_tokenizer_is_refused(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"--set data\.tokenizer=.*tokenizer\.json: allowed is") as caught:
        make_tokenizer(str(path), 1000)
    assert "\n" not in str(caught.value)


def test_synthetic_ids_read_as_numbers():
    tokenizer = NumberTokenizer(100)
    assert tokenizer.decode([17, 3, 99]) == "17 3 99"
    assert tokenizer.encode("17 3 99 100 word").tolist() == [17, 3, 99]
