"""Pseudo-masks: each step against a slow reference, and the whole on images with an obvious object."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from real_photos import PHOTOS
from small_models import seeded

from macosnet_hf.collection import Collection
from macosnet_hf.errors import DataError
from macosnet_hf.io.checkpoints import load_model_and_processor
from macosnet_hf.training.pseudo_masks import (
    _agreed,
    border_contrast,
    centre_weight,
    discriminants,
    explain_masks,
    pseudo_masks,
    sharpen,
    stretch,
    teacher_masks,
)


def slow_stretch(values: np.ndarray) -> np.ndarray:
    low, high = np.quantile(values, 0.05), np.quantile(values, 0.95)
    return np.clip((values - low) / (high - low + 1e-6), 0, 1)


def test_border_contrast_against_loops():
    features = torch.randn(2, 5, 6, 6, generator=seeded())
    found = border_contrast(features, neighbours=3)
    for n in range(2):
        maps = features[n].double().numpy()
        contrast = np.zeros((6, 6))
        for row in range(6):
            for column in range(6):
                here = maps[:, row, column] / np.linalg.norm(maps[:, row, column])
                similarities = []
                for y in range(6):
                    for x in range(6):
                        if y in (0, 5) or x in (0, 5):
                            there = maps[:, y, x]
                            similarities.append(float(here @ there / np.linalg.norm(there)))
                contrast[row, column] = 1 - np.mean(sorted(similarities)[-3:])
        assert np.allclose(found[n].numpy(), slow_stretch(contrast), atol=1e-4)


def test_centre_weight_is_a_gaussian_in_normalised_coordinates():
    weight = centre_weight(5, 0.6)
    for row in range(5):
        for column in range(5):
            x, y = column / 2 - 1, row / 2 - 1
            assert weight[row, column].item() == pytest.approx(np.exp(-(x * x + y * y) / (2 * 0.36)), rel=1e-5)


def test_what_features_explain_of_masks_is_a_ridge_regression():
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(3, 5, 6, 4, generator=generator)
    masks = torch.rand(3, 6, 4, generator=generator)
    cells = features.double().permute(0, 2, 3, 1).reshape(-1, 5).numpy()
    cells = (cells - cells.mean(0)) / (cells.std(0, ddof=1) + 1e-5)
    cells = np.concatenate((cells, np.ones((len(cells), 1))), axis=1)
    labels = masks.double().reshape(-1).numpy()
    solution = np.linalg.inv(cells.T @ cells + 0.01 * len(cells) * np.eye(6)) @ cells.T @ labels
    fitted = (cells @ solution).reshape(3, -1)
    low, high = np.quantile(fitted, 0.05, axis=1)[:, None], np.quantile(fitted, 0.95, axis=1)[:, None]
    expected = ((fitted - low) / (high - low + 1e-6)).clip(0, 1).reshape(3, 6, 4)
    np.testing.assert_allclose(explain_masks(features, masks).numpy(), expected, atol=1e-4)


def test_stretch_brings_each_map_to_its_own_range():
    maps = torch.randn(3, 7, 7, generator=seeded(1)) * torch.tensor([1.0, 50.0, 1e-3]).view(-1, 1, 1) + 4
    for found, values in zip(stretch(maps), maps, strict=True):
        assert np.allclose(found.numpy(), slow_stretch(values.double().numpy()), atol=2e-3)
    assert torch.equal(stretch(torch.full((1, 4, 4), 2.0)), torch.zeros(1, 4, 4))  # no 0/0


def slow_ridge(features: np.ndarray, labels: np.ndarray, ridge: float) -> np.ndarray:
    """Least squares on rows extended by sqrt(penalty) times the unit matrix: the same minimum, found another way."""
    count, channels = features.shape
    centred = (features - features.mean(0)) / (features.std(0, ddof=1) + 1e-5)
    design = np.concatenate((centred, np.ones((count, 1))), axis=1)
    extended = np.concatenate((design, np.sqrt(ridge * count) * np.eye(channels + 1)))
    solution = np.linalg.lstsq(extended, np.concatenate((labels, np.zeros(channels + 1))), rcond=None)[0]
    return design @ solution


def test_discriminants_against_independent_least_squares():
    features = torch.randn(5, 4, 6, 6, generator=seeded(2)) * torch.tensor([1.0, 3.0, 0.2, 10.0]).view(1, 4, 1, 1) + 1
    masks = torch.rand(5, 6, 6, generator=seeded(3))
    class_ids = torch.tensor([1, 0, 1, 0, 1])
    found = discriminants(features, masks, class_ids, ridge=0.02)
    cells = features.double().permute(0, 2, 3, 1).reshape(5, 36, 4).numpy()
    labels = masks.double().reshape(5, 36).numpy()
    overall = slow_ridge(cells.reshape(-1, 4), labels.reshape(-1), 0.02).reshape(5, 36)
    within = np.zeros((5, 36))
    for class_id in (0, 1):
        rows = [index for index in range(5) if class_ids[index] == class_id]
        fitted = slow_ridge(cells[rows].reshape(-1, 4), labels[rows].reshape(-1), 0.02)
        within[rows] = fitted.reshape(len(rows), 36)
    expected = [(slow_stretch(overall[n]) + slow_stretch(within[n])) / 2 for n in range(5)]
    assert np.allclose(found.flatten(1).numpy(), np.stack(expected), atol=1e-3)


def scene(count: int, side: int, cells: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """uint8 images with a coloured disc before a noisy ground, features that see it through noise, true masks."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side] / (side - 1) * 2 - 1
    images, masks, features = [], [], []
    direction = generator.normal(size=12)
    for index in range(count):
        centre, radius = generator.uniform(-0.25, 0.25, 2), generator.uniform(0.35, 0.55)
        mask = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2
        ground, colour = ((60, 120, 60), (200, 60, 50)) if index % 2 else ((90, 90, 140), (220, 200, 70))
        image = np.where(mask[..., None], colour, ground) + generator.normal(0, 12, (side, side, 3))
        share = mask.reshape(cells, side // cells, cells, side // cells).mean((1, 3))
        base = generator.normal(size=12)
        maps = (
            base[:, None, None] + (direction * 2)[:, None, None] * share + generator.normal(0, 0.5, (12, cells, cells))
        )
        images.append(image.clip(0, 255).astype(np.uint8))
        masks.append(mask)
        features.append(maps)
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return stacked, torch.from_numpy(np.stack(features)).float(), torch.from_numpy(np.stack(masks))


def jaccard(found: torch.Tensor, truth: torch.Tensor) -> list[float]:
    return [((a & b).sum() / (a | b).sum()).item() for a, b in zip(found, truth, strict=True)]


def test_sharpen_follows_the_edges_of_the_image_from_a_coarse_map():
    images, _, truth = scene(3, 128, 8)
    coarse = torch.nn.functional.avg_pool2d(truth[:, None].float(), 16)[:, 0]
    blocks = torch.nn.functional.interpolate(coarse[:, None], size=(128, 128), mode="nearest")[:, 0] > 0.5
    found = sharpen(images, coarse, working_size=128, quiet=True)
    assert found.dtype == torch.bool
    assert found.shape == (3, 128, 128)
    assert min(jaccard(found, truth)) > 0.97
    assert max(jaccard(blocks, truth)) < 0.93  # the map alone could not do it


def test_obvious_objects_are_found_without_labels():
    images, features, truth = scene(6, 128, 8)
    found = pseudo_masks(images, features, ["b", "a"] * 3, quiet=True)
    assert min(jaccard(found, truth)) > 0.9
    again = pseudo_masks(images, features, ["b", "a"] * 3, quiet=True)
    assert torch.equal(found, again)
    # One class of all images, and half-precision features, do as well.
    assert min(jaccard(pseudo_masks(images, features.half(), ["x"] * 6, quiet=True), truth)) > 0.9


def test_masks_survive_their_file(tmp_path):
    from macosnet_hf.training.pseudo_masks import load_masks, save_masks

    masks = torch.rand(3, 21, 21, generator=seeded()) > 0.6
    path = tmp_path / "masks.npz"
    assert load_masks(path, "these") is None
    save_masks(path, masks, "these")
    assert torch.equal(load_masks(path, "these"), masks)
    assert load_masks(path, "other images") is None
    assert [file.name for file in tmp_path.iterdir()] == ["masks.npz"]
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"masks\.npz is damaged"):
        load_masks(path, "these")


