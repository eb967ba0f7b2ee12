"""Conversations as tokens and labels: learnt tokens are marked with a star."""

import dataclasses

import numpy as np
import pytest

from llava_jax.data.conversation import (
    IGNORE,
    IMAGE_TOKEN,
    Encoded,
    expand_images,
    render,
    render_prompt,
    tokenize,
    truncate,
)
from llava_jax.data.templates import TEMPLATES, get_template
from llava_jax.data.tokenizer import load_tokenizer
from llava_jax.data.tokenizer_model import SentencePieceTokenizer
from llava_jax.errors import ConfigError, DataError
from tests.tiny_tokenizer import pieces_of, write_tiny_tokenizer

# The v1 template without its long system text.
CHAT = dataclasses.replace(TEMPLATES["v1"], system="")
HASHES = dataclasses.replace(TEMPLATES["llava_v0"], system="")
PLAIN = TEMPLATES["plain"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def tokenizer(path):
    return load_tokenizer(str(path))


def written(name, *texts, num_images=0, **how):
    spans = render(turns(*texts), get_template(name), num_images=num_images, **how)
    return "".join(span.text for span in spans)


def turns(*texts):
    return [("gpt" if index % 2 else "human", text) for index, text in enumerate(texts)]


def starred(tokenizer, encoded):
    tokens, labels = encoded.tokens, encoded.labels
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
    assert starred(tokenizer, tokenize(turns(*texts), CHAT, tokenizer, num_images=0)) == expected


def test_legacy_tokenizers_put_a_space_after_the_end_of_an_answer(path):
    legacy = SentencePieceTokenizer(str(path), path.read_bytes(), legacy=True)
    assert starred(legacy, tokenize(turns("cat", "No", "dog", "Yes"), CHAT, legacy, num_images=0)) == (
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
    assert starred(tokenizer, tokenize(turns(*texts), CHAT, tokenizer, num_images=num_images)) == expected


def test_image_markers_surround_placeholders(path):
    tokenizer = load_tokenizer(str(path), extra_tokens=["<im_start>", "<im_end>"])
    start = tokenizer.vocab_size - 2
    tokens = tokenize(turns("<image>", "No"), CHAT, tokenizer, num_images=1, image_markers=True).tokens
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
    assert starred(tokenizer, tokenize(turns(*texts), PLAIN, tokenizer, num_images=1)) == expected


@pytest.mark.parametrize("texts", [["cat", "dog"], ["<image>"], ["<image>", "cat", "dog", "cat"]])
def test_a_caption_template_takes_one_picture_and_one_caption(tokenizer, texts):
    with pytest.raises(DataError, match="takes two turns"):
        tokenize(turns(*texts), PLAIN, tokenizer, num_images=1)


@pytest.mark.parametrize("texts", [[], ["cat"], ["cat", ""], ["", ""]])
def test_a_conversation_in_which_the_assistant_says_nothing_is_refused(tokenizer, texts):
    with pytest.raises(DataError, match="nothing to learn"):
        tokenize(turns(*texts), CHAT, tokenizer, num_images=0)


def test_v1_is_written_as_the_original_writes_it():
    assert written("v1", "Hi", "Yes.", "Q", "A") == (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
        "USER: Hi ASSISTANT: Yes.</s>USER: Q ASSISTANT: A</s>"
    )


def test_an_unknown_template_is_refused():
    with pytest.raises(ConfigError, match=r"data\.template='v11' is not one of 'v1', .*Did you mean 'v"):
        get_template("v11")


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
    for template in (CHAT, PLAIN, HASHES, TEMPLATES["v1_mmtag"], TEMPLATES["llama_2"], TEMPLATES["mpt"]):
        encoded = tokenize(turns("<image>\ncat", "No"), template, tokenizer, num_images=1, mask="last_answer")
        prompt = render_prompt("<image>\ncat", template, tokenizer, num_images=1)
        assert encoded.tokens[: len(prompt)].tolist() == prompt.tolist()
        assert np.flatnonzero(encoded.labels != IGNORE)[0] == len(prompt)


def test_a_prompt_needs_a_placeholder_for_every_image(tokenizer):
    with pytest.raises(DataError, match="has 1 <image> for 2 images"):
        render_prompt("<image>", CHAT, tokenizer, num_images=2)


def test_without_images_a_placeholder_within_a_question_is_text_as_in_training(tokenizer):
    asked = "is <image> cat?"
    encoded = tokenize(turns(asked, "No"), CHAT, tokenizer, num_images=0, mask="last_answer")
    for how in ({}, {"earlier": (("human", "a <image> b"), ("gpt", "<image>"))}):
        prompt = render_prompt(asked, CHAT, tokenizer, num_images=0, **how)
        assert IMAGE_TOKEN not in prompt
        assert how or encoded.tokens[: len(prompt)].tolist() == prompt.tolist()
    with pytest.raises(DataError, match=r"has 1 <image> for 0 images.*Give as many, or take it out"):
        render_prompt("<image>\ncat", CHAT, tokenizer, num_images=0)


@pytest.mark.parametrize(
    ("system", "message"),
    [("see <image>", "the system text has <image>"), ("\ud800", "the system text holds half of a surrogate")],
)
def test_a_system_text_that_cannot_be_written_is_told(tokenizer, system, message):
    with pytest.raises(DataError, match=message):
        render_prompt("cat", CHAT, tokenizer, num_images=0, system=system)


# The separators are those of the original's conversation.py and of the models' published chat templates.
@pytest.mark.parametrize(
    ("name", "begins", "ends"),
    [
        (
            "llava_v1",
            "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the human's questions. USER: Hi",
            " ASSISTANT: Yes.</s>USER: Q ASSISTANT: A</s>",
        ),
        (
            "llava_v0",
            "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the human's questions.\n\n### Human: Hi",
            "\n### Assistant: Yes.\n### Human: Q\n### Assistant: A\n### ",
        ),
        (
            "llava_llama_2",
            "[INST] <<SYS>>\nYou are a helpful language and vision assistant. You are able to understand the visual "
            "content that the user provides, and assist the user with a variety of tasks using natural language.\n"
            "<</SYS>>\n\nHi",
            " [/INST] Yes. </s><s>[INST] Q [/INST] A </s>",
        ),
        (
            "llama_2",
            "[INST] <<SYS>>\nYou are a helpful, respectful and honest assistant. Always answer",
            " A </s>",
        ),
        ("mistral_instruct", "[INST] Hi", " [/INST] Yes. </s>[INST] Q [/INST] A </s>"),
        (
            "mpt",
            "<|im_start|>system\nA conversation between a user and an LLM-based AI assistant. The assistant gives "
            "helpful and honest answers.<|im_end|><|im_start|>user\nHi",
            "<|im_end|><|im_start|>assistant\nYes.<|im_end|><|im_start|>user\nQ<|im_end|><|im_start|>assistant\nA<|im_end|>",
        ),
        (
            "chatml_direct",
            "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\nHi",
            "A<|im_end|>",
        ),
        (
            "llama_3",
            "<|start_header_id|>user<|end_header_id|>\n\nHi",
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|><|start_header_id|>user"
            "<|end_header_id|>\n\nQ<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>",
        ),
        (
            "qwen_2",
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi",
            "<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
            "A<|im_end|>",
        ),
    ],
)
def test_templates_are_written_as_published(name, begins, ends):
    text = written(name, "Hi", "Yes.", "Q", "A")
    assert text.startswith(begins)
    assert text.endswith(ends)


def test_empty_turns_are_written_as_the_original_writes_them():
    assert written("mistral_instruct", "Q", "", "", "A") == "[INST] Q [/INST] A </s>"
    assert written("llama_2", "Q", "A", "", "A", system="") == "[INST] Q [/INST] A </s> A </s>"
    assert written("v1", "", "", system="") == "USER:ASSISTANT:"
    assert written("llava_v0", "", "", system="") == "### Human: \n### Assistant: \n### "
    assert written("mpt", "", "", system="") == "<|im_start|>user\n<|im_start|>assistant\n"


def test_training_takes_v0_for_v1():
    assert get_template("v0") == get_template("v0.5") == get_template("vicuna_v1") == get_template("v1")


def test_a_conversation_can_bring_its_own_system_text():
    assert written("v1", "Q", "A", system="Be kind.") == "Be kind. USER: Q ASSISTANT: A</s>"
    assert written("v1", "Q", "A", system="") == "USER: Q ASSISTANT: A</s>"
    assert written("mistral_instruct", "Q", "A", system="Be kind.") == (
        "[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nQ [/INST] A </s>"
    )
    assert written("llama_2", "Q", "A", system="") == "[INST] Q [/INST] A </s>"
    assert written("llama_3", "Q", "A", system="Be kind.").startswith(
        "<|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|><|start_header_id|>user<|end_header_id|>"
    )


def test_mmtag_templates_surround_images():
    text = written("v0_mmtag", "Q <image>", "A", num_images=1)
    assert text.endswith("\n\n### Human: <Image><image></Image>\nQ\n### Assistant: A\n### ")
    text = written("v1_mmtag", "<image>", "A", num_images=1, image_markers=True)
    assert text.endswith(" USER: <Image><im_start><image><im_end></Image> ASSISTANT: A</s>")
    assert written("v1_mmtag", "<image>", "A").endswith(" USER: <image> ASSISTANT: A</s>")


def test_hash_templates_learn_the_marks_of_turns_as_the_original_does(path):
    tokenizer = load_tokenizer(str(path), extra_tokens=["###"])
    pieces = tokenizer.encode("###")
    assert pieces == [tokenizer.vocab_size - 1]
    encoded = tokenize(turns("cat", "", "dog", "No"), HASHES, tokenizer, num_images=0)
    learnt = tokenizer.decode(encoded.labels[encoded.labels != IGNORE], skip_special_tokens=False)
    assert learnt == "###### Assistant: \n###### Assistant: No\n### "
    last = tokenize(turns("cat", "", "dog", "No"), HASHES, tokenizer, num_images=0, mask="last_answer")
    assert tokenizer.decode(last.labels[last.labels != IGNORE], skip_special_tokens=False) == "No\n### "


def test_the_first_question_of_an_inst_template_cannot_be_empty(tokenizer):
    with pytest.raises(DataError, match="the first question is empty"):
        tokenize(turns("", "No"), TEMPLATES["mistral_instruct"], tokenizer, num_images=0)


@pytest.mark.parametrize("name", ["llama_3", "qwen_2", "qwen2_base", "qwen2_instruct"])
def test_a_template_whose_tokens_the_tokenizer_lacks_is_refused(tokenizer, name):
    with pytest.raises(
        ConfigError, match=r"tokenizer\.model has no special token '<\|.*choose the data\.template"
    ):
        tokenize(turns("cat", "No"), TEMPLATES[name], tokenizer, num_images=0)
    with pytest.raises(ConfigError, match="has no special token"):
        render_prompt("cat", TEMPLATES[name], tokenizer, num_images=0)


@pytest.mark.parametrize(("name", "end"), [("qwen2_base", "<|endoftext|>"), ("qwen2_instruct", "<|im_end|>")])
def test_tinyllava_writes_v1_with_an_end_of_its_decoder(path, name, end):
    """tinyllava/data/template/qwen2_base_template.py and qwen2_instruct_template.py."""
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
        "and polite answers to the user's questions. "
    )
    texts = ("<image>\nWhat is this?", "A cat", "dog", "No")
    assert written(name, *texts, num_images=1) == (
        f"{system}USER: <image>\nWhat is this? ASSISTANT: A cat{end}USER: dog ASSISTANT: No{end}"
    )
    tokenizer = load_tokenizer(str(path), extra_tokens=[end])
    encoded = tokenize(turns(*texts), get_template(name), tokenizer, num_images=1)
    learnt = tokenizer.decode(encoded.labels[encoded.labels != IGNORE], skip_special_tokens=False)
    assert learnt == f"A cat{end} No{end}"
    assert get_template(name).end_ids(tokenizer) == (2, tokenizer.special_id(end))


def test_answers_end_at_the_templates_token_too(path):
    tokenizer = load_tokenizer(str(path), extra_tokens=["<|im_end|>"])
    assert TEMPLATES["mpt"].end_ids(tokenizer) == (2, tokenizer.vocab_size - 1)
    for name in ("v1", "llama_2", "llava_v0", "plain"):
        assert TEMPLATES[name].end_ids(tokenizer) == (2,)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (
            "assistant",
            "<s> _USER : _cat _ASSISTANT : *_No *</s> USER : _dog _ASSISTANT : *_Yes *</s> USER : _mat _",
        ),
        (
            "last_answer",
            "<s> _USER : _cat _ASSISTANT : _No </s> USER : _dog _ASSISTANT : *_Yes *</s> USER : _mat _",
        ),
        (
            "everything",
            "<s> *_USER *: *_cat *_ASSISTANT *: *_No *</s> *USER *: *_dog *_ASSISTANT *: *_Yes *</s> *USER *: *_mat *_",
        ),
        # The original loses a conversation that ends with a question.
        (
            "original",
            "<s> _USER : _cat _ASSISTANT : _No </s> USER : _dog _ASSISTANT : _Yes </s> USER : _mat _",
        ),
    ],
)
def test_masks(tokenizer, mask, expected):
    texts = ["cat", "No", "dog", "Yes", "mat"]
    assert starred(tokenizer, tokenize(turns(*texts), CHAT, tokenizer, num_images=0, mask=mask)) == expected


