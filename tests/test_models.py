"""The network against Hugging Face's: logits, loss and gradients of tiny random models in float32."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.extend.core import jaxprs_in_params
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llava_jax.config import CLIP, SIGLIP, ModelConfig, RopeScaling, TextConfig, VisionConfig
from llava_jax.convert.opening import open_model
from llava_jax.data import conversation
from llava_jax.kernels.cross_entropy import supervised_cross_entropy
from llava_jax.models import llama as decoder
from llava_jax.models import llava
from llava_jax.models.linear import Embed, Linear
from llava_jax.models.llava import IMAGE_TOKEN, insert_image_features
from llava_jax.models.vit import normalize
from llava_jax.step import abstract_model, bind, random_parameters

HF_IMAGE_TOKEN = 90  # the first id above our vocabulary
TOLERANCE = 1e-5


def make_hf_model(
    text, *, tower=CLIPVisionConfig, image_size=28, patch_size=14, select="default", layer=-2, heads=4
) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = tower(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=heads,
        image_size=image_size,
        patch_size=patch_size,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=HF_IMAGE_TOKEN,
        vision_feature_layer=layer,
        vision_feature_select_strategy=select,
    )
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too, so that none can be forgotten
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def llama(**changes) -> LlamaConfig:
    values = dict(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        max_position_embeddings=512,
    )
    return LlamaConfig(**(values | changes))


def qwen2() -> Qwen2Config:
    return Qwen2Config(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )


# Of 31 pixels 2 x 2 patches of 14 take 28.
siglip = partial(make_hf_model, tower=SiglipVisionConfig, image_size=31)

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS = {
    "grouped_queries": lambda: make_hf_model(llama()),
    "wide_heads": lambda: make_hf_model(llama(num_key_value_heads=4, head_dim=12), heads=2),
    "one_kv_head_tied": lambda: make_hf_model(llama(num_key_value_heads=1, tie_word_embeddings=True)),
    "llama_biases": lambda: make_hf_model(llama(attention_bias=True)),
    "linear_rope": lambda: make_hf_model(
        llama(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0})
    ),
    "llama3_rope": lambda: make_hf_model(llama(rope_parameters=LLAMA3)),
    "qwen2": lambda: make_hf_model(qwen2()),
    "cls_patch_last_layer": lambda: make_hf_model(llama(), select="full", layer=-1),
    "lower_layer": lambda: make_hf_model(llama(), layer=1),
    "clip_224": lambda: make_hf_model(llama(), image_size=224, patch_size=14),
    "clip_336": lambda: make_hf_model(llama(), image_size=336, patch_size=14),
    "siglip_qwen2_all_patches_last_layer": lambda: siglip(qwen2(), select="full", layer=-1),
    "siglip_qwen2_without_first_patch": lambda: siglip(qwen2()),
    "siglip_384": lambda: siglip(llama(), image_size=384, select="full"),
}


def make_rows(num_image_tokens: int, *, left: bool) -> dict[str, np.ndarray]:
    """Four rows: two images, none, one at the very start, one in the middle; labels on about half of the text."""
    rng = np.random.default_rng(0)

    def text(n):
        return rng.integers(3, HF_IMAGE_TOKEN, n).tolist()

    image = [IMAGE_TOKEN] * num_image_tokens
    rows = [text(2) + image + text(5) + image + text(3), text(9), image + text(7), text(4) + image + text(6)]
    T = max(map(len, rows)) + 2
    batch = {key: np.zeros((len(rows), T), np.int32) for key in ("tokens", "segment_ids")}
    batch["labels"] = np.full((len(rows), T), -100, np.int32)
    for i, row in enumerate(rows):
        place = slice(T - len(row), T) if left else slice(0, len(row))
        batch["tokens"][i, place] = row
        batch["segment_ids"][i, place] = 1
        learnt = (np.array(row) != IMAGE_TOKEN) & (rng.random(len(row)) < 0.5)
        learnt[0] = False  # nothing predicts a row's first token
        batch["labels"][i, place] = np.where(learnt, row, -100)
    batch["positions"] = np.broadcast_to(np.arange(T, dtype=np.int32), (len(rows), T))
    return batch


def relative_error(found, expected) -> float:
    return float(np.abs(np.asarray(found) - expected).max() / max(np.abs(expected).max(), 1e-30))


@pytest.mark.parametrize(
    ("name", "left"), [(name, False) for name in MODELS] + [("grouped_queries", True), ("llama3_rope", True)]
)
def test_logits_loss_and_gradients_equal_hugging_face(name, left, tmp_path):
    hf = MODELS[name]()
    hf.save_pretrained(tmp_path / "model")
    source = open_model(tmp_path / "model")
    config = source.config
    batch = make_rows(config.num_image_tokens, left=left)
    size = config.vision.image_size
    images = np.random.default_rng(1).normal(size=(4, 2, size, size, 3)).astype(np.float32)
    used = [(0, 0), (0, 1), (2, 0), (3, 0)]

    pixels = torch.tensor(np.stack([images[i, j] for i, j in used]).transpose(0, 3, 1, 2))
    ids = torch.tensor(np.where(batch["tokens"] == IMAGE_TOKEN, HF_IMAGE_TOKEN, batch["tokens"])).long()
    expected = hf(
        input_ids=ids,
        pixel_values=pixels,
        attention_mask=torch.tensor(batch["segment_ids"]).long(),
        position_ids=torch.tensor(batch["positions"]).long(),
    )
    vocabulary = config.text.vocab_size  # HF's has rows for <image> behind it, which ours never predicts
    expected_logits = expected.logits[..., :vocabulary]
    expected_loss = torch.nn.functional.cross_entropy(
        expected_logits[:, :-1].flatten(0, 1),
        torch.tensor(batch["labels"][:, 1:]).long().flatten(),
        ignore_index=-100,
    )
    expected_loss.backward()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    hf.save_pretrained(tmp_path / "gradients")
    expected_grads = open_model(tmp_path / "gradients")

    graphdef, _ = abstract_model(config)

    @jax.jit
    def run(parameters):
        def loss_fn(parameters):
            model = bind(graphdef, parameters)
            hidden = model(batch["tokens"], images, batch["positions"], batch["segment_ids"])
            total, count = supervised_cross_entropy(hidden, model.language_model.head(), batch["labels"])
            return total / count, model.language_model.logits(hidden)

        return jax.value_and_grad(loss_fn, has_aux=True)(parameters)

    parameters = {name: jnp.asarray(source.read(name)) for name in source.names()}
    (loss, logits), grads = run(parameters)
    real = batch["segment_ids"] > 0
    assert relative_error(np.asarray(logits)[real], expected_logits.detach().numpy()[real]) < TOLERANCE
    assert abs(float(loss) / expected_loss.item() - 1) < TOLERANCE
    expected_grads = {leaf: expected_grads.read(leaf) for leaf in parameters}
    # The tower's k_proj.bias cannot change a softmax: its gradient is rounding noise, small beside all others.
    noise = 1e-6 * max(np.abs(grad).max() for grad in expected_grads.values())
    for leaf, grad in expected_grads.items():
        assert np.abs(np.asarray(grads[leaf]) - grad).max() < max(TOLERANCE * np.abs(grad).max(), noise), leaf


def test_several_images_of_a_row_are_laid_end_to_end():
    embeddings = np.zeros((2, 6, 1), np.float32)
    features = np.array([[[1], [2], [3], [4]], [[5], [6], [7], [8]]], np.float32)
    is_image = np.array([[1, 1, 0, 1, 1, 0], [0, 0, 1, 1, 0, 0]], bool)
    merged = insert_image_features(embeddings, features, is_image)
    assert np.asarray(merged)[..., 0].tolist() == [[1, 2, 0, 3, 4, 0], [0, 0, 5, 6, 0, 0]]


def test_the_placeholder_of_the_model_is_that_of_the_data():
    assert llava.IMAGE_TOKEN == conversation.IMAGE_TOKEN


@pytest.mark.parametrize(
    ("model_type", "mean", "std"),
    [
        (CLIP, [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
        (SIGLIP, [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
    ],
)
def test_pixels_are_normalised_as_the_original_does_but_for_rounding(model_type, mean, std):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    expected = ((levels * (1 / 255)).astype(np.float32) - np.array(mean, np.float32)) / np.array(
        std, np.float32
    )
    found = normalize(jnp.asarray(levels), VisionConfig(model_type=model_type))
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-7)


def test_hidden_state_0_runs_no_layer():
    config = ModelConfig(
        vision=VisionConfig(24, 40, 3, 2, image_size=28),
        text=TextConfig(90, 32, 52, 2, 4, 2, 8),
        select_layer=0,
    )
    graphdef, shapes = abstract_model(config)
    assert not [name for name in shapes if name.startswith("vision_tower.layers")]
    parameters = random_parameters(config, 0, shapes.keys())
    features = bind(graphdef, parameters).encode_images(jnp.zeros((2, 28, 28, 3), jnp.uint8))
    assert features.shape == (2, 4, 32)


ROPES = {
    "default": ({"rope_type": "default", "rope_theta": 10000.0}, RopeScaling()),
    "linear": ({"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}, RopeScaling("linear", 3.0)),
    "llama3": (
        LLAMA3 | {"original_max_position_embeddings": 8192},
        RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
    ),
}


@pytest.mark.parametrize("name", ROPES)
def test_rotary_frequencies_are_those_of_hf_to_the_last_bit(name):
    parameters, scaling = ROPES[name]
    config = llama(rope_parameters=parameters, head_dim=128, max_position_embeddings=131072)
    theirs = LlamaRotaryEmbedding(config).inv_freq.numpy()
    ours = decoder.rope_frequencies(128, parameters["rope_theta"], scaling)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", ROPES)
def test_rotations_are_the_same_on_every_platform(name):
    parameters, scaling = ROPES[name]
    config = TextConfig(
        128, 32, 48, 2, 4, 2, head_dim=128, rope_theta=parameters["rope_theta"], rope_scaling=scaling
    )
    positions = jnp.arange(4000).reshape(2, 2000)
    on_cpu = jax.jit(decoder.rotation_at, static_argnums=0)(config, positions)
    frequencies = decoder.rope_frequencies(128, config.rope_theta, scaling)
    elsewhere = jax.jit(decoder._rotation)(positions.astype(jnp.float32), frequencies)
    for ours, theirs in zip(on_cpu, elsewhere, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_gradients_of_norm_scales_are_summed_in_float32():
    tokens = jnp.ones((4, 1024, 8), jnp.bfloat16)
    norm = decoder.RMSNorm(8, 0.0, jnp.bfloat16)
    grads = nnx.grad(lambda norm: norm(tokens).astype(jnp.float32).sum())(norm)
    np.testing.assert_array_equal(grads.scale[...], 4096.0)  # a sum in bfloat16 would stop at 256


def test_gradients_of_biases_and_embeddings_are_summed_in_float32():
    class Layers(nnx.Module):
        def __init__(self, rngs):
            self.embed = Embed(5, 8, dtype=jnp.bfloat16, rngs=rngs)
            self.linear = Linear(8, 3, dtype=jnp.bfloat16, rngs=rngs)

    layers = Layers(nnx.Rngs(0))
    tokens = jnp.full((4, 1024), 2)
    of_embeddings = nnx.grad(lambda layers: layers.embed(tokens).astype(jnp.float32).sum())(layers)
    np.testing.assert_array_equal(
        of_embeddings.embed.embedding[...], 4096.0 * (np.arange(5) == 2)[:, None] * np.ones(8)
    )
    of_bias = nnx.grad(lambda layers: layers.linear(jnp.ones((4, 8192, 8))).astype(jnp.float32).sum())(layers)
    np.testing.assert_array_equal(of_bias.linear.bias[...], 32768.0)


def sums_over_tokens(jaxpr):
    """(primitive, dtype, shape) of each sum that broadcasting or looking up leads to in a backward pass."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("reduce_sum", "scatter-add"):
            out = equation.outvars[0].aval
            yield equation.primitive.name, out.dtype, out.shape
        for inner in jaxprs_in_params(equation.params):
            yield from sums_over_tokens(inner)


