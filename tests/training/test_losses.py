"""The five losses and their sum: against plain loops in float64, by hand, and by where their gradients go."""

import copy
import itertools
import math

import pytest
import torch
from small_models import GRID_SIZE, IMAGE_SIZE, random_images, small_model, transforms_of
from torch import nn

from macosnet_hf import geometry
from macosnet_hf.errors import CheckpointError, InputError
from macosnet_hf.modeling_macosnet import MaCoSNetModel, MaCoSNetModelOutput, ordered_pairs
from macosnet_hf.training import losses
from macosnet_hf.training.losses import MaCoSNetLossWeights, MaCoSNetObjective, PerceptualNetwork

BATCH, SIDE, PIXELS, CHANNELS = 2, 5, 20, 7


def random_outputs(views: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64) -> MaCoSNetModelOutput:
    """What a model might say, with no symmetry at all between views, directions, x and y."""
    generator = torch.Generator().manual_seed(seed)
    pairs = views * (views - 1)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    correlation = randn(BATCH, pairs, SIDE**2, SIDE, SIDE).clamp(min=0)
    return MaCoSNetModelOutput(
        affine=(geometry.identity_affine(BATCH, pairs) + 0.25 * randn(BATCH, pairs, 6)).to(dtype),
        tps=(geometry.identity_tps(BATCH, pairs) + 0.12 * randn(BATCH, pairs, 18)).to(dtype),
        correlation=(correlation / correlation.norm(dim=2, keepdim=True)).to(dtype),
        mask_logits=(2 * randn(BATCH, pairs, PIXELS, PIXELS)).to(dtype),
        features=torch.nn.functional.normalize(randn(BATCH, views, CHANNELS, SIDE, SIDE), dim=2).to(dtype),
    )


def identity_outputs(views: int = 2, masks: torch.Tensor | None = None) -> MaCoSNetModelOutput:
    pairs = views * (views - 1)
    return MaCoSNetModelOutput(
        affine=geometry.identity_affine(1, pairs),
        tps=geometry.identity_tps(1, pairs),
        correlation=torch.eye(SIDE**2).reshape(1, 1, SIDE**2, SIDE, SIDE).expand(-1, pairs, -1, -1, -1),
        mask_logits=torch.zeros(1, pairs, PIXELS, PIXELS) if masks is None else masks,
        features=torch.ones(1, views, CHANNELS, SIDE, SIDE),
    )


# --- slow references: numbers and loops only (the transforms themselves are tested in test_geometry) ---


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def carry(outputs, b, p, point, stage="cascade", regularization=0.0):
    """A point of view j to view i by T_ij."""
    mapped = geometry.apply_cascade(
        torch.tensor([[point]], dtype=torch.float64),
        outputs.affine[b, p][None],
        outputs.tps[b, p][None] if stage == "cascade" else None,
        regularization=regularization,
    )
    return tuple(mapped[0, 0].tolist())


def centre(index: int, count: int) -> float:
    return -1 + 2 * index / (count - 1)


def pair_index(views: int) -> dict[tuple[int, int], int]:
    return {pair: p for p, pair in enumerate(ordered_pairs(views))}


def reference_indicator(cell, row: float, column: float, height: int, width: int, radius: float) -> float:
    """The identity inlier mask of a cell, sampled bilinearly at a place in cells; nothing lies outside the grid."""
    value = 0.0
    top, left = math.floor(row), math.floor(column)
    for r, row_weight in ((top, 1 - (row - top)), (top + 1, row - top)):
        for c, column_weight in ((left, 1 - (column - left)), (left + 1, column - left)):
            near = math.hypot(r - cell[0], c - cell[1]) <= radius + 1e-9
            if 0 <= r < height and 0 <= c < width and near:
                value += row_weight * column_weight
    return value


def reference_grid_mask(logits, row: int, column: int) -> float:
    """Mean of the mask over the pixels of one cell."""
    block = PIXELS // SIDE
    pixels = itertools.product(range(row * block, (row + 1) * block), range(column * block, (column + 1) * block))
    return sum(sigmoid(float(logits[y, x])) for y, x in pixels) / block**2


def reference_matching(outputs, views, b, guided, stages, radius, regularization=0.0):
    index = pair_index(views)
    total = 0.0
    for (i, j), p in index.items():
        for stage in stages:
            for row, column in itertools.product(range(SIDE), range(SIDE)):
                target = (centre(column, SIDE), centre(row, SIDE))
                x, y = carry(outputs, b, p, target, stage, regularization)
                place = ((y + 1) / 2 * (SIDE - 1), (x + 1) / 2 * (SIDE - 1))
                score = 0.0
                for cell in itertools.product(range(SIDE), range(SIDE)):
                    inlier = reference_indicator(cell, *place, SIDE, SIDE, radius)
                    score += inlier * float(outputs.correlation[b, p, cell[0] * SIDE + cell[1], row, column])
                # The mask of the view in whose layout the score lies: view j, given its partner i.
                weight = reference_grid_mask(outputs.mask_logits[b, index[j, i]], row, column) if guided else 1.0
                total -= weight * score / len(stages)
    return total / (len(index) / 2)


def reference_round_trip(outputs, b, hops, scale, squared, points, regularization=0.0):
    """Mean over a grid of how far the chain of ordered-pair indices leads a point from home."""
    total = 0.0
    for row, column in itertools.product(range(points), range(points)):
        start = (centre(column, points), centre(row, points))
        point = start
        for p in hops:
            point = carry(outputs, b, p, point, regularization=regularization)
        distance = math.hypot((point[0] - start[0]) * scale[0], (point[1] - start[1]) * scale[1])
        total += distance**2 if squared else distance
    return total / points**2