def test_images_are_never_learnt(tokenizer):
    encoded = tokenize(turns("<image>", "No"), CHAT, tokenizer, num_images=1, mask="everything")
    assert starred(tokenizer, encoded) == "<s> *_USER *: *_ IMG *_ *_ASSISTANT *: *_No *</s>"


def test_the_original_forgives_a_mismatch_behind_its_limit(tokenizer):
    texts = ["cat", "No", "dog"]
    num_learnt = {}
    for max_length in (7, 8, 9, 99, None):
        how = {"num_images": 0, "mask": "original", "max_length": max_length}
        num_learnt[max_length] = int((tokenize(turns(*texts), CHAT, tokenizer, **how).labels != IGNORE).sum())
    # "<s> _USER : _cat _ASSISTANT : _No </s>" are 8 tokens; at 7 the end of the answer is cut off.
    assert num_learnt == {7: 1, 8: 2, 9: 0, 99: 0, None: 0}


def test_the_original_mask_needs_a_template_of_the_original(path):
    names = ["<|im_start|>", "<|im_end|>"]
    tokenizer = load_tokenizer(str(path), extra_tokens=names)
    with pytest.raises(ConfigError, match=r"data\.mask='original' needs"):
        tokenize(turns("cat", "No"), TEMPLATES["qwen_2"], tokenizer, num_images=0, mask="original")


