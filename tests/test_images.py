"""Decoding and resizing images. Pixels of real photographs are compared in the conformance sets."""

import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_jax.config import CLIP, SIGLIP, ModelConfig, VisionConfig
from llava_jax.data import images
from llava_jax.data.image_processor import ImageProcessor
from llava_jax.data.images import limited_size, load_image, preprocess, read_size
from llava_jax.errors import DataError

MEAN = (122, 116, 104)
RED, BLUE = (255, 0, 0), (0, 0, 255)


def tower(image_size, model_type=CLIP):
    return VisionConfig(image_size=image_size, patch_size=1, model_type=model_type)


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


def gradient(mode, size=(31, 20)):
    """An image of the mode in which all channels differ."""
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    if mode == "I;16":
        return Image.fromarray((60000 * x * y).astype(np.uint16))
    if mode == "P":
        return gradient("RGB", size).quantize(16)
    channels = [x, y, 1 - x, x * y][: len(Image.new(mode, (1, 1)).getbands())]
    bands = [Image.fromarray((255 * channel).astype(np.uint8)) for channel in channels]
    return bands[0].convert("1") if mode == "1" else Image.merge(mode, bands)


def save_animation(path):
    frames = [gradient("RGB"), Image.new("RGB", (31, 20), RED)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)


