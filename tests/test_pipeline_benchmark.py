"""What the benchmark of the input pipeline compares before it measures."""

import numpy as np
import pytest
from PIL import Image

from benchmarks import pipeline


@pytest.fixture
def photographs(tmp_path):
    paths = [str(tmp_path / f"{number}.jpg") for number in range(3)]
    for number, path in enumerate(paths):
        pipeline.draw_photograph(number).save(path, quality=90)
    pipeline.draw_photograph(3).transpose(Image.Transpose.ROTATE_90).save(paths[-1])
    return pipeline.Photographs(paths)


def test_normalised_pixels_equal_those_of_the_original_way(photographs):
    pipeline.require_same_pixels(photographs)


def test_other_pixels_are_noticed(photographs, monkeypatch):
    monkeypatch.setattr(pipeline, "EXACT", pipeline.FAST)
    with pytest.raises(AssertionError, match=r"0\.jpg"):
        pipeline.require_same_pixels(photographs)


def test_photographs_compress_like_photographs(photographs):
    for path in photographs.paths:
        with open(path, "rb") as file:
            assert 0.05 < len(file.read()) / np.prod(pipeline.PHOTOGRAPH) < 0.6
