"""tokenizer.json: ids of the library, positions in bytes, and which tokens begin and end a text."""

import json
import pickle
import shutil

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_jax.data.conversation import IGNORE, render_prompt, tokenize
from llava_jax.data.templates import get_template
from llava_jax.data.tokenizer import load_tokenizer
from llava_jax.errors import DataError
from tests.tiny_models import GOLDEN, LLAMA_TOKENIZER
from tests.tiny_tokenizer import write_tiny_tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "A cat sits on the mat.",
    "caf\u00e9 \u4e2d\u6587 \U0001f600\n",
    "What is this? user assistant system",
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A byte-level BPE like Qwen2's, without any settings beside it."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TEXTS * 4, trainer)
    directory = tmp_path_factory.mktemp("bpe")
    bpe.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def tokenizer(directory):
    return load_tokenizer(str(directory))


def with_settings(directory, tmp_path, **fields):
    shutil.copy(directory / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields))
    return load_tokenizer(str(tmp_path))


def with_beginning(directory, into):
    """The file with a post-processor that puts <|im_start|> in front, as Llama 3's does with its own."""
    bpe = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    into.mkdir()
    bpe.save(str(into / "tokenizer.json"))
    return into


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), max_size=30))
def test_text_comes_back_whole(tokenizer, text):
    ids, ends = tokenizer.encode_with_ends(text)
    assert ids == tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ends) == len(ids)
    assert ends == sorted(ends)
    assert ends[-1:] == ([len(text.encode())] if text else [])


def test_ends_are_counted_in_bytes(tokenizer):
    ids, ends = tokenizer.encode_with_ends("\u00fc cat")
    assert [tokenizer.decode([id]) for id in ids][2:] == [" cat"]
    # Two tokens spell the first letter, which ends with the second.
    assert ends == [0, 2, 6]
    assert tokenizer.encode_with_ends("cat<|im_end|>\u00e9 A")[1][-1] == len("cat<|im_end|>") + 4


def test_special_strings_are_one_token(tokenizer):
    assert tokenizer.encode("<|im_end|>") == [2]
    assert tokenizer.special_id("<|im_end|>") == 2
    assert tokenizer.special_id("cat") is None
    assert tokenizer.decode([2], skip_special_tokens=False) == "<|im_end|>"
    assert tokenizer.decode([2]) == ""


def test_extra_tokens_come_behind_the_vocabulary(directory, tokenizer):
    more = load_tokenizer(str(directory), extra_tokens=["<im_start>", "<|im_end|>"])
    assert more.vocab_size == tokenizer.vocab_size + 1
    assert more.encode("<im_start><|im_end|>") == [tokenizer.vocab_size, 2]
    assert more.fingerprint != tokenizer.fingerprint


def test_settings_name_the_beginning_and_the_end(directory, tokenizer, tmp_path):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.legacy) == (None, 0, None, False)
    named = {
        "bos_token": "<|im_start|>",
        "eos_token": {"content": "<|im_end|>"},
        "pad_token": "<|endoftext|>",
    }
    told = with_settings(directory, tmp_path, add_bos_token=True, **named)
    assert (told.bos_id, told.eos_id, told.pad_id) == (1, 2, 0)
    # It has a beginning, but neither the settings nor the file say that texts start with it.
    assert with_settings(directory, tmp_path, **named).bos_id is None
    assert with_settings(directory, tmp_path, bos_token=None, eos_token="<|im_end|>").bos_id is None


def test_special_tokens_map_serves_where_settings_say_nothing(directory, tmp_path):
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    assert with_settings(directory, tmp_path, model_max_length=8).eos_id == 2


def test_the_post_processor_says_whether_there_is_a_beginning(directory, tmp_path):
    path = with_beginning(directory, tmp_path / "begins")
    tokenizer = with_settings(path, tmp_path, bos_token="<|im_start|>")
    assert tokenizer.bos_id == 1
    assert 1 not in tokenizer.encode("cat")
    off = with_settings(path, tmp_path, bos_token="<|im_start|>", add_bos_token=False)
    assert off.bos_id is None