MODES = {
    "rgba.png": lambda path: gradient("RGBA").save(path),
    "rgba.webp": lambda path: gradient("RGBA").save(path, lossless=True),
    "grey.png": lambda path: gradient("L").save(path),
    "grey.jpg": lambda path: gradient("L").save(path),
    "grey_alpha.png": lambda path: gradient("LA").save(path),
    "grey_16_bits.png": lambda path: gradient("I;16").save(path),
    "grey_16_bits.tiff": lambda path: gradient("I;16").save(path),
    "one_bit.png": lambda path: gradient("1").save(path),
    "cmyk.jpg": lambda path: gradient("CMYK").save(path),
    "cmyk.tiff": lambda path: gradient("CMYK").save(path),
    "palette.png": lambda path: gradient("P").save(path),
    "palette.gif": lambda path: gradient("P").save(path),
    "palette_with_one_transparent.png": lambda path: gradient("P").save(path, transparency=3),
    "palette_with_alpha.png": lambda path: gradient("P").save(path, transparency=bytes(range(16))),
    "palette_with_one_transparent.gif": lambda path: gradient("P").save(path, transparency=3),
    "animated.gif": save_animation,
    "animated.webp": save_animation,
    "animated.png": save_animation,
    "several_pages.tiff": save_animation,
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_the_rgb_of_pil(tmp_path, name):
    path = tmp_path / name
    MODES[name](path)
    found = load_image(str(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's about the palette that has transparent colours
        expected = Image.open(path).convert("RGB")
    assert found.mode == "RGB" and read_size(str(path)) == found.size == (31, 20)
    assert np.array_equal(np.asarray(found), np.asarray(expected))
    assert len(np.unique(found)) > 1


def test_transparent_colours_are_kept(tmp_path):
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
    result = preprocess(picture([[RED] * 5, [BLUE] * 5]), tower(5), "pad")
    assert result.dtype == np.uint8
    assert result.tolist() == [[list(color)] * 5 for color in (MEAN, RED, BLUE, MEAN, MEAN)]


def test_pad_centres_a_tall_image():
    result = preprocess(picture([[RED]] * 4), tower(4), "pad")
    assert result.tolist() == [[list(color) for color in (MEAN, RED, MEAN, MEAN)]] * 4


def test_square_cuts_the_longer_side_at_both_ends():
    pixels = noise(7, 4)
    assert np.array_equal(preprocess(Image.fromarray(pixels), tower(4), "square"), pixels[:, 1:5])
    assert np.array_equal(
        preprocess(Image.fromarray(pixels.swapaxes(0, 1)), tower(4), "square"), pixels.swapaxes(0, 1)[1:5]
    )


@pytest.mark.parametrize("model_type", [CLIP, SIGLIP])
@pytest.mark.parametrize("aspect_ratio", ["pad", "square"])
@pytest.mark.parametrize("size", [(1, 1), (3, 7), (640, 480), (101, 300)])
def test_every_size_becomes_the_square_that_was_asked_for(model_type, aspect_ratio, size):
    assert preprocess(Image.new("RGB", size), tower(28, model_type), aspect_ratio).shape == (28, 28, 3)


@pytest.mark.parametrize("aspect_ratio", ["pad", "square"])
@pytest.mark.parametrize("size", [(97, 61), (40, 90), (56, 56), (300, 41)])
def test_pixels_equal_the_siglip_processor_of_transformers(aspect_ratio, size):
    """As TinyLLaVA Factory has it: "pad" expands to a square in the processor's mean colour, then the processor runs."""
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    processor = SiglipImageProcessorPil(size={"height": 56, "width": 56})
    image = given = Image.fromarray(noise(*size))
    if aspect_ratio == "pad":
        given = Image.new("RGB", (max(size), max(size)), (127, 127, 127))
        given.paste(image, ((max(size) - size[0]) // 2, (max(size) - size[1]) // 2))
    ours = preprocess(image, tower(56, SIGLIP), aspect_ratio)
    levels = processor(given, do_normalize=False, do_rescale=False, return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(ours, levels.transpose(1, 2, 0))
    normal = processor(given, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    vision = VisionConfig(model_type=SIGLIP)
    scaled = (ours * (1 / 255)).astype(np.float32)
    expected = (scaled - np.array(vision.image_mean, np.float32)) / np.array(vision.image_std, np.float32)
    np.testing.assert_array_equal(normal, expected)


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
        assert np.array_equal(preprocess(image, tower(56), "square"), expected)


@pytest.mark.parametrize("aspect_ratio", ["pad", "square"])
def test_images_that_would_grow_out_of_memory_are_refused(monkeypatch, aspect_ratio):
    monkeypatch.setattr(images, "MAX_WORK_PIXELS", 10_000)
    with pytest.raises(DataError, match="200 x 1 pixels are too long and thin"):
        preprocess(Image.new("RGB", (200, 1)), tower(28), aspect_ratio)


def sides():
    """Lengths with and without common factors with the sizes they are scaled to."""
    multiples = st.builds(lambda n, factor: n * factor, st.integers(1, 20), st.sampled_from([7, 16, 21, 32]))
    return st.integers(1, 500) | multiples


@settings(max_examples=150, deadline=None)
@given(
    sides(),
    sides(),
    st.sampled_from([28, 56, 224, 336, 384]),
    st.sampled_from([(CLIP, MEAN), (SIGLIP, (127, 127, 127))]),
    st.integers(0, 2**32 - 1),
)
def test_padding_equals_resizing_the_whole_square_with_pil(width, height, image_size, kind, seed):
    model_type, color = kind
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    image, side = Image.fromarray(pixels), max(width, height)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    expected = square.resize((image_size, image_size), Image.Resampling.BICUBIC)
    assert np.array_equal(preprocess(image, tower(image_size, model_type), "pad"), np.asarray(expected))


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (640, 427), (1024, 200), (96, 672)])
def test_of_common_photographs_padding_is_left_out(size, monkeypatch):
    resized = []
    resize = Image.Image.resize

    def spy(image, size, *args, **kwargs):
        resized.append(size)
        return resize(image, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", spy)
    preprocess(Image.new("RGB", size), tower(336), "pad")
    assert min(resized[-1]) < 336


@pytest.mark.parametrize(
    ("size", "limits", "expected"),
    [
        ((4000, 3000), {"max_pixels": 768 * 768}, (886, 665)),
        ((10, 20), {"min_pixels": 1024}, (22, 45)),
        ((9000, 1), {"max_pixels": 100}, (948, 1)),
        ((30, 20), {"max_pixels": 600, "min_pixels": 600}, (30, 20)),
        ((30, 20), {}, (30, 20)),
    ],
)
def test_pixel_limits(size, limits, expected):
    assert limited_size(size, **{"max_pixels": None, "min_pixels": None} | limits) == expected


MODEL = ModelConfig(vision=VisionConfig(image_size=28))


def save_photograph(path, size=(640, 480)):
    """Smooth shapes, as a camera sees them."""
    small = Image.fromarray(noise(9, 7))
    small.resize(size, Image.Resampling.BICUBIC).save(path, quality=95)
    return str(path)


def test_images_are_limited_before_anything_else(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(noise(80, 50)).save(path)
    expected = Image.open(path).resize((40, 25), Image.Resampling.BICUBIC)
    for is_frame, limit in ((False, "max_pixels"), (True, "video_max_pixels")):
        pixels = ImageProcessor(MODEL, **{limit: 1000}).read(str(path), is_frame=is_frame)
        assert np.array_equal(pixels, preprocess(expected, tower(28), "pad")[None])
    unlimited = preprocess(Image.open(path), tower(28), "pad")[None]
    assert np.array_equal(ImageProcessor(MODEL, video_max_pixels=1000).read(str(path)), unlimited)
    frame = ImageProcessor(MODEL, max_pixels=1000, min_pixels=500).read(str(path), is_frame=True)
    assert np.array_equal(frame, unlimited)


def test_plain_layouts_open_no_file():
    layout = ImageProcessor(MODEL).layout("absent.jpg")
    assert (layout.num_tiles, layout.feature_ids.tolist()) == (1, [0, 1, 2, 3])
    with_class = ModelConfig(vision=VisionConfig(image_size=28), select_feature="cls_patch")
    assert ImageProcessor(with_class, aspect_ratio="square").layout("").feature_ids.tolist() == [
        0,
        1,
        2,
        3,
        4,
    ]


@pytest.mark.parametrize("aspect_ratio", ["pad", "square", "anyres"])
@pytest.mark.parametrize("limits", [{}, {"max_pixels": 200 * 200}, {"min_pixels": 700 * 700}], ids=str)
def test_fast_decoding_changes_jpegs_a_little(tmp_path, aspect_ratio, limits):
    path = save_photograph(tmp_path / "a.jpg")
    model = ModelConfig(vision=VisionConfig(image_size=112), image_grid_pinpoints=((112, 224), (224, 112)))
    exact = ImageProcessor(model, aspect_ratio=aspect_ratio, **limits)
    fast = ImageProcessor(model, aspect_ratio=aspect_ratio, fast_decode=True, **limits)
    difference = np.abs(fast.read(path).astype(int) - exact.read(path))
    assert 0 < difference.mean() < 4
    assert fast.layout(path).num_tiles == exact.layout(path).num_tiles == len(exact.read(path))


def test_fast_decoding_leaves_other_files_alone(tmp_path):
    save_photograph(tmp_path / "a.png")
    save_photograph(tmp_path / "b.jpg", (100, 80))  # less than twice what is needed
    model = ModelConfig(vision=VisionConfig(image_size=112))
    for name in ("a.png", "b.jpg"):
        exact = ImageProcessor(model).read(str(tmp_path / name))
        assert np.array_equal(ImageProcessor(model, fast_decode=True).read(str(tmp_path / name)), exact)


def test_problems_of_pixels_name_the_file(monkeypatch, tmp_path):
    Image.new("RGB", (200, 1)).save(tmp_path / "a.png")
    monkeypatch.setattr(images, "MAX_WORK_PIXELS", 10_000)
    with pytest.raises(DataError, match=r"a\.png: 200 x 1 pixels are too long and thin"):
        ImageProcessor(MODEL).read(str(tmp_path / "a.png"))


@pytest.mark.parametrize(
    "changes",
    [
        {"aspect_ratio": "square"},
        {"max_pixels": 9},
        {"min_pixels": 9},
        {"video_max_pixels": 9},
        {"fast_decode": True},
        {"model": ModelConfig(vision=VisionConfig(image_size=56))},
        {"model": ModelConfig(vision=VisionConfig(image_size=28), select_feature="cls_patch")},
        {
            "model": ModelConfig(
                vision=VisionConfig(image_size=28, model_type=SIGLIP), select_feature="cls_patch"
            )
        },
    ],
    ids=str,
)
def test_settings_tell_what_pixels_and_layouts_depend_on(changes):
    changed = ImageProcessor(**{"model": MODEL} | changes)
    assert changed.settings() != ImageProcessor(MODEL).settings()
    assert json.loads(json.dumps(changed.settings())) == changed.settings()
