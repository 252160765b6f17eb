"""Metrics against cases worked out by hand and against slow references in plain Python."""

import math

import numpy as np
import pytest
from scipy import ndimage

from macosnet_hf.errors import DataError, InputError
from macosnet_hf.evaluation import metrics
from macosnet_hf.evaluation.predictors import field_to_places


def test_pck_bbox_by_hand():
    # The box of the keypoints is 40 wide and 20 high, so the reference is 40 and alpha 0.1 allows 4 pixels.
    truth = np.array([[10, 10], [50, 30], [30, 20], [20, 15]], float)
    predicted = truth + np.array([[0, 0], [4, 0], [3, 3], [0, -4.001]])  # errors 0, 4 (on the edge), 4.24, 4.001
    found = metrics.keypoint_errors(predicted, truth, "bbox")
    assert found.length == 40
    np.testing.assert_allclose(found.errors, [0, 4, math.sqrt(18), 4.001])
    assert found.correct(0.1) == 2
    assert found.pck(0.1) == 0.5


def test_pck_bbox_takes_an_annotated_box_where_there_is_one():
    truth = np.array([[10, 10], [50, 30]], float)
    found = metrics.keypoint_errors(truth + np.array([0, 9]), truth, "bbox", box=(0, 0, 30, 90))
    assert found.length == 90
    assert found.pck(0.1) == 1.0
    assert metrics.keypoint_errors(truth + np.array([0, 9.001]), truth, "bbox", box=(0, 0, 30, 90)).pck(0.1) == 0.0


def test_pck_image_scales_each_axis_by_itself():
    # 112 high and 448 wide: a pixel down is 2 units of 224, a pixel to the right half a unit.
    truth = np.array([[100, 50], [200, 60]], float)
    predicted = truth + np.array([[44.8, 0], [0, 11.2]])  # both 22.4 of 224
    found = metrics.keypoint_errors(predicted, truth, "image", size=(112, 448))
    np.testing.assert_allclose(found.errors, [22.4, 22.4])
    assert found.length == 224
    # Taking (width, height) for (height, width) gives 89.6 and 5.6 instead.
    swapped = metrics.keypoint_errors(predicted, truth, "image", size=(448, 112))
    np.testing.assert_allclose(swapped.errors, [89.6, 5.6])


def test_padding_does_not_inflate_the_reference_length():
    truth = np.array([[100, 100], [120, 110], [-1, -1], [-1, -1]], float)
    predicted = truth + np.array([[5, 0], [0, 0], [0, 0], [0, 0]])
    found = metrics.keypoint_errors(predicted, truth, "bbox")
    # With the padding the box would be 121 pixels and an error of 5 right at 0.1; without it the box is 20.
    assert found.length == 20
    assert len(found.errors) == 2
    assert found.pck(0.1) == 0.5
    assert metrics.points_box(truth) == (100, 100, 120, 110)
    nan_padded = np.where(truth == -1, np.nan, truth)
    assert metrics.keypoint_errors(predicted, nan_padded, "bbox").length == 20


def test_one_coordinate_of_minus_one_is_a_keypoint_all_the_same():
    assert metrics.present_points(np.array([[-1, 5], [-1, -1], [3, -1]])).tolist() == [True, False, True]


@pytest.mark.parametrize("protocol", ["bbox", "image"])
def test_pck_against_a_loop(protocol):
    generator = np.random.default_rng(3)
    for _ in range(20):
        height, width = generator.integers(30, 300, 2)
        truth = generator.uniform(0, [width, height], (12, 2))
        predicted = truth + generator.normal(0, 12, (12, 2))
        found = metrics.keypoint_errors(predicted, truth, protocol, size=(int(height), int(width)))
        for alpha in (0.05, 0.1, 0.15):
            right = 0
            side = max(
                max(p[0] for p in truth) - min(p[0] for p in truth), max(p[1] for p in truth) - min(p[1] for p in truth)
            )
            for (px, py), (tx, ty) in zip(predicted.tolist(), truth.tolist(), strict=True):
                if protocol == "bbox":
                    right += math.hypot(px - tx, py - ty) <= alpha * side
                else:
                    right += math.hypot((px - tx) * 224 / width, (py - ty) * 224 / height) <= alpha * 224
            assert found.correct(alpha) == right


def test_the_truth_scores_exactly_one():
    truth = np.random.default_rng(0).uniform(0, 90, (9, 2))
    for protocol in metrics.PCK_PROTOCOLS:
        assert metrics.keypoint_errors(truth, truth, protocol, size=(70, 90)).pck(1e-9) == 1.0


