"""Evaluation while training: when, what, which is best; a broken run that is continued evaluates nothing twice."""

import json
import math

import jax
import numpy as np
import pytest
from transformers import TrainerState
from transformers.modelcard import parse_log_history

from llava_jax import stage as stage_module
from llava_jax import trainer
from llava_jax import validation as validation_module
from llava_jax.checkpoint import Checkpoints, read_meta, saved_steps
from llava_jax.config import TrainConfig
from llava_jax.errors import ConfigError, StoppedError
from llava_jax.recipe import parse
from llava_jax.sharding import make_mesh
from llava_jax.validation import Validation, metric_names, summarize
from tests.test_trainer import metrics, parameters, run_until_saved


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(trainer, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))


def evaluated(losses: dict, metric="eval_loss", **settings) -> Validation:
    config = TrainConfig(
        eval_steps=1.0, load_best_model_at_end=True, metric_for_best_model=metric, **settings
    )
    return Validation(config, {"": None}, 10, {step: {metric: value} for step, value in losses.items()})


def test_figures_are_means_over_tokens_and_none_where_they_are_not_finite():
    assert summarize(6.0, 1, 4) == {
        "eval_loss": 1.5,
        "eval_perplexity": pytest.approx(4.4816890703),
        "eval_token_accuracy": 0.25,
    }
    assert summarize(4000.0, 0, 4, "eval_a_") == {
        "eval_a_loss": 1000.0,
        "eval_a_perplexity": None,
        "eval_a_token_accuracy": 0.0,
    }
    assert list(summarize(math.nan, 0, 4).values()) == [None, None, 0.0]
    assert list(summarize(0.0, 0, 0).values()) == [None, None, None]
    assert metric_names(["", "a"])[2:4] == ["eval_token_accuracy", "eval_a_loss"]


def test_the_best_is_the_lowest_loss_or_the_highest_accuracy_and_the_earliest_of_equals():
    assert evaluated({2: 3.0, 4: None, 6: 1.0, 8: 1.0}).ranking() == [6, 8, 2, 4]
    accuracy = evaluated({2: 0.3, 4: None, 6: 0.5}, "eval_token_accuracy")
    assert accuracy.ranking() == [6, 2, 4]


def test_evaluations_stall_when_so_many_in_a_row_are_no_better():
    losses = {1: 3.0, 2: 2.0, 3: 2.0, 4: 2.5}
    assert evaluated(losses, early_stopping_patience=2).has_stalled()
    assert not evaluated(losses, early_stopping_patience=3).has_stalled()
    assert not evaluated(losses | {5: 1.0}, early_stopping_patience=2).has_stalled()
    assert not evaluated(losses).has_stalled()


def test_each_interval_and_the_last_step_are_due_once():
    validation = Validation(TrainConfig(eval_steps=0.4), {"": None}, 10, {4: {}})
    assert [step for step in range(11) if validation.is_due(step)] == [8, 10]
    assert not any(Validation(TrainConfig(), {}, 10, {}).is_due(step) for step in range(11))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_steps": 0.0}, "train.eval_steps=0.0 is a number of steps, or a share"),
        ({"eval_steps": 2.0}, "there is nothing to evaluate on; set data.val_size, data.eval_path"),
        ({"load_best_model_at_end": True}, "compare evaluations; set train.eval_steps"),
        ({"metric_for_best_model": "eval_seen_loss"}, "nothing asks; set train.load_best_model_at_end"),
        ({"metric_for_best_model": "loss"}, "is not eval_loss, eval_perplexity or eval_token_accuracy"),
        ({"profile_steps": "3:3"}, "train.profile_steps='3:3' is no slice of steps"),
        ({"report_to": "paper"}, "train.report_to='paper' is not one of"),
    ],
)
def test_settings_that_would_reach_nothing_are_refused(tiny_recipe, changes, message):
    tiny_recipe.train.update(changes)
    with pytest.raises(ConfigError) as error:
        parse(tiny_recipe)
    assert message in str(error.value)


