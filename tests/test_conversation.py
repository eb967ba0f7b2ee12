"""Conversations as tokens and labels: learnt tokens are marked with a star."""

import numpy as np
import pytest

from llava_jax.data.conversation import (
    IGNORE,
    IMAGE_TOKEN,
    TEMPLATES,
    Speaker,
    Template,
    expand_images,
    get_template,
    render,
    render_prompt,
    tokenize,
    truncate,
)
from llava_jax.data.tokenizer import Tokenizer, load_tokenizer
from llava_jax.errors import DataError
from tests.tiny_tokenizer import pieces_of, write_tiny_tokenizer

# The v1 template without its long system text.
CHAT = Template("", Speaker("USER:", " ", " "), Speaker("ASSISTANT:", " ", "</s>"))
PLAIN = TEMPLATES["plain"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def tokenizer(path):
    return load_tokenizer(str(path))


def turns(*texts):
    return [("gpt" if index % 2 else "human", text) for index, text in enumerate(texts)]


def starred(tokenizer, tokens, labels):
    assert tokens.dtype == labels.dtype == np.int32
    words = pieces_of(tokenizer, tokens).split(" ")
    for token, label in zip(tokens, labels, strict=True):
        assert label in (IGNORE, token)
    return " ".join(
        word if label == IGNORE else "*" + word for word, label in zip(words, labels, strict=True)
    )


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["What is this?", "A cat"], "<s> _USER : _What _is _this ? _ASSISTANT : *_A *_cat *</s>"),
        (
            ["cat", "No", "dog", "Yes"],
            "<s> _USER : _cat _ASSISTANT : *_No *</s> USER : _dog _ASSISTANT : *_Yes *</s>",
        ),
        # A space that does not merge with the answer is learnt with it.
        (["cat", "\n"], "<s> _USER : _cat _ASSISTANT : *_ *<0x0A> *</s>"),
        (["cat", "cat</s>dog"], "<s> _USER : _cat _ASSISTANT : *_cat *</s> *dog *</s>"),
        (["cat", "<unk>"], "<s> _USER : _cat _ASSISTANT : *_ *<unk> *</s>"),
        # The user's words are not learnt even where they look like an answer.
        (["cat ASSISTANT: dog</s>", "No"], "<s> _USER : _cat _ASSISTANT : _dog </s> _ASSISTANT : *_No *</s>"),
        # Nothing was said in the first round.
        (["cat", "", "dog", "No"], "<s> _USER : _cat _ASSISTANT : USER : _dog _ASSISTANT : *_No *</s>"),
        (["", "No"], "<s> _USER : ASSISTANT : *_No *</s>"),
        # A question without an answer at the end.
        (["cat", "No", "dog"], "<s> _USER : _cat _ASSISTANT : *_No *</s> USER : _dog _"),
    ],
)
def test_only_what_the_assistant_says_is_learnt(tokenizer, texts, expected):
    tokens, labels = tokenize(turns(*texts), CHAT, tokenizer, num_images=0)
    assert starred(tokenizer, tokens, labels) == expected


def test_legacy_tokenizers_put_a_space_after_the_end_of_an_answer(path):
    legacy = Tokenizer(str(path), path.read_bytes(), legacy=True)
    tokens, labels = tokenize(turns("cat", "No", "dog", "Yes"), CHAT, legacy, num_images=0)
    assert starred(legacy, tokens, labels) == (
        "<s> _USER : _cat _ASSISTANT : *_No *</s> _USER : _dog _ASSISTANT : *_Yes *</s>"
    )


@pytest.mark.parametrize(
    ("num_images", "texts", "expected"),
    [
        (1, ["<image>\ncat", "No"], "<s> _USER : _ IMG _ <0x0A> cat _ASSISTANT : *_No *</s>"),
        (1, ["cat <image>", "No"], "<s> _USER : _ IMG _ <0x0A> cat _ASSISTANT : *_No *</s>"),
        (1, ["<image> cat <image>", "No"], "<s> _USER : _ IMG _ <0x0A> cat _ASSISTANT : *_No *</s>"),
        (1, ["cat", "No <image>"], "<s> _USER : _cat _ASSISTANT : *_ IMG *_ *<0x0A> *No *</s>"),
        (
            2,
            ["cat <image> dog <image>", "No"],
            "<s> _USER : _cat _ IMG _ _dog _ IMG _ _ASSISTANT : *_No *</s>",
        ),
        (0, ["<image> cat", "No"], "<s> _USER : _ < i m a g e > _cat _ASSISTANT : *_No *</s>"),
    ],
)
def test_placeholders(tokenizer, num_images, texts, expected):
    tokens, labels = tokenize(turns(*texts), CHAT, tokenizer, num_images=num_images)
    assert starred(tokenizer, tokens, labels) == expected


