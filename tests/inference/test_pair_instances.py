"""Pairs with several objects: the two that match best are chosen and named."""

import numpy as np
import pytest
import torch
from PIL import Image
from real_photos import CHEETAH, LION

from macosnet_hf import load_image, match_pair
from macosnet_hf.hints import Hint
from macosnet_hf.inference.pair_instances import MatchedInstances, choose_instances

SIDE = 60
ALIKE = torch.ones(2, 4, 6, 6)


def blobs(*boxes):
    """A soft mask `(S, S)` of some rectangles (left, top, right, bottom)."""
    mask = np.zeros((SIDE, SIDE), np.float32)
    for left, top, right, bottom in boxes:
        mask[top:bottom, left:right] = 1
    return mask


# Two objects, the larger on the right; and three, of which the largest is at the top.
SOFT = np.stack([blobs((5, 5, 20, 25), (32, 5, 55, 40)), blobs((2, 2, 58, 20), (2, 30, 22, 55), (40, 35, 55, 50))])
SIZES = ((120, 60), (60, 180))


def ends(*places):
    """A match between places of the masks of source and target, in pixels of the images."""
    return ((np.array(places) + 0.5) * SIZES / SIDE - 0.5).tolist()


def test_the_objects_with_the_largest_sum_of_scores_are_chosen():
    points = np.array(
        [
            ends((10, 10), (30, 10)),  # left, top
            ends((12, 15), (31, 12)),
            ends((40, 20), (10, 40)),  # right, bottom left
            ends((45, 25), (12, 45)),
            ends((50, 30), (14, 50)),
            ends((41, 22), (30, 10)),  # right, top
        ]
    )
    scores = np.array([0.9, 0.9, 0.5, 0.5, 0.5, 1.0])
    found, on_chosen = choose_instances(SOFT, ALIKE, points, scores, SIZES)
    assert found.counts == (2, 3)
    assert found.chosen == (2, 1)  # the smaller of two, the largest of three
    assert on_chosen.tolist() == [True, True, False, False, False, False]
    np.testing.assert_allclose(found.scores, [[1.0, 1.5, 0], [1.8, 0, 0]])
    assert found.in_words() == "object 2 of 2 of the source matches object 1 of 3 of the target"
    mask = np.zeros((60, 120), bool)
    mask[5:25, 10:40] = mask[5:40, 64:110] = True
    labels = found.of_mask(0, mask)
    assert labels[10, 20] == 2
    assert labels[10, 80] == 1
    assert ((labels > 0) == mask).all()


def test_nothing_to_choose_among():
    none = np.zeros((0, 2, 2))
    found, on_chosen = choose_instances(SOFT, ALIKE, none, np.zeros(0), SIZES)
    assert (found.chosen, found.in_words(), len(on_chosen)) == (None, "", 0)
    empty = np.stack([SOFT[0], np.zeros_like(SOFT[1])])
    found, on_chosen = choose_instances(empty, ALIKE, np.array([ends((10, 10), (30, 10))]), np.ones(1), SIZES)
    assert (found.counts, found.chosen, on_chosen.tolist()) == ((2, 0), None, [False])
    one = MatchedInstances(SOFT > 0, np.ones((1, 1)), (1, 1))
    assert one.in_words() == ""
    assert MatchedInstances(SOFT > 0, np.ones((2, 1)), (2, 1)).in_words() == (
        "object 2 of 2 of the source matches the only object of the target"
    )


@pytest.fixture(scope="module")
def both():
    """A cheetah's head beside a lion's, with white between them, and the lion alone, nearer."""
    cheetah, lion = (load_image(photo) for photo in (CHEETAH, LION))
    image = Image.new("RGB", (600, 320), "white")
    image.paste(cheetah.resize((240, 240)), (40, 40))
    image.paste(lion.resize((240, 240)), (320, 40))
    return image, lion.crop((12, 10, lion.width - 12, lion.height - 10))


def test_matches_lie_on_the_two_objects_that_match_best(network, both):
    source, target = both
    plain = match_pair(source, target, **network)
    assert plain.instances is None
    result = match_pair(source, target, **network, instances=True)
    found = result.instances
    assert found.counts == (2, 1)
    right = plain.keypoints[:, 0, 0] > 300
    assert 0 < right.sum() < len(right), "the cheetah has matches too"
    assert len(result.keypoints) >= right.sum() - 1
    assert (result.keypoints[:, 0, 0] > 300).all()
    labels = found.of_mask(0, result.source_mask)
    assert (labels[:, 310:] == found.chosen[0]).sum() > 0.9 * (labels == found.chosen[0]).sum()
    np.testing.assert_array_equal(result.source_mask, plain.source_mask)
    assert (result.quality, result.agreement) == (plain.quality, plain.agreement)
    # Other options of the same pair choose again.
    other = result.with_options(refine="none", threshold=0.3)
    assert other.instances is not None
    assert (other.scores > 0.3).all()
    assert (other.keypoints[:, 0, 0] > 300).all()
    hinted = result.with_hints({"source": Hint(include=[(150, 150)])})
    assert hinted.instances is not None