@pytest.fixture
def worse_every_time(monkeypatch):
    """Evaluations find a loss of 3, 1, 2, 2.5, 2.6 at steps 1, 2, 3, ...; -> the steps that are evaluated."""
    losses, steps = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5, 5: 2.6}, []

    def measure(self, step, *_):
        steps.append(step)
        self.history[step] = {"eval_loss": losses[step]}
        return self.history[step] | {"eval_runtime": 0.5}

    monkeypatch.setattr(validation_module.Validation, "measure", measure)
    return steps


def test_a_stage_that_stalls_ends_with_its_best_parameters_also_when_it_is_continued(
    tiny_recipe, tmp_path, monkeypatch, worse_every_time, capsys
):
    tiny_recipe.data.val_size = 8
    tiny_recipe.checkpoint.update(save_steps=1, save_total_limit=1)
    tiny_recipe.train.update(
        max_steps=5, eval_steps=1, early_stopping_patience=2, load_best_model_at_end=True
    )
    recipe = parse(tiny_recipe)
    run_until_saved(recipe, tmp_path, monkeypatch, step=3)
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert (state["global_step"], state["best_global_step"], len(state["log_history"])) == (2, 2, 4)
    assert saved_steps(tmp_path / "checkpoints") == [2, 3]  # the best beside the newest
    best = parameters_of(tmp_path, 2)
    trainer.run(recipe, tmp_path)
    assert worse_every_time == [1, 2, 3, 4]
    assert [row["step"] for row in metrics(tmp_path) if "eval_loss" in row] == [1, 2, 3, 4]
    check_trainer_state(tmp_path)
    assert saved_steps(tmp_path / "checkpoints") == [2, 4]
    last = parameters(tmp_path)
    assert all(np.array_equal(last[name], value) for name, value in best.items())
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert (results["steps"], results["best_step"], results["eval_loss"]) == (4, 2, 1.0)
    assert results["stopped_early_after"] == 2
    assert "stops early, after step 4 of 5: no evaluation since step 2 had a" in capsys.readouterr().out
    card = (tmp_path / "README.md").read_text()
    assert (
        "language_model: full. adamw, cosine schedule, warmup 0.03 of the run, not clipped. Stopped early"
        in card
    )
    assert "| `eval_loss` | 1.0000 |" in card
    trainer.run(recipe, tmp_path)  # has ended
    assert worse_every_time == [1, 2, 3, 4]


def check_trainer_state(workdir) -> None:
    """The history is that of metrics.jsonl, whatever was interrupted, and transformers makes sense of it."""
    state = TrainerState.load_from_json(str(workdir / "trainer_state.json"))
    *history, summary = state.log_history
    assert [{k: v for k, v in row.items() if k != "epoch"} for row in history] == [
        {key: value for key, value in row.items() if key != "epoch"} for row in metrics(workdir)
    ]
    results = json.loads((workdir / "train_results.json").read_text())
    assert summary["train_loss"] == results["train_loss"] and summary["step"] == 4
    assert state.total_flos == results["total_flos"] > 1e6
    assert (state.global_step, state.best_global_step, state.best_metric) == (4, 2, 1.0)
    assert state.best_model_checkpoint == str(workdir / "checkpoints/2")
    _, lines, evaluated = parse_log_history(state.log_history)
    assert [line["Validation Loss"] for line in lines] == [3.0, 1.0, 2.0, 2.5]
    assert evaluated["Loss"] == 2.5


def parameters_of(workdir, step: int) -> dict:
    from llava_jax.saved_parameters import SavedParameters

    leaves = SavedParameters(workdir / "checkpoints", step).leaves()
    return {name: leaf.read() for name, leaf in leaves.items()}


