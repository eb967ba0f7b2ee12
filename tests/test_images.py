"""Decoding and resizing images. Pixels of real photographs are compared in the conformance sets."""

import numpy as np
import pytest
from PIL import Image

from llava_jax.data import images
from llava_jax.data.images import load_image, preprocess
from llava_jax.errors import DataError

MEAN = (122, 116, 104)
RED, BLUE = (255, 0, 0), (0, 0, 255)


def picture(rows):
    return Image.fromarray(np.array(rows, np.uint8))


def noise(width, height):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tiff", "a.webp", "a.gif", "a.jpg"])
def test_formats_that_can_be_read(tmp_path, name):
    Image.new("RGB", (5, 3), (9, 9, 9)).save(tmp_path / name)
    image = load_image(str(tmp_path / name))
    assert (image.mode, image.size) == ("RGB", (5, 3))


def test_the_content_decides_the_format(tmp_path):
    pixels = noise(5, 3)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", format="PNG")
    assert np.array_equal(np.asarray(load_image(str(tmp_path / "a.jpg"))), pixels)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    Image.new(mode, (4, 4)).save(path)
    assert load_image(str(path)).mode == "RGB"


def test_transparent_palettes_keep_their_colours_without_a_warning(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=b"\x00\x80")
    assert np.asarray(load_image(str(tmp_path / "a.png"))).tolist() == [[list(RED), list(BLUE)]]


def test_exif_rotation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4, 2)).save(tmp_path / "a.jpg", exif=exif)
    assert load_image(str(tmp_path / "a.jpg")).size == (4, 2)


def test_absent_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"a\.jpg: there is no such image file"):
        load_image(str(tmp_path / "a.jpg"))


@pytest.mark.parametrize("content", [b"", b"no image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.jpg: is not an image in one of the formats JPEG, PNG"):
        load_image(str(tmp_path / "a.jpg"))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif"])
def test_cut_off_files_are_refused(tmp_path, name):
    path = tmp_path / name
    Image.fromarray(noise(64, 64)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"{name}: (the image cannot be decoded|is not an image)"):
        load_image(str(path))


def test_enormous_images_are_refused_before_they_are_decoded(tmp_path):
    Image.new("1", (10_000, 5_001)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png: 10000 x 5001 pixels are more than 50,000,000"):
        load_image(str(tmp_path / "a.png"))


def test_pad_centres_a_wide_image_on_the_mean_colour():
    # 5 x 2 pixels leave three rows: one above and two below.
    result = preprocess(picture([[RED] * 5, [BLUE] * 5]), 5, "pad")
    assert result.dtype == np.uint8
    assert result.tolist() == [[list(color)] * 5 for color in (MEAN, RED, BLUE, MEAN, MEAN)]


def test_pad_centres_a_tall_image():
    result = preprocess(picture([[RED]] * 4), 4, "pad")
    assert result.tolist() == [[list(color) for color in (MEAN, RED, MEAN, MEAN)]] * 4


def test_square_cuts_the_longer_side_at_both_ends():
    pixels = noise(7, 4)
    assert np.array_equal(preprocess(Image.fromarray(pixels), 4, "square"), pixels[:, 1:5])
    assert np.array_equal(
        preprocess(Image.fromarray(pixels.swapaxes(0, 1)), 4, "square"), pixels.swapaxes(0, 1)[1:5]
    )


@pytest.mark.parametrize("aspect_ratio", ["pad", "square"])
@pytest.mark.parametrize("size", [(1, 1), (3, 7), (640, 480), (101, 300)])
def test_every_size_becomes_the_square_that_was_asked_for(aspect_ratio, size):
    assert preprocess(Image.new("RGB", size), 28, aspect_ratio).shape == (28, 28, 3)


def test_pixels_equal_the_clip_processor_of_transformers():
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(
        size={"shortest_edge": 56},
        crop_size={"height": 56, "width": 56},
        do_normalize=False,
        do_rescale=False,
    )
    for width, height in ((97, 61), (40, 90), (56, 56)):
        image = Image.fromarray(noise(width, height))
        expected = np.asarray(processor(image, return_tensors="np")["pixel_values"][0]).transpose(1, 2, 0)
        assert np.array_equal(preprocess(image, 56, "square"), expected)


@pytest.mark.parametrize("aspect_ratio", ["pad", "square"])
def test_images_that_would_grow_out_of_memory_are_refused(monkeypatch, aspect_ratio):
    monkeypatch.setattr(images, "MAX_WORK_PIXELS", 10_000)
    with pytest.raises(DataError, match="200 x 1 pixels are too long and thin"):
        preprocess(Image.new("RGB", (200, 1)), 28, aspect_ratio)
