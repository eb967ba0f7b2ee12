"""Every recipe of configs/: its published values, its size, and a few steps with a tiny model in its place."""

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from ml_collections import ConfigDict
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from llava_jax import trainer
from llava_jax.config import SIGLIP, Config, ConfigError, MeshConfig, VisionConfig
from llava_jax.convert.opening import open_model
from llava_jax.planning.memory import arguments
from llava_jax.program import Program
from llava_jax.recipe import parse
from llava_jax.sharding import make_mesh
from llava_jax.weights import initial_weights, open_run
from tests.test_trainer import metrics, one_device, parameters  # noqa: F401 (a fixture)
from tests.tiny_recipe import get_config as tiny_recipe_of

CONFIGS = Path(__file__).parent.parent / "configs"


def recipe_of(name: str, *argument: str) -> ConfigDict:
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*argument)


def config_of(name: str, *argument: str) -> Config:
    return parse(recipe_of(name, *argument)).first


@pytest.mark.parametrize(
    ("name", "size", "rate", "epochs", "template"),
    [
        ("llava_v1_pretrain", "7b", 2e-3, 1.0, "v0_plain"),
        ("llava_v1_finetune", "13b", 2e-5, 1.0, "v1"),
        ("scienceqa", "13b", 2e-5, 12.0, "v1"),
    ],
)
def test_the_recipes_of_2023_hold_the_published_values(name, size, rate, epochs, template):
    """scripts/pretrain.sh, finetune.sh and finetune_sqa.sh of the original."""
    config = config_of(name, size)
    model, data = config.model, config.data
    assert (model.projector_type, model.select_layer, model.num_image_tokens) == ("linear", -2, 256)
    assert (model.text.hidden_size, model.text.rms_norm_eps) == ({"7b": 4096, "13b": 5120}[size], 1e-6)
    assert model.extra_tokens == ()
    assert (data.template, data.image_aspect_ratio, data.batch_size) == (template, "square", 128)
    assert (data.max_length, data.group_by_modality_length) == (2048, False)
    assert (config.optimizer.learning_rate, config.train.num_epochs) == (rate, epochs)
    assert config.tune.language_model == ("frozen" if name == "llava_v1_pretrain" else "full")


def test_the_tinyllava_recipes_hold_the_published_values():
    """scripts/train/train_tinyllama.sh of TinyLLaVA Factory, with CLIP."""
    first, second = config_of("tinyllava_pretrain"), config_of("tinyllava_finetune")
    for config in (first, second):
        assert (config.model.projector_type, config.model.num_image_tokens) == ("mlp2x_gelu", 576)
        assert (config.data.image_aspect_ratio, config.data.max_length) == ("square", 2048)
        assert (config.train.num_epochs, config.optimizer.warmup_ratio) == (1.0, 0.03)
    assert [c.data.batch_size for c in (first, second)] == [256, 128]
    assert [c.optimizer.learning_rate for c in (first, second)] == [1e-3, 2e-5]
    assert [c.data.template for c in (first, second)] == ["plain", "v1"]
    assert [c.tune.language_model for c in (first, second)] == ["frozen", "full"]
    assert [c.data.group_by_modality_length for c in (first, second)] == [False, True]


def test_the_tinyllava_recipes_have_siglip_too():
    """scripts/train/train_tinyllama.sh of TinyLLaVA Factory as it stands; config.json of siglip-so400m-patch14-384."""
    clip, siglip = config_of("tinyllava_finetune"), config_of("tinyllava_finetune", "siglip")
    assert siglip.model.vision == VisionConfig(1152, 4304, 27, 16, 384, 14, "gelu_pytorch_tanh", 1e-6, SIGLIP)
    assert (siglip.model.num_image_tokens, siglip.model.num_vision_layers_run) == (728, 26)
    assert siglip.init.vision_tower == "checkpoints/siglip-so400m-patch14-384"
    assert (siglip.data, siglip.optimizer, siglip.tune) == (clip.data, clip.optimizer, clip.tune)
    first = config_of("tinyllava_pretrain", "siglip")
    assert (first.model, first.init.vision_tower) == (siglip.model, siglip.init.vision_tower)
    with pytest.raises(ConfigError, match="'dino' is not one of 'clip', 'siglip'"):
        recipe_of("tinyllava_pretrain", "dino")


