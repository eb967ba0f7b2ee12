"""Generation against Hugging Face's, batches against single rows, sampling's limits, and quantised networks."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llava_jax import generation
from llava_jax.config import ConfigError, EvaluateConfig, MeshConfig
from llava_jax.convert.opening import open_model
from llava_jax.convert.source import ModelSource
from llava_jax.data.question_file import read_questions
from llava_jax.data.tokenizer import load_tokenizer
from llava_jax.decoding import GREEDY, Sampling, _narrowed, continue_prompts, read_prompts
from llava_jax.evaluation import evaluate
from llava_jax.generation import Generator, left_pad, open_generator
from llava_jax.models.llava import IMAGE_TOKEN
from llava_jax.models.quantization import Quantization
from llava_jax.sharding import make_mesh
from llava_jax.step import abstract_model
from llava_jax.weights import complete
from tests.test_models import HF_IMAGE_TOKEN, llama, make_hf_model
from tests.test_quantization import with_unpacked_kernels
from tests.test_sharding import collectives

NO_END = -1  # no token ends a row, so that all new tokens are compared


def placed(source, prompts, images):
    """A network's parameters and structure, and the prompts as its batch."""
    config = source.config
    parameters = {name: jnp.asarray(source.read(name)) for name in source.names()}
    expanded = [p.repeat(np.where(p == IMAGE_TOKEN, config.num_image_tokens, 1)) for p in prompts]
    return parameters, abstract_model(config)[0], left_pad(expanded, images, config.vision.image_size)


