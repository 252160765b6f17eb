"""The interactive drawing of a pair: lines, grid, outline and warp."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the demo needs gradio")

from macosnet_hf.demo.code import pair_code
from macosnet_hf.demo.hinting import hint_of, hints_of, marks
from macosnet_hf.demo.texts import PHOTOS
from macosnet_hf.demo.viewer import (
    LAYERS,
    grid_document,
    object_grid,
    source_on_target,
    viewer_images,
    viewer_lines,
)
from macosnet_hf.errors import InputError
from macosnet_hf.hints import Hint
from macosnet_hf.inference import VIEWS
from macosnet_hf.inference.files import match_files


def test_lines_are_the_matches_above_the_threshold(pair):
    result = pair.result
    threshold = float(np.median(result.scores))
    sent = json.loads(viewer_lines(result, threshold, 10))
    assert sent["all"] == len(result.scores)
    assert sent["above"] == (result.scores > threshold).sum()
    assert len(sent["lines"]) == min(10, sent["above"])
    every = {
        tuple(np.round(ends.ravel(), 1)): score for ends, score in zip(result.keypoints, result.scores, strict=True)
    }
    for *ends, color, score in sent["lines"]:
        assert every[tuple(ends)] == pytest.approx(score, abs=6e-4)
        assert score > threshold - 6e-4
        assert color.startswith("#")
        assert len(color) == 7
    everything = json.loads(viewer_lines(result, 0, 1000))
    assert len(everything["lines"]) == everything["all"]
    colors = {tuple(line[:4]): line[4] for line in everything["lines"]}
    assert all(colors[tuple(line[:4])] == line[4] for line in sent["lines"])  # a line keeps its colour
    nothing = {"lines": [], "above": 0, "all": sent["all"]}
    for quality in ("good", "fair", "poor"):
        drawn = json.loads(viewer_lines(replace(result, quality=quality), 1, 10))
        assert drawn == {**nothing, "faint": quality == "poor"}


def test_photos_are_part_of_the_page(pair):
    sent = json.loads(viewer_images("key", (pair.result.source, pair.result.target), ("a", "b")))
    assert sent["id"] == "key"
    assert [(side["w"], side["h"], side["name"]) for side in sent["sides"]] == [(377, 600, "a"), (960, 720, "b")]
    assert all(side["src"].startswith("data:image/jpeg;base64,") for side in sent["sides"])


def test_marks_are_points_of_the_originals_in_files_and_code(pair, network):
    """Neither photo is square, and the second is processed as a smaller copy."""
    sent = [[[0.5, 0.4, True], [0.0, 0.0, False]], [[1.0, 1.0, False]]]
    placed = hints_of(sent, pair.copies, PHOTOS)
    hints = {VIEWS[view]: hint_of(sent[view], pair.copies[view].size) for view in placed}
    sizes = [copy.size for copy in pair.copies]
    assert sizes[1] != pair.copies[1].image.size
    assert hints == {
        "source": Hint(include=[(round(sizes[0][0] / 2 - 0.5, 1), 239.5)], exclude=[(0.0, 0.0)]),
        "target": Hint(include=[], exclude=[(sizes[1][0] - 1.0, sizes[1][1] - 1.0)]),
    }
    hinted = pair.with_hints({VIEWS[view]: hint for view, hint in placed.items()})
    for shown, mine in zip(marks(hinted.hints, 2), sent, strict=True):
        np.testing.assert_allclose(np.array(shown, float), np.array(mine, float), atol=0.002)
    code = pair_code(hinted, 0.0, 40)
    asked = {}
    exec(code.splitlines()[1], asked)
    given = eval("dict(" + code.splitlines()[3].split("(", 1)[1].split(", ", 2)[2], asked)["hints"]
    again = match_files(*(copy.path for copy in pair.copies), **network, refine="none", hints=given)
    for view in (0, 1):
        np.testing.assert_array_equal(hinted.original_mask(view), again.original_mask(view))
    np.testing.assert_array_equal(hinted.keypoints, again.keypoints)
    assert (hinted.original_mask(0) != pair.original_mask(0)).any()
    assert given == {"source": hints["source"], "target": Hint(exclude=hints["target"].exclude)}
    assert hints_of(marks(hinted.hints, 2), pair.copies, PHOTOS) == placed
    assert hints_of([[], []], pair.copies, PHOTOS) == {}
    with pytest.raises(InputError, match=r"^The point 0,0 of Photo A is both included and excluded\.$"):
        hints_of([[[0, 0, True], [0, 0, False]], []], pair.copies, PHOTOS)
    with pytest.raises(InputError, match="of other photos"):
        hints_of([[]], pair.copies, PHOTOS)
    assert "hints" not in pair_code(hinted.with_hints({}), 0.0, 40)
    np.testing.assert_array_equal(hinted.with_hints({}).result.source_mask, pair.result.source_mask)


def test_grid_lies_on_the_object():
    mask = np.zeros((50, 90), bool)
    mask[10:30, 20:80] = True
    mask[10:20, 20:50] = False
    grid = object_grid(mask, 6)
    assert len(grid) == 2 * 6 - 3
    assert all(mask[round(y), round(x)] for x, y in grid)
    assert len(object_grid(np.zeros((30, 30), bool), 5)) == 25
    assert object_grid(np.ones((1, 1), bool)).tolist() == [[0, 0]]


def test_grid_document_pairs_each_point_with_its_place(pair):
    sent = grid_document(pair.result)["points"]
    assert len(sent) > 10
    moved = pair.result.transfer([point[:2] for point in sent])
    np.testing.assert_allclose([point[2:4] for point in sent], moved, atol=1.5)


def test_layers_are_small_copies_with_the_masks_on_them(pair):
    blue = Image.new("RGB", (1440, 960), (0, 0, 200))
    mask = np.zeros((960, 1440), bool)
    mask[240:720, 480:1200] = True
    soft = pair.result.soft_masks.copy()
    soft[0] = np.asarray(Image.fromarray(mask).convert("L").resize(soft.shape[:0:-1])) / 255
    result = replace(pair.result, source=blue, source_mask=mask, soft_masks=soft)
    outlined, cut = (np.asarray(LAYERS[mode](result)[0], int) for mode in ("masks", "cutout"))
    assert outlined.shape == cut.shape == (480, 720, 3)
    assert (outlined[10, 10] > 100).all()  # faded to grey
    assert outlined[240, 240, 0] > 230  # the outline
    assert cut[10, 10].std() == 0  # checkerboard
    assert cut[240, 400].tolist() == [0, 0, 200]
    assert blue.getpixel((700, 400)) == (0, 0, 200)
    nothing, warped = LAYERS["warp"](result)
    assert nothing is None
    assert max(warped.size) == 720


def test_source_on_target_is_the_warp_where_there_is_one(pair):
    smaller = replace(pair.result, affine=2 * pair.result.affine)  # the source does not cover the target
    shown = np.asarray(source_on_target(smaller, 960), float)
    warped = np.asarray(smaller.warped_source(), float)
    assert shown.shape == warped.shape
    covered = warped.sum(2) > 60
    assert np.median(np.abs(shown - warped)[covered]) == 0
    assert max(source_on_target(smaller, 200).size) == 200
    assert (warped.sum(2) == 0).mean() > 0.3
    assert shown[warped.sum(2) == 0].mean() > 60  # not black
