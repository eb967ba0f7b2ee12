"""What is found in data, and the page that shows it."""

import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from llava_jax.config import Config, DataConfig, ModelConfig, VisionConfig
from llava_jax.data import inspection
from llava_jax.data.batching import Sample
from llava_jax.data.dataset import open_datasets
from llava_jax.data.inspection import Finding, Inspection, Preview, by_kind, inspect
from llava_jax.data.inspection_page import write_page
from llava_jax.data.tokenizer import load_tokenizer
from llava_jax.errors import DataError
from tests.tiny_tokenizer import write_tiny_tokenizer

MODEL = ModelConfig(vision=VisionConfig(image_size=8, patch_size=4))


@pytest.fixture
def folder(tmp_path):
    write_tiny_tokenizer(tmp_path / "tokenizer.model")
    for value in range(3):
        Image.new("RGB", (8, 8), (40 * value, 0, 0)).save(tmp_path / f"{value}.png")
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    (tmp_path / "broken one: it's.png").write_bytes((tmp_path / "whole.png").read_bytes()[:5000])
    (tmp_path / "text.png").write_text("no image")
    return tmp_path


def record(number, *images, answer="dog", question=None):
    question = "cat" if question is None else question
    places = "<image>" * len(images) if "<image>" not in question else ""
    turns = [{"from": "human", "value": places + question}, {"from": "gpt", "value": answer}]
    return {"id": number, "conversations": turns} | ({"image": list(images)} if images else {})


def good_records(count=10):
    return [record(f"good {number}", question="cat " * number) for number in range(1, count + 1)]


def write(folder, records, name="records.json"):
    (folder / name).write_text(json.dumps(records))
    return str(folder / name)


def look(folder, path, *, decode=True, num_previews=0, model=MODEL, evaluation=False, **settings):
    defaults = {"image_folder": str(folder), "max_length": 300, "cache_dir": "", "num_threads": 2}
    config = Config(model=model, data=DataConfig(path=path, **defaults | settings))
    training, evaluations = open_datasets(config.data, config.seed)
    dataset = evaluations[""] if evaluation else training
    tokenizer = load_tokenizer(str(folder))
    return inspect(dataset, config, tokenizer, decode=decode, num_previews=num_previews)


BROKEN = {
    "'conversations' should be a list of turns, not nothing.": {"id": "x"},
    "should be an object with 'conversations', not text.": "text",
    "'value' should be text, not a number.": {
        "id": "x",
        "conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": "dog"}],
    },
    "comes from 'gpt' where 'human' should speak; turns alternate between 'human' and 'gpt'.": {
        "id": "x",
        "conversations": [{"from": speaker, "value": "cat"} for speaker in ("human", "gpt", "gpt", "gpt")],
    },
    "there is nothing to learn: the assistant says nothing.": record("x", answer=""),
    "its text has 1 <image> for 2 images; write one for each.": record(
        "x", "0.png", "1.png", question="<image>"
    ),
    "its text has <image>, but it names no image; add 'image' or take that out.": record(
        "x", question="<image>"
    ),
    "image 'none.png' is not in image_folder 'FOLDER'.": record("x", "none.png"),
    "FOLDER/text.png: is not an image in one of the formats JPEG, PNG, WEBP, GIF, BMP, TIFF.": record(
        "x", "text.png"
    ),
    "FOLDER/broken one: it's.png: the image cannot be decoded (OSError: image file is truncated).": record(
        "x", "broken one: it's.png"
    ),
}


@pytest.mark.parametrize("title", BROKEN, ids=lambda title: title[:30])
def test_each_kind_of_problem_is_found_and_keeps_training_from_starting(folder, title):
    found = look(folder, write(folder, [*good_records(), BROKEN[title]]))
    (finding,) = found.findings
    assert finding.count == 1
    assert finding.title == title.replace("FOLDER", str(folder))
    (message,) = finding.messages
    assert message.startswith("record 10") and message.endswith(": " + finding.title)
    assert "records.json: 1 problem; correct or remove these records:" in str(found.refusal)
    assert message in str(found.refusal)
    assert (found.counts["samples"], found.counts["unusable"]) == ("11", "1")