def test_ends_of_rounds_are_behind_the_end_token_of_what_was_said(tokenizer):
    encoded = tokenize(turns("cat", "No", "dog", "", "mat", "Yes"), CHAT, tokenizer, num_images=0)
    ends = [pieces_of(tokenizer, encoded.tokens[:end]) for end in encoded.round_ends]
    first = "<s> _USER : _cat _ASSISTANT : _No </s>"
    second = " USER : _dog _ASSISTANT : USER : _mat _ASSISTANT : _Yes </s>"
    assert ends == [first, first + second]
    plain = tokenize(turns("<image>", "cat"), PLAIN, tokenizer, num_images=1)
    assert (plain.round_ends.tolist(), plain.images.tolist()) == ([4], [[1, 2]])


def encoded_of(tokens, learnt, round_ends, images):
    tokens = np.array(tokens, np.int32)
    labels = np.full_like(tokens, IGNORE)
    labels[learnt] = tokens[learnt]
    return Encoded(tokens, labels, np.array(round_ends, np.int32), np.array(images, np.int32).reshape(-1, 2))


def lists(encoded):
    assert {array.dtype for array in dataclasses.astuple(encoded)} == {np.dtype(np.int32)}
    return [array.tolist() for array in dataclasses.astuple(encoded)]


def test_an_image_becomes_its_number_of_tokens():
    one = encoded_of([1, -200, -200, 7, -200, 8, 9], [3, 6], [4, 7], [[1, 2], [2, 3], [4, 5]])
    assert lists(expand_images(one, [3, 1, 2])) == [
        [1, -200, -200, -200, -200, 7, -200, -200, 8, 9],
        [IGNORE] * 5 + [7] + [IGNORE] * 3 + [9],
        [6, 10],
        [[1, 4], [4, 5], [6, 8]],
    ]
    with pytest.raises(DataError, match="has 3 <image> for 2 images; write one for each"):
        expand_images(one, [3, 1])