def test_image_markers_surround_placeholders(path):
    tokenizer = load_tokenizer(str(path), extra_tokens=["<im_start>", "<im_end>"])
    start = tokenizer.vocab_size - 2
    tokens, _ = tokenize(turns("<image>", "No"), CHAT, tokenizer, num_images=1, image_markers=True)
    place = tokens.tolist().index(IMAGE_TOKEN)
    assert tokens[place - 1 : place + 2].tolist() == [start, IMAGE_TOKEN, start + 1]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["<image>\nWhat is this?", "A cat"], "<s> IMG *_A *_cat *<0x0A>"),
        (["dog <image>", "cat"], "<s> IMG *_cat *<0x0A>"),
        (["<image>", ""], "<s> IMG *_ *<0x0A>"),
    ],
)
def test_a_caption_is_learnt_with_its_newline_and_the_question_is_dropped(tokenizer, texts, expected):
    tokens, labels = tokenize(turns(*texts), PLAIN, tokenizer, num_images=1)
    assert starred(tokenizer, tokens, labels) == expected


@pytest.mark.parametrize("texts", [["cat", "dog"], ["<image>"], ["<image>", "cat", "dog", "cat"]])
def test_a_caption_template_takes_one_picture_and_one_caption(tokenizer, texts):
    with pytest.raises(DataError, match="takes two turns"):
        tokenize(turns(*texts), PLAIN, tokenizer, num_images=1)


@pytest.mark.parametrize("texts", [[], ["cat"], ["cat", ""], ["", ""]])
def test_a_conversation_in_which_the_assistant_says_nothing_is_refused(tokenizer, texts):
    with pytest.raises(DataError, match="nothing to learn"):
        tokenize(turns(*texts), CHAT, tokenizer, num_images=0)


def test_v1_is_written_as_the_original_writes_it():
    text = "".join(
        text for text, _ in render(turns("Hi", "Yes.", "Q", "A"), get_template("v1"), num_images=0)
    )
    assert text == (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
        "USER: Hi ASSISTANT: Yes.</s>USER: Q ASSISTANT: A</s>"
    )


def test_an_unknown_template_is_refused():
    with pytest.raises(DataError, match=r"data\.template='v2' is not known; choose one of v1"):
        get_template("v2")


@pytest.mark.parametrize(
    ("question", "num_images", "expected"),
    [
        ("cat", 0, "<s> _USER : _cat _ASSISTANT :"),
        ("cat", 1, "<s> _USER : _ IMG _ <0x0A> cat _ASSISTANT :"),
        ("cat <image>", 1, "<s> _USER : _ IMG _ <0x0A> cat _ASSISTANT :"),
        ("cat", 2, "<s> _USER : _ IMG _ <0x0A> IMG _ <0x0A> cat _ASSISTANT :"),
    ],
)
def test_a_prompt_ends_where_the_answer_begins(tokenizer, question, num_images, expected):
    tokens = render_prompt(question, CHAT, tokenizer, num_images=num_images)
    assert tokens.dtype == np.int32
    assert pieces_of(tokenizer, tokens) == expected


def test_a_prompt_is_the_beginning_of_the_training_text(tokenizer):
    tokens, labels = tokenize(turns("<image>\ncat", "No"), CHAT, tokenizer, num_images=1)
    prompt = render_prompt("<image>\ncat", CHAT, tokenizer, num_images=1)
    assert tokens[: len(prompt)].tolist() == prompt.tolist()
    assert np.flatnonzero(labels != IGNORE)[0] == len(prompt)


def test_a_prompt_needs_a_placeholder_for_every_image(tokenizer):
    with pytest.raises(DataError, match="has 1 <image> for 2 images"):
        render_prompt("<image>", CHAT, tokenizer, num_images=2)


def test_an_image_becomes_its_number_of_tokens():
    tokens, labels = expand_images(np.array([1, -200, 7]), np.array([IGNORE, IGNORE, 7]), 3)
    assert tokens.tolist() == [1, -200, -200, -200, 7]
    assert labels.tolist() == [IGNORE, IGNORE, IGNORE, IGNORE, 7]


def test_truncation_never_cuts_or_drops_an_image():
    tokens, labels = np.array([1, -200, -200, 7, 8]), np.array([IGNORE, IGNORE, IGNORE, 7, 8])
    assert truncate(tokens, labels, 9, 2)[0].tolist() == [1, -200, -200, 7, 8]
    assert truncate(tokens, labels, 4, 2)[1].tolist() == [IGNORE, IGNORE, IGNORE, 7]
    assert truncate(tokens, labels, 3, 2)[0].tolist() == [1, -200, -200]
    for max_length in (1, 2):
        with pytest.raises(DataError, match=rf"an image ends behind data\.max_length={max_length}"):
            truncate(tokens, labels, max_length, 2)
