"""Images in tiles through the network, against transformers' LLaVA-NeXT, and through every file layout."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from llava_jax.config import (
    Config,
    ConfigError,
    InitConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    TuneConfig,
)
from llava_jax.convert.errors import ConversionError
from llava_jax.convert.export import check_layout
from llava_jax.convert.hf_processor import write_processor
from llava_jax.convert.opening import open_model
from llava_jax.convert.ours import write_model
from llava_jax.convert.source import ModelSource
from llava_jax.data import tiles
from llava_jax.data.image_processor import ImageLayout, ImageProcessor, row_feature_ids
from llava_jax.data.tokenizer import load_tokenizer
from llava_jax.decoding import GREEDY, continue_prompts
from llava_jax.generation import expand_prompt, left_pad, open_generator
from llava_jax.kernels.cross_entropy import supervised_cross_entropy
from llava_jax.models import llava
from llava_jax.models.llava import IMAGE_TOKEN, insert_image_features
from llava_jax.models.vit import normalize
from llava_jax.optimizer import is_decayed, make_optimizer
from llava_jax.sharding import make_mesh, parameter_sharding
from llava_jax.step import TrainState, abstract_model, bind, make_train_step, random_parameters
from llava_jax.tuning import is_trainable
from llava_jax.weights import complete, initial_weights
from tests.test_models import HF_IMAGE_TOKEN, TOLERANCE, llama, relative_error
from tests.tiny_models import assert_same_leaves, export

NEWLINE = "language_model.image_newline"
GRID = [[28, 28], [56, 28], [56, 56]]  # heights before widths, as transformers has them


@pytest.fixture(scope="module")
def hf():
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=28,
        patch_size=7,
    )
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=llama(),
        image_token_id=HF_IMAGE_TOKEN,
        image_grid_pinpoints=GRID,
    )
    model = LlavaNextForConditionalGeneration._from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def source(hf, tmp_path_factory):
    path = tmp_path_factory.mktemp("next")
    hf.save_pretrained(path)
    return open_model(path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A tall image in two tiles behind the whole, one in four, and one in a single tile."""
    path = tmp_path_factory.mktemp("pictures")
    for name, size in {"tall": (24, 46), "big": (70, 52), "small": (20, 17)}.items():
        pixels = np.random.default_rng(len(name)).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(path / f"{name}.png")
    return [str(path / f"{name}.png") for name in ("tall", "big", "small")]


def test_a_next_model_says_how_it_tiles(source):
    assert source.config.image_grid_pinpoints == ((28, 28), (28, 56), (56, 56))
    assert source.config.patch_merge_type == "spatial_unpad"
    assert source.image_aspect_ratio == "anyres"
    assert source.shape(NEWLINE) == (32,)


def test_logits_and_gradients_equal_those_of_transformers(hf, source, pictures):
    config, processor = source.config, ImageProcessor(source.config, aspect_ratio="anyres")
    layouts = [processor.layout(path) for path in pictures]
    assert [layout.num_tiles for layout in layouts] == [3, 5, 2]
    prompt = np.array([5, IMAGE_TOKEN, 8, 9, IMAGE_TOKEN, 11, IMAGE_TOKEN, 7, 12], np.int32)
    tokens, feature_ids = expand_prompt(prompt, layouts, config.num_image_tokens)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(10, 28, 28, 3)).astype(np.float32)
    labels = np.where(tokens == IMAGE_TOKEN, -100, tokens)

    per_image = np.split(images.transpose(0, 3, 1, 2), [3, 8])
    pixels = np.zeros((3, 5, 3, 28, 28), np.float32)
    for slot, image in enumerate(per_image):
        pixels[slot, : len(image)] = image
    ids = torch.tensor(np.where(tokens == IMAGE_TOKEN, HF_IMAGE_TOKEN, tokens))[None].long()
    sizes = torch.tensor([[46, 24], [52, 70], [17, 20]])
    hf.zero_grad()
    expected = hf(input_ids=ids, pixel_values=torch.tensor(pixels), image_sizes=sizes)
    expected_logits = expected.logits[..., : config.text.vocab_size]
    torch.nn.functional.cross_entropy(
        expected_logits[0, :-1], torch.tensor(labels[1:]).long(), ignore_index=-100
    ).backward()

    graphdef, _ = abstract_model(config)
    T = len(tokens)

    @jax.jit
    def run(parameters):
        def loss_fn(parameters):
            model = bind(graphdef, parameters)
            hidden = model(
                tokens[None],
                images[None],
                jnp.arange(T)[None],
                jnp.ones((1, T), jnp.int32),
                feature_ids[None],
            )
            total, count = supervised_cross_entropy(hidden, model.language_model.head(), labels[None])
            return total / count, model.language_model.logits(hidden)

        return jax.value_and_grad(loss_fn, has_aux=True)(parameters)

    parameters = {name: jnp.asarray(source.read(name)) for name in source.names()}
    (_, logits), grads = run(parameters)
    assert relative_error(np.asarray(logits), expected_logits.detach().numpy()) < TOLERANCE
    expected_grad = hf.model.image_newline.grad.numpy()
    assert np.abs(expected_grad).max() > 0
    assert relative_error(np.asarray(grads[NEWLINE]), expected_grad) < TOLERANCE
    expected_grad = hf.model.multi_modal_projector.linear_1.weight.grad.numpy().T
    found = np.asarray(grads["multi_modal_projector.linear_1.kernel"])
    assert relative_error(found, expected_grad) < TOLERANCE


