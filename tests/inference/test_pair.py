"""`match_pair`: one call from two images to matches, masks, transferred points and the warped source."""

import numpy as np
import pytest
import torch
from PIL import Image
from real_photos import CHEETAH, LION, TOWER

import macosnet_hf
from macosnet_hf import CheckpointError, ImageError, InputError, load_image, match_pair
from macosnet_hf.collection import Collection, hard_mask
from macosnet_hf.geometry import (
    apply_cascade,
    denormalize_points,
    normalize_points,
)
from macosnet_hf.inference.pair import _as_array, check_points, match_images


@pytest.fixture(scope="module")
def result(network):
    # Neither image is square, and they differ in size.
    source = load_image(CHEETAH).resize((301, 222))
    return match_pair(source, load_image(LION).resize((190, 257)), **network, refine="none")


def test_shapes_units_and_order(result):
    count = len(result.keypoints)
    assert count > 20
    assert result.keypoints.shape == (count, 2, 2)
    assert result.scores.shape == (count,)
    assert (np.diff(result.scores) <= 0).all()
    assert ((result.scores > 0) & (result.scores <= 1)).all()
    assert result.source_mask.shape == (222, 301)
    assert result.target_mask.shape == (257, 190)
    assert result.source_mask.dtype == result.target_mask.dtype == bool
    assert result.affine.shape == (2, 6)
    assert result.tps.shape == (2, 18)
    assert result.image_sizes.tolist() == [[[222, 301], [257, 190]]]
    for view, photo in enumerate((result.source, result.target)):
        assert (result.keypoints[:, view] >= 0).all()
        assert (result.keypoints[:, view] <= np.array(photo.size) - 1).all()


def test_matches_lie_on_both_masks(result):
    for (x, y), (u, v) in np.rint(result.keypoints).astype(int):
        assert result.source_mask[y, x]
        assert result.target_mask[v, u]


def test_matches_are_the_keypoints_as_plain_numbers(result):
    first = result.matches[0]
    assert len(result.matches) == len(result.keypoints)
    assert first["source"] == tuple(result.keypoints[0, 0])
    assert first["target"] == tuple(result.keypoints[0, 1])
    assert first["score"] == result.scores[0]
    assert all(type(value) is float for value in (*first["source"], *first["target"], first["score"]))


def test_threshold_drops_the_weak_matches_only(result, network):
    threshold = float(np.median(result.scores))
    strong = match_pair(result.source, result.target, **network, refine="none", threshold=threshold)
    expected = result.scores > threshold
    assert 0 < expected.sum() < len(expected)
    np.testing.assert_array_equal(strong.scores, result.scores[expected])
    np.testing.assert_array_equal(strong.keypoints, result.keypoints[expected])
    assert strong.quality == result.quality


def test_points_are_transferred_by_the_transform_of_their_direction(result):
    points = np.array([[0.0, 0.0], [300.0, 221.0], [150.25, 40.5]])
    # Row 1 of the transforms takes points of the source to the target.
    normalized = normalize_points(torch.from_numpy(points), (222, 301), 240)
    affine, tps = torch.from_numpy(result.affine[1:]).double(), torch.from_numpy(result.tps[1:]).double()
    expected = denormalize_points(apply_cascade(normalized[None], affine, tps), (257, 190), 240)[0].numpy()
    np.testing.assert_allclose(result.transfer(points, local_matching=False), expected, atol=0.02)

    back = result.transfer([[20.0, 30.0]], "target_to_source", local_matching=False)
    normalized = normalize_points(torch.tensor([[20.0, 30.0]], dtype=torch.float64), (257, 190), 240)
    affine, tps = torch.from_numpy(result.affine[:1]).double(), torch.from_numpy(result.tps[:1]).double()
    expected = denormalize_points(apply_cascade(normalized[None], affine, tps), (222, 301), 240)[0].numpy()
    np.testing.assert_allclose(back, expected, atol=0.02)
    assert np.abs(expected - np.array([[20.0, 30.0]])).max() > 5  # else nothing would have been tested