def test_a_conversation_without_a_beginning_learns_answers_and_their_ends(tokenizer):
    turns = [
        ("human", "What is this?"),
        ("gpt", "caf\u00e9"),
        ("human", "\u4e2d\u6587 cat"),
        ("gpt", "\u00fc"),
    ]
    template = get_template("qwen_2")
    encoded = tokenize(turns, template, tokenizer, num_images=0)
    learnt = encoded.labels[encoded.labels != IGNORE]
    assert tokenizer.decode(learnt, skip_special_tokens=False) == "caf\u00e9<|im_end|>\u00fc<|im_end|>"
    text = tokenizer.decode(encoded.tokens, skip_special_tokens=False)
    assert text.startswith(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nWhat is"
    )
    assert encoded.tokens[encoded.round_ends - 1].tolist() == [2, 2]
    prompt = render_prompt("What is this?", template, tokenizer, num_images=0)
    assert np.array_equal(encoded.tokens[: len(prompt)], prompt)
    assert template.end_ids(tokenizer) == (0, 2)


def test_a_tokenizer_travels_to_other_processes(directory):
    tokenizer = load_tokenizer(str(directory), extra_tokens=["<im_start>"])
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.fingerprint == tokenizer.fingerprint
    assert copy.encode_with_ends("A \u00e9<im_start>") == tokenizer.encode_with_ends("A \u00e9<im_start>")


def test_a_directory_with_both_files_is_read_from_tokenizer_model(directory, tmp_path):
    shutil.copy(directory / "tokenizer.json", tmp_path)
    write_tiny_tokenizer(tmp_path / "tokenizer.model")
    assert load_tokenizer(str(tmp_path)).path.endswith("tokenizer.model")
    assert load_tokenizer(str(tmp_path / "tokenizer.json")).path.endswith("tokenizer.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", r"tokenizer\.json: is not a tokenizer\.json"),
        ("{}", r"tokenizer\.json: is not a tokenizer\.json"),
    ],
)
def test_what_is_no_tokenizer_is_refused(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=message):
        load_tokenizer(str(tmp_path))


def test_settings_that_do_not_fit_are_refused(directory, tmp_path):
    with pytest.raises(DataError, match=r"has no '</s>', which tokenizer_config\.json names as 'eos_token'"):
        with_settings(directory, tmp_path, eos_token="</s>")
    with pytest.raises(DataError, match="has no token that ends a text"):
        with_settings(directory, tmp_path, eos_token=None)


@pytest.mark.skipif(not LLAMA_TOKENIZER.exists(), reason="Llama's tokenizer.model is not here")
def test_llamas_ids_are_those_of_its_fast_tokenizer(tmp_path):
    from transformers import LlamaTokenizer

    shutil.copy(LLAMA_TOKENIZER, tmp_path)
    fast = LlamaTokenizer.from_pretrained(tmp_path, legacy=False, add_bos_token=True, add_eos_token=False)
    fast.save_pretrained(tmp_path / "json")
    ours, model = load_tokenizer(str(tmp_path / "json")), load_tokenizer(str(LLAMA_TOKENIZER))
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (model.bos_id, model.eos_id, model.vocab_size)
    lines = (GOLDEN / "A_tokenize/tokenizer_strings.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    assert [ours.encode(text) for text in texts] == fast(texts, add_special_tokens=False).input_ids
    # Fast tokenizers differ from sentencepiece behind special strings.
    assert sum(ours.encode(text) == model.encode(text) for text in texts) >= 100
    turns = [("human", "<image>\nWhat is this?"), ("gpt", "\u4e2d\u6587, a cat.")]
    for name in ("v1", "llava_v0", "mpt"):
        one, other = (
            tokenize(turns, get_template(name), tokenizer, num_images=1) for tokenizer in (ours, model)
        )
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.labels.tolist() == other.labels.tolist()