def test_placeholders_take_the_features_of_their_ids():
    features = np.arange(1, 7, dtype=np.float32).reshape(1, 6, 1)
    is_image = np.array([[0, 1, 1, 1, 0, 1]], bool)
    ids = np.array([[3, 5, -1, 0, -1, 2]], np.int32)
    merged = insert_image_features(np.full((1, 6, 1), 9.0), features, is_image, ids, jnp.array([-7.0]))
    assert np.asarray(merged)[0, :, 0].tolist() == [9, 6, -7, 1, 9, 3]


def test_newline_means_the_same_to_data_and_model():
    assert llava.NEWLINE == tiles.NEWLINE


def test_ids_count_through_the_tiles_of_a_row():
    layouts = [ImageLayout(2, np.array([0, 7, -1], np.int32)), ImageLayout(1, np.array([0, 3, -1], np.int32))]
    assert row_feature_ids(layouts, 4).tolist() == [0, 7, -1, 8, 11, -1]
    assert row_feature_ids([], 4).tolist() == []


def test_a_tiled_prompt_continues_alone_as_in_a_batch(source, pictures):
    config, processor = source.config, ImageProcessor(source.config, aspect_ratio="anyres")
    graphdef, _ = abstract_model(config)
    parameters = {name: jnp.asarray(source.read(name)) for name in source.names()}
    prompts = [np.array([4, IMAGE_TOKEN, n, IMAGE_TOKEN, 6][: 3 + 2 * (n % 2)]) for n in (8, 9, 10)]
    shown = [[pictures[0]], [pictures[1], pictures[2]], [pictures[2]]]

    def continue_rows(rows):
        expanded = [
            expand_prompt(prompts[i], [processor.layout(p) for p in shown[i]], config.num_image_tokens)
            for i in rows
        ]
        images = [[tile for path in shown[i] for tile in processor.read(path)] for i in rows]
        batch = left_pad([tokens for tokens, _ in expanded], images, 28, [ids for _, ids in expanded])
        how = dict(graphdef=graphdef, max_new_tokens=4, end_ids=(-1,), sample=False)
        return np.asarray(continue_prompts(parameters, batch, jax.random.key(0), GREEDY, **how)).tolist()

    together = continue_rows([0, 1, 2])
    assert together == [continue_rows([i])[0] for i in range(3)]


def test_a_generator_answers_about_tiled_images(tiny_config, pictures):
    model = dataclasses.replace(
        tiny_config.model, image_grid_pinpoints=((32, 64), (64, 32)), patch_merge_type="spatial_unpad"
    )
    weights = complete(ModelSource("parts", model, {}, image_aspect_ratio="anyres"), seed=0)
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    tokenizer = load_tokenizer(tiny_config.init.tokenizer)
    generator = open_generator(weights, tokenizer, mesh, template="v1", dtype="float32")
    processor = generator.image_processor
    images, layouts = processor.read(pictures[0]), processor.layout(pictures[0])
    answers = generator.answer(
        ["What is it?", "And?"], [[images], []], layouts=[[layouts], []], max_new_tokens=2
    )
    assert len(answers) == 2


def test_the_newline_trains_and_decays_with_the_decoder_and_lies_on_every_device():
    assert is_trainable(NEWLINE, Config())
    assert not is_trainable(NEWLINE, Config(tune=TuneConfig(language_model="frozen")))
    assert is_decayed(NEWLINE)
    mesh = make_mesh(MeshConfig(1, 8, 1))
    assert parameter_sharding(mesh, NEWLINE, (32,)).is_fully_replicated


def test_only_models_that_end_lines_have_a_newline(source):
    for merge_type in ("flat", "spatial"):
        model = dataclasses.replace(source.config, patch_merge_type=merge_type)
        assert NEWLINE not in abstract_model(model)[1]


