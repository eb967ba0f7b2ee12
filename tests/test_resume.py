"""Runs that are broken off: at every step, by signals, by steps that are not numbers; and what continues."""

import json
import shutil
import signal
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax import trainer
from llava_jax.checkpoint import Checkpoints, saved_steps
from llava_jax.errors import ConfigError, DivergedError, StoppedError
from llava_jax.program import Program
from llava_jax.recipe import parse
from llava_jax.recorder import Recorder
from llava_jax.sharding import make_mesh
from tests.test_trainer import as_stages, metrics, parameters

STEPS_PER_EPOCH = 3


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(trainer, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))


@pytest.fixture
def compiled_once(monkeypatch):
    """Runs of the same settings share their compiled step."""
    steps = {}
    original = Program.train_step
    monkeypatch.setattr(
        Program,
        "train_step",
        lambda self: steps.setdefault((repr(self.config), self.num_steps), original(self)),
    )


def assert_same(whole: Path, broken: Path, stages=("",)) -> None:
    expected, found = metrics(whole), metrics(broken)
    for key in ("stage", "step", "loss", "grad_norm", "learning_rate", "num_supervised_tokens"):
        assert [row.get(key) for row in found] == [row.get(key) for row in expected], key
    for stage in stages:
        weights = parameters(broken, stage)
        assert all(np.array_equal(weights[name], value) for name, value in parameters(whole, stage).items())


@pytest.mark.parametrize(
    ("accumulation", "every"),
    [(2, 3), pytest.param(1, 1, marks=pytest.mark.slow), pytest.param(2, 1, marks=pytest.mark.slow)],
)
def test_a_run_continues_from_its_steps_with_the_same_bits(
    tiny_recipe, shapes_dataset, tmp_path, compiled_once, accumulation, every
):
    num_samples = 8 * STEPS_PER_EPOCH
    tiny_recipe.checkpoint.update(save_steps=1, save_total_limit=None)
    tiny_recipe.train.accumulation_steps = accumulation
    recipe = as_stages(tiny_recipe, shapes_dataset)
    for name, stage in recipe.stages.items():
        records = json.loads(Path(f"{shapes_dataset}/{name}.json").read_text())
        stage.data.path = str(tmp_path / f"{name}.json")
        Path(stage.data.path).write_text(json.dumps(records[:num_samples]))
        stage.train.update(max_steps=None, num_epochs=2.0)
    recipe = parse(recipe)
    stages = tuple(recipe.stages)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    trainer.run(recipe, whole)
    assert saved_steps(whole / "checkpoints/finetune") == list(range(1, 2 * STEPS_PER_EPOCH + 1))

    for stage, last in [(s, step) for s in stages for step in range(1, 2 * STEPS_PER_EPOCH + 1, every)]:
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(whole, broken)
        for later in stages[stages.index(stage) + 1 :]:
            shutil.rmtree(broken / "checkpoints" / later)
        for step in range(last + 1, 2 * STEPS_PER_EPOCH + 1):
            shutil.rmtree(broken / "checkpoints" / stage / str(step))
        trainer.run(recipe, broken)
        assert_same(whole, broken, stages)


def test_a_signal_ends_a_run_after_the_step_which_is_saved(tiny_recipe, tmp_path, monkeypatch, compiled_once):
    recipe = parse(tiny_recipe)
    trainer.run(recipe, tmp_path / "whole")

    def add(self, step, *details):
        original(self, step, *details)
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
            while not heard():
                threading.Event().wait(0.01)

    heard = lambda: any(request.asked for request in requests)
    requests = collect_requests(monkeypatch)
    original = Recorder.add
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "add", add)
        with pytest.raises(StoppedError, match="Stopped after step 2, which is saved") as raised:
            trainer.run(recipe, tmp_path / "broken")
    assert raised.value.exit_code == 15
    assert saved_steps(tmp_path / "broken/checkpoints") == [2]
    trainer.run(recipe, tmp_path / "broken")
    assert_same(tmp_path / "whole", tmp_path / "broken")


def collect_requests(monkeypatch) -> list:
    from llava_jax import stage

    class Collected(stage.StopRequest):
        def __init__(self):
            super().__init__()
            requests.append(self)

    requests = []
    monkeypatch.setattr(stage, "StopRequest", Collected)
    return requests


