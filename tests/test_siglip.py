"""SigLIP towers from file to file: every layout in and out, images, what trains, and what is refused."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file as load_numpy
from transformers import (
    AutoProcessor,
    LlavaForConditionalGeneration,
    Qwen2ForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from llava_jax import trainer
from llava_jax.config import CLIP, SIGLIP, MeshConfig, ModelConfig, TextConfig, VisionConfig
from llava_jax.convert.description import describe
from llava_jax.convert.errors import ConversionError
from llava_jax.convert.export import check_layout, write_hf
from llava_jax.convert.logits import drawn_picture, run_prompt
from llava_jax.convert.names import model_rows
from llava_jax.convert.opening import open_model, open_parts, read_model
from llava_jax.convert.ours import write_model
from llava_jax.data.image_processor import ImageProcessor
from llava_jax.errors import ConfigError
from llava_jax.models.vit import normalize
from llava_jax.recipe import parse
from llava_jax.sharding import check_model, make_mesh, parameter_sharding
from llava_jax.step import abstract_model
from llava_jax.weights import complete, open_run
from tests.test_convert_layouts import (
    LAYOUTS,
    PROMPT,
    components,
    tinyllava,
)
from tests.test_trainer import one_device  # noqa: F401 (a fixture)
from tests.tiny_models import (
    DECODERS,
    SIZES,
    VISION,
    as_original,
    assert_same_leaves,
    copy_with,
    edit_config,
    export,
    randomized,
    save_llava,
)

TOWER = VISION | {"image_size": 30}  # 4 x 4 patches of 7 take 28 of its pixels
CONFIG = VisionConfig(**TOWER, model_type=SIGLIP, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6)


def save_siglip_llava(directory: Path, *, head: bool = True, dtype=torch.float32, **changes) -> Path:
    """As llava-hf's llava-interleave-qwen: a SigLIP tower, all of whose last features reach a Qwen2."""
    tower = {"model_type": "siglip_vision_model", "vision_use_head": head, **TOWER}
    fields = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    return save_llava(directory, "qwen2", dtype, vision_config=tower, **fields | changes)


@pytest.fixture(scope="module")
def siglip_llava(tmp_path_factory) -> Path:
    """As TinyLLaVA Factory has it: without the first patch, from the last layer but one."""
    directory = tmp_path_factory.mktemp("models") / "llava_hf"
    changes = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
    return save_siglip_llava(directory, **changes)


def save_tower(directory: Path, source: Path) -> Path:
    """The tower of a llava-hf directory as a SiglipVisionModel of its own."""
    model = SiglipVisionModel(SiglipVisionConfig(**TOWER))
    tensors = LlavaForConditionalGeneration.from_pretrained(source).model.vision_tower.state_dict()
    model.load_state_dict(tensors)
    model.save_pretrained(directory)
    return directory


def logits_of(model: LlavaForConditionalGeneration, num_image_tokens: int) -> np.ndarray:
    """transformers' logits of the prompt, float32[T, 90]."""
    ids = np.insert(np.where(PROMPT == -200, 90, PROMPT), [2] * (num_image_tokens - 1), 90)
    pixels = np.array(normalize(drawn_picture(30, 30)[None], CONFIG))
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor(ids)[None].long(), pixel_values=torch.tensor(pixels).permute(0, 3, 1, 2)
        ).logits
    return logits[0, :, :90].numpy()


def assert_same_in_transformers(first: Path, second: Path):
    """Both load without complaint, and every tensor has the same bits."""
    before, after = (
        LlavaForConditionalGeneration.from_pretrained(path, output_loading_info=True)
        for path in (first, second)
    )
    assert not any(before[1].values()) and not any(after[1].values())
    states = before[0].state_dict(), after[0].state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert tensor.dtype == states[1][name].dtype and torch.equal(tensor, states[1][name]), name


def test_the_config_says_what_transformers_ran(siglip_llava, tmp_path):
    source = open_model(siglip_llava)
    assert source.config.vision == CONFIG
    assert (source.config.select_layer, source.config.select_feature) == (-2, "patch")
    assert (source.config.num_image_tokens, source.config.num_vision_layers_run) == (15, 3)
    assert source.image_aspect_ratio == "square"
    whole = open_model(save_siglip_llava(tmp_path / "whole"))
    assert (whole.config.select_layer, whole.config.select_feature) == (-1, "cls_patch")
    assert (whole.config.num_image_tokens, whole.config.num_vision_layers_run) == (16, 4)