def check_answers(workdir, said: str) -> None:
    """The same questions at every evaluation, and all of them at the end by the same model."""
    steps = [
        [json.loads(line) for line in (workdir / f"answers/{step}.jsonl").read_text().splitlines()]
        for step in (1, 2)
    ]
    assert [[row["step"] for row in rows] for rows in steps] == [[1] * 4, [2] * 4]
    samples = [
        ("a", "record 0 (id 'conversation_train_00000')"),
        ("a", "record 7 (id 'conversation_train_00006')"),
        ("b", "record 0 (id 'caption_train_00000')"),
        ("b", "record 7 (id 'caption_train_00007')"),
    ]
    assert [[(row["set"], row["sample"]) for row in rows] for rows in steps] == [samples] * 2
    page = (workdir / "answers/index.html").read_text()
    assert page.count("<article>") == 4 and page.count("data:image/jpeg;base64,") == 4
    assert f"  a: {steps[1][0]['asked']!r} -> {steps[1][0]['predict']!r} (expected" in said

    rows = [json.loads(line) for line in (workdir / "generated_predictions.jsonl").read_text().splitlines()]
    assert [row["set"] for row in rows] == ["a"] * 8 + ["b"] * 8
    at_end = {(row["set"], row["sample"]): row for row in rows}
    for row in steps[1]:
        same = at_end[row["set"], row["sample"]]
        assert all(same[key] == row[key] for key in ("prompt", "predict", "label", "images"))
    results = json.loads((workdir / "eval_results.json").read_text())
    assert results["eval_exact_match"] == np.mean([row["exact_match"] for row in rows])
    assert results["eval_b_rouge_l"] == pytest.approx(np.mean([row["rouge_l"] for row in rows[8:]]))
    assert (results["eval_predicted"], results["eval_a_predicted"]) == (16, 8)
    assert (
        "Answers to the 16 samples kept out of training: exact match" in (workdir / "README.md").read_text()
    )


def test_named_sets_are_evaluated_on_their_own_and_together(tiny_recipe, shapes_dataset, tmp_path, capsys):
    tiny_recipe.data.eval_path = f"a={shapes_dataset}/finetune.json,b={shapes_dataset}/pretrain.json"
    tiny_recipe.data.max_samples = 8
    tiny_recipe.evaluate.update(samples=2, predict_with_generate=True, max_new_tokens=3)
    tiny_recipe.train.update(max_steps=2, eval_steps=1, profile_steps="2:3")
    trainer.run(parse(tiny_recipe), tmp_path)
    check_answers(tmp_path, capsys.readouterr().out)
    rows = [row for row in metrics(tmp_path) if "eval_loss" in row]
    assert [row["step"] for row in rows] == [1, 2]
    a, b, both = (rows[1][f"eval_{name}loss"] for name in ("a_", "b_", ""))
    assert min(a, b) < both < max(a, b)
    results = json.loads((tmp_path / "eval_results.json").read_text())
    logged = {key: value for key, value in rows[1].items() if key not in ("step", "eval_runtime")}
    assert {key: value for key, value in results.items() if key in logged} == logged
    assert (tmp_path / "training_eval_loss.png").stat().st_size > 0

    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    results = json.loads((tmp_path / "train_results.json").read_text())
    kinds = ("compile", "input", "step", "checkpoint", "evaluation")
    seconds = [results[f"{kind}_seconds"] for kind in kinds]
    assert min(seconds[0], *seconds[2:]) > 0
    assert results["goodput"] == pytest.approx(results["step_seconds"] / sum(seconds))
    assert results["process_memory_peak_gib"] > 0.05


def test_the_best_metric_must_be_one_that_is_reported(tiny_recipe, tmp_path):
    tiny_recipe.data.val_size = 8
    tiny_recipe.train.update(
        eval_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_seen_loss"
    )
    with pytest.raises(ConfigError, match="'eval_seen_loss' is not one of 'eval_loss'"):
        trainer.run(parse(tiny_recipe), tmp_path / "run")


def test_steps_that_are_never_reached_cannot_be_traced(tiny_recipe, tmp_path):
    tiny_recipe.train.update(max_steps=5, profile_steps="6:8")
    with pytest.raises(ConfigError, match="6:8 begins after the last of 5 steps"):
        trainer.run(parse(tiny_recipe), tmp_path / "run")


