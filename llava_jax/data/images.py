"""Reads images and brings them to the size of the vision tower, bit for bit as the original does."""

import contextlib
import math
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, UnidentifiedImageError

from llava_jax.config import SIGLIP, VisionConfig
from llava_jax.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 50_000_000  # of a file
MAX_WORK_PIXELS = 200_000_000  # of what a long, thin image is padded or enlarged to

_BICUBIC = Image.Resampling.BICUBIC
_BICUBIC_REACH = 2  # source pixels on either side when enlarging, times the scale when shrinking

Size = tuple[int, int]  # width, height, as PIL has them


def load_image(path: str, *, least: Callable[[Size], Size] | None = None) -> Image.Image:
    """Decodes an image file to RGB, of an animation the first frame.

    EXIF rotation is not applied, as in the original. `least` tells for an image of some size to which size it
    may be shrunk; a JPEG is then decoded at a half, a quarter or an eighth if that is no less, which is faster
    and gives other pixels. Raises DataError naming the file if it is absent, not an image of `FORMATS`,
    damaged or above MAX_PIXELS.
    """
    with _opened(path) as image:
        if least is not None:
            image.draft("RGB", least(image.size))
        image.load()
    if image.mode == "RGB":
        return image
    if image.mode == "P":
        image.info.pop("transparency", None)  # PIL would drop it too, with a warning
    return image.convert("RGB")


def read_size(path: str) -> Size:
    """Width and height of an image file, from its header alone. Raises DataError as `load_image`."""
    with _opened(path) as image:
        return image.size


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """An image whose header is read; what goes wrong while it is open is told as DataError."""
    try:
        with open(path, "rb") as file:
            image = Image.open(file, formats=FORMATS)
            _require_size(path, image.size)
            yield image
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such image file.") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{path}: is not an image in one of the formats {', '.join(FORMATS)}.") from error
    except DataError:
        raise
    except Exception as error:  # PIL's decoders raise errors of many types on damaged files
        raise DataError(f"{path}: the image cannot be decoded ({type(error).__name__}: {error}).") from error


def preprocess(image: Image.Image, vision: VisionConfig, aspect_ratio: str) -> np.ndarray:
    """Brings an RGB image to uint8[H, W, 3] with H = W = vision.image_size.

    "pad" fills the image up to a square in the tower's mean colour first; "square" does what the tower's image
    processor does by itself: CLIP's enlarges or shrinks it until the shorter side fits and cuts off the rest, SigLIP's
    makes both sides fit, whatever becomes of its shape. Raises DataError for an image too long and thin for either.
    """
    assert aspect_ratio in ("pad", "square"), aspect_ratio
    side = vision.image_size
    if aspect_ratio == "pad":
        return np.asarray(_pad_to_square(image, side, pad_color(vision)))
    if vision.model_type == SIGLIP:
        return np.asarray(resize(image, (side, side)))
    return np.asarray(_cut_to_square(image, side))


def pad_color(vision: VisionConfig) -> tuple[int, ...]:
    """The tower's mean colour, as the original rounds it."""
    return tuple(int(mean * 255) for mean in vision.image_mean)


def resize(image: Image.Image, size: Size) -> Image.Image:
    """Bicubic, as PIL does it. Raises DataError for a size that would take too much memory."""
    _require_work(image, size)
    return image.resize(size, _BICUBIC)


def limited_size(size: Size, *, max_pixels: int | None, min_pixels: int | None) -> Size:
    """Scales a size to at most `max_pixels`, then to about at least `min_pixels`, in width x height.

    Sides are truncated, so that an enlarged image may stay a little below the minimum.
    """
    width, height = size
    for pixels, beyond in ((max_pixels, int.__gt__), (min_pixels, int.__lt__)):
        if pixels is not None and beyond(width * height, pixels):
            scale = math.sqrt(pixels / (width * height))
            width, height = max(1, int(width * scale)), max(1, int(height * scale))
    return width, height


def size_before_crop(size: Size, image_size: int) -> Size:
    """The size at which the shorter side is `image_size`; the longer one is truncated to whole pixels."""
    width, height = size
    shorter = min(width, height)
    return int(image_size * width / shorter), int(image_size * height / shorter)


def _cut_to_square(image: Image.Image, image_size: int) -> Image.Image:
    size = size_before_crop(image.size, image_size)
    left, top = (size[0] - image_size) // 2, (size[1] - image_size) // 2
    return resize(image, size).crop((left, top, left + image_size, top + image_size))


def _pad_to_square(image: Image.Image, image_size: int, color: tuple[int, ...]) -> Image.Image:
    """Resizes the square that has the image in its middle, but computes little of the padding.

    PIL resizes a square along its rows, then along its columns. Done one after the other, the first skips the
    padding of a wide image and the second that of a tall one; `_padded_span` says what may be left out besides.
    """
    width, height = image.size
    side = max(width, height)
    _require_work(image, (side, side))
    offset = (side - min(width, height)) // 2
    (begin, end), (source_begin, source_end) = _padded_span(side, image_size, offset)
    if width >= height:
        lines = Image.new("RGB", (image_size, side), color)
        lines.paste(image.resize((image_size, height), _BICUBIC), (0, offset))
        box, place = (0, source_begin, image_size, source_end), (0, begin)
        part = lines.resize((image_size, end - begin), _BICUBIC, box=box)
    else:
        padded = Image.new("RGB", (side, side), color)
        padded.paste(image, (offset, 0))
        box, place = (source_begin, 0, source_end, side), (begin, 0)
        part = padded.resize((end - begin, side), _BICUBIC, box=box)
        part = part.resize((end - begin, image_size), _BICUBIC)
    square = Image.new("RGB", (image_size, image_size), color)
    square.paste(part, place)
    return square


def _padded_span(side: int, image_size: int, offset: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Which of `image_size` resized pixels see more than padding, which takes `offset` of `side` at either end.

    -> their begin and end, and the begin and end of the source that they are scaled from. PIL finds the same
    numbers for a part of the source as for all of it where both ends fall on whole pixels in source and result.
    """
    parts = math.gcd(side, image_size)
    reach = _BICUBIC_REACH * max(side / image_size, 1)
    first = max(0, math.floor((offset - reach) * parts / side))
    last = min(parts, math.ceil((side - offset + reach) * parts / side))
    target, source = image_size // parts, side // parts
    return (first * target, last * target), (first * source, last * source)


def _require_size(path: str, size: Size) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise DataError(
            f"{path}: {size[0]} x {size[1]} pixels are more than {MAX_PIXELS:,}; make the image smaller."
        )


def _require_work(image: Image.Image, size: Size) -> None:
    if size[0] * size[1] > MAX_WORK_PIXELS:
        raise DataError(
            f"{image.width} x {image.height} pixels are too long and thin: they become {size[0]} x {size[1]} "
            "on the way to a square; cut or shrink the image."
        )
