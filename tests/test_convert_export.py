"""What an export adds, and what transformers makes of it."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jinja2
import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    LlavaForConditionalGeneration,
)

from llava_jax.convert import source
from llava_jax.convert.errors import ConversionError
from llava_jax.convert.export import write_hf
from llava_jax.convert.names import model_rows, text_rows
from llava_jax.convert.opening import open_model
from llava_jax.convert.ours import write_model
from llava_jax.convert.source import Leaf
from llava_jax.data.conversation import tokenize
from llava_jax.data.templates import TEMPLATES
from llava_jax.data.tokenizer import load_tokenizer
from tests.tiny_models import GOLDEN, LLAMA_TOKENIZER, assert_same_leaves, export, random_source, save_llava


@pytest.fixture(scope="module")
def llava_hf(tmp_path_factory) -> Path:
    return save_llava(tmp_path_factory.mktemp("models") / "llava_hf")


def test_token_rows_are_added_as_means_and_cut_again(tmp_path):
    model, arrays = random_source()
    write_hf(tmp_path / "hf", layout="llava-hf", model=model, read=arrays.__getitem__)
    fields = json.loads((tmp_path / "hf/config.json").read_text())
    assert fields["text_config"]["vocab_size"] == 128  # 90 + 2, up to a multiple of 64
    assert (fields["image_token_index"], fields["pad_token_id"]) == (90, 91)
    tensors = load_numpy(tmp_path / "hf/model.safetensors")
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        mean = tensors[name][:90].mean(axis=0)
        np.testing.assert_allclose(tensors[name][90:], np.broadcast_to(mean, (38, 24)), atol=1e-6)
    np.testing.assert_array_equal(
        open_model(tmp_path / "hf").read("language_model.lm_head.kernel"),
        arrays["language_model.lm_head.kernel"],
    )


def test_token_rows_are_the_same_means_when_the_vocabulary_is_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "_PART_BYTES", 500)
    model, arrays = random_source()
    write_hf(tmp_path / "whole", layout="llava-hf", model=model, read=arrays.__getitem__)

    def read(name) -> Leaf:
        array = arrays[name]
        return Leaf(array.shape, array.dtype, lambda index=(): array[index], axis=0)

    assert len(read("language_model.lm_head.kernel").parts()) > 1
    write_hf(tmp_path / "parts", layout="llava-hf", model=model, read=read)
    whole, parts = (load_numpy(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    for name, tensor in whole.items():
        np.testing.assert_allclose(parts[name], tensor, rtol=1e-6, atol=1e-12, err_msg=name)
        np.testing.assert_array_equal(parts[name][:90], tensor[:90], err_msg=name)


def test_a_model_that_was_never_imported_gets_identity_layers(tmp_path):
    model, arrays = random_source()
    write_hf(tmp_path / "hf", layout="llava-hf", model=model, read=arrays.__getitem__)
    loaded, problems = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(problems.values())
    tower = loaded.model.vision_tower.eval()
    assert torch.equal(tower.post_layernorm.weight, torch.ones(16))
    states = tower(torch.rand(1, 3, 28, 28), output_hidden_states=True).hidden_states
    assert len(states) == 5
    assert torch.equal(states[-1], states[-2])


def test_export_rounds_like_torch_and_refuses_what_float16_cannot_hold(tmp_path):
    model, arrays = random_source()
    for dtype in ("bfloat16", "float16"):
        directory = tmp_path / dtype
        write_hf(directory, layout="llava", model=model, read=arrays.__getitem__, dtype=dtype)
        tensor = load_file(directory / "model.safetensors")["model.norm.weight"]
        expected = torch.from_numpy(arrays["language_model.norm.scale"]).to(getattr(torch, dtype))
        assert torch.equal(tensor, expected) and tensor.dtype == expected.dtype
    arrays["language_model.norm.scale"][3] = 70000.0
    with pytest.raises(ConversionError, match=r"language_model\.norm\.scale .*float16"):
        write_hf(tmp_path / "x", layout="llava", model=model, read=arrays.__getitem__, dtype="float16")
    assert not (tmp_path / "x").exists()


def test_large_models_are_sharded_with_an_index(llava_hf, tmp_path):
    source = open_model(llava_hf)
    directory = export(source, tmp_path / "hf", "llava-hf", max_shard_size=30_000)
    shards = sorted(directory.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    for shard in shards:
        assert sum(tensor.nbytes for tensor in load_numpy(shard).values()) <= 30_000
    assert_same_leaves(open_model(directory), source)
    before = LlavaForConditionalGeneration.from_pretrained(llava_hf).state_dict()
    after = LlavaForConditionalGeneration.from_pretrained(directory).state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_layouts_refuse_models_that_they_cannot_express(tmp_path):
    model, arrays = random_source(projector_type="linear")
    with pytest.raises(ConversionError, match=r"'linear'.*choose the layout llava"):
        write_hf(tmp_path / "x", layout="llava-hf", model=model, read=arrays.__getitem__)
    model, arrays = random_source()
    model = dataclasses.replace(model, text=dataclasses.replace(model.text, attention_bias="qkv"))
    with pytest.raises(ConversionError, match=r"Qwen2.*choose the layout llava-hf"):
        write_hf(tmp_path / "x", layout="llava", model=model, read=arrays.__getitem__)
    assert list(tmp_path.iterdir()) == []


SENTENCES = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "What is in the image?\nThere are 12 cats (3 of them black), and a dog!",
    "na\u00efve caf\u00e9 \u4e2d\u6587 \U0001f389",
    "x",
]


@pytest.fixture(scope="module")
def small_tokenizer(tmp_path_factory) -> Path:
    """A sentencepiece model with Llama's settings and few pieces."""
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "text").write_text("\n".join(SENTENCES * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "text"),
        model_prefix=str(directory / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        character_coverage=0.99,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return directory / "tokenizer.model"


def export_with_tokenizer(directory: Path, tokenizer: Path, side: int = 28, **changes):
    """-> the processor that transformers loads, and the number of the tokenizer's own pieces."""
    count = sentencepiece.SentencePieceProcessor(str(tokenizer)).get_piece_size()
    model, _ = random_source()
    model = dataclasses.replace(
        model,
        text=dataclasses.replace(model.text, vocab_size=count),
        vision=dataclasses.replace(model.vision, image_size=side),
    )
    zeros = {row.leaf: np.zeros(row.shape, np.float32) for row in model_rows(model)}
    fields = {"layout": "llava-hf", "model": model, "read": zeros.__getitem__}
    write_hf(directory, tokenizer_path=str(tokenizer), **fields | changes)
    return AutoProcessor.from_pretrained(directory), count


@pytest.mark.parametrize("which", ["small", "llama"])
def test_exported_token_ids_equal_sentencepiece(which, small_tokenizer, tmp_path):
    tokenizer = small_tokenizer if which == "small" else LLAMA_TOKENIZER
    if not tokenizer.exists():
        pytest.skip(f"{tokenizer} is not here")
    processor, count = export_with_tokenizer(tmp_path / "hf", tokenizer)
    reference = sentencepiece.SentencePieceProcessor(str(tokenizer))
    for text in SENTENCES:
        assert processor.tokenizer(text).input_ids == [1, *reference.encode(text)]
    assert processor.tokenizer.convert_tokens_to_ids(["<image>", "<pad>", "</s>"]) == [count, count + 1, 2]
    fields = json.loads((tmp_path / "hf/config.json").read_text())
    assert (fields["image_token_index"], fields["pad_token_id"]) == (count, count + 1)
    assert json.loads((tmp_path / "hf/generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": count + 1,
    }


def test_the_sentencepiece_model_stays_beside_with_its_legacy_flag(small_tokenizer, tmp_path):
    (tmp_path / "old").mkdir()
    shutil.copy(small_tokenizer, tmp_path / "old")
    (tmp_path / "old/tokenizer_config.json").write_text('{"legacy": true}')
    for tokenizer, legacy in ((small_tokenizer, False), (tmp_path / "old/tokenizer.model", True)):
        directory = tmp_path / str(legacy)
        export_with_tokenizer(directory, tokenizer)
        assert (directory / "tokenizer.model").read_bytes() == small_tokenizer.read_bytes()
        assert json.loads((directory / "tokenizer_config.json").read_text())["legacy"] is legacy


def test_the_chat_template_writes_the_training_prompt(small_tokenizer, tmp_path):
    processor, _ = export_with_tokenizer(tmp_path / "hf", small_tokenizer)
    question = {"role": "user", "content": [{"type": "text", "text": "What is it?"}, {"type": "image"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}
    more = {"role": "user", "content": "Sure?"}
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions."
    )
    assert processor.apply_chat_template([question, answer, more], add_generation_prompt=True) == (
        f"{system} USER: <image> \nWhat is it? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:"
    )
    own = {"role": "system", "content": "Be short."}
    assert processor.apply_chat_template([own, more]) == "Be short. USER: Sure? "
    assert not (tmp_path / "hf/chat_template.json").exists()


SETTINGS = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
}


@pytest.mark.parametrize(
    ("name", "legacy"), [("v1", False), ("v1", True), ("mistral_instruct", False), ("llama_2", False)]
)
def test_a_decoder_alone_chats_in_the_tokens_of_training(name, legacy, small_tokenizer, tmp_path):
    """As transformers and vLLM make them: what the chat template writes is tokenized without adding anything."""
    model, arrays = random_source()
    model = dataclasses.replace(model, text=dataclasses.replace(model.text, vocab_size=400))
    arrays |= {row.leaf: np.zeros(row.shape, np.float32) for row in text_rows(model.text)}
    path = str(tmp_path)
    shutil.copy(small_tokenizer, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(SETTINGS | {"legacy": legacy}))
    fields = {"read": arrays.__getitem__, "tokenizer_path": path, "template": name}
    write_hf(tmp_path / "hf", layout="llama", model=model, **fields)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    turns = [("human", "What is it?"), ("gpt", "A cat.")]
    roles = {"human": "user", "gpt": "assistant"}
    chat = [{"role": roles[role], "content": text} for role, text in turns]
    expected = tokenize(turns, TEMPLATES[name], load_tokenizer(path), num_images=0).tokens
    assert tokenizer.apply_chat_template(chat)["input_ids"] == expected.tolist()
    begun = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True)["input_ids"]
    assert begun == expected[: len(begun)].tolist() and begun[0] == 1 and begun.count(1) == 1
    picture = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]}]
    with pytest.raises(jinja2.TemplateError, match="sees no images"):
        tokenizer.apply_chat_template(picture)


