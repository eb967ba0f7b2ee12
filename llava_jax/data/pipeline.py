"""From records to batches: checked before training, loaded in threads, resumable at any step."""

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import grain
import numpy as np
from grain.experimental import ThreadPrefetchIterDataset

from llava_jax.config import ConfigError, DataConfig
from llava_jax.data import batching
from llava_jax.data.batching import Sample
from llava_jax.data.dataset import Dataset
from llava_jax.data.documents import cut_documents
from llava_jax.data.image_processor import ImageProcessor
from llava_jax.data.measuring import measure
from llava_jax.data.packing import default_max_images
from llava_jax.data.samples import SampleReader
from llava_jax.data.schedules import PackedSchedule, PaddedSchedule, Schedule, grouped_order
from llava_jax.data.soundness import BadSamples, find_problems, require_sound
from llava_jax.data.tokenizer import Tokenizer
from llava_jax.errors import DataError

_BATCHES_AHEAD = 2  # loaded while the device computes
_PARTS_OF_A_BATCH = 16  # that threads share; each costs grain a fifth of a millisecond
_ROW_LENGTHS = (
    4  # a packed row holds so many samples of data.max_length, unless data.row_length says otherwise
)
_REPLACEMENTS_TRIED = 100


class Pipeline:
    """The training data of one stage.

    Building it measures every sample, so that each step's shapes are known and bad records are reported before
    training: DataError with the first of them and their number. Batches are functions of the step alone; nothing
    has to be saved to resume. `own_rows` int64[B] are the rows of a microbatch that this process loads (None: all).
    `report` is the file in which bad samples are told.
    """

    def __init__(
        self,
        config: DataConfig,
        dataset: Dataset,
        *,
        tokenizer: Tokenizer,
        images: ImageProcessor,
        seed: int,
        accumulation_steps: int = 1,
        own_rows: np.ndarray | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
        report: Path | None = None,
    ):
        if config.batch_size % accumulation_steps:
            raise ConfigError(
                f"data.batch_size={config.batch_size} is not a multiple of train.accumulation_steps="
                f"{accumulation_steps}; change one of them."
            )
        num_rows = config.batch_size // accumulation_steps
        self.config = config
        self._images = images
        self._seed = seed
        self._accumulation_steps = accumulation_steps
        self._own_rows = batching.rows_of_step(
            np.arange(num_rows) if own_rows is None else own_rows,
            batch_size=config.batch_size,
            accumulation_steps=accumulation_steps,
        ).ravel()
        reader = SampleReader(dataset, config, tokenizer, images)
        measured = measure(
            reader, cache_dir=config.cache_dir, overwrite_cache=config.overwrite_cache, progress=progress
        )
        self._reader, self.measured = cut_documents(reader, measured)
        self.dataset = dataset = self._reader.dataset
        problems = find_problems(dataset, self.measured)
        files = ", ".join(source.index.path for source in dataset.sources)
        require_sound(config, self.measured, problems, where=files)
        self.bad_samples = BadSamples(config, len(dataset), problems, report)
        self._usable = np.setdiff1d(np.arange(len(dataset)), list(problems))  # what the schedule counts
        self.schedule = self._make_schedule()
        self.fingerprint = self._fingerprint()

    @property
    def num_samples(self) -> int:
        """How many samples an epoch has; unusable ones that are skipped do not count."""
        return len(self._usable)

    @property
    def steps_per_epoch(self) -> int:
        return self.schedule.steps_per_epoch

    def summary(self) -> dict[str, int]:
        """Counts over all usable samples, for a person to check before training."""
        measured, usable = self.measured, self._usable
        num_images = measured.num_images[usable]
        return {
            "samples": self.num_samples,
            "samples_with_image": int(np.count_nonzero(num_images)),
            "samples_text_only": int(np.count_nonzero(num_images == 0)),
            "samples_truncated": int(
                np.count_nonzero(measured.full_lengths[usable] > measured.lengths[usable])
            ),
            "samples_teaching_nothing": int(np.count_nonzero(measured.num_supervised[usable] == 0)),
            "samples_unusable": len(self.dataset) - self.num_samples,
            "images": int(num_images.sum()),
            "tokens": int(measured.lengths[usable].sum()),
            "supervised_tokens": int(measured.num_supervised[usable].sum()),
            "longest_sample": int(measured.lengths[usable].max()),
        }

    def shapes(self, first_step: int, last_step: int) -> list[tuple[int, int]]:
        """The different (tokens, image slots) of rows in these steps; each is a program to compile."""
        epochs = range(first_step // self.steps_per_epoch, -(-last_step // self.steps_per_epoch))
        return sorted({shape for epoch in epochs for shape in self.schedule.shapes(epoch)})

    def step_rows(self, step: int) -> list[np.ndarray]:
        """The ids of the samples in each row of a step, over all processes: int64[n] each."""
        return [self._usable[row] for row in self.schedule.step_rows(step)]

    def count(self, step: int) -> tuple[int, int]:
        """How many tokens and images a step has, over all processes, padding not counted."""
        ids = np.concatenate(self.step_rows(step))
        return int(self.measured.lengths[ids].sum()), int(self.measured.num_images[ids].sum())

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """This process's rows of a step's batch.

        -> tokens, labels, positions, segment_ids int32[A, B, T], images uint8[A, B, M, H, W, 3] and, of tiled
        images, feature_ids int32[A, B, T], with A = accumulation steps and B = rows of a microbatch on this
        process. T and M are the same on all processes. Raises DataError naming the record of an image that
        cannot be used, unless such samples are skipped.
        """
        return self._collate(step, [self._load(step, row) for row in self._own_rows])

    def iterate(self, first_step: int, last_step: int) -> Iterator[dict[str, np.ndarray]]:
        """Yields `batch(step)` for first_step <= step < last_step, loaded ahead by `config.num_threads`."""
        parts = np.array_split(self._own_rows, min(_PARTS_OF_A_BATCH, len(self._own_rows)))

        def load(index: int) -> tuple[int, list[list[Sample]]]:
            step = first_step + index // len(parts)
            return step, [self._load(step, row) for row in parts[index % len(parts)]]

        def collate(loaded: list[tuple[int, list[list[Sample]]]]) -> dict[str, np.ndarray]:
            return self._collate(loaded[0][0], [row for _, rows in loaded for row in rows])

        threads = self.config.num_threads
        ahead = max(threads, _BATCHES_AHEAD * len(parts)) if threads else 0
        loaded = grain.MapDataset.range((last_step - first_step) * len(parts)).map(load)
        loaded = loaded.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead))
        batches = loaded.batch(len(parts), batch_fn=collate)
        if threads:
            batches = ThreadPrefetchIterDataset(batches, prefetch_buffer_size=1)
        return iter(batches)

    def _load(self, step: int, row: int) -> list[Sample]:
        samples = [self._read(int(id)) for id in self._usable[self.schedule.row(step, row)]]
        return [sample for sample in samples if sample is not None]

    def _read(self, id: int) -> Sample | None:
        """The sample, or what takes its place if its images cannot be used and such samples are skipped."""
        try:
            return self._read_measured(id)
        except DataError as error:
            if self.config.on_bad_sample == "error":
                raise
            replacement, sample = self._replace(id)
            self.bad_samples.add(id, str(error), replacement)
            return sample

    def _read_measured(self, id: int) -> Sample:
        """The sample, if it still is as long as when it was measured: rows are planned for that."""
        sample, measured = self._reader.read(id), self.measured
        if (len(sample.tokens), len(sample.images)) != (measured.lengths[id], measured.num_tiles[id]):
            raise DataError(
                f"{self.dataset[id].name}: has {len(sample.tokens)} tokens and {len(sample.images)} images now, not "
                f"{measured.lengths[id]} and {measured.num_tiles[id]} as when it was measured: its images or frames "
                "have changed. Measure again with data.overwrite_cache=True."
            )
        return sample

    def _replace(self, id: int) -> tuple[str | None, Sample | None]:
        """The name of the next sample that needs no more room and can be read, and the sample; None if there is none.

        A function of the data alone.
        """
        measured = self.measured
        fits = (measured.lengths <= measured.lengths[id]) & (measured.num_tiles <= measured.num_tiles[id])
        candidates = self._usable[fits[self._usable]]
        candidates = np.roll(candidates, -np.searchsorted(candidates, id, side="right"))
        for other in candidates[:_REPLACEMENTS_TRIED].tolist():
            with contextlib.suppress(DataError):
                return self.dataset[other].name, self._read_measured(other)
        return None, None

    def _collate(self, step: int, rows: list[list[Sample]]) -> dict[str, np.ndarray]:
        length, num_images = self.schedule.step_shape(step)
        tiled = self.config.image_aspect_ratio == "anyres"
        batch = batching.collate(
            rows,
            length=length,
            num_images=num_images,
            image_size=self._images.model.vision.image_size,
            features_per_image=self._images.model.num_image_tokens if tiled else None,
        )
        leading = (self._accumulation_steps, len(rows) // self._accumulation_steps)
        return {key: value.reshape(leading + value.shape[1:]) for key, value in batch.items()}

    def _make_schedule(self) -> Schedule:
        config, measured, usable = self.config, self.measured, self._usable
        lengths, num_tiles = measured.lengths[usable], measured.num_tiles[usable]
        if config.packing:
            row_length = config.row_length or _ROW_LENGTHS * config.max_length
            return PackedSchedule(
                lengths,
                num_tiles,
                batch_size=config.batch_size,
                row_length=row_length,
                max_images=config.max_images_per_row
                or default_max_images(lengths, num_tiles, row_length=row_length),
                seed=self._seed,
                cache_dir=config.cache_dir,
                overwrite_cache=config.overwrite_cache,
            )
        if config.group_by_modality_length:
            draw_order = functools.partial(
                grouped_order,
                lengths=lengths,
                num_images=num_tiles,
                batch_size=config.batch_size,
                accumulation_steps=self._accumulation_steps,
                seed=self._seed,
            )
        else:
            draw_order = functools.partial(
                batching.epoch_order, num_samples=len(usable), seed=self._seed, shuffle=config.shuffle
            )
        return PaddedSchedule(
            lengths, num_tiles, draw_order, batch_size=config.batch_size, max_length=config.max_length
        )

    def _fingerprint(self) -> str:
        """Hex digest of all that the batch of a step depends on, except for what the image files hold."""
        config = self.config
        sizes = np.stack([self.measured.lengths, self.measured.num_tiles])  # they decide the plan of rows
        parts = self._reader.settings() | {
            "sizes": hashlib.sha256(sizes.astype("<i4").tobytes()).hexdigest(),
            "usable": hashlib.sha256(self._usable.astype("<i8").tobytes()).hexdigest(),
            "batch_size": config.batch_size,
            "shuffle": config.shuffle,
            "group_by_modality_length": config.group_by_modality_length,
            "packing": config.packing,
            "row_length": config.row_length,
            "max_images_per_row": config.max_images_per_row,
            "seed": self._seed,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
