"""A packed row teaches what its samples teach alone: same loss, same gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.config import ModelConfig, TextConfig, VisionConfig
from llava_jax.data.batching import Sample, collate
from llava_jax.data.conversation import IGNORE, IMAGE_TOKEN
from llava_jax.kernels.cross_entropy import supervised_cross_entropy
from llava_jax.step import abstract_model, bind, random_parameters

CONFIG = ModelConfig(
    vision=VisionConfig(
        hidden_size=16,
        intermediate_size=26,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=14,
        patch_size=7,
    ),
    text=TextConfig(
        vocab_size=89,
        hidden_size=24,
        intermediate_size=28,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        max_position_embeddings=64,
    ),
)
TOLERANCE = 2e-6  # relative to the largest entry of each gradient


def make_sample(seed: int, num_images: int, num_words: int) -> Sample:
    """Images at different places of a text of which everything, even its first token, is labelled."""
    random = np.random.default_rng(seed)
    words = random.integers(3, CONFIG.text.vocab_size, num_words).astype(np.int32)
    image = np.full(CONFIG.num_image_tokens, IMAGE_TOKEN, np.int32)
    parts = np.split(words, np.sort(random.integers(1, num_words, num_images)))
    tokens = np.concatenate([parts[0], *(piece for part in parts[1:] for piece in (image, part))])
    labels = np.where(tokens == IMAGE_TOKEN, IGNORE, tokens)
    size = CONFIG.vision.image_size
    return Sample(tokens, labels, random.integers(0, 256, (num_images, size, size, 3), np.uint8))


SAMPLES = [
    make_sample(seed, num_images, num_words)
    for seed, (num_images, num_words) in enumerate([(1, 7), (0, 9), (2, 5), (1, 4), (0, 3)])
]


def batch_of(rows, length: int, num_images: int) -> dict[str, np.ndarray]:
    return collate(rows, length=length, num_images=num_images, image_size=CONFIG.vision.image_size)


@pytest.fixture(scope="module")
def evaluate():
    graphdef, abstract = abstract_model(CONFIG)
    parameters = random_parameters(CONFIG, 0, set(abstract))

    @jax.jit
    def value_and_grad(batch):
        def loss_fn(parameters):
            model = bind(graphdef, parameters)
            hidden = model(batch["tokens"], batch["images"], batch["positions"], batch["segment_ids"])
            return supervised_cross_entropy(hidden, model.language_model.head(), batch["labels"])

        return jax.value_and_grad(loss_fn, has_aux=True)(parameters)

    def evaluate(batch):
        (total, count), grads = value_and_grad({key: jnp.asarray(value) for key, value in batch.items()})
        return float(total), int(count), {name: np.asarray(grad) for name, grad in grads.items()}

    return evaluate


@pytest.fixture(scope="module")
def alone(evaluate):
    """Loss, count and gradients of the samples one by one, summed."""
    results = [evaluate(batch_of([sample], 24, 2)) for sample in SAMPLES]
    totals, counts, grads = zip(*results, strict=True)
    return sum(totals), sum(counts), {name: sum(grad[name] for grad in grads) for name in grads[0]}


def differences(found, expected) -> list[float]:
    """How far loss and gradients are off, relative to the largest entry of each."""
    # CLIP's k_proj.bias cannot change a softmax: its gradient is rounding noise, small beside all others.
    noise = 1e-6 * max(np.abs(grad).max() for grad in expected[2].values())
    errors = [abs(found[0] / expected[0] - 1)]
    for name, grad in expected[2].items():
        errors.append(np.abs(found[2][name] - grad).max() / max(np.abs(grad).max(), noise / TOLERANCE))
    return errors


PACKED = batch_of([SAMPLES[:3], SAMPLES[3:], None], 48, 3)


@pytest.mark.parametrize(
    "batch",
    [batch_of(SAMPLES, 24, 2), PACKED, batch_of([SAMPLES[::-1]], 64, 4)],
    ids=["padded", "packed in two rows", "packed in one row"],
)
def test_samples_teach_the_same_in_every_arrangement(batch, evaluate, alone):
    found = evaluate(batch)
    assert found[1] == alone[1] == sum(int((sample.labels[1:] != IGNORE).sum()) for sample in SAMPLES)
    assert max(differences(found, alone)) < TOLERANCE


@pytest.mark.parametrize(
    "broken",
    [
        {"segment_ids": np.minimum(PACKED["segment_ids"], 1)},
        {"positions": np.where(PACKED["segment_ids"] > 1, PACKED["positions"][:, ::-1], PACKED["positions"])},
        {"images": PACKED["images"][:, ::-1]},
        {"labels": np.where(PACKED["tokens"] > 0, PACKED["tokens"], IGNORE)},
    ],
    ids=lambda broken: next(iter(broken)),
)
def test_the_comparison_sees_what_is_broken(broken, evaluate, alone):
    assert max(differences(evaluate(PACKED | broken), alone)) > 1000 * TOLERANCE
