"""What trains: modes, ranges of layers, targets, and settings that would reach nothing."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from llava_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    TextConfig,
    TuneConfig,
    VisionConfig,
)
from llava_jax.config_values import from_json
from llava_jax.optimizer import learning_rate, weight_decay
from llava_jax.recipe import default_config, parse
from llava_jax.step import abstract_tuned_model
from llava_jax.tuning import is_trainable, layer_spans, lora_targets, table

MODEL = ModelConfig(
    vision=VisionConfig(24, 40, 6, 4, image_size=28),
    text=TextConfig(90, 32, 52, 8, 4, 2, 8, attention_bias="qkv"),
)
LAYER = "language_model.layers."


def make(lora=None, optimizer=None, model=MODEL, **tune) -> Config:
    return Config(
        model=model,
        data=DataConfig(max_length=128),
        tune=TuneConfig(**tune),
        lora=LoraConfig(**lora or {}),
        optimizer=OptimizerConfig(**optimizer or {}),
    )


def trained(config) -> set[str]:
    return {name for name in abstract_tuned_model(config)[1] if is_trainable(name, config)}


def groups(names) -> set[str]:
    """The names up to the layer or the range."""
    return {".".join(name.split(".")[: 3 if ":" in name else 2]) for name in names}


@pytest.mark.parametrize(
    ("tune", "expected"),
    [
        (
            {"language_model": "frozen"},
            {"multi_modal_projector.linear_1", "multi_modal_projector.linear_2"},
        ),
        ({"projector": "partial", "projector_layers": "1:", "language_model": "frozen"}, {"multi_modal_projector.linear_2"}),
        (
            {"projector": "frozen", "language_model": "partial", "language_model_layers": "-2:"},
            {"language_model.layers.6:8"},
        ),
        (
            {"projector": "frozen", "language_model": "partial", "language_model_layers": "2:-3"},
            {"language_model.layers.2:5"},
        ),
        ({"projector": "frozen", "language_model": "partial", "language_model_layers": ":"}, {"language_model.layers"}),
        (
            {
                "projector": "frozen",
                "language_model": "partial",
                "language_model_modules": "lm_head, embed_tokens",
            },
            {"language_model.lm_head", "language_model.embed_tokens"},
        ),
        (
            {
                "projector": "frozen",
                "language_model": "frozen",
                "vision_tower": "partial",
                "vision_tower_layers": "3:",
                "vision_tower_modules": "position_embedding",
            },
            {"vision_tower.layers.3:5", "vision_tower.position_embedding"},
        ),
    ],
)  # fmt: skip
def test_partial_trains_what_is_named_and_nothing_else(tune, expected):
    assert groups(trained(make(**tune))) == expected


def test_a_stack_is_cut_only_around_the_layers_that_train():
    for text, parts in (
        ("2:5", ((0, 2), (2, 5), (5, 8))),
        (":3", ((0, 3), (3, 8))),
        ("-1:", ((0, 7), (7, 8))),
    ):
        config = make(language_model="partial", language_model_layers=text)
        assert layer_spans(config) == {"language_model": parts}
    assert layer_spans(make(language_model="partial", language_model_layers="0:8")) == {}


@pytest.mark.parametrize(
    ("bias", "expected"),
    [
        ("none", set()),
        ("lora_only", {"q_proj"}),
        ("all", {"q_proj", "k_proj", "v_proj"}),
    ],
)
def test_biases_train_beside_adapters_as_asked(bias, expected):
    config = make(language_model="lora", projector="frozen", lora={"bias": bias, "target": "q_proj,o_proj"})
    names = trained(config)
    assert {name.split(".")[-2] for name in names if name.endswith(".bias")} == expected
    assert {name for name in names if not name.endswith(".bias")} == {
        f"{LAYER}self_attn.{layer}.lora_{side}" for layer in ("q_proj", "o_proj") for side in "ab"
    }


def test_whole_modules_train_beside_adapters():
    names = trained(make(language_model="lora", projector="frozen", language_model_modules="lm_head"))
    assert "language_model.lm_head.kernel" in names and f"{LAYER}self_attn.q_proj.kernel" not in names


def test_each_module_has_its_own_targets():
    tune = dict(vision_tower="lora", projector="lora", language_model="lora")
    config = make(lora={"target": "q_proj,v_proj", "projector_target": "linear_2"}, **tune)
    assert lora_targets(config) == {
        "vision_tower": ("q_proj", "v_proj"),
        "projector": ("linear_2",),
        "language_model": ("q_proj", "v_proj"),
    }
    assert [len(names) for names in lora_targets(make(**tune)).values()] == [6, 2, 7]


def test_scales_are_those_of_the_papers():
    assert LoraConfig().scale == 2.0  # 256 / 128
    assert LoraConfig(rank=16, alpha=8.0).scale == 0.5
    assert LoraConfig(rank=16, alpha=8.0, rslora=True).scale == 2.0


def test_rates_and_decays_are_each_modules_own_and_of_lora_plus():
    config = OptimizerConfig(
        learning_rate=1.0,
        projector_learning_rate=2.0,
        language_model_learning_rate=3.0,
        weight_decay=0.1,
        vision_tower_weight_decay=0.0,
        language_model_weight_decay=0.3,
        loraplus_lr_ratio=16.0,
    )
    a, b = (f"{LAYER}self_attn.q_proj.lora_{side}" for side in "ab")
    fc1, linear = "vision_tower.layers.mlp.fc1.kernel", "multi_modal_projector.linear_1"
    rates = [learning_rate(name, config) for name in (a, b, fc1, f"{linear}.kernel")]
    assert rates == [3.0, 48.0, 1.0, 2.0]
    names = (a, b, fc1, f"{linear}.kernel", f"{linear}.bias", f"{LAYER}input_layernorm.scale")
    assert [weight_decay(name, config) for name in names] == [0.3, 0.3, 0.0, 0.1, 0.0, 0.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"language_model": "frozn"},
            r"tune\.language_model='frozn' is not one of .*Did you mean 'frozen'",
        ),
        ({"language_model": "False"}, r"tune\.language_model=False should be a word: 'frozen' in its place"),
        ({"vision_tower": True}, r"tune\.vision_tower=True should be a word: 'full'"),
        ({"language_model": "partial"}, r"says not which part: set tune\.language_model_layers"),
        (
            {"language_model_layers": "2:"},
            r"tune\.language_model_layers='2:' is about .*'partial', but it is 'full'",
        ),
        (
            {"language_model_modules": "norm"},
            r"is about tune\.language_model='partial' or 'lora', but it is 'full'",
        ),
        (
            {"language_model": "partial", "language_model_layers": "8:"},
            r"selects no layers.*the module has 8",
        ),
        (
            {"language_model": "partial", "language_model_layers": "-9:"},
            "selects no layers, or more than there are",
        ),
        ({"language_model": "partial", "language_model_layers": "4"}, r"'4' is no slice; write '20:'"),
        (
            {"language_model": "partial", "language_model_modules": "head"},
            "is not one of 'embed_tokens', 'norm', 'lm_head'",
        ),
        (
            {"vision_tower": "partial", "vision_tower_layers": "5:"},
            "the module has 5",
        ),  # of CLIP's 6, 5 are run
        ({"lora": {"rank": 8}}, r"lora\.\* .* is set, but no module trains by LoRA"),
        ({"optimizer": {"loraplus_lr_ratio": 16.0}}, "no module trains by LoRA"),
        ({"lora": {"rank": 0}, "language_model": "lora"}, r"lora\.rank=0 must be positive"),
        ({"lora": {"dropout": 1.0}, "language_model": "lora"}, r"lora\.dropout=1\.0 must lie in 0 to 1"),
        (
            {"lora": {"target": "q_prj"}, "language_model": "lora"},
            r"lora\.target='q_prj' names none of its linear layers.* Did you mean 'q_proj'\?",
        ),
        (
            {"lora": {"target": "q_proj,fc1"}, "language_model": "lora"},
            r"names fc1, a layer of the vision tower, but tune\.vision_tower='frozen'",
        ),
        ({"lora": {"target": "q_proj,w1"}, "language_model": "lora"}, r"lora\.target='w1' is not one of"),
        ({"lora": {"target": "lm_head"}, "language_model": "lora"}, "names none of its linear layers"),
        (
            {"lora": {"target": "q_proj"}, "projector": "lora", "language_model": "lora"},
            r"names none of its linear layers \(linear_1, linear_2\); set lora\.projector_target",
        ),
        (
            {"lora": {"vision_tower_target": "fc1"}, "language_model": "lora"},
            r"lora\.vision_tower_target is set, but tune\.vision_tower='frozen'",
        ),
        (
            {"lora": {"language_model_target": "fc1"}, "language_model": "lora"},
            r"lora\.language_model_target='fc1' is not one of",
        ),
        (
            {"lora": {"create_new_adapter": True}, "language_model": "lora"},
            r"is about init\.adapters, which names none",
        ),
        (
            {"optimizer": {"vision_tower_weight_decay": 0.1}},
            r"vision_tower_weight_decay is set but tune\.vision_tower='frozen'",
        ),
        (
            {
                "optimizer": {"learning_rate": 1e-3, "projector_learning_rate": 1e-4},
                "language_model": "frozen",
            },
            r"optimizer\.learning_rate=0\.001 reaches nothing",
        ),
    ],
)
def test_settings_that_would_reach_nothing_are_refused(settings, message):
    settings = dict(settings)
    sections = {name: settings.pop(name) for name in ("lora", "optimizer") if name in settings}
    recipe = default_config()
    recipe.model.vision.update(hidden_size=24, num_attention_heads=4, num_hidden_layers=6)
    recipe.model.text.num_hidden_layers = 8
    for name, values in (sections | {"tune": settings}).items():
        for key, value in values.items():
            with recipe.ignore_type():
                recipe[name][key] = value
    with pytest.raises(ConfigError, match=message):
        parse(recipe)


def test_modules_that_the_model_lacks_are_refused():
    text = dataclasses.replace(MODEL.text, tie_word_embeddings=True)
    recipe = default_config()
    recipe.model.text.tie_word_embeddings = text.tie_word_embeddings
    recipe.tune.update(language_model="partial", language_model_modules="lm_head")
    with pytest.raises(ConfigError, match="this decoder's head is its embedding; name embed_tokens"):
        parse(recipe)
    recipe.tune.language_model_modules = "image_newline"
    with pytest.raises(ConfigError, match="which only a model with"):
        parse(recipe)


def test_old_settings_are_answered_with_the_new_words():
    with pytest.raises(ConfigError, match=r"tune\.language_model=False .*'frozen'"):
        from_json(Config, {"tune": {"language_model": False}})


def test_the_table_says_what_trains_how_many_and_at_which_rate():
    config = make(
        vision_tower="partial",
        vision_tower_layers="3:",
        language_model="lora",
        lora={"rank": 2, "target": "q_proj", "dropout": 0.1},
        optimizer={"learning_rate": 1e-4, "projector_learning_rate": 1e-5, "projector_weight_decay": 0.1},
    )
    shapes = abstract_tuned_model(config)[1]
    some = {True: {}, False: {}}
    for name, leaf in shapes.items():
        some[is_trainable(name, config)][name] = leaf
    lines = table(config, some[True], some[False])
    block = 4 * (24 * 24 + 24) + 2 * 24 * 40 + 40 + 24 + 4 * 24
    assert [" ".join(line.split()) for line in lines] == [
        f"vision_tower {5 * block + 14 * 14 * 3 * 24 + 24 + 5 * 24 + 2 * 24:,} parameters "
        f"{2 * block:,} train at 0.0001: layers 3:5 of 5",
        f"projector {24 * 32 + 32 * 32 + 64:,} parameters {24 * 32 + 32 * 32 + 64:,} train at 1e-05, weight decay 0.1: full",
        f"language_model {sum(leaf.size for name, leaf in shapes.items() if name[0] == 'l'):,} parameters "
        f"{8 * 2 * (32 + 32):,} train at 0.0001: LoRA of rank 2, scale 2, dropout 0.1 on q_proj",
    ]


@pytest.mark.parametrize("size", ["7b", "13b"])
@pytest.mark.parametrize("name", ["llava15_finetune_lora", "llava15_finetune_task_lora"])
def test_the_lora_recipes_hold_the_published_values(name, size):
    """scripts/v1_5/finetune_lora.sh and finetune_task_lora.sh of the original."""
    path = Path(__file__).parent.parent / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = parse(module.get_config(size)).first
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout, config.lora.bias) == (
        128,
        256.0,
        0.05,
        "none",
    )
    assert (config.optimizer.learning_rate, config.optimizer.projector_learning_rate) == (2e-4, 2e-5)
    assert (config.data.batch_size, config.data.image_aspect_ratio, config.data.template) == (
        128,
        "pad",
        "v1",
    )
    assert config.data.group_by_modality_length and config.train.num_epochs == 1.0
    assert (config.tune.vision_tower, config.tune.projector, config.tune.language_model) == (
        "frozen",
        "full",
        "lora",
    )
    names = trained(dataclasses.replace(config, model=MODEL, data=DataConfig(max_length=128)))
    assert len(names) == 7 * 2 + 4
