"""Plain documents: every token is learnt once, in rows of data.max_length or packed."""

import json

import numpy as np
import pytest
import sentencepiece

from llava_jax.config import Config, DataConfig, ModelConfig, TextConfig, VisionConfig
from llava_jax.data.conversation import IGNORE, tokenize_document
from llava_jax.data.dataset import open_datasets
from llava_jax.data.image_processor import ImageProcessor
from llava_jax.data.inspection import inspect
from llava_jax.data.pipeline import Pipeline
from llava_jax.data.tokenizer import load_tokenizer
from llava_jax.errors import DataError
from tests.tiny_tokenizer import write_tiny_tokenizer

MODEL = ModelConfig(
    vision=VisionConfig(16, 32, 2, 2, image_size=28), text=TextConfig(400, max_position_embeddings=512)
)
TEXTS = ["A cat", "the cat is this dog " * 9, "What is <image> No", "\u00e9 " * 30]


@pytest.fixture
def folder(tmp_path):
    write_tiny_tokenizer(tmp_path / "tokenizer.model")
    return tmp_path


def make(folder, records, **settings) -> Pipeline:
    (folder / "records.jsonl").write_text("\n".join(map(json.dumps, records)))
    defaults = {"path": str(folder / "records.jsonl"), "max_length": 16, "batch_size": 2, "cache_dir": ""}
    config = DataConfig(**defaults | settings)
    return Pipeline(
        config,
        open_datasets(config, seed=3)[0],
        tokenizer=load_tokenizer(str(folder)),
        images=ImageProcessor.from_config(config, MODEL),
        seed=3,
    )


def of_text(folder, text: str) -> list[int]:
    """A document by sentencepiece itself."""
    return [
        1,
        *sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).encode(text),
        2,
    ]


def samples_of(pipeline) -> list[tuple[np.ndarray, np.ndarray]]:
    read = [pipeline._reader.read(id) for id in range(len(pipeline.dataset))]
    return [(sample.tokens, sample.labels) for sample in read]


@pytest.mark.parametrize("packing", [False, True])
def test_every_token_of_every_document_is_learnt_once(folder, packing):
    pipeline = make(folder, [{"text": text} for text in TEXTS], packing=packing)
    expected = {number: of_text(folder, text) for number, text in enumerate(TEXTS)}
    assert max(map(len, expected.values())) > 3 * 16
    learnt = {number: [] for number in expected}
    for step in range(pipeline.steps_per_epoch):
        batch = pipeline.batch(step)
        assert batch["images"].shape[2] == 0
        rows = zip(*(batch[key][0] for key in ("tokens", "labels", "segment_ids", "positions")), strict=True)
        for ids, (tokens, labels, segments, positions) in zip(pipeline.step_rows(step), rows, strict=True):
            for segment, id in enumerate(ids, start=1):
                own = segments == segment
                number, piece = int(pipeline.dataset.picks[id, 1]), pipeline.dataset.piece(id)
                assert len(tokens[own]) <= 16 and positions[own].tolist() == list(range(own.sum()))
                assert labels[own][0] == IGNORE and labels[own][1:].tolist() == tokens[own][1:].tolist()
                begin = piece * 15
                assert tokens[own].tolist() == expected[number][begin : begin + 16]
                learnt[number] += range(begin + 1, begin + own.sum())
    assert {number: sorted(places) for number, places in learnt.items()} == {
        number: list(range(1, len(ids))) for number, ids in expected.items()
    }
    summary = pipeline.summary()
    assert summary["supervised_tokens"] == sum(len(ids) - 1 for ids in expected.values())
    assert (summary["samples_truncated"], summary["samples_teaching_nothing"]) == (0, 0)


class Llama3:
    """As much of its chat tokenizer as documents need."""

    bos_id, eos_id = 5, 6

    def encode(self, text):
        return [len(word) for word in text.split()]

    def special_id(self, token):
        return {"<|eot_id|>": 6, "<|end_of_text|>": 7}.get(token)


def test_documents_end_as_the_base_of_a_chat_model_ends_them():
    encoded = tokenize_document("a bcd", Llama3())
    assert (encoded.tokens.tolist(), encoded.labels.tolist()) == ([5, 1, 3, 7], [IGNORE, 1, 3, 7])


def test_documents_and_conversations_mix_and_what_is_kept_out_is_whole_documents(folder):
    chat = {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "cat"}]}
    records = [chat, {"text": TEXTS[1] * 8}] * 4
    pipeline = make(folder, records, max_length=250, val_size=2.0)
    assert pipeline.num_samples > 6 and len(set(pipeline.dataset.picks[:, 1].tolist())) == 6
    lengths = pipeline.measured.lengths
    for id, (tokens, labels) in enumerate(samples_of(pipeline)):
        is_chat = pipeline.dataset.picks[id, 1] % 2 == 0
        assert len(tokens) == lengths[id]
        assert ((labels != IGNORE).sum() == len(labels) - 1) != is_chat


def test_an_inspection_shows_the_pieces(folder):
    expected = make(folder, [{"text": text} for text in TEXTS])
    found = inspect(
        open_datasets(expected.config, seed=3)[0],
        Config(model=MODEL, data=expected.config),
        load_tokenizer(str(folder)),
        decode=True,
        num_previews=2,
    )
    assert found.refusal is None and found.findings == []
    assert found.counts["samples"] == str(expected.num_samples) == "13"
    assert found.counts["supervised tokens"] == str(expected.summary()["supervised_tokens"])
    assert [preview.num_tokens <= 16 for preview in found.previews] == [True, True]


def test_dataset_info_names_the_column_of_the_text(folder):
    (folder / "c4.jsonl").write_text(json.dumps({"content": TEXTS[0], "url": "x"}))
    info = {"c4": {"file_name": "c4.jsonl", "formatting": "text", "columns": {"text": "content"}}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    pipeline = make(folder, [], path="", dataset="c4", dataset_dir=str(folder))
    assert samples_of(pipeline)[0][0].tolist() == of_text(folder, TEXTS[0])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": " "}, r"record 0: 'text' is empty; remove this record"),
        ({"text": "a", "image": "1.png"}, r"has 'text' and 'image', but a document is text alone"),
        ({"text": ["a"]}, r"'text' should be text, not a list"),
        ({"id": 7, "txt": "a"}, r"record 0 \(id 7\): 'conversations' should be a list of turns, not nothing"),
    ],
)
def test_records_that_are_no_documents_are_refused(folder, record, message):
    with pytest.raises(DataError, match=message):
        make(folder, [record])


def test_long_documents_are_refused_where_long_samples_are(folder):
    with pytest.raises(DataError, match=r"its 131 tokens exceed data\.max_length=16"):
        make(folder, [{"text": "a b c d " * 16}], too_long="error")


def test_tasks_without_answers_are_told_how_documents_are_read(folder):
    (folder / "c4.jsonl").write_text(json.dumps({"text": "A cat"}))
    info = {"c4": {"file_name": "c4.jsonl", "columns": {"prompt": "text"}}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(
        DataError, match=r"'output' should be .* 'formatting': 'text' and 'columns': \{'text': 'text'\}"
    ):
        make(folder, [], path="", dataset="c4", dataset_dir=str(folder))