def continue_all(source, prompts, images, num_tokens=8, end_ids=(NO_END,), sampling=GREEDY):
    parameters, graphdef, batch = placed(source, prompts, images)
    how = dict(graphdef=graphdef, max_new_tokens=num_tokens, end_ids=end_ids, sample=sampling.temperature > 0)
    return np.asarray(continue_prompts(parameters, batch, jax.random.key(0), sampling, **how))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny HF model and the same model opened by us."""
    hf = make_hf_model(llama())
    path = tmp_path_factory.mktemp("model")
    hf.save_pretrained(path)
    return hf, open_model(path)


def make_prompts():
    rng = np.random.default_rng(3)
    prompts = [rng.integers(3, HF_IMAGE_TOKEN, n) for n in (5, 9, 7)]
    prompts[0][1] = prompts[1][0] = prompts[1][6] = IMAGE_TOKEN
    images = [list(rng.normal(size=(n, 28, 28, 3)).astype(np.float32)) for n in (1, 2, 0)]
    return prompts, images


@pytest.mark.parametrize("penalty", [1.0, 1.7])
def test_greedy_tokens_equal_hugging_face(model, penalty):
    hf, source = model
    penalize = RepetitionPenaltyLogitsProcessor(penalty)
    prompts, images = make_prompts()
    for prompt, its_images in zip(prompts, images, strict=True):
        ids = prompt.repeat(np.where(prompt == IMAGE_TOKEN, source.config.num_image_tokens, 1))
        ids = torch.tensor(np.where(ids == IMAGE_TOKEN, HF_IMAGE_TOKEN, ids))[None]
        pixels = torch.tensor(np.stack(its_images).transpose(0, 3, 1, 2)) if its_images else None
        expected = []
        for _ in range(8):  # without a cache, and over our vocabulary only
            with torch.no_grad():
                logits = hf(input_ids=ids, pixel_values=pixels).logits[:, -1, : source.config.text.vocab_size]
            logits = penalize(ids[ids != HF_IMAGE_TOKEN][None], logits)
            expected.append(int(logits.argmax()))
            ids = torch.cat([ids, torch.tensor([[expected[-1]]])], dim=1)
        found = continue_all(
            source, [prompt], [its_images], sampling=GREEDY._replace(repetition_penalty=penalty)
        )
        assert found[0].tolist() == expected
        assert penalty == 1 or len({*prompt.tolist(), *expected}) == len({*prompt.tolist()}) + len(expected)


@pytest.mark.parametrize("penalty", [1.0, 1.7])
def test_a_batch_continues_like_its_rows_alone(model, penalty):
    prompts, images = make_prompts()
    how = dict(sampling=GREEDY._replace(repetition_penalty=penalty))
    together = continue_all(model[1], prompts, images, **how)
    for row, prompt in enumerate(prompts):
        assert together[row].tolist() == continue_all(model[1], [prompt], [images[row]], **how)[0].tolist()


def test_only_a_row_s_own_text_counts_as_repeated(tiny_config):
    prompts = [np.array([5, IMAGE_TOKEN, 9]), np.array([7, 8, 5, 9])]
    images = [[np.zeros((32, 32, 3), np.uint8)], []]
    source = complete(ModelSource("parts", tiny_config.model, {}), seed=0)
    parameters, graphdef, batch = placed(source, prompts, images)
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    rows = read_prompts(parameters, batch, graphdef=graphdef, num_slots=70, mesh=mesh)
    for seen, prompt in zip(rows.seen, prompts, strict=True):
        assert np.flatnonzero(seen).tolist() == sorted({*prompt.tolist()} - {IMAGE_TOKEN})


def test_a_row_that_has_ended_stays_ended_whichever_token_ends_it(model):
    prompts, images = make_prompts()
    free = continue_all(model[1], prompts, images)
    last = int(free[0, 3])
    for end_ids in ((last,), (NO_END, last)):
        ended = continue_all(model[1], prompts, images, end_ids=end_ids)
        for row, tokens in zip(free.tolist(), ended.tolist(), strict=True):
            end = row.index(last) + 1 if last in row else len(row)
            assert tokens == row[:end] + [end_ids[0]] * (len(row) - end)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.7),
        Sampling(1.0, top_p=0.8),
        Sampling(1.0, top_k=5),
        Sampling(1.3, top_p=0.6, top_k=20),
        Sampling(1.0, top_p=0.3, top_k=500),  # more than there are
        Sampling(2.0, top_p=0.0),
    ],
)
def test_what_is_drawn_and_how_likely_equals_hugging_face(sampling):
    logits = 3 * np.random.default_rng(0).normal(size=(7, 90)).astype(np.float32)
    expected = TemperatureLogitsWarper(sampling.temperature)(None, torch.tensor(logits))
    if sampling.top_k:
        expected = TopKLogitsWarper(sampling.top_k)(None, expected)
    expected = TopPLogitsWarper(sampling.top_p)(None, expected).numpy()
    np.testing.assert_allclose(_narrowed(jnp.asarray(logits), sampling), expected, rtol=1e-6)


def test_draws_differ_and_of_one_token_are_greedy(model):
    prompts, images = make_prompts()
    greedy = continue_all(model[1], prompts, images)
    hot = continue_all(model[1], prompts, images, sampling=Sampling(5.0))
    assert (hot != greedy).any() and (hot[:, 1:] != hot[:, :-1]).any()
    np.testing.assert_array_equal(
        continue_all(model[1], prompts, images, sampling=Sampling(5.0, top_k=1)), greedy
    )


@pytest.fixture
def generator(tiny_config):
    source = complete(ModelSource("parts", tiny_config.model, {}), seed=0)
    tokenizer = load_tokenizer(tiny_config.init.tokenizer)
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    return open_generator(source, tokenizer, mesh, template="v1", dtype="float32")


def test_prompts_that_leave_no_room_are_refused(generator):
    with pytest.raises(ConfigError, match="leaves no room for an answer in the model's 256 positions"):
        generator.answer(["What is this? " * 100], [[]], max_new_tokens=1)


def test_answers_end_where_the_positions_do(generator):
    (tokens,) = generator.generate([np.full(250, 5)], [[]], max_new_tokens=100)
    assert len(tokens) <= 6


@pytest.fixture
def wide_source(tiny_config) -> ModelSource:
    """Weights of a decoder whose kernels have whole blocks of inputs."""
    text = dataclasses.replace(
        tiny_config.model.text, hidden_size=64, intermediate_size=128, num_attention_heads=4, head_dim=16
    )
    return complete(ModelSource("parts", dataclasses.replace(tiny_config.model, text=text), {}), seed=0)


@pytest.mark.parametrize("method", [pytest.param("int8", marks=pytest.mark.slow), "nf4"])
def test_a_quantised_network_says_what_it_says_with_its_kernels_unpacked(generator, wide_source, method):
    tokenizer, mesh = generator.tokenizer, generator.mesh
    how = dict(template="v1", dtype="float32")
    found = open_generator(wide_source, tokenizer, mesh, quantization=method, **how)
    kernels = [name for name in found.parameters if name.startswith("language_model.layers.")]
    assert len([name for name in kernels if name.endswith(f".{method}")]) == 7
    assert not [name for name in kernels if name.endswith(".kernel")]
    name = "language_model.layers.mlp.down_proj.kernel"
    for kind, leaf in Quantization(method).quantize(wide_source.read(name)[1]).items():
        np.testing.assert_array_equal(found.parameters[f"{name}.{kind}"][1], leaf)

    plain = open_generator(wide_source, tokenizer, mesh, **how)
    unpacked = Generator(
        plain.graphdef,
        with_unpacked_kernels(found.parameters),
        tokenizer,
        mesh,
        template="v1",
        image_processor=found.image_processor,
    )
    prompts = [tokenizer.encode(text) for text in ("What color is the ring?", "Where is it? In the middle?")]
    prompts = [np.array([IMAGE_TOKEN, *prompt]) for prompt in prompts]
    images = list(np.random.default_rng(0).integers(0, 256, (2, 1, 32, 32, 3), np.uint8))
    said = [each.generate(prompts, images, max_new_tokens=24) for each in (found, unpacked, plain)]
    assert said[0] == said[1]
    assert method == "int8" or said[1] != said[2]  # the error of int8 is too small for that


def test_blocks_that_a_decoder_does_not_have_are_refused(generator, tiny_config):
    source = complete(ModelSource("parts", tiny_config.model, {}), seed=0)
    with pytest.raises(
        ConfigError, match=r"--quantization='nf4' .*hidden_size = 32 .*set --quantization='int8'"
    ):
        open_generator(
            source, generator.tokenizer, generator.mesh, template="v1", dtype="float32", quantization="nf4"
        )


def test_every_question_is_answered_once_and_scored_per_kind(generator, shapes_dataset):
    config = EvaluateConfig(
        path=f"{shapes_dataset}/questions_test.jsonl",
        image_folder=f"{shapes_dataset}/images",
        batch_size=7,  # 24 questions: the last batch is filled up
        max_new_tokens=2,
        blind=True,
    )
    generator.complete = lambda prompts, images, **how: [
        "Red" if images[i][0].mean() > 0 else "?" for i in range(len(prompts))
    ]
    results, answered = evaluate(generator, read_questions(config.path), config, model_id="m")
    assert len(answered) == results["eval_samples"] == results["eval_scored"] == 24
    expected = np.mean([row["answer"] == "red" for row in answered])
    assert results["eval_accuracy"] == results["eval_accuracy_blind"] == expected
    colors = [row["answer"] == "red" for row in answered if row["kind"] == "color"]
    assert results["eval_accuracy_color"] == np.mean(colors)


def test_blind_questions_see_another_picture(generator, shapes_dataset):
    config = EvaluateConfig(
        path=f"{shapes_dataset}/questions_test.jsonl",
        image_folder=f"{shapes_dataset}/images",
        batch_size=24,
        max_new_tokens=2,
        blind=True,
    )
    shown = []
    generator.complete = lambda prompts, images, **how: shown.append(images) or [""] * len(prompts)
    evaluate(generator, read_questions(config.path), config, model_id="m")
    seeing, blind = shown
    assert not any(np.array_equal(a[0], b[0]) for a, b in zip(seeing, blind, strict=True))


@pytest.mark.parametrize("method", ["none", pytest.param("int8", marks=pytest.mark.slow)])
@pytest.mark.parametrize("sizes", [pytest.param((1, 8, 1), marks=pytest.mark.slow), (2, 2, 2)], ids=str)
def test_rows_and_their_caches_are_spread_over_devices_and_answers_are_those_of_one(
    generator, wide_source, monkeypatch, sizes, method
):
    def open_on(mesh):
        how = dict(template="v1", dtype="float32", quantization=method)
        return open_generator(wide_source, generator.tokenizer, mesh, **how)

    calls = []
    monkeypatch.setattr(
        generation,
        "continue_prompts",
        lambda *of, **how: calls.append((of, how)) or continue_prompts(*of, **how),
    )
    rng = np.random.default_rng(0)
    prompts = [np.array([IMAGE_TOKEN, *rng.integers(3, 500, 5 + row)]) for row in range(16)]
    images = list(rng.integers(0, 256, (16, 1, 32, 32, 3), np.uint8))
    several = open_on(make_mesh(MeshConfig(*sizes)))
    for count in (16, 3):
        asked = (prompts[:count], images[:count])
        one = open_on(generator.mesh).generate(*asked, max_new_tokens=6)
        assert several.generate(*asked, max_new_tokens=6) == one
    of, how = calls[1]
    hlo = continue_prompts.lower(*of, **how).compile().as_text()
    rows, heads = 16 // (sizes[0] * sizes[1]), 2 // sizes[2]
    assert of[1]["images"].addressable_shards[0].data.shape[0] == rows
    assert f"f32[2,{rows},70,{heads},16]" in hlo  # keys and values of 64 + 6 tokens
    assert not re.search(r"f32\[2,16,70,", hlo)
    # In layers weights travel to prompts, and what is computed of a single token to the weights.
    of_prompts, of_tokens = (
        travelling(hlo, "while/body/closed_call"),
        travelling(hlo, "while/body/while/body"),
    )
    assert of_prompts and not [shape for shape in of_prompts if shape[0] == 16]
    assert of_tokens and all(shape[1] == 1 for shape in of_tokens)


def travelling(hlo: str, where: str) -> list[tuple[int, ...]]:
    """The shapes that devices exchange in a loop."""
    lines = "\n".join(line for line in hlo.splitlines() if f"(continue_prompts)/{where}/" in line)
    return [shape for shapes in collectives(lines).values() for _, shape in shapes]