def test_json_that_is_broken_is_a_problem_of_its_line(folder):
    lines = [json.dumps(record) for record in good_records(3)]
    (folder / "records.jsonl").write_text("\n".join([lines[0], lines[1][:-1], lines[2]]))
    (finding,) = look(folder, str(folder / "records.jsonl")).findings
    assert re.match(r"record 1: .*/records\.jsonl:2:\d+: broken JSON", finding.messages[0])


def test_sound_data_has_no_findings_and_exact_counts(folder):
    records = [record(0, "0.png", "1.png", answer="dog dog"), record(1), record(2, "0.png", answer="cat")]
    found = look(folder, write(folder, records), template="plain", mask="everything", max_samples=1)
    # <s>, two images of four tokens, _dog _dog \n
    assert found.counts == {
        "samples": "1",
        "unusable": "0",
        "with images": "1",
        "text only": "0",
        "truncated": "0",
        "with nothing to learn": "0",
        "images": "2",
        "tokens": "12",
        "supervised tokens": "3",
        "tokens of the longest sample": "12",
        "tokens of a sample, median": "12",
        "share of supervised tokens": "25.0%",
    }
    assert (found.findings, found.refusal) == ([], None)
    assert found.files == "records.json: 1 samples from 3 records"
    assert {name: values.tolist() for name, values in found.histograms.items()} == {
        "tokens per sample, before truncation": [12],
        "supervised tokens per sample": [3],
        "images per sample": [2],
    }


def test_messages_of_one_kind_are_counted_together_and_say_what_they_share(folder):
    names = ["cats/a.png", "it's.png", 'he said "it\'s: 3".png', "b: c (d).png"]
    records = [
        record("a): b", names[0]),
        record("(id 'x'): ", names[1]),
        record("both \"'", names[2]),
        record(7, names[3]),
    ]
    (finding,) = look(folder, write(folder, records)).findings
    assert finding.count == 4
    assert finding.title == f"image ... is not in image_folder {str(folder)!r}."
    assert finding.messages[1] == (
        f'record 1 (id "(id \'x\'): "): image "it\'s.png" is not in image_folder {str(folder)!r}.'
    )


def test_unreadable_images_are_one_kind_whatever_they_are_called(folder):
    names = ["one.png", "two words.png", "it's 3: b.png", "record 5: four.png"]
    for name in names:
        (folder / name).write_text("no image")
    records = [record(number, name) for number, name in enumerate(names)]
    (finding,) = look(folder, write(folder, records)).findings
    assert finding.count == 4
    assert finding.title == "...: is not an image in one of the formats JPEG, PNG, WEBP, GIF, BMP, TIFF."


def test_an_apostrophe_opens_no_quotation(folder):
    dataset = open_datasets(DataConfig(path=write(folder, good_records(2)), image_folder=str(folder)), 0)[0]
    problems = {0: "record 0: the record's 'a' and 'x'.", 1: "record 1: the record's 'b' and 'x'."}
    (finding,) = by_kind(dataset, problems)
    assert finding.title == "the record's ... and 'x'."


def test_kinds_that_differ_in_words_are_apart_and_the_most_frequent_is_first(folder):
    records = [record(0, answer=""), {"id": 1}, {"id": 2, "conversations": []}, {"id": 3}]
    found = look(folder, write(folder, records))
    assert [(finding.count, finding.title) for finding in found.findings] == [
        (2, "'conversations' should be a list of turns, not nothing."),
        (1, "there is nothing to learn: the assistant says nothing."),
        (1, "'conversations' should be a list of turns, not an empty list."),
    ]


