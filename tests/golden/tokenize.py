"""Set A: token ids and labels of conversations, ids of strings, and padded batches.

Each conversation and each batch is compared with both masks: "original" has to give the original's labels,
"assistant" too, except where the original lost a good conversation; then it has to learn what was said.
"""

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from llava_jax.data.batching import Sample, collate
from llava_jax.data.conversation import IGNORE, IMAGE_TOKEN, PLACEHOLDER, tokenize
from llava_jax.data.formats import LLAVA
from llava_jax.data.templates import Speaker, Template, get_template
from llava_jax.data.tokenizer_model import SentencePieceTokenizer
from llava_jax.errors import DataError
from tests.golden.files import read_bytes

MASKS = ("original", "assistant")


def check(folder: Path, tokenizer: Path | None) -> Iterator[tuple[str, str | None]]:
    if tokenizer is None:
        yield folder.name, "needs the Llama tokenizer.model that it was made with: give --tokenizer=PATH"
        return
    model = read_bytes(tokenizer)
    cases = {case["id"]: case for case in _lines(folder / "cases.jsonl")}
    for name, case in cases.items():
        for mask in MASKS:
            yield f"{name} mask={mask}", _compare_conversation(case, mask, _load(case, model))
    for case in _lines(folder / "tokenizer_strings.jsonl"):
        for legacy in (False, True):
            expected = case["legacy_true" if legacy else "legacy_false"]
            each = _tokenizer(model, legacy)
            yield f"{case['id']} legacy={legacy}", _compare_string(case["text"], expected, each)
    for case in _lines(folder / "collate.jsonl"):
        for mask in MASKS:
            rows = [cases[id] for id in case["case_ids"]]
            yield f"{case['id']} mask={mask}", _compare_batch(case, rows, mask, model)


def _lines(path: Path) -> list[dict]:
    try:
        text = read_bytes(path)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.decode().split("\n") if line.strip()]


def _load(case: dict, model: bytes) -> SentencePieceTokenizer:
    extra = list(case["extra_special_tokens"] or [])
    if case["template"] == "v0":
        extra.append("[PAD]")
    if case["mm_use_im_patch_token"]:
        extra.append("<im_patch>")
    if case["mm_use_im_start_end"]:
        extra += ["<im_start>", "<im_end>"]
    return _tokenizer(model, case["legacy"], *extra)


@functools.cache
def _tokenizer(model: bytes, legacy: bool, *extra_tokens: str) -> SentencePieceTokenizer:
    return SentencePieceTokenizer("tokenizer.model", model, legacy=legacy, extra_tokens=extra_tokens)


def _ours(case: dict, mask: str, tokenizer: SentencePieceTokenizer) -> tuple[list[int], list[int]]:
    """Our ids and labels of a case; DataError where we refuse it."""
    conversation = LLAVA.read({"conversations": case["conversations"]}, case["id"])
    template = get_template(case["template"])
    encoded = tokenize(
        conversation.turns,
        template,
        tokenizer,
        num_images=int(case["has_image"]),
        mask=mask,
        max_length=case["model_max_length"],
        image_markers=case["mm_use_im_start_end"],
    )
    # At this point the original cuts rows without an image only, and captions never.
    cut = None if case["has_image"] or template.caption_only else case["model_max_length"]
    return encoded.tokens[:cut].tolist(), encoded.labels[:cut].tolist()


def _compare_conversation(case: dict, mask: str, tokenizer: SentencePieceTokenizer) -> str | None:
    lost = case["mismatch_warning"] and mask != "original"
    try:
        tokens, labels = _ours(case, mask, tokenizer)
    except DataError as error:
        # Where the original masks all of a conversation, ours refuses it if there is no answer to a question.
        return None if case["error"] or (lost and not "".join(_answers(case))) else f"was refused: {error}"
    if case["error"]:
        return f"should have been refused ({case['error']['message']})"
    difference = _first_difference("input_ids", tokens, case["input_ids"])
    if difference:
        return difference
    if not lost:
        return _first_difference("labels", labels, _expected_labels(case["labels"]))
    # The original ignored this conversation by accident; learnt is what the assistant said, and how it ended.
    end = get_template(case["template"]).assistant.after
    learnt = tokenizer.decode([label for label in labels if label != IGNORE], skip_special_tokens=False)
    if tokenizer.special_id(end.strip()) is None:
        # The last token of an <|im_end|> in plain text spells the beginning of what follows too.
        learnt = re.sub(re.escape(end) + "<", end, learnt)
    said, learnt = (
        "".join(text.split())
        for text in ("".join(answer + end for answer in _answers(case) if answer), learnt)
    )
    return None if said == learnt else f"learnt {learnt[-60:]!r}, but the assistant said {said[-60:]!r}"


def _answers(case: dict) -> list[str]:
    """What the assistant says; the original drops an opening turn of it."""
    turns = case["conversations"][case["conversations"][0]["from"] == "gpt" :]
    return [turn["value"] for turn in turns if turn["from"] == "gpt"]


def _expected_labels(labels: list[int]) -> list[int]:
    """The original's labels, where the image placeholder's own id means nothing: the model ignores it."""
    return [IGNORE if label == IMAGE_TOKEN else label for label in labels]


def _compare_string(text: str, expected: dict, tokenizer: SentencePieceTokenizer) -> str | None:
    differences = [_first_difference("ids", tokenizer.encode(text), expected["no_special"])]
    if text.replace(PLACEHOLDER, ""):
        bare = Template("", Speaker("", "", ""), Speaker("", "", ""))
        tokens = tokenize([("gpt", text)], bare, tokenizer, num_images=2).tokens
        differences.append(_first_difference("image_token_ids", tokens.tolist(), expected["image_token_ids"]))
    if not tokenizer.legacy:  # the original's legacy decoding loses and adds spaces; ours returns the text
        for key, skip in (("decoded", False), ("decoded_skip_special", True)):
            decoded = tokenizer.decode(expected["input_ids"], skip_special_tokens=skip)
            differences.append(
                None if decoded == expected[key] else f"{key}: {decoded!r}, not {expected[key]!r}"
            )
    return next(filter(None, differences), None)


def _compare_batch(batch: dict, cases: list[dict], mask: str, model: bytes) -> str | None:
    limit = batch["model_max_length"]
    samples = []
    for case in cases:
        # What the original lost is compared case by case; here the other rows count.
        its_mask = "original" if case["mismatch_warning"] else mask
        tokens, labels = _ours(case, its_mask, _load(case, model))
        samples.append(Sample(np.array(tokens[:limit]), np.array(labels[:limit]), np.zeros((0, 1, 1, 3))))
    ours = collate(samples, length=max(len(sample.tokens) for sample in samples), num_images=0, image_size=1)
    for row in range(len(cases)):
        labels = _expected_labels(batch["labels"][row])
        attended = [int(bool(value)) for value in batch["attention_mask"][row]]
        difference = (
            _first_difference(f"row {row} input_ids", ours["tokens"][row].tolist(), batch["input_ids"][row])
            or _first_difference(f"row {row} labels", ours["labels"][row].tolist(), labels)
            or _first_difference(f"row {row} attention", ours["segment_ids"][row].tolist(), attended)
        )
        if difference:
            return difference
    return None


def _first_difference(name: str, ours: list[int], expected: list[int]) -> str | None:
    if len(ours) != len(expected):
        return f"{name}: {len(ours)} of them, not {len(expected)}"
    for index, (one, other) in enumerate(zip(ours, expected, strict=True)):
        if one != other:
            return f"{name}[{index}] is {one}, not {other}"
    return None
