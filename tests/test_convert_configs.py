"""Foreign config.json files mean what their own software takes them to mean."""

import dataclasses
import re
from pathlib import Path

import pytest
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from llava_jax.config import ModelConfig, RopeScaling, TextConfig, VisionConfig
from llava_jax.convert.component_configs import read_text_config, read_vision_config
from llava_jax.convert.errors import ConversionError
from llava_jax.convert.export import write_hf
from llava_jax.convert.model_configs import (
    ORIGINAL_TOKENS,
    read_llava_config,
    read_llava_hf_config,
    read_tinyllava_config,
    write_llava_config,
)
from llava_jax.convert.opening import open_model
from tests.tiny_models import SIZES, VISION, as_original, random_source, save_clip, save_llava


@pytest.fixture(scope="module")
def llava_hf(tmp_path_factory) -> Path:
    return save_llava(tmp_path_factory.mktemp("models") / "llava_hf")


def test_the_published_llava_hf_config_is_completed_with_defaults():
    fields = {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": 32000,
        "model_type": "llava",
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "text_config": {
            "_name_or_path": "lmsys/vicuna-7b-v1.5",
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "rms_norm_eps": 1e-05,
            "torch_dtype": "float16",
            "vocab_size": 32064,
        },
        "tie_word_embeddings": False,
        "vision_config": {
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "model_type": "clip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
            "vocab_size": 32000,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": 32064,
    }
    assert read_llava_hf_config(fields, "config.json", {}) == (ModelConfig(), 32064)


def test_the_published_original_config_is_read():
    fields = {
        "model_type": "llava",
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "vocab_size": 32000,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    }
    assert read_llava_config(fields, VisionConfig(), "config.json") == ModelConfig(
        text=TextConfig(
            hidden_size=5120,
            intermediate_size=13824,
            num_hidden_layers=40,
            num_attention_heads=40,
            num_key_value_heads=40,
        )
    )


def test_published_decoders_are_read():
    tiny = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "max_position_embeddings": 2048,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 22,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-05,
        "vocab_size": 32000,
    }
    assert read_text_config(tiny, "config.json") == TextConfig(
        32000, 2048, 5632, 22, 32, 4, 64, 2048, rms_norm_eps=1e-5
    )
    mistral = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "vocab_size": 32000,
    }
    assert read_text_config(mistral, "config.json") == TextConfig(
        32000, 4096, 14336, 32, 32, 8, 128, 32768, 1e-5, 1000000.0
    )


def test_a_tinyllava_config_is_read():
    fields = {
        "model_type": "tinyllava",
        "connector_type": "mlp2x_gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "cls_patch",
        "num_queries": 128,
    }
    model = read_tinyllava_config(fields, SIZES, {"model_type": "clip_vision_model"} | VISION, "config.json")
    assert model == ModelConfig(
        vision=VisionConfig(**VISION),
        text=TextConfig(99, 24, 28, 2, 4, 2, 6, 2048, 1e-6),
        select_feature="cls_patch",
    )
    with pytest.raises(ConversionError, match="dinov2"):
        read_tinyllava_config(fields, SIZES, {"model_type": "dinov2"}, "config.json")


@pytest.mark.parametrize(
    "fields, theta, scaling",
    [
        ({}, 10000.0, RopeScaling()),
        ({"rope_theta": 500000.0, "rope_scaling": None}, 500000.0, RopeScaling()),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 10000.0, RopeScaling("linear", 2.0)),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}, "rope_theta": 8.0},
            7.0,
            RopeScaling(),
        ),
        (
            {
                "rope_theta": 500000.0,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 4096,
                },
            },
            500000.0,
            RopeScaling("llama3", 8.0, 1.0, 4.0, 4096),
        ),
    ],
)
def test_rotary_settings_are_read_in_old_and_new_spelling(fields, theta, scaling, tmp_path):
    config = read_text_config(fields, "config.json")
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)
    model, arrays = random_source()
    text = dataclasses.replace(model.text, rope_theta=theta, rope_scaling=scaling)
    model = dataclasses.replace(model, text=text)
    write_hf(tmp_path / "hf", layout="llava-hf", model=model, read=arrays.__getitem__)
    assert open_model(tmp_path / "hf").config == model
    loaded = LlavaConfig.from_pretrained(tmp_path / "hf").text_config.rope_parameters
    assert (loaded["rope_theta"], loaded["rope_type"]) == (theta, scaling.rope_type)
    assert loaded.get("factor", 1.0) == scaling.factor