def test_transferred_keypoints_are_the_matches(result):
    moved = result.transfer(result.keypoints[:, 0])
    np.testing.assert_allclose(moved, result.keypoints[:, 1], atol=0.05)
    assert result.transfer([]).shape == (0, 2)


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ([[301, 5]], "outside of the image, which is 301x222"),
        ([[-0.5, 5]], "outside"),
        ([[5, 5], [5, float("nan")]], "finite"),
        ([[5, 5, 5]], "pairs"),
        ([5, 5], "pairs"),
        ([["a", "b"]], "pairs"),
        ([[1, 2], [3]], "pairs"),
    ],
)
def test_points_that_are_none(result, points, words):
    with pytest.raises(InputError, match=words):
        result.transfer(points)
    with pytest.raises(InputError, match=words):
        check_points(points, (301, 222))


def test_unknown_direction(result):
    with pytest.raises(InputError, match="direction"):
        result.transfer([[1, 1]], "sideways")


def bilinear(image, x, y):
    """Value of an image `(H, W, 3)` at a real place, black outside; plain arithmetic."""
    height, width = image.shape[:2]
    total = np.zeros(3)
    for row in (int(np.floor(y)), int(np.floor(y)) + 1):
        for column in (int(np.floor(x)), int(np.floor(x)) + 1):
            if 0 <= row < height and 0 <= column < width:
                total += image[row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return total


@pytest.mark.parametrize("size", [(190, 257), (1300, 1100), (2, 700)])
def test_warped_source_shows_the_source_at_the_transferred_place(result, size):
    """Against a slow reference, also where the image takes more than one tile and more than 512 points a side."""
    large = _with_target_size(result, size)
    warped = np.asarray(large.warped_source(), dtype=float)
    assert warped.shape == (size[1], size[0], 3)
    generator = np.random.default_rng(0)
    places = generator.integers(0, size, (40, 2))
    found = large.transfer(places, "target_to_source", local_matching=False)
    source = np.asarray(large.source, dtype=float)
    for (column, row), (x, y) in zip(places, found, strict=True):
        # A place is known to 0.02 pixels and OpenCV's weights to 1/32: noise moves by up to some grey levels.
        np.testing.assert_allclose(warped[row, column], bilinear(source, x, y), atol=6)


def _with_target_size(result, size):
    from dataclasses import replace

    noise = np.random.default_rng(1).integers(0, 255, (12, 16, 3)).astype(np.uint8)
    smooth = Image.fromarray(noise).resize(result.source.size, Image.Resampling.BICUBIC)
    return replace(result, source=smooth, target=Image.new("RGB", size))


def test_a_source_too_long_for_opencv_is_warped_too(result):
    from dataclasses import replace

    long = replace(result, source=Image.new("RGB", (40_000, 30), "red"), target=Image.new("RGB", (64, 48)))
    warped = np.asarray(long.warped_source())
    assert warped.shape == (48, 64, 3)
    assert (warped[..., 0] > 250).mean() > 0.3


def test_pixels_come_strip_by_strip():
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (1100, 7, 3)).astype(np.uint8))
    np.testing.assert_array_equal(_as_array(photo), np.asarray(photo))


def test_every_kind_of_source_gives_the_same(network):
    photo = load_image(CHEETAH)
    whole = match_pair(CHEETAH, LION, **network, refine="none")
    for source in (photo, np.asarray(photo), open(CHEETAH, "rb").read()):  # noqa: SIM115
        other = match_pair(source, LION, **network, refine="none")
        np.testing.assert_array_equal(other.keypoints, whole.keypoints)
        np.testing.assert_array_equal(other.source_mask, whole.source_mask)


def test_loaded_images_are_held_and_not_copied(network):
    photos = (load_image(CHEETAH), load_image(LION))
    found = match_images(photos, **network, refine="none")
    assert (found.source, found.target) == photos
    assert found.source is photos[0]
    whole = match_pair(*photos, **network, refine="none")
    np.testing.assert_array_equal(found.keypoints, whole.keypoints)
    assert whole.source is not photos[0], "what a caller of match_pair does with an image later is his business"
    with pytest.raises(InputError, match="threshold"):
        match_images(photos, **network, threshold=2)


def test_swapping_the_images_swaps_everything(network):
    one = match_pair(CHEETAH, LION, **network, refine="otsu")
    other = match_pair(LION, CHEETAH, **network, refine="otsu")
    np.testing.assert_allclose(one.affine, other.affine[::-1], atol=1e-4)
    np.testing.assert_allclose(one.tps, other.tps[::-1], atol=1e-4)
    assert (one.source_mask == other.target_mask).mean() > 0.999
    assert (one.target_mask == other.source_mask).mean() > 0.999


