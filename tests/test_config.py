"""Recipes become validated configs, or errors that say what to change."""

import dataclasses
import importlib.util
import inspect
from pathlib import Path

import pytest

from llava_jax.config import Config, ConfigError, ModelConfig
from llava_jax.config_values import from_json, to_json
from llava_jax.recipe import default_config, parse, vicuna

RECIPES = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


def two_stages():
    return default_config("one", "two")


def test_the_defaults_are_llava_15_7b_stage_2():
    config = parse(default_config()).stages[""]
    assert config == Config()
    assert (config.model.num_image_tokens, config.model.num_vision_layers_run) == (576, 23)
    assert (config.optimizer.learning_rate, config.data.batch_size, config.data.max_length) == (
        2e-5,
        128,
        2048,
    )
    assert dataclasses.asdict(config.tune) == {
        "vision_tower": "frozen",
        "projector": "full",
        "language_model": "full",
        "vision_tower_layers": "",
        "projector_layers": "",
        "language_model_layers": "",
        "vision_tower_modules": "",
        "language_model_modules": "",
        "fresh_projector": False,
    }


def test_a_config_survives_json():
    config = dataclasses.replace(Config(), seed=7)
    assert from_json(Config, to_json(config)) == config


def test_stages_share_what_they_do_not_set():
    recipe = two_stages()
    recipe.seed = 3
    recipe.stages["one"].data.template = "plain"
    stages = parse(recipe).stages
    assert list(stages) == ["one", "two"]
    assert [(s.seed, s.data.template) for s in stages.values()] == [(3, "plain"), (3, "v1")]
    assert (parse(recipe).first, parse(recipe).last) == tuple(stages.values())


def test_a_setting_that_every_stage_has_cannot_be_set_for_all():
    recipe = two_stages()
    recipe.data = default_config().data
    with pytest.raises(ConfigError, match=r"data: set per stage here, as stages\.one\.KEY"):
        parse(recipe)


@pytest.mark.parametrize(
    ("section", "key", "hint"),
    [
        ("data", "bath_size", "'data.bath_size'. Did you mean 'batch_size'?"),
        ("optimizer", "warmup", "Did you mean 'warmup_steps'?"),
        ("data", "learning_rte", "Did you mean 'optimizer.learning_rate'?"),
        ("tune", "zzz", "Known: fresh_projector, language_model"),
    ],
)
def test_unknown_keys_answer_with_the_nearest_name(section, key, hint):
    config = default_config()
    config[section][key] = 1
    with pytest.raises(ConfigError) as error:
        parse(config)
    assert hint in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer.learning_rate": 0.0}, "learning_rate=0.0 must be a positive number"),
        (
            {"optimizer.schedule": "cosin"},
            "optimizer.schedule='cosin' is not one of .* Did you mean 'cosine'",
        ),
        ({"optimizer.warmup_ratio": 1.5}, "warmup_ratio=1.5 is a share"),
        ({"optimizer.beta2": -1.0}, "beta2=-1.0 must lie in 0 to 1"),
        (
            {"optimizer.projector_learning_rate": -1.0},
            "projector_learning_rate=-1.0 must be a positive number",
        ),
        ({"optimizer.weight_decay": float("nan")}, "weight_decay=nan must not be negative"),
        ({"train.num_epochs": float("inf")}, "num_epochs=inf must be a positive number"),
        ({"seed": -1}, "seed=-1 must lie in 0"),
        ({"model.text.num_hidden_layers": 0}, "text.num_hidden_layers=0 must be a positive number"),
        ({"model.vision.patch_size": 0}, "vision.patch_size=0 must be a positive number"),
        ({"model.text.rope_scaling.factor": 0.0}, "rope_scaling.factor=0.0 must be a positive number"),
        ({"model.projector_type": "mlp\u00b2x_gelu"}, "is not one of"),
        (
            {"data.image_aspect_ratio": "stretch"},
            "image_aspect_ratio='stretch' is not one of 'pad', 'square', 'anyres'",
        ),
        ({"data.max_length": 8192}, "max_length=8192 exceeds .*max_position_embeddings=4096"),
        ({"data.max_length": 500}, "One image takes 576 tokens"),
        ({"train.accumulation_steps": 3}, "batch_size=128 is not a multiple of train.accumulation_steps=3"),
        ({"tune.projector": "frozen", "tune.language_model": "frozen"}, "Nothing trains"),
        (
            {"tune.projector": "frozen", "optimizer.projector_learning_rate": 1e-4},
            "projector_learning_rate is set but tune.projector='frozen'",
        ),
        ({"init.model": "a", "init.vision_tower": "b"}, "set one or the other"),
        ({"model.projector_type": "mlpx_gelu"}, "projector_type='mlpx_gelu' is not one of"),
        ({"model.projector_type": "identity"}, "needs equal widths"),
        ({"model.select_layer": -26}, "outside the tower's 25 hidden states"),
        ({"model.text.num_key_value_heads": 5}, "num_attention_heads=32 is not a multiple"),
        ({"model.vision.patch_size": 15}, "image_size=336 is not a multiple"),
    ],
)
def test_values_that_cannot_be_are_refused(changes, message):
    config = default_config()
    for key, value in changes.items():
        *sections, name = key.split(".")
        section = config
        for part in sections:
            section = section[part]
        section[name] = value
    with pytest.raises(ConfigError, match=message):
        parse(config)


