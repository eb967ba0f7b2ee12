"""Weights keep their values on every way in and out."""

import dataclasses
import json
import lzma
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    Qwen2ForCausalLM,
)

from llava_jax.config import ModelConfig, TextConfig, VisionConfig
from llava_jax.convert.errors import ConversionError
from llava_jax.convert.export import write_hf
from llava_jax.convert.opening import open_model, open_parts, open_projector
from llava_jax.convert.ours import write_model
from llava_jax.convert.source import ModelSource
from llava_jax.weights import complete
from tests.tiny_models import (
    DECODERS,
    GOLDEN,
    ROOT,
    SIZES,
    VISION,
    as_original,
    assert_same_leaves,
    assert_same_tensors,
    copy_with,
    edit_config,
    export,
    random_source,
    randomized,
    save_clip,
    save_llava,
)


@pytest.fixture(scope="module")
def llava_hf(tmp_path_factory) -> Path:
    return save_llava(tmp_path_factory.mktemp("models") / "llava_hf")


def linear(state, pattern: str, layers: int, leaf: str) -> dict:
    """The leaves of one kind of projection, from the state dict's tensors."""
    weights = [state[pattern.format(i) + ".weight"].numpy().T for i in range(layers)]
    leaves = {f"{leaf}.kernel": np.stack(weights)}
    if pattern.format(0) + ".bias" in state:
        leaves[f"{leaf}.bias"] = np.stack([state[pattern.format(i) + ".bias"].numpy() for i in range(layers)])
    return leaves


def expected_leaves(model: LlavaForConditionalGeneration) -> dict[str, np.ndarray]:
    """Our 3 run CLIP layers, 2 decoder layers and 90 tokens of `save_llava`'s model."""
    state = model.state_dict()
    clip, text = "model.vision_tower.", "model.language_model."
    leaves = {
        "vision_tower.class_embedding": state[clip + "embeddings.class_embedding"],
        "vision_tower.position_embedding": state[clip + "embeddings.position_embedding.weight"],
        "vision_tower.patch_embedding.kernel": torch.einsum(
            "crpq->pqrc", state[clip + "embeddings.patch_embedding.weight"]
        ).flatten(0, 2),
        "vision_tower.pre_layrnorm.scale": state[clip + "pre_layrnorm.weight"],
        "vision_tower.pre_layrnorm.bias": state[clip + "pre_layrnorm.bias"],
        "language_model.embed_tokens.embedding": state[text + "embed_tokens.weight"][:90],
        "language_model.norm.scale": state[text + "norm.weight"],
    }
    if not model.config.tie_word_embeddings:
        leaves["language_model.lm_head.kernel"] = state["lm_head.weight"][:90].T
    for number in (1, 2):
        for ours, theirs in (("kernel", "weight"), ("bias", "bias")):
            tensor = state[f"model.multi_modal_projector.linear_{number}.{theirs}"]
            leaves[f"multi_modal_projector.linear_{number}.{ours}"] = tensor.T if tensor.ndim == 2 else tensor
    for norm in ("layer_norm1", "layer_norm2"):
        for ours, theirs in (("scale", "weight"), ("bias", "bias")):
            tensors = [state[f"{clip}encoder.layers.{i}.{norm}.{theirs}"] for i in range(3)]
            leaves[f"vision_tower.layers.{norm}.{ours}"] = torch.stack(tensors)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors = [state[f"{text}layers.{i}.{norm}.weight"] for i in range(2)]
        leaves[f"language_model.layers.{norm}.scale"] = torch.stack(tensors)
    leaves = {name: tensor.numpy() for name, tensor in leaves.items()}
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"):
        leaves |= linear(state, clip + "encoder.layers.{}." + name, 3, f"vision_tower.layers.{name}")
    for name in ("mlp.fc1", "mlp.fc2"):
        leaves |= linear(state, clip + "encoder.layers.{}." + name, 3, f"vision_tower.layers.{name}")
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"):
        leaves |= linear(state, text + "layers.{}." + name, 2, f"language_model.layers.{name}")
    for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        leaves |= linear(state, text + "layers.{}." + name, 2, f"language_model.layers.{name}")
    return leaves


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_leaf_is_the_tensor_of_the_state_dict(decoder, tmp_path):
    source = open_model(save_llava(tmp_path / "model", decoder))
    expected = expected_leaves(LlavaForConditionalGeneration.from_pretrained(tmp_path / "model"))
    assert source.layout == "llava-hf"
    assert sorted(source.names()) == sorted(expected)
    for name, array in expected.items():
        assert source.shape(name) == array.shape, name
        np.testing.assert_array_equal(source.read(name), array, err_msg=name)


