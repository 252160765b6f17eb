"""Masks of several objects, divided into labels."""

import numpy as np
import pytest
import torch

from macosnet_hf.instances import fill_labels, find_peaks, split_instances

SIDE = 120


def discs(*circles):
    rows, columns = np.mgrid[:SIDE, :SIDE]
    mask = np.zeros((SIDE, SIDE), np.float32)
    for x, y, radius in circles:
        mask[np.hypot(columns - x, rows - y) <= radius] = 1
    return mask


def labels_of(mask, features=None):
    same = torch.ones(1, 4, 15, 15)
    return split_instances(torch.from_numpy(mask)[None], same if features is None else features)[0]


@pytest.mark.parametrize(
    ("circles", "count"),
    [
        ([(60, 60, 30)], 1),
        ([(30, 60, 20), (90, 60, 20)], 2),  # apart
        ([(35, 60, 25), (80, 60, 25)], 2),  # overlapping a little
        ([(30, 30, 20), (62, 40, 20), (45, 70, 20)], 3),
        ([(50, 60, 25), (60, 60, 25)], 1),  # overlapping for the most part
        ([(50, 60, 30), (100, 100, 3)], 1),  # a small component
    ],
)
def test_discs_are_counted(circles, count):
    labels = labels_of(discs(*circles))
    assert labels.max() == count
    assert set(np.unique(labels)) == set(range(count + 1))
    assert ((labels > 0) == (discs(*circles) >= 0.5)).all()


def test_the_largest_object_has_label_one():
    labels = labels_of(discs((25, 25, 15), (85, 80, 25)))
    assert labels[25, 25] == 2
    assert labels[80, 85] == 1


def test_each_of_two_touching_discs_has_its_own_label():
    labels = labels_of(discs((35, 60, 25), (80, 60, 25)))
    assert len(np.unique(labels[40:80, 15:50])) == 2  # background and one label
    assert labels[60, 35] != labels[60, 80]
    assert abs(int((labels == 1).sum()) - int((labels == 2).sum())) < 0.1 * (labels > 0).sum()


def test_parts_that_do_not_resemble_one_another_are_one_object():
    features = torch.zeros(1, 2, 15, 15)
    features[:, 0, :, :7] = 1  # a head
    features[:, 1, :, 7:] = 1  # and a body
    assert labels_of(discs((35, 60, 25), (80, 60, 25)), features).max() == 1


def test_a_mask_without_an_object_has_no_label():
    assert labels_of(np.zeros((SIDE, SIDE), np.float32)).max() == 0


def test_an_object_of_one_pixel_has_a_label():
    mask = np.zeros((SIDE, SIDE), np.float32)
    mask[50, 60] = 1
    assert labels_of(mask).sum() == 1


def test_noise_ends_and_every_pixel_of_the_object_has_a_label():
    mask = np.random.default_rng(0).random((SIDE, SIDE)).astype(np.float32)
    labels = labels_of(mask)
    assert ((labels > 0) == (mask >= 0.5)).all()


def test_a_lower_maximum_counts_where_the_way_to_the_higher_one_is_low():
    row = np.array([0, 1, 3, 5, 4.9, 5.1, 3, 1, 4, 2, 0], np.float32)
    found = find_peaks(np.tile(row, (3, 1)))
    assert sorted(column for _, _, column in found) == [5, 8]


def test_labels_fill_a_larger_mask_by_the_nearest_one():
    labels = np.array([[1, 0], [0, 2]], np.int32)
    mask = np.ones((40, 40), bool)
    mask[0] = False
    filled = fill_labels(labels, mask)
    assert (filled[0] == 0).all()
    assert filled[5, 5] == 1
    assert filled[35, 35] == 2
    assert (filled[1:] > 0).all()


@pytest.mark.parametrize("side", [60, 97, 100, 400])
def test_labels_of_a_mirror_image_are_mirrored(side):
    """Nearest pixels by half-pixel centres: with OpenCV's other way labels of small images moved to one side."""
    labels = np.ones((240, 240), np.int32)
    labels[:, 121:] = 2
    mask = np.ones((side, side), bool)
    filled = fill_labels(labels, mask)
    mirrored = fill_labels(np.ascontiguousarray(labels[:, ::-1]), mask)
    assert (filled == mirrored[:, ::-1]).all()
    assert abs((filled[0] == 1).sum() - 121 / 240 * side) <= 0.5
