"""Hints against a slow reference, what they change in a collection and a pair, and the errors of bad ones."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from macosnet_hf import InputError, load_image, match_pair
from macosnet_hf.collection import Collection, segment_collection
from macosnet_hf.hints import Hint, HintedCells, PlacedHint, place_hints, sample_cells
from macosnet_hf.inference.cutouts import alpha_matte
from macosnet_hf.io.checkpoints import load_model_and_processor
from macosnet_hf.mask_sharing import drop_small_components, fix_hints
from macosnet_hf.refinement import refine_mask

SIZE = (40, 30)  # width, height


@pytest.fixture(scope="module")
def network():
    model, processor = load_model_and_processor("lite", "cpu")
    return {"model": model, "processor": processor}


@pytest.fixture(scope="module")
def images():
    return [load_image(f"examples/{name}.jpg") for name in ("cat", "tabby", "dog")]


# ---------------------------------------------------------------------------------------------------------------------
# The slow reference: loops over cells, in double precision
# ---------------------------------------------------------------------------------------------------------------------


def unit(vector):
    return vector / np.linalg.norm(vector)


def slow_sample(cells, point, side):
    """Bilinear interpolation; cell i of n has its centre at pixel i (S - 1) / (n - 1) of the network's input."""
    count = cells.shape[1]
    place = [(share * side - 0.5) * (count - 1) / (side - 1) for share in point]
    x, y = (min(max(value, 0.0), count - 1.0) for value in place)
    left, top = min(int(x), count - 2), min(int(y), count - 2)
    total = np.zeros(cells.shape[0])
    for row in (top, top + 1):
        for column in (left, left + 1):
            total += (1 - abs(x - column)) * (1 - abs(y - row)) * cells[:, row, column]
    return unit(total)


def slow_places(count, side):
    """Centres of cells in shares of the image, and their edges: half-way between two centres, or the image's edges."""
    centres = [(number * (side - 1) / (count - 1) + 0.5) / side for number in range(count)]
    return centres, [0, *((one + two) / 2 for one, two in zip(centres[1:], centres, strict=False)), 1]


def slow_other(cells, mask, hint, include):
    """The mean of what the mask shows, where the points say that something else is meant; else nothing."""
    side, count = len(mask), cells.shape[1]
    block = side // count
    if not include or hint.exclude or hint.box is not None:
        return []
    if any(mask[int(y * side), int(x * side)] >= 0.5 for x, y in hint.include):
        return []
    total = np.zeros(len(cells))
    for row in range(count):
        for column in range(count):
            share = mask[row * block : (row + 1) * block, column * block : (column + 1) * block].mean()
            total += share * cells[:, row, column] if share >= 0.5 else 0
    if not total.any() or any(point @ unit(total) >= 0.35 for point in include):
        return []
    return [unit(total)]


def slow_own(cells, hint, side, mask):
    count = cells.shape[1]
    centres, edges = slow_places(count, side)
    include = [slow_sample(cells, point, side) for point in hint.include]
    exclude = [slow_sample(cells, point, side) for point in hint.exclude] + slow_other(cells, mask, hint, include)
    found = np.zeros((count, count))
    for row in range(count):
        for column in range(count):
            cell, value = cells[:, row, column], 0.0
            against = max([0.35, *(cell @ other for other in exclude)]) if exclude else 0.35
            if include:
                value = (max(cell @ other for other in include) - against) / 0.06
            elif exclude:
                value = (0.35 - against) / 0.06
            if hint.box is not None:
                left, top, right, bottom = hint.box
                x, y = centres[column], centres[row]
                across, down = 2 * (x - left) / (right - left) - 1, 2 * (y - top) / (bottom - top) - 1
                if not include:
                    value += 2 * math.exp(-(across**2 + down**2) / (2 * 0.45**2)) - 0.5
                wide, high = (
                    max(0, min(edges[place + 1], end) - max(edges[place], start)) / (edges[place + 1] - edges[place])
                    for place, start, end in ((column, left, right), (row, top, bottom))
                )
                value = wide * high * value - (1 - wide * high) * 3
            found[row, column] = min(max(value, -3), 3)
    return found


