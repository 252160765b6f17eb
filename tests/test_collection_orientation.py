"""Collections of which some images face the other way: labels, masks, transforms, averages with all facing one way."""

import json
import os

import gradio
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from macosnet_hf import InputError, load_image
from macosnet_hf.collection import Collection
from macosnet_hf.commands.main import main
from macosnet_hf.geometry import SYMMETRIES, make_grid
from macosnet_hf.inference.average import aligned_average
from macosnet_hf.inference.collection_transforms import match_collection
from macosnet_hf.io.checkpoints import load_model_and_processor
from macosnet_hf.orientation import _FACING_COST, facing_evidence, facing_sides

IMAGES = os.path.join(os.path.dirname(gradio.__file__), "media_assets", "images")
MIRROR = list(SYMMETRIES).index("mirror")
SWAPPED = (False, True, True, True, False)


@pytest.fixture(scope="module")
def network():
    model, processor = load_model_and_processor(device="cpu")
    model.config.orientations = "none"
    return {"model": model, "processor": processor}


@pytest.fixture(scope="module")
def photos():
    """Big cats: one twice, cropped differently, so that several pairs have an answer that is beyond doubt."""
    found = [load_image(os.path.join(IMAGES, name)) for name in ("cheetah1.jpg", "lion.jpg", "cheetah.jpg")]
    for image in list(found[:2]):
        width, height = image.size
        found.append(image.crop((width // 12, height // 20, width, height - height // 15)))
    for image in found:
        image.thumbnail((400, 400))
    return found


@pytest.fixture(scope="module")
def collection(network, photos):
    """The images of which some are mirrored, as they are."""
    return collected(network, mirrored(photos, SWAPPED), "mirror")


@pytest.fixture(scope="module")
def one_way(network, collection):
    """The same images, those with a label mirrored by hand: files that all face one way."""
    return collected(network, mirrored(collection.images, labels(collection)), "none")


def collected(network, images, orientations):
    collection = Collection(**network, orientations=orientations)
    collection.add(images)
    return collection


def mirrored(images, which):
    return [ImageOps.mirror(image) if turned else image for image, turned in zip(images, which, strict=True)]


def labels(collection):
    numbers = collection.orientations
    assert numbers.shape == (len(collection),)
    assert set(numbers.tolist()) <= {0, MIRROR}
    return (numbers > 0).tolist()


def passes(network, work):
    counted = []
    hook = network["model"].macosnet.encoder.register_forward_hook(lambda _, inputs, __: counted.append(len(inputs[0])))
    try:
        work()
    finally:
        hook.remove()
    return sum(counted)


def test_mirrored_images_have_the_other_label(network, photos, collection):
    found = labels(collection)
    assert found[0] ^ found[3] == SWAPPED[0] ^ SWAPPED[3]  # the same cheetah
    assert found[1] ^ found[4] == SWAPPED[1] ^ SWAPPED[4]  # the same lion
    assert 0 < sum(found) <= len(found) / 2
    straight = labels(collected(network, photos, "mirror"))
    for number, which in enumerate(np.random.default_rng(5).random((3, len(photos))) < 0.5):
        turned = labels(collected(network, mirrored(photos, which), "mirror"))
        change = [a ^ b ^ bool(c) for a, b, c in zip(straight, turned, which, strict=True)]
        # Up to which side is called mirrored. The cheetah of number 2 looks at the camera.
        assert len({change[k] for k in (0, 1, 3, 4)}) == 1, number


def test_labels_do_not_depend_on_the_order(network, collection):
    order = [3, 0, 4, 2, 1]
    again = collected(network, [collection.images[number] for number in order], "mirror")
    assert labels(again) == [labels(collection)[number] for number in order]
    pair = [collection.images[0], collection.images[0].transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    there, back = (labels(collected(network, images, "mirror")) for images in (pair, pair[::-1]))
    assert sum(there) == 1
    assert there == back[::-1]


def test_at_most_one_more_encoder_pass_an_image(network, photos):
    collection = Collection(**network, orientations="mirror")
    collection.add(photos)
    assert passes(network, lambda: labels(collection)) == len(photos)
    assert passes(network, lambda: (match_collection(collection), collection.segment(), labels(collection))) == 0
    assert passes(network, lambda: collection.subset([0, 2, 1]).orientations) == 0
    collection.add(photos[:1])  # has been seen
    assert passes(network, lambda: labels(collection)) == 0
    assert len(labels(collection)) == len(photos) + 1
    whole = collected(network, photos, "none")
    assert passes(network, lambda: whole.orientations) == 0
    assert not whole.orientations.any()


def test_one_image_and_images_that_say_nothing_stay_as_they_are(network, photos):
    assert labels(collected(network, photos[:1], "mirror")) == [False]
    flat = [Image.new("RGB", (50, 40), color) for color in ("red", "black", "white")]
    assert labels(collected(network, flat, "mirror")) == [False] * 3
    assert labels(collected(network, [photos[0]] * 3, "mirror")) == [False] * 3
    assert Collection(**network, orientations="mirror").orientations.tolist() == []
    with pytest.raises(InputError, match="'none', 'mirror'; got 'all'"):
        Collection(**network, orientations="all")


def test_evidence_matches_the_loop_reference():
    random = torch.Generator().manual_seed(3)
    features, mirror = (torch.randn(4, 7, 5, 5, generator=random, dtype=torch.float64) for _ in range(2))
    others = torch.tensor([[1, 2], [0, 2], [0, 1], [2, 1]])  # of 0 and 3 neither asks the other
    found = facing_evidence(features, mirror, others)
    places = make_grid(5, 5, dtype=torch.float64).reshape(-1, 2).numpy()
    weight = np.exp(-(places**2).sum(1) / (2 * 0.45**2))

    def fit(first, second):
        total = 0.0
        for one, two in ((first, second), (second, first)):
            for p in range(25):
                u = one.flatten(1)[:, p].numpy()
                best = max(
                    u @ v / np.linalg.norm(u) / np.linalg.norm(v) - _FACING_COST * ((places[p] - places[q]) ** 2).sum()
                    for q, v in enumerate(two.flatten(1).t().numpy())
                )
                total += weight[p] * best
        return total / weight.sum()

    for i in range(4):
        for j in range(4):
            expected = 0.0
            if i != j and {i, j} != {0, 3}:
                expected = fit(features[i], features[j]) + fit(mirror[i], mirror[j])
                expected -= fit(features[i], mirror[j]) + fit(mirror[i], features[j])
            assert found[i, j].item() == pytest.approx(expected, abs=1e-5)


def test_sides_of_images_that_agree():
    random = torch.Generator().manual_seed(4)
    shown = torch.randn(1, 9, 6, 6, generator=random) + 0.3 * torch.randn(8, 9, 6, 6, generator=random)
    truth = torch.tensor([1, -1, -1, 1, 1, -1, 1, 1])
    left, right = shown, shown.flip(-1)
    features = torch.where(truth[:, None, None, None] > 0, left, right)
    others = torch.arange(8).expand(8, 8)[~torch.eye(8, dtype=torch.bool)].view(8, 7)
    sides = facing_sides(features, features.flip(-1), others)
    assert (sides * truth).unique().tolist() in ([1], [-1])


def assert_same_points(found, expected, turned):
    """Transforms `(N, N)` of images as they are, against those of images mirrored by hand."""
    grid = make_grid(6, 6).reshape(1, -1, 2) * 0.8
    for i, row in enumerate(turned):
        for j, column in enumerate(turned):
            sign_i, sign_j = (torch.tensor([-1.0 if there else 1.0, 1.0]) for there in (row, column))
            moved = found[i : i + 1, j].apply(grid * sign_j) * sign_i
            torch.testing.assert_close(moved, expected[i : i + 1, j].apply(grid), atol=2e-2, rtol=0)


def test_transforms_are_those_of_mirrored_files(collection, one_way):
    turned = labels(collection)
    found, expected = match_collection(collection), match_collection(one_way)
    assert_same_points(found.transforms, expected.transforms, turned)
    torch.testing.assert_close(found.trust, expected.trust, atol=2e-2, rtol=0)
    opposite = torch.tensor([[a != b for a in turned] for b in turned])
    corners = found.transforms.apply(torch.tensor([[0.0, 0.0], [0.1, 0.0], [0.0, 0.1]]).expand(5, 5, 3, 2))
    right, down = corners[..., 1, :] - corners[..., 0, :], corners[..., 2, :] - corners[..., 0, :]
    reflected = right[..., 0] * down[..., 1] < right[..., 1] * down[..., 0]
    assert torch.equal(reflected, opposite)
    assert_same_points(found.repaired().transforms, expected.repaired().transforms, turned)
    torch.testing.assert_close(found.repaired().trust, expected.repaired().trust, atol=2e-2, rtol=0)

    points = np.array([[40.0, 60.0], [210.0, 120.0]])
    from_one, from_both = turned.index(True), found.transfer_points(points, turned.index(True))
    widths = np.array([image.width for image in collection.images])
    there = points.copy()
    there[:, 0] = widths[from_one] - 1 - there[:, 0]
    by_hand = expected.transfer_points(there, from_one)
    for number, turn in enumerate(turned):
        if turn:
            by_hand[number, :, 0] = widths[number] - 1 - by_hand[number, :, 0]
    np.testing.assert_allclose(from_both, by_hand, atol=4)


def test_masks_are_those_of_mirrored_files(collection, one_way):
    found, expected = collection.segment(), one_way.segment()
    assert found.collection is collection
    assert found.partners == expected.partners
    for number, turn in enumerate(labels(collection)):
        mask = expected.probabilities[number]
        np.testing.assert_allclose(found.probabilities[number], mask[:, ::-1] if turn else mask, atol=0.05)


def test_the_average_faces_one_way(network, collection, one_way):
    """And is another one than with mirrored images as they are."""
    flat = np.ones((len(collection), 8, 8), dtype=np.float32)
    reference = labels(collection).index(False)

    def average(of):
        mean = aligned_average(of.images, flat, reference, **network, collection=of, side=120)
        return np.asarray(mean, dtype=np.float32)

    found, expected = average(collection), average(one_way)
    as_they_are = average(collected(network, collection.images, "none"))
    assert np.abs(found - expected).mean() < 2
    assert np.abs(as_they_are - expected).mean() > 3 * np.abs(found - expected).mean() + 2


def test_matches_of_few_pairs_are_turned_too(collection, one_way):
    found, expected = (match_collection(each, graph="star") for each in (collection, one_way))
    assert torch.equal(torch.isnan(found.affine), torch.isnan(expected.affine))
    mask = np.zeros((20, 30), dtype=np.float32)
    mask[4:15, 3:12] = 1
    center = int((~torch.isnan(found.affine).any(-1)).sum(1).argmax())
    warped = found.transfer_mask(mask, center)
    turned = labels(collection)
    by_hand = expected.transfer_mask(mask[:, ::-1].copy() if turned[center] else mask, center)
    for number, turn in enumerate(turned):
        np.testing.assert_allclose(
            warped[number], by_hand[number][:, ::-1] if turn else by_hand[number], atol=0.3, err_msg=str(number)
        )


def test_the_contact_sheet_and_the_summary_of_mirrored_files(network, photos, tmp_path):
    """Through the command line: an image, its mirror image, and the same cropped."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, image in enumerate((photos[1], ImageOps.mirror(photos[1]), photos[4])):
        image.save(folder / f"{number}.png")
    results = tmp_path / "results"
    words = ["segment", str(folder), "--output-dir", str(results), "--refine", "none"]
    assert main([*words, "--orientations", "mirror"]) == 0
    entries = json.loads((results / "summary.json").read_text())["photos"]
    assert [entry["orientation"] for entry in entries] == ["identity", "mirror", "identity"]
    # Masks lie on the files as they are; on the sheet all face one way.
    masks = [np.asarray(Image.open(results / entry["mask"]), dtype=int) for entry in entries[:2]]
    assert np.abs(masks[0] - masks[1][:, ::-1]).mean() < 5
    assert np.abs(masks[0] - masks[1]).mean() > 15
    sheet = np.asarray(Image.open(results / "overview.png").convert("L"), dtype=int)
    as_they_are = tmp_path / "as-they-are"
    assert main([*words[:2], "--output-dir", str(as_they_are), "--refine", "none"]) == 0
    entries = json.loads((as_they_are / "summary.json").read_text())["photos"]
    assert [entry["orientation"] for entry in entries] == ["identity"] * 3
    other = np.asarray(Image.open(as_they_are / "overview.png").convert("L"), dtype=int)
    assert sheet.shape == other.shape
    third = sheet.shape[1] // 3
    change = [np.abs(sheet - other)[:, k * third : (k + 1) * third].mean() for k in range(3)]
    assert change[1] > 5 * max(change[0], change[2], 0.5)
