"""Working copies: small images whose points are those of the originals, and names for files."""

import numpy as np
import pytest
from PIL import Image
from real_photos import LION

from macosnet_hf import ImageError, load_image
from macosnet_hf.io.working_copy import distinct_names, for_browser, open_working_copy


def test_a_copy_is_small_and_its_points_are_the_originals(large_lion):
    copy = open_working_copy(large_lion)
    assert copy.size == (2001, 1501)
    assert copy.image.size == (960, 720)
    assert copy.name == "large lion.jpg"
    np.testing.assert_allclose(copy.to_original([[-0.5, -0.5], [959.5, 719.5]]), [[-0.5, -0.5], [2000.5, 1500.5]])
    points = np.random.default_rng(0).uniform(0, 1500, (20, 2))
    np.testing.assert_allclose(copy.to_original(copy.from_original(points)), points)
    whole = load_image(large_lion).resize(copy.image.size, Image.Resampling.BILINEAR)
    assert np.abs(np.asarray(whole, float) - np.asarray(copy.image, float)).mean() < 3


def test_a_small_image_stays_as_it_is():
    copy = open_working_copy(LION)
    np.testing.assert_array_equal(np.asarray(copy.image), np.asarray(load_image(LION)))
    assert copy.is_whole
    assert copy.open_original() is copy.image


def test_a_whole_image_and_a_fine_copy(large_lion):
    whole = open_working_copy(large_lion, side=None)
    assert whole.is_whole
    assert whole.size == (2001, 1501)
    np.testing.assert_array_equal(np.asarray(whole.image), np.asarray(load_image(large_lion)))
    points = np.array([[0, 0], [1999.5, 3.25]])
    np.testing.assert_array_equal(whole.to_original(points), points)
    fine = open_working_copy(large_lion, side=640, fine=True)
    expected = load_image(large_lion, reduced_to=640)
    expected.thumbnail((640, 640))
    assert fine.size == (2001, 1501)
    np.testing.assert_array_equal(np.asarray(fine.image), np.asarray(expected))


def test_errors_name_the_image_without_its_folder(tmp_path):
    (tmp_path / "letter.jpg").write_text("a letter " * 9)
    with pytest.raises(ImageError, match=r"^'my letter' is not an image"):
        open_working_copy(tmp_path / "letter.jpg", "my letter")
    gone = tmp_path / "gone.png"
    Image.new("RGB", (99, 9)).save(gone)
    copy = open_working_copy(gone, side=50)
    gone.unlink()
    with pytest.raises(ImageError, match=r"^'gone\.png' can no longer be read; choose it again"):
        copy.open_original()


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "gif", "bmp", "ico"])
def test_what_browsers_show_stays_as_it_is(ending, tmp_path):
    with Image.open(LION) as photo:
        photo.save(tmp_path / f"lion.{ending}")
    assert for_browser(tmp_path / f"lion.{ending}", tmp_path) is None


def test_what_browsers_do_not_show_becomes_a_png(tmp_path):
    with Image.open(LION) as photo:
        photo.resize((90, 60)).save(tmp_path / "scan.of a lion.tif")
    copy = for_browser(tmp_path / "scan.of a lion.tif", tmp_path)
    assert copy == tmp_path / "scan.of a lion.png"
    np.testing.assert_array_equal(np.asarray(Image.open(copy)), np.asarray(load_image(tmp_path / "scan.of a lion.tif")))


def test_what_cannot_be_shown_is_said(tmp_path):
    (tmp_path / "letter.jpg").write_text("a letter " * 9)
    with pytest.raises(ImageError, match=r"^'letter\.jpg' is not an image"):
        for_browser(tmp_path / "letter.jpg", tmp_path)
    with Image.open(LION) as photo:
        photo.save(tmp_path / "cut.tif")
    (tmp_path / "cut.tif").write_bytes((tmp_path / "cut.tif").read_bytes()[:9000])
    with pytest.raises(ImageError, match=r"^'cut\.tif' is damaged"):
        for_browser(tmp_path / "cut.tif", tmp_path)
    with Image.open(LION) as photo:
        photo.save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:4000])
    with pytest.raises(ImageError, match=r"^'cut\.jpg' is damaged"):  # browsers show the upper part
        for_browser(tmp_path / "cut.jpg", tmp_path)
    assert list(tmp_path.glob("*.png")) == []


def test_names_are_numbered():
    assert distinct_names(["a.jpg", "b.jpg", "A.png", "a.gif"]) == ["a", "b", "A_2", "a_3"]
    assert distinct_names(["a.jpg", "a_2.jpg", "a.png"]) == ["a", "a_2", "a_3"]
    assert distinct_names(["..", "a/b.jpg"]) == ["image", "ab"]


def test_names_of_files_become_distinct():
    names = ["image.jpg", "image.png", "IMAGE.jpg", "image-2.jpg", "..", "a/b.jpg", "x.jpg"]
    found = distinct_names(names)
    assert found[0] == "image"
    assert found[-1] == "x"
    assert len({name.lower() for name in found}) == len(names)
    assert all(name and not set(name) & set("/\\") and name.strip(".") for name in found)
