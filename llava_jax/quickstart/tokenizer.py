"""A small sentencepiece model with Llama's settings."""

import io
from collections.abc import Iterable

import sentencepiece

# The system prompt of the `v1` template: it opens every training row, so it should take few tokens.
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


Conversation = list[tuple[str, str]]  # question, answer


def train_tokenizer(conversations: Iterable[Conversation], captions: Iterable[str], vocab_size: int) -> bytes:
    """Trains byte-fallback BPE on rendered text and returns the bytes of a `tokenizer.model`.

    Token 0 is `<unk>`, 1 `<s>`, 2 `</s>`; there is no padding token.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*map(_render, conversations), *captions]),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=1.0,
        required_chars="0123456789",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _render(conversation: Conversation) -> str:
    # A full stop takes the place of the image and its newline: pieces end there, and the question's first
    # word follows without a space.
    turns = (f"{question} ASSISTANT: {answer}" for question, answer in conversation)
    return f"{SYSTEM} USER: ." + " USER: ".join(turns)
