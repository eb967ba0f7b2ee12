"""The original's accidents, as its own functions gave them for these conversations and this vocabulary."""

import dataclasses

import pytest

from llava_jax.data.conversation import IGNORE, tokenize
from llava_jax.data.templates import get_template
from llava_jax.data.tokenizer_model import SentencePieceTokenizer
from tests.tiny_tokenizer import pieces_of, write_tiny_tokenizer

CHATML = ("<|im_start|>", "<|im_end|>")
TWO_ROUNDS = ("cat", "No", "dog", "Yes")
WITH_UNKNOWN = ("cat<unk>", "No", "dog", "Yes")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def starred(path, name, texts, *, legacy=False, extra_tokens=(), num_images=0, max_length=99):
    """The conversation with a star in front of what the original learns of it."""
    tokenizer = SentencePieceTokenizer(str(path), path.read_bytes(), legacy=legacy, extra_tokens=extra_tokens)
    turns = [("gpt" if index % 2 else "human", text) for index, text in enumerate(texts)]
    template = dataclasses.replace(get_template(name), system="A")
    encoded = tokenize(
        turns, template, tokenizer, num_images=num_images, mask="original", max_length=max_length
    )
    first_extra = tokenizer.vocab_size - len(extra_tokens)

    def piece(id):
        return extra_tokens[id - first_extra] if id >= first_extra else pieces_of(tokenizer, [id])

    return " ".join(
        "*" * (label != IGNORE) + piece(id)
        for id, label in zip(encoded.tokens.tolist(), encoded.labels.tolist(), strict=True)
    )


def test_mpt_loses_all_conversations(path):
    assert "*" not in starred(path, "mpt", TWO_ROUNDS, extra_tokens=CHATML)
    assert "*" not in starred(path, "mpt", TWO_ROUNDS[:2], extra_tokens=CHATML, legacy=True)


def test_mpt_learns_two_rounds_of_a_legacy_tokenizer_by_chance(path):
    assert starred(path, "mpt", TWO_ROUNDS, extra_tokens=CHATML, legacy=True) == (
        "<s> <|im_start|> _ s y s t e m <0x0A> A <|im_end|> <|im_start|> _ u s e r <0x0A> cat <|im_end|> <|im_start|> "
        "_ a s s is t a n t *<0x0A> *No <|im_end|> <|im_start|> _ u s e r <0x0A> dog <|im_end|> <|im_start|> "
        "_ a s s is t a n t <0x0A> *Yes *<|im_end|>"
    )


def test_an_unknown_token_loses_a_v1_conversation_unless_there_is_a_pad_token(path):
    assert starred(path, "v1", ("<unk>", "No")) == "<s> _A _USER : _ <unk> _ASSISTANT : _No </s>"
    padded = starred(path, "v0", ("<unk>", "No"), extra_tokens=("[PAD]",))
    assert padded == "<s> _A _USER : _ <unk> _ASSISTANT : *_No *</s>"


def test_an_unknown_token_shifts_what_a_hash_template_learns(path):
    assert starred(path, "llava_v0", WITH_UNKNOWN) == (
        "<s> _A <0x0A> <0x0A> *<0x23> *<0x23> <0x23> _ H u m a n : _cat <unk> <0x0A> <0x23> *<0x23> *<0x23> *_A *s *s "
        "*is *t *a *n *t *: *_No *<0x0A> *<0x23> *<0x23> *<0x23> *_ *H u m a n : _dog <0x0A> <0x23> <0x23> <0x23> _A s "
        "*s *is *t *a *n *t *: *_Yes *<0x0A> *<0x23> *<0x23> *<0x23> *_"
    )


def test_images_make_a_hash_template_count_unknown_tokens(path):
    assert starred(path, "llava_v0", WITH_UNKNOWN, num_images=1) == (
        "<s> _A <0x0A> <0x0A> *<0x23> *<0x23> <0x23> _ H u m a n : _cat <unk> <0x0A> <0x23> <0x23> *<0x23> *_A *s *s "
        "*is *t *a *n *t *: *_No *<0x0A> *<0x23> *<0x23> *<0x23> *_ *H *u m a n : _dog <0x0A> <0x23> <0x23> <0x23> _A s "
        "s *is *t *a *n *t *: *_Yes *<0x0A> *<0x23> *<0x23> *<0x23> *_"
    )


def test_nothing_behind_the_limit_is_learnt_without_an_image(path):
    whole = starred(path, "llava_v0", ("cat", "No"))
    cut = starred(path, "llava_v0", ("cat", "No"), max_length=12)
    assert cut.split(" ")[:12] == whole.split(" ")[:12]
    assert "*" in whole.partition("cat")[2]
    assert "*" not in cut.partition("cat")[2]


def test_inst_templates_learn_the_space_in_front_of_the_end(path):
    assert starred(path, "llama_2", TWO_ROUNDS).endswith(
        "<0x5D> *_No *_ *</s> <s> <0x5B> I N S T <0x5D> _dog _ <0x5B> / I N S T <0x5D> *_Yes *_ *</s>"
    )


def test_a_caption_is_learnt_whatever_its_length(path):
    texts = ("<image>", "cat <unk>")
    assert starred(path, "plain", texts, num_images=1, max_length=3) == "<s> IMG *_cat *_ *<unk> *<0x0A>"