@pytest.mark.parametrize(("model_type", "num_positions"), [(CLIP, 5), (SIGLIP, 4)])
def test_no_parameter_of_a_bfloat16_network_has_a_gradient_summed_in_bfloat16(model_type, num_positions):
    config = ModelConfig(
        vision=VisionConfig(24, 40, 3, 2, image_size=28, model_type=model_type),
        select_feature="patch" if model_type == CLIP else "cls_patch",
        text=TextConfig(90, 32, 52, 2, 4, 2, 8, attention_bias="qkvo"),
        patch_merge_type="spatial_unpad",
    )
    graphdef, shapes = abstract_model(config, dtype=jnp.bfloat16)
    tokens = jax.ShapeDtypeStruct((2, 7), jnp.int32)
    images = jax.ShapeDtypeStruct((2, 1, 28, 28, 3), jnp.uint8)

    def loss(parameters, tokens, images):
        hidden = bind(graphdef, parameters)(tokens, images, tokens, tokens, tokens)
        return hidden.astype(jnp.float32).sum()

    sums = list(sums_over_tokens(jax.make_jaxpr(jax.grad(loss))(shapes, tokens, images).jaxpr))
    of_features = ("scatter-add", jnp.bfloat16, (2, 4, 32))  # each has one place, and so one term
    assert [found for found in sums if found[1] == jnp.bfloat16] == [of_features]
    float32 = {(name, shape) for name, dtype, shape in sums if dtype == jnp.float32}
    biases_newline_embeddings = {("reduce_sum", (32,)), ("reduce_sum", (24,)), ("scatter-add", (90, 32))}
    positions = {("reduce_sum", (num_positions, 24))}
    assert float32 >= biases_newline_embeddings | positions
