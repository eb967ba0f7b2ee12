"""Finding image files: what lies below the folder, what may be linked there, what stays out."""

import os
import pickle

import pytest

from llava_jax.data.image_folder import ImageFolder
from llava_jax.errors import DataError


@pytest.fixture
def folder(tmp_path):
    elsewhere = tmp_path / "disk" / "coco"
    elsewhere.mkdir(parents=True)
    (elsewhere / "7.jpg").touch()
    (tmp_path / "disk" / "secret.jpg").touch()
    (tmp_path / "secret.jpg").touch()
    images = tmp_path / "images"
    (images / "cats").mkdir(parents=True)
    (images / "cats" / "1.jpg").touch()
    (images / "cats" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (images / "cats" / "gone.jpg").symlink_to(tmp_path / "none.jpg")
    (images / "coco").symlink_to(elsewhere)
    return images


@pytest.mark.parametrize("image", ["cats/1.jpg", "./cats//1.jpg", "coco/7.jpg", "cats/link.jpg"])
def test_images_and_links_in_the_folder_are_found(folder, image):
    path = ImageFolder(str(folder)).locate(image)
    assert os.path.samefile(path, folder / image)


def test_dots_that_stay_inside_and_absolute_paths_inside_are_found(folder):
    images = ImageFolder(str(folder))
    for image in ("cats/../cats/1.jpg", "coco/../cats/1.jpg", str(folder / "cats" / "1.jpg")):
        assert images.locate(image) == str(folder / "cats" / "1.jpg")


def test_a_folder_that_is_a_link_itself_is_known_by_both_names(folder, tmp_path):
    (tmp_path / "alias").symlink_to(folder)
    images = ImageFolder(str(tmp_path / "alias"))
    for name in ("alias", "images"):
        assert images.locate(str(tmp_path / name / "cats" / "1.jpg")) == str(
            tmp_path / "alias" / "cats" / "1.jpg"
        )


@pytest.mark.parametrize(
    "image", ["cats/2.jpg", "dogs/1.jpg", "cats", "cats/1.jpg/x", "cats/gone.jpg", ".", "cats/1.JPG"]
)
def test_absent_images_are_refused(folder, image):
    with pytest.raises(DataError, match=r"is not in image_folder '.*images'\."):
        ImageFolder(str(folder)).locate(image)


@pytest.mark.parametrize(
    "image",
    [
        "../secret.jpg",
        "cats/../../secret.jpg",
        "/etc/passwd",
        "../images2/1.jpg",
        "..",
        "coco/../../secret.jpg",
    ],
)
def test_paths_that_leave_the_folder_are_refused(folder, image):
    (folder.parent / "images2").mkdir()
    (folder.parent / "images2" / "1.jpg").touch()
    with pytest.raises(DataError, match="lies outside image_folder"):
        ImageFolder(str(folder)).locate(image)


def test_dots_behind_a_link_do_not_lead_to_where_it_points(folder):
    with pytest.raises(DataError, match="is not in image_folder"):
        ImageFolder(str(folder)).locate("coco/../secret.jpg")  # not disk/secret.jpg


@pytest.mark.parametrize("image", ["a\0/b.jpg", "x" * 300 + "/b.jpg", "\ud800/b.jpg"])
def test_names_that_no_file_can_have_are_refused(folder, image):
    with pytest.raises(DataError, match="cannot be looked for"):
        ImageFolder(str(folder)).locate(image)


def test_a_folder_that_is_none_is_named(tmp_path):
    with pytest.raises(DataError, match=r"image_folder '.*none' is no directory"):
        ImageFolder(str(tmp_path / "none")).locate("1.jpg")


def test_missing_images_are_listed_by_position(folder):
    missing = ImageFolder(str(folder)).missing(["cats/1.jpg", "no.jpg", "coco/7.jpg", "../secret.jpg"])
    assert [position for position, _ in missing] == [1, 3]
    assert missing[0][1] == f"image 'no.jpg' is not in image_folder '{folder}'."


def test_each_directory_is_listed_once(folder, monkeypatch):
    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(str(path)) or scandir(path))
    images = ["cats/1.jpg", "cats/2.jpg", "coco/7.jpg", "none/1.jpg", "none/2.jpg"] * 3
    assert len(ImageFolder(str(folder)).missing(images)) == 9
    assert listed == [str(folder / name) for name in ("cats", "coco", "none")]


def test_frames_are_images_in_the_order_of_their_numbers(folder):
    (folder / "clip").mkdir()
    for name in ("f10.jpg", "f9.JPG", "f1.png", "f01.png", "notes.txt"):
        (folder / "clip" / name).touch()
    for directory in ("clip", "clip/"):
        frames = ImageFolder(str(folder)).frames(directory)
        assert [os.path.basename(frame) for frame in frames] == ["f01.png", "f1.png", "f9.JPG", "f10.jpg"]
        assert [ImageFolder(str(folder)).locate(frame) for frame in frames]


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ("none", "is no directory with frames"),
        ("cats/1.jpg", "is no directory with frames"),
        ("../disk", "lies outside"),
    ],
)
def test_videos_without_frames_are_refused(folder, video, message):
    with pytest.raises(DataError, match=message):
        ImageFolder(str(folder)).frames(video)


def test_listings_do_not_travel_to_other_processes(folder):
    images = ImageFolder(str(folder))
    images.missing(["cats/1.jpg"])
    assert b"link.jpg" not in pickle.dumps(images)
    assert pickle.loads(pickle.dumps(images)).locate("cats/1.jpg")