def test_siglip_so400m_has_27_patches_on_a_side():
    so400m = VisionConfig(1152, 4304, 27, 16, 384, 14, "gelu_pytorch_tanh", 1e-6, SIGLIP)
    assert ModelConfig(vision=so400m).num_image_tokens == 728  # TinyLLaVA's published models lose the first
    assert ModelConfig(vision=so400m, select_feature="cls_patch").num_image_tokens == 729
    with pytest.raises(ConfigError, match=r"image_size=384 is not a multiple"):
        dataclasses.replace(so400m, model_type=CLIP)
    with pytest.raises(ConfigError, match=r"image_size=13 holds no patch of vision.patch_size=14"):
        dataclasses.replace(so400m, image_size=13)
    with pytest.raises(ConfigError, match=r"select_feature='patch' leaves nothing .* use 'cls_patch'"):
        ModelConfig(vision=dataclasses.replace(so400m, image_size=14))


SIGLIP_LAYOUTS = {
    "saved by 5": LAYOUTS["saved by 5"],
    "transformers 4.36 to 4.51": LAYOUTS["transformers 4.36 to 4.51"],
    "a state dict of 4.52": LAYOUTS["a state dict of 4.52"],
    "a state dict of 5": LAYOUTS["a state dict of 5"],
    "tinyllava": ("tinyllava", tinyllava),
    "components": ("components", components),
    "ours": LAYOUTS["ours"],
}


@pytest.mark.parametrize("layout", SIGLIP_LAYOUTS)
def test_every_layout_has_the_logits_of_transformers(layout, siglip_llava, tmp_path):
    name, save = SIGLIP_LAYOUTS[layout]
    source = open_model(save(siglip_llava, tmp_path / "a"))
    assert source.layout == name and source.config.vision == CONFIG
    model = LlavaForConditionalGeneration.from_pretrained(siglip_llava, attn_implementation="eager").eval()
    expected = logits_of(model, 15)
    found = run_prompt(source, PROMPT)[:, :90]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("layer", [-1, -2])
def test_llava_hf_comes_back_bit_for_bit(layer, head, dtype, tmp_path):
    original = save_siglip_llava(tmp_path / "hf", head=head, dtype=dtype, vision_feature_layer=layer)
    write_model(tmp_path / "ours", open_model(original))
    ours = open_model(tmp_path / "ours")
    assert_same_leaves(ours, open_model(original))
    assert len([name for name in ours.idle if ".head." in name]) == 11 * head
    back = export(ours, tmp_path / "back", "llava-hf")
    assert_same_in_transformers(original, back)
    assert open_model(back).config == open_model(original).config
    fields = json.loads((back / "config.json").read_text())
    assert fields["vision_config"]["vision_use_head"] is head
    assert fields["vision_feature_select_strategy"] == "full" and fields["image_seq_length"] == 16


@pytest.mark.parametrize("save", [tinyllava, components])
def test_a_tinyllava_becomes_a_llava_hf_with_all_of_its_tower(save, siglip_llava, tmp_path):
    source = open_model(save(siglip_llava, tmp_path / "tiny"))
    assert source.config.select_feature == "patch"
    back = export(source, tmp_path / "back", "llava-hf")
    # TinyLLaVA has no placeholder in its vocabulary, so that all token rows are the model's own.
    before, after = load_numpy(siglip_llava / "model.safetensors"), load_numpy(back / "model.safetensors")
    for name, tensor in before.items():
        if not name.startswith("language_model"):
            name_after = name.replace("vision_tower.", "vision_tower.vision_model.")
            np.testing.assert_array_equal(after.pop(name_after), tensor, err_msg=name)
    assert not [name for name in after if not name.startswith("language_model")]
    LlavaForConditionalGeneration.from_pretrained(back)