def test_the_patch_kernel_does_what_the_convolution_does(llava_hf):
    model = LlavaForConditionalGeneration.from_pretrained(llava_hf)
    image = torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    convolved = model.model.vision_tower.embeddings.patch_embedding(image)[0].flatten(1).T.detach()
    pixels = image[0].permute(1, 2, 0).numpy()  # [28, 28, 3]
    patches = [pixels[y : y + 7, x : x + 7].reshape(-1) for y in range(0, 28, 7) for x in range(0, 28, 7)]
    kernel = open_model(llava_hf).read("vision_tower.patch_embedding.kernel")
    np.testing.assert_allclose(np.stack(patches) @ kernel, convolved, atol=1e-4)


def test_the_configs_say_what_transformers_ran(llava_hf, tmp_path):
    assert open_model(llava_hf).config == ModelConfig(
        vision=VisionConfig(16, 26, 4, 2, 28, 7, "quick_gelu", 1e-5),
        text=TextConfig(90, 24, 28, 2, 4, 2, 10, 2048, 1e-5, 5000.0),
        projector_type="mlp2x_gelu",
        select_layer=-2,
        select_feature="patch",
    )
    qwen2 = open_model(save_llava(tmp_path / "q", "qwen2", vision_feature_select_strategy="full"))
    assert (qwen2.config.text.attention_bias, qwen2.config.select_feature) == ("qkv", "cls_patch")
    assert open_model(save_llava(tmp_path / "b", "biased")).config.text.attention_bias == "qkvo"
    assert open_model(save_llava(tmp_path / "t", "tied")).config.text.tie_word_embeddings


def test_what_is_not_run_is_set_aside(llava_hf):
    aside = open_model(llava_hf).set_aside()
    tensors = load_numpy(llava_hf / "model.safetensors")
    clip = [
        name for name in tensors if re.match(r"vision_tower\.(encoder\.layers\.3|post_layernorm)\.", name)
    ]
    assert len(clip) == 18
    for name in clip:
        np.testing.assert_array_equal(aside[name], tensors[name])
    rows = {"language_model.embed_tokens.weight": "language_model.model.embed_tokens.weight"}
    rows["language_model.lm_head.weight"] = "language_model.lm_head.weight"
    assert sorted(aside) == sorted([*clip, *rows])
    for ours, theirs in rows.items():
        np.testing.assert_array_equal(aside[ours], tensors[theirs][90:])


def test_the_last_layer_leaves_only_the_norm_aside(tmp_path):
    source = open_model(save_llava(tmp_path / "model", vision_feature_layer=-1))
    assert source.shape("vision_tower.layers.mlp.fc1.kernel") == (4, 16, 26)
    assert [name for name in source.set_aside() if name.startswith("vision_tower.")] == [
        "vision_tower.post_layernorm.weight",
        "vision_tower.post_layernorm.bias",
    ]


def test_a_placeholder_inside_the_vocabulary_cuts_nothing(tmp_path):
    low = open_model(save_llava(tmp_path / "low", image_token_index=10))
    assert low.config.text.vocab_size == 99
    decoder = LlamaConfig(**SIZES, eos_token_id=95)
    below_the_end = open_model(save_llava(tmp_path / "end", text_config=decoder))
    assert below_the_end.config.text.vocab_size == 99


NAMES_IN_TIME = {
    "transformers 4.36 to 4.51": lambda name: name.replace("vision_tower.", "vision_tower.vision_model."),
    "a state dict of 4.52": lambda name: re.sub(
        r"^(vision_tower|multi_modal_projector)\.",
        r"model.\1.",
        name.replace("vision_tower.", "vision_tower.vision_model.")
        .replace("language_model.model.", "model.language_model.")
        .replace("language_model.lm_head.", "lm_head."),
    ),
    "a state dict of 5": lambda name: re.sub(
        r"^(vision_tower|multi_modal_projector)\.",
        r"model.\1.",
        name.replace("language_model.model.", "model.language_model.").replace(
            "language_model.lm_head.", "lm_head."
        ),
    ),
    "without the decoder's inner model": lambda name: name.replace(
        "language_model.model.", "language_model."
    ),
}


@pytest.mark.parametrize("time", NAMES_IN_TIME)
def test_names_of_every_time_are_read_alike(time, llava_hf, tmp_path):
    rename = NAMES_IN_TIME[time]
    renamed = copy_with(llava_hf, tmp_path / "m", lambda tensors: {rename(k): v for k, v in tensors.items()})
    assert load_file(renamed / "model.safetensors").keys() != load_file(llava_hf / "model.safetensors").keys()
    assert_same_leaves(open_model(renamed), open_model(llava_hf))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decoder", DECODERS)