def test_keypoints_that_cannot_be_scored():
    with pytest.raises(DataError, match="extent"):
        metrics.keypoint_errors(np.zeros((1, 2)), np.array([[3.0, 4.0]]), "bbox")
    with pytest.raises(DataError, match="no valid"):
        metrics.keypoint_errors(np.zeros((1, 2)), np.array([[-1.0, -1.0]]), "image", size=(5, 5))
    with pytest.raises(DataError, match="finite"):
        metrics.keypoint_errors(np.array([[np.nan, 1.0]]), np.array([[3.0, 4.0]]), "image", size=(5, 5))
    with pytest.raises(InputError, match="protocol"):
        metrics.keypoint_errors(np.zeros((1, 2)), np.ones((1, 2)), "scnet")
    with pytest.raises(InputError, match="size"):
        metrics.keypoint_errors(np.zeros((1, 2)), np.ones((1, 2)), "image")
    with pytest.raises(InputError, match="cannot be compared"):
        metrics.keypoint_errors(np.zeros((2, 2)), np.ones((1, 2)), "image", size=(5, 5))


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("protocol", metrics.PCK_PROTOCOLS)
def test_numbers_without_end_are_never_right(protocol, value):
    """An annotation at infinity made the box endless, and with it every prediction right."""
    sound, every = np.array([[3.0, 4.0], [9.0, 7.0]]), np.ones(2, dtype=bool)
    odd = np.array([[3.0, 4.0], [9.0, value]])
    with pytest.raises(DataError, match="A predicted keypoint is not a finite number"):
        metrics.keypoint_errors(odd, sound, protocol, size=(20, 30), valid=every)
    with pytest.raises(DataError, match="An annotated keypoint is not a finite number"):
        metrics.keypoint_errors(sound, odd, protocol, size=(20, 30), valid=every)
    with pytest.raises(DataError, match="no extent, or no finite one"):
        metrics.keypoint_errors(sound, sound, "bbox", box=(0.0, 0.0, value, value))


def test_flow_pck_against_a_loop():
    generator = np.random.default_rng(4)
    height, width, source_size = 11, 17, (23, 40)
    flow = generator.normal(0, 3, (height, width, 2))
    flow[2, 3] = 1e10
    flow[4, 5, 1] = np.nan
    flow[5, 5, 0] = -1e9
    mask = generator.random((height, width)) > 0.4
    mask[2, 3] = mask[4, 5] = mask[5, 5] = True
    places = generator.uniform(0, 20, (height, width, 2))
    found = metrics.flow_errors(places, flow, mask, source_size)
    right = total = 0
    for y in range(height):
        for x in range(width):
            dx, dy = flow[y, x]
            if not mask[y, x] or not math.isfinite(dx) or not math.isfinite(dy) or abs(dx) >= 1e9 or abs(dy) >= 1e9:
                continue
            total += 1
            right += math.hypot(places[y, x, 0] - (x + dx), places[y, x, 1] - (y + dy)) <= 0.2 * 40
    assert len(found.errors) == total
    assert found.correct(0.2) == right
    assert 0 < right < total


def test_flow_needs_a_valid_pixel_and_equal_shapes():
    flow = np.full((4, 5, 2), 1e10)
    with pytest.raises(DataError, match="valid flow"):
        metrics.flow_errors(np.zeros((4, 5, 2)), flow, np.ones((4, 5), bool), (4, 5))
    with pytest.raises(InputError, match="share a height and width"):
        metrics.flow_errors(np.zeros((5, 4, 2)), flow, np.ones((4, 5), bool), (4, 5))


def test_precision_and_jaccard_by_hand():
    truth = np.array([[1, 1, 0, 0], [1, 1, 0, 0]], bool)
    predicted = np.array([[1, 0, 1, 0], [1, 0, 0, 0]], bool)
    assert metrics.precision(predicted, truth) == 5 / 8
    assert metrics.jaccard(predicted, truth) == 2 / 5
    assert metrics.precision(truth, truth) == metrics.jaccard(truth, truth) == 1.0
    assert metrics.jaccard(predicted, np.zeros((2, 4), bool)) is None
    assert metrics.precision(np.zeros((2, 4), bool), np.zeros((2, 4), bool)) == 1.0
    assert metrics.jaccard(~truth, truth) == 0.0


def test_masks_must_be_boolean_and_of_one_shape():
    with pytest.raises(InputError, match="boolean"):
        metrics.precision(np.zeros((2, 2)), np.zeros((2, 2), bool))
    with pytest.raises(InputError, match="compared"):
        metrics.jaccard(np.zeros((2, 3), bool), np.zeros((3, 2), bool))