def slow_evidence(features, masks, hints):
    side = masks.shape[-1]
    cells = features / np.linalg.norm(features, axis=1, keepdims=True)
    count = cells.shape[-1]
    block = side // count
    own = {number: slow_own(cells[number], hint, side, masks[number]) for number, hint in hints.items()}
    references, changes = [], []
    for number in hints:
        for row in range(count):
            for column in range(count):
                part = masks[number, row * block : (row + 1) * block, column * block : (column + 1) * block]
                before = part.mean()
                odds = min(max(before, 0.02), 0.98)
                odds = math.log(odds / (1 - odds)) + 2 * own[number][row, column]
                references.append(cells[number, :, row, column])
                changes.append(1 / (1 + math.exp(-odds)) - before)
    found = np.zeros((len(features), count, count))
    for number in range(len(features)):
        for row in range(count):
            for column in range(count):
                if number in own:
                    found[number, row, column] = own[number][row, column]
                    continue
                weights = [math.exp(cells[number, :, row, column] @ other / 0.1) for other in references]
                change = sum(w * c for w, c in zip(weights, changes, strict=True)) / sum(weights)
                change = math.copysign(max(abs(change) - 0.09, 0), change)
                found[number, row, column] = min(max(change / 0.3, -3), 3)
    return found


@pytest.mark.parametrize(
    "hints",
    [
        {0: PlacedHint(((0.3, 0.4),), (), None)},
        {0: PlacedHint(((0.12, 0.42), (0.02, 0.9)), (), None), 2: PlacedHint(((0.7, 0.7),), (), None)},
        {0: PlacedHint(((0.32, 0.97),), (), None), 1: PlacedHint(((0.57, 0.52),), (), None)},
        {1: PlacedHint(((0.3, 0.4), (0.9, 0.05)), ((0.5, 0.6),), None)},
        {2: PlacedHint((), ((0.5, 0.6),), None), 0: PlacedHint((), (), (0.1, 0.25, 0.7, 0.8))},
        {2: PlacedHint(((0.5, 0.5),), (), (0.2, 0.3, 0.9, 1.0))},
    ],
)
def test_evidence_is_that_of_the_slow_reference(hints):
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(3, 6, 5, 5, generator=generator)
    masks = torch.rand(3, 20, 20, generator=generator)
    found = HintedCells.of(features, masks, hints).about(features)
    expected = slow_evidence(features.double().numpy(), masks.double().numpy(), hints)
    assert np.abs(found.numpy() - expected).max() < 1e-4
    assert np.abs(expected[[number for number in range(3) if number not in hints]]).max() > 0.01


def test_whoever_points_at_the_dog_beside_a_cup_does_not_mean_both(network):
    """The partner shows a cup, so the mask was that of the cup."""
    beside, cup = load_image("examples/company/dog-and-cup.jpg"), load_image("examples/cup.jpg")
    plain = match_pair(beside, cup, **network)
    half = beside.width // 2
    assert plain.source_mask[:, half:].mean() > 0.5 > 0.1 > plain.source_mask[:, :half].mean()
    asked = match_pair(
        beside, cup, **network, hints={"source": Hint(include=[(0.25 * beside.width, 0.45 * beside.height)])}
    )
    assert asked.source_mask[:, :half].mean() > 0.15 > 0.03 > asked.source_mask[:, half:].mean()
    assert asked.quality == "poor", "there is no dog beside the other cup"


def test_a_hint_that_confirms_the_masks_changes_no_other_image():
    features = torch.randn(2, 6, 5, 5, generator=torch.Generator().manual_seed(1))
    masks = torch.zeros(2, 20, 20)
    hint = PlacedHint((), ((0.5, 0.5),), None)  # excluded where nothing is object
    assert HintedCells.of(features, masks, {0: hint}).about(features)[1].abs().max() < 1e-6


def test_a_crop_has_the_evidence_of_its_part_of_the_box():
    features = torch.randn(1, 6, 4, 4, generator=torch.Generator().manual_seed(1))
    hints = {0: PlacedHint((), (), (0.0, 0.0, 0.5, 1.0))}
    hinted = HintedCells.of(features, torch.full((1, 16, 16), 0.5), hints)
    assert (hinted.about(features, [(0.5, 0.0, 1.0, 1.0)]) == -3).all()
    assert (hinted.about(features, [(0.0, 0.0, 0.5, 1.0)])[0, 1:3, 1:3] > 0).all()


