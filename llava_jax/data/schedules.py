"""Which samples the rows of a step hold: arithmetic on the seed, the data, the step and the batch size."""

import threading
from collections.abc import Callable
from typing import Protocol

import numpy as np

from llava_jax.data import batching, packing
from llava_jax.data.batching import PADDING
from llava_jax.data.samplers import get_modality_length_grouped_indices, seeded_permutations
from llava_jax.data.shuffling import GROUPS

_EPOCHS_KEPT = 2  # loading reaches into the next epoch before the last one is done


class Schedule(Protocol):
    """The rows of every step, over all processes.

    Steps count from the start of training: the epoch of a step is step // steps_per_epoch.
    """

    steps_per_epoch: int

    def row(self, step: int, number: int) -> np.ndarray:
        """The sample ids int64[n] of one row of a step; an empty row has none."""

    def step_rows(self, step: int) -> list[np.ndarray]:
        """The sample ids of each row of a step, as `row` gives them."""

    def step_shape(self, step: int) -> tuple[int, int]:
        """Tokens and image slots of a step's rows."""

    def shapes(self, epoch: int) -> list[tuple[int, int]]:
        """The different `step_shape`s of an epoch, sorted: each is one program to compile."""


class PaddedSchedule:
    """One sample per row; a step's rows are as long as its longest sample, rounded up to one of few lengths.

    lengths and num_images int[N]. draw_order: epoch -> its samples in order, int64[N], such as
    `batching.epoch_order` or `grouped_order` with everything else given.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        num_images: np.ndarray,
        draw_order: Callable[[int], np.ndarray],
        *,
        batch_size: int,
        max_length: int,
    ):
        self.steps_per_epoch = batching.steps_per_epoch(len(lengths), batch_size)
        # An empty row has the id -1, which reads the last entry.
        self._lengths = np.append(lengths, 0)
        self._num_images = np.append(num_images, 0)
        self._max_length = max_length
        self._batch_size = batch_size
        self._batches = _PerEpoch(lambda epoch: _as_steps(draw_order(epoch), batch_size))

    def row(self, step: int, number: int) -> np.ndarray:
        ids = self._step_ids(step)
        return ids[number : number + 1] if ids[number] != PADDING else ids[:0]

    def step_rows(self, step: int) -> list[np.ndarray]:
        return [self.row(step, number) for number in range(self._batch_size)]

    def step_shape(self, step: int) -> tuple[int, int]:
        return self._shapes_of(self._step_ids(step)[None])[0]

    def shapes(self, epoch: int) -> list[tuple[int, int]]:
        return sorted(set(self._shapes_of(self._batches.get(epoch))))

    def _step_ids(self, step: int) -> np.ndarray:
        epoch, step = divmod(step, self.steps_per_epoch)
        return self._batches.get(epoch)[step]

    def _shapes_of(self, batches: np.ndarray) -> list[tuple[int, int]]:
        longest = self._lengths[batches].max(axis=1).tolist()
        most_images = self._num_images[batches].max(axis=1).tolist()
        return [
            (batching.bucket_length(length, self._max_length), batching.bucket_images(count))
            for length, count in zip(longest, most_images, strict=True)
        ]


class PackedSchedule:
    """Several samples per row, planned once; all steps have one shape.

    lengths and num_images int[N]. The plan is kept in cache_dir; "" is nowhere. Raises DataError naming a sample
    that fits into no row.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        num_images: np.ndarray,
        *,
        batch_size: int,
        row_length: int,
        max_images: int,
        seed: int,
        cache_dir: str = "",
        overwrite_cache: bool = False,
    ):
        self.packing = packing.cached_pack(
            lengths,
            num_images,
            row_length=row_length,
            max_images=max_images,
            seed=seed,
            cache_dir=cache_dir,
            overwrite_cache=overwrite_cache,
        )
        self.steps_per_epoch = batching.steps_per_epoch(self.packing.num_rows, batch_size)
        self._shape = (row_length, max_images)
        self._batch_size = batch_size
        row_images = self.packing.totals(num_images)

        def draw(epoch: int) -> np.ndarray:
            order = packing.epoch_rows(row_images, epoch, seed=seed, rows_per_step=batch_size)
            return order.reshape(-1, batch_size)

        self._batches = _PerEpoch(draw)

    def row(self, step: int, number: int) -> np.ndarray:
        epoch, step = divmod(step, self.steps_per_epoch)
        return self.packing.row(self._batches.get(epoch)[step, number])

    def step_rows(self, step: int) -> list[np.ndarray]:
        return [self.row(step, number) for number in range(self._batch_size)]

    def step_shape(self, step: int) -> tuple[int, int]:
        del step  # all are alike
        return self._shape

    def shapes(self, epoch: int) -> list[tuple[int, int]]:
        del epoch
        return [self._shape]


def grouped_order(
    epoch: int,
    *,
    lengths: np.ndarray,
    num_images: np.ndarray,
    batch_size: int,
    accumulation_steps: int,
    seed: int,
) -> np.ndarray:
    """The original's order grouped by modality and length, int64[N]: a step has samples with or without images.

    lengths and num_images int[N]. Lengths are tokens, where the original counts words. Only what is left over
    of both kinds is mixed, at the end of the epoch. The samples of a step do not depend on accumulation_steps,
    which only says into how many microbatches of nearly equal length they are split.
    """
    signed = np.where(num_images > 0, lengths, -lengths)
    draw = seeded_permutations(seed, GROUPS, epoch)
    order = get_modality_length_grouped_indices(
        signed, batch_size // accumulation_steps, accumulation_steps, draw
    )
    return np.array(order, np.int64)


class _PerEpoch:
    """Results of a function of the epoch, worked out once even when many threads ask."""

    def __init__(self, draw: Callable[[int], np.ndarray]):
        self._draw = draw
        self._drawn = {}
        self._lock = threading.Lock()

    def get(self, epoch: int) -> np.ndarray:
        with self._lock:
            if epoch not in self._drawn:
                while len(self._drawn) >= _EPOCHS_KEPT:
                    del self._drawn[next(iter(self._drawn))]
                self._drawn[epoch] = self._draw(epoch)
            return self._drawn[epoch]


def _as_steps(order: np.ndarray, batch_size: int) -> np.ndarray:
    """Cuts an order int64[N] into steps int64[steps, batch_size]; PADDING fills the last."""
    padded = np.pad(order, (0, -len(order) % batch_size), constant_values=PADDING)
    return padded.reshape(-1, batch_size)
