"""Tiles of a high-resolution image, and the order in which the features of its tiles are told (LLaVA-1.6)."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from llava_jax.data.images import Size, resize

NEWLINE = -1  # the feature id of image_newline


def select_best_resolution(size: Size, pinpoints: Sequence[Size]) -> Size:
    """The first of `pinpoints` that keeps most of an image's pixels and, among those, wastes least of its own."""

    def merit(resolution: Size) -> tuple[int, int]:
        scale = min(resolution[0] / size[0], resolution[1] / size[1])
        shrunk = int(size[0] * scale) * int(size[1] * scale)
        kept = min(shrunk, size[0] * size[1])
        return kept, kept - resolution[0] * resolution[1]

    return max(pinpoints, key=merit)


def fitted_size(size: Size, resolution: Size) -> Size:
    """The size at which an image fits inside `resolution`, one side exactly and the other rounded up."""
    width_scale, height_scale = resolution[0] / size[0], resolution[1] / size[1]
    if width_scale < height_scale:
        return resolution[0], min(math.ceil(size[1] * width_scale), resolution[1])
    return min(math.ceil(size[0] * height_scale), resolution[0]), resolution[1]


def make_tiles(image: Image.Image, image_size: int, resolution: Size, fitted: Size) -> np.ndarray:
    """An RGB image -> uint8[1 + rows * columns, H, W, 3] with H = W = image_size.

    Tile 0 is the whole image without regard to its shape. The others, row by row, are those of the image at size
    `fitted` in the middle of a black one of size `resolution`, which has whole tiles.
    """
    whole = resize(image, (image_size, image_size))
    canvas = Image.new("RGB", resolution)
    canvas.paste(resize(image, fitted), ((resolution[0] - fitted[0]) // 2, (resolution[1] - fitted[1]) // 2))
    columns, rows = resolution[0] // image_size, resolution[1] // image_size
    tiles = np.asarray(canvas).reshape(rows, image_size, columns, image_size, 3).swapaxes(1, 2)
    return np.concatenate([np.asarray(whole)[None], tiles.reshape(-1, image_size, image_size, 3)])


def tile_features(size: Size, *, grid: Size, side: int, merge_type: str) -> np.ndarray:
    """The features that an image of this size shows, in order -> ids int32[n].

    A feature's id is tile * side ** 2 + its place in the tile; NEWLINE stands for image_newline. `grid`: columns
    and rows of tiles behind tile 0; `side`: features on a side of a tile. merge_type "flat" tells tile by tile;
    "spatial" tells tile 0, then the grid line by line; "spatial_unpad" leaves out what the image does not fill
    and ends every line with a NEWLINE.
    """
    columns, rows = grid
    num_features = (1 + columns * rows) * side**2
    if merge_type == "flat":
        return np.arange(num_features, dtype=np.int32)
    whole, rest = np.split(np.arange(num_features, dtype=np.int32), [side**2])
    lines = rest.reshape(rows, columns, side, side).swapaxes(1, 2).reshape(rows * side, columns * side)
    if merge_type == "spatial_unpad":
        lines = _unpad(lines, size)
        lines = np.pad(lines, ((0, 0), (0, 1)), constant_values=NEWLINE)
    return np.concatenate([whole, lines.ravel()])


def _unpad(lines: np.ndarray, size: Size) -> np.ndarray:
    """Cuts off the lines or columns that lie wholly in the padding, as many on either side.

    Both counts are rounded down as the original does, so that one line more may stay (1920 x 1080: 28, not 27).
    """
    width, height = size
    rows, columns = lines.shape
    if width / height > columns / rows:
        cut = (rows - int(height * (columns / width))) // 2
        return lines[cut : rows - cut]
    cut = (columns - int(width * (rows / height))) // 2
    return lines[:, cut : columns - cut]