def test_siglip_files_of_either_kind_give_the_same_tower(siglip_llava, tmp_path):
    alone = save_tower(tmp_path / "alone", siglip_llava)
    text = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    full = SiglipModel(SiglipConfig(vision_config=TOWER, text_config=text | {"vocab_size": 50000}))
    full.vision_model.load_state_dict(SiglipVisionModel.from_pretrained(alone).state_dict())
    full.save_pretrained(tmp_path / "full")
    assert {"logit_bias", "text_model.head.weight"} <= load_numpy(tmp_path / "full/model.safetensors").keys()
    towers = [open_model(path) for path in (alone, tmp_path / "full")]
    assert [(tower.layout, tower.config) for tower in towers] == [("siglip", CONFIG)] * 2
    assert_same_leaves(*towers)
    for tower in towers:
        assert tower.shape("vision_tower.layers.layer_norm1.scale") == (4, 16)
        assert len(tower.idle) == 2 + 11
    found = describe(read_model(tmp_path / "full"))
    assert found.layout == "siglip" and "logit_bias" in found.ignorable
    assert not found.missing + found.unexpected + found.misshaped


def test_parts_and_what_they_set_aside_are_exported(siglip_llava, tmp_path):
    save_tower(tmp_path / "siglip", siglip_llava)
    randomized(Qwen2ForCausalLM(DECODERS["qwen2"])).save_pretrained(tmp_path / "qwen2")
    parts = open_parts(ModelConfig(), vision_tower=tmp_path / "siglip", language_model=tmp_path / "qwen2")
    assert parts.config.vision == CONFIG and parts.config.text.attention_bias == "qkv"
    back = export(complete(parts, seed=0), tmp_path / "back", "llava-hf")
    after = LlavaForConditionalGeneration.from_pretrained(back).model.vision_tower.state_dict()
    before = SiglipVisionModel.from_pretrained(tmp_path / "siglip").state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    with pytest.raises(ConversionError, match="should be a CLIP or SigLIP tower of its own"):
        open_parts(ModelConfig(), vision_tower=tmp_path / "qwen2")


def test_damaged_towers_are_told(siglip_llava, tmp_path):
    def damage(tensors):
        del tensors["vision_tower.head.probe"]
        tensors["vision_tower.embeddings.class_embedding"] = torch.zeros(16)
        return tensors

    found = describe(read_model(copy_with(siglip_llava, tmp_path / "damaged", damage)))
    assert found.missing == ["vision_tower.vision_model.head.probe"]
    assert found.unexpected == ["vision_tower.embeddings.class_embedding"]


def test_a_clip_tower_has_no_head(tmp_path):
    def add(tensors):
        return tensors | {"vision_tower.head.probe": torch.zeros(1, 1, 16)}

    saved = save_llava(tmp_path / "clip")
    assert describe(read_model(copy_with(saved, tmp_path / "more", add))).unexpected == [
        "vision_tower.head.probe"
    ]


def test_the_original_layout_has_no_siglip(siglip_llava, tmp_path):
    model = ModelConfig(vision=CONFIG, text=TextConfig(**SIZES, head_dim=10), select_feature="cls_patch")
    check_layout(model, "llava-hf")
    with pytest.raises(
        ConversionError, match="no SigLIP tower; choose the layout llava-hf, or peft-llava-hf"
    ):
        check_layout(model, "llava")
    tiled = dataclasses.replace(model, image_grid_pinpoints=((30, 60),), patch_merge_type="spatial_unpad")
    with pytest.raises(ConversionError, match="lays out tiles of a SigLIP tower"):
        check_layout(tiled, "llava-hf")
    save_tower(tmp_path / "clip", siglip_llava)  # where its mm_vision_tower says
    original = as_original(save_llava(tmp_path / "hf"), tmp_path / "llava", tower=False)
    with pytest.raises(
        ConversionError, match=r"mm_vision_tower='clip' cannot be converted, the original reads"
    ):
        open_model(original)


def test_other_towers_are_refused_by_their_type(siglip_llava, tmp_path):
    copied = shutil.copytree(siglip_llava, tmp_path / "copy")
    fields = json.loads((copied / "config.json").read_text())["vision_config"]
    edit_config(copied, vision_config=fields | {"model_type": "siglip2_vision_model"})
    with pytest.raises(ConversionError, match=r"'siglip2_vision_model' .* only CLIP and SigLIP towers"):
        open_model(copied)


