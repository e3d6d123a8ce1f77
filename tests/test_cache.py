"""Arrays that are computed once, in shards on the disk."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from corel_diffusers.data import cache
from corel_diffusers.data.cache import Share, cached_array, shard_path

VALUES = np.random.default_rng(0).normal(size=(23, 4, 3, 2)).astype(np.float32)


@pytest.fixture(autouse=True)
def small_shards(tmp_path, monkeypatch):
    """A cache of its own, five photos a shard."""
    monkeypatch.setattr(cache, "CACHE_DIR", tmp_path)
    monkeypatch.setattr(cache, "SHARD_BYTES", 5 * VALUES[0].nbytes)


def filled(made: list | None = None, **options) -> cache.Shards:
    def make(photos: slice) -> np.ndarray:
        if made is not None:
            made.extend(range(photos.start, photos.stop))
        return VALUES[photos]

    return cached_array("values", VALUES.shape, np.float32, make, "making", at_once=2, **options)


@pytest.mark.parametrize(
    "key",
    [
        3,
        np.int64(22),
        slice(None),
        slice(3, 12),
        slice(20, 99),
        (slice(3, 12), 2, slice(None, 2)),
        slice(23, 30),
        [7, 0, 22, 7],
        np.array([4, 5]),
        (np.array([4, 5, 20]),),
        (np.array([4, 5, 20]), np.array([0, 3, 1])),
        (np.array([21, 2]), 3),
    ],
)
def test_shards_are_read_as_the_array_itself(key):
    shards = filled()
    assert np.array_equal(shards[key], VALUES[key])
    assert (shards.shape, shards.dtype, len(shards)) == (VALUES.shape, VALUES.dtype, len(VALUES))


@pytest.mark.parametrize("key", [-1, 23, slice(None, None, 2), slice(None, None, -1), [3, -1], [23], np.arange(23) % 2 == 0])
def test_what_is_not_read_is_refused(key):
    with pytest.raises(IndexError):
        filled()[key]


def test_the_whole_array_and_its_photos_one_by_one():
    shards = filled()
    assert np.array_equal(np.asarray(shards), VALUES)
    assert np.array_equal(np.stack(list(shards)), VALUES)
    assert np.array_equal(np.concatenate([shards, shards]), np.concatenate([VALUES, VALUES]))


def test_shards_are_plain_safetensors(tmp_path):
    filled()
    parts = [load_file(shard_path(tmp_path / "values", shard))["values"] for shard in range(5)]
    assert [len(part) for part in parts] == [5, 5, 5, 5, 3]
    assert np.array_equal(np.concatenate(parts), VALUES)


def test_what_was_interrupted_goes_on_where_it_was_and_what_is_there_is_not_made_again():
    def make(photos: slice) -> np.ndarray:
        if photos.start >= 12:
            raise KeyboardInterrupt
        return VALUES[photos]

    with pytest.raises(KeyboardInterrupt):
        cached_array("values", VALUES.shape, np.float32, make, "making", at_once=2)
    made = []
    assert np.array_equal(filled(made)[:], VALUES)
    assert made == list(range(10, 23)), "two shards were there, the third was not whole"
    made.clear()
    filled(made)
    assert not made


def test_few_photos_are_several_shards_too(monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "SHARD_BYTES", 2**26)
    monkeypatch.setattr(cache, "FEWEST", 8)
    filled()
    assert len(list((tmp_path / "values").glob("*.safetensors"))) == 3


def test_what_a_process_did_not_make_that_should_have_is_made_by_those_that_are_there():
    assert np.array_equal(filled(share=Share(1, 8))[:], VALUES)


def test_processes_share_the_photos_out_and_wait_for_each_other():
    made = ([], [])

    def second() -> None:  # runs while the first process waits
        filled(made[1], share=Share(1, 2))

    assert np.array_equal(filled(made[0], share=Share(0, 2, second))[:], VALUES)
    assert made == ([*range(0, 5), *range(10, 15), *range(20, 23)], [*range(5, 10), *range(15, 20)])
