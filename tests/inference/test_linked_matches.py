"""Transforms along a graph: points reach all images, by the transforms of the pairs and chains of them."""

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import random_images, small_model, small_processor

from macosnet_hf.collection import Collection
from macosnet_hf.errors import InputError
from macosnet_hf.geometry import identity_affine
from macosnet_hf.inference.collection_transforms import match_collection
from macosnet_hf.inference.linked_matches import LinkedMatches, link_collection, linked_pairs
from macosnet_hf.modeling_macosnet import MaCoSNetForKeypointMatching


def collected(images, **options):
    collection = Collection(small_model(MaCoSNetForKeypointMatching), small_processor(), **options)
    collection.add(images)
    return collection


@pytest.fixture(scope="module")
def photos():
    values = random_images(12)
    values = (values - values.amin()) / (values.amax() - values.amin()) * 255
    images = [Image.fromarray(value.permute(1, 2, 0).to(torch.uint8).numpy()) for value in values]
    return [image.resize((100 + 5 * number, 90)) for number, image in enumerate(images)]


@pytest.fixture(scope="module")
def collection(photos):
    return collected(photos)


def test_pairs_connect_all_images(collection):
    pairs = linked_pairs(collection, 1)
    assert torch.equal(pairs[0::2], pairs[1::2].flip(1))
    assert len(torch.unique(pairs, dim=0)) == len(pairs) < 2 * 12 * 2
    seen = {0}
    for _ in range(12):
        seen |= {there for here, there in pairs.tolist() if here in seen}
    assert seen == set(range(12))
    nearest = {(number, int(row[0])) for number, row in enumerate(match_nearest(collection))}
    assert nearest <= {tuple(pair) for pair in pairs.tolist()}


def match_nearest(collection):
    pooled = torch.nn.functional.normalize(collection.features(range(12)).last.mean((2, 3)), dim=1)
    return (pooled @ pooled.t()).fill_diagonal_(-2).topk(1).indices


def test_transforms_and_trust_are_those_of_all_pairs(collection):
    every, linked = match_collection(collection), link_collection(collection, degree=3)
    i, j = linked.pairs.t()
    torch.testing.assert_close(linked.transforms.affine, every.affine[i, j], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(linked.transforms.tps, every.tps[i, j], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(linked.trust, every.trust[i, j], rtol=1e-3, atol=1e-5)


def shifts(collection, pairs, places, trust):
    """Matches that shift: image n shows the object at `places[n]`."""
    into, start = torch.tensor(pairs).t()
    affine = identity_affine(len(pairs))
    affine[:, [2, 5]] = places[into] - places[start]
    transforms = collection.model.make_transform(affine, link_collection(collection.subset([0, 1])).transforms.tps[:1])
    identity = torch.tensor([-1, -1, -1, 0, 0, 0, 1, 1, 1, -1, 0, 1, -1, 0, 1, -1, 0, 1.0])
    transforms = collection.model.make_transform(affine, identity.expand(len(pairs), -1))
    return LinkedMatches(torch.tensor(pairs), transforms, torch.tensor(trust), collection)


def test_points_go_along_chains(collection):
    """A chain of twelve images, each with the next one."""
    places = torch.rand(12, 2, generator=torch.Generator().manual_seed(0)) * 0.4
    forth = [(number + 1, number) for number in range(11)]
    pairs = [pair for each in forth for pair in (each, each[::-1])]
    matches = shifts(collection, pairs, places, [0.7] * 22)
    for image in (0, 5):
        found = matches.transforms_from(image).apply(torch.tensor([[[0.1, -0.2]]]).expand(12, -1, -1))[:, 0]
        expected = torch.tensor([0.1, -0.2]) + places - places[image]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_the_trusted_way_is_taken_and_neighbours_outvote_a_wrong_one(collection):
    """0 - 1 - 2 - 3 is right; 0 - 3 is wrong and hardly trusted. 4 hangs on 1, 2 and 3."""
    places = torch.zeros(12, 2)
    edges = [(0, 1), (1, 2), (2, 3), (0, 3), (1, 4), (2, 4), (3, 4), *((4, number) for number in range(5, 12))]
    pairs = [pair for each in edges for pair in (each, each[::-1])]
    trust = [0.05 if set(pair) == {0, 3} else 0.8 for pair in pairs]
    matches = shifts(collection, pairs, places, trust)
    wrong = [number for number, pair in enumerate(pairs) if pair in ((3, 0), (4, 2))]
    matches.transforms.affine[wrong, 2] += 0.5
    centre = torch.zeros(12, 1, 2)
    found = matches.transforms_from(0).apply(centre)[:, 0]
    assert found.abs().max() < 0.02


def test_points_in_pixels_are_those_of_the_transforms(collection, photos):
    matches = link_collection(collection, degree=2)
    found = matches.transfer_points([(30, 40), (60.5, 20)], 3, local_matching=False)
    assert found.shape == (12, 2, 2)
    np.testing.assert_array_equal(found[3], [(30, 40), (60.5, 20)])
    i, j = matches.pairs.t()
    every = match_collection(collection)
    direct = every.transfer_points([(30, 40), (60.5, 20)], 3, local_matching=False)
    near = [int(number) for number in i[j == 3]]
    assert np.median(np.abs(found[near] - direct[near])) < np.median(np.abs(direct - direct.mean(0)))
    local = matches.transfer_points([(30, 40)], 3, local_matching=True)
    assert np.isfinite(local).all()
    assert not np.allclose(local, found[:, :1])


def test_images_that_face_the_other_way(photos):
    images = [*photos[:4], *(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in photos[:4])]
    turned = collected(images, orientations="mirror")
    flat = collected(turned.oriented().images)
    if not turned.orientations.any():
        pytest.skip("the untrained network tells no sides apart")
    points = np.array([(30.0, 40.0)])
    found = link_collection(turned).transfer_points(points, 0, local_matching=False)[:, 0]
    widths = np.array([image.width for image in images])
    mirrored = turned.orientations.numpy() > 0
    start = points.copy()
    if mirrored[0]:
        start[:, 0] = widths[0] - 1 - start[:, 0]
    expected = link_collection(flat).transfer_points(start, 0, local_matching=False)[:, 0]
    expected[mirrored, 0] = widths[mirrored] - 1 - expected[mirrored, 0]
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_bad_input(collection):
    with pytest.raises(InputError, match="two or more"):
        link_collection(collection.subset([0]))
    with pytest.raises(InputError, match="degree must be at least 1"):
        link_collection(collection, degree=0)
    matches = link_collection(collection, degree=1)
    with pytest.raises(InputError, match="no image number 12"):
        matches.transfer_points([(1, 1)], 12)
    with pytest.raises(InputError):
        matches.transfer_points([(1, float("nan"))], 0)
