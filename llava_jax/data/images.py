"""Reads images and brings them to the size of the vision tower, bit for bit as the original does."""

import numpy as np
from PIL import Image, UnidentifiedImageError

from llava_jax.errors import DataError

# CLIP's normalisation of pixels in [0, 1], applied on the device.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 50_000_000  # of a file
MAX_WORK_PIXELS = 200_000_000  # of what a long, thin image is padded or enlarged to
PAD_COLOR = tuple(int(mean * 255) for mean in IMAGE_MEAN)


def load_image(path: str) -> Image.Image:
    """Decodes an image file to RGB, of an animation the first frame.

    EXIF rotation is not applied, as in the original. Raises DataError naming the file if it is absent, not
    an image of `FORMATS`, damaged or above MAX_PIXELS.
    """
    try:
        with open(path, "rb") as file:
            image = Image.open(file, formats=FORMATS)
            _require_size(path, image.size)
            image.load()
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such image file.") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{path}: is not an image in one of the formats {', '.join(FORMATS)}.") from error
    except DataError:
        raise
    except Exception as error:  # PIL's decoders raise errors of many types on damaged files
        raise DataError(f"{path}: the image cannot be decoded ({type(error).__name__}: {error}).") from error
    if image.mode == "P":
        image.info.pop("transparency", None)  # PIL would drop it too, with a warning
    return image.convert("RGB")


def preprocess(image: Image.Image, image_size: int, aspect_ratio: str) -> np.ndarray:
    """Brings an RGB image to uint8[H, W, 3] with H = W = image_size.

    "pad" fills the image up to a square in the mean colour first; "square" enlarges or shrinks it until the
    shorter side fits and cuts off the rest. Raises DataError for an image too long and thin for either.
    """
    if aspect_ratio == "pad":
        image = _pad_to_square(image)
    else:
        assert aspect_ratio == "square", aspect_ratio
    width, height = image.size
    shorter = min(width, height)
    size = (int(image_size * width / shorter), int(image_size * height / shorter))
    _require_work(image, size)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - image_size) // 2, (size[1] - image_size) // 2
    return np.asarray(image.crop((left, top, left + image_size, top + image_size)))


def _pad_to_square(image: Image.Image) -> Image.Image:
    width, height = image.size
    side = max(width, height)
    _require_work(image, (side, side))
    square = Image.new("RGB", (side, side), PAD_COLOR)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def _require_size(path: str, size: tuple[int, int]) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise DataError(
            f"{path}: {size[0]} x {size[1]} pixels are more than {MAX_PIXELS:,}; make the image smaller."
        )


def _require_work(image: Image.Image, size: tuple[int, int]) -> None:
    if size[0] * size[1] > MAX_WORK_PIXELS:
        raise DataError(
            f"{image.width} x {image.height} pixels are too long and thin: they become {size[0]} x {size[1]} "
            "on the way to a square; cut or shrink the image."
        )
