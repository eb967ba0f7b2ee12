"""Every layout that is read gives the logits of transformers, and says what of its tensors does not fit."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration, Qwen2ForCausalLM

from llava_jax.config import ModelConfig, VisionConfig
from llava_jax.convert.adapters import open_adapter
from llava_jax.convert.description import describe
from llava_jax.convert.errors import ConversionError
from llava_jax.convert.logits import compare_logits, drawn_picture, run_prompt
from llava_jax.convert.opening import open_model, open_parts, open_projector, read_model
from llava_jax.convert.ours import write_model
from llava_jax.models.vit import normalize
from tests.tiny_models import (
    DECODERS,
    SIZES,
    VISION,
    as_original,
    copy_with,
    edit_config,
    export,
    save_clip,
    save_llava,
)

DECODER_KINDS = {
    "grouped": DECODERS["gqa"],
    "grouped, tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "one key per query": LlamaConfig(**SIZES | {"num_key_value_heads": 4}),
    "one key per query, tied": LlamaConfig(**SIZES | {"num_key_value_heads": 4}, tie_word_embeddings=True),
}
PROMPT = np.array([1, 5, -200, 8, 89, 30, 2], np.int32)


@pytest.fixture(scope="module", params=DECODER_KINDS)
def llava_hf(request, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "llava_hf"
    return save_llava(directory, text_config=DECODER_KINDS[request.param])


@pytest.fixture(scope="module")
def expected(llava_hf) -> np.ndarray:
    return logits_of(
        LlavaForConditionalGeneration.from_pretrained(llava_hf, attn_implementation="eager").eval()
    )


def logits_of(model: LlavaForConditionalGeneration) -> np.ndarray:
    """transformers' logits of the prompt, float32[T, 90]."""
    ids = np.insert(np.where(PROMPT == -200, 90, PROMPT), [2] * 15, 90)
    pixels = np.array(normalize(drawn_picture(28, 28)[None], VisionConfig()))
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor(ids)[None].long(), pixel_values=torch.tensor(pixels).permute(0, 3, 1, 2)
        ).logits
    return logits[0, :, :90].numpy()


def tensors_of(llava_hf: Path) -> dict[str, torch.Tensor]:
    """By their oldest names, in which a tower has an inner `vision_model`."""
    tensors = load_file(llava_hf / "model.safetensors")
    return {
        re.sub(r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.", k): v
        for k, v in tensors.items()
    }


def named_in_time(change):
    """A llava-hf file with every name changed."""

    def save(llava_hf: Path, directory: Path) -> Path:
        tensors = {change(name): tensor for name, tensor in tensors_of(llava_hf).items()}
        return copy_with(llava_hf, directory, lambda _: tensors)

    return save


def dumped(name: str) -> str:
    name = name.replace("language_model.model.", "model.language_model.")
    name = name.replace("language_model.lm_head.", "lm_head.")
    return re.sub(r"^(vision_tower|multi_modal_projector)\.", r"model.\1.", name)


def original(llava_hf: Path, directory: Path) -> Path:
    return as_original(llava_hf, directory, tower=True, vision_config=VISION)


def original_beside_its_tower(llava_hf: Path, directory: Path) -> Path:
    directory.parent.mkdir(exist_ok=True)
    save_clip(directory.parent / "clip", llava_hf)
    return as_original(llava_hf, directory, tower=False)


def tinyllava_fields(llava_hf: Path) -> dict:
    fields = json.loads((llava_hf / "config.json").read_text())
    return {
        "architectures": ["TinyLlavaForConditionalGeneration"],
        "model_type": "tinyllava",
        "connector_type": "mlp2x_gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "patch",
        "image_aspect_ratio": "square",
        "text_config": fields["text_config"],
        "vision_config": fields["vision_config"],
    }


def tinyllava(llava_hf: Path, directory: Path) -> Path:
    directory.mkdir()
    tensors = {}
    for name, tensor in tensors_of(llava_hf).items():
        name = name.replace("vision_tower.", "vision_tower._vision_tower.")
        name = name.replace("multi_modal_projector.linear_1", "connector._connector.0")
        name = name.replace("multi_modal_projector.linear_2", "connector._connector.2")
        tensors[name] = tensor
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(tinyllava_fields(llava_hf)))
    return directory


