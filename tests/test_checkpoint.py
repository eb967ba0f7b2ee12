"""Checkpoints: what is saved, what is never used, and what a full disk does."""

import contextlib
import resource
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import corruption
from llava_jax import checkpoint
from llava_jax.checkpoint import Checkpoints, read_meta, saved_steps, verified_steps
from llava_jax.config import CheckpointConfig
from llava_jax.errors import CheckpointError
from llava_jax.watchdog import Watchdog


def open_checkpoints(directory, **settings) -> Checkpoints:
    return Checkpoints(directory, CheckpointConfig(**settings), Watchdog(None))


def save_steps(directory, *steps, meta: dict | None = None, **settings) -> None:
    with contextlib.closing(open_checkpoints(directory, **settings)) as checkpoints:
        for step in steps:
            checkpoints.save(corruption.make_state(step), {"step": step} | (meta or {}))


def starting_point(directory, num_steps=100, **settings) -> Path | None:
    """Where a stage starts, what is newer set aside."""
    with contextlib.closing(open_checkpoints(directory, **settings)) as checkpoints:
        start = checkpoints.starting_point(num_steps)
        if start:
            checkpoints.set_aside_after(start)
        return start


def array_file(path: Path) -> Path:
    """The largest file of a checkpoint, which holds array data."""
    return max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def bytes_within(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


@contextlib.contextmanager
def full_disk(size: int):
    """No file grows beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_damaged_bit_cut_or_deletion_is_restored_silently(tmp_path):
    result = corruption.measure(tmp_path, num_flips=40, seed=1)
    assert result["silent"] == 0
    assert result["fell_back"] > 40


def test_without_digests_damage_is_restored_silently(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "find_damage", lambda *_, **__: None)
    save_steps(tmp_path, 1, 2)
    damaged = array_file(tmp_path / "2")
    whole, restored = damaged.read_bytes(), []
    for place in range(0, len(whole), len(whole) // 8):  # some are noticed: lengths, compressed indexes
        damaged.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with contextlib.suppress(CheckpointError):
            restored.append(corruption.restored_step(tmp_path))
    assert None in restored


def test_the_damaged_file_is_named_and_the_checkpoint_before_it_is_continued(tmp_path, capsys):
    save_steps(tmp_path, 1, 2)
    damaged = array_file(tmp_path / "2")
    corruption.cut(damaged)
    assert starting_point(tmp_path) == tmp_path / "1"
    message = capsys.readouterr().err
    assert (
        f"{tmp_path}/2 is damaged and not used: {damaged.relative_to(tmp_path / '2')} has changed" in message
    )
    assert saved_steps(tmp_path) == [1]
    assert (tmp_path / "set_aside/2").is_dir()
    save_steps(tmp_path, 2)
    assert list(verified_steps(tmp_path)) == [2, 1]


def test_checkpoints_that_are_all_damaged_are_an_error_and_stay(tmp_path):
    save_steps(tmp_path, 1, 2)
    (tmp_path / "1/digests.json").unlink()
    array_file(tmp_path / "2").unlink()
    with pytest.raises(CheckpointError, match="none that can be continued: they are damaged") as raised:
        starting_point(tmp_path)
    assert raised.value.exit_code == 12
    assert saved_steps(tmp_path) == [1, 2]


def test_a_file_that_was_not_saved_is_noticed(tmp_path, capsys):
    save_steps(tmp_path, 1)
    (tmp_path / "1/state/d/more").write_text("")
    assert list(verified_steps(tmp_path)) == []
    assert "state/d/more does not belong there" in capsys.readouterr().err


def test_a_checkpoint_without_its_digests_never_has_its_name(tmp_path, monkeypatch):
    def fail(directory):
        raise OSError("no room")

    monkeypatch.setattr(checkpoint, "write_digests", fail)
    save_steps(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == []


@pytest.mark.parametrize(("limit", "kept"), [(1, [5]), (2, [4, 5]), (None, [1, 2, 3, 4, 5])])
def test_save_total_limit_keeps_the_newest(tmp_path, limit, kept):
    save_steps(tmp_path, 1, 2, 3, 4, 5, save_total_limit=limit)
    assert saved_steps(tmp_path) == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == [str(step) for step in kept]


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / "7.orbax-checkpoint-tmp/state").mkdir(parents=True)
    assert starting_point(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # an event loop that orbax gave up
def test_a_full_disk_costs_one_checkpoint(tmp_path, capsys):
    with contextlib.closing(open_checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(corruption.make_state(1), {"step": 1})
        checkpoints._wait()
        with full_disk(20_000):
            checkpoints.save(corruption.make_state(2), {"step": 2})
            checkpoints.save(corruption.make_state(3), {"step": 3})
            with pytest.raises(CheckpointError, match=r"last state could not be saved.*newest checkpoint, 1"):
                checkpoints.finish()
        assert [path.name for path in tmp_path.iterdir()] == ["1"]
        assert capsys.readouterr().err.count("could not be saved") == 2
        checkpoints.save(corruption.make_state(4), {"step": 4})
        checkpoints.finish()
    assert list(verified_steps(tmp_path)) == [4, 1]


def test_a_directory_that_cannot_be_written_does_not_stop_training(tmp_path, capsys):
    with contextlib.closing(open_checkpoints(tmp_path / "checkpoints")) as checkpoints:
        (tmp_path / "checkpoints").rmdir()
        (tmp_path / "checkpoints").touch()  # no directory can be made below a file
        checkpoints.save(corruption.make_state(1), {"step": 1})
    assert "checkpoint 1 could not be saved" in capsys.readouterr().err


def test_save_only_model_leaves_the_moments_out_and_cannot_be_continued(tmp_path):
    save_steps(tmp_path / "whole", 3)
    save_steps(tmp_path / "model", 3, save_only_model=True)
    assert bytes_within(tmp_path / "model/3") < 0.6 * bytes_within(tmp_path / "whole/3")
    with pytest.raises(CheckpointError, match=r"saved with checkpoint\.save_only_model"):
        starting_point(tmp_path / "model")
    path = starting_point(tmp_path / "model", num_steps=3)  # nothing is left to train
    trainable = corruption.make_state(3).trainable
    with contextlib.closing(open_checkpoints(tmp_path / "model")) as checkpoints:
        found = checkpoints.restore_parameters(path, jax.eval_shape(lambda: trainable))
    assert all(np.array_equal(found[name], value) for name, value in trainable.items())


def test_an_interrupted_save_only_model_run_continues_where_it_was_interrupted(tmp_path):
    settings = {"save_only_model": True, "save_total_limit": None}
    with contextlib.closing(open_checkpoints(tmp_path, **settings)) as checkpoints:
        checkpoints.save(corruption.make_state(2), {"step": 2})
        checkpoints.save(corruption.make_state(3), {"step": 3}, whole=True)
        checkpoints.save(corruption.make_state(4), {"step": 4})
    assert starting_point(tmp_path, **settings) == tmp_path / "3"
    assert saved_steps(tmp_path) == [2, 3]


def test_resume_from_checkpoint_goes_back_once(tmp_path):
    save_steps(tmp_path, 1, 2, 3, save_total_limit=None)
    assert starting_point(tmp_path, resume_from_checkpoint="1") == tmp_path / "1"
    assert saved_steps(tmp_path) == [1]
    save_steps(tmp_path, 2, resume_from_checkpoint="1")
    assert read_meta(tmp_path / "2")["resumed_from"] == "1"
    assert starting_point(tmp_path, resume_from_checkpoint="1") == tmp_path / "2"


def test_what_was_set_aside_is_never_replaced(tmp_path):
    for _ in range(2):
        save_steps(tmp_path, 1, 2, save_total_limit=None)
        assert starting_point(tmp_path, resume_from_checkpoint="1") == tmp_path / "1"
    assert sorted(path.name for path in (tmp_path / "set_aside").iterdir()) == ["2", "2.2"]
    asked = str(tmp_path / "set_aside/2.2")
    assert starting_point(tmp_path, resume_from_checkpoint=asked) == tmp_path / "set_aside/2.2"
    assert sorted(path.name for path in (tmp_path / "set_aside").iterdir()) == ["1", "2", "2.2"]


def test_copies_under_other_names_are_no_checkpoints(tmp_path):
    save_steps(tmp_path, 1)
    (tmp_path / "1").rename(tmp_path / "0001")
    assert saved_steps(tmp_path) == []


def test_a_file_in_the_place_of_the_checkpoints_is_told_before_training(tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(CheckpointError, match="cannot hold checkpoints"):
        open_checkpoints(tmp_path / "checkpoints")


def test_resume_from_checkpoint_takes_another_runs_until_there_are_own(tmp_path):
    save_steps(tmp_path / "old", 4)
    asked = str(tmp_path / "old/4")
    assert starting_point(tmp_path / "new", resume_from_checkpoint=asked) == tmp_path / "old/4"
    save_steps(tmp_path / "new", 5, resume_from_checkpoint=asked)
    assert starting_point(tmp_path / "new", resume_from_checkpoint=asked) == tmp_path / "new/5"
    assert saved_steps(tmp_path / "old") == [4]


def test_another_runs_last_checkpoint_leaves_nothing_to_train(tmp_path):
    save_steps(tmp_path / "old", 4)
    message = r"is the end of its stage, step 4 of 4, so nothing is left .*--config\.init\.model"
    with pytest.raises(CheckpointError, match=message):
        starting_point(tmp_path / "new", num_steps=4, resume_from_checkpoint=str(tmp_path / "old/4"))
    own = str(tmp_path / "here/../old/4")  # the end of this very run is no mistake
    (tmp_path / "here").mkdir()
    assert starting_point(tmp_path / "old", num_steps=4, resume_from_checkpoint=own) == tmp_path / "old/4"


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"averaged": True}, r"/3 cannot be continued: it ended its stage with the average .*init\.model"),
        (
            {"averaged": False, "evaluated_as": 2},
            "cannot be continued: it ended its stage with the parameters of step 2",
        ),
        ({"averaged": False, "evaluated_as": 3}, None),
    ],
)
def test_what_ended_a_stage_with_other_parameters_is_not_trained_further(tmp_path, meta, message):
    save_steps(tmp_path / "old", 3, meta=meta)
    raises = pytest.raises(CheckpointError, match=message) if message else contextlib.nullcontext()
    with raises:
        start = starting_point(tmp_path / "new", resume_from_checkpoint=str(tmp_path / "old/3"))
        assert start == tmp_path / "old/3"


def test_a_checkpoint_under_the_number_of_another_step_is_not_used(tmp_path, capsys):
    save_steps(tmp_path, 1, 2)
    (tmp_path / "2").rename(tmp_path / "3")
    assert starting_point(tmp_path) == tmp_path / "1"
    assert f"{tmp_path}/3 is damaged and not used: it holds the state after step 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("7", "7 is no checkpoint"),
        ("/nowhere", "/nowhere is no checkpoint"),
        ("2", "2 is damaged: digests.json cannot be read"),
        ("3", "of a later step than this stage's last, 2"),
        ("True", "True names no checkpoint; leave it out: without it a run continues from its newest"),
    ],
)
def test_a_checkpoint_that_cannot_be_resumed_from_is_named(tmp_path, asked, message):
    save_steps(tmp_path, 1, 2, 3, save_total_limit=None)
    (tmp_path / "2/digests.json").write_text("{")
    with pytest.raises(CheckpointError, match=message):
        starting_point(tmp_path, num_steps=2, resume_from_checkpoint=asked)


@pytest.mark.parametrize(("asked", "interval"), [(7.0, 7), (1.0, 1), (0.1, 3), (0.5, 13)])
def test_save_steps_below_one_is_a_share_of_the_stage(asked, interval):
    assert CheckpointConfig(save_steps=asked).save_interval(25) == interval


def test_save_every_minutes_is_due_once_per_interval(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    checkpoints = open_checkpoints(tmp_path, save_every_minutes=2.0)
    assert not checkpoints.is_due()
    now[0] += 121
    assert [checkpoints.is_due() for _ in range(2)] == [True, False]
    now[0] += 119
    assert not checkpoints.is_due()