def reference_consistency(outputs, views, b, regularization=0.0):
    index = pair_index(views)
    total = 0.0
    for (i, j), p in index.items():
        source = [[sigmoid(float(v)) for v in row] for row in outputs.mask_logits[b, p]]
        target = outputs.mask_logits[b, index[j, i]]
        entropy, count = 0.0, 0
        for row, column in itertools.product(range(PIXELS), range(PIXELS)):
            x, y = carry(outputs, b, p, (centre(column, PIXELS), centre(row, PIXELS)), regularization=regularization)
            if abs(x) > 1 or abs(y) > 1:
                continue
            label = 0.0
            place_row, place_column = (y + 1) / 2 * (PIXELS - 1), (x + 1) / 2 * (PIXELS - 1)
            top, left = math.floor(place_row), math.floor(place_column)
            for r, row_weight in ((top, 1 - (place_row - top)), (top + 1, place_row - top)):
                for c, column_weight in ((left, 1 - (place_column - left)), (left + 1, place_column - left)):
                    if r < PIXELS and c < PIXELS:
                        label += row_weight * column_weight * source[r][c]
            prediction = sigmoid(float(target[row, column]))
            entropy -= label * math.log(prediction) + (1 - label) * math.log(1 - prediction)
            count += 1
        total += entropy / max(count, 1)
    return total / (len(index) / 2)


def reference_contrast(objects, backgrounds, views, margin, scale):
    """`objects[p]`, `backgrounds[p]`: vectors as lists of numbers, for one sample."""

    def distance(u, v):
        return sum((a - b) ** 2 for a, b in zip(u, v, strict=True)) / scale

    index = pair_index(views)
    terms = []
    for (i, j), p in index.items():
        if i < j:
            r = index[j, i]
            within = (distance(objects[p], backgrounds[p]) + distance(objects[r], backgrounds[r])) / 2
            terms.append(distance(objects[p], objects[r]) + max(0.0, margin - within))
    return sum(terms) / len(terms)


def reference_pooled(outputs, views, b, mean, std):
    """Foreground and background unit vectors of every ordered pair, for one sample."""
    objects, backgrounds = [], []
    for p, (i, _) in enumerate(ordered_pairs(views)):
        for result, foreground in ((objects, True), (backgrounds, False)):
            vector, area = [0.0] * CHANNELS, 0.0
            for row, column in itertools.product(range(SIDE), range(SIDE)):
                weight = reference_grid_mask(outputs.mask_logits[b, p], row, column)
                weight = weight if foreground else 1 - weight
                area += weight
                for c in range(CHANNELS):
                    vector[c] += weight * (float(outputs.features[b, i, c, row, column]) - mean[c]) / std[c]
            vector = [value / area for value in vector]
            length = math.sqrt(sum(value**2 for value in vector))
            result.append([value / length for value in vector])
    return objects, backgrounds


def channel_statistics(features):
    """Mean and standard deviation per channel over batch, views and positions, by loops."""
    mean, std = [], []
    for c in range(features.shape[2]):
        values = [float(v) for v in features[:, :, c].flatten()]
        mean.append(sum(values) / len(values))
        std.append(math.sqrt(sum((v - mean[-1]) ** 2 for v in values) / len(values)))
    return mean, std


# --- foreground-guided matching, eq. 2 to 4 ---