def test_defaults_are_those_of_transformers():
    for theirs in (LlamaConfig(), MistralConfig(), Qwen2Config()):
        config = read_text_config({"model_type": theirs.model_type}, "config.json")
        for key in SIZES | {"rms_norm_eps": 0}:
            assert getattr(config, key) == getattr(theirs, key), (theirs.model_type, key)
    assert (
        read_text_config({"model_type": "mistral"}, "config.json").max_position_embeddings == 4096
    )  # window
    for theirs, fields in (
        (CLIPVisionConfig(), {}),
        (SiglipVisionConfig(), {"model_type": "siglip_vision_model"}),
        (SiglipVisionConfig(), {"model_type": "siglip", "vision_config": {}}),
    ):
        for key, value in dataclasses.asdict(read_vision_config(fields, "config.json")).items():
            assert value == getattr(theirs, key)
    old = {"model_type": "clip", "vision_config": {}, "vision_config_dict": VISION}
    assert read_vision_config(old | {"vision_config": {"vision_config_dict": VISION}}, "x") == VisionConfig(
        **VISION
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vision_feature_layer": [-2, -5]}, "vision_feature_layer"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act='relu'"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias"),
        ({"text_config": {"model_type": "gemma"}}, "model_type='gemma'"),
        ({"text_config": {"hidden_act": "gelu"}}, "hidden_act='gelu'"),
        ({"text_config": {"mlp_bias": True}}, "mlp_bias"),
        ({"text_config": {"rope_scaling": {"type": "yarn", "factor": 2.0}}}, "rope_type='yarn'"),
        ({"text_config": {"rope_scaling": {"type": "linear", "beta_fast": 2.0}}}, "beta_fast"),
        ({"vision_config": {"model_type": "dinov2"}}, "only CLIP and SigLIP towers"),
        ({"vision_config": {"hidden_size": 15, "num_attention_heads": 2}}, "hidden_size=15"),
        ({"vision_feature_layer": -99}, "select_layer=-99"),
    ],
)
def test_what_llava_jax_does_not_build_is_refused_with_its_key(change, message):
    with pytest.raises(ConversionError, match=re.escape(message)):
        read_llava_hf_config(change, "config.json", {})


def test_originals_with_other_image_handling_are_refused(llava_hf, tmp_path):
    save_clip(tmp_path / "clip", llava_hf)
    for change, message in (
        ({"image_aspect_ratio": "anyres_max_9"}, "image_aspect_ratio='anyres_max_9'"),
        ({"image_grid_pinpoints": "(1x1),...,(6x6)"}, "image_grid_pinpoints"),
        ({"model_type": "llava_mpt"}, "llava_mpt"),
    ):
        directory = as_original(llava_hf, tmp_path / message, tower=False, **change)
        with pytest.raises(ConversionError, match=message):
            open_model(directory)


def test_an_original_with_tokens_around_images_keeps_them(llava_hf, tmp_path):
    save_clip(tmp_path / "clip", llava_hf)
    for fields, tokens in (
        ({"mm_use_im_start_end": True, "mm_use_im_patch_token": False}, ("<im_start>", "<im_end>")),
        (
            {"mm_use_im_start_end": True, "mm_use_im_patch_token": True},
            ("<im_patch>", "<im_start>", "<im_end>"),
        ),
        ({}, ()),  # on which the original's loader adds <im_patch> by itself
    ):
        directory = as_original(llava_hf, tmp_path / f"{len(tokens)}", tower=False, **fields)
        model = open_model(directory).config
        assert (model.extra_tokens, model.text.vocab_size) == (tokens, 90)
        written = write_llava_config(model, ORIGINAL_TOKENS, dtype="float32")
        assert written["mm_use_im_start_end"] == bool(tokens)
        assert written["mm_use_im_patch_token"] == (len(tokens) == 3)
