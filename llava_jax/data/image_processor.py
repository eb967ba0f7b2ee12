"""What becomes of an image file: its pixels, and which features the tokens that stand for it show."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image

from llava_jax.config import CLIP, SIGLIP, ConfigError, DataConfig, ModelConfig
from llava_jax.data.images import (
    Size,
    limited_size,
    load_image,
    preprocess,
    read_size,
    resize,
    size_before_crop,
)
from llava_jax.data.tiles import NEWLINE, fitted_size, make_tiles, select_best_resolution, tile_features
from llava_jax.errors import DataError

# A JPEG decodes at a half, a quarter or an eighth only. With a tenth to spare, photographs 640 pixels wide
# decode at a half for a tower of 336.
_FAST_DECODE_SHARE = 0.9


@dataclasses.dataclass(frozen=True)
class ImageLayout:
    """How an image lies among the tokens: it has `num_tiles` tiles, and its i-th token shows feature
    feature_ids[i] (int32[n]): tile * P + place in the tile, P features per tile, or -1 for image_newline."""

    num_tiles: int
    feature_ids: np.ndarray


def row_feature_ids(layouts: Sequence[ImageLayout], features_per_tile: int) -> np.ndarray:
    """The layouts of a row's images one after the other, ids counting through all their tiles -> int32[n]."""
    parts, first = [np.zeros(0, np.int32)], 0
    for layout in layouts:
        shifted = layout.feature_ids + np.int32(first * features_per_tile)
        parts.append(np.where(layout.feature_ids == NEWLINE, np.int32(NEWLINE), shifted))
        first += layout.num_tiles
    return np.concatenate(parts)


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """Image files to pixels and layouts, for one model.

    Raises ConfigError where aspect_ratio="anyres" lacks what it needs of the model.
    """

    model: ModelConfig
    aspect_ratio: str = "pad"
    max_pixels: int | None = None
    min_pixels: int | None = None
    video_max_pixels: int | None = None
    fast_decode: bool = False

    def __post_init__(self):
        if self.aspect_ratio != "anyres":
            return
        side, pinpoints = self.model.vision.image_size, self.model.image_grid_pinpoints
        if not pinpoints or any(length % side or length < side for point in pinpoints for length in point):
            raise ConfigError(
                f"data.image_aspect_ratio='anyres' tiles images to the sizes of model.image_grid_pinpoints={pinpoints}; "
                f"give at least one, with sides that are multiples of model.vision.image_size={side}."
            )
        if self.model.num_image_tokens != self.model.vision.num_patches:
            patches = {CLIP: "patch", SIGLIP: "cls_patch"}[self.model.vision.model_type]
            raise ConfigError(
                "data.image_aspect_ratio='anyres' lays out patches: CLIP's class token has no place, and of SigLIP's none "
                f"may be left out; set model.select_feature={patches!r}."
            )

    @classmethod
    def from_config(cls, data: DataConfig, model: ModelConfig) -> "ImageProcessor":
        """The processor of a stage."""
        return cls(
            model,
            aspect_ratio=data.image_aspect_ratio,
            max_pixels=data.image_max_pixels,
            min_pixels=data.image_min_pixels,
            video_max_pixels=data.video_max_pixels,
            fast_decode=data.fast_decode,
        )

    def settings(self) -> dict:
        """All that pixels and layouts depend on, as plain JSON data."""
        model = {
            "image_size": self.model.vision.image_size,
            "num_image_tokens": self.model.num_image_tokens,
        }
        if self.aspect_ratio == "anyres":
            model["image_grid_pinpoints"] = [list(point) for point in self.model.image_grid_pinpoints]
            model["patch_merge_type"] = self.model.patch_merge_type
        if self.model.vision.model_type != CLIP:
            model["model_type"] = self.model.vision.model_type
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return model | {name: value for name, value in own.items() if name != "model"}

    def read(self, path: str, *, is_frame: bool = False) -> np.ndarray:
        """Pixels uint8[tiles, H, W, 3]. A frame of a video is always one tile, and has its own pixel limit.

        Raises DataError naming the file when it cannot be used.
        """
        sizes = []

        def least(size: Size) -> Size:
            sizes.append(size)
            return self._least_size(size, is_frame)

        image = load_image(path, least=least if self.fast_decode else None)
        size = self._limited(sizes[0] if sizes else image.size, is_frame)
        try:
            # What was decoded at a fraction may lie within the limits already.
            if size != image.size and (not sizes or sizes[0] == image.size or size[0] < image.width):
                image = resize(image, size)
            return self._tiles(image, size, is_frame)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    def layout(self, path: str, *, is_frame: bool = False) -> ImageLayout:
        """The tokens of an image; only "anyres" opens the file, and reads no more than its header.

        Raises DataError naming the file when that is not possible.
        """
        one_tile = np.arange(self.model.num_image_tokens, dtype=np.int32)
        if self.aspect_ratio != "anyres":
            return ImageLayout(1, one_tile)
        merge_type, side = self.model.patch_merge_type, self.model.vision.image_size
        if is_frame:
            end = [NEWLINE] if merge_type == "spatial_unpad" else []
            return ImageLayout(1, np.append(one_tile, np.array(end, np.int32)))
        size = self._limited(read_size(path), is_frame)
        columns, rows = (length // side for length in self._resolution(size))
        features = tile_features(
            size,
            grid=(columns, rows),
            side=side // self.model.vision.patch_size,
            merge_type=merge_type,
        )
        return ImageLayout(1 + columns * rows, features)

    def _limited(self, size: Size, is_frame: bool) -> Size:
        if is_frame:
            return limited_size(size, max_pixels=self.video_max_pixels, min_pixels=None)
        return limited_size(size, max_pixels=self.max_pixels, min_pixels=self.min_pixels)

    def _resolution(self, size: Size) -> Size:
        return select_best_resolution(size, self.model.image_grid_pinpoints)

    def _tiles(self, image: Image.Image, size: Size, is_frame: bool) -> np.ndarray:
        """`size` is that of the whole image, of which `image` may be a smaller version."""
        if self.aspect_ratio != "anyres":
            return preprocess(image, self.model.vision, self.aspect_ratio)[None]
        side = self.model.vision.image_size
        if is_frame:
            return np.asarray(resize(image, (side, side)))[None]
        resolution = self._resolution(size)
        return make_tiles(image, side, resolution, fitted_size(size, resolution))

    def _least_size(self, size: Size, is_frame: bool) -> Size:
        """To what an image of this size may shrink while it is decoded: about the size it is used at."""
        side = self.model.vision.image_size
        limited = self._limited(size, is_frame)
        if self.aspect_ratio == "square":
            used = size_before_crop(limited, side)
        elif self.aspect_ratio == "anyres" and not is_frame:
            used = fitted_size(limited, self._resolution(limited))
        else:
            used = fitted_size(limited, (side, side))
        used = (min(used[0], limited[0]), min(used[1], limited[1]))
        return max(1, int(used[0] * _FAST_DECODE_SHARE)), max(1, int(used[1] * _FAST_DECODE_SHARE))