@pytest.mark.parametrize("radius", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("size", [(4, 6), (5, 3)])
def test_inlier_mask_matches_the_loop_reference(size, radius):
    outputs = random_outputs()
    height, width = size
    mask = losses.inlier_mask(transforms_of(outputs, 0.1)[:, 0], size, radius)
    assert mask.shape == (BATCH, height * width, height, width)
    for b in range(BATCH):
        for row, column in itertools.product(range(height), range(width)):
            point = (centre(column, width), centre(row, height))
            x, y = carry(outputs, b, 0, point, regularization=0.1)
            place = ((y + 1) / 2 * (height - 1), (x + 1) / 2 * (width - 1))
            for cell in itertools.product(range(height), range(width)):
                expected = reference_indicator(cell, *place, height, width, radius)
                assert mask[b, cell[0] * width + cell[1], row, column].item() == pytest.approx(expected, abs=1e-9)


def test_inlier_mask_of_the_identity_is_the_paper_s_step():
    mask = losses.inlier_mask(transforms_of(identity_outputs())[:, 0], 5)
    for (r, c), (row, column) in itertools.product(itertools.product(range(5), range(5)), repeat=2):
        inlier = abs(r - row) + abs(c - column) <= 1  # within one cell: itself and its four neighbours
        assert mask[0, r * 5 + c, row, column].item() == pytest.approx(float(inlier), abs=1e-5)


def test_radius_of_the_square_root_of_two_counts_the_diagonal():
    identity = geometry.Transform(geometry.identity_affine(1))
    assert losses.inlier_mask(identity, 5, 1.0)[0, :, 2, 2].sum() == pytest.approx(5, abs=1e-4)
    assert losses.inlier_mask(identity, 5, math.sqrt(2))[0, :, 2, 2].sum() == pytest.approx(9, abs=1e-4)


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("stages", [("affine", "cascade"), ("cascade",)])
def test_matching_loss_matches_the_loop_reference(views, guided, stages):
    outputs = random_outputs(views)
    result = losses.matching_loss(
        outputs, transforms_of(outputs, 0.2), mask_guided=guided, stages=stages, reduction="none"
    )
    expected = [reference_matching(outputs, views, b, guided, stages, 1.0, 0.2) for b in range(BATCH)]
    assert result.tolist() == pytest.approx(expected, rel=1e-9)
    mean = losses.matching_loss(outputs, transforms_of(outputs, 0.2), mask_guided=guided, stages=stages)
    assert mean.item() == pytest.approx(sum(expected) / BATCH, rel=1e-9)


def test_matching_loss_of_a_perfect_match_is_minus_the_foreground_area():
    # Every position matches itself with a score of 1, under the identity: each counts once, in both directions.
    masks = torch.full((1, 2, PIXELS, PIXELS), -50.0)
    masks[0, 0, : PIXELS // SIDE * 2] = 50.0  # two rows of cells in A
    masks[0, 1, :, : PIXELS // SIDE] = 50.0  # one column of cells in B
    outputs = identity_outputs(masks=masks)
    assert losses.matching_loss(outputs, transforms_of(outputs)).item() == pytest.approx(-(2 * SIDE + SIDE), rel=1e-5)
    assert losses.matching_loss(outputs, transforms_of(outputs), mask_guided=False).item() == pytest.approx(
        -2 * SIDE**2, rel=1e-5
    )


def test_matching_loss_prefers_the_true_transform():
    # B shows A one cell further left, so a point of B lies in A one cell further right.
    shift = 2 / (SIDE - 1)
    outputs = identity_outputs()
    scores = torch.zeros(SIDE, SIDE, SIDE, SIDE)
    for row, column in itertools.product(range(SIDE), range(SIDE - 1)):
        scores[row, column + 1, row, column] = 1.0
    forward = scores.reshape(SIDE**2, SIDE, SIDE)
    backward = scores.permute(2, 3, 0, 1).reshape(SIDE**2, SIDE, SIDE)
    outputs.correlation = torch.stack((forward, backward))[None]
    found = {}
    for step in (-2, -1, 0, 1, 2):
        outputs.affine = geometry.identity_affine(1, 2)
        outputs.affine[0, :, 2] = torch.tensor([step * shift, -step * shift])
        found[step] = losses.matching_loss(outputs, transforms_of(outputs), mask_guided=False, radius=0.5).item()
    assert found[1] == pytest.approx(-2 * SIDE * (SIDE - 1), rel=1e-5)
    assert all(found[step] == pytest.approx(0, abs=1e-4) for step in (-2, -1, 0, 2))


# --- cycle and transitivity, eq. 5 and 6 ---


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize(("unit", "scale"), [("pixel", (29.5, 19.5)), ("normalized", (1.0, 1.0))])
def test_cycle_loss_matches_the_loop_reference(views, squared, unit, scale):
    outputs = random_outputs(views)
    result = losses.cycle_loss(
        transforms_of(outputs, 0.2), grid_size=4, unit=unit, image_size=(40, 60), squared=squared, reduction="none"
    )
    for b in range(BATCH):
        index = pair_index(views)
        errors = [
            reference_round_trip(outputs, b, (p, index[j, i]), scale, squared, 4, 0.2) for (i, j), p in index.items()
        ]
        assert result[b].item() == pytest.approx(sum(errors) / (len(errors) / 2), rel=1e-9)


@pytest.mark.parametrize("squared", [False, True])
def test_transitivity_loss_matches_the_loop_reference(squared):
    outputs = random_outputs(3)
    result = losses.transitivity_loss(
        transforms_of(outputs, 0.2), grid_size=3, image_size=240, squared=squared, reduction="none"
    )
    index = pair_index(3)
    for b in range(BATCH):
        errors = []
        for a in range(3):
            for way in (1, 2):  # the two ways round
                second, third = (a + way) % 3, (a + 2 * way) % 3
                hops = (index[second, a], index[third, second], index[a, third])
                errors.append(reference_round_trip(outputs, b, hops, (119.5, 119.5), squared, 3, 0.2))
        assert len(errors) == 6
        assert result[b].item() == pytest.approx(sum(errors) / 6, rel=1e-9)


def test_a_round_trip_off_by_a_known_distance():
    outputs = identity_outputs()
    outputs.affine[0, 0, 2] = 0.06  # T_AB moves by (0.06, 0.08), T_BA stays: every trip ends 0.1 from home
    outputs.affine[0, 0, 5] = 0.08
    assert losses.cycle_loss(transforms_of(outputs), unit="normalized").item() == pytest.approx(0.2, rel=1e-5)
    assert losses.cycle_loss(transforms_of(outputs)).item() == pytest.approx(0.2 * 119.5, rel=1e-5)
    assert losses.cycle_loss(transforms_of(outputs), squared=True).item() == pytest.approx(
        2 * (0.1 * 119.5) ** 2, rel=1e-5
    )


def test_inverse_transforms_cost_nothing_and_give_no_nan_gradient():
    affine = geometry.identity_affine(1) + 0.2 * torch.randn(1, 6, generator=torch.Generator().manual_seed(3))
    outputs = identity_outputs()
    outputs.affine = torch.stack((affine, geometry.invert_affine(affine)), dim=1)
    assert losses.cycle_loss(transforms_of(outputs)).item() == pytest.approx(0, abs=1e-3)
    exact = identity_outputs(3)  # exactly zero distance, where a square root has no gradient
    exact.affine.requires_grad_()
    (losses.cycle_loss(transforms_of(exact)) + losses.transitivity_loss(transforms_of(exact))).backward()
    assert torch.isfinite(exact.affine.grad).all()


def test_consistent_triplets_cost_nothing():
    generator = torch.Generator().manual_seed(4)
    # Each view's own map to a common frame makes all six transforms consistent: T_ij = F_i^-1 F_j.
    frames = geometry.identity_affine(3) + 0.2 * torch.randn(3, 6, generator=generator)
    affine = [geometry.compose_affine(geometry.invert_affine(frames[i]), frames[j]) for i, j in ordered_pairs(3)]
    outputs = identity_outputs(3)
    outputs.affine = torch.stack(affine)[None]
    assert losses.transitivity_loss(transforms_of(outputs)).item() == pytest.approx(0, abs=1e-3)
    outputs.affine = outputs.affine.clone()
    outputs.affine[0, 4, 2] += 0.1  # T_12 takes part in three of the six orders
    assert losses.transitivity_loss(transforms_of(outputs)).item() > 1


def test_transitivity_needs_three_images():
    with pytest.raises(InputError, match="three images"):
        losses.transitivity_loss(transforms_of(random_outputs(2)))


# --- perceptual contrastive loss, eq. 7 to 10 ---


class SmallPerceptual(nn.Module):
    """Stands where ResNet-50 stands, small enough for loops; counts its calls."""

    def __init__(self, features: int = 5):
        super().__init__()
        self.conv = nn.Conv2d(3, features, 3, stride=2)
        self.norm = nn.BatchNorm2d(features)
        self.calls = 0

    def forward(self, pixel_values):
        self.calls += 1
        return 3 * torch.tanh(self.norm(self.conv(pixel_values))).mean(dim=(-2, -1))


def small_perceptual(dtype=torch.float64) -> SmallPerceptual:
    torch.manual_seed(11)
    return SmallPerceptual().to(dtype).eval().requires_grad_(False)


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("margin", [2.0, 0.05])
def test_contrastive_loss_of_pixels_matches_the_loop_reference(views, margin):
    outputs, network = random_outputs(views), small_perceptual()
    generator = torch.Generator().manual_seed(12)
    images = torch.randn(BATCH, views, 3, PIXELS, PIXELS, generator=generator, dtype=torch.float64)
    result = losses.contrastive_loss(outputs, images, network, form="pixels", margin=margin, reduction="none")
    assert network.calls == 1  # all masked images of the step in one batch
    for b in range(BATCH):
        objects, backgrounds = [], []
        for p, (i, _) in enumerate(ordered_pairs(views)):
            inside, rest = images[b, i].clone(), images[b, i].clone()
            for y, x in itertools.product(range(PIXELS), range(PIXELS)):
                mask = sigmoid(float(outputs.mask_logits[b, p, y, x]))
                inside[:, y, x] *= mask
                rest[:, y, x] *= 1 - mask
            objects.append(network(inside[None])[0].tolist())
            backgrounds.append(network(rest[None])[0].tolist())
        expected = reference_contrast(objects, backgrounds, views, margin, scale=5)
        assert result[b].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("given", ["batch", "data set"])
def test_contrastive_loss_of_features_matches_the_loop_reference(views, given):
    outputs = random_outputs(views)
    mean, std = channel_statistics(outputs.features)
    statistics = None
    if given == "data set":
        mean, std = [value + 0.1 for value in mean], [value * 1.7 for value in std]
        statistics = (torch.tensor(mean), torch.tensor(std))
    result = losses.contrastive_loss(outputs, statistics=statistics, reduction="none")
    for b in range(BATCH):
        objects, backgrounds = reference_pooled(outputs, views, b, mean, std)
        expected = reference_contrast(objects, backgrounds, views, 2.0, scale=1)
        assert result[b].item() == pytest.approx(expected, rel=1e-5)


def test_the_margin_is_a_cut_off():
    """Equal objects, backgrounds as far from them as asked: d+ = 0 and d- = 0 (eq. 10)."""
    features = torch.zeros(1, 2, 2, SIDE, SIDE)
    features[:, :, 0, :, :2], features[:, :, 1, :, 2:] = 1.0, 1.0  # left: first channel, right: second
    masks = torch.full((1, 2, PIXELS, PIXELS), -40.0)
    masks[..., : 2 * PIXELS // SIDE] = 40.0
    unit = (torch.zeros(2), torch.ones(2))  # leave the features as they are: foreground (1, 0), background (0, 1)
    outputs = identity_outputs(masks=masks)
    outputs.features = features
    assert losses.contrastive_loss(outputs, statistics=unit, margin=2.0).item() == pytest.approx(0, abs=1e-4)
    assert losses.contrastive_loss(outputs, statistics=unit, margin=3.0).item() == pytest.approx(1, abs=1e-4)
    # The other object in B: now the objects are 2 apart, which is what independent unit vectors are.
    outputs.mask_logits = torch.stack((masks[0, 0], -masks[0, 0]))[None]
    assert losses.contrastive_loss(outputs, statistics=unit, margin=2.0).item() == pytest.approx(2, abs=1e-4)


def test_features_of_another_network_can_take_the_place_of_the_model_s_own():
    outputs, other = random_outputs(), random_outputs(seed=9)
    replaced = copy.copy(outputs)
    replaced.features = other.features
    result = losses.contrastive_loss(outputs, features=other.features)
    torch.testing.assert_close(result, losses.contrastive_loss(replaced))
    assert result != losses.contrastive_loss(outputs)


def test_features_judge_the_masks_and_are_not_trained_by_them():
    """As F in the paper: else the encoder could make all objects equal instead of finding them."""
    outputs = random_outputs()
    outputs.features.requires_grad_()
    outputs.mask_logits.requires_grad_()
    losses.contrastive_loss(outputs).backward()
    assert outputs.features.grad is None
    assert outputs.mask_logits.grad.abs().max() > 0


# --- cross-network consistency, eq. 11 and 12 ---


@pytest.mark.parametrize("views", [2, 3])
def test_consistency_loss_matches_the_loop_reference(views):
    outputs = random_outputs(views)
    result = losses.consistency_loss(outputs, transforms_of(outputs, 0.2), reduction="none")
    for b in range(BATCH):
        assert result[b].item() == pytest.approx(reference_consistency(outputs, views, b, 0.2), rel=1e-9)


def test_consistency_of_equal_masks_under_the_identity():
    masks = torch.full((1, 2, PIXELS, PIXELS), -40.0)
    masks[:, :, 3:9, 4:15] = 40.0
    assert losses.consistency_loss(
        identity_outputs(masks=masks), transforms_of(identity_outputs(masks=masks))
    ).item() == pytest.approx(0, abs=1e-3)
    assert losses.consistency_loss(identity_outputs(), transforms_of(identity_outputs())).item() == pytest.approx(
        2 * math.log(2), rel=1e-5
    )
    masks[0, 1] = -masks[0, 1]
    assert losses.consistency_loss(
        identity_outputs(masks=masks), transforms_of(identity_outputs(masks=masks))
    ).item() == pytest.approx(80, rel=1e-3)


def test_consistency_follows_the_transform_s_direction():
    """A's object lies four pixels right of B's; T_AB carries B's points to A, so it moves right."""
    masks = torch.full((1, 2, PIXELS, PIXELS), -30.0)
    masks[0, 0, 5:9, 8:12] = 30.0
    masks[0, 1, 5:9, 4:8] = 30.0
    shift = 4 * 2 / (PIXELS - 1)
    right, wrong = identity_outputs(masks=masks), identity_outputs(masks=masks)
    right.affine[0, :, 2] = torch.tensor([shift, -shift])
    wrong.affine[0, :, 2] = torch.tensor([-shift, shift])
    assert losses.consistency_loss(right, transforms_of(right)).item() == pytest.approx(0, abs=1e-3)
    assert losses.consistency_loss(wrong, transforms_of(wrong)).item() > 1


def test_an_image_warped_away_altogether_counts_nothing():
    outputs = identity_outputs(masks=torch.randn(1, 2, PIXELS, PIXELS))
    outputs.affine[0, :, 2] = 9.0
    outputs.affine.requires_grad_()
    loss = losses.consistency_loss(outputs, transforms_of(outputs))
    loss.backward()
    assert loss.item() == 0
    assert torch.isfinite(outputs.affine.grad).all()


# --- what every loss must stand: gradients to the right places, extremes, half precision ---

ALL_LOSSES = {
    "matching": lambda o, x: losses.matching_loss(o, transforms_of(o)),
    "matching, not guided": lambda o, x: losses.matching_loss(o, transforms_of(o), mask_guided=False),
    "matching, masks detached": lambda o, x: losses.matching_loss(o, transforms_of(o), detach_masks=True),
    "cycle": lambda o, x: losses.cycle_loss(transforms_of(o)),
    "transitivity": lambda o, x: losses.transitivity_loss(transforms_of(o)),
    "contrast, features": losses.contrastive_loss,
    "contrast, pixels": lambda o, x: losses.contrastive_loss(
        o, x, small_perceptual(torch.float32), form="pixels", margin=50.0
    ),
    "consistency": lambda o, x: losses.consistency_loss(o, transforms_of(o)),
}
TRAINED = {
    "matching": {"E", "affine", "tps", "D"},
    "matching, not guided": {"E", "affine", "tps"},
    "matching, masks detached": {"E", "affine", "tps"},
    "cycle": {"E", "affine", "tps"},
    "transitivity": {"E", "affine", "tps"},
    "contrast, features": {"E", "D"},
    "contrast, pixels": {"E", "D"},
    "consistency": {"E", "affine", "tps", "D"},
}


def call(name: str, outputs: MaCoSNetModelOutput, images: torch.Tensor) -> torch.Tensor:
    return ALL_LOSSES[name](outputs, images)


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("name", ALL_LOSSES)
def test_gradient_reaches_the_sub_networks_of_its_equation_and_no_others(name, views):
    if name == "transitivity" and views == 2:
        views = 3
    model = small_model(MaCoSNetModel)
    images = random_images(1, views)
    call(name, model(images), images).backward()
    parts = {"E": model.encoder, "affine": model.affine_head, "tps": model.tps_head, "D": model.decoder}
    reached = set()
    for part, module in parts.items():
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        if any(gradient.abs().max() > 0 for gradient in gradients):
            reached.add(part)
    assert reached == TRAINED[name]


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_descending_the_gradient_lowers_the_loss(name):
    model = small_model(MaCoSNetModel)
    images = random_images(2, 3)
    parameters = list(model.parameters())
    loss = call(name, model(images), images)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    squared_norm = sum(gradient.square().sum() for gradient in gradients if gradient is not None)
    # Small enough a step that the loss is a line, large enough to stand clear of rounding.
    step = 1e-3 * loss.detach().abs() / squared_norm
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter -= step * gradient
        after = call(name, model(images), images)
    assert after < loss


def alternating(logits: torch.Tensor) -> torch.Tensor:
    """Of every pair, one mask empty and the other full."""
    return torch.where(torch.arange(logits.shape[1])[None, :, None, None] % 2 == 0, -1e4, 1e4).expand_as(logits)


EXTREMES = {
    "masks empty": lambda o: {"mask_logits": torch.full_like(o.mask_logits, -1e4)},
    "masks full": lambda o: {"mask_logits": torch.full_like(o.mask_logits, 1e4)},
    "masks nearly empty": lambda o: {"mask_logits": torch.full_like(o.mask_logits, -12.0)},
    "one mask empty, one full": lambda o: {"mask_logits": alternating(o.mask_logits)},
    "identity": lambda o: {
        "affine": geometry.identity_affine(*o.affine.shape[:2]),
        "tps": geometry.identity_tps(*o.tps.shape[:2]),
    },
    "collapsed to a point": lambda o: {"affine": torch.zeros_like(o.affine), "tps": torch.zeros_like(o.tps)},
    "folded": lambda o: {"tps": o.tps + 2 * torch.randn_like(o.tps)},
    "far outside": lambda o: {"affine": o.affine + 1e3},
    "no match anywhere": lambda o: {"correlation": torch.zeros_like(o.correlation)},
    "features constant": lambda o: {"features": torch.ones_like(o.features)},
}


@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("name", ALL_LOSSES)
def test_values_and_gradients_are_finite_at_the_extremes(name, extreme):
    torch.manual_seed(21)
    outputs = random_outputs(3, dtype=torch.float32)
    for field, value in EXTREMES[extreme](outputs).items():
        outputs[field] = value
    if extreme == "folded":
        share = geometry.folded(transforms_of(outputs).flatten(0, 1))
        assert share.max() > 0.1
    for field in ("affine", "tps", "correlation", "mask_logits"):
        outputs[field] = outputs[field].clone().requires_grad_()
    loss = call(name, outputs, torch.randn(BATCH, 3, 3, PIXELS, PIXELS))
    assert torch.isfinite(loss)
    loss.backward()
    for field in ("affine", "tps", "correlation", "mask_logits"):
        gradient = outputs[field].grad
        assert gradient is None or torch.isfinite(gradient).all(), field


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_half_precision_outputs_are_raised_to_float32(name):
    outputs = random_outputs(3, dtype=torch.float32)
    half = MaCoSNetModelOutput(**{key: value.bfloat16() for key, value in outputs.items()})
    for key in ("affine", "tps"):  # the model gives transforms in float32 whatever its precision
        half[key] = outputs[key]
    images = torch.randn(BATCH, 3, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(2))
    result = call(name, half, images)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, call(name, outputs, images), rtol=0.02, atol=0.02)


def test_a_missing_field_or_an_unknown_option_is_named():
    outputs = random_outputs()
    without_masks = MaCoSNetModelOutput(**{**outputs, "mask_logits": None})
    for name in ("matching", "contrast, features", "consistency"):
        with pytest.raises(InputError, match="output_masks=False"):
            call(name, without_masks, None)
    assert torch.isfinite(losses.matching_loss(without_masks, transforms_of(without_masks), mask_guided=False))
    for arguments in ({"stages": ()}, {"stages": ("tps",)}, {"reduction": "sum"}):
        with pytest.raises(InputError, match="must"):
            losses.matching_loss(outputs, transforms_of(outputs), **arguments)
    with pytest.raises(InputError, match="unit must"):
        losses.cycle_loss(transforms_of(outputs), unit="metres")
    with pytest.raises(InputError, match="form must"):
        losses.contrastive_loss(outputs, form="words")
    with pytest.raises(InputError, match="perceptual network"):
        losses.contrastive_loss(outputs, form="pixels")
    with pytest.raises(InputError, match="fit together"):
        losses.contrastive_loss(outputs, torch.zeros(BATCH, 2, 3, 8, 8), small_perceptual(), form="pixels")
    with pytest.raises(InputError, match="fit together"):
        losses.contrastive_loss(outputs, features=torch.zeros(BATCH, 3, CHANNELS, SIDE, SIDE))
    with pytest.raises(InputError, match="these hold 4"):
        losses.cycle_loss(geometry.Transform(torch.zeros(1, 4, 6), torch.zeros(1, 4, 18), 0.0))


# --- the perceptual network F ---


def test_perceptual_network_is_frozen_but_lets_gradients_through():
    network = PerceptualNetwork("resnet18")
    network.train()
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    images = torch.randn(2, 3, 64, 64, requires_grad=True)
    vectors = network(images)
    assert vectors.shape == (2, network.num_features) == (2, 512)
    vectors.square().sum().backward()
    assert images.grad.abs().max() > 0


def test_perceptual_network_defaults_to_resnet50():
    with torch.device("meta"):
        assert PerceptualNetwork().num_features == 2048


def test_perceptual_network_normalises_anew():
    torch.manual_seed(0)
    network = PerceptualNetwork("resnet18")
    other = PerceptualNetwork("resnet18", image_mean=(0.5, 0.4, 0.3), image_std=(0.5, 0.25, 0.125))
    other.network.load_state_dict(network.network.state_dict())
    image = torch.rand(1, 3, 64, 64)

    def normalise(mean, std):
        return (image - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    expected = network(normalise(losses.IMAGENET_MEAN, losses.IMAGENET_STD))
    torch.testing.assert_close(other(normalise((0.5, 0.4, 0.3), (0.5, 0.25, 0.125))), expected, rtol=1e-4, atol=1e-5)


def test_perceptual_network_loads_a_classifier_s_weights_and_refuses_others():
    import timm

    torch.manual_seed(1)
    classifier = timm.create_model("resnet18", pretrained=False).eval()
    network = PerceptualNetwork("resnet18").load_imagenet_weights(classifier.state_dict())
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(network(image), classifier.forward_head(classifier.forward_features(image), True))
    before = copy.deepcopy(network.state_dict())
    state = dict(classifier.state_dict())
    del state["conv1.weight"]
    bad_shape = {**classifier.state_dict(), "bn1.weight": torch.zeros(3)}
    for wrong in (state, {}, bad_shape, {**classifier.state_dict(), "layer9.weight": torch.zeros(1)}):
        with pytest.raises(CheckpointError, match="do not fit resnet18"):
            network.load_imagenet_weights(wrong)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    with pytest.raises(InputError, match="no architecture"):
        PerceptualNetwork("resnet_that_is_not")


# --- the objective, eq. 1 ---


def test_weights_of_the_benchmarks_are_the_paper_s():
    expected = {
        "tss": (5, 5, 10, 10),
        "internet": (5, 5, 20, 10),
        "pf-pascal": (20, 10, 2.5, 2.5),
        "pf-willow": (20, 10, 2.5, 2.5),
        "spair-71k": (20, 20, 1, 1),
    }
    for name, (cycle, trans, contrast, task) in expected.items():
        assert MaCoSNetLossWeights.from_benchmark(name.upper()) == MaCoSNetLossWeights(
            matching=1, cycle=cycle, trans=trans, contrast=contrast, task=task, margin=2
        )
    assert MaCoSNetLossWeights.from_benchmark("tss", trans=0, unit="normalized").trans == 0
    with pytest.raises(InputError, match="pf-pascal"):
        MaCoSNetLossWeights.from_benchmark("coco")


@pytest.mark.parametrize(
    "wrong", [{"cycle": -1}, {"task": math.nan}, {"margin": math.inf}, {"contrastive_form": "x"}, {"unit": "x"}]
)
def test_impossible_weights_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        MaCoSNetLossWeights(**wrong)


@pytest.mark.parametrize("form", ["features", "pixels"])
@pytest.mark.parametrize("unit", ["pixel", "normalized"])
def test_objective_is_the_weighted_sum(form, unit):
    weights = MaCoSNetLossWeights(0.5, 2, 3, 5, 7, margin=1.5, contrastive_form=form, unit=unit, inlier_radius=1.5)
    network = small_perceptual(torch.float32)
    objective = MaCoSNetObjective(weights, network)
    outputs = random_outputs(3, dtype=torch.float32)
    images = torch.randn(BATCH, 3, 3, PIXELS, PIXELS)
    result = objective(outputs, transforms_of(outputs, 0.1), images)
    expected = {
        "matching": losses.matching_loss(outputs, transforms_of(outputs, 0.1), radius=1.5),
        "cycle": losses.cycle_loss(transforms_of(outputs, 0.1), unit=unit, image_size=PIXELS),
        "transitivity": losses.transitivity_loss(transforms_of(outputs, 0.1), unit=unit, image_size=PIXELS),
        "contrast": losses.contrastive_loss(outputs, images, network, form=form, margin=1.5),
        "consistency": losses.consistency_loss(outputs, transforms_of(outputs, 0.1)),
    }
    assert set(result) == {"total", *expected}
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value)
    total = sum(factor * value for factor, value in zip((0.5, 2, 3, 5, 7), expected.values(), strict=True))
    torch.testing.assert_close(result["total"], total)


def test_terms_of_weight_zero_are_not_computed():
    outputs = random_outputs(dtype=torch.float32)
    network = small_perceptual(torch.float32)
    weights = MaCoSNetLossWeights(matching=0, cycle=1, contrastive_form="pixels")
    # Pairs and no masks: the transitivity, contrast and consistency terms would fail if they were computed.
    outputs.mask_logits = outputs.correlation = None
    images = torch.zeros(BATCH, 2, 3, 240, 240)
    result = MaCoSNetObjective(weights, network)(outputs, transforms_of(outputs), images)
    assert set(result) == {"total", "cycle"}
    assert network.calls == 0
    torch.testing.assert_close(result["total"], losses.cycle_loss(transforms_of(outputs)))
    with pytest.raises(InputError, match="weight zero"):
        MaCoSNetObjective(MaCoSNetLossWeights(matching=0))(outputs, transforms_of(outputs))


def test_separate_streams_share_nothing():
    weights = MaCoSNetLossWeights.from_benchmark("tss", trans=0)
    model, images = small_model(MaCoSNetModel), random_images(1, 2)
    outputs = model(images)
    result = MaCoSNetObjective(weights, coupled=False)(outputs, model.transforms(outputs), images)
    assert set(result) == {"total", "matching", "cycle", "contrast"}
    torch.testing.assert_close(
        result["matching"], losses.matching_loss(outputs, transforms_of(outputs), mask_guided=False)
    )
    (result["matching"] + result["cycle"]).backward()
    assert all(parameter.grad is None for parameter in model.decoder.parameters())


def test_detached_masks_are_not_trained_by_the_matching_term():
    model, images = small_model(MaCoSNetModel), random_images(1, 2)
    objective, outputs = MaCoSNetObjective(MaCoSNetLossWeights(), detach_masks=True), model(images)
    objective(outputs, model.transforms(outputs), images)["total"].backward()
    assert all(parameter.grad is None for parameter in model.decoder.parameters())


def test_pairs_cannot_be_transitive_and_pixels_need_a_network():
    with pytest.raises(InputError, match="three images"):
        MaCoSNetObjective(MaCoSNetLossWeights.from_benchmark("tss"))(random_outputs(), transforms_of(random_outputs()))
    with pytest.raises(InputError, match="perceptual network"):
        MaCoSNetObjective(MaCoSNetLossWeights(contrast=1, contrastive_form="pixels"))


def test_objective_freezes_the_perceptual_network_and_keeps_it_out_of_the_model():
    model, network = small_model(MaCoSNetModel), SmallPerceptual()
    names = set(model.state_dict())
    objective = MaCoSNetObjective(MaCoSNetLossWeights(contrast=1, contrastive_form="pixels"), network).train()
    before = copy.deepcopy(network.state_dict())
    images = random_images(2, 2)
    model.train()
    outputs = model(images)
    objective(outputs, model.transforms(outputs), images)["total"].backward()
    assert not network.training
    assert not network.norm.training
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert set(model.state_dict()) == names
    assert not any(parameter.requires_grad for parameter in objective.parameters())


def test_a_few_steps_of_training_lower_the_objective():
    model = small_model(MaCoSNetModel)
    images = random_images(2, 3)
    assert images.shape[-1] == IMAGE_SIZE == 16 * GRID_SIZE
    objective = MaCoSNetObjective(MaCoSNetLossWeights.from_benchmark("pf-pascal", unit="normalized"))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    totals = []
    for _ in range(5):
        outputs = model(images)
        total = objective(outputs, model.transforms(outputs), images)["total"]
        totals.append(total.item())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert totals[-1] < totals[0]


# --- images that face another way ---


def reflects(transforms):
    """Whether transforms turn a small triangle in the middle over."""
    corners = torch.tensor([[0.0, 0.0], [1e-4, 0.0], [0.0, 1e-4]], dtype=torch.float64)
    here, across, along = transforms.apply(corners.expand(*transforms.shape, 3, 2)).unbind(-2)
    right, down = across - here, along - here
    return right[..., 0] * down[..., 1] < right[..., 1] * down[..., 0]


def reflected(outputs, turned):
    """The same outputs with some views mirrored: `x = R x'` of each, transforms composed, maps moved cell by cell."""
    views = len(turned)
    transforms, found = transforms_of(outputs), copy.deepcopy(outputs)
    affine, tps = outputs.affine.clone(), outputs.tps.clone()
    for p, (i, j) in enumerate(ordered_pairs(views)):
        moved = transforms[:, p]
        moved = moved.compose_symmetry("mirror", "source") if turned[i] else moved
        moved = moved.compose_symmetry("mirror", "target") if turned[j] else moved
        affine[:, p], tps[:, p] = moved.affine, moved.tps
        for row, column in itertools.product(range(SIDE), range(SIDE)):
            there = SIDE - 1 - column if turned[j] else column
            for r, c in itertools.product(range(SIDE), range(SIDE)):
                cell = r * SIDE + (SIDE - 1 - c if turned[i] else c)
                found.correlation[:, p, r * SIDE + c, row, column] = outputs.correlation[:, p, cell, row, there]
        for column in range(PIXELS):
            there = PIXELS - 1 - column if turned[i] else column
            found.mask_logits[:, p, :, column] = outputs.mask_logits[:, p, :, there]
    for view, column in itertools.product(range(views), range(SIDE)):
        there = SIDE - 1 - column if turned[view] else column
        found.features[:, view, ..., column] = outputs.features[:, view, ..., there]
    found.affine, found.tps = affine, tps
    return found


@pytest.mark.parametrize("turned", [(False, True), (True, False, False), (False, True, True), (True, False, True)])
def test_no_loss_depends_on_which_way_an_image_faces(turned):
    """So mirroring an image before the network trains with the reflected transform of the image as it is, exactly."""
    views = len(turned)
    outputs = random_outputs(views, seed=8)
    mirrored = reflected(outputs, turned)
    opposite = torch.tensor([turned[i] != turned[j] for i, j in ordered_pairs(views)])
    before, after = (reflects(transforms_of(each)) for each in (outputs, mirrored))
    assert torch.equal(after, before ^ opposite)
    weights = MaCoSNetLossWeights(cycle=3, trans=2 if views == 3 else 0, contrast=1, task=4)
    expected, found = (
        MaCoSNetObjective(weights)(each, transforms_of(each), torch.zeros(BATCH, views, 3, PIXELS, PIXELS))
        for each in (outputs, mirrored)
    )
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-9), name
    scale = ((PIXELS - 1) / 2,) * 2
    matching = [reference_matching(mirrored, views, b, True, losses.STAGES, 1.0) for b in range(BATCH)]
    consistency = [reference_consistency(mirrored, views, b) for b in range(BATCH)]
    hops = [(p, p ^ 1) for p in range(views * (views - 1))]
    cycle = [
        2 * sum(reference_round_trip(mirrored, b, each, scale, False, 10) for each in hops) / len(hops)
        for b in range(BATCH)
    ]
    for name, values in (("matching", matching), ("consistency", consistency), ("cycle", cycle)):
        assert expected[name].item() == pytest.approx(sum(values) / BATCH, rel=1e-6), name


def test_a_consistent_triplet_stays_consistent_when_mirrored():
    """Affine maps that agree cost nothing, through a reflected transform too."""
    absolute = [
        geometry.identity_affine(1) + torch.tensor(change, dtype=torch.float64)
        for change in ([0.0] * 6, [0.1, -0.2, 0.1, 0.05, 0.2, -0.1], [-0.1, 0.1, 0.2, -0.1, 0.1, 0.05])
    ]
    outputs = identity_outputs(3)
    pairs = [geometry.compose_affine(absolute[i], geometry.invert_affine(absolute[j])) for i, j in ordered_pairs(3)]
    affine, tps = torch.stack(pairs, dim=1), outputs.tps.double()
    consistent = geometry.Transform(affine, tps, 0.0)
    signs = torch.tensor([[1, -1][turned] for turned in (False, True, False)], dtype=torch.float64)
    matrices = torch.stack([torch.diag(torch.tensor([sign, 1.0], dtype=torch.float64)) for sign in signs.tolist()])
    source, target = ([pair[end] for pair in ordered_pairs(3)] for end in (0, 1))
    through = consistent.compose_symmetry(matrices[source], "source").compose_symmetry(matrices[target], "target")
    assert reflects(through).tolist() == [[True, True, False, False, True, True]]
    for loss in (losses.cycle_loss, losses.transitivity_loss):
        assert loss(through).item() == pytest.approx(0, abs=1e-9)
        half = consistent.compose_symmetry(matrices[source], "source")  # forgotten on one side
        assert loss(half).item() > 1
