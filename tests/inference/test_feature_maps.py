"""Maps of features for drawings: similarity to a point, and parts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from real_photos import LION
from small_models import seeded

from macosnet_hf.errors import InputError
from macosnet_hf.images import as_upright_rgb
from macosnet_hf.inference.feature_maps import part_colors, similarity_map
from macosnet_hf.inference.pair import match_images


@pytest.fixture(scope="module")
def twins(network):
    """A photo and its copy at another size and aspect: what is equal in both is known."""
    from PIL import Image

    with Image.open(LION) as photo:
        lion = as_upright_rgb(photo)
    return match_images((lion, lion.resize((300, 200))), refine="none", **network)


@pytest.mark.parametrize("direction", ["source_to_target", "target_to_source"])
def test_a_point_is_most_similar_to_its_own_place(twins, direction):
    here, there = (twins.source, twins.target)[:: 1 if direction == "source_to_target" else -1]
    for x, y in ((0.3, 0.4), (0.6, 0.7)):
        point = (x * here.width - 0.5, y * here.height - 0.5)
        found = similarity_map(twins, point, direction, side=100)
        assert found.shape == tuple(round(length * 100 / max(there.size)) for length in there.size[::-1])
        assert -1.01 <= found.min() < found.max() <= 1.01
        row, column = np.unravel_index(found.argmax(), found.shape)
        assert abs((column + 0.5) / found.shape[1] - x) < 0.08  # about a cell
        assert abs((row + 0.5) / found.shape[0] - y) < 0.08


def test_an_unknown_direction(twins):
    with pytest.raises(InputError, match="direction"):
        similarity_map(twins, (1, 1), "sideways")


def test_equal_places_have_equal_colors(twins):
    source, target = part_colors(twins, side=60)
    assert source.shape[2] == target.shape[2] == 3
    assert max(source.shape) == max(target.shape) == 60
    assert source.min() >= 0
    assert source.max() <= 1
    assert source.std(axis=(0, 1)).min() > 0.05, "three different components"
    rows, columns = np.linspace(0.1, 0.9, 9), np.linspace(0.1, 0.9, 9)
    sampled = [
        each[(rows * each.shape[0]).astype(int)][:, (columns * each.shape[1]).astype(int)] for each in (source, target)
    ]
    assert np.abs(sampled[0] - sampled[1]).mean() < 0.1
    assert np.abs(sampled[0] - sampled[1][::-1]).mean() > 0.1


def test_what_tells_two_objects_apart_is_no_part(twins):
    """All features of one image are moved into one direction."""
    outputs = twins._found.outputs
    moved = outputs.features.clone()
    moved[0, 1] += 0.5 * torch.nn.functional.normalize(torch.randn(moved.shape[2], 1, 1, generator=seeded()), dim=0)
    other = replace(twins, _found=replace(twins._found, outputs=type(outputs)(**{**outputs, "features": moved})))
    for colors, expected in zip(part_colors(other, side=60), part_colors(twins, side=60), strict=True):
        np.testing.assert_allclose(colors, expected, atol=1e-3)


def test_parts_of_no_object_are_those_of_the_images(twins):
    empty = replace(twins, soft_masks=np.zeros_like(twins.soft_masks))
    for colors in part_colors(empty, side=20):
        assert np.isfinite(colors).all()
        assert colors.std() > 0.05
