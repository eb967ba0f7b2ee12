"""From samples to arrays of few different shapes: the order of an epoch, rows, padding."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from llava_jax.data import shuffling
from llava_jax.data.conversation import IGNORE

PADDING = -1  # the sample id of an empty row


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One sample, ready for a row: tokens and labels int32[T], images uint8[M, H, W, 3].

    feature_ids int32[T], where images are laid out otherwise than one after the other: at an image placeholder
    the feature it takes, counted over the sample's own images, or -1 for a newline; anything at text.
    """

    tokens: np.ndarray
    labels: np.ndarray
    images: np.ndarray
    feature_ids: np.ndarray | None = None


def steps_per_epoch(num_samples: int, batch_size: int) -> int:
    """Steps in which every sample is seen once; the last may not be full."""
    return -(-num_samples // batch_size)


def epoch_order(epoch: int, *, num_samples: int, seed: int, shuffle: bool) -> np.ndarray:
    """The order of an epoch's samples int64[num_samples]; a function of the arguments alone."""
    if not shuffle:
        return np.arange(num_samples)
    return shuffling.permutation(num_samples, seed, shuffling.EPOCH, epoch)


def rows_of_step(own_rows: np.ndarray, *, batch_size: int, accumulation_steps: int) -> np.ndarray:
    """Which rows of a step a process loads that holds the rows `own_rows` int64[B] of each of its microbatches.

    -> int64[accumulation_steps, B]. A step's microbatches follow one another.
    """
    first_rows = np.arange(0, batch_size, batch_size // accumulation_steps)
    return first_rows[:, None] + own_rows


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
    rows: Sequence[Sequence[Sample] | Sample | None],
    *,
    length: int,
    num_images: int,
    image_size: int,
    features_per_image: int | None = None,
) -> dict[str, np.ndarray]:
    """Lays out the samples of each row one after the other, padded on the right; None is an empty row.

    -> tokens, labels, positions, segment_ids int32[B, length]; images uint8[B, num_images, H, W, 3].
    A row's samples are segments 1, 2, 3, ..., each with positions from 0, so that they do not see each other;
    its images are theirs in order. Padding has token 0, label IGNORE, position 0 and segment 0. The first label
    of a sample is IGNORE, for the token before it is another sample's.

    With `features_per_image`, the number of features that the model makes of one image, also feature_ids
    int32[B, length]: the samples' own, counted over all images of the row. A sample without images may lack them.
    """
    shape = (len(rows), length)
    batch = {
        "tokens": np.zeros(shape, np.int32),
        "labels": np.full(shape, IGNORE, np.int32),
        "positions": np.zeros(shape, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
        "images": np.zeros((len(rows), num_images, image_size, image_size, 3), np.uint8),
    }
    if features_per_image is not None:
        batch["feature_ids"] = np.zeros(shape, np.int32)
    for number, row in enumerate(rows):
        samples = (row,) if isinstance(row, Sample) else row or ()
        _fill_row({key: array[number] for key, array in batch.items()}, samples, features_per_image)
    return batch


def _fill_row(row: dict[str, np.ndarray], samples: Sequence[Sample], features_per_image: int | None) -> None:
    """Writes samples into one row of a batch."""
    begin = first_image = 0
    for segment, sample in enumerate(samples, start=1):
        place = slice(begin, begin + len(sample.tokens))
        row["tokens"][place] = sample.tokens
        row["labels"][place] = sample.labels
        row["labels"][place.start] = IGNORE
        row["positions"][place] = np.arange(len(sample.tokens))
        row["segment_ids"][place] = segment
        row["images"][first_image : first_image + len(sample.images)] = sample.images
        if sample.feature_ids is not None:
            assert features_per_image is not None, "feature_ids need features_per_image"
            shift = first_image * features_per_image
            row["feature_ids"][place] = np.where(sample.feature_ids < 0, -1, sample.feature_ids + shift)
        else:
            assert features_per_image is None or not len(sample.images), (
                "a sample with images lacks feature_ids"
            )
        begin, first_image = place.stop, first_image + len(sample.images)