def test_records_of_several_files_are_named_with_their_file(folder):
    first = write(folder, [*good_records(4), record(5, "none.png")], "record 3: first.json")
    second = write(folder, [record(6, "nowhere.png"), record(7)], "second.json")
    found = look(folder, f"{first},{second}")
    (finding,) = found.findings
    assert finding.title == f"image ... is not in image_folder {str(folder)!r}."
    assert [message.partition(" (id")[0] for message in finding.messages] == [
        "record 3: first.json: record 4",
        "second.json: record 0",
    ]
    assert found.files.splitlines() == [
        "record 3: first.json: 5 samples from 5 records",
        "second.json: 2 samples from 2 records",
    ]
    assert str(found.refusal).startswith("record 3: first.json, second.json: 2 problems; ")


def test_counts_stay_exact_beyond_the_messages_that_are_kept(folder, monkeypatch):
    monkeypatch.setattr(inspection, "MAX_MESSAGES", 3)
    records = [record(number, answer="") for number in range(5)] + [record("same")] * 5
    problems, duplicates = look(folder, write(folder, records)).findings
    assert (problems.count, len(problems.messages)) == (5, 3)
    assert (duplicates.count, len(duplicates.messages)) == (4, 3)


def test_duplicates_are_found_across_files_and_repeated_samples_are_none(folder):
    first = write(folder, [record(1, "0.png"), record(2, "1.png"), record(3)], "first.json")
    other = dict(record(5)) | {"system": "dog"}
    second = write(folder, [record(4, "1.png"), other, record(6, answer="cat")], "second.json")
    found = look(folder, f"{first},{second}", weights=(2.0, 1.0))
    assert found.counts["samples"] == "9"
    (finding,) = found.findings
    assert finding == Finding(
        "the same as an earlier record",
        1,
        [
            "second.json: record 0 (id 4): has the images and the conversation of first.json: record 1 (id 2).",
        ],
    )


def test_truncation_is_told_apart_from_having_nothing_left(folder):
    records = [*good_records(20), record(20, question="cat " * 200), record(21, answer="dog " * 200)]
    found = look(folder, write(folder, records), max_length=200, mask="everything")
    assert [(finding.count, finding.title) for finding in found.findings] == [(2, "cut to data.max_length")]
    found = look(folder, write(folder, records), max_length=200)
    nothing, cut = found.findings
    assert (nothing.count, nothing.title) == (1, "nothing is learnt")
    assert re.fullmatch(
        r"record 20 \(id 20\): 200 of 3\d\d tokens are kept, 0 of them learnt\.", nothing.messages[0]
    )
    assert (cut.count, cut.title) == (1, "cut to data.max_length")
    assert found.refusal is None  # one in 22
    assert (found.counts["truncated"], found.counts["with nothing to learn"]) == ("2", "1")


def test_bad_samples_may_be_skipped_up_to_a_share(folder):
    path = write(folder, [*good_records(20), record(20, "text.png"), record(21, "none.png")])
    found = look(folder, path, on_bad_sample="skip", max_bad_share=0.1)
    assert (found.refusal, found.counts["unusable"]) == (None, "2")
    found = look(folder, path, on_bad_sample="skip", max_bad_share=0.05)
    assert "2 of 22 samples cannot be used, more than data.max_bad_share=0.05" in str(found.refusal)


def test_images_are_decoded_once_if_at_all(folder, monkeypatch):
    reads, read = [], inspection.ImageProcessor.read

    def noting(self, path, **how):
        reads.append(path)
        return read(self, path, **how)

    monkeypatch.setattr(inspection.ImageProcessor, "read", noting)
    path = write(folder, [record(number, "0.png", "text.png") for number in range(5)])
    (finding,) = look(folder, path, num_threads=0).findings
    assert finding.count == 5
    assert sorted(reads) == [str(folder / "0.png"), str(folder / "text.png")]
    reads.clear()
    found = look(folder, path, decode=False)
    assert (found.counts["unusable"], reads) == ("0", [])
    assert [finding.title for finding in found.findings] == ["the same as an earlier record"]


