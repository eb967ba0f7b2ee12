"""Llama's tokenizer: seams at special strings, byte positions, and what is refused."""

import json
import pickle

import pytest
import sentencepiece

from llava_jax.data.tokenizer import load_tokenizer
from llava_jax.data.tokenizer_model import SentencePieceTokenizer
from llava_jax.errors import DataError
from tests.tiny_tokenizer import pieces_of, write_tiny_tokenizer


@pytest.fixture
def path(tmp_path):
    return write_tiny_tokenizer(tmp_path / "tokenizer.model")


@pytest.fixture
def tokenizer(path):
    return load_tokenizer(str(path))


@pytest.fixture
def legacy(path):
    return SentencePieceTokenizer(str(path), path.read_bytes(), legacy=True)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", ""),
        ("A cat", "_A _cat"),
        (" cat", "_ _cat"),
        ("cat</s>cat", "_cat </s> cat"),
        ("</s>cat", "</s> cat"),
        ("cat</s> cat", "_cat </s> _cat"),
        ("<s>cat<unk>", "<s> cat <unk>"),
        ("<S>", "_ < S >"),
        ("\u2581cat", "_ _cat"),
        ("\u00e9", "_ <0xC3> <0xA9>"),
    ],
)
def test_text_after_a_special_string_gets_no_space(tokenizer, text, pieces):
    assert pieces_of(tokenizer, tokenizer.encode(text)) == pieces


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("A cat", "_A _cat"),
        ("cat</s>cat", "_cat </s> _cat"),
        ("</s>cat", "</s> _cat"),
        ("cat</s> cat", "_cat </s> _ _cat"),
    ],
)
def test_legacy_puts_a_space_before_every_part(legacy, text, pieces):
    assert pieces_of(legacy, legacy.encode(text)) == pieces


def test_ends_count_the_bytes_of_the_text(tokenizer, legacy):
    text = "cat</s>\u00e9 cat"
    assert pieces_of(tokenizer, tokenizer.encode(text)) == "_cat </s> <0xC3> <0xA9> _cat"
    assert tokenizer.encode_with_ends(text)[1] == [3, 7, 8, 9, 13]
    assert pieces_of(legacy, legacy.encode(text)) == "_cat </s> _ <0xC3> <0xA9> _cat"
    assert legacy.encode_with_ends(text)[1] == [3, 7, 7, 8, 9, 13]


def test_a_sentencepiece_space_in_the_text_is_one_byte(tokenizer, legacy):
    for each in (tokenizer, legacy):
        assert each.encode_with_ends("A\u2581cat") == each.encode_with_ends("A cat")
        assert each.num_bytes("A\u2581cat") == 5


@pytest.mark.parametrize("text", ["A cat", " cat", "", "the\u00e9 cat\n", "  mat  "])
def test_decoding_undoes_encoding(tokenizer, legacy, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert legacy.decode(legacy.encode(text)) == text


def test_special_tokens_can_be_shown(tokenizer):
    ids = [1, *tokenizer.encode("A cat</s>")]
    assert tokenizer.decode(ids) == "A cat"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s> A cat</s>"


def test_ids_of_special_tokens(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 0)


def test_extra_tokens_come_behind_the_vocabulary(path):
    size = load_tokenizer(str(path)).vocab_size
    tokenizer = load_tokenizer(str(path), extra_tokens=["<im_start>", "<im_end>"])
    assert tokenizer.vocab_size == size + 2
    ids = tokenizer.encode("<im_start>cat<im_end>")
    assert (ids[0], ids[-1]) == (size, size + 1)
    assert pieces_of(tokenizer, ids[1:-1]) == "cat"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<im_start>cat<im_end>"


def test_a_directory_is_accepted_and_its_config_says_legacy(path):
    assert not load_tokenizer(str(path.parent)).legacy
    for config, legacy in (
        ({"legacy": False}, False),
        ({"legacy": True}, True),
        ({"legacy": None}, True),
        ({}, True),
    ):
        (path.parent / "tokenizer_config.json").write_text(json.dumps(config))
        assert load_tokenizer(str(path.parent)).legacy is legacy


def test_fingerprint_depends_on_everything_that_changes_ids(path, tokenizer, legacy):
    assert load_tokenizer(str(path)).fingerprint == tokenizer.fingerprint
    others = {legacy.fingerprint, load_tokenizer(str(path), extra_tokens=["<im_start>"]).fingerprint}
    assert len(others | {tokenizer.fingerprint}) == 3


def test_what_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no tokenizer\.model"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match="is not a sentencepiece model"):
        load_tokenizer(str(tmp_path))


def test_a_model_that_rewrites_text_is_refused(path):
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    model.normalizer_spec.remove_extra_whitespaces = True
    tokenizer = SentencePieceTokenizer(str(path), model.SerializeToString())
    with pytest.raises(DataError, match="do not spell the text"):
        tokenizer.encode("cat   cat")


def test_words_are_encoded_as_in_the_whole_text(path):
    text = "the cat  is\n\nthis:\u00e9 \u4e2d\u6587 cat\ncat " + "mat" * 40 + "  "
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = load_tokenizer(str(path))
    for _ in range(2):  # words are kept
        assert tokenizer.encode(text) == reference.encode(text)


@pytest.mark.parametrize(("piece", "text"), [("\u2581A\u2581cat", "A cat"), ("\u2581\n\n", "\n\n")])
def test_tokens_that_reach_over_words_are_found(path, piece, text):
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    model.pieces.add(piece=piece, type=1, score=-1.0)
    tokenizer = SentencePieceTokenizer(str(path), model.SerializeToString())
    assert tokenizer.encode(text) == [tokenizer.vocab_size - 1]


def test_a_tokenizer_travels_to_other_processes(path):
    tokenizer = load_tokenizer(str(path), extra_tokens=["<im_start>"])
    tokenizer.encode("A cat")
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.fingerprint == tokenizer.fingerprint
    assert copy.encode_with_ends("A cat<im_start>") == tokenizer.encode_with_ends("A cat<im_start>")


def test_settings_can_leave_the_beginning_out(path):
    (path.parent / "tokenizer_config.json").write_text('{"legacy": false, "add_bos_token": false}')
    without = load_tokenizer(str(path))
    assert (without.bos_id, without.legacy) == (None, False)
    (path.parent / "tokenizer_config.json").write_text('{"legacy": false}')
    assert load_tokenizer(str(path)).bos_id == 1
    assert load_tokenizer(str(path)).fingerprint != without.fingerprint


def test_broken_settings_are_named(path):
    for content in ("[1]", "{"):
        (path.parent / "tokenizer_config.json").write_text(content)
        with pytest.raises(DataError, match=r"tokenizer_config\.json: is not a JSON object"):
            load_tokenizer(str(path))


def test_special_strings_have_an_id(path):
    tokenizer = load_tokenizer(str(path), extra_tokens=["<im_start>"])
    ids = [tokenizer.special_id(token) for token in ("</s>", "<im_start>", "cat")]
    assert ids == [2, tokenizer.vocab_size - 1, None]
