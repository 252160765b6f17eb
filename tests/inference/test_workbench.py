"""What the demo computes, without a page: kept results, working copies, averages, files, the interactive image."""

import csv
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from real_photos import CHEETAH, LION, TOWER

from macosnet_hf import ImageError, InputError, load_image, match_pair
from macosnet_hf.collection import odd_ones_out
from macosnet_hf.demo.result_store import KeptResults
from macosnet_hf.demo.viewer import grid_document, object_grid, source_on_target, tint, viewer_images, viewer_lines
from macosnet_hf.inference.average import aligned_average
from macosnet_hf.inference.result_files import (
    match_files,
    matches_table,
    pair_document,
    pair_flow,
    segment_files,
    write_pair_files,
)
from macosnet_hf.io.working_copy import distinct_names, for_browser, open_working_copy


@pytest.fixture(scope="module")
def large_lion(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "large lion.jpg"
    with Image.open(LION) as photo:
        photo.resize((2001, 1501)).save(path)
    return str(path)


@pytest.fixture(scope="module")
def work(network, large_lion):
    """Neither square nor of the same size, and one of them worked on as a smaller copy."""
    return match_files(TOWER, large_lion, **network, refine="none")


# ---- kept results ----------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_the_longest_unused_result_goes_first():
    kept = KeptResults(limit=3, per_owner=10, seconds=100)
    first, second, third = (kept.keep(value) for value in "abc")
    assert kept.get(first) == "a"
    fourth = kept.keep("d")
    assert [kept.get(key) for key in (first, third, fourth)] == ["a", "c", "d"]
    with pytest.raises(InputError, match="no longer kept"):
        kept.get(second)
    assert len(kept) == 3


def test_a_busy_owner_pushes_out_only_the_own_results():
    kept = KeptResults(limit=100, per_owner=2, seconds=100)
    other = kept.keep("theirs", "other")
    own = [kept.keep(number, "busy") for number in range(5)]
    assert kept.get(other) == "theirs"
    assert [kept.get(key) for key in own[3:]] == [3, 4]
    with pytest.raises(InputError):
        kept.get(own[2])
    kept.forget("busy")
    assert len(kept) == 1


def test_results_expire_after_their_last_use():
    clock = Clock()
    kept = KeptResults(limit=10, per_owner=10, seconds=10, clock=clock)
    used, unused = kept.keep("used"), kept.keep("unused")
    clock.now = 6
    assert kept.get(used) == "used"
    clock.now = 12
    assert kept.get(used) == "used"
    with pytest.raises(InputError):
        kept.get(unused)
    clock.now = 30
    assert len(kept) == 0


def test_keys_are_long_and_of_any_type_refused():
    kept = KeptResults(limit=100, per_owner=10, seconds=10)
    keys = {kept.keep(None) for _ in range(50)}
    assert len(keys) == 50
    assert min(map(len, keys)) >= 24
    for key in (None, 3, ["x"], {}):
        with pytest.raises(InputError):
            kept.get(key)


# ---- working copies --------------------------------------------------------------------------------------------------


def test_a_copy_is_small_and_its_points_are_the_originals(large_lion):
    copy = open_working_copy(large_lion)
    assert copy.size == (2001, 1501)
    assert copy.image.size == (960, 720)
    assert copy.name == "large lion.jpg"
    np.testing.assert_allclose(copy.to_original([[0, 0], [959, 719]]), [[0, 0], [2000, 1500]])
    points = np.random.default_rng(0).uniform(0, 1500, (20, 2))
    np.testing.assert_allclose(copy.to_original(copy.from_original(points)), points)
    whole = load_image(large_lion).resize(copy.image.size, Image.Resampling.BILINEAR)
    assert np.abs(np.asarray(whole, float) - np.asarray(copy.image, float)).mean() < 3


def test_a_small_photograph_stays_as_it_is():
    copy = open_working_copy(LION)
    np.testing.assert_array_equal(np.asarray(copy.image), np.asarray(load_image(LION)))
    mask = np.zeros((256, 256), bool)
    assert copy.to_original_mask(mask) is mask


def test_a_mask_is_enlarged_in_place(large_lion):
    copy = open_working_copy(large_lion)
    mask = np.zeros((720, 960), bool)
    mask[100:200, 300:500] = True
    full = copy.to_original_mask(mask)
    assert full.shape == (1501, 2001)
    rows, columns = np.flatnonzero(full.any(1)), np.flatnonzero(full.any(0))
    found = [rows[0], rows[-1] + 1, columns[0], columns[-1] + 1]
    np.testing.assert_allclose(found, np.array([100, 200, 300, 500]) * 2001 / 960, atol=2)


def test_errors_name_the_photograph_without_its_folder(tmp_path):
    (tmp_path / "letter.jpg").write_text("a letter " * 9)
    with pytest.raises(ImageError, match=r"^'my letter' is not an image"):
        open_working_copy(tmp_path / "letter.jpg", "my letter")
    gone = tmp_path / "gone.png"
    Image.new("RGB", (9, 9)).save(gone)
    copy = open_working_copy(gone)
    gone.unlink()
    with pytest.raises(ImageError, match=r"^'gone\.png' is no longer on the server"):
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
    assert list(tmp_path.glob("*.png")) == []


def test_names_of_files_become_distinct():
    names = ["image.jpg", "image.png", "IMAGE.jpg", "image-2.jpg", "..", "a/b.jpg", "x.jpg"]
    found = distinct_names(names)
    assert found[0] == "image"
    assert found[-1] == "x"
    assert len({name.lower() for name in found}) == len(names)
    assert all(name and not set(name) & set("/\\") and name.strip(".") for name in found)


# ---- pairs -----------------------------------------------------------------------------------------------------------


def test_a_pair_holds_each_photograph_once(work):
    """A server keeps dozens of pairs."""
    for kept in (work, work.refined("otsu")):
        assert kept.result.source is work.copies[0].image
        assert kept.result.target is work.copies[1].image


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
    work = match_files(CHEETAH, LION, **network, refine="none")
    assert work.refined("none") is work
    other = work.refined("otsu")
    assert (other.result.source_mask != work.result.source_mask).any()
    assert work.refine == "none"
    assert not work.same_image
    assert match_files(LION, LION, **network, refine="none").same_image


def test_points_of_originals_travel(work):
    small = work.result.transfer([[100, 200]])[0]
    expected = small * np.array([2000, 1500]) / np.array([959, 719])
    np.testing.assert_allclose(work.transfer([[100, 200]], "source_to_target")[0], expected, atol=0.01)
    assert work.transfer([[2000, 1500]], "target_to_source").shape == (1, 2)
    with pytest.raises(InputError, match="2001x1501"):
        work.transfer([[2001, 0]], "target_to_source")
    with pytest.raises(InputError, match="direction"):
        work.transfer([[1, 1]], "sideways")


def test_document_and_table_hold_the_same_matches(work):
    document = pair_document(work, 0.1)
    assert json.loads(json.dumps(document)) == document
    assert (document["target"]["width"], document["target"]["height"]) == (2001, 1501)
    assert all(match["score"] > 0.1 for match in document["matches"])
    rows = list(csv.DictReader(io.StringIO(matches_table(document))))
    assert len(rows) == len(document["matches"]) == (work.result.scores > 0.1).sum()
    for row, match in zip(rows, document["matches"], strict=True):
        assert [float(row["source_x"]), float(row["source_y"])] == match["source"]
        assert [float(row["target_x"]), float(row["target_y"])] == match["target"]


@pytest.mark.parametrize("side", [64, 5000])
def test_flow_tells_where_the_transform_sends_a_place(work, side):
    flow = pair_flow(work, side)
    assert flow["target_size"].tolist() == [1501, 2001]
    assert max(flow["target_to_source"].shape) == min(side, 2001)
    for name, size in (("source_to_target", (600, 377)), ("target_to_source", (1501, 2001))):
        rows, columns = flow[name].shape[:2]
        for row, column in ((0, 0), (rows // 3, columns // 2), (rows - 1, columns - 1)):
            place = np.array([column * (size[1] - 1) / (columns - 1), row * (size[0] - 1) / (rows - 1)])
            here = work.copies[0] if name == "source_to_target" else work.copies[1]
            there = work.copies[1] if name == "source_to_target" else work.copies[0]
            small = work.result.transfer(here.from_original(place[None]), name, local_matching=False)
            np.testing.assert_allclose(place + flow[name][row, column], there.to_original(small)[0], atol=0.1)


def test_files_to_take_home(work, tmp_path):
    paths = write_pair_files(work, tmp_path)
    assert sorted(path.name for path in paths) == sorted(os.listdir(tmp_path))
    assert (
        Image.open(tmp_path / "target_mask.png").size == Image.open(tmp_path / "target_cutout.png").size == (2001, 1501)
    )
    mask = np.asarray(Image.open(tmp_path / "source_mask.png")) > 127
    np.testing.assert_array_equal(mask, work.result.source_mask)
    assert (np.asarray(Image.open(tmp_path / "source_cutout.png"))[~mask] == [255, 255, 255, 0]).all()
    assert set(np.load(tmp_path / "flow.npz")) == {"source_to_target", "target_to_source", "source_size", "target_size"}


# ---- the interactive image -----------------------------------------------------------------------------------------


def test_lines_are_the_matches_above_the_threshold(work):
    result = work.result
    threshold = float(np.median(result.scores))
    told = json.loads(viewer_lines(result, threshold, 10))
    assert told["all"] == len(result.scores)
    assert told["above"] == (result.scores > threshold).sum()
    assert len(told["lines"]) == min(10, told["above"])
    every = {
        tuple(np.round(ends.ravel(), 1)): score for ends, score in zip(result.keypoints, result.scores, strict=True)
    }
    for *ends, color, score in told["lines"]:
        assert every[tuple(ends)] == pytest.approx(score, abs=6e-4)
        assert score > threshold - 6e-4
        assert color.startswith("#")
        assert len(color) == 7
    everything = json.loads(viewer_lines(result, 0, 1000))
    assert len(everything["lines"]) == everything["all"]
    colors = {tuple(line[:4]): line[4] for line in everything["lines"]}
    assert all(colors[tuple(line[:4])] == line[4] for line in told["lines"])  # a line keeps its colour
    assert json.loads(viewer_lines(result, 1, 10)) == {"lines": [], "above": 0, "all": told["all"]}


def test_photographs_travel_inside_the_page(work):
    told = json.loads(viewer_images("key", (work.result.source, work.result.target), ("a", "b")))
    assert told["id"] == "key"
    assert [(side["w"], side["h"], side["name"]) for side in told["sides"]] == [(377, 600, "a"), (960, 720, "b")]
    assert all(side["src"].startswith("data:image/jpeg;base64,") for side in told["sides"])


def test_grid_lies_on_the_object():
    mask = np.zeros((50, 90), bool)
    mask[10:30, 20:80] = True
    mask[10:20, 20:50] = False
    grid = object_grid(mask, 6)
    assert len(grid) == 2 * 6 - 3
    assert all(mask[round(y), round(x)] for x, y in grid)
    assert len(object_grid(np.zeros((30, 30), bool), 5)) == 25
    assert object_grid(np.ones((1, 1), bool)).tolist() == [[0, 0]]


def test_grid_document_pairs_each_point_with_its_place(work):
    told = grid_document(work.result)["points"]
    assert len(told) > 10
    moved = work.result.transfer([point[:2] for point in told])
    np.testing.assert_allclose([point[2:4] for point in told], moved, atol=1.5)


def test_tint_outlines_the_object():
    mask = np.zeros((40, 60), bool)
    mask[10:30, 20:50] = True
    opacity = tint(mask, 0.3)
    assert (opacity[~mask] == 0).all()
    assert (opacity[11:29, 21:49] == 0.3).all()
    assert (opacity[mask] == 1).sum() == 20 * 30 - 18 * 28


def test_source_on_target_is_the_warp_where_there_is_one(work):
    shown = np.asarray(source_on_target(work.result, 960), float)
    warped = np.asarray(work.result.warped_source(), float)
    assert shown.shape == warped.shape
    covered = warped.sum(2) > 60
    assert np.median(np.abs(shown - warped)[covered]) == 0
    assert max(source_on_target(work.result, 200).size) == 200
    assert shown[warped.sum(2) == 0].mean() > 60  # not black


# ---- collections -----------------------------------------------------------------------------------------------------


def test_odd_ones_out():
    assert odd_ones_out(np.array([0.8, 0.79, 0.81, 0.4, 0.8, 0.6])) == [3, 5]
    assert odd_ones_out(np.array([0.8, 0.7, 0.75, 0.72])) == []
    assert odd_ones_out(np.array([0.9, 0.1, 0.5, 0.7])) == []  # everybody differs: nobody is odd
    assert odd_ones_out(np.array([0.9, 0.9, 0.1])) == []


def test_average_of_the_same_photograph_is_that_photograph(network):
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
    work = segment_files([CHEETAH, LION, TOWER], names, **network, refine="none", progress=stop_at(9))
    shares = [share for share, _ in seen]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert [mask.shape for mask in work.masks] == [(256, 256), (256, 256), (512, 322)]
    assert work.reference == int(np.argmax(work.result.agreement))