def components(llava_hf: Path, directory: Path, wrapped: str = "") -> Path:
    """As TinyLLaVA Factory's training leaves them; `wrapped`: the layer kind that LoRA had wrapped."""
    parts = {"language_model": {}, "vision_tower": {}, "connector": {}}
    for name, tensor in tensors_of(llava_hf).items():
        if wrapped and f".{wrapped}.weight" in name:
            name = name.replace(".weight", ".base_layer.weight")
        if name.startswith("multi_modal_projector."):
            number = 2 * int(name.split(".")[1][-1]) - 2
            parts["connector"][f"_connector.{number}.{name.split('.')[2]}"] = tensor
        else:
            part, _, inner = name.partition(".")
            parts[part][inner] = tensor
    fields = tinyllava_fields(llava_hf)
    for part, tensors in parts.items():
        (directory / part).mkdir(parents=True)
        save_file(tensors, directory / part / "model.safetensors")
        if part != "connector":
            key = {"language_model": "text_config", "vision_tower": "vision_config"}[part]
            (directory / part / "config.json").write_text(json.dumps(fields[key]))
    (directory / "config.json").write_text(json.dumps(fields))
    return directory


def ours(llava_hf: Path, directory: Path) -> Path:
    write_model(directory, open_model(llava_hf))
    return directory


