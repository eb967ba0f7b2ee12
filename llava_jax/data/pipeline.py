"""From a records file to batches: checked before training, loaded in threads, resumable at any step."""

import functools
import hashlib
import json
import os
from collections.abc import Iterator

import grain
import numpy as np

from llava_jax.config import DataConfig
from llava_jax.data import batching
from llava_jax.data.batching import PADDING, Sample
from llava_jax.data.conversation import (
    IGNORE,
    PLACEHOLDER,
    expand_images,
    tokenize,
    truncate,
)
from llava_jax.data.images import load_image, preprocess
from llava_jax.data.records import ImageFolder, Record, check_images, raise_problems, read_records
from llava_jax.data.templates import get_template
from llava_jax.data.tokenizer import Tokenizer
from llava_jax.errors import DataError

_BATCHES_AHEAD = 2  # loaded while the device computes


class Pipeline:
    """The training data of one stage.

    Building it reads, checks and tokenizes every record once, so that each step's shapes are known and
    bad records are reported before training: DataError with the first of them and their number. Batches
    are functions of the step alone; nothing has to be saved to resume.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        tokenizer: Tokenizer,
        image_size: int,
        num_image_tokens: int,
        seed: int,
        accumulation_steps: int = 1,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if config.batch_size % (accumulation_steps * process_count):
            raise DataError(
                f"data.batch_size={config.batch_size} is not a multiple of train.accumulation_steps="
                f"{accumulation_steps} times the {process_count} processes; change one of them."
            )
        self.config = config
        self._tokenizer = tokenizer
        self._template = get_template(config.template)
        self._image_size = image_size
        self._num_image_tokens = num_image_tokens
        self._seed = seed
        self._num_rows = config.batch_size // process_count
        self._rows = functools.partial(
            batching.process_rows,
            accumulation_steps=accumulation_steps,
            process_index=process_index,
            process_count=process_count,
        )
        self._records = read_records(config.path)
        self._folder = ImageFolder(config.image_folder)
        if any(record.images for record in self._records) and not os.path.isdir(config.image_folder):
            raise DataError(
                f"data.image_folder={config.image_folder!r} is no directory, but records of {config.path} have images."
            )
        raise_problems(config.path, check_images(self._records, self._folder))
        self._measure()
        self.fingerprint = self._fingerprint()
        self._epoch_order = functools.lru_cache(maxsize=2)(self._draw_epoch_order)

    @property
    def num_samples(self) -> int:
        return len(self._records)

    @property
    def steps_per_epoch(self) -> int:
        return batching.steps_per_epoch(self.num_samples, self.config.batch_size)

    def summary(self) -> dict[str, int]:
        """Counts over all samples, for a person to check before training."""
        num_with_image = int(np.count_nonzero(self._num_images))
        return {
            "samples": self.num_samples,
            "samples_with_image": num_with_image,
            "samples_text_only": self.num_samples - num_with_image,
            "samples_truncated": self._num_truncated,
            "samples_emptied_by_truncation": int(np.count_nonzero(self._num_supervised == 0)),
            "images": int(self._num_images.sum()),
            "tokens": int(self._lengths.sum()),
            "supervised_tokens": int(self._num_supervised.sum()),
            "longest_sample": int(self._lengths.max()),
        }

    def sample_ids(self, step: int) -> np.ndarray:
        """The samples of a step, over all processes: int64[batch_size], -1 for rows left empty."""
        order = self._epoch_order(step // self.steps_per_epoch)
        return batching.sample_ids(step, order=order, batch_size=self.config.batch_size)

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """This process's part of a step's batch.

        -> tokens, labels, positions, segment_ids int32[A, B, T], images uint8[A, B, M, H, W, 3] with
        A = accumulation steps and B = rows of a microbatch on this process. T and M are the same on all
        processes. Raises DataError naming the record of an image that cannot be used.
        """
        return self._collate(step, [self._load(id) for id in self._rows(self.sample_ids(step)).flat])

    def iterate(self, first_step: int, last_step: int) -> Iterator[dict[str, np.ndarray]]:
        """Yields `batch(step)` for first_step <= step < last_step, loaded ahead by `config.num_threads`."""
        num_rows = self._num_rows

        def load(index: int) -> tuple[int, Sample | None]:
            step, row = first_step + index // num_rows, index % num_rows
            return step, self._load(self._rows(self.sample_ids(step)).flat[row])

        threads = self.config.num_threads
        buffer = max(threads, _BATCHES_AHEAD * num_rows) if threads else 0
        rows = grain.MapDataset.range((last_step - first_step) * num_rows).map(load)
        rows = rows.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer))
        return iter(
            rows.batch(num_rows, batch_fn=lambda pairs: self._collate(pairs[0][0], [s for _, s in pairs]))
        )

    def _measure(self) -> None:
        """Tokenizes every record: lengths, images and supervised tokens int32[num_samples]."""
        self._lengths = np.zeros(self.num_samples, np.int32)
        self._num_supervised = np.zeros(self.num_samples, np.int32)
        self._num_images = np.array([len(record.images) for record in self._records], np.int32)
        self._num_truncated = 0
        problems = []
        for index, record in enumerate(self._records):
            try:
                tokens, labels, full_length = self._tokenize(record)
            except DataError as error:
                problems.append(str(error))
                continue
            self._lengths[index] = len(tokens)
            self._num_supervised[index] = np.count_nonzero(labels != IGNORE)
            self._num_truncated += full_length > len(tokens)
        raise_problems(self.config.path, problems)
        if not self._num_supervised.any():
            raise DataError(
                f"{self.config.path}: nothing is left to learn: data.max_length={self.config.max_length} cuts off every "
                "answer; raise it."
            )

    def _tokenize(self, record: Record) -> tuple[np.ndarray, np.ndarray, int]:
        """-> tokens and labels int32[T] as they are trained on, and the length before truncation."""
        config = self.config
        try:
            encoded = tokenize(
                record.turns,
                self._template,
                self._tokenizer,
                num_images=len(record.images),
                mask=config.mask,
                max_length=config.max_length,
            )
            if not record.images and any(PLACEHOLDER in text for _, text in record.turns):
                raise DataError(
                    f"its text has {PLACEHOLDER}, but it names no image; add 'image' or take that out."
                )
            encoded = expand_images(encoded, [self._num_image_tokens] * len(record.images))
            length = len(encoded.tokens)
            if length > config.max_length and config.too_long == "error":
                raise DataError(
                    f"its {length} tokens exceed data.max_length={config.max_length}; shorten it, raise "
                    "that, or set data.too_long='truncate'."
                )
            encoded, num_images = truncate(encoded, config.max_length, whole_turns=False)
            if num_images != len(record.images):
                raise DataError(
                    f"of its {length} tokens an image ends behind data.max_length={config.max_length}; raise that (an "
                    f"image takes {self._num_image_tokens} tokens) or shorten the conversation."
                )
        except DataError as error:
            raise DataError(f"{record.name}: {error}") from error
        return encoded.tokens, encoded.labels, length

    def _load(self, id: int) -> Sample | None:
        if id == PADDING:
            return None
        record = self._records[id]
        tokens, labels, _ = self._tokenize(record)
        images = np.zeros((len(record.images), self._image_size, self._image_size, 3), np.uint8)
        for slot, image in enumerate(record.images):
            try:
                pixels = load_image(self._folder.locate(image))
                images[slot] = preprocess(pixels, self._image_size, self.config.image_aspect_ratio)
            except DataError as error:
                raise DataError(f"{self.config.path}: {record.name}: {error}") from error
        return Sample(tokens, labels, images)

    def _collate(self, step: int, samples: list[Sample | None]) -> dict[str, np.ndarray]:
        ids = self.sample_ids(step)
        real = ids[ids != PADDING]
        batch = batching.collate(
            samples,
            length=batching.bucket_length(int(self._lengths[real].max()), self.config.max_length),
            num_images=batching.bucket_images(int(self._num_images[real].max())),
            image_size=self._image_size,
        )
        leading = self._rows(ids).shape
        return {key: value.reshape(leading + value.shape[1:]) for key, value in batch.items()}

    def _draw_epoch_order(self, epoch: int) -> np.ndarray:
        return batching.epoch_order(
            epoch, num_samples=self.num_samples, seed=self._seed, shuffle=self.config.shuffle
        )

    def _fingerprint(self) -> str:
        """Hex digest of all that the batch of a step depends on, except for what the image files hold."""
        config = self.config
        with open(config.path, "rb") as file:
            records = hashlib.file_digest(file, "sha256").hexdigest()
        parts = {
            "records": records,
            "tokenizer": self._tokenizer.fingerprint,
            "template": config.template,
            "mask": config.mask,
            "image_aspect_ratio": config.image_aspect_ratio,
            "image_size": self._image_size,
            "num_image_tokens": self._num_image_tokens,
            "max_length": config.max_length,
            "batch_size": config.batch_size,
            "shuffle": config.shuffle,
            "seed": self._seed,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