def test_llava_hf_comes_back_bit_for_bit(decoder, dtype, tmp_path):
    original = save_llava(tmp_path / "hf", decoder, dtype)
    write_model(tmp_path / "ours", open_model(original))
    ours = open_model(tmp_path / "ours")
    assert ours.layout == "ours"
    assert_same_leaves(ours, open_model(original))
    export(ours, tmp_path / "back", "llava-hf")
    before = LlavaForConditionalGeneration.from_pretrained(original)
    after, problems = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not any(problems.values())
    assert after.dtype == dtype and before.state_dict().keys() == after.state_dict().keys()
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[name]), name
    assert after.config.text_config.rope_parameters == before.config.text_config.rope_parameters
    assert after.config.image_token_id == 90
    for key in ("rms_norm_eps", "tie_word_embeddings", "model_type", "num_key_value_heads"):
        assert getattr(after.config.text_config, key) == getattr(before.config.text_config, key)
    assert after.config.text_config.head_dim == getattr(before.config.text_config, "head_dim", 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_original_layout_comes_back_bit_for_bit(dtype, tmp_path):
    original = as_original(save_llava(tmp_path / "hf", dtype=dtype), tmp_path / "llava", tower=True)
    edit_config(original, vision_config=VISION)
    write_model(tmp_path / "ours", open_model(original))
    export(open_model(tmp_path / "ours"), tmp_path / "back", "llava")
    assert_same_tensors(original, tmp_path / "back")
    assert open_model(tmp_path / "back").config == open_model(original).config


@pytest.mark.parametrize("kind, depth", [("linear", 1), ("mlp1x_gelu", 1), ("mlp3x_gelu", 3)])
def test_the_original_names_every_projector(kind, depth, tmp_path):
    model, arrays = random_source(projector_type=kind)
    write_hf(tmp_path / "llava", layout="llava", model=model, read=arrays.__getitem__)
    names = [name for name in load_numpy(tmp_path / "llava/model.safetensors") if "mm_projector" in name]
    inner = [""] if kind == "linear" else [f"{2 * i}." for i in range(depth)]
    assert sorted(names) == sorted(
        f"model.mm_projector.{i}{end}" for i in inner for end in ("weight", "bias")
    )
    back = open_model(tmp_path / "llava")
    assert back.config == model
    for name, array in arrays.items():
        np.testing.assert_array_equal(back.read(name), array)


def test_template_and_aspect_ratio_survive_both_layouts(tmp_path):
    model, arrays = random_source()
    for layout in ("llava-hf", "llava"):
        write_hf(
            tmp_path / layout,
            layout=layout,
            model=model,
            read=arrays.__getitem__,
            template="plain",
            image_aspect_ratio="square",
        )
        back = open_model(tmp_path / layout)
        assert (back.template, back.image_aspect_ratio) == ("plain", "square")


def test_our_directory_is_plain_orbax_and_self_contained(llava_hf, tmp_path):
    import orbax.checkpoint as ocp

    source = dataclasses.replace(open_model(llava_hf), template="plain", image_aspect_ratio="square")
    write_model(tmp_path / "ours", source)
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == [
        "config.json",
        "set_aside.safetensors",
        "weights",
    ]
    fields = json.loads((tmp_path / "ours/config.json").read_text())
    assert (fields["format"], fields["version"]) == ("llava_jax", 1)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "ours/weights")
    assert sorted(restored) == sorted(source.names())
    for name in source.names():
        np.testing.assert_array_equal(restored[name], source.read(name))
    back = open_model(tmp_path / "ours")
    assert (back.template, back.image_aspect_ratio, back.config) == ("plain", "square", source.config)
    aside = back.set_aside()
    for name, tensor in source.set_aside().items():
        np.testing.assert_array_equal(aside[name], tensor)


def test_clip_files_of_either_kind_give_the_same_tower(llava_hf, tmp_path):
    alone = save_clip(tmp_path / "alone", llava_hf)
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    full = CLIPModel(CLIPConfig(vision_config=VISION, text_config=text, projection_dim=8))
    full.vision_model.load_state_dict(CLIPVisionModel.from_pretrained(alone).state_dict())
    full.save_pretrained(tmp_path / "full")
    names = load_file(tmp_path / "full/model.safetensors").keys()
    assert {"logit_scale", "text_projection.weight", "vision_model.pre_layrnorm.weight"} <= names
    towers = [open_model(tmp_path / name) for name in ("alone", "full")]
    assert [tower.layout for tower in towers] == ["clip", "clip"]
    assert towers[0].config == towers[1].config == VisionConfig(**VISION)
    assert_same_leaves(*towers)
    assert towers[0].shape("vision_tower.layers.layer_norm1.scale") == (4, 16)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "tied"])