@pytest.mark.parametrize("aspect_ratio", ["pad", "square"])
@pytest.mark.parametrize(("feature", "count"), [("patch", 15), ("cls_patch", 16)])
def test_an_exported_processor_does_as_our_pipeline(aspect_ratio, feature, count, shapes_dataset, tmp_path):
    text = TextConfig(512, 24, 28, 2, 4, 2, 10, 64)
    model = ModelConfig(vision=CONFIG, text=text, select_feature=feature)
    write_hf(
        tmp_path / "hf",
        layout="llava-hf",
        model=model,
        read={row.leaf: np.zeros(row.shape, np.float32) for row in model_rows(model)}.__getitem__,
        tokenizer_path=f"{shapes_dataset}/tokenizer.model",
        image_aspect_ratio=aspect_ratio,
    )
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    path = next(Path(shapes_dataset, "images").iterdir())
    picture = drawn_picture(47, 21)
    Image.fromarray(picture).save(tmp_path / "wide.png")
    for file in (path, tmp_path / "wide.png"):
        with Image.open(file) as image:
            given = processor(images=[image.convert("RGB")], text=["<image>"], return_tensors="np")
        ours = ImageProcessor(model, aspect_ratio=aspect_ratio).read(str(file))
        expected = np.asarray(normalize(jnp.asarray(ours), CONFIG)).transpose(0, 3, 1, 2)
        np.testing.assert_allclose(given["pixel_values"], expected, rtol=0, atol=5e-7)
        assert (given["input_ids"] == processor.image_token_id).sum() == count == model.num_image_tokens


def test_tiles_need_all_patches(tmp_path):
    grid = {"image_grid_pinpoints": ((30, 60), (60, 30))}
    model = ModelConfig(vision=CONFIG, select_feature="cls_patch", **grid)
    processor = ImageProcessor(model, aspect_ratio="anyres")
    Image.fromarray(drawn_picture(90, 40)).save(tmp_path / "a.png")
    layout = processor.layout(str(tmp_path / "a.png"))
    assert layout.num_tiles == len(processor.read(str(tmp_path / "a.png"))) == 3
    assert layout.feature_ids.tolist() == list(range(3 * 16))
    with pytest.raises(ConfigError, match=r"none may be left out; set model.select_feature='cls_patch'"):
        ImageProcessor(ModelConfig(vision=CONFIG, **grid), aspect_ratio="anyres")


def test_every_parameter_has_its_place_on_a_mesh():
    model = ModelConfig(vision=CONFIG, text=TextConfig(96, 24, 28, 2, 4, 2, 10))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shapes = {name: leaf.shape for name, leaf in abstract_model(model)[1].items()}
    check_model(mesh, model, shapes)
    specs = {name: parameter_sharding(mesh, name, shape).spec for name, shape in shapes.items()}
    assert specs["vision_tower.patch_embedding.bias"] == jax.sharding.PartitionSpec(None)
    assert specs["vision_tower.patch_embedding.kernel"] == jax.sharding.PartitionSpec(None, "fsdp")


@pytest.fixture
def siglip_recipe(tiny_recipe):
    tiny_recipe.model.vision.update(
        image_size=35,  # 4 x 4 patches of 8 take 32
        model_type=SIGLIP,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
    )
    tiny_recipe.model.select_feature = "cls_patch"
    return tiny_recipe


def test_what_siglip_lacks_cannot_be_trained(siglip_recipe):
    siglip_recipe.tune.update(vision_tower="partial", vision_tower_modules="patch_embedding,pre_layrnorm")
    with pytest.raises(ConfigError, match="names pre_layrnorm, which SigLIP does not have; drop it"):
        parse(siglip_recipe)


@pytest.mark.parametrize("data", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_trains_the_tower_and_exports_it(data, siglip_recipe, tmp_path, monkeypatch):
    siglip_recipe.train.max_steps = 2
    siglip_recipe.tune.vision_tower = "full"
    siglip_recipe.export.update(layout="llava-hf", dtype="float32")
    siglip_recipe.mesh.update(data=data, fsdp=data)
    monkeypatch.setattr(trainer, "make_mesh", lambda config: make_mesh(config, jax.devices()[: data * data]))
    recipe = parse(siglip_recipe)
    trainer.run(recipe, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    assert "SigLIP vision tower" in (tmp_path / "run/README.md").read_text()
    trained, untrained = (
        open_run(tmp_path / "run"),
        complete(open_parts(recipe.first.model), seed=recipe.first.seed),
    )
    for name in untrained.names():
        if name.startswith("vision_tower"):
            assert not np.array_equal(trained.read(name), untrained.read(name)), name
    exported = open_model(tmp_path / "run/export")
    assert exported.config == recipe.first.model
    assert_same_leaves(exported, trained)
