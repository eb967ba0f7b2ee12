"""What is kept from run to run, and what happens when it cannot be read or written."""

import numpy as np

from llava_jax.data import packing
from llava_jax.data.array_cache import cache_path, load_arrays, save_arrays
from llava_jax.data.packing import cached_pack, pack

LENGTHS, NUM_IMAGES = np.array([5, 3, 4, 2], np.int32), np.array([1, 0, 1, 0], np.int32)
LIMITS = {"row_length": 8, "max_images": 2, "seed": 0}


def plan(cache_dir, lengths=LENGTHS, **settings):
    return cached_pack(lengths, NUM_IMAGES, cache_dir=str(cache_dir), **LIMITS | settings)


def same(first, second):
    return np.array_equal(first.ids, second.ids) and np.array_equal(first.row_starts, second.row_starts)


def test_arrays_come_back_as_they_were(tmp_path):
    path = cache_path(str(tmp_path / "not" / "there"), "kind", 1, LENGTHS)
    save_arrays(path, a=LENGTHS, b=np.zeros(0, np.int64))
    found = load_arrays(path)
    assert found.keys() == {"a", "b"}
    assert found["a"].dtype == np.int32
    assert found["a"].tolist() == [5, 3, 4, 2]
    assert found["b"].shape == (0,)
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_plan_is_worked_out_once(tmp_path, monkeypatch):
    first = plan(tmp_path)
    assert same(first, pack(LENGTHS, NUM_IMAGES, **LIMITS))
    monkeypatch.setattr(packing, "pack", None)  # calling it would raise TypeError
    assert same(plan(tmp_path), first)


def test_other_samples_limits_or_seeds_have_plans_of_their_own(tmp_path):
    plan(tmp_path)
    for change in (
        {"seed": 1},
        {"row_length": 9},
        {"max_images": 3},
        {"lengths": LENGTHS[::-1].copy()},
    ):
        limits = LIMITS | {key: value for key, value in change.items() if key in LIMITS}
        expected = pack(change.get("lengths", LENGTHS), NUM_IMAGES, **limits)
        assert same(plan(tmp_path, **change), expected)
    assert len(list(tmp_path.iterdir())) == 5


def test_nothing_is_kept_without_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert same(plan(""), pack(LENGTHS, NUM_IMAGES, **LIMITS))
    assert not list(tmp_path.iterdir())


def test_a_damaged_plan_is_made_anew(tmp_path, capsys):
    first = plan(tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for damaged in (b"", whole[:-30], whole.replace(first.ids.tobytes(), bytes(first.ids.nbytes))):
        assert damaged != whole
        path.write_bytes(damaged)
        assert same(plan(tmp_path), first)
        assert f"{path} is damaged" in capsys.readouterr().out
        assert path.read_bytes() == whole


def test_overwriting_makes_a_plan_anew(tmp_path):
    plan(tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    save_arrays(path, row_starts=np.array([0, 4]), ids=np.arange(4))
    assert plan(tmp_path).num_rows == 1
    plan(tmp_path, overwrite_cache=True)
    assert path.read_bytes() == whole


def test_a_directory_that_cannot_be_written_costs_only_time(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert same(plan(tmp_path / "file"), pack(LENGTHS, NUM_IMAGES, **LIMITS))
    assert "set data.cache_dir" in capsys.readouterr().out
