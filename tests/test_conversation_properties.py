"""What holds for any conversation in any template, with old and new tokenizers."""

import dataclasses
import functools
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_jax.data.conversation import (
    IGNORE,
    IMAGE_TOKEN,
    PLACEHOLDER,
    expand_images,
    render,
    tokenize,
    truncate,
)
from llava_jax.data.templates import TEMPLATES
from llava_jax.data.tokenizer_model import SentencePieceTokenizer
from tests.tiny_tokenizer import write_tiny_tokenizer

MARKS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|endoftext|>",
)
SYSTEM = "the mat:"
CHATS = sorted(set(TEMPLATES) - {"plain", "v0_plain"})
# Users and assistants have letters of their own, so that a learnt token shows whose word it is. The templates
# themselves write neither.
USER_LETTERS, ASSISTANT_LETTERS = "QXZ\u00e9\u4e2d", "JVK\u00fc\u6587"

how = settings(max_examples=80, deadline=None)
chats = st.sampled_from(CHATS)
flags = st.booleans()


@functools.cache
def tokenizer(legacy: bool) -> SentencePieceTokenizer:
    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_tokenizer(Path(folder) / "tokenizer.model").read_bytes()
    return SentencePieceTokenizer("tokenizer.model", model, legacy=legacy, extra_tokens=MARKS)


def text(letters: str, **size):
    return st.text(st.sampled_from(letters + " \n"), max_size=9, **size)


@st.composite
def conversations(draw, with_images=False):
    """-> turns and the number of their images. The first question and one answer are not empty."""
    num_rounds = draw(st.integers(1, 4))
    turns, num_images = [], 0
    for index in range(num_rounds):
        question = draw(text(USER_LETTERS, min_size=index == 0))
        for _ in range(draw(st.integers(0, 2)) if with_images else 0):
            place = draw(st.integers(0, len(question)))
            if PLACEHOLDER not in question[max(place - 7, 0) : place + 7]:
                question = question[:place] + PLACEHOLDER + question[place:]
        answer = draw(text(ASSISTANT_LETTERS, min_size=index == num_rounds - 1))
        turns += [("human", question), ("gpt", answer)]
    if draw(flags):
        turns.append(("human", draw(text(USER_LETTERS))))
    num_images = sum(question.count(PLACEHOLDER) for _, question in turns)
    return turns, num_images


def encode(turns, name, legacy, **more):
    template = dataclasses.replace(TEMPLATES[name], system=SYSTEM)
    return tokenize(turns, template, tokenizer(legacy), **({"num_images": 0} | more))


def decoded(ids, legacy):
    return tokenizer(legacy).decode([id for id in ids if id != IMAGE_TOKEN], skip_special_tokens=False)


@how
@given(conversations(), chats, flags, st.sampled_from(["assistant", "last_answer"]))
def test_user_words_are_never_learnt(conversation, name, legacy, mask):
    encoded = encode(conversation[0], name, legacy, mask=mask)
    assert not set(decoded(encoded.labels[encoded.labels != IGNORE], legacy)) & set(USER_LETTERS)


@how
@given(conversations(), chats, flags)
def test_every_character_of_the_assistant_is_learnt_and_every_end(conversation, name, legacy):
    encoded = encode(conversation[0], name, legacy)
    learnt = decoded(encoded.labels[encoded.labels != IGNORE], legacy)
    answers = [answer for role, answer in conversation[0] if role == "gpt" and answer]
    said = "".join(answers)
    assert [letter for letter in learnt if letter in ASSISTANT_LETTERS] == [
        letter for letter in said if letter in ASSISTANT_LETTERS
    ]
    end = TEMPLATES[name].assistant.after.strip()
    assert not end or learnt.count(end) == len(answers)
    assert len(encoded.round_ends) == len(answers)
    for index in range(len(answers)):
        spoken = decoded(encoded.tokens[: encoded.round_ends[index]], legacy)
        assert [letter for letter in spoken if letter in ASSISTANT_LETTERS] == [
            letter for letter in "".join(answers[: index + 1]) if letter in ASSISTANT_LETTERS
        ]


@how
@given(conversations(), chats)
def test_tokens_spell_the_written_text(conversation, name):
    template = dataclasses.replace(TEMPLATES[name], system=SYSTEM)
    written = "".join(span.text for span in render(conversation[0], template, num_images=0))
    tokens = encode(conversation[0], name, False).tokens
    assert tokens[0] == 1
    assert tokenizer(False).decode(tokens[1:], skip_special_tokens=False) == written


@how
@given(conversations(), chats, flags, st.integers(1, 99))
def test_masks_change_labels_only(conversation, name, legacy, max_length):
    plain = encode(conversation[0], name, legacy)
    masks = ["last_answer", "everything"] + ["original"] * bool(TEMPLATES[name].original_mask)
    for mask in masks:
        other = encode(conversation[0], name, legacy, mask=mask, max_length=max_length)
        assert np.array_equal(other.tokens, plain.tokens)
        assert np.array_equal(other.round_ends, plain.round_ends)
        assert np.isin(other.labels, [IGNORE]).tolist() == (other.labels != other.tokens).tolist()
        if mask == "last_answer":
            assert ((other.labels == IGNORE) | (other.labels == plain.labels)).all()


@how
@given(conversations(with_images=True), chats, flags, st.data())
def test_images_stay_whole(conversation, name, legacy, data):
    turns, num_images = conversation
    if num_images == 1:  # several in one turn become one
        turns = [(role, words.replace(PLACEHOLDER, "")) for role, words in turns]
        turns[0] = ("human", PLACEHOLDER + turns[0][1])
    sizes = [data.draw(st.integers(1, 5)) for _ in range(num_images)]
    encoded = encode(turns, name, legacy, num_images=num_images)
    whole = expand_images(encoded, sizes)
    assert [end - begin for begin, end in whole.images] == sizes
    assert np.count_nonzero(whole.tokens == IMAGE_TOKEN) == sum(sizes)
    assert (
        whole.tokens[whole.tokens != IMAGE_TOKEN].tolist()
        == encoded.tokens[encoded.tokens != IMAGE_TOKEN].tolist()
    )
    assert whole.tokens[whole.round_ends - 1].tolist() == encoded.tokens[encoded.round_ends - 1].tolist()
    assert (whole.labels[whole.tokens == IMAGE_TOKEN] == IGNORE).all()

    max_length = data.draw(st.integers(1, len(whole.tokens) + 1))
    cut, kept = truncate(whole, max_length, whole_turns=data.draw(flags))
    length = len(cut.tokens)
    assert length <= max_length
    assert np.array_equal(cut.tokens, whole.tokens[:length])
    assert np.array_equal(cut.labels, whole.labels[:length])
    assert np.count_nonzero(cut.tokens == IMAGE_TOKEN) == sum(sizes[:kept])
    assert np.array_equal(cut.images, whole.images[:kept])
    assert np.array_equal(cut.round_ends, whole.round_ends[whole.round_ends <= length])


@pytest.mark.parametrize("name", CHATS)
def test_letters_of_the_tests_are_not_the_templates_own(name):
    template = TEMPLATES[name]
    own = str(dataclasses.replace(template, system=SYSTEM, original_mask=""))
    assert not set(own) & set(USER_LETTERS + ASSISTANT_LETTERS)