# ---------------------------------------------------------------------------------------------------------------------
# Masks of a teacher
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher():
    return load_model_and_processor(device="cpu")


def read(names, side=256):
    images = [Image.open(PHOTOS / name).convert("RGB").resize((side, side)) for name in names]
    return torch.stack([torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) for image in images])


def masks_of(teacher, images, names):
    return teacher_masks([teacher], lambda numbers: images[numbers], names, quiet=True)


def test_teachers_that_disagree_teach_nothing():
    """Of several teachers the mean counts; a mask on which they overlap by less than half, of nearly nothing or of
    nearly everything is empty."""
    draw = torch.Generator().manual_seed(4)
    soft = torch.rand(3, 40, 12, 12, generator=draw)
    blobs = torch.zeros(40, 12, 12)
    for k in range(40):
        blobs[k, : 1 + k % 12, : 2 + k // 4] = 1
    answers = (0.6 * blobs + soft * (torch.arange(40) / 40).view(-1, 1, 1)).clamp(0, 1)
    kept = 0
    for row, mask in enumerate(_agreed(answers)):
        one = [answers[t, row].double().numpy() for t in range(3)]
        every = np.minimum.reduce([m >= 0.5 for m in one]).sum()
        some = max(np.maximum.reduce([m >= 0.5 for m in one]).sum(), 1)
        mean = sum(one) / 3 >= 0.5
        if every / some < 0.5 or not 0.02 <= mean.mean() <= 0.9:
            assert not mask.any()
        else:
            kept += 1
            assert np.array_equal(mask.numpy(), mean)
    assert 5 < kept < 38
    alone = answers[:1]
    assert torch.equal(_agreed(alone), alone[0] >= 0.5)


def test_a_teacher_s_masks_are_those_of_a_collection(teacher):
    model, processor = teacher
    images = read(["cheetah1.jpg", "lion.jpg", "cheetah.jpg"])
    found = masks_of(teacher, images, ["cat", "cat", "cat"])
    assert found.shape == (3, 256, 256)
    assert found.dtype == torch.bool
    collection = Collection(model, processor)
    collection.add([Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images])
    expected = torch.from_numpy(collection.segment(refine="grabcut").probabilities)
    expected = F.interpolate(expected[:, None], size=(256, 256), mode="bilinear", align_corners=False)[:, 0] >= 0.5
    assert torch.equal(found, expected)
    assert (found.float().mean((1, 2)) > 0.02).all()


def test_a_teacher_s_masks_stay_with_their_images_whatever_the_order(teacher):
    images = read(["cheetah1.jpg", "tower.jpg", "lion.jpg", "bus.png"])
    names = ["cat", "thing", "cat", "thing"]
    straight = masks_of(teacher, images, names)
    order = [3, 2, 0, 1]
    shuffled = masks_of(teacher, images[order], [names[number] for number in order])
    assert torch.equal(shuffled, straight[order])


def test_a_teacher_needs_two_images_of_a_class(teacher):
    with pytest.raises(DataError, match=r"'dog' \(1\)"):
        masks_of(teacher, read(["cheetah1.jpg", "lion.jpg", "bus.png"]), ["cat", "cat", "dog"])
