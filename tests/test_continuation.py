"""What a checkpoint must have in common with the stage that continues from it."""

import json
from types import SimpleNamespace

import pytest

from llava_jax.config import Config, LoraConfig, ModelConfig, TextConfig, TuneConfig
from llava_jax.continuation import evaluated_sets, facts, require_same, require_training_state
from llava_jax.errors import CheckpointError

DATA = SimpleNamespace(fingerprint="f")
CHECKSUMS = {"a": 1, "b": 2}


def by_lora(alpha: int) -> Config:
    return Config(tune=TuneConfig(language_model="lora"), lora=LoraConfig(rank=4, alpha=alpha))


def made(tmp_path, step: int = 4, **meta):
    """A checkpoint beside which `meta` lies."""
    path = tmp_path / str(step)
    (path / "meta").mkdir(parents=True)
    (path / "meta/metadata").write_text(json.dumps({"step": step, "optimizer": True} | meta))
    return path


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            Config(model=ModelConfig(text=TextConfig(rope_theta=5e5))),
            "is of another network: model.text.rope_theta=500000.0 (was 10000.0). Use its settings",
        ),
        (by_lora(alpha=64), "lora.alpha=64 (was 8)"),
    ],
)
def test_a_network_of_the_same_shapes_may_be_another(tmp_path, config, message):
    before = by_lora(alpha=8) if config.tune.language_model == "lora" else Config()
    start = made(tmp_path, **facts(before, DATA, CHECKSUMS, {}))
    require_same(start, facts(before, DATA, CHECKSUMS, {}))
    with pytest.raises(CheckpointError) as raised:
        require_same(start, facts(config, DATA, CHECKSUMS, {}))
    assert message in str(raised.value)


def test_data_and_frozen_weights_are_the_same(tmp_path):
    start = made(tmp_path, dataset="f", frozen=CHECKSUMS)  # as older versions wrote it
    require_same(start, facts(Config(), DATA, CHECKSUMS, {}))
    with pytest.raises(CheckpointError, match="was trained on other data"):
        require_same(start, facts(Config(), SimpleNamespace(fingerprint="g"), CHECKSUMS, {}))
    with pytest.raises(CheckpointError, match="other frozen weights: b and 0 more"):
        require_same(start, facts(Config(), DATA, {"a": 1, "b": 3}, {}))


def test_evaluations_of_other_data_do_not_count(tmp_path, capsys):
    same, other = {"": DATA}, {"": SimpleNamespace(fingerprint="g")}
    assert evaluated_sets(same, None) == {"sets": {"": "f"}, "since": 0}
    start = made(tmp_path, evaluation={"sets": {"": "f"}, "since": 2})
    assert evaluated_sets(same, start) == {"sets": {"": "f"}, "since": 2}
    assert not capsys.readouterr().out
    assert evaluated_sets(other, start) == {"sets": {"": "g"}, "since": 4}
    assert "evaluations up to step 4 do not count any more" in capsys.readouterr().out


def test_an_early_end_with_the_best_parameters_is_not_trained_further(tmp_path):
    require_training_state(made(tmp_path, 4, evaluated_as=4))
    with pytest.raises(
        CheckpointError, match=r"5 ended its stage with the parameters of step 2 .* start anew"
    ):
        require_training_state(made(tmp_path, 5, evaluated_as=2))
