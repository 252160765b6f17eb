"""Pairs and collections of image files: points and masks of the originals, other options, averages."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from real_photos import CHEETAH, LION, TOWER

from macosnet_hf import InputError, load_image, match_pair
from macosnet_hf.collection import hard_mask, odd_ones_out
from macosnet_hf.hints import Hint
from macosnet_hf.inference.average import aligned_average
from macosnet_hf.inference.files import match_files, segment_files


def test_a_pair_holds_each_image_once(pair):
    """A server keeps dozens of pairs."""
    for each in (pair, pair.refined("otsu"), pair.above(0.5)):
        assert each.result.source is pair.copies[0].image
        assert each.result.target is pair.copies[1].image


def test_other_options_give_what_matching_with_them_gives(network):
    whole = match_pair(CHEETAH, LION, **network)
    again = match_pair(CHEETAH, LION, **network, refine="none").with_options(refine="grabcut")
    np.testing.assert_array_equal(again.keypoints, whole.keypoints)
    np.testing.assert_array_equal(again.source_mask, whole.source_mask)
    assert again.quality == whole.quality
    threshold = float(np.median(whole.scores))
    assert len(whole.with_options(threshold=threshold).scores) == (whole.scores > threshold).sum()
    with pytest.raises(InputError, match="threshold"):
        whole.with_options(threshold=2)


def test_refined_work_is_new_work(network):
    pair = match_files(CHEETAH, LION, **network, refine="none")
    assert pair.refined("none") is pair
    other = pair.refined("otsu")
    assert (other.result.source_mask != pair.result.source_mask).any()
    assert pair.refine == "none"
    assert not pair.same_image
    assert match_files(LION, LION, **network, refine="none").same_image


def test_masks_of_originals_come_from_the_soft_masks(pair, network):
    """An enlarged mask of the working copy has steps of two pixels; the soft mask at full size has none."""
    small, full = pair.result.target_mask, pair.original_mask(1)
    assert small.shape == (720, 960)
    assert full.shape == (1501, 2001)
    whole = match_pair(pair.copies[0].path, pair.copies[1].path, **network, refine="none")
    np.testing.assert_array_equal(whole.soft_masks, whole.probabilities)
    np.testing.assert_array_equal(hard_mask(whole.soft_masks[1], (1501, 2001)), whole.target_mask)
    assert (full != whole.target_mask).mean() < 0.03  # of another reduction of the image
    assert pair.original_mask(0) is pair.result.source_mask  # a copy that is whole
    refined = pair.refined("otsu")
    assert (refined.original_mask(1) != full).any()
    rows, columns = np.flatnonzero(small.any(1)), np.flatnonzero(small.any(0))
    found = [np.flatnonzero(full.any(1)), np.flatnonzero(full.any(0))]
    scale = 2001 / 960
    np.testing.assert_allclose([found[0][0], found[0][-1]], np.array([rows[0], rows[-1] + 1]) * scale, atol=4)
    np.testing.assert_allclose([found[1][0], found[1][-1]], np.array([columns[0], columns[-1] + 1]) * scale, atol=4)


def test_matches_above_a_threshold(pair):
    threshold = float(np.median(pair.result.scores))
    chosen = pair.above(threshold)
    assert 0 < len(chosen.keypoints) == (pair.result.scores > threshold).sum() < len(pair.keypoints)
    np.testing.assert_array_equal(chosen.keypoints, pair.keypoints[: len(chosen.keypoints)])  # best first
    assert chosen.result.quality == pair.result.quality


def test_the_warped_source_has_the_size_of_the_original_target(pair):
    warped = pair.warped_source()
    assert warped.size == (2001, 1501)
    small = pair.result.warped_source()
    assert small.size == (960, 720)
    difference = np.abs(np.asarray(warped.resize(small.size), float) - np.asarray(small, float))
    assert np.median(difference) <= 2


def test_points_of_originals_are_transferred(pair):
    small = pair.result.transfer([[100, 200]])[0]
    expected = (small + 0.5) * np.array([2001, 1501]) / np.array([960, 720]) - 0.5
    np.testing.assert_allclose(pair.transfer([[100, 200]], "source_to_target")[0], expected, atol=0.01)
    assert pair.transfer([[2000, 1500]], "target_to_source").shape == (1, 2)
    with pytest.raises(InputError, match="2001x1501"):
        pair.transfer([[2001, 0]], "target_to_source")
    with pytest.raises(InputError, match="direction"):
        pair.transfer([[1, 1]], "sideways")


@pytest.mark.parametrize("side", [64, 5000])
def test_flow_says_where_the_transform_sends_a_place(pair, side):
    flow = pair.flow(side)
    assert flow["target_size"].tolist() == [1501, 2001]
    assert max(flow["target_to_source"].shape) == min(side, 2001)
    for name, size in (("source_to_target", (600, 377)), ("target_to_source", (1501, 2001))):
        rows, columns = flow[name].shape[:2]
        for row, column in ((0, 0), (rows // 3, columns // 2), (rows - 1, columns - 1)):
            place = np.array([(column + 0.5) * size[1] / columns - 0.5, (row + 0.5) * size[0] / rows - 0.5])
            here = pair.copies[0] if name == "source_to_target" else pair.copies[1]
            there = pair.copies[1] if name == "source_to_target" else pair.copies[0]
            # Of the corner pixels: a copy's border pixel covers more than that of its original.
            small = pair.result._transfer(here.from_original(place[None]), name, local_matching=False)
            np.testing.assert_allclose(place + flow[name][row, column], there.to_original(small)[0], atol=0.1)


def test_odd_ones_out():
    assert odd_ones_out(np.array([0.8, 0.79, 0.81, 0.4, 0.8, 0.6])) == [3, 5]
    assert odd_ones_out(np.array([0.8, 0.7, 0.75, 0.72])) == []
    assert odd_ones_out(np.array([0.9, 0.1, 0.5, 0.7])) == []  # everybody differs: nobody is odd
    assert odd_ones_out(np.array([0.9, 0.9, 0.1])) == []


def test_average_of_the_same_image_is_that_image(network):
    photo = load_image(LION)
    masks = np.ones((3, 240, 240), np.float32)
    average = aligned_average([photo] * 3, masks, 1, **network)
    assert average.size == photo.size
    middle = (slice(60, 200), slice(60, 200))
    other = np.asarray(load_image(CHEETAH), float)[middle]
    found = np.abs(np.asarray(average, float) - np.asarray(photo, float))[middle].mean()
    assert found < 0.6 * np.abs(other - np.asarray(photo, float)[middle]).mean()
    nothing = aligned_average([photo] * 2, np.zeros((2, 240, 240), np.float32), 0, **network)
    assert np.asarray(nothing).mean() > 240
    for wrong in ({"reference": 3}, {"reference": -1}):
        with pytest.raises(InputError, match="reference"):
            aligned_average([photo] * 3, masks, **wrong, **network)


def test_a_collection_can_be_stopped_at_any_step(network):
    seen = []

    class EnoughError(Exception):
        pass

    def stop_at(limit):
        def progress(share, text):
            seen.append((share, text))
            if share >= limit:
                raise EnoughError

        return progress

    names = [Path(path).name for path in (CHEETAH, LION, TOWER)]
    for limit in (0.0, 0.4, 0.8):
        with pytest.raises(EnoughError):
            segment_files([CHEETAH, LION, TOWER], names, **network, refine="none", progress=stop_at(limit))
    seen.clear()
    pair = segment_files([CHEETAH, LION, TOWER], names, **network, refine="none", progress=stop_at(9))
    shares = [share for share, _ in seen]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert [mask.shape for mask in pair.masks] == [(256, 256), (256, 256), (512, 322)]
    assert pair.reference == int(np.argmax(pair.result.agreement))


def test_points_of_a_collection_travel_to_all_that_belong(network, tmp_path):
    with Image.open(LION) as photo:
        lion = photo.convert("RGB")
    paths = [str(tmp_path / f"{number}.png") for number in range(4)]
    sizes = [(256, 256), (300, 200), (180, 240)]
    for path, size in zip(paths, sizes, strict=False):
        lion.resize(size).save(path)
    with Image.open(TOWER) as tower:
        tower.save(paths[3])
    found = segment_files(paths, paths, **network, refine="none")
    assert found.odd == [3]
    point = np.array([0.5, 0.4])
    for number, size in enumerate(sizes):
        places = found.transfer(point * size - 0.5, number)
        np.testing.assert_allclose((places[:3] + 0.5) / sizes, np.tile(point, (3, 1)), atol=0.05)
        np.testing.assert_allclose(places[number], point * size - 0.5, atol=1e-4)
        assert np.isnan(places[3]).all()
    alone = found.transfer((5, 6), 3)
    assert alone[3].tolist() == [5, 6]
    assert np.isnan(alone[:3]).all()
    with pytest.raises(InputError, match="no image number 4"):
        found.transfer((5, 6), 4)
    with pytest.raises(InputError, match="300x200"):
        found.transfer((300, 6), 1)


def test_a_collection_in_another_order_is_that_of_these_files(network, tmp_path):
    """As if the files had been given so; two have the same name, and one a hint."""
    paths = []
    for number, photo in enumerate((LION, CHEETAH, TOWER, LION)):
        (tmp_path / str(number)).mkdir()
        paths.append(str(tmp_path / str(number) / ("same.png" if number < 2 else f"{number}.png")))
        with Image.open(photo) as image:
            image.convert("RGB").resize((200 + 9 * number, 180)).save(paths[-1])
    names = [Path(path).name for path in paths]
    found = segment_files(paths, names, **network, hints={1: Hint(include=[(40, 50)])})
    order = [2, 1, 3, 0]
    moved = found.reordered(order, [names[number] for number in order])
    files = [paths[number] for number in order]
    asked = segment_files(files, [Path(path).name for path in files], **network, hints={1: Hint(include=[(40, 50)])})
    assert [copy.name for copy in moved.copies] == [copy.name for copy in asked.copies]
    assert [moved.names, moved.odd, moved.reference] == [asked.names, asked.odd, asked.reference]
    assert moved.result.partners == asked.result.partners
    assert moved.hints == asked.hints
    assert list(moved.orientations) == list(asked.orientations)
    np.testing.assert_allclose(moved.result.agreement, asked.result.agreement, atol=1e-4)
    np.testing.assert_array_equal(moved.result.common, asked.result.common)
    for mine, other in zip(moved.masks, asked.masks, strict=True):
        assert (mine != other).mean() < 0.005
    np.testing.assert_allclose(moved.transfer((50, 60), 1), asked.transfer((50, 60), 1), atol=0.5)
    assert moved.sheet().size == asked.sheet().size
    assert found.hints.keys() == {1}, "the old one is as it was"
    assert [Path(copy.path).name for copy in found.copies] == names
