"""Tiles of large images and the order of their features, against figures of the original and features cut by torch."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from llava_jax.config import ConfigError, ModelConfig, TextConfig, VisionConfig
from llava_jax.data.image_processor import ImageProcessor
from llava_jax.data.tiles import fitted_size, make_tiles, select_best_resolution, tile_features
from llava_jax.errors import DataError

GRID = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
SMALL = ModelConfig(
    vision=VisionConfig(16, 26, 2, 2, image_size=8, patch_size=4),
    text=TextConfig(90, 24, 28, 2, 4, 2, 6),
    image_grid_pinpoints=((8, 16), (16, 8), (16, 16)),
    patch_merge_type="spatial_unpad",
)


def save(tmp_path, width, height, name="a.png"):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / name)
    return str(tmp_path / name)


@pytest.mark.parametrize(
    ("size", "best", "num_tokens"),
    [
        ((640, 480), (672, 672), 2340),
        ((1000, 300), (1008, 336), 2182),
        ((300, 1000), (336, 1008), 2232),
        ((336, 336), (336, 672), 1176),
        ((100, 100), (336, 672), 1176),
        ((1920, 1080), (672, 672), 1948),
    ],
)
def test_published_grids_give_as_many_tokens_as_the_original(tmp_path, size, best, num_tokens):
    model = ModelConfig(image_grid_pinpoints=GRID, patch_merge_type="spatial_unpad")
    layout = ImageProcessor(model, aspect_ratio="anyres").layout(save(tmp_path, *size))
    assert select_best_resolution(size, GRID) == best
    assert layout.num_tiles == 1 + best[0] * best[1] // 336**2
    assert layout.feature_ids.shape == (num_tokens,) and layout.feature_ids.dtype == np.int32


def test_one_line_too_many_stays_where_the_padding_is_odd():
    ids = tile_features((1920, 1080), grid=(2, 2), side=24, merge_type="spatial_unpad")
    assert len(ids) == 576 + 28 * 49  # 27 lines hold the image


def test_spatial_unpad_line_by_line():
    ids = tile_features((4, 2), grid=(2, 1), side=2, merge_type="spatial_unpad")
    assert ids.tolist() == [0, 1, 2, 3, 4, 5, 8, 9, -1, 6, 7, 10, 11, -1]
    assert tile_features((4, 2), grid=(2, 1), side=2, merge_type="spatial").tolist() == [
        *[0, 1, 2, 3, 4, 5, 8, 9, 6, 7, 10, 11]
    ]
    assert tile_features((4, 2), grid=(2, 1), side=2, merge_type="flat").tolist() == list(range(12))
    ids = tile_features((4, 3), grid=(1, 2), side=2, merge_type="spatial_unpad")
    assert ids.tolist() == [0, 1, 2, 3, 6, 7, -1, 8, 9, -1]  # 1.5 of 4 lines hold the image


@pytest.mark.parametrize("size", [(640, 480), (333, 1001), (1, 700), (47, 46), (1999, 301)])
def test_features_are_those_that_transformers_packs(size):
    from transformers import LlavaNextConfig
    from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

    class Packer:  # what its method reads of the model
        config = LlavaNextConfig(image_grid_pinpoints=[[h, w] for w, h in GRID])
        pack_image_features = LlavaNextModel.pack_image_features

    best = select_best_resolution(size, GRID)
    grid = (best[0] // 336, best[1] // 336)
    count = (1 + grid[0] * grid[1]) * 576
    features = [torch.arange(count, dtype=torch.float64).reshape(-1, 576, 1)]
    sizes = torch.tensor([[size[1], size[0]]])
    (packed,), _ = Packer().pack_image_features(features, sizes, "default", torch.tensor([-1.0]))
    ids = tile_features(size, grid=grid, side=24, merge_type="spatial_unpad")
    assert ids.tolist() == packed[:, 0].int().tolist()


def test_tiles_are_the_whole_image_then_the_grid_row_by_row():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    image = Image.fromarray(pixels)
    tiles = make_tiles(image, 4, (8, 8), fitted_size((8, 6), (8, 8)))
    canvas = np.zeros((8, 8, 3), np.uint8)
    canvas[1:7] = pixels
    expected = [canvas[:4, :4], canvas[:4, 4:], canvas[4:, :4], canvas[4:, 4:]]
    assert np.array_equal(tiles[0], np.asarray(image.resize((4, 4))))
    assert np.array_equal(tiles[1:], expected)


def test_a_side_that_does_not_fit_exactly_is_rounded_up():
    assert fitted_size((3, 2), (8, 8)) == (8, 6)  # 5.33
    assert fitted_size((2, 3), (8, 8)) == (6, 8)


def test_pixels_and_layout_count_the_same_tiles(tmp_path):
    processor = ImageProcessor(SMALL, aspect_ratio="anyres")
    for width, height in ((30, 7), (7, 30), (9, 9), (40, 38)):
        path = save(tmp_path, width, height)
        assert processor.read(path).shape == (processor.layout(path).num_tiles, 8, 8, 3)


def test_a_pixel_limit_changes_which_tiles_an_image_gets(tmp_path):
    path = save(tmp_path, 16, 16)
    assert ImageProcessor(SMALL, aspect_ratio="anyres").layout(path).num_tiles == 5
    limited = ImageProcessor(SMALL, aspect_ratio="anyres", max_pixels=49)
    assert limited.layout(path).num_tiles == 3 == len(limited.read(path))


def test_a_frame_is_one_tile_with_an_end(tmp_path):
    processor = ImageProcessor(SMALL, aspect_ratio="anyres")
    path = save(tmp_path, 16, 12)
    layout = processor.layout(path, is_frame=True)
    assert (layout.num_tiles, layout.feature_ids.tolist()) == (1, [0, 1, 2, 3, -1])
    expected = np.asarray(Image.open(path).resize((8, 8)))[None]
    assert np.array_equal(processor.read(path, is_frame=True), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_grid_pinpoints": ()}, "give at least one"),
        ({"image_grid_pinpoints": ((8, 12),)}, "multiples of model.vision.image_size=8"),
        ({"image_grid_pinpoints": ((0, 8),)}, "multiples of model.vision.image_size=8"),
        ({"select_feature": "cls_patch"}, "set model.select_feature='patch'"),
    ],
)
def test_models_that_cannot_be_tiled_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        ImageProcessor(dataclasses.replace(SMALL, **changes), aspect_ratio="anyres")


def test_layouts_of_broken_files_name_them(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"a\.png: is not an image"):
        ImageProcessor(SMALL, aspect_ratio="anyres").layout(str(tmp_path / "a.png"))
