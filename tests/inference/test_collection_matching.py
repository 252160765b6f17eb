"""Transforms of a whole collection: the same as pair by pair, one encoder pass an image, bad ones outvoted."""

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import IMAGE_SIZE, small_model

from macosnet_hf import MaCoSNetImageProcessor
from macosnet_hf.collection import Collection
from macosnet_hf.errors import InputError
from macosnet_hf.geometry import apply_affine, apply_cascade, identity_tps, make_grid
from macosnet_hf.inference.collection_transforms import (
    GRAPHS,
    CollectionMatches,
    _with_trust,
    geometric_median,
    match_collection,
    pair_graph,
)
from macosnet_hf.modeling_macosnet import MaCoSNetForKeypointMatching

SIZES = [(60, 40), (50, 70), (64, 64), (90, 45), (40, 40)]


@pytest.fixture(scope="module")
def network():
    model = small_model(MaCoSNetForKeypointMatching)
    return model, MaCoSNetImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})


@pytest.fixture(scope="module")
def photos():
    random = np.random.default_rng(0)
    return [
        Image.fromarray(random.integers(0, 255, (6, 8, 3)).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
        for size in SIZES
    ]


@pytest.fixture(scope="module")
def collection(network, photos):
    collection = Collection(*network)
    collection.add(photos)
    return collection


def passes(network, work):
    """Encoder passes in a call."""
    counted = []
    hook = network[0].macosnet.encoder.register_forward_hook(lambda _, inputs, __: counted.append(len(inputs[0])))
    try:
        work()
    finally:
        hook.remove()
    return sum(counted)


@pytest.mark.parametrize("cascade", ["features", "exact"])
def test_every_transform_is_that_of_the_pair_by_itself(network, photos, collection, cascade):
    model, processor = network
    found = match_collection(collection, cascade=cascade)
    model.config.cascade = cascade
    for i, j in ((0, 1), (1, 0), (3, 2)):
        with torch.inference_mode():
            outputs = model(processor([[photos[i], photos[j]]], return_tensors="pt")["pixel_values"])
        torch.testing.assert_close(found.affine[i, j], outputs.affine[0, 0], atol=1e-4, rtol=0)
        torch.testing.assert_close(found.tps[i, j], outputs.tps[0, 0], atol=1e-4, rtol=0)
    torch.testing.assert_close(found.affine[2, 2], torch.tensor([1.0, 0, 0, 0, 1, 0]))
    model.config.cascade = "exact"


def test_encoder_passes(network, photos):
    collection = Collection(*network)
    assert passes(network, lambda: collection.add(photos)) == len(photos)
    assert passes(network, lambda: match_collection(collection)) == 0
    assert passes(network, collection.segment) == 0
    assert passes(network, lambda: match_collection(collection, cascade="exact")) == len(photos) * (len(photos) - 1)
    # A copy of what is there already costs nothing, a new image one pass.
    assert passes(network, lambda: collection.add([photos[1].copy(), photos[0].rotate(90)])) == 1
    assert len(collection) == len(photos) + 2
    assert collection.keys[1] == collection.keys[len(photos)]


def test_adding_later_gives_what_adding_at_once_gives(network, photos):
    later = Collection(*network)
    later.add(photos[:2])
    later.segment()
    assert later.add(photos[2:]) == [2, 3, 4]
    once = Collection(*network)
    once.add(photos)
    np.testing.assert_array_equal(later.segment().probabilities, once.segment().probabilities)
    torch.testing.assert_close(match_collection(later).tps, match_collection(once).tps, rtol=0, atol=0)


def test_the_order_of_the_images_changes_nothing(network, photos):
    more = [*photos, photos[0].rotate(90), photos[1].rotate(180)]  # enough for what masks have in common
    order = [4, 0, 6, 3, 1, 2, 5]
    straight, shuffled = Collection(*network), Collection(*network)
    straight.add(more)
    shuffled.add([more[number] for number in order])
    np.testing.assert_array_equal(shuffled.segment().probabilities, straight.segment().probabilities[order])
    first, second = match_collection(straight), match_collection(shuffled)
    torch.testing.assert_close(second.affine, first.affine[order][:, order], atol=1e-5, rtol=0)
    torch.testing.assert_close(second.trust, first.trust[order][:, order], atol=1e-4, rtol=0)


def test_points_are_transferred_as_with_the_pair_by_itself(network, photos, collection):
    model, processor = network
    matches = match_collection(collection)
    points = [[3.0, 5.0], [40.0, 20.0]]
    model.config.cascade = "features"
    for local in (False, True):
        found = matches.transfer_points(points, 0, local_matching=local)
        assert found.shape == (len(photos), 2, 2)
        np.testing.assert_allclose(found[0], points, atol=1e-5)
        for other in (1, 3):
            with torch.inference_mode():
                outputs = model(processor([[photos[0], photos[other]]], return_tensors="pt")["pixel_values"])
            sizes = torch.tensor([[[photo.height, photo.width] for photo in (photos[0], photos[other])]])
            expected = model.transfer_points(outputs, torch.tensor([points]), sizes, local_matching=local)
            np.testing.assert_allclose(found[other], expected[0].numpy(), atol=0.02)
    model.config.cascade = "exact"


def test_a_mask_is_transferred_with_its_points(collection):
    matches = match_collection(collection)
    side = 33
    mask = np.zeros((side, side), dtype=np.float32)
    mask[10:25, 5:20] = 1
    warped = matches.transfer_mask(mask, 1)
    np.testing.assert_allclose(warped[1], mask, atol=1e-5)
    # Slowly: the value at a place of image 3 is the mask's where T_13 sends that place.
    grid = make_grid(side, side, side=240).reshape(1, -1, 2)
    places = apply_cascade(grid, matches.affine[1:2, 3], matches.tps[1:2, 3])[0].numpy()
    columns, rows = (np.rint(((places[:, axis] * 239 / 240 + 1) * side - 1) / 2).astype(int) for axis in (0, 1))
    inner = (np.abs(places) < 0.98).all(1)
    nearest = mask[rows.clip(0, side - 1), columns.clip(0, side - 1)]
    assert np.mean(np.abs(warped[3].reshape(-1) - nearest)[inner] < 0.51) > 0.99


def test_graphs(collection):
    count = len(collection)
    sizes = {}
    for graph in GRAPHS:
        pairs = pair_graph(collection, graph, degree=1).tolist()
        assert len({tuple(pair) for pair in pairs}) == len(pairs)
        assert all(i != j for i, j in pairs)
        assert [pair[::-1] for pair in pairs[::2]] == pairs[1::2]  # each beside its reverse
        sizes[graph] = len(pairs)
    assert sizes["all"] == count * (count - 1)
    assert sizes["star"] == 2 * (count - 1)
    assert count <= sizes["neighbours"] <= 2 * count
    hubs = [set(pair) for pair in pair_graph(collection, "star").tolist()]
    assert len(set.intersection(*hubs)) == 1
    star = match_collection(collection, graph="star")
    assert torch.isnan(star.affine).any()
    assert (star.trust[torch.isnan(star.affine[..., 0])] == 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# Repair
# ---------------------------------------------------------------------------------------------------------------------


def consistent(collection, generator):
    """Transforms that all agree: image i shows a common scene under an affine map of its own."""
    count = len(collection)
    linear = torch.eye(2) + 0.15 * torch.randn(count, 2, 2, generator=generator)
    shift = 0.1 * torch.randn(count, 2, 1, generator=generator)
    affine = torch.empty(count, count, 6)
    for i in range(count):
        for j in range(count):
            matrix = linear[i] @ torch.linalg.inv(linear[j])
            affine[i, j] = torch.cat((matrix, shift[i] - matrix @ shift[j]), dim=1).flatten()
    return affine, identity_tps(count, count)


def matches_of(collection, affine, tps):
    judged = _with_trust(collection, affine, tps)
    count = len(affine)
    # Features of noise say nothing; let the error on the way back alone decide.
    trust = torch.exp(-0.5 * (judged.error / 0.2) ** 2).nan_to_num(0)
    return CollectionMatches(affine, tps, torch.ones(count, count), judged.error, trust, collection)


def test_a_bad_transform_is_outvoted_and_a_missing_one_found(collection):
    affine, tps = consistent(collection, torch.Generator().manual_seed(0))
    truth = affine.clone()
    affine[0, 1] = torch.tensor([-0.4, 0.9, 0.5, 0.8, 0.3, -0.6])
    affine[2, 3], affine[3, 2] = float("nan"), float("nan")
    tps[2, 3], tps[3, 2] = float("nan"), float("nan")
    repaired = matches_of(collection, affine, tps).repaired()
    grid = make_grid(5, 5).reshape(1, -1, 2)
    for i, j in ((0, 1), (2, 3), (3, 2), (4, 0), (1, 2)):
        expected = apply_affine(grid, truth[i, j][None])
        found = apply_cascade(grid, repaired.affine[i, j][None], repaired.tps[i, j][None])
        assert (found - expected).abs().max() < (0.02 if (i, j) == (0, 1) else 0.005), (i, j)
    assert (repaired.error < 0.05).all()


def test_thegeometric_median_is_where_the_sum_of_distances_is_smallest():
    generator = torch.Generator().manual_seed(1)
    places, weights = torch.randn(3, 7, 4, 2, generator=generator), torch.rand(3, 7, generator=generator)
    found = geometric_median(places, weights, steps=200)

    def cost(at):
        return (weights[:, :, None] * (places - at.unsqueeze(1)).norm(dim=-1)).sum(1)

    best = cost(found)
    for _ in range(50):
        assert (cost(found + 0.05 * torch.randn(found.shape, generator=generator)) > best - 1e-4).all()


def test_bad_input(network, photos, collection):
    few = Collection(*network)
    few.add(photos[:1])
    for work in (few.segment, lambda: match_collection(few)):
        with pytest.raises(InputError, match="two or more"):
            work()
    for options in ({"graph": "circle"}, {"cascade": "magic"}, {"graph": "neighbours", "degree": 0}):
        with pytest.raises(InputError):
            match_collection(collection, **options)
    matches = match_collection(collection, graph="star")
    for points in ([[1.0]], [["a", "b"]], [[float("nan"), 1.0]], 5):
        with pytest.raises(InputError, match="Points"):
            matches.transfer_points(points, 0)
    for number in (-1, len(photos)):
        with pytest.raises(InputError, match="no image"):
            matches.transfer_points([[1.0, 1.0]], number)
        with pytest.raises(InputError, match="no image"):
            matches.transfer_mask(np.ones((4, 4)), number)
    with pytest.raises(InputError, match="shape"):
        matches.transfer_mask(np.ones((4, 4, 3)), 0)
