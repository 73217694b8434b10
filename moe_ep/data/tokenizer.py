"""Text to token ids and back: UTF-8 bytes, or any `tokenizer.json` of the tokenizers library."""

import pathlib
import typing
from collections.abc import Sequence

import numpy as np

from moe_ep.config import ConfigError, require

Ids = Sequence[int | np.integer] | np.ndarray


@typing.runtime_checkable
class Tokenizer(typing.Protocol):
    """What training and serving need of a tokenizer."""

    vocabulary_size: int  # ids are below it, end_of_text among them
    end_of_text: int  # stands between documents

    def encode(self, text: str) -> np.ndarray:
        """Returns int32[n]: the ids of a text, without end_of_text."""

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns `encode` of each text."""

    def decode(self, ids: Ids) -> str:
        """Returns the text of ids; end_of_text, and ids that stand for nothing, are left out."""


class ByteTokenizer:
    """UTF-8 bytes: lossless, nothing to download, 256 ids and end_of_text = 256."""

    vocabulary_size = 257
    end_of_text = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Ids) -> str:
        # A sample may end inside a character, so what is no UTF-8 becomes U+FFFD.
        return bytes(int(i) for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")


class NumberTokenizer:
    """Synthetic tokens have no text: ids are written as numbers, "17 3 99"."""

    end_of_text = 0

    def __init__(self, vocabulary_size: int):
        self.vocabulary_size = vocabulary_size

    def encode(self, text: str) -> np.ndarray:
        numbers = [int(word) for word in text.split() if word.isdecimal()]
        return np.array([number for number in numbers if number < self.vocabulary_size], np.int32)

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Ids) -> str:
        return " ".join(str(int(i)) for i in ids)


# What model families call the token between documents, most common first.
END_OF_TEXT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>", "[SEP]")


class FileTokenizer:
    """A tokenizer.json. If it names no end of text, the id after its last one is taken."""

    def __init__(self, definition: bytes):
        import tokenizers  # here, so that bytes work where the library is missing

        self._tokenizer = tokenizers.Tokenizer.from_buffer(definition)
        # A document that spells "<|endoftext|>" must not end itself.
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        after_last = max(vocabulary.values(), default=-1) + 1  # ids may have gaps
        named = (vocabulary[name] for name in END_OF_TEXT_NAMES if name in vocabulary)
        self.end_of_text = next(named, after_last)
        self.vocabulary_size = max(after_last, self.end_of_text + 1)

    def encode(self, text: str) -> np.ndarray:
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Ids) -> str:
        known = [int(i) for i in ids if 0 <= i < self.vocabulary_size and i != self.end_of_text]
        return self._tokenizer.decode(known, skip_special_tokens=False)


def make_tokenizer(name: str, vocabulary: int) -> Tokenizer:
    """Returns the tokenizer called `name`, "bytes" or the path of a tokenizer.json.

    Raises:
      ConfigError: there is no such tokenizer, or its ids go beyond a model's vocabulary.
    """
    tokenizer = ByteTokenizer() if name == "bytes" else _read(name)
    require(tokenizer.vocabulary_size <= vocabulary, "model.vocabulary", vocabulary,
            f"at least {tokenizer.vocabulary_size}, the ids of data.tokenizer={name}")  # fmt: skip
    return tokenizer


def _read(path: str) -> FileTokenizer:
    try:
        return FileTokenizer(pathlib.Path(path).read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise ConfigError(
            f'--set data.tokenizer={path}: allowed is "bytes" or the path of a tokenizer.json ({reason})'
        ) from error