LAYOUTS = {
    "transformers 4.36 to 4.51": ("llava-hf", named_in_time(lambda name: name)),
    "a state dict of 4.52": ("llava-hf", named_in_time(dumped)),
    "a state dict of 5": ("llava-hf", named_in_time(lambda n: dumped(n).replace("vision_model.", ""))),
    "saved by 5": ("llava-hf", lambda llava_hf, directory: llava_hf),
    "original": ("llava", original),
    "original beside its tower": ("llava", original_beside_its_tower),
    "tinyllava": ("tinyllava", tinyllava),
    "components": ("components", components),
    "components of a LoRA run": ("components", lambda *paths: components(*paths, wrapped="q_proj")),
    "ours": ("ours", ours),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_logits_of_transformers(layout, llava_hf, expected, tmp_path):
    name, save = LAYOUTS[layout]
    source = open_model(save(llava_hf, tmp_path / "a" if "beside" not in layout else tmp_path / "b/a"))
    assert source.layout == name
    logits = run_prompt(source, PROMPT)[:, :90]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("decoder", ["gqa", "tied", "qwen2"])
def test_assembled_parts_have_the_logits_of_transformers(decoder, tmp_path):
    """CLIP, a decoder and a projector, each saved alone by transformers' names."""
    whole = save_llava(tmp_path / "whole", decoder)
    model = LlavaForConditionalGeneration.from_pretrained(whole, attn_implementation="eager").eval()
    save_clip(tmp_path / "clip", whole)
    config = model.config.text_config
    llm = (Qwen2ForCausalLM if decoder == "qwen2" else LlamaForCausalLM)(config)
    llm.model.load_state_dict(model.model.language_model.state_dict())
    llm.lm_head.load_state_dict(model.lm_head.state_dict())
    llm.save_pretrained(tmp_path / "llm")
    projector = {
        f"model.mm_projector.{2 * i - 2}.{kind}": model.get_parameter(
            f"model.multi_modal_projector.linear_{i}.{kind}"
        ).detach()
        for i in (1, 2)
        for kind in ("weight", "bias")
    }
    save_file(projector, tmp_path / "mm_projector.safetensors")
    parts = open_parts(ModelConfig(), vision_tower=tmp_path / "clip", language_model=tmp_path / "llm")
    source = parts.with_leaves(open_projector(tmp_path / "mm_projector.safetensors").leaves)
    found = run_prompt(source, PROMPT)[:, :90]
    np.testing.assert_allclose(found, logits_of(model), rtol=0, atol=1e-5 * np.abs(found).max())


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return save_llava(tmp_path_factory.mktemp("models") / "llava_hf")


def test_a_connector_is_a_projector(plain, tmp_path):
    directory = components(plain, tmp_path / "parts")
    for path in (directory / "connector", tinyllava(plain, tmp_path / "whole")):
        source = open_projector(path)
        for name in source.names():
            np.testing.assert_array_equal(source.read(name), open_model(plain).read(name))


def test_components_keep_what_their_config_says(plain, tmp_path):
    directory = components(plain, tmp_path / "parts")
    edit_config(directory, vision_feature_select_strategy="cls_patch", image_aspect_ratio="pad")
    (directory / "tokenizer.model").write_bytes(b"x")
    source = open_model(directory)
    assert (source.config.select_feature, source.image_aspect_ratio) == ("cls_patch", "pad")
    assert source.tokenizer_path == str(directory)
    assert len([name for name in source.set_aside() if "layers.3" in name]) == 16
    (directory / "connector/model.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"connector holds no .*safetensors"):
        open_model(directory)


def test_connectors_that_are_not_built_are_refused(plain, tmp_path):
    directory = tinyllava(plain, tmp_path / "whole")
    edit_config(directory, connector_type="resampler")
    with pytest.raises(ConversionError, match=r"config\.json.*projector_type='resampler'"):
        open_model(directory)


def test_a_misfit_is_described_and_not_raised(plain, tmp_path):
    def damage(tensors):
        del tensors["multi_modal_projector.linear_2.bias"]
        tensors["language_model.model.norm.weight"] = torch.zeros(7)
        tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(5)
        return tensors | {"vision_tower.extra.weight": torch.zeros(2)}

    damaged = copy_with(plain, tmp_path / "damaged", damage)
    found = describe(read_model(damaged))
    assert found.missing == ["multi_modal_projector.linear_2.bias"]
    assert found.unexpected == ["vision_tower.extra.weight"]
    assert found.misshaped == ["language_model.model.norm.weight [7] instead of [24]"]
    assert found.ignorable == ["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert found.arrays["multi_modal_projector.linear_2.bias"].dtype == "missing"
    with pytest.raises(ConversionError, match=r"1 tensors are missing.*1 tensors are unexpected"):
        open_model(damaged)


def test_a_description_counts_every_parameter_and_byte(plain, tmp_path):
    found = describe(read_model(plain))
    tensors = load_file(plain / "model.safetensors")
    count = sum(found.num_parameters().values()) + sum(array.size for array in found.set_aside.values())
    assert count == sum(tensor.numel() for tensor in tensors.values())
    assert found.num_bytes() == {"float32": sum(tensor.nbytes for tensor in tensors.values())}
    opened = describe(open_model(plain))
    assert (opened.arrays, opened.set_aside) == (found.arrays, found.set_aside)
    write_model(tmp_path / "ours", open_model(plain))
    assert describe(open_model(tmp_path / "ours")).arrays == found.arrays


def test_a_released_original_is_described_without_its_tower(plain, tmp_path, monkeypatch):
    """Only the tower's name is there, and the published towers are known."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    name = "openai/clip-vit-large-patch14-336"
    directory = as_original(plain, tmp_path / "llava", tower=False, mm_vision_tower=name)
    found = describe(read_model(directory))
    assert found.config["vision"]["hidden_size"] == 1024
    assert "holds no CLIP tower" in found.lacks and found.as_text().endswith(found.lacks)
    assert found.missing == []
    assert len(found.misshaped) == 1 and "mm_projector.0.weight [24, 16]" in found.misshaped[0]
    with pytest.raises(ConversionError, match="holds no CLIP tower"):
        open_model(directory)


def test_a_tied_model_that_saved_its_head_is_described_without_reading(tmp_path, monkeypatch):
    saved = save_llava(tmp_path / "tied", "tied")
    embedding = load_file(saved / "model.safetensors")["language_model.model.embed_tokens.weight"]
    copied = copy_with(
        saved, tmp_path / "copy", lambda t: t | {"language_model.lm_head.weight": embedding + 1}
    )
    monkeypatch.setattr("llava_jax.convert.tensors.TensorFiles.read", None)
    assert describe(read_model(copied)).unexpected == []


def test_components_and_towers_elsewhere_are_listed(plain, tmp_path):
    directory = components(plain, tmp_path / "parts")
    assert describe(read_model(directory)).sources == [
        str(directory / part) for part in ("vision_tower", "language_model", "connector")
    ]
    assert describe(read_model(plain)).sources == []


def test_logits_find_a_change_that_is_small(plain, tmp_path):
    same = compare_logits(open_model(plain), open_model(export(open_model(plain), tmp_path / "o", "llava")))
    assert same.equal and same.maximum == 0

    def change(tensors):
        tensors["language_model.lm_head.weight"][17] += 0.01
        return tensors

    changed = compare_logits(open_model(plain), open_model(copy_with(plain, tmp_path / "c", change)))
    assert not changed.equal and changed.token == 17
    assert changed.num_positions == 25 - 1 + 16
    assert f"vocabulary id 17: {changed.values[0]:.6g}" in str(changed)


def test_logits_see_the_picture_and_the_tower(plain, tmp_path):
    def change(tensors):
        tensors["vision_tower.embeddings.patch_embedding.weight"][0, 0] += 0.05
        return tensors

    changed = compare_logits(open_model(plain), open_model(copy_with(plain, tmp_path / "c", change)))
    assert not changed.equal and changed.position >= 8


def test_models_that_cannot_be_asked_the_same_are_refused(plain, tmp_path):
    other = open_model(
        save_llava(tmp_path / "full", vision_feature_select_strategy="full", image_seq_length=17)
    )
    with pytest.raises(ConversionError, match="cannot be asked the same"):
        compare_logits(open_model(plain), other)
    LlamaForCausalLM(DECODERS["gqa"]).save_pretrained(tmp_path / "llm")
    with pytest.raises(ConversionError, match="layout llama"):
        compare_logits(open_model(plain), open_model(tmp_path / "llm"))


def test_a_directory_without_an_adapter_is_none(plain):
    with pytest.raises(ConversionError, match=r"no adapter_config\.json"):
        open_adapter(plain)