def test_decoders_are_read_alone(kind, tmp_path):
    decoder = {
        "llama": LlamaForCausalLM(DECODERS["gqa"]),
        "qwen2": Qwen2ForCausalLM(DECODERS["qwen2"]),
        "tied": LlamaForCausalLM(DECODERS["tied"]),
    }[kind]
    state = randomized(decoder).state_dict()
    decoder.save_pretrained(tmp_path / "llm")
    source = open_model(tmp_path / "llm")
    assert source.layout == "llama"
    np.testing.assert_array_equal(
        source.read("language_model.layers.mlp.down_proj.kernel"),
        np.stack([state[f"model.layers.{i}.mlp.down_proj.weight"].numpy().T for i in range(2)]),
    )
    assert source.read("language_model.embed_tokens.embedding").shape == (99, 24)
    assert ("language_model.lm_head.kernel" in source.names()) == (kind != "tied")
    assert ("language_model.layers.self_attn.q_proj.bias" in source.names()) == (kind == "qwen2")


def test_a_tied_head_that_was_saved_must_be_a_copy(tmp_path):
    randomized(LlamaForCausalLM(DECODERS["tied"])).save_pretrained(tmp_path / "llm")
    embedding = load_file(tmp_path / "llm/model.safetensors")["model.embed_tokens.weight"]
    copied = copy_with(
        tmp_path / "llm", tmp_path / "copy", lambda t: t | {"lm_head.weight": embedding.clone()}
    )
    assert_same_leaves(open_model(copied), open_model(tmp_path / "llm"))
    for name, head in (("other", embedding + 1), ("longer", torch.cat([embedding, embedding]))):
        other = copy_with(
            tmp_path / "llm", tmp_path / name, lambda t, head=head: t | {"lm_head.weight": head}
        )
        with pytest.raises(ConversionError, match=r"lm_head\.weight and .*embed_tokens\.weight differ"):
            open_model(other)


def test_an_original_without_its_tower_finds_it_beside_or_is_told(llava_hf, tmp_path):
    original = as_original(llava_hf, tmp_path / "llava", tower=False)
    with pytest.raises(ConversionError, match=r"mm_vision_tower='clip'.*--vision-tower=DIR"):
        open_model(original)
    elsewhere = save_clip(tmp_path / "elsewhere/any", llava_hf)
    expected = open_model(llava_hf)
    assert_same_leaves(open_model(original, vision_tower=elsewhere), expected)
    save_clip(tmp_path / "clip", llava_hf)
    source = open_model(original)
    assert_same_leaves(source, expected)
    assert source.config == dataclasses.replace(
        expected.config, text=dataclasses.replace(expected.config.text, vocab_size=90)
    )
    aside = source.set_aside()
    assert len(aside) == 18
    np.testing.assert_array_equal(
        aside["vision_tower.post_layernorm.bias"], expected.set_aside()["vision_tower.post_layernorm.bias"]
    )


def test_a_tower_inside_the_checkpoint_wins(llava_hf, tmp_path):
    original = as_original(llava_hf, tmp_path / "llava", tower=True)
    randomized(CLIPVisionModel(CLIPVisionConfig(**VISION))).save_pretrained(tmp_path / "clip")
    assert_same_leaves(open_model(original), open_model(llava_hf))


def test_projectors_are_read_alone(llava_hf, tmp_path):
    expected = open_model(llava_hf)
    tensors = load_file(llava_hf / "model.safetensors")
    pairs = [("model.mm_projector.0", "linear_1"), ("model.mm_projector.2", "linear_2")]
    file = tmp_path / "mm_projector.safetensors"
    projector = {
        f"{theirs}.{end}": tensors[f"multi_modal_projector.{ours}.{end}"]
        for theirs, ours in pairs
        for end in ("weight", "bias")
    }
    save_file(projector, file)
    write_model(tmp_path / "ours", expected)
    no_tower = as_original(llava_hf, tmp_path / "llava", tower=False)
    for path in (file, llava_hf, tmp_path / "ours", no_tower):
        source = open_projector(path)
        assert source.layout == "projector"
        assert len(source.names()) == 4
        for name in source.names():
            np.testing.assert_array_equal(source.read(name), expected.read(name))
    assert open_model(file).layout == "projector"
    with pytest.raises(ConversionError, match="holds no projector"):
        open_projector(save_clip(tmp_path / "clip", llava_hf))


