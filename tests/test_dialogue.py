"""Conversations of several turns: prompts as in training, kept keys and values, text as it comes."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from llava_jax import decoding, dialogue
from llava_jax.config import ConfigError, MeshConfig
from llava_jax.convert.source import ModelSource
from llava_jax.data.conversation import IGNORE, IMAGE_TOKEN, expand_images, tokenize
from llava_jax.data.image_processor import ImageLayout, ImageProcessor
from llava_jax.data.templates import get_template
from llava_jax.data.tokenizer import load_tokenizer
from llava_jax.decoding import GREEDY
from llava_jax.dialogue import Dialogue, _certain
from llava_jax.errors import DataError
from llava_jax.generation import Generator, open_generator
from llava_jax.sharding import make_mesh
from llava_jax.weights import complete
from tests.tiny_tokenizer import write_tiny_tokenizer


@pytest.fixture
def mute(tiny_config):
    """A generator without a network, for a template."""

    def make(template: str, tokenizer_path=tiny_config.init.tokenizer) -> Generator:
        processor = ImageProcessor(tiny_config.model, aspect_ratio="pad")
        tokenizer = load_tokenizer(str(tokenizer_path))
        return Generator(None, {}, tokenizer, None, template=template, image_processor=processor)

    return make


def pictures(config, count=1) -> tuple[list[np.ndarray], list[ImageLayout]]:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 1, 32, 32, 3), np.uint8)
    layout = ImageLayout(1, np.arange(config.num_image_tokens, dtype=np.int32))
    return list(pixels), [layout] * count


@pytest.mark.parametrize("template", ["v1", "v1_mmtag", "llava_v0", "llama_2", "mpt"])
@pytest.mark.parametrize(("num_images", "system"), [(0, None), (1, "Be brief."), (2, "")])
def test_a_prompt_is_what_training_writes_up_to_the_answer(mute, tmp_path, template, num_images, system):
    generator = mute(template, write_tiny_tokenizer(tmp_path / "tokenizer.model"))
    talk = Dialogue(generator, *pictures(generator.config, num_images), max_new_tokens=3, system=system)
    talk.turns = [("human", "<image>\n" * num_images + "What is this?"), ("gpt", "A cat"), ("human", "No")]
    talk.turns += [("gpt", "Yes the mat")]
    whole = tokenize(
        [*talk.turns, ("human", "What dog?"), ("gpt", "the dog")],
        get_template(template),
        generator.tokenizer,
        num_images=num_images,
        mask="last_answer",
        system=system,
    )
    whole = expand_images(whole, [generator.config.num_image_tokens] * num_images)
    tokens, feature_ids = talk.prompt("What dog?")
    np.testing.assert_array_equal(tokens, whole.tokens[: np.argmax(whole.labels != IGNORE)])
    features = np.arange(num_images * generator.config.num_image_tokens)
    np.testing.assert_array_equal(feature_ids[tokens == IMAGE_TOKEN], features)


@pytest.mark.parametrize("num_devices", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_answers_of_every_turn_are_those_to_the_whole_prompt(tiny_config, monkeypatch, num_devices):
    source = complete(ModelSource("parts", tiny_config.model, {}), seed=0)
    mesh = make_mesh(MeshConfig(), jax.devices()[:num_devices])
    tokenizer = load_tokenizer(tiny_config.init.tokenizer)
    generator = open_generator(source, tokenizer, mesh, template="v1", dtype="float32")
    passes, read_prompts = [], decoding.read_prompts
    monkeypatch.setattr(
        dialogue,
        "read_prompts",
        lambda *of, **how: passes.append(how["num_slots"]) or read_prompts(*of, **how),
    )
    images, layouts = pictures(generator.config)
    how = dict(max_new_tokens=19, sampling=GREEDY._replace(repetition_penalty=1.2))
    talk = Dialogue(generator, images, layouts, system="", **how)
    talk.begin()
    compiled = decoding.continue_some._cache_size() + decoding.read_on._cache_size()
    for question in ("What color is the ring?", "Where?"):
        prompt, _ = talk.prompt(question)
        begin, *_, end = np.flatnonzero(prompt == IMAGE_TOKEN)
        (expected,) = generator.complete([np.delete(prompt, range(begin, end))], [[images[0][0]]], **how)
        pieces = list(talk.ask(question))
        assert "".join(pieces) == expected == talk.turns[-1][1]
        assert len(pieces) > 1
    assert passes == [128]  # the second turn was read on, as far as its tokens were not those just made
    assert decoding.continue_some._cache_size() + decoding.read_on._cache_size() == compiled + 2

    first = talk.turns[1][1]
    talk.clear()
    assert "".join(talk.ask("What color is the ring?")) == first
    assert len(talk.turns) == 2 and passes == [128]  # the image is known as well
    list(talk.ask("And now? " * 12))
    assert passes == [128, 256]  # there was no room
    talk.clear()
    list(talk.ask("And now? " * 20))
    assert passes == [128, 256, 256]  # there was, but so many tokens are sooner read in one pass

    before = list(talk.turns)
    with pytest.raises(DataError, match="the conversation has 2 <image> for 1 images"):
        list(talk.ask("And this <image>?"))
    with pytest.raises(ConfigError, match="leaves no room for an answer in the model's 256 positions"):
        list(talk.ask("What? " * 200))
    assert talk.turns == before


def scripted(monkeypatch, tokens: list[int], size: int) -> list[int]:
    """Lets a network say these tokens, `size` at a time. -> how many are asked for each time."""
    limits = []

    def continue_some(parameters, rows, key, sampling, limit, **how):
        limits.append(int(limit))
        end = rows.num_new + min(size, int(limit))
        piece = tokens[rows.num_new : end]
        return np.array([piece + [2] * (size - len(piece))]), SimpleNamespace(num_new=end, num_slots=0)

    monkeypatch.setattr(dialogue, "continue_some", continue_some)
    monkeypatch.setattr(dialogue, "read_prompts", lambda *of, **how: SimpleNamespace(num_new=0, num_slots=0))
    monkeypatch.setattr(dialogue, "replicated", lambda mesh: None)
    return limits


def test_text_is_told_once_it_cannot_change_and_ends_where_the_turn_does(mute, monkeypatch):
    generator = mute("llava_v0")
    said = "caf\u00e9 \U0001f600\n# no end\n### Human: What"
    limits = scripted(monkeypatch, generator.tokenizer.encode(said), size=1)
    talk = Dialogue(generator, [], [], max_new_tokens=60)
    pieces = list(talk.ask("What?"))
    assert "".join(pieces) == "caf\u00e9 \U0001f600\n# no end" == talk.turns[-1][1]
    assert not [piece for piece in pieces if "\ufffd" in piece] and len(pieces) > 5
    assert limits[-1] > 20


def test_an_answer_ends_with_its_token_or_at_the_limit(mute, monkeypatch):
    generator = mute("v1")
    tokens, end = generator.tokenizer.encode("red red"), generator.tokenizer.eos_id
    limits = scripted(monkeypatch, [*tokens, end, *tokens], size=4)
    talk = Dialogue(generator, [], [], max_new_tokens=60)
    assert "".join(talk.ask("What?")) == "red red" and limits == [60]
    limits = scripted(monkeypatch, tokens * 9, size=4)
    talk = Dialogue(generator, [], [], max_new_tokens=6)
    assert "".join(talk.ask("What?")) == generator.tokenizer.decode((tokens * 9)[:6]) and limits == [6, 2]


def test_a_placeholder_in_an_answer_does_not_end_the_conversation(mute, monkeypatch):
    generator = mute("v1")
    end = generator.tokenizer.eos_id
    images, layouts = pictures(generator.config)
    for its_images, its_layouts in (([], []), (images, layouts)):
        scripted(monkeypatch, [*generator.tokenizer.encode("a <image> tag"), end], size=4)
        talk = Dialogue(generator, its_images, its_layouts, max_new_tokens=60)
        for question in ("What?", "And then?"):
            assert "".join(talk.ask(question)) == "a <image> tag"


def test_captions_are_no_conversations(mute):
    with pytest.raises(ConfigError, match="template writes captions"):
        Dialogue(mute("plain"), [], [], max_new_tokens=2)


@pytest.mark.parametrize(
    ("text", "end", "certain"),
    [
        ("A ring.", "</s>", "A ring."),
        ("A ring <", "</s>", "A ring"),
        ("a < b", "</s>", "a < b"),
        ("A ring.\n##", "\n###", "A ring."),
        ("caf\ufffd", "</s>", "caf"),
        ("", "", ""),
    ],
)
def test_what_may_become_something_else_is_held_back(text, end, certain):
    assert _certain(text, end) == certain