def test_the_text_recipes_hold_the_published_values():
    """examples/train_lora and examples/train_full of LLaMA-Factory."""
    names = [("pt", "lora"), ("sft", "lora"), ("sft", "full")]
    pt, sft_lora, sft = (config_of(*name) for name in names)
    for config in (pt, sft_lora, sft):
        assert (config.optimizer.warmup_ratio, config.optimizer.max_grad_norm) == (0.1, 1.0)
        assert (config.train.num_epochs, config.data.max_length, config.tune.projector) == (3, 2048, "frozen")
    for config in (pt, sft_lora):
        assert (config.lora.rank, config.lora.effective_alpha, config.lora.dropout) == (8, 16, 0.0)
        assert (config.optimizer.learning_rate, config.data.batch_size) == (1e-4, 8)
    assert (sft.optimizer.learning_rate, sft.data.batch_size) == (1e-5, 16)
    assert (pt.data.packing, pt.data.row_length, sft.data.packing) == (True, 2048, False)
    with pytest.raises(ConfigError, match="'qlora' is not one of 'lora', 'full'"):
        recipe_of("pt", "qlora")


GIB = 2**30


@pytest.mark.parametrize(
    ("name", "argument", "decoder", "trained"),
    [
        # Vicuna, and 1024 * 4096 + 4096 of the projector.
        ("llava_v1_pretrain", ("7b",), 6_738_415_616, 4_198_400),
        ("llava_v1_finetune", ("7b",), 6_738_415_616, 6_742_614_016),
        ("scienceqa", ("13b",), 13_015_864_320, 13_021_112_320),
        # TinyLlama, and 1024 * 2048 + 2048 * 2048 + 4096.
        ("tinyllava_pretrain", (), 1_100_048_384, 6_295_552),
        ("tinyllava_finetune", (), 1_100_048_384, 1_106_343_936),
        # The same behind SigLIP's width of 1152.
        ("tinyllava_pretrain", ("siglip",), 1_100_048_384, 6_557_696),
        # Llama 3; LoRA has 8 * (in + out) for each linear layer.
        ("pt", ("lora",), 8_030_261_248, 20_971_520),
        ("pt", ("full",), 8_030_261_248, 8_030_261_248),
        ("sft", ("full",), 8_030_261_248, 8_030_261_248),
    ],
)
def test_recipes_have_the_sizes_of_their_models_and_spread_over_devices(name, argument, decoder, trained):
    program = Program(config_of(name, *argument), make_mesh(MeshConfig(), jax.devices()), 100)
    trainable = program.abstract_trainable()
    assert sum(leaf.size for leaf in trainable.values()) == trained
    both = program.abstract_frozen() | trainable
    assert decoder == sum(
        leaf.size
        for name, leaf in both.items()
        if name.startswith("language_model.") and not name.endswith(("lora_a", "lora_b"))
    )
    sizes = arguments(program, 2048, 0 if name in ("pt", "sft") else 1)
    assert sizes.parameters == pytest.approx(4 * trained / 8, rel=2e-2)
    assert sizes.moments == pytest.approx(8 * trained / 8, rel=2e-2)