@pytest.mark.parametrize("count", [15, 20])
@pytest.mark.parametrize(("left", "right"), [(300, 1500), (1400, 2600), (2499, 3699)])
def test_the_evidence_of_a_box_stands_where_the_box_is(count, left, right):
    """With half-pixel centres, which the cells do not have, it was 5 of 240 pixels off near the border, 75 of 4,000."""
    side, masks = 240, torch.full((1, 240, 240), 0.5)
    hint = Hint(box=(left, 300, right, 2700)).place((4000, 3000), "it")
    features = torch.randn(1, 6, count, count, generator=torch.Generator().manual_seed(2))
    hinted = HintedCells.of(features, masks, {0: hint})
    row = hinted.apply(masks, hinted.about(features))[0, side // 2]
    kept = (row > 0.1).nonzero().flatten()
    ends = (float(kept.min()) / side * 4000, float(kept.max() + 1) / side * 4000)
    assert sum(ends) / 2 == pytest.approx((left + right + 1) / 2, abs=35)  # 2 pixels of 240


def test_a_point_at_the_centre_of_a_cell_takes_that_cell():
    cells = torch.nn.functional.normalize(torch.randn(6, 5, 5), dim=0)
    side = 20
    point = ((2 * (side - 1) / 4 + 0.5) / side, (3 * (side - 1) / 4 + 0.5) / side)
    assert torch.allclose(sample_cells(cells, [point], side)[0], cells[:, 3, 2], atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Labels, mirror images and crops
# ---------------------------------------------------------------------------------------------------------------------


def test_labels_hold_points_and_box_at_any_size():
    hint = Hint(include=[(10, 10)], exclude=[(20, 15)], box=(5, 5, 34, 24)).place(SIZE, "it")
    for scale in (1, 4):
        labels = hint.labels((SIZE[1] * scale, SIZE[0] * scale))
        middle = scale // 2
        assert labels[10 * scale + middle, 10 * scale + middle] == 1
        assert labels[15 * scale + middle, 20 * scale + middle] == -1
        assert (labels[: 5 * scale] == -1).all()
        assert (labels[25 * scale :] == -1).all()
        assert not (labels[5 * scale : 8 * scale, 5 * scale : 35 * scale] == -1).any()


def test_mirrored_and_cropped_hints_have_the_labels_of_the_mirror_image_and_the_crop():
    hint = Hint(include=[(10, 10)], exclude=[(20, 15)], box=(5, 5, 34, 24)).place(SIZE, "it")
    labels = hint.labels(SIZE[::-1])
    assert (hint.mirrored().labels(SIZE[::-1]) == labels[:, ::-1]).all()
    part = hint.cropped((8 / 40, 6 / 30, 28 / 40, 26 / 30)).labels((20, 20))
    assert (part == labels[6:26, 8:28]).all()


def test_every_step_obeys_a_hint():
    hint = Hint(include=[(10, 10)], exclude=[(30, 15)]).place(SIZE, "it")
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (30, 40, 3), np.uint8))
    soft = np.zeros((30, 40), np.float32)
    soft[12:20, 22:38] = 0.9  # the object is where the excluded point lies
    labels = hint.labels((30, 40))
    for method in ("grabcut", "otsu", "none"):
        mask = refine_mask(image, soft, method, fixed=labels)
        assert mask[10, 10], method
        assert not mask[15, 30], method
    fixed = fix_hints(torch.from_numpy(soft)[None], {0: hint})[0]
    assert fixed[10, 10] == 1
    assert fixed[15, 30] == 0
    alpha = alpha_matte(image, fixed.numpy(), hint)
    assert alpha[10, 10] == 1
    assert alpha[15, 30] == 0


def test_fixed_labels_of_another_shape_are_refused():
    with pytest.raises(InputError, match="shape"):
        refine_mask(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4)), fixed=np.zeros((3, 3), np.int8))


def test_a_small_component_with_an_included_point_stays():
    masks = torch.zeros(1, 40, 40)
    masks[0, 5:35, 5:30] = 1
    masks[0, 36:39, 36:39] = 1
    wanted = np.zeros((40, 40), bool)
    wanted[37, 37] = True
    assert drop_small_components(masks)[0, 37, 37] < 0.5
    assert drop_small_components(masks, {0: wanted})[0, 37, 37] == 1