def test_parts_make_a_model_that_starts_stage_one(llava_hf, tmp_path):
    clip = save_clip(tmp_path / "clip", llava_hf)
    randomized(LlamaForCausalLM(DECODERS["gqa"])).save_pretrained(tmp_path / "llm")
    parts = open_parts(ModelConfig(), vision_tower=clip, language_model=tmp_path / "llm")
    assert parts.layout == "parts"
    assert parts.config.vision == VisionConfig(**VISION)
    assert parts.config.text == open_model(tmp_path / "llm").config
    assert parts.shape("vision_tower.layers.layer_norm1.scale") == (3, 16)
    assert len(parts.set_aside()) == 18
    whole = complete(parts, seed=1)
    write_model(tmp_path / "ours", whole)
    assert_same_leaves(open_model(tmp_path / "ours"), whole)
    with pytest.raises(ConversionError, match=r"should be a CLIP or SigLIP tower of its own.*llama"):
        open_parts(ModelConfig(), vision_tower=tmp_path / "llm")


def test_a_new_projector_is_drawn_like_torch_draws_a_linear():
    model, _ = random_source()
    parts = ModelSource("parts", model, leaves={})
    first, again, other = (complete(parts, seed).leaves for seed in (0, 0, 1))
    for name, inputs in (("linear_1", 16), ("linear_2", 24)):
        for kind in ("kernel", "bias"):
            leaf = f"multi_modal_projector.{name}.{kind}"
            values = first[leaf].read()
            assert values.dtype == np.float32 and values.shape == first[leaf].shape
            assert 0.8 * inputs**-0.5 < np.abs(values).max() <= inputs**-0.5
            np.testing.assert_array_equal(values, again[leaf].read())
            assert not np.array_equal(values, other[leaf].read())


needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden sets are not here")


@needs_golden
def test_golden_models_of_both_layouts_agree():
    models = GOLDEN / "D_model"
    original, hf = open_model(models / "llava_gqa_mlp_patch"), open_model(models / "llava_gqa_mlp_patch_hf")
    assert (original.layout, hf.layout) == ("llava", "llava-hf")
    assert original.config == hf.config
    assert_same_leaves(original, hf)


def test_an_original_with_a_linear_projector_comes_back(tmp_path):
    """The original's own checkpoint, beside the tower that its config.json names."""
    for name in ("clip_tiny", "llava_mha_linear_clspatch"):
        (tmp_path / name).mkdir()
        stored = ROOT / "tests/data/D_model" / name
        shutil.copy(stored / "config.json", tmp_path / name)
        tensors = lzma.decompress((stored / "model.safetensors.xz").read_bytes())
        (tmp_path / name / "model.safetensors").write_bytes(tensors)
    source = open_model(tmp_path / "llava_mha_linear_clspatch")
    assert (source.config.projector_type, source.config.select_feature) == ("linear", "cls_patch")
    assert source.config.text.rms_norm_eps == 1e-6
    back = load_numpy(export(source, tmp_path / "back", "llava") / "model.safetensors")
    for name, tensor in load_numpy(tmp_path / "llava_mha_linear_clspatch/model.safetensors").items():
        np.testing.assert_array_equal(back[name], tensor)


@needs_golden
def test_golden_models_come_back(tmp_path):
    models = GOLDEN / "D_model"
    hf = export(open_model(models / "llava_gqa_mlp_patch_hf"), tmp_path / "hf", "llava-hf")
    loaded = [
        LlavaForConditionalGeneration.from_pretrained(path)
        for path in (models / "llava_gqa_mlp_patch_hf", hf)
    ]
    states = [model.state_dict() for model in loaded]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@needs_golden
def test_the_golden_decoder_opens_from_its_files(tmp_path):
    base = GOLDEN / "E_train/base/llama_tiny"
    (tmp_path / "model.safetensors").write_bytes(
        lzma.decompress((base / "model.safetensors.xz").read_bytes())
    )
    shutil.copy(base / "config.json", tmp_path / "config.json")
    parts = open_parts(ModelConfig(), vision_tower=base.parent / "clip_tiny", language_model=tmp_path)
    assert parts.config.text.vocab_size == 32000
    assert parts.shape("language_model.embed_tokens.embedding") == (32000, 64)


def test_torch_is_not_needed_to_convert():
    """Nor is anything slow imported before it is used."""
    code = (
        "import sys; import llava_jax.convert.opening, llava_jax.convert.export, llava_jax.convert.ours;"
        "import llava_jax.convert.comparison, llava_jax.convert.description;"
        "print(sorted({'torch', 'transformers', 'orbax', 'jax'} & sys.modules.keys()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert result.stdout.strip() == "[]"