def test_images_behind_the_cut_are_not_decoded(folder):
    turns = record(0, "0.png")["conversations"] + record(0, "text.png", answer="dog " * 400)["conversations"]
    records = [*good_records(), {"id": 0, "image": ["0.png", "text.png"], "conversations": turns}]
    (finding,) = look(folder, write(folder, records)).findings
    assert finding.title == "cut to data.max_length"


def test_evaluation_data_is_looked_at_on_its_own(folder):
    path = write(folder, good_records())
    bad = write(folder, [record(0, answer=""), record(1)], "evaluation.json")
    assert look(folder, path, eval_path=bad).refusal is None
    found = look(folder, path, eval_path=bad, evaluation=True)
    assert str(found.refusal).startswith("evaluation.json: 1 problem;")
    assert found.files == "evaluation.json: 2 samples from 2 records"


def test_data_of_which_nothing_can_be_used_is_still_reported(folder, tmp_path):
    found = look(folder, write(folder, [{"id": 0}, {"id": 1}]), num_previews=3)
    assert found.counts["tokens of the longest sample"] == found.counts["tokens of a sample, median"] == "0"
    assert (found.counts["share of supervised tokens"], found.previews) == ("0.0%", [])
    page = read_page(found, tmp_path)
    assert "2 'conversations' should be a list of turns, not nothing." in page.text
    assert "Lengths" not in page.text and "Samples" not in page.text


def test_a_preview_shows_what_is_learnt(folder):
    records = [record("one", "2.png", question="What is this?", answer="A cat.")]
    (preview,) = look(folder, write(folder, records), num_previews=3).previews
    assert preview.name == "record 0 (id 'one')"
    system, place, question, answer = preview.pieces
    assert system[0].startswith("<s> A chat between") and system[0].endswith("USER: ") and system[1] == ""
    assert place == (" 4 image tokens ", "image")
    # The tokenizer puts a space in front of the text behind an image.
    assert question == (" \nWhat is this? ASSISTANT:", "")
    assert answer == (" A cat.</s>", "learnt")
    assert preview.images.shape == (1, 8, 8, 3) and preview.images[0, 0, 0].tolist() == [80, 0, 0]
    assert preview.num_tokens == int(
        look(folder, write(folder, records)).counts["tokens of the longest sample"]
    )


def test_previews_differ_among_themselves_and_are_the_same_each_time(folder):
    path = write(folder, good_records(30))
    names = [[p.name for p in look(folder, path, num_previews=5).previews] for _ in range(2)]
    assert names[0] == names[1] and len(set(names[0])) == 5
    assert names[0] != [f"record {number}" for number in range(5)]


def test_previews_pass_over_what_cannot_be_read(folder):
    path = write(folder, [record(number, "text.png") for number in range(6)] + [record(6, "0.png")])
    (preview,) = look(folder, path, decode=False, num_previews=4).previews
    assert preview.name == "record 6 (id 6)"


@pytest.mark.parametrize("text", ["\u732b and dog", "na\u00efve \U0001f431 cat \U0001f436"])
def test_characters_of_several_tokens_are_shown_whole_wherever_the_mask_changes(folder, text):
    tokenizer = load_tokenizer(str(folder))
    tokens = np.array(tokenizer.encode(text), np.int32)
    for boundary in range(1, len(tokens)):
        labels = np.where(np.arange(len(tokens)) < boundary, -100, tokens)
        pieces = inspection._pieces(Sample(tokens, labels, np.zeros((0, 8, 8, 3), np.uint8), None), tokenizer)
        assert "".join(piece for piece, _ in pieces) == text
        assert [kind for _, kind in pieces] == ["", "learnt"]
    # Cut within its last character, a text ends with what is left of that.
    cut = tokens[: len(tokenizer.encode("\u732b")) - 1]
    pieces = inspection._pieces(Sample(cut, cut, np.zeros((0, 8, 8, 3), np.uint8), None), tokenizer)
    assert "\ufffd" in pieces[0][0] or text[0] != "\u732b"


