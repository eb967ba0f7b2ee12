"""A sentencepiece model with a vocabulary chosen by hand, so that tests can show every token."""

from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

SPACE = "\u2581"
WORDS = ["A", "cat", "dog", "the", "mat", "USER", "ASSISTANT", "What", "is", "this", "No", "Yes"]
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ:?.,<>/"


def write_tiny_tokenizer(path: Path) -> Path:
    """Writes a tokenizer.model: one token per known word with its space, else one per letter or byte.

    Ids: 0 <unk>, 1 <s>, 2 </s>, 3 to 258 the bytes, 259 a lone space, then WORDS with a space in front,
    WORDS without, LETTERS.
    """
    model = sentencepiece_model_pb2.ModelProto()
    model.trainer_spec.model_type = 1  # unigram: the fewest tokens, as all pieces score the same
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True
    ordinary, unknown, control, byte = 1, 2, 3, 6
    words = [SPACE + word for word in WORDS] + WORDS + [letter for letter in LETTERS if letter not in WORDS]
    pieces = [("<unk>", unknown), ("<s>", control), ("</s>", control)]
    pieces += [(f"<0x{value:02X}>", byte) for value in range(256)]
    pieces += [(text, ordinary) for text in [SPACE, *words]]
    for text, kind in pieces:
        model.pieces.add(piece=text, type=kind, score=-1.0 if kind == ordinary else 0.0)
    path.write_bytes(model.SerializeToString())
    return path


def pieces_of(tokenizer, ids) -> str:
    """ids as the pieces they stand for, with a blank between; an image placeholder is `IMG`."""
    processor = sentencepiece.SentencePieceProcessor(model_file=tokenizer.path)
    return " ".join("IMG" if id == -200 else processor.id_to_piece(int(id)) for id in ids).replace(SPACE, "_")
