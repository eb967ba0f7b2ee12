"""Answers to samples that are kept out of training: what is asked, by which network, how it is scored and shown."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from llava_jax import answer_samples, trainer
from llava_jax.answer_samples import AnswerSamples
from llava_jax.answers_page import to_page
from llava_jax.config import ConfigError, DataConfig, EvaluateConfig, MeshConfig
from llava_jax.convert.source import Leaf
from llava_jax.data.conversation import IMAGE_TOKEN
from llava_jax.data.dataset import open_datasets
from llava_jax.data.image_processor import ImageProcessor
from llava_jax.data.pipeline import Pipeline
from llava_jax.data.questions import make_questions, readable
from llava_jax.data.templates import get_template
from llava_jax.data.tokenizer import load_tokenizer
from llava_jax.errors import DataError
from llava_jax.evaluation import ask, predict
from llava_jax.final_evaluation import check_asked
from llava_jax.generation import open_generator
from llava_jax.program import Program
from llava_jax.recipe import parse
from llava_jax.scores import is_match, rouge_l
from llava_jax.sharding import make_mesh
from llava_jax.tuned_weights import restored
from llava_jax.tuning import kernel_name
from llava_jax.weights import before_stage, initial_weights, load

CHAT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. "
)


def test_answers_match_whatever_their_case_and_spaces():
    assert is_match(" A  Red\nsquare", "a red square ")
    assert not is_match("a red square.", "a red square")


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence_of_words():
    assert rouge_l("police killed the gunman", "police kill the gunman") == pytest.approx(0.75)
    assert rouge_l("the gunman kill police", "police kill the gunman") == pytest.approx(0.5)
    assert rouge_l("The cat!", "the cat sat on the mat") == pytest.approx(2 * 2 / (2 + 6))
    assert (rouge_l("", "a"), rouge_l("a", "b"), rouge_l("", "")) == (0.0, 0.0, 1.0)


def write_records(folder, *records) -> str:
    (folder / "images").mkdir()
    for name in "ab":
        Image.new("RGB", (40, 20), "red" if name == "a" else "blue").save(folder / f"images/{name}.png")
    (folder / "data.json").write_text(json.dumps(records))
    return str(folder / "data.json")


def says(*texts) -> list[dict]:
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


def questions_of(config: DataConfig, model, tokenizer_path, max_length=200):
    dataset, _ = open_datasets(config, seed=0)
    processor = ImageProcessor.from_config(config, model)
    tokenizer = load_tokenizer(tokenizer_path)
    ids = range(len(dataset))
    return make_questions(
        dataset, ids, get_template("v1"), tokenizer, processor, max_length=max_length
    ), tokenizer


def test_the_last_answer_is_asked_for_after_the_tokens_that_training_has_there(
    tiny_config, shapes_dataset, tmp_path
):
    path = write_records(
        tmp_path,
        {"id": "x", "image": "a.png", "conversations": says("<image>\nWhat?", "A ring.", "Color?", " red ")},
        {"id": "y", "image": ["a.png", "b.png"], "conversations": says("<image> or <image>?", "b")},
        {"id": "z", "conversations": says("Hello", "Hi", "Bye")},
        {"id": "w", "conversations": says("What is it? " * 60, "So much.")},
    )
    config = dataclasses.replace(tiny_config.data, path=path, image_folder=str(tmp_path / "images"))
    tokenizer_path = f"{shapes_dataset}/tokenizer.model"
    (questions, problems), tokenizer = questions_of(config, tiny_config.model, tokenizer_path)
    x, y, z = questions
    assert x.prompt == f"{CHAT}USER: <image>\nWhat? ASSISTANT: A ring.</s>USER: Color? ASSISTANT:"
    assert (x.asked, x.reference, len(x.images), x.num_tiles) == ("Color?", "red", 1, 1)
    assert x.length == len(x.tokens) + tiny_config.model.num_image_tokens - 1
    before, after = tokenizer.encode(f"{CHAT}USER: "), tokenizer.encode("\nWhat? ASSISTANT: A ring.")
    expected = [tokenizer.bos_id, *before, IMAGE_TOKEN, *after, tokenizer.eos_id]
    assert x.tokens[: len(expected)].tolist() == expected
    assert tokenizer.decode(x.tokens[len(expected) :]) == "USER: Color? ASSISTANT:"
    assert (y.asked, [path[-5:] for path in y.images]) == ("or ?", ["a.png", "b.png"])
    assert (z.prompt, z.reference, z.asked) == (f"{CHAT}USER: Hello ASSISTANT:", "Hi", "Hello")
    assert len(problems) == 1
    assert "record 3 (id 'w'): its first question takes" in problems[0]
    assert "of which 200 leave room for an answer" in problems[0]


def test_where_the_last_answer_finds_no_room_the_one_before_is_asked_for(
    tiny_config, shapes_dataset, tmp_path
):
    turns = says("<image>\nWhat?", "A ring.", "And? " * 60, "red")
    path = write_records(tmp_path, {"image": "a.png", "conversations": turns})
    config = dataclasses.replace(tiny_config.data, path=path, image_folder=str(tmp_path / "images"))
    (questions, _), _ = questions_of(config, tiny_config.model, f"{shapes_dataset}/tokenizer.model")
    assert [question.reference for question in questions] == ["A ring."]
    processor = ImageProcessor.from_config(config, tiny_config.model)
    assert readable(questions, processor) == (questions, [])
    (tmp_path / "images/a.png").write_bytes(b"no picture")
    kept, problems = readable(questions, processor)
    assert kept == [] and problems[0].startswith("record 0: ") and "a.png" in problems[0]


class Fake:
    """A generator that answers with a number that its prompt holds, and notes how it is called."""

    def __init__(self, config, processor):
        self.config, self.image_processor, self.calls = config, processor, []

    def complete(self, prompts, images, **how):
        self.calls.append((len(prompts), how["length"], how["slots"]))
        return [str(len(prompt)) for prompt in prompts]


def test_alike_questions_are_asked_together_in_few_shapes_and_every_answer_is_its_own(tiny_config):
    sizes = [5, 90, 7, 40, 6, 33, 8]
    questions = [
        SimpleNamespace(
            name=str(size),
            prompt="p",
            asked="a",
            reference="7",
            tokens=np.zeros(size, np.int32),
            length=size,
            num_tiles=int(size == 90),
            images=(),
            layouts=(),
            read=lambda processor: [],
        )
        for size in sizes
    ]
    fake = Fake(tiny_config.model, None)
    config = EvaluateConfig(batch_size=3, max_new_tokens=4)
    assert ask(fake, questions, config) == [str(size) for size in sizes]
    assert fake.calls == [(3, 32, 0), (3, 64, 0), (3, 96, 1)]
    results, rows = predict(fake, {"one": questions[:3], "two": questions[3:]}, config)
    assert (results["eval_exact_match"], results["eval_predicted"]) == (pytest.approx(1 / 7), 7)
    assert (results["eval_one_exact_match"], results["eval_two_exact_match"]) == (pytest.approx(1 / 3), 0.0)
    assert rows[2] == {
        "set": "one",
        "sample": "7",
        "images": [],
        "prompt": "p",
        "predict": "7",
        "label": "7",
    } | {
        "exact_match": True,
        "rouge_l": 1.0,
    }
    assert predict(fake, {"": []}, config) == ({"eval_predicted": 0}, [])


def make_samples(config, folder, count=3) -> AnswerSamples:
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, val_size=8.0),
        evaluate=EvaluateConfig(samples=count, max_new_tokens=4),
    )
    _, sets = open_datasets(config.data, config.seed)
    tokenizer = load_tokenizer(config.init.tokenizer)
    images = ImageProcessor.from_config(config.data, config.model)
    pipelines = {
        name: Pipeline(config.data, data, tokenizer=tokenizer, images=images, seed=0)
        for name, data in sets.items()
    }
    return AnswerSamples(config, pipelines, tokenizer, folder)


def parameters_of(config, mesh) -> tuple[dict, dict]:
    """What trains, drawn so that adapters change something, and what does not, as a stage holds it."""
    program = Program(config, mesh, 1)
    weights = before_stage(initial_weights(config), config)
    place = program.parameter_sharding
    trainable = load(weights, program.abstract_trainable(), jnp.float32, place)
    for number, (name, value) in enumerate(sorted(trainable.items())):
        if name.endswith("lora_b"):
            drawn = np.random.default_rng(number).normal(0, 0.3, value.shape).astype(np.float32)
            trainable[name] = jax.device_put(drawn, value.sharding)
    names = dict.fromkeys(map(kernel_name, program.abstract_frozen()))
    return trainable, load(weights, names, jnp.float32, place, quantized=program.quantized())


@pytest.fixture
def with_adapters(tiny_recipe):
    tiny_recipe.tune.language_model = "lora"
    tiny_recipe.lora.update(rank=4, dropout=0.1)
    return tiny_recipe


def test_a_network_with_adapters_says_what_the_merged_one_says(with_adapters, tmp_path):
    config = parse(with_adapters).first
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    trainable, frozen = parameters_of(config, mesh)
    samples = make_samples(config, tmp_path)
    said = [row["predict"] for row in samples.answer(5, trainable | frozen, mesh)]
    plain = {name: value for name, value in trainable.items() if not name.endswith("lora_b")}
    zeros = {name: jnp.zeros_like(value) for name, value in trainable.items() if name.endswith("lora_b")}
    assert said != [row["predict"] for row in samples.answer(6, plain | zeros | frozen, mesh)]

    assert said == said_by_the_model_itself(trainable, samples, mesh)


def test_a_decoder_in_parts_says_what_the_whole_one_says(tiny_recipe, tmp_path):
    tiny_recipe.tune.update(language_model="partial", language_model_layers="-1:")
    config = parse(tiny_recipe).first
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    trainable, frozen = parameters_of(config, mesh)
    samples = make_samples(config, tmp_path)
    said = [row["predict"] for row in samples.answer(5, trainable | frozen, mesh)]
    assert any(said)
    assert said == said_by_the_model_itself(trainable, samples, mesh)


def said_by_the_model_itself(trainable, samples, mesh) -> list[str]:
    """The answers of the network that an export would hold."""
    config = samples.config
    leaves = {
        name: Leaf(value.shape, np.dtype(np.float32), lambda index=(), value=value: np.asarray(value)[index])
        for name, value in trainable.items()
    }
    weights = before_stage(initial_weights(config), config).with_leaves(leaves)
    generator = open_generator(
        restored(weights, config),
        samples.tokenizer,
        mesh,
        template="v1",
        dtype="float32",
        data=config.data,
    )
    return ask(generator, samples.questions[""], config.evaluate)


def test_a_quantised_network_over_a_mesh_says_what_it_says_on_one_device(with_adapters, tmp_path):
    with_adapters.lora.quantization = "int8"
    said = []
    for sizes, count in (((1, 1, 1), 1), ((1, 4, 2), 8)):
        with_adapters.mesh.update(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])
        config = parse(with_adapters).first
        mesh = make_mesh(MeshConfig(*sizes), jax.devices()[:count])
        trainable, frozen = parameters_of(config, mesh)
        rows = make_samples(config, tmp_path).answer(5, trainable | frozen, mesh)
        said.append([row["predict"] for row in rows])
    assert said[0] == said[1] and len(set(said[0])) > 1


def test_what_an_interrupted_run_asked_later_is_forgotten(tiny_config, tmp_path, monkeypatch):
    samples = make_samples(tiny_config, tmp_path, count=20)
    assert len(samples.questions[""]) == 8  # there are no more
    monkeypatch.setattr(answer_samples, "ask", lambda generator, questions, config: ["?"] * len(questions))
    for step in (4, 8, 12):
        samples.answer(step, {}, None)
    samples.forget_after(8)
    assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == ["4.jsonl", "8.jsonl"]
    samples.answer(9, {}, None)
    page = (tmp_path / "index.html").read_text()
    assert page.count("<article>") == 8
    assert [page.index(f"<td>{step}</td>") for step in (9, 8, 4)] == sorted(
        page.index(f"<td>{step}</td>") for step in (9, 8, 4)
    )
    assert "<td>12</td>" not in page


def test_a_full_disk_does_not_end_the_run(tiny_config, tmp_path, monkeypatch, capsys):
    samples = make_samples(tiny_config, tmp_path / "file/answers")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(answer_samples, "ask", lambda generator, questions, config: ["?"] * len(questions))
    assert len(samples.answer(1, {}, None)) == 3
    assert "cannot be written now" in capsys.readouterr().err


def test_pictures_that_cannot_be_read_are_not_chosen(tiny_config, tmp_path, monkeypatch):
    original = ImageProcessor.read
    chosen = make_samples(tiny_config, tmp_path, count=2).questions[""]

    def read(self, path, *, is_frame=False):
        if path == chosen[0].images[0]:
            raise DataError(f"{path}: is broken")
        return original(self, path, is_frame=is_frame)

    monkeypatch.setattr(ImageProcessor, "read", read)
    others = make_samples(tiny_config, tmp_path, count=2).questions[""]
    assert len(others) == 2 and chosen[0].name not in [question.name for question in others]
    monkeypatch.setattr(ImageProcessor, "read", read_nothing)
    with pytest.raises(
        DataError, match=r"evaluate\.samples=2: nothing of the evaluation set can be asked; record"
    ):
        make_samples(tiny_config, tmp_path, count=2)


def read_nothing(self, path, *, is_frame=False):
    raise DataError(f"{path}: is broken")


def test_questions_without_room_for_an_answer_are_found_before_training(tiny_recipe, tmp_path):
    tiny_recipe.mesh.data, tiny_recipe.data.val_size = -1, 8
    tiny_recipe.evaluate.update(predict_with_generate=True, max_new_tokens=250)
    with pytest.raises(
        DataError, match=r"evaluate\.predict_with_generate=True: nothing of the evaluation set can be asked"
    ):
        trainer.run(parse(tiny_recipe), tmp_path / "run")


def test_the_page_escapes_what_it_shows_and_needs_no_other_file():
    row = {
        "set": "<s>",
        "sample": "<r>",
        "asked": "<q>",
        "prompt": "<p>",
        "label": "<l>",
        "images": ["gone.png"],
    }
    rows = [row | {"step": step, "predict": f"<a{step}>", "exact_match": step == 2} for step in (1, 2)]
    page = to_page("<t>", rows)
    assert not [tag for tag in ("<s>", "<r>", "<q>", "<l>", "<a1>", "<t>") if tag in page]
    assert '<tr class="right"><td>2</td><td class="text">&lt;a2&gt;</td></tr>' in page
    assert "gone.png" in page and "http" not in page


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"samples": 2},
            "evaluate.samples answers samples that are kept out of training, but there are none",
        ),
        ({"predict_with_generate": True}, "evaluate.predict_with_generate answers samples"),
    ],
)
def test_answers_without_anything_to_answer_are_refused(tiny_config, changes, message):
    config = dataclasses.replace(tiny_config, evaluate=EvaluateConfig(**changes))
    with pytest.raises(ConfigError, match=message):
        check_asked([SimpleNamespace(config=config, evaluations={})], None)
