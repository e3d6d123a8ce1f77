"""Arrays that are computed once and cached on disk in shards."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from corel_diffusers.data import cache
from corel_diffusers.data.cache import Share, cached_array, shard_path

VALUES = np.random.default_rng(0).normal(size=(23, 4, 3, 2)).astype(np.float32)


@pytest.fixture(autouse=True)
def small_shards(tmp_path, monkeypatch):
    """Give each test its own cache, with five photos per shard."""
    monkeypatch.setattr(cache, "CACHE_DIR", tmp_path)
    monkeypatch.setattr(cache, "SHARD_BYTES", 5 * VALUES[0].nbytes)


def filled(computed: list | None = None, **options) -> cache.ShardedArray:
    """Return VALUES as a cached array. `computed` collects the indices of the photos that are computed."""

    def compute(photos: slice) -> np.ndarray:
        if computed is not None:
            computed.extend(range(photos.start, photos.stop))
        return VALUES[photos]

    return cached_array("values", VALUES.shape, np.float32, compute, "computing", at_once=2, **options)


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
def test_indexing_gives_the_same_values_as_numpy(key):
    shards = filled()
    assert np.array_equal(shards[key], VALUES[key])
    assert (shards.shape, shards.dtype, len(shards)) == (VALUES.shape, VALUES.dtype, len(VALUES))


@pytest.mark.parametrize(
    "key", [-1, 23, slice(None, None, 2), slice(None, None, -1), [3, -1], [23], np.arange(23) % 2 == 0]
)
def test_an_unsupported_or_out_of_range_index_is_refused(key):
    with pytest.raises(IndexError):
        filled()[key]


def test_the_array_converts_to_numpy_and_iterates_over_photos():
    shards = filled()
    assert np.array_equal(np.asarray(shards), VALUES)
    assert np.array_equal(np.stack(list(shards)), VALUES)
    assert np.array_equal(np.concatenate([shards, shards]), np.concatenate([VALUES, VALUES]))


def test_shards_are_plain_safetensors(tmp_path):
    filled()
    parts = [load_file(shard_path(tmp_path / "values", shard))["values"] for shard in range(5)]
    assert [len(part) for part in parts] == [5, 5, 5, 5, 3]
    assert np.array_equal(np.concatenate(parts), VALUES)


def test_an_interrupted_fill_continues_and_existing_shards_are_not_computed_again():
    def compute(photos: slice) -> np.ndarray:
        if photos.start >= 12:
            raise KeyboardInterrupt
        return VALUES[photos]

    with pytest.raises(KeyboardInterrupt):
        cached_array("values", VALUES.shape, np.float32, compute, "computing", at_once=2)
    computed = []
    assert np.array_equal(filled(computed)[:], VALUES)
    assert computed == list(range(10, 23)), "two shards existed, the third was incomplete"
    computed.clear()
    filled(computed)
    assert not computed


def test_a_small_array_has_several_shards_too(monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "SHARD_BYTES", 2**26)
    monkeypatch.setattr(cache, "MIN_PHOTOS", 8)
    filled()
    assert len(list((tmp_path / "values").glob("*.safetensors"))) == 3


def test_shards_of_processes_that_do_not_exist_are_computed_too():
    assert np.array_equal(filled(share=Share(1, 8))[:], VALUES)


def test_processes_divide_the_shards_and_wait_for_each_other():
    computed = ([], [])

    def second_process() -> None:  # runs while the first process waits
        filled(computed[1], share=Share(1, 2))

    assert np.array_equal(filled(computed[0], share=Share(0, 2, second_process))[:], VALUES)
    assert computed == ([*range(0, 5), *range(10, 15), *range(20, 23)], [*range(5, 10), *range(15, 20)])