def with_bad_steps(monkeypatch, *bad: int) -> None:
    """The frozen weights of these steps are no numbers."""
    original = Program.train_step

    def train_step(self):
        step = original(self)

        def wrapped(state, frozen, batch):
            if int(state.step) + 1 in bad:
                frozen = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), frozen)
            return step(state, frozen, batch)

        return wrapped

    monkeypatch.setattr(Program, "train_step", train_step)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tiny_recipe, tmp_path, monkeypatch, capsys):
    tiny_recipe.checkpoint.update(save_steps=1, save_total_limit=None)
    with_bad_steps(monkeypatch, 2, 3)
    trainer.run(parse(tiny_recipe), tmp_path)
    rows = metrics(tmp_path)
    assert [row.get("skipped_steps") for row in rows] == [None, 1, 1, None]
    assert [row["loss"] is None for row in rows] == [False, True, True, False]
    assert json.loads((tmp_path / "train_results.json").read_text())["skipped_steps"] == 2
    assert "step 2: loss nan" in capsys.readouterr().err
    first, third, fourth = (saved_arrays(tmp_path, step) for step in (1, 3, 4))
    assert first.keys() == third.keys()
    assert all(np.array_equal(third[name], value) for name, value in first.items())
    assert not all(np.array_equal(fourth[name], value) for name, value in first.items())
    assert rows[3]["learning_rate"] == pytest.approx(schedule_at(tiny_recipe, 1))


def saved_arrays(workdir: Path, step: int) -> dict:
    """Parameters and moments of a checkpoint by path, without the step."""
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        state = checkpointer.restore(workdir / f"checkpoints/{step}/state")
    del state["step"]
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def schedule_at(recipe, step: int) -> float:
    from llava_jax.optimizer import make_schedule

    config = parse(recipe).first
    return float(make_schedule(config.optimizer, 4)(step)) * config.optimizer.learning_rate


def test_too_many_such_steps_in_a_row_end_the_run_and_name_their_samples(tiny_recipe, tmp_path, monkeypatch):
    tiny_recipe.checkpoint.save_steps = 1
    tiny_recipe.train.max_skipped_steps = 2
    with_bad_steps(monkeypatch, 2, 3)
    with pytest.raises(DivergedError, match=r"at step 3, the last of 2 in a row") as raised:
        trainer.run(parse(tiny_recipe), tmp_path)
    assert raised.value.exit_code == 13
    assert str(raised.value).count("record ") == 16
    assert saved_steps(tmp_path / "checkpoints")[-1] == 2


@pytest.mark.slow  # the parts are in test_checkpoint.py
def test_a_full_disk_does_not_stop_training(tiny_recipe, tmp_path, monkeypatch, capsys):
    def fail(directory):
        if len(failures) < 2:
            failures.append(directory)
            raise OSError(28, "No space left on device")
        original(directory)

    from llava_jax import checkpoint

    failures, original = [], checkpoint.write_digests
    monkeypatch.setattr(checkpoint, "write_digests", fail)
    tiny_recipe.checkpoint.save_steps = 1
    trainer.run(parse(tiny_recipe), tmp_path)
    assert saved_steps(tmp_path / "checkpoints") == [3, 4]
    assert capsys.readouterr().err.count("No space left on device). Training goes on") == 2


def test_overwrite_output_dir_starts_the_stage_and_those_after_it_anew(tiny_recipe, shapes_dataset, tmp_path):
    recipe = as_stages(tiny_recipe, shapes_dataset)
    trainer.run(parse(recipe), tmp_path)
    first = (tmp_path / "checkpoints/pretrain/2/digests.json").stat().st_mtime
    before = metrics(tmp_path)
    recipe.stages.finetune.optimizer.learning_rate = 2e-3
    with pytest.raises(
        ConfigError, match=r"holds a run with other settings: finetune/optimizer.learning_rate"
    ):
        trainer.run(parse(recipe), tmp_path)
    recipe.stages.finetune.checkpoint.overwrite_output_dir = True
    trainer.run(parse(recipe), tmp_path)
    assert (tmp_path / "checkpoints/pretrain/2/digests.json").stat().st_mtime == first
    after = metrics(tmp_path)
    assert [row["step"] for row in after] == [1, 2, 1, 2]
    assert after[:2] == before[:2]
    assert after[3]["learning_rate"] == pytest.approx(2 * before[3]["learning_rate"])


@pytest.mark.slow  # the parts are in test_checkpoint.py
def test_save_every_minutes_saves_besides(tiny_recipe, tmp_path, monkeypatch):
    tiny_recipe.train.max_steps = 2
    steps = []
    original = Checkpoints.save
    monkeypatch.setattr(
        Checkpoints,
        "save",
        lambda self, state, meta, **how: steps.append(meta["step"]) or original(self, state, meta, **how),
    )
    tiny_recipe.checkpoint.save_every_minutes = 1e-9
    trainer.run(parse(tiny_recipe), tmp_path)
    assert steps == [1, 2]
