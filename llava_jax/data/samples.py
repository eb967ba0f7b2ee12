"""One sample: from its record to tokens, labels and pixels."""

import dataclasses
from itertools import islice

import numpy as np

from llava_jax.config import DataConfig
from llava_jax.data.batching import Sample
from llava_jax.data.conversation import (
    IGNORE,
    IMAGE_TOKEN,
    expand_images,
    tokenize,
    tokenize_document,
    truncate,
)
from llava_jax.data.dataset import Dataset
from llava_jax.data.image_folder import ImageFolder
from llava_jax.data.image_processor import ImageLayout, ImageProcessor, row_feature_ids
from llava_jax.data.records import Record
from llava_jax.data.templates import get_template
from llava_jax.data.tokenizer import Tokenizer, require_tokens
from llava_jax.errors import DataError


@dataclasses.dataclass(frozen=True, slots=True)
class Outline:
    """All of a sample but its pixels: tokens, labels and, of tiled images, feature_ids int32[T]."""

    record: Record
    tokens: np.ndarray
    labels: np.ndarray
    feature_ids: np.ndarray | None
    num_images: int  # that are left after truncation
    num_tiles: int
    full_length: int  # tokens before truncation
    num_pieces: int = 1  # that a document is cut into


class SampleReader:
    """Turns the ids of a dataset into samples. It can be sent to worker processes."""

    def __init__(self, dataset: Dataset, config: DataConfig, tokenizer: Tokenizer, images: ImageProcessor):
        self.dataset = dataset
        self.config = config
        self.tokenizer = tokenizer
        self.images = images
        self._template = get_template(config.template)
        self._image_markers = images.model.use_im_start_end
        require_tokens(tokenizer, images.model.extra_tokens)

    def settings(self) -> dict:
        """All that samples depend on, except for the image files: plain JSON data."""
        config = self.config
        return {
            "dataset": self.dataset.fingerprint,
            "tokenizer": self.tokenizer.fingerprint,
            "template": config.template,
            "mask": config.mask,
            "max_length": config.max_length,
            "too_long": config.too_long,
            "images": self.images.settings(),
            **({"image_markers": True} if self._image_markers else {}),
        }

    def outline(self, id: int) -> Outline:
        """Tokens and labels of a sample; of its images, tiled ones alone are looked at.

        Raises DataError naming the record if it cannot be trained on.
        """
        record = self.dataset[id]
        try:
            if record.document is not None:
                return self._piece(record, self.dataset.piece(id))
            return self._outline(record, self.dataset.folder(id))
        except DataError as error:
            raise DataError(f"{record.name}: {error}") from error

    def read(self, id: int) -> Sample:
        """A sample with its images; raises DataError naming the record of one that cannot be used."""
        outline = self.outline(id)
        record, folder = outline.record, self.dataset.folder(id)
        try:
            tiles = [
                self.images.read(folder.locate(image), is_frame=is_frame)
                for image, is_frame in islice(
                    zip(record.images, record.is_frame, strict=True), outline.num_images
                )
            ]
        except DataError as error:
            raise DataError(f"{record.name}: {error}") from error
        side = self.images.model.vision.image_size
        pixels = np.concatenate([np.zeros((0, side, side, 3), np.uint8), *tiles])
        return Sample(outline.tokens, outline.labels, pixels, outline.feature_ids)

    def _piece(self, record: Record, piece: int) -> Outline:
        """A piece of a document. Each begins with the last token of the one before, so that all tokens are learnt."""
        config = self.config
        encoded = tokenize_document(record.document, self.tokenizer)
        full_length = len(encoded.tokens)
        self._require_short(full_length)
        begin = piece * (config.max_length - 1)
        tokens, labels = (
            array[begin : begin + config.max_length].copy() for array in (encoded.tokens, encoded.labels)
        )
        labels[0] = IGNORE
        feature_ids = np.zeros(len(tokens), np.int32) if config.image_aspect_ratio == "anyres" else None
        num_pieces = -(-(full_length - 1) // (config.max_length - 1))
        return Outline(record, tokens, labels, feature_ids, 0, 0, full_length, num_pieces)

    def _require_short(self, length: int) -> None:
        limit = self.config.max_length
        if length > limit and self.config.too_long == "error":
            raise DataError(
                f"its {length} tokens exceed data.max_length={limit}; shorten it, raise that, or set "
                "data.too_long='truncate'."
            )

    def _outline(self, record: Record, folder: ImageFolder) -> Outline:
        config = self.config
        encoded = tokenize(
            record.turns,
            self._template,
            self.tokenizer,
            num_images=len(record.images),
            mask=config.mask,
            max_length=config.max_length,
            image_markers=self._image_markers,
            system=record.system,
        )
        layouts = [
            self._layout(folder, image, is_frame)
            for image, is_frame in zip(record.images, record.is_frame, strict=True)
        ]
        encoded = expand_images(encoded, [len(layout.feature_ids) for layout in layouts])
        full_length = len(encoded.tokens)
        self._require_short(full_length)
        # The original cuts wherever the limit falls.
        encoded, num_images = truncate(encoded, config.max_length, whole_turns=config.mask != "original")
        layouts = layouts[:num_images]
        return Outline(
            record,
            encoded.tokens,
            encoded.labels,
            self._feature_ids(encoded.tokens, layouts) if config.image_aspect_ratio == "anyres" else None,
            num_images,
            sum(layout.num_tiles for layout in layouts),
            full_length,
        )

    def _layout(self, folder: ImageFolder, image: str, is_frame: bool) -> ImageLayout:
        # Only images in tiles are looked at; others need not be there to be measured.
        path = folder.locate(image) if self.config.image_aspect_ratio == "anyres" else image
        return self.images.layout(path, is_frame=is_frame)

    def _feature_ids(self, tokens: np.ndarray, layouts: list[ImageLayout]) -> np.ndarray:
        """Which of the sample's features each placeholder takes: int32[T], 0 at text."""
        ids = np.zeros(len(tokens), np.int32)
        ids[tokens == IMAGE_TOKEN] = row_feature_ids(layouts, self.images.model.num_image_tokens)
        return ids