@pytest.mark.parametrize("strategy, count", [("patch", 16), ("cls_patch", 17)])
def test_the_processor_makes_a_placeholder_per_feature(strategy, count, small_tokenizer, tmp_path):
    model, _ = random_source()
    pieces = sentencepiece.SentencePieceProcessor(str(small_tokenizer)).get_piece_size()
    model = dataclasses.replace(
        model, select_feature=strategy, text=dataclasses.replace(model.text, vocab_size=pieces)
    )
    processor, image = export_with_tokenizer(tmp_path / "hf", small_tokenizer, model=model)
    inputs = processor(images=[np.zeros((20, 30, 3), np.uint8)], text=["<image>"], return_tensors="np")
    assert (inputs["input_ids"] == image).sum() == count
    assert inputs["pixel_values"].shape == (1, 3, 28, 28)


def test_pad_and_square_are_reproduced(small_tokenizer, tmp_path):
    red = np.zeros((14, 28, 3), np.uint8)
    red[..., 0] = 255
    shapes = {}
    for ratio in ("pad", "square"):
        processor, _ = export_with_tokenizer(tmp_path / ratio, small_tokenizer, image_aspect_ratio=ratio)
        pixels = processor.image_processor(red, return_tensors="np").pixel_values[0]
        mean, std = (np.array(getattr(processor.image_processor, key)) for key in ("image_mean", "image_std"))
        shapes[ratio] = np.round((pixels.transpose(1, 2, 0) * std + mean) * 255).astype(int)
    assert (shapes["square"] == [255, 0, 0]).all()
    np.testing.assert_array_equal(shapes["pad"][0, 0], [122, 116, 104])
    np.testing.assert_array_equal(shapes["pad"][14, 14], [255, 0, 0])