def test_original_directories_keep_tiles_both_ways(source, tmp_path):
    written = open_model(export(source, tmp_path / "llava", "llava"))
    assert (written.config, written.image_aspect_ratio) == (source.config, "anyres")
    assert_same_leaves(written, source)
    file = tmp_path / "llava/config.json"
    fields = json.loads(file.read_text())
    assert fields["mm_patch_merge_type"] == "spatial_unpad"
    assert fields["image_grid_pinpoints"] == [[28, 28], [28, 56], [56, 56]]
    file.write_text(json.dumps(fields | {"image_grid_pinpoints": "[(28, 28), (28, 56), (56, 56)]"}))
    assert open_model(tmp_path / "llava").config == source.config


def test_our_directories_keep_tiles(source, tmp_path):
    write_model(tmp_path / "ours", source)
    written = open_model(tmp_path / "ours")
    assert (written.config, written.image_aspect_ratio) == (source.config, "anyres")
    assert_same_leaves(written, source)


def test_llava_hf_directories_keep_tiles_as_a_next_model(hf, source, tmp_path):
    written = open_model(export(source, tmp_path / "next", "llava-hf"))
    assert (written.config, written.image_aspect_ratio) == (source.config, "anyres")
    assert_same_leaves(written, source)
    loaded, problems = LlavaNextForConditionalGeneration.from_pretrained(
        tmp_path / "next", output_loading_info=True
    )
    assert not any(problems.values())
    expected = hf.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert loaded.config.image_grid_pinpoints == GRID


def test_llava_hf_directories_hold_no_other_tiles(source):
    for change in (
        {"patch_merge_type": "spatial"},
        {"patch_merge_type": "flat"},
        {"image_grid_pinpoints": ()},
        {"select_feature": "cls_patch"},
    ):
        with pytest.raises(ConversionError, match="choose the layout llava"):
            check_layout(dataclasses.replace(source.config, **change), "llava-hf")


def test_the_exported_image_processor_makes_the_tiles_of_training(source, pictures, tmp_path):
    write_processor(
        tmp_path, source.config, template="v1", image_aspect_ratio="anyres", image_in_prompt="<image>\n"
    )
    theirs = AutoImageProcessor.from_pretrained(tmp_path)
    ours = ImageProcessor(source.config, aspect_ratio="anyres")
    for path in pictures:
        expected = np.asarray(normalize(jnp.asarray(ours.read(path)), ours.model.vision))
        with Image.open(path) as image:
            found = theirs(image, return_tensors="np")["pixel_values"][0].transpose(0, 2, 3, 1)
        assert found.shape == expected.shape
        worst = np.abs(found - expected).max() * 255 * 0.27  # in levels of a pixel
        assert worst < 2.5, path


def test_a_model_without_tiles_may_go_on_with_them_but_not_the_reverse(source, tmp_path):
    plain = dataclasses.replace(source.config, image_grid_pinpoints=(), patch_merge_type="flat")
    leaves = {name: leaf for name, leaf in source.leaves.items() if name != NEWLINE}
    write_model(tmp_path / "plain", dataclasses.replace(source, config=plain, leaves=leaves))
    write_model(tmp_path / "tiled", source)
    how = {"data": dataclasses.replace(Config().data, max_length=256)}
    tiled = Config(model=source.config, init=InitConfig(model=str(tmp_path / "plain")), **how)
    assert initial_weights(tiled).shape(NEWLINE) == (32,)
    reverse = Config(model=plain, init=InitConfig(model=str(tmp_path / "tiled")), **how)
    with pytest.raises(ConfigError, match="patch_merge_type='spatial_unpad'"):
        initial_weights(reverse)


def test_a_step_that_is_told_feature_ids_trains_the_newline(source):
    config = dataclasses.replace(source.config, text=dataclasses.replace(source.config.text, vocab_size=90))
    graphdef, shapes = abstract_model(config)
    parameters = random_parameters(config, 0, shapes.keys())
    optimizer = make_optimizer(OptimizerConfig(warmup_ratio=0.0), 2)
    step = jax.jit(make_train_step(graphdef, optimizer, LossConfig()))
    tokens = np.array([[[1, *[IMAGE_TOKEN] * 3, 5, 6]]], np.int32)
    batch = {
        "tokens": tokens,
        "labels": np.where(tokens > 4, tokens, -100),
        "images": np.zeros((1, 1, 1, 28, 28, 3), np.uint8),
        "positions": np.arange(6)[None, None],
        "segment_ids": np.ones_like(tokens),
    }
    changed = {}
    for ids in (None, [[[0, 3, 15, -1, 0, 0]]]):
        told = batch if ids is None else batch | {"feature_ids": np.array(ids, np.int32)}
        state = TrainState(jnp.int32(0), parameters, optimizer.init(parameters))
        after, _ = step(state, {}, told)
        changed[ids is None] = bool((after.trainable[NEWLINE] != parameters[NEWLINE]).all())
    assert changed == {True: False, False: True}