def slow_boundary_f(predicted, truth):
    """DAVIS's measure pixel by pixel: `seg2bmap`, then each boundary against every pixel of the other."""
    height, width = truth.shape

    def boundary(mask):
        places = []
        for y in range(height):
            for x in range(width):
                right, below = min(x + 1, width - 1), min(y + 1, height - 1)
                if len({mask[y, x], mask[y, right], mask[below, x], mask[below, right]}) == 2:
                    places.append((y, x))
        return places

    reach = math.ceil(0.0075 * math.hypot(height, width))
    found, right = boundary(predicted), boundary(truth)

    def share(own, other):
        near = [any((y - v) ** 2 + (x - u) ** 2 <= reach**2 for v, u in other) for y, x in own]
        return sum(near) / len(near)

    p, r = share(found, right), share(right, found)
    return 2 * p * r / (p + r) if p + r else 0.0


@pytest.mark.parametrize(("height", "width", "share"), [(24, 31, 0.5), (150, 90, 0.497), (9, 60, 0.5), (1, 40, 0.5)])
def test_boundary_f_against_a_loop(height, width, share):
    generator = np.random.default_rng(height)
    # Blobs: noise would have a boundary everywhere.
    masks = [ndimage.uniform_filter(generator.random((height, width)), 9) > share for _ in range(2)]
    assert all(mask.any() and not mask.all() for mask in masks)
    assert metrics.boundary_f(*masks) == pytest.approx(slow_boundary_f(*masks), abs=1e-12)
    assert metrics.boundary_f(masks[0], masks[0]) == 1.0


def test_boundary_f_by_hand():
    truth = np.zeros((300, 400), bool)
    truth[100:200, 100:200] = True  # the diagonal is 500, so 3.75 pixels, rounded up to 4, are allowed
    shifted = np.roll(truth, 4, axis=1)
    assert metrics.boundary_f(shifted, truth) == 1.0
    thin = truth.copy()
    thin[199:210, 150] = True  # a leg: hardly any area, but boundary
    assert metrics.jaccard(thin, truth) > 0.998
    assert metrics.boundary_f(thin, truth) < 0.99
    empty = np.zeros_like(truth)
    assert metrics.boundary_f(empty, truth) == metrics.boundary_f(~empty, truth) == 0.0
    assert metrics.boundary_f(truth, empty) is metrics.boundary_f(truth, ~empty) is None
    void = np.ones_like(truth)
    void[:, 150:] = False
    assert metrics.boundary_f(shifted & (np.arange(400) < 150), truth, void) == 1.0


def test_label_transfer_against_a_loop():
    generator = np.random.default_rng(5)
    source_mask = generator.random((9, 14)) > 0.5
    target_mask = generator.random((7, 6)) > 0.5
    places = generator.uniform(-3, 15, (7, 6, 2))
    warped = np.zeros((7, 6), bool)
    for y in range(7):
        for x in range(6):
            column, row = math.floor(places[y, x, 0] + 0.5), math.floor(places[y, x, 1] + 0.5)
            if 0 <= row < 9 and 0 <= column < 14:
                warped[y, x] = source_mask[row, column]
    accuracy, iou = metrics.label_transfer(source_mask, target_mask, places)
    assert accuracy == (warped == target_mask).mean()
    assert iou == (warped & target_mask).sum() / (warped | target_mask).sum()
    y, x = np.mgrid[:9, :14]
    assert metrics.label_transfer(source_mask, source_mask, np.stack((x, y), -1)) == (1.0, 1.0)


def test_a_stored_field_against_a_loop():
    """It runs from edge to edge of the target, in shares of the source from edge to edge."""
    generator = np.random.default_rng(6)
    field = generator.uniform(0, 1, (4, 5, 2)).astype(np.float32)
    places = field_to_places(field, (30, 50), (7, 9))
    assert places.shape == (7, 9, 2)
    for y in range(7):
        for x in range(9):
            fy, fx = (y + 0.5) / 7 * 3, (x + 0.5) / 9 * 4
            y0, x0 = int(fy), int(fx)
            wy, wx = fy - y0, fx - x0
            value = (1 - wy) * ((1 - wx) * field[y0, x0] + wx * field[y0, x0 + 1]) + wy * (
                (1 - wx) * field[y0 + 1, x0] + wx * field[y0 + 1, x0 + 1]
            )
            np.testing.assert_allclose(places[y, x], [value[0] * 50 - 0.5, value[1] * 30 - 0.5], atol=1e-5)