class Page(HTMLParser):
    """A page with its elements; raises AssertionError where tags are not properly closed."""

    VOID = ("meta", "img")

    def __init__(self, html: str):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.inside = {}  # "tag.class" -> texts of such elements
        self.feed(html)
        self.close()
        assert self.open == []
        self.text = " ".join("".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag not in self.VOID:
            key = f"{tag}.{attributes.get('class', '')}"
            self.open.append((tag, key))
            self.inside.setdefault(key, []).append("")

    def handle_endtag(self, tag):
        assert self.open and self.open.pop()[0] == tag

    def handle_data(self, data):
        if not any(tag == "style" for tag, _ in self.open):
            self.texts.append(data)
        for _, key in self.open:
            self.inside[key][-1] += data

    def images(self):
        urls = [attributes["src"] for tag, attributes in self.tags if tag == "img"]
        return [Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2]))) for url in urls]


def read_page(found, folder, name="training data") -> Page:
    write_page(folder / "page.html", "Data of <test>", {name: found})
    return Page((folder / "page.html").read_text(encoding="utf-8"))


EMPTY = Inspection("records.json", None, {"samples": "1"}, [], {}, [])


def test_the_page_shows_everything(folder, tmp_path):
    records = [record("one", "2.png", answer="A cat."), record("same"), record("again")]
    page = read_page(look(folder, write(folder, records), num_previews=3), tmp_path)
    assert page.inside["h1."] == ["Data of <test>"]
    assert page.inside["h2."] == ["training data"]
    assert page.inside["p.verdict good"] == ["Training may start."]
    assert "samples3" in page.text.replace(" ", "")
    assert page.inside["summary."] == ["1 the same as an earlier record"]
    assert page.inside["li."] == [
        "record 2 (id 'again'): has the images and the conversation of record 1 (id 'same')."
    ]
    assert sorted(page.inside["mark.learnt"]) == [" A cat.</s>", " dog</s>", " dog</s>", "green"]
    assert page.inside["span.image"] == ["blue", " 4 image tokens "]
    (image,) = page.images()
    assert (image.size, image.getpixel((0, 0))) == ((8, 8), (80, 0, 0))
    assert sorted(page.inside["h4."])[0].startswith("record 0 (id 'one'), ")
    assert not re.search(r"https?:|<script|<link|url\(", (tmp_path / "page.html").read_text())


def test_a_refusal_is_the_verdict(tmp_path):
    page = read_page(dataclasses.replace(EMPTY, refusal=DataError("<b>: 3 problems\n  one")), tmp_path)
    assert page.inside["p.verdict bad"] == ["<b>: 3 problems\n  one"]
    assert "p.verdict good" not in page.inside


def test_text_cannot_become_markup(folder, tmp_path):
    odd = "<script>alert('\"')</script> & &lt; \u202e\u0000 \U0001f431 </div>"
    records = [
        record(odd, question=odd, answer=odd),
        record(odd, answer=""),
        record("<b>", "</li><script>.png"),
    ]
    page = read_page(
        look(folder, write(folder, records), num_previews=1, on_bad_sample="skip"), tmp_path, odd
    )
    assert "script" not in {tag for tag, _ in page.tags} and "b" not in {tag for tag, _ in page.tags[:20]}
    (learnt,) = [text for text in page.inside["mark.learnt"] if text != "green"]
    assert odd.replace("\u0000", "") in learnt.replace("\u0000", "").replace("\ufffd", "")
    assert any("</li><script>.png" in message for message in page.inside["li."])


def test_names_that_are_no_proper_text_do_not_stop_the_page(tmp_path):
    page = read_page(dataclasses.replace(EMPTY, files="records\udcff.json: 3"), tmp_path)
    assert "records\\udcff.json: 3" in page.text


