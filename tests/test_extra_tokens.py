"""<im_start>, <im_end> and <im_patch>: their rows, how they train, and what other software reads of them."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
import torch
from transformers import AutoProcessor, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llava_jax import trainer
from llava_jax.config import ConfigError, ModelConfig
from llava_jax.convert.errors import ConversionError
from llava_jax.convert.opening import open_model, open_parts
from llava_jax.convert.ours import write_model
from llava_jax.convert.projector_file import write_projector
from llava_jax.convert.source import Leaf
from llava_jax.convert.tokenizer_files import copy_tokenizer
from llava_jax.convert.vocabulary import EMBEDDING, with_mean_rows
from llava_jax.data.conversation import IMAGE_TOKEN, tokenize
from llava_jax.data.templates import TEMPLATES
from llava_jax.data.tokenizer import load_tokenizer
from llava_jax.errors import DataError
from llava_jax.generation import load_generator
from llava_jax.recipe import parse
from llava_jax.sharding import make_mesh
from llava_jax.weights import initial_weights, open_run
from tests.test_trainer import one_device  # noqa: F401 (a fixture)
from tests.tiny_models import export, random_source
from tests.tiny_recipe import get_config as tiny_recipe_of

HEAD = "language_model.lm_head.kernel"
MARKERS = ("<im_start>", "<im_end>")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_rows_are_those_of_the_original_and_of_transformers(dtype, tied, tmp_path):
    torch.manual_seed(0)
    sizes = dict(vocab_size=95, hidden_size=24, intermediate_size=28, num_attention_heads=4)
    config = LlamaConfig(**sizes, num_hidden_layers=1, tie_word_embeddings=tied)
    model = LlamaForCausalLM(config).to(dtype)
    for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
        weight.data.normal_(0.3)
    model.save_pretrained(tmp_path)
    small = open_parts(ModelConfig(), language_model=str(tmp_path))
    grown = with_mean_rows(small, 95, 98)
    model.resize_token_embeddings(98, mean_resizing=True)  # draws closely around the mean
    for name, weight in ((EMBEDDING, model.model.embed_tokens.weight), (HEAD, model.lm_head.weight)):
        if name == HEAD and tied:
            assert name not in grown.leaves
            continue
        found, weight = np.asarray(grown.read(name), np.float32), weight.detach()
        found = found if name == EMBEDDING else found.T
        assert np.array_equal(found[:95], weight[:95].float().numpy())
        original = weight[:-3].mean(dim=0, keepdim=True)  # initialize_vision_tokenizer in llava_arch.py
        np.testing.assert_allclose(
            found[95:], original.float().numpy().repeat(3, 0), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6
        )
        np.testing.assert_allclose(found[95:], weight[95:].float().numpy(), atol=1e-2)
    assert grown.config.text == dataclasses.replace(small.config.text, vocab_size=98)


def test_parts_of_grown_leaves_are_those_of_the_whole():
    model, arrays = random_source()
    source = dataclasses.replace(
        open_parts(model), config=model, leaves={name: leaf_of(array) for name, array in arrays.items()}
    )
    grown = with_mean_rows(source, 87, 93)  # three of them in place of rows that are there
    for name in (EMBEDDING, HEAD):
        whole, leaf = grown.read(name), grown.leaves[name]
        mean = arrays[name][:87].mean(axis=0) if name == EMBEDDING else arrays[name][:, :87].mean(axis=1)
        new = whole[87:] if name == EMBEDDING else whole[:, 87:].T
        assert new.shape == (6, 24)
        np.testing.assert_allclose(new, np.tile(mean, (6, 1)), rtol=1e-5)
        for part in (
            (slice(3, 20), slice(5, 9)),
            (slice(80, 92), slice(0, 24)),
            (slice(0, 24), slice(85, 93)),
        ):
            part = tuple(slice(p.start, min(p.stop, size)) for p, size in zip(part, whole.shape, strict=True))
            assert np.array_equal(leaf.part(part), whole[part])


def leaf_of(array) -> Leaf:
    return Leaf(array.shape, array.dtype, lambda index=(): array[index], axis=0)


def marked(shapes_dataset, tiny_model):
    """A first stage with <im_start> and <im_end>, as the original trains it: the projector and all embeddings."""
    recipe = tiny_recipe_of(shapes_dataset)
    recipe.init.update(model=tiny_model, tokenizer="")
    recipe.model.use_im_start_end = True
    recipe.model.text.vocab_size = 514
    recipe.tune.update(language_model="partial", language_model_modules="embed_tokens")
    recipe.optimizer.update(learning_rate=1e-2, warmup_ratio=0.0)
    recipe.train.max_steps = 1
    return recipe


@pytest.fixture
def marked_recipe(shapes_dataset, tiny_model):
    return marked(shapes_dataset, tiny_model)


@pytest.fixture(scope="module")
def run(shapes_dataset, tiny_model, tmp_path_factory) -> Path:
    """The run of such a stage."""
    recipe = marked(shapes_dataset, tiny_model)
    recipe.export.layout = "llava-hf"
    directory = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
        trainer.run(parse(recipe), directory)
    return directory


def test_a_first_stage_trains_the_new_embeddings_and_they_travel_with_the_model(
    marked_recipe, tiny_model, run, tmp_path
):
    before, after = initial_weights(parse(marked_recipe).first), open_run(run)
    old = open_model(tiny_model)
    assert np.array_equal(before.read(EMBEDDING)[:512], old.read(EMBEDDING))
    changed = {n for n in before.names() if not np.array_equal(before.read(n), after.read(n))}
    assert changed == {EMBEDDING} | {n for n in before.names() if n.startswith("multi_modal_projector")}
    moved = np.abs(after.read(EMBEDDING) - before.read(EMBEDDING)).max(axis=1)
    assert moved[512] > 1e-3 and moved[513] > 1e-3

    write_model(tmp_path / "ours", after)
    export(after, tmp_path / "llava", "llava")
    for name in (run / "export", "ours", "llava"):
        opened = open_model(tmp_path / name)
        assert (opened.config.use_im_start_end, opened.config.text.vocab_size) == (True, 514), name
        assert np.array_equal(opened.read(EMBEDDING), after.read(EMBEDDING)), name
        tokenizer = load_tokenizer(opened.tokenizer_path, opened.config.extra_tokens)
        assert [tokenizer.special_id(token) for token in MARKERS] == [512, 513], name
    answers = [
        load_generator(str(tmp_path / name), dtype="float32").answer(
            ["<image>\nWhat is this?"], [[np.full((32, 32, 3), 90, np.uint8)]], max_new_tokens=4
        )
        for name in (run, "llava")
    ]
    assert answers[0] == answers[1]
    generator, prompts = load_generator(str(run), dtype="float32"), []
    generator.generate = lambda its_prompts, images: prompts.extend(its_prompts) or [[]]
    generator.answer(["What is this?"], [[np.zeros((32, 32, 3), np.uint8)]])
    at = prompts[0].tolist().index(IMAGE_TOKEN)
    assert prompts[0][[at - 1, at + 1]].tolist() == [512, 513]


def test_exported_prompts_are_those_of_training(marked_recipe, tmp_path):
    weights = initial_weights(parse(marked_recipe).first)
    export(weights, tmp_path / "hf", "llava-hf")
    export(weights, tmp_path / "llava", "llava")
    tokenizer = load_tokenizer(weights.tokenizer_path, MARKERS)
    turns = [("human", "<image>\nWhat color?"), ("gpt", "red"), ("human", "Why?"), ("gpt", "It is.")]
    tokens = tokenize(turns, TEMPLATES["v1"], tokenizer, num_images=1, image_markers=True).tokens.tolist()
    at = tokens.index(IMAGE_TOKEN)
    assert (tokens[at - 1], tokens[at + 1]) == (512, 513)

    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What color?"}]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "It is."},
    ]
    text = processor.apply_chat_template(messages)
    ids = processor.tokenizer(text).input_ids
    placeholder = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert placeholder == 514
    assert [IMAGE_TOKEN if id == placeholder else id for id in ids] == tokens
    original = AutoTokenizer.from_pretrained(tmp_path / "llava", use_fast=False)
    assert original.convert_tokens_to_ids(list(MARKERS)) == [512, 513] and len(original) == 514


def test_the_next_stage_takes_the_embeddings_with_the_projector(marked_recipe, tiny_model, run, tmp_path):
    first = open_run(run)
    write_projector(tmp_path / "mm_projector.bin", first)
    write_model(tmp_path / "ours", first)
    saved = torch.load(tmp_path / "mm_projector.bin", weights_only=True)
    assert saved["model.embed_tokens.weight"].shape == (514, 32)
    saved["model.embed_tokens.weight"] = saved["model.embed_tokens.weight"][-2:].clone()
    torch.save(saved, tmp_path / "two_rows.bin")
    saved["model.embed_tokens.weight"] = torch.zeros(7, 32)
    torch.save(saved, tmp_path / "another.bin")
    marked_recipe.tune.update(language_model="full", language_model_modules="")
    old = open_model(tiny_model).read(EMBEDDING)
    for name in (run, "mm_projector.bin", "two_rows.bin", "ours"):
        marked_recipe.init.projector = str(tmp_path / name)
        found = initial_weights(parse(marked_recipe).first)
        assert np.array_equal(found.read(EMBEDDING)[:512], old), name
        assert np.array_equal(found.read(EMBEDDING)[512:], first.read(EMBEDDING)[512:]), name
        kernel = "multi_modal_projector.linear_1.kernel"
        assert np.array_equal(found.read(kernel), first.read(kernel)), name
    write_model(tmp_path / "unmarked", open_model(tiny_model))
    marked_recipe.init.projector = str(tmp_path / "unmarked")  # which has no rows for them
    found = initial_weights(parse(marked_recipe).first)
    np.testing.assert_allclose(found.read(EMBEDDING)[513], old.mean(axis=0), atol=1e-6)
    marked_recipe.init.projector = str(tmp_path / "another.bin")
    with pytest.raises(ConversionError, match=r"embed_tokens.weight of shape \[7, 32\].*has \[514, 32\]"):
        initial_weights(parse(marked_recipe).first)


def test_a_model_that_has_the_tokens_keeps_their_rows(marked_recipe, run):
    marked_recipe.init.model = str(run)
    found = initial_weights(parse(marked_recipe).first).read(EMBEDDING)
    assert np.array_equal(found, open_run(run).read(EMBEDDING))
    marked_recipe.model.use_im_start_end = False
    with pytest.raises(ConfigError, match=r"--config.model.use_im_start_end=True"):
        initial_weights(parse(marked_recipe).first)


def test_a_vocabulary_without_room_is_refused_with_the_size_that_it_needs(marked_recipe, tmp_path):
    marked_recipe.model.text.vocab_size = 512
    with pytest.raises(ConfigError, match=r"has 514 tokens.*--config.model.text.vocab_size=514 for new rows"):
        trainer.run(parse(marked_recipe), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    marked_recipe.model.text.vocab_size = 576  # room for more than there are is given
    found = initial_weights(parse(marked_recipe).first).read(EMBEDDING)
    assert found.shape == (576, 32) and np.array_equal(found[512], found[575])
    marked_recipe.model.update(use_im_start_end=False)  # but for no token at all it is a mistake
    with pytest.raises(ConfigError, match=r"text.vocab_size=512 \(config: 576\)"):
        initial_weights(parse(marked_recipe).first)


def test_a_tokenizer_with_more_tokens_than_its_decoder_gets_rows_for_them(
    marked_recipe, tiny_model, tmp_path
):
    vocabulary = Path(load_tokenizer(tiny_model).path).read_bytes()
    (tmp_path / "more").mkdir()
    (tmp_path / "more/tokenizer.model").write_bytes(vocabulary)
    # As the original's --version v0 leaves a tokenizer.
    added = {"[PAD]": 512, "<im_patch>": 513, "<im_start>": 514, "<im_end>": 515}
    (tmp_path / "more/added_tokens.json").write_text(json.dumps(added))
    marked_recipe.init.tokenizer = str(tmp_path / "more")
    marked_recipe.model.text.vocab_size = 516
    tokenizer = load_tokenizer(str(tmp_path / "more"), MARKERS)
    assert [tokenizer.special_id(token) for token in added] == [512, 513, 514, 515]
    found = initial_weights(parse(marked_recipe).first).read(EMBEDDING)
    np.testing.assert_allclose(found[512:], np.tile(found[:512].mean(axis=0), (4, 1)), atol=1e-6)
    (tmp_path / "more/added_tokens.json").write_text(json.dumps(added | {"<im_end>": 600}))
    with pytest.raises(DataError, match=r"gives <im_end> the id 600.*makes it 515"):
        load_tokenizer(str(tmp_path / "more"), MARKERS)


def test_copied_tokenizers_have_the_tokens_in_all_their_files(tiny_model, tmp_path):
    """Beside a tokenizer.model the <image> and <pad> of llava-hf, whose ids the new tokens take, are left out."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.model").write_bytes(Path(load_tokenizer(tiny_model).path).read_bytes())
    names = {"512": {"content": "<image>"}, "513": {"content": "<pad>"}, "2": {"content": "</s>"}}
    (source / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": names, "legacy": False})
    )
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "</s>": 1}, []))
    bpe.add_special_tokens(["</s>"])
    bpe.save(str(source / "tokenizer.json"))
    copies = tmp_path / "both", tmp_path / "json"
    for copy in copies:
        copy.mkdir()
    copy_tokenizer(str(source), copies[0], MARKERS)
    assert not (copies[0] / "tokenizer.json").exists()  # in which the ids would be 2 and 3
    assert json.loads((copies[0] / "added_tokens.json").read_text()) == {"<im_start>": 512, "<im_end>": 513}
    settings = json.loads((copies[0] / "tokenizer_config.json").read_text())
    assert {id: token["content"] for id, token in settings["added_tokens_decoder"].items()} == {
        "2": "</s>",
        "512": "<im_start>",
        "513": "<im_end>",
    }
    copy_tokenizer(str(source / "tokenizer.json"), copies[1], MARKERS)
    alone = tokenizers.Tokenizer.from_file(str(copies[1] / "tokenizer.json"))
    assert [alone.token_to_id(token) for token in MARKERS] == [2, 3]


def test_an_adapter_cannot_hold_new_rows(marked_recipe, tmp_path):
    marked_recipe.tune.update(language_model="lora", language_model_modules="")
    marked_recipe.lora.update(rank=2, alpha=4.0)
    marked_recipe.export.layout = "peft"
    with pytest.raises(ConfigError, match=r"<im_start>, <im_end>.*whose rows an adapter does not hold"):
        trainer.run(parse(marked_recipe), tmp_path / "run")