def test_an_image_matches_itself_where_it_stands(network):
    result = match_pair(CHEETAH, CHEETAH, **network, refine="none")
    assert result.quality == "good"
    error = np.linalg.norm(result.keypoints[:, 0] - result.keypoints[:, 1], axis=-1)
    assert np.median(error) < 0.05 * 256


def test_refinement_makes_the_masks_hard_in_its_way(network):
    plain = match_pair(CHEETAH, LION, **network, refine="none")
    cut = match_pair(CHEETAH, LION, **network)
    assert cut.source_mask.shape == plain.source_mask.shape
    assert (cut.source_mask != plain.source_mask).any()


@pytest.mark.parametrize("small", [False, True])
def test_refined_masks_are_those_of_a_collection_of_two(network, small):
    photos = [load_image(CHEETAH), load_image(LION)]
    if small:  # in a corner of a wall: cropped for the second pass
        for number, photo in enumerate(photos):
            photos[number] = Image.new("RGB", (700, 500), (120, 130, 140))
            photos[number].paste(photo.resize((220, 220)), (30 + 300 * number, 50))
    collection = Collection(**network)
    collection.add(photos)
    soft = collection.segment(refine="grabcut").probabilities
    whole = collection.segment(refine="grabcut", second_pass=False).probabilities
    assert (np.abs(soft - whole).max() > 0.2) == small
    result = match_pair(*photos, **network)
    for mask, photo, probability in zip((result.source_mask, result.target_mask), photos, soft, strict=True):
        assert (mask == hard_mask(probability, photo.size[::-1])).mean() > 0.999
        assert mask.any()


def test_the_second_pass_is_made_once(network):
    photos = [Image.new("RGB", (700, 500), (120, 130, 140)) for _ in range(2)]
    for photo, name in zip(photos, (CHEETAH, LION), strict=True):
        photo.paste(load_image(name).resize((220, 220)), (200, 50))
    passes = []
    hook = network["model"].macosnet.encoder.register_forward_hook(lambda _, given, __: passes.append(len(given[0])))
    try:
        soft = match_pair(*photos, **network, refine="none")
        matched = sum(passes)
        refined = soft.with_options(refine="grabcut")
        assert sum(passes) == matched + 2
        again = soft.with_options(refine="grabcut", threshold=0.1)
        refined.with_options(refine="otsu")
        assert sum(passes) == matched + 2
    finally:
        hook.remove()
    np.testing.assert_array_equal(again.source_mask, refined.source_mask)
    assert (refined.source_mask != soft.source_mask).any()


def test_default_checkpoint_is_loaded_once(network):
    from macosnet_hf.inference import pair

    pair._cached_checkpoint.cache_clear()
    first = match_pair(CHEETAH, LION, device="cpu", refine="none")
    again = match_pair(CHEETAH, LION, device="cpu", refine="none")
    assert first._found.model is again._found.model
    np.testing.assert_array_equal(first.keypoints, match_pair(CHEETAH, LION, **network, refine="none").keypoints)
    pair._cached_checkpoint.cache_clear()


def test_bad_arguments(network, tmp_path):
    with pytest.raises(ImageError, match="does not exist"):
        match_pair(tmp_path / "nothing.jpg", LION)
    with pytest.raises(InputError, match="threshold"):
        match_pair(CHEETAH, LION, **network, threshold=1.5)
    with pytest.raises(InputError, match="threshold"):
        match_pair(CHEETAH, LION, **network, threshold=float("nan"))
    with pytest.raises(InputError, match="refinement"):
        match_pair(CHEETAH, LION, **network, refine="magic")
    with pytest.raises(InputError, match="model and processor together"):
        match_pair(CHEETAH, LION, model=network["model"])
    with pytest.raises(CheckpointError):
        match_pair(CHEETAH, LION, checkpoint=tmp_path)
    with pytest.raises(InputError, match="no device"):
        match_pair(CHEETAH, LION, device="abacus")


def test_drawing_of_the_matches(result):
    drawing = result.draw_matches(max_matches=10)
    assert drawing.width > drawing.height
    assert np.asarray(drawing).std() > 10


def test_exported_by_the_package():
    assert macosnet_hf.match_pair is match_pair
    assert isinstance(macosnet_hf.PairResult, type)


def test_unrelated_images_are_not_called_good(network):
    assert match_pair(TOWER, CHEETAH, **network).quality != "good"
    assert match_pair(CHEETAH, LION, **network).quality == "good"