def histogram(tmp_path, values):
    """The bars of a page's histogram: what each says, and its height."""
    page = read_page(dataclasses.replace(EMPTY, histograms={"tokens": np.array(values, np.int32)}), tmp_path)
    bars = [attributes for tag, attributes in page.tags if tag == "rect"]
    said = page.inside.get("title.", [])[1:]
    caption = page.inside.get("figcaption.", [""])[0]
    return [(text, float(bar["height"])) for text, bar in zip(said, bars, strict=True)], caption


def test_histograms_count_whole_numbers(tmp_path):
    assert histogram(tmp_path, [1, 1, 1, 1, 3, 3]) == (
        [("1: 4", 120.0), ("2: 0", 0.0), ("3: 2", 60.0)],
        "tokens: median 1, mean 1.7, most 3",
    )
    assert histogram(tmp_path, [1] * 1000 + [2])[0] == [("1: 1,000", 120.0), ("2: 1", 1.0)]  # to be seen
    assert histogram(tmp_path, [7, 7])[0] == [("7: 2", 120.0)]
    bars, _ = histogram(tmp_path, [*range(1000, 3000), 2999, 2999])
    assert len(bars) <= 40
    assert bars[0][0] == "1,000 to 1,049: 50" and bars[-1][0] == "2,950 to 2,999: 52"
    counts = [int(text.rpartition(": ")[2]) for text, _ in bars]
    assert sum(counts) == 2002
    assert histogram(tmp_path, []) == ([], "")


def test_large_images_are_shrunk_and_many_are_cut_off(tmp_path):
    images = np.zeros((20, 336, 336, 3), np.uint8)
    images[:, :, 168:] = 255
    preview = Preview("record 0", 9, images, [("a", "")])
    page = read_page(dataclasses.replace(EMPTY, previews=[preview]), tmp_path)
    assert [image.size for image in page.images()] == [(224, 224)] * 9
    image = np.asarray(page.images()[0])
    assert image[:, :100].max() < 30 and image[:, 124:].min() > 225
    assert "... and 11 more images" in page.text


def test_tiles_are_shown(folder, tmp_path):
    Image.new("RGB", (16, 8), (0, 200, 0)).save(folder / "wide.png")
    model = dataclasses.replace(MODEL, image_grid_pinpoints=((16, 8),), patch_merge_type="spatial_unpad")
    path = write(folder, [record(0, "wide.png")])
    found = look(folder, path, num_previews=1, image_aspect_ratio="anyres", model=model)
    (preview,) = found.previews
    assert len(preview.images) == 3  # the whole and two tiles
    # 4 tokens of the whole, 2 rows of 4 and an end of row in the tiles.
    assert (" 14 image tokens ", "image") in preview.pieces
    assert len(read_page(found, tmp_path).images()) == 3


def test_the_page_holds_back_what_is_too_much(tmp_path):
    findings = [Finding(f"kind {number}", 5000, ["one", "two"]) for number in range(150)]
    page = read_page(dataclasses.replace(EMPTY, findings=findings), tmp_path)
    assert len(page.inside["summary."]) == 100
    assert "... and 50 more kinds" in page.text
    assert page.inside["li."][:3] == ["one", "two", "... and 4,998 more"]


def test_many_problems_are_grouped_quickly(folder):
    dataset = open_datasets(DataConfig(path=write(folder, good_records(1)), image_folder=str(folder)), 0)[0]
    message = "record {0} (id 'a{0}'): image 'train_{0}.png' is not in image_folder '/data'."
    many = dataclasses.replace(dataset, picks=np.zeros((20_000, 2), np.int64))
    (finding,) = by_kind(many, {number: message.format(number) for number in range(20_000)})
    assert (finding.count, len(finding.messages)) == (20_000, 1000)
    assert finding.title == "image ... is not in image_folder '/data'."