# ---------------------------------------------------------------------------------------------------------------------
# Bad hints
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hint", "message"),
    [
        (Hint(), "says nothing"),
        (Hint(include=[(40, 3)]), "outside of image 0, which is 40x30 pixels"),
        (Hint(exclude=[(-1, 3)]), "outside of image 0"),
        (Hint(include=[(3, 3)], exclude=[(3.2, 3)]), "both included and excluded"),
        (Hint(box=(5, 5, 5, 9)), "has no area"),
        (Hint(box=(9, 5, 5, 9)), "has no area"),
        (Hint(box=(50, 5, 60, 9)), "lies outside of the image"),
        (Hint(include=[(3, 3)], box=(5, 5, 9, 9)), "outside of the box"),
        (Hint(include=[(float("nan"), 3)]), "finite"),
        (Hint(include=[("a", 3)]), "2 numbers"),
        (Hint(include=[(1, 2, 3)]), "2 finite numbers"),
        (Hint(include=7), "list of"),
        (Hint(box=(1, 2, 3)), "4 finite numbers"),
        ((3, 3), "must be a Hint"),
    ],
)
def test_a_hint_that_cannot_be_used_is_answered_in_a_sentence(hint, message):
    with pytest.raises(InputError, match=message) as error:
        place_hints({0: hint}, [SIZE])
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", [2, -1, "dog", True])
def test_an_unknown_image_is_refused(number):
    with pytest.raises(InputError, match="There is no image"):
        place_hints({number: Hint(include=[(1, 1)])}, [SIZE, SIZE])


def test_a_box_may_reach_beyond_the_image():
    assert Hint(box=(-5, -5, 100, 100)).place(SIZE, "it").box == (0, 0, 1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Collections and pairs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("refine", ["none", "grabcut"])
def test_a_hint_changes_its_image_and_the_others_through_their_features(network, images, refine):
    collection = Collection(**network)
    collection.add(images)
    before = collection.segment(refine=refine)
    assert np.array_equal(before.probabilities, collection.segment(refine=refine, hints={}).probabilities)
    width, height = images[0].size
    inside = before.probabilities[0] >= 0.5
    row, column = (int(np.median(places)) for places in np.nonzero(inside))
    point = ((column + 0.5) / 240 * width - 0.5, (row + 0.5) / 240 * height - 0.5)
    after = segment_collection(images, **network, refine=refine, hints={0: Hint(exclude=[point])}).probabilities
    assert after[0, row, column] == 0
    assert (after[0] >= 0.5).sum() < inside.sum()
    assert after[1].mean() < before.probabilities[1].mean()


@pytest.mark.slow
def test_hints_are_mirrored_with_their_images(network, images):
    collection = Collection(**network, orientations="mirror")
    collection.add(images)
    collection._orientations = torch.tensor([4, 0, 0])
    collection._maps_of_both()
    box = (0, 0, images[0].width // 2, images[0].height - 1)
    masks = collection.segment(hints={0: Hint(box=box)}).probabilities
    assert (masks[0, :, 122:] == 0).all()
    assert (masks[0, :, :120] >= 0.5).any()


@pytest.mark.slow
def test_a_pair_follows_a_hint_and_so_do_its_matches(network, images):
    source, target = images[0], images[2]
    box = (0, 0, source.width // 2, source.height - 1)
    found = match_pair(source, target, **network, hints={"source": Hint(box=box)})
    assert not found.source_mask[:, source.width // 2 + 3 :].any()
    assert (found.keypoints[:, 0, 0] <= source.width // 2 + 3).all()
    plain = match_pair(source, target, **network)
    late = plain.with_hints({"source": Hint(box=box)})  # from the features that are there
    np.testing.assert_array_equal(late.keypoints, found.keypoints)
    np.testing.assert_array_equal(late.soft_masks, found.soft_masks)
    assert (late.quality, late.agreement) == (found.quality, found.agreement)
    np.testing.assert_array_equal(late.with_hints({}).soft_masks, plain.soft_masks)
    again = found.with_options(refine="none")
    assert not again.source_mask[:, source.width // 2 + 3 :].any()
    with pytest.raises(InputError, match="for source or target"):
        match_pair(source, target, **network, hints={"left": Hint(box=box)})