@pytest.mark.parametrize(
    ("max_length", "whole_turns", "length", "num_images"),
    [
        (12, True, 11, 3),
        (11, True, 11, 3),
        (10, True, 6, 2),
        (10, False, 10, 3),
        (8, False, 7, 2),  # in front of the third image
        (7, True, 6, 2),
        (6, True, 6, 2),
        # No round fits.
        (5, True, 5, 2),
        (4, True, 3, 1),  # the second image would be cut
        (3, False, 3, 1),
        (2, False, 1, 0),
        (1, True, 1, 0),
    ],
)
def test_truncation_never_cuts_an_image(max_length, whole_turns, length, num_images):
    tokens = [1, -200, -200, -200, -200, 7, 8, -200, -200, 9, 10]
    long = encoded_of(tokens, [5, 9, 10], [6, 11], [[1, 3], [3, 5], [7, 9]])
    cut, kept = truncate(long, max_length, whole_turns=whole_turns)
    assert lists(cut)[0] == tokens[:length]
    assert lists(cut)[1] == long.labels[:length].tolist()
    assert lists(cut)[2] == [end for end in (6, 11) if end <= length]
    assert kept == num_images == len(cut.images)


def test_rounds_that_teach_nothing_are_not_worth_a_cut():
    tokens = [1, 5, 6, 7, 8, 9]
    long = encoded_of(tokens, [4, 5], [3, 6], [])
    assert lists(truncate(long, 5, whole_turns=True)[0])[:2] == [tokens[:5], [IGNORE] * 4 + [8]]