@pytest.fixture(scope="module")
def parts(shapes_dataset, tmp_path_factory) -> Path:
    """A tower and a decoder of the tiny recipe's sizes, as transformers saves them."""
    directory, model = tmp_path_factory.mktemp("parts"), tiny_recipe_of(shapes_dataset).model
    text, vision = model.text.to_dict(), model.vision.to_dict()
    LlamaForCausalLM(
        LlamaConfig(**{k: v for k, v in text.items() if k not in ("rope_scaling", "attention_bias")})
    ).save_pretrained(directory / "llama")
    CLIPVisionModel(CLIPVisionConfig(**vision)).save_pretrained(directory / "clip")
    shutil.copy(f"{shapes_dataset}/tokenizer.model", directory / "llama")
    return directory


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="the extra [plan] is not installed")
@pytest.mark.parametrize(
    ("recipe", "topology"),
    [
        ("llava_v1_pretrain.py:7b", "v5e:4x4"),
        ("llava_v1_finetune.py:7b", "v5e:8x8"),
        ("tinyllava_finetune.py", "v5e:4x4"),
        ("tinyllava_finetune.py:siglip", "v5e:4x4"),
        ("pt.py:lora", "v5e:2x4"),
        ("sft.py:full", "v5e:4x4"),
    ],
)
def test_recipes_fit_slices(recipe, topology):
    command = [
        sys.executable,
        "-m",
        "llava_jax.plan",
        f"--config={CONFIGS}/{recipe}",
        f"--topology={topology}",
    ]
    result = subprocess.run(command, capture_output=True, text=True, cwd=CONFIGS.parent)
    assert result.returncode == 0, result.stdout + result.stderr


def tiny(recipe: ConfigDict, tiny_recipe: ConfigDict, parts: Path) -> ConfigDict:
    """The recipe with another model's sizes, other data and a few steps; all else as it is."""
    projector_type = recipe.model.projector_type
    recipe.model = tiny_recipe.model
    recipe.model.projector_type = projector_type
    recipe.init.update(language_model=str(parts / "llama"), vision_tower=str(parts / "clip"))
    recipe.mesh = tiny_recipe.mesh
    recipe.data.update(
        {key: tiny_recipe.data[key] for key in ("path", "image_folder", "max_length", "batch_size")}
    )
    return short(recipe, tiny_recipe)


def short(recipe: ConfigDict, tiny_recipe: ConfigDict) -> ConfigDict:
    recipe.data.update({key: tiny_recipe.data[key] for key in ("num_threads", "cache_dir")})
    recipe.train.update(
        {
            key: tiny_recipe.train[key]
            for key in ("dtype", "frozen_dtype", "remat", "log_steps", "compiled_dir")
        }
    )
    recipe.train.max_steps = 1
    recipe.optimizer.warmup_ratio = 0.0
    recipe.checkpoint.save_steps = 1
    recipe.export.dtype = "float32"
    return recipe


def changed(before, after) -> set[str]:
    """The modules of what differs."""
    names = [name for name in before.names() if not np.array_equal(before.read(name), after.read(name))]
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("llava_v1_pretrain", "llava_v1_finetune"),
        pytest.param("llava_v1_pretrain", "scienceqa", marks=pytest.mark.slow),
        pytest.param("tinyllava_pretrain", "tinyllava_finetune", marks=pytest.mark.slow),
    ],
)
def test_two_stages_train_what_they_say_one_after_the_other(
    tiny_recipe, parts, shapes_dataset, tmp_path, first, second
):
    config = tiny(recipe_of(first), tiny_recipe, parts)
    config.data.path = f"{shapes_dataset}/pretrain.json"
    trainer.run(parse(config), tmp_path / "first")
    assert {name.partition(".")[0] for name in parameters(tmp_path / "first")} == {"multi_modal_projector"}
    assert changed(initial_weights(parse(config).first), open_run(tmp_path / "first")) == {
        "multi_modal_projector"
    }
    config = tiny(recipe_of(second), tiny_recipe, parts)
    config.init.projector = str(tmp_path / "first")
    trainer.run(parse(config), tmp_path / "second")
    before, after = initial_weights(parse(config).first), open_run(tmp_path / "second")
    kernel = "multi_modal_projector.linear_1.kernel"
    assert np.array_equal(before.read(kernel), open_run(tmp_path / "first").read(kernel))
    assert changed(before, after) == {"multi_modal_projector", "language_model"}
    exported = open_model(tmp_path / "second/export")
    assert exported.layout == ("llava" if "v1" in first else "llava-hf")
    assert exported.config.projector_type == config.model.projector_type
    assert np.array_equal(exported.read(kernel), after.read(kernel))