def test_a_tokenizer_of_another_model_is_refused(small_tokenizer, tmp_path):
    model, arrays = random_source()
    with pytest.raises(ConversionError, match="more than the 90 of the model's vocabulary"):
        write_hf(
            tmp_path / "x",
            layout="llava-hf",
            model=model,
            read=arrays.__getitem__,
            tokenizer_path=str(small_tokenizer),
        )


def test_the_original_layout_and_ours_keep_the_tokenizer_as_it_is(small_tokenizer, tmp_path):
    model, _ = random_source()
    pieces = sentencepiece.SentencePieceProcessor(str(small_tokenizer)).get_piece_size()
    model = dataclasses.replace(model, text=dataclasses.replace(model.text, vocab_size=pieces))
    zeros = {row.leaf: np.zeros(row.shape, np.float32) for row in model_rows(model)}
    write_hf(
        tmp_path / "llava",
        layout="llava",
        model=model,
        read=zeros.__getitem__,
        tokenizer_path=str(small_tokenizer),
    )
    source = open_model(tmp_path / "llava")
    assert source.tokenizer_path == str(tmp_path / "llava")
    assert json.loads((tmp_path / "llava/tokenizer_config.json").read_text())["legacy"] is False
    write_model(tmp_path / "ours", source)
    for name in ("llava", "ours"):
        assert (tmp_path / name / "tokenizer.model").read_bytes() == small_tokenizer.read_bytes()
    assert open_model(tmp_path / "ours").tokenizer_path == str(tmp_path / "ours")


needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden sets are not here")


@needs_golden
@pytest.mark.skipif(not LLAMA_TOKENIZER.exists(), reason="Llama's tokenizer.model is not here")
def test_exported_chats_have_the_token_ids_that_the_original_trained_on(tmp_path):
    """Rounds of text with one image in front. Texts with runs of spaces or empty turns are left out."""
    processor, image = export_with_tokenizer(tmp_path / "hf", LLAMA_TOKENIZER)
    compared = 0
    for line in (GOLDEN / "A_tokenize/cases.jsonl").read_text().splitlines():
        case = json.loads(line)
        turns = case["conversations"]
        plain = case["kind"].startswith("real_") and case["template"] == "v1" and not case["legacy"]
        plain = plain and not case["mm_use_im_start_end"] and not case.get("extra_special_tokens")
        if not plain or len(case["input_ids"]) >= case["model_max_length"]:
            continue
        messages = []
        for turn in turns:
            text = turn["value"].replace("<image>", "")
            content = [{"type": "image"}] if text != turn["value"] else []
            content.append({"type": "text", "text": text.strip() if content else text})
            messages.append({"role": "user" if turn["from"] == "human" else "assistant", "content": content})
        if "  " in str(turns):
            continue
        ids = processor.tokenizer(processor.apply_chat_template(messages)).input_ids
        assert [-200 if id == image else id for id in ids] == case["input_ids"], case["id"]
        compared += 1
    assert compared > 10


@needs_golden
@pytest.mark.skipif(not LLAMA_TOKENIZER.exists(), reason="Llama's tokenizer.model is not here")
def test_exported_image_processor_has_the_pixels_that_the_original_trained_on(tmp_path):
    from PIL import Image

    processor, _ = export_with_tokenizer(tmp_path / "hf", LLAMA_TOKENIZER, side=336)
    folder = GOLDEN / "B_images"
    for name in ("waterview_jpg", "flower_320x213_jpg", "gray_png", "w1_h500_png"):
        expected = np.asarray(Image.open(folder / f"expected/{name}__pad_336.png"), np.float32) / 255
        settings = processor.image_processor
        expected = (expected - np.float32(settings.image_mean)) / np.float32(settings.image_std)
        file = folder / "inputs" / re.sub(r"_(jpg|png)$", r".\1", name)
        pixels = settings(Image.open(file).convert("RGB"), return_tensors="np").pixel_values[0]
        np.testing.assert_allclose(pixels.transpose(1, 2, 0), expected, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("bias", "tied", "kind"),
    [("none", False, "llama"), ("qkvo", True, "llama"), ("qkv", False, "qwen2")],
)
def test_a_decoder_alone_is_read_by_transformers_and_by_us(bias, tied, kind, tmp_path):
    model, _ = random_source()
    text = dataclasses.replace(model.text, attention_bias=bias, tie_word_embeddings=tied)
    if kind == "qwen2":  # whose heads share the width evenly
        text = dataclasses.replace(text, head_dim=6)
    model, arrays = random_source(text=text)
    write_hf(tmp_path / "hf", layout="llama", model=model, read=arrays.__getitem__, template="mpt")
    theirs, found = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert theirs.config.model_type == kind
    assert not (found["missing_keys"] or found["unexpected_keys"] or found["mismatched_keys"])
    head = "language_model.embed_tokens.embedding" if tied else "language_model.lm_head.kernel"
    weight = theirs.get_output_embeddings().weight.detach().numpy()
    assert np.array_equal(weight if tied else weight.T, arrays[head])
    again = open_model(tmp_path / "hf")
    assert again.config == text
    assert sorted(again.names()) == sorted(name for name in arrays if name.startswith("language_model."))
    assert all(np.array_equal(again.read(name), arrays[name]) for name in again.names())