def test_wrong_types_are_named():
    with pytest.raises(ConfigError, match=r"seed='a' should be of type int, not str"):
        from_json(Config, {"seed": "a"})
    with pytest.raises(ConfigError, match=r"data.shuffle=1 should be of type bool"):
        from_json(Config, {"data": {"shuffle": 1}})
    with pytest.raises(ConfigError, match=r"train.max_steps=True should be of type int"):
        from_json(Config, {"train": {"max_steps": True}})


@pytest.mark.parametrize(
    ("name", "depth"),
    [("identity", 0), ("linear", 1), ("mlp1x_gelu", 1), ("mlp2x_gelu", 2), ("mlp12x_gelu", 12)],
)
def test_projector_names_say_their_depth(name, depth):
    vision = dataclasses.replace(ModelConfig().vision, hidden_size=4096)
    assert ModelConfig(vision=vision, projector_type=name).projector_depth == depth


def load_recipe(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_says_its_command(path):
    module = load_recipe(path)
    assert f"--config=configs/{path.name}" in module.__doc__
    (choice, *_) = [*inspect.signature(module.get_config).parameters, ""]
    for arguments in {"size": [("7b",), ("13b",)], "tuning": [("lora",), ("full",)]}.get(choice, [()]):
        recipe = parse(module.get_config(*arguments))
        assert recipe.name.startswith(path.stem.split("_")[0])


def test_recipes_hold_the_published_values():
    def stage(name, size):
        path = Path(__file__).parent.parent / "configs" / f"{name}.py"
        return parse(load_recipe(path).get_config(size)).stages[""]

    for size, width, layers in (("7b", 4096, 32), ("13b", 5120, 40)):
        pretrain, finetune = stage("llava15_pretrain", size), stage("llava15_finetune", size)
        assert (pretrain.model.text.hidden_size, pretrain.model.text.num_hidden_layers) == (width, layers)
        assert finetune.model == pretrain.model
        assert (pretrain.optimizer.learning_rate, pretrain.data.batch_size, pretrain.data.template) == (
            1e-3,
            256,
            "plain",
        )
        assert (finetune.optimizer.learning_rate, finetune.data.batch_size, finetune.data.template) == (
            2e-5,
            128,
            "v1",
        )
        assert (pretrain.tune.language_model, finetune.tune.language_model) == ("frozen", "full")
        assert (pretrain.data.image_aspect_ratio, finetune.data.image_aspect_ratio) == ("square", "pad")
        assert (pretrain.data.group_by_modality_length, finetune.data.group_by_modality_length) == (
            False,
            True,
        )
        for config in (pretrain, finetune):
            assert (config.optimizer.warmup_ratio, config.optimizer.weight_decay) == (0.03, 0.0)
            assert config.optimizer.max_grad_norm is None
            assert (config.train.num_epochs, config.data.max_length) == (1.0, 2048)


def test_an_unknown_size_is_refused():
    with pytest.raises(ConfigError, match="'70b' is not one of '7b', '13b'"):
        vicuna("70b")


def test_cutoff_len_is_another_name_of_max_length():
    config = default_config()
    config.data.cutoff_len = 1024
    assert parse(config).stages[""].data.max_length == 1024
    staged = default_config("pretrain", "finetune")
    staged.stages.finetune.data.cutoff_len = 1024
    assert [stage.data.max_length for stage in parse(staged).stages.values()] == [2048, 1024]


def test_a_home_directory_is_found_at_the_beginning_of_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    recipe = default_config()
    recipe.init.update(model="~/model", adapters="~/a,b~/c,~/d", tokenizer="x/~/y")
    recipe.data.update(path="~/one.json,~/two.json", eval_path="seen=~/three.json")
    config = parse(recipe).first
    assert (config.init.model, config.init.tokenizer) == ("/home/me/model", "x/~/y")
    assert config.init.adapters == "/home/me/a,b~/c,/home/me/d"
    assert config.data.path == "/home/me/one.json,/home/me/two.json"
    assert config.data.eval_path == "seen=/home/me/three.json"