def test_a_best_checkpoint_that_is_not_there_is_told_and_the_next_best_taken(
    tiny_recipe, tmp_path, monkeypatch, worse_every_time, capsys
):
    tiny_recipe.data.val_size = 8
    tiny_recipe.train.update(max_steps=3, eval_steps=1, load_best_model_at_end=True)
    original = Checkpoints.is_good
    monkeypatch.setattr(Checkpoints, "is_good", lambda self, step: step != 2 and original(self, step))
    trainer.run(parse(tiny_recipe), tmp_path)
    assert "best evaluation, 2, is not there; 3 is the next best" in capsys.readouterr().out
    assert json.loads((tmp_path / "all_results.json").read_text())["best_step"] == 3


def test_an_evaluation_that_a_signal_prevented_is_made_when_the_run_continues(
    tiny_recipe, tmp_path, monkeypatch, worse_every_time
):
    tiny_recipe.data.val_size = 8
    tiny_recipe.train.update(max_steps=3, eval_steps=1, load_best_model_at_end=True)
    recipe = parse(tiny_recipe)
    with monkeypatch.context() as patch:
        patch.setattr(stage_module, "StopRequest", lambda: StoppedAtTheLastStep(tmp_path))
        with pytest.raises(StoppedError, match="Stopped after step 3"):
            trainer.run(recipe, tmp_path)
    assert worse_every_time == [1, 2]
    best = parameters_of(tmp_path, 2)
    assert any(not np.array_equal(parameters(tmp_path)[name], value) for name, value in best.items())
    trainer.run(recipe, tmp_path)
    assert worse_every_time == [1, 2, 3]
    assert all(np.array_equal(parameters(tmp_path)[name], value) for name, value in best.items())
    assert [row["step"] for row in metrics(tmp_path) if "loss" in row] == [1, 2, 3]


@pytest.mark.parametrize("save_only_model", [False, True])
def test_the_best_of_averaged_parameters_are_the_averages_that_were_evaluated(
    tiny_recipe, tmp_path, monkeypatch, worse_every_time, save_only_model
):
    tiny_recipe.data.val_size = 8
    tiny_recipe.optimizer.update(ema_decay=0.9, learning_rate=1e-2, warmup_ratio=0.0)
    tiny_recipe.tune.language_model = "frozen"
    tiny_recipe.checkpoint.save_only_model = save_only_model
    tiny_recipe.train.update(max_steps=3, eval_steps=1, load_best_model_at_end=True)
    evaluated = {}
    original = stage_module.Loop.evaluate

    def evaluate(self, step, trainable):
        evaluated[step] = {name: np.asarray(value) for name, value in trainable.items()}
        original(self, step, trainable)

    monkeypatch.setattr(stage_module.Loop, "evaluate", evaluate)
    trainer.run(parse(tiny_recipe), tmp_path)
    best, found = evaluated[2], parameters(tmp_path)
    assert found.keys() == best.keys()
    assert all(np.array_equal(found[name], value) for name, value in best.items())
    averaged = [read_meta(tmp_path / f"checkpoints/{step}").get("averaged", False) for step in (2, 3)]
    assert averaged == [save_only_model, True]
    name = "multi_modal_projector.linear_1.kernel"
    assert not np.array_equal(best[name], evaluated[3][name])
    if save_only_model:
        assert np.array_equal(parameters_of(tmp_path, 2)[name], best[name])
    else:
        assert not np.array_equal(parameters_of(tmp_path, 2)[name], best[name])


class StoppedAtTheLastStep:
    """A signal that comes after the second evaluation."""

    def __init__(self, workdir):
        self.workdir = workdir

    @property
    def asked(self) -> bool:
        return sum("eval_loss" in row for row in metrics(self.workdir)) == 2

    def listen(self) -> None:
        pass

    def close(self) -> None:
        pass
