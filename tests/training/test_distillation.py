"""Local matching as a teacher: the right direction, trust where it is earned, gradients that lead there."""

import pytest
import torch
import torch.nn.functional as F
from small_models import small_config, transforms_of

from macosnet_hf.geometry import identity_affine, identity_tps
from macosnet_hf.modeling_macosnet import MaCoSNetModelOutput, ordered_pairs
from macosnet_hf.training.distillation import local_matching_loss, local_matching_targets

SIDE = 15


def shifted_views(shifts: list[tuple[int, int]], seed: int = 0) -> torch.Tensor:
    """Features `(1, V, C, h, w)` of views that see the same random world, each moved by whole cells (x, y)."""
    world = torch.randn(1, 24, 40, 40, generator=torch.Generator().manual_seed(seed))
    world = F.normalize(F.avg_pool2d(world, 3, stride=1, padding=1), dim=1)
    views = [world[:, :, 12 + y : 12 + y + SIDE, 12 + x : 12 + x + SIDE] for x, y in shifts]
    return torch.stack(views, dim=1)


def targets_of(outputs: MaCoSNetModelOutput, points: torch.Tensor, **options):
    return local_matching_targets(outputs, transforms_of(outputs), small_config(), points, **options)


def outputs_of(features: torch.Tensor, masks: torch.Tensor | None = None) -> MaCoSNetModelOutput:
    pairs = len(ordered_pairs(features.shape[1]))
    return MaCoSNetModelOutput(
        affine=identity_affine(1, pairs).clone().requires_grad_(),
        tps=identity_tps(1, pairs).clone().requires_grad_(),
        features=features,
        mask_logits=masks,
    )


SHIFTS = [(0, 0), (2, -1), (-1, 1)]


def test_targets_are_where_the_other_view_shows_the_same():
    outputs = outputs_of(shifted_views(SHIFTS))
    middle = torch.tensor([[0.0, 0.0], [0.25, -0.25], [-0.3, 0.2]])
    found, trust = targets_of(outputs, middle)
    cell = 2 / (SIDE - 1)
    for p, (i, j) in enumerate(ordered_pairs(3)):
        # A place x of view j is place x + shift_j of the world, and so x + shift_j - shift_i of view i.
        move = torch.tensor([SHIFTS[j][axis] - SHIFTS[i][axis] for axis in (0, 1)]) * cell
        expected = middle + move
        before = move.norm()
        assert (found[0, p] - expected).norm(dim=-1).max() < 0.35 * before, (i, j)
        assert trust[0, p].min() > 0.5
    assert not found.requires_grad


def test_trust_needs_the_way_back_and_both_objects():
    features = shifted_views([(0, 0), (1, 0)])
    noise = F.normalize(torch.randn(features.shape, generator=torch.Generator().manual_seed(5)), dim=2)
    unrelated = torch.stack((features[:, 0], noise[:, 1]), dim=1)
    points = torch.rand(40, 2, generator=torch.Generator().manual_seed(1)) - 0.5
    related_trust = targets_of(outputs_of(features), points)[1].mean()
    unrelated_trust = targets_of(outputs_of(unrelated), points)[1].mean()
    assert unrelated_trust < 0.9 * related_trust

    left = torch.full((1, 2, 30, 30), 8.0)
    left[..., 15:] = -8.0  # both objects are in the left half
    halves = outputs_of(features, left)
    trust = targets_of(halves, points)[1]
    assert trust[0, 0][points[:, 0] > 0.1].max() < 0.05
    assert trust[0, 0][points[:, 0] < -0.3].min() > 0.5
    plain = targets_of(halves, points, guided=False)[1]
    torch.testing.assert_close(plain, targets_of(outputs_of(features), points)[1])
    assert plain[0, 0][points[:, 0] > 0.1].min() > 0.5
    only_one = left.clone()
    only_one[:, 1] = -only_one[:, 1]  # the objects are in different halves: nothing is on both
    assert targets_of(outputs_of(features, only_one), points)[1].max() < 0.3


@pytest.mark.parametrize("part", ["affine", "tps"])
def test_following_the_gradient_finds_the_shift(part):
    outputs = outputs_of(shifted_views([(0, 0), (2, -1)]))
    parameter = getattr(outputs, part)
    optimizer = torch.optim.Adam([parameter], lr=0.02)
    first = None
    for _ in range(40):
        optimizer.zero_grad()
        loss = local_matching_loss(outputs, transforms_of(outputs), small_config(), side=5)
        first = first if first is not None else loss.item()
        loss.backward()
        optimizer.step()
    cell = 2 / (SIDE - 1)
    # T_01 takes points of view 1 to view 0: two cells to the right, one up.
    if part == "affine":
        moved = parameter.detach()[0, 0, [2, 5]]
    else:
        moved = (parameter - identity_tps(1, 2)).detach()[0, 0].view(2, 9).mean(dim=1)
    assert moved.tolist() == pytest.approx([2 * cell, -cell], abs=0.6 * cell)
    assert loss.item() < first
