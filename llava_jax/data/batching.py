"""Which samples a step takes, and how they become arrays of few different shapes."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from llava_jax.data.conversation import IGNORE

PADDING = -1  # the sample id of an empty row
_EPOCH_SHUFFLE = 1  # sets this use of the seed apart from others


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One row, ready to be padded: tokens and labels int32[T], images uint8[M, H, W, 3]."""

    tokens: np.ndarray
    labels: np.ndarray
    images: np.ndarray


def steps_per_epoch(num_samples: int, batch_size: int) -> int:
    """Steps in which every sample is seen once; the last may not be full."""
    return -(-num_samples // batch_size)


def epoch_order(epoch: int, *, num_samples: int, seed: int, shuffle: bool) -> np.ndarray:
    """The order of an epoch's samples int64[num_samples]; a function of the arguments alone."""
    if not shuffle:
        return np.arange(num_samples)
    bits = np.random.Philox(np.random.SeedSequence((seed, _EPOCH_SHUFFLE, epoch)))
    # Sorting raw random bits is specified down to the bit; Generator.permutation may change with numpy.
    return np.argsort(bits.random_raw(num_samples), kind="stable")


def sample_ids(step: int, *, order: np.ndarray, batch_size: int) -> np.ndarray:
    """The samples of a step int64[batch_size], given its epoch's order.

    PADDING fills up the last step of an epoch. `step` counts from the start of training, so that its
    epoch is step // steps_per_epoch(...).
    """
    start = step % steps_per_epoch(len(order), batch_size) * batch_size
    ids = order[start : start + batch_size]
    return np.concatenate([ids, np.full(batch_size - len(ids), PADDING, ids.dtype)])


def process_rows(
    ids: np.ndarray, *, accumulation_steps: int, process_index: int, process_count: int
) -> np.ndarray:
    """The part of a step's ids int64[batch_size] that one process loads -> int64[accumulation_steps, rows].

    Microbatches are consecutive, and the processes' rows side by side are a microbatch.
    """
    microbatches = ids.reshape(accumulation_steps, -1)
    return np.split(microbatches, process_count, axis=1)[process_index]


def bucket_length(length: int, max_length: int) -> int:
    """Rounds a row length up to one of about ten lengths, so that few shapes are ever compiled.

    With an eighth of max_length rounded up to a power of two as unit, they are the powers of two from 32 to
    the unit, its multiples, and max_length: 32, 64, 128, 256, 512, 768, ..., 2048 for 2048.
    """
    unit = max(32, _next_power_of_two(-(-max_length // 8)))
    rounded = max(32, _next_power_of_two(length)) if length <= unit else -(-length // unit) * unit
    return min(rounded, max_length)


def bucket_images(num_images: int) -> int:
    """Rounds a number of images per row up to 0, 1, 2, 4, 8, ..."""
    return _next_power_of_two(num_images) if num_images else 0


def _next_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def collate(
    samples: Sequence[Sample | None], *, length: int, num_images: int, image_size: int
) -> dict[str, np.ndarray]:
    """Pads samples on the right into a batch; None is an empty row.

    -> tokens, labels, positions, segment_ids int32[B, length]; images uint8[B, num_images, H, W, 3].
    Padding has token 0, label IGNORE, position 0 and segment 0; real tokens are segment 1.
    """
    shape = (len(samples), length)
    batch = {
        "tokens": np.zeros(shape, np.int32),
        "labels": np.full(shape, IGNORE, np.int32),
        "positions": np.zeros(shape, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
        "images": np.zeros((len(samples), num_images, image_size, image_size, 3), np.uint8),
    }
    for row, sample in enumerate(samples):
        if sample is None:
            continue
        used = slice(len(sample.tokens))
        batch["tokens"][row, used] = sample.tokens
        batch["labels"][row, used] = sample.labels
        batch["positions"][row, used] = np.arange(len(sample.tokens))
        batch["segment_ids"][row, used] = 1
        batch["images"][row, : len(sample.images)] = sample.images
    return batch