LLAMA_3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


@pytest.fixture
def llama(tmp_path) -> Path:
    """A tiny Llama 3 with its tokenizer: one token per byte."""
    directory = tmp_path / "llama"
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: id for id, token in enumerate([*LLAMA_3, *alphabet])}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens(LLAMA_3)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(vocab_size=261, num_key_value_heads=2, max_position_embeddings=512, **sizes)
    LlamaForCausalLM(config).save_pretrained(directory)
    bpe.save(str(directory / "tokenizer.json"))
    named = {"bos_token": LLAMA_3[0], "eos_token": LLAMA_3[4], "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(named | {"add_bos_token": True}))
    return directory


def text_recipe(name: str, tuning: str, language_model: Path, tiny_recipe: ConfigDict) -> ConfigDict:
    recipe = short(recipe_of(name, tuning), tiny_recipe)
    text = open_model(str(language_model)).config
    recipe.model.text.update(dataclasses.asdict(text))
    recipe.init.language_model = str(language_model)
    recipe.data.update(max_length=256, batch_size=2)
    if recipe.data.packing:
        recipe.data.row_length = 256
    recipe.mesh = tiny_recipe.mesh
    return recipe


@pytest.mark.parametrize(
    ("pt", "sft"), [("lora", "full"), pytest.param("full", "lora", marks=pytest.mark.slow)]
)
def test_a_decoder_reads_documents_and_then_learns_to_answer(tiny_recipe, llama, tmp_path, pt, sft):
    documents = [{"text": f"A drawn square, number {i}, lies beside a circle. " * i} for i in range(1, 15)]
    (tmp_path / "documents.jsonl").write_text("\n".join(map(json.dumps, documents)))
    config = text_recipe("pt", pt, llama, tiny_recipe)
    config.data.path = str(tmp_path / "documents.jsonl")
    trainer.run(parse(config), tmp_path / "pt")
    before, after = initial_weights(parse(config).first), open_run(tmp_path / "pt")
    assert changed(before, after) == {"language_model"}
    rows = metrics(tmp_path / "pt")
    assert all(row["num_supervised_tokens"] > 0.8 * 2 * 256 for row in rows)  # nearly no padding
    assert 5 < rows[0]["loss"] < 6  # ln 261 = 5.56

    exported = tmp_path / "pt/export"
    theirs = AutoModelForCausalLM.from_pretrained(exported)
    assert (theirs.config.model_type, theirs.config.bos_token_id, theirs.config.eos_token_id) == (
        "llama",
        0,
        4,
    )
    name = "language_model.embed_tokens.embedding"
    assert np.array_equal(theirs.get_input_embeddings().weight.detach().numpy(), after.read(name))
    assert AutoTokenizer.from_pretrained(exported).eos_token == "<|eot_id|>"

    tasks = [{"instruction": f"What is {i}?", "input": "", "output": f"It is {i}."} for i in range(8)]
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    info = {"identity": {"file_name": "tasks.json"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    config = text_recipe("sft", sft, exported, tiny_recipe)
    config.data.update(dataset="identity", dataset_dir=str(tmp_path))
    trainer.run(parse(config), tmp_path / "sft")
    before, again = initial_weights(parse(config).first), open_run(tmp_path / "sft")
    assert np.array_equal(before.read(name), after.read(name))
    assert changed(before, again) == {"language_model"}
    answers = [len("\n\nIt is 1.") - 2 + 1] * 2  # a byte each and the end of the turn
    assert metrics(tmp_path / "sft")[0]["num_supervised_tokens"] == sum(answers)
