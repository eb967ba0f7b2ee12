"""What train.report_to hands to others; they are not among the tests' packages, so stand-ins take their places."""

import sys
import types

import pytest

from llava_jax.config import ConfigError
from llava_jax.metrics import MetricsLog
from llava_jax.recipe import parse
from llava_jax.reporting import check_reporters, open_reporters

ROWS = (
    {"stage": "one", "step": 3, "loss": 2.5, "grad_norm": None},
    {"stage": "one", "step": 4, "eval_loss": 2.0},
)


class RefusedError(Exception):
    """Stands for wandb.Error."""


@pytest.fixture
def calls(monkeypatch):
    """What is called of tensorboardX and wandb, in order."""
    calls = []

    class Called:
        def __init__(self, name, /, *args, **settings):
            calls.append((name, args, settings))

        def __getattr__(self, method):
            return lambda *args, **settings: calls.append((method, args, settings))

    for name, maker in (("tensorboardX", "SummaryWriter"), ("wandb", "init")):
        module = types.ModuleType(name)
        setattr(module, maker, lambda *args, _maker=maker, **settings: Called(_maker, *args, **settings))
        module.Error = RefusedError
        module.Table = lambda columns, data: data
        monkeypatch.setitem(sys.modules, name, module)
    return calls


ANSWERS = ({"set": "", "sample": "record 0", "asked": "a|b?\n<i>", "label": "red", "predict": "blue"},)


def report(recipe, to: str, workdir) -> None:
    recipe.train.report_to = to
    config = parse(recipe).first
    check_reporters(config)
    log = MetricsLog(workdir / "metrics.jsonl")
    log.reporters = open_reporters(config, "one", workdir)
    for row in ROWS:
        log.append(row)
    for reporter in log.reporters:
        reporter.append_answers(4, ANSWERS)
        reporter.close()
    assert log.rows() == list(ROWS)


def test_tensorboard_gets_finite_figures_by_step_and_forgets_steps_that_are_taken_again(
    tiny_recipe, tmp_path, calls
):
    report(tiny_recipe, "tensorboard", tmp_path)
    assert [call for call in calls if call[0] != "flush"] == [
        ("SummaryWriter", (str(tmp_path / "tensorboard/one"),), {"purge_step": 3, "filename_suffix": ".3"}),
        ("add_scalar", ("loss", 2.5, 3), {}),
        ("add_scalar", ("eval_loss", 2.0, 4), {}),
        (
            "add_text",
            (
                "answers",
                "| set | sample | asked | expected | answer |\n|---|---|---|---|---|\n"
                "|  | record 0 | a&#124;b? &lt;i&gt; | red | blue |",
                4,
            ),
            {},
        ),
        ("close", (), {}),
    ]


def test_wandb_continues_the_run_of_the_directory(tiny_recipe, tmp_path, calls):
    report(tiny_recipe, "wandb, jsonl", tmp_path)
    name, _, settings = calls[0]
    assert (name, settings["name"], settings["resume"]) == ("init", "tiny", "allow")
    assert (
        settings["config"]["one"]["optimizer"]["learning_rate"]
        == parse(tiny_recipe).first.optimizer.learning_rate
    )
    assert calls[2:] == [
        ("log", ({"one/loss": 2.5, "one/step": 3},), {}),
        ("log", ({"one/eval_loss": 2.0, "one/step": 4},), {}),
        ("log", ({"one/answers": [["", "record 0", "a|b?\n<i>", "red", "blue"]], "one/step": 4},), {}),
        ("finish", (), {}),
    ]
    (tmp_path / "metrics.jsonl").unlink()
    report(tiny_recipe, "wandb", tmp_path)
    assert calls[6][2]["id"] == settings["id"]


@pytest.mark.parametrize("to", ["none", "jsonl"])
def test_without_them_nobody_is_told(tiny_recipe, tmp_path, calls, to):
    report(tiny_recipe, to, tmp_path)
    assert calls == []


@pytest.mark.parametrize(("to", "module"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_what_is_not_installed_is_named_with_its_command(tiny_recipe, monkeypatch, to, module):
    monkeypatch.setitem(sys.modules, module, None)
    tiny_recipe.train.report_to = to
    with pytest.raises(ConfigError, match=rf"needs {module}, .*pip install .*\.\[{to}\]"):
        check_reporters(parse(tiny_recipe).first)


def test_a_refusal_of_wandb_is_a_mistake_to_mend(tiny_recipe, tmp_path, calls, monkeypatch):
    def refuse(**settings):
        raise RefusedError("No API key configured.")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(
        ConfigError, match=r"No API key configured\. Run wandb login, or set WANDB_MODE=offline"
    ):
        report(tiny_recipe, "wandb", tmp_path)
