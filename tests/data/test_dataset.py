"""Batches: complete epochs, one order for any number of processes, exact resume, honest statistics."""

import collections
import hashlib
import json

import grain
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from moe_ep.config import ConfigError, DataConfig
from moe_ep.data import dataset as dataset_module
from moe_ep.data import make_dataset, order

SYNTHETIC = ("synthetic:uniform", "synthetic:zipf", "synthetic:zipf:1.2")
EVERY_SOURCE = ("", *SYNTHETIC)


def make(path="", **settings):
    arguments = {"vocabulary": 300, "batch_sequences": 4, "sequence": 32, "seed": 0, "split": "train"}
    return make_dataset(DataConfig(path=path), **{**arguments, **settings})


def take(dataset, count):
    return [next(dataset) for _ in range(count)]


def digest(batches):
    return hashlib.sha256(np.stack(batches).tobytes()).hexdigest()


@pytest.mark.parametrize("path", EVERY_SOURCE)
def test_a_batch_is_int32_within_the_vocabulary(path):
    batch = next(make(path))
    assert batch.shape == (4, 33) and batch.dtype == np.int32
    assert 0 <= batch.min() and batch.max() < 300


@pytest.mark.parametrize("path", EVERY_SOURCE)
def test_two_runs_read_the_same_and_another_seed_or_split_does_not(path):
    reference = digest(take(make(path), 20))
    assert digest(take(make(path), 20)) == reference
    assert digest(take(make(path, seed=1), 20)) != reference
    assert digest(take(make(path, split="validation"), 20)) != reference


@pytest.mark.parametrize("path", EVERY_SOURCE)
def test_resume_continues_with_the_next_batch(path):
    uninterrupted = make(path)
    take(uninterrupted, 7)
    state = json.loads(json.dumps(uninterrupted.get_state()))
    expected = take(uninterrupted, 10)
    resumed = make(path)
    take(resumed, 3)  # wherever it stands
    resumed.set_state(state)
    assert resumed.get_state() == state
    np.testing.assert_array_equal(take(resumed, 10), expected)


def test_resume_with_another_batch_size_loses_no_sequence():
    small = make(batch_sequences=4)
    take(small, 3)
    large = make(batch_sequences=12)
    large.set_state(small.get_state())
    np.testing.assert_array_equal(next(large), np.concatenate(take(small, 3)))


OTHER_DATA = ({"seed": 1}, {"sequence": 31}, {"split": "validation"}, {"path": "synthetic:uniform"})


@pytest.mark.parametrize("change", OTHER_DATA)
def test_resume_on_other_data_is_refused(change):
    with pytest.raises(ConfigError, match="--workdir: the checkpoint was trained on"):
        make(**change).set_state(make().get_state())


@pytest.mark.parametrize("path", EVERY_SOURCE)
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_global_batch(path, processes):
    shares = [make(path, process_index=i, process_count=processes) for i in range(processes)]
    np.testing.assert_array_equal(np.concatenate([next(share) for share in shares]), next(make(path)))
    assert len({str(share.get_state()) for share in shares}) == 1


def test_a_batch_that_processes_cannot_share_is_refused():
    with pytest.raises(ConfigError, match="train.batch_sequences=4: allowed is a multiple of the 3 processes"):
        make(process_count=3)


@pytest.mark.parametrize("path", EVERY_SOURCE)
def test_grain_and_plain_reading_give_the_same_batches(path, monkeypatch):
    read_ahead = make(path)
    assert isinstance(read_ahead._batches, grain.DatasetIterator)
    monkeypatch.setattr(dataset_module, "_reader", lambda: "none")
    np.testing.assert_array_equal(take(read_ahead, 20), take(make(path), 20))


@hypothesis.given(tokens=st.integers(2, 300), sequence=st.integers(1, 40), seed=st.integers(0, 2**40))
def test_an_epoch_predicts_every_token_once_in_a_new_order(tokens, sequence, seed):
    hypothesis.assume(tokens > sequence)
    stream = np.arange(tokens, dtype=np.uint16)
    sequence_at = order.packed_sequences(stream, sequence, seed)
    count = (tokens - 1) // sequence
    epochs = [[sequence_at(epoch * count + place) for place in range(count)] for epoch in range(3)]
    for epoch in epochs:
        targets = np.concatenate([row[1:] for row in epoch])
        assert sorted(targets) == list(range(1, 1 + count * sequence))
        assert all((np.diff(row) == 1).all() for row in epoch)
    if count > 20:
        assert len({tuple(row[0] for row in epoch) for epoch in epochs}) == 3


def test_the_order_is_the_same_on_every_machine():
    sequence_at = order.packed_sequences(np.arange(9, dtype=np.uint16), sequence=1, seed=0)
    assert [int(sequence_at(i)[0]) for i in range(16)] == [0, 3, 7, 5, 1, 2, 6, 4, 3, 7, 4, 2, 1, 6, 5, 0]
    drawn_at = order.drawn_sequences(order.zipf_probabilities(300, 1.0), sequence=7, seed=(0, 0))
    assert drawn_at(5).tolist() == [0, 0, 213, 10, 20, 76, 1, 19]


def test_batches_larger_than_an_epoch_repeat_it(tmp_path):
    (tmp_path / "short.txt").write_text("abcdefgh\n\nsecond document\n")
    dataset = make(str(tmp_path), batch_sequences=64, sequence=2)
    targets = collections.Counter(next(dataset)[:, 1:].ravel().tolist())
    assert len(targets) > 2 and min(targets.values()) >= 64 // 8


@pytest.mark.parametrize("path, exponent", [("uniform", 0), ("zipf", 1), ("zipf:0.3", 0.3), ("zipf:1.2", 1.2)])
def test_synthetic_tokens_follow_their_distribution(path, exponent):
    batches = take(make(f"synthetic:{path}", batch_sequences=256), 10)
    counts = np.bincount(np.concatenate(batches).ravel(), minlength=300)
    shares = np.arange(1, 301.0) ** -exponent
    expected = counts.sum() * shares / shares.sum()
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_squared - 299) < 5 * (2 * 299) ** 0.5  # five standard deviations


WRONG_SYNTHETIC = ("", "zip", "zipf:x", "zipf:-1", "zipf:nan", "zipf:inf", "zipf:1:2", "uniform:1")


@pytest.mark.parametrize("path", [f"synthetic:{kind}" for kind in WRONG_SYNTHETIC])
def test_a_wrong_synthetic_path_is_refused(path):
    with pytest.raises(ConfigError, match=f"--set data.path={path}: allowed is synthetic:uniform or"):
        make(path)


def test_data_too_short_for_one_sequence_is_refused(tmp_path):
    (tmp_path / "short.txt").write_text("abc\n\ndef\n")
    with pytest.raises(ConfigError, match=r"train\.sequence=32: allowed is less than the 4 tokens of the 1 documents"):
        make(str(tmp_path))


def test_statistics_are_of_the_split():
    train, validation = make().statistics, make(split="validation").statistics
    assert train.documents + validation.documents == train.rows
    assert train.tokens > 10 * validation.tokens
    assert str(train).startswith(f"{train.documents} documents, ")
    assert str(train).endswith(f"of {train.rows} rows read 0 malformed and left out")
    assert make("synthetic:uniform").statistics is None
