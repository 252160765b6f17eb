"""Training with a regularised spline: two steps of each stage, and what is watched, against splines solved anew.

The reference shares no geometry with the package: Bookstein's system is solved for every call, in float64, and points,
distances and images go through it by plain tensor code.
"""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from small_models import IMAGE_SIZE, seeded, small_model
from torch import Tensor

from macosnet_hf.matching import correlate, l2_normalize
from macosnet_hf.modeling_macosnet import MaCoSNetModel, MaCoSNetModelOutput, ordered_pairs
from macosnet_hf.training.losses import MaCoSNetLossWeights, MaCoSNetObjective
from macosnet_hf.training.pretraining import SyntheticObjective
from macosnet_hf.training.synthetic import WarpRange, make_pairs

for package in ("accelerate", "yaml"):
    pytest.importorskip(package, reason=f"{package} is not installed (extra `train`)")

from macosnet_hf.training.joint import JointObjective  # noqa: E402
from macosnet_hf.training.validation import label_free_validation  # noqa: E402

REGULARIZATION = 0.2
STATISTICS = ([0.5] * 3, [0.25] * 3)
RATE = 1e-3
# What a forgotten factor changes at least, relatively; the comparisons' tolerance is a fiftieth of it.
FORGOTTEN = 1e-2

# --- the reference ---


def spline(points: Tensor, tps: Tensor, regularization: float) -> Tensor:
    """Points `(..., N, 2)` through splines `(..., 18)`; float64."""
    points, tps = points.double(), tps.double()
    centres = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=2)), dtype=torch.float64)

    def rows(places: Tensor) -> Tensor:
        square = (places.unsqueeze(-2) - centres).square().sum(-1)
        radial = square * square.clamp(min=1e-300).log()
        return torch.cat((radial, torch.ones_like(places[..., :1]), places), dim=-1)

    system = torch.zeros(12, 12, dtype=torch.float64)
    system[:9] = rows(centres)
    system[9:, :9] = rows(centres)[:, 9:].T
    system[:9, :9] += regularization * torch.eye(9)
    moved = F.pad(tps.unflatten(-1, (2, 9)), (0, 3)).transpose(-1, -2)
    return rows(points) @ torch.linalg.solve(system, moved)


def carry(points: Tensor, affine: Tensor, tps: Tensor | None, regularization: float) -> Tensor:
    points = points.double() if tps is None else spline(points, tps, regularization)
    matrix = affine.double().unflatten(-1, (2, 3))
    moved = (matrix[..., None, :, :2] * points.unsqueeze(-2)).sum(-1)
    return moved + matrix[..., None, :, 2]


def regular(side: int) -> Tensor:
    """`(side**2, 2)`, row by row."""
    axis = torch.linspace(-1, 1, side, dtype=torch.float64)
    return torch.stack((axis.repeat(side), axis.repeat_interleave(side)), dim=-1)


def sampled(images: Tensor, places: Tensor) -> Tensor:
    """`(N, C, H, W)` at `(N, side**2, 2)`: `(N, C, side, side)`."""
    side = round(places.shape[1] ** 0.5)
    return F.grid_sample(images.double(), places.unflatten(1, (side, side)), align_corners=True)


def distance(found: Tensor, expected: Tensor, weight: Tensor) -> Tensor:
    return (((found - expected).square().sum(-1) + 1e-4).sqrt() * weight).sum() / weight.sum().clamp(min=1)


def close(found: Tensor, expected: Tensor, tolerance: float = 2e-4) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance * 1e-2)


def warping_model() -> MaCoSNetModel:
    """With a regularised spline that moves its control points far enough for the factor to matter."""
    model = small_model(MaCoSNetModel, tps_regularization=REGULARIZATION)
    with torch.no_grad():
        model.tps_head.linear.weight.mul_(4)
    return model


def two_steps(model: MaCoSNetModel, loss) -> list[Tensor]:
    """Losses of two steps of gradient descent, which train the model."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    found = []
    for step in range(2):
        optimizer.zero_grad()
        total = loss(step)
        total.backward()
        optimizer.step()
        found.append(total.detach())
    return found


def compare(models: list[MaCoSNetModel], start: MaCoSNetModel) -> None:
    """The first model's weights have changed as the second's did, and not as the third's."""
    for part in ("affine_head", "tps_head", "decoder"):
        before = torch.cat([p.flatten() for p in start.get_submodule(part).parameters()])
        ours, theirs, wrong = (
            torch.cat([p.flatten() for p in model.get_submodule(part).parameters()]) - before for model in models
        )
        assert (ours - theirs).norm() <= 2e-3 * theirs.norm(), part
        if part == "tps_head":
            assert (wrong - theirs).norm() > 5 * FORGOTTEN * theirs.norm()


# --- the first stage ---


def synthetic_reference(objective: SyntheticObjective, images: Tensor, seed: int, regularization: float) -> Tensor:
    model = objective.model
    with torch.no_grad():
        pairs = make_pairs(images.float() / 255, IMAGE_SIZE, objective.limits, seeded(seed))
        pixels = (torch.cat((pairs.source, pairs.target)) - 0.5) / 0.25
        features = model.encoder(pixels).last
        grid = regular(12).expand(len(images), -1, -1)
        # The true warp interpolates its control points, whatever the model's splines do.
        in_source = carry(grid, pairs.transform.affine, pairs.transform.tps, 0.0)
        start, goal = torch.cat((grid, in_source)), torch.cat((in_source, grid))
        visible = (in_source.abs() <= 1).all(-1).double()
        weight = torch.cat((0.3 + 0.7 * visible, visible))
        source = l2_normalize(features)
        target = torch.cat((source[len(images) :], source[: len(images)]))
    affine = model.affine_head(correlate(source, target))
    with torch.no_grad():
        places = carry(regular(features.shape[-1]).expand(len(affine), -1, -1), affine, None, 0.0)
        warped = l2_normalize(sampled(features, places).float())
    tps = model.tps_head(correlate(warped, target))
    first = distance(carry(start, affine, None, 0.0), goal, weight)
    return first + distance(carry(start, affine.detach(), tps, regularization), goal, weight)


def test_two_steps_of_the_first_stage():
    images = (torch.rand(3, 3, 9, 9, generator=seeded(2)) * 255).to(torch.uint8)
    images = F.interpolate(images.float(), size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic").clamp(0, 255).to(torch.uint8)
    start = warping_model()
    models = [copy.deepcopy(start) for _ in range(3)]
    options = {"feature_noise": 0.0, "exact_share": 0.0}
    objectives = [SyntheticObjective(model, *STATISTICS, WarpRange(), **options).train() for model in models]
    found = two_steps(models[0], lambda step: objectives[0](images, seeded(step))["total"])
    expected, unregularised = (
        two_steps(objective.model, lambda step, o=objective, r=factor: synthetic_reference(o, images, step, r))
        for objective, factor in zip(objectives[1:], (REGULARIZATION, 0.0), strict=True)
    )
    for ours, theirs, wrong in zip(found, expected, unregularised, strict=True):
        close(ours, theirs)
        assert abs(wrong - theirs) > FORGOTTEN * theirs
    compare(models, start)


# --- the joint stage ---

WEIGHTS = MaCoSNetLossWeights(matching=1.0, cycle=5.0, trans=4.0, task=2.0)


def joint_reference(outputs: MaCoSNetModelOutput, regularization: float) -> dict[str, Tensor]:
    pairs = ordered_pairs(3)
    side, batch = outputs.correlation.shape[-1], len(outputs.affine)
    masks = outputs.mask_logits.double().sigmoid()

    def through(p: int, points: Tensor, stage: str = "cascade") -> Tensor:
        return carry(points, outputs.affine[:, p], outputs.tps[:, p] if stage == "cascade" else None, regularization)

    cells = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), dim=-1).reshape(-1, 2)
    near = ((cells[:, None] - cells[None]).square().sum(-1) <= 1).double().unflatten(-1, (side, side))
    matching = consistency = 0.0
    for p, stage in itertools.product(range(6), ("affine", "cascade")):
        inliers = sampled(near.expand(batch, -1, -1, -1), through(p, regular(side).expand(batch, -1, -1), stage))
        score = (inliers * outputs.correlation[:, p].double()).sum(1)
        weight = F.adaptive_avg_pool2d(masks[:, p ^ 1], side)
        matching = matching - (score * weight).sum((1, 2)).mean() / 2 / 3
    for p in range(6):
        places = through(p, regular(IMAGE_SIZE).expand(batch, -1, -1))
        label = sampled(masks[:, p : p + 1], places)[:, 0].clamp(0, 1)
        inside = (places.abs() <= 1).all(-1).view_as(label).double()
        entropy = F.binary_cross_entropy_with_logits(outputs.mask_logits[:, p ^ 1].double(), label, reduction="none")
        consistency = consistency + ((entropy * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)).mean() / 3

    def homecoming(hops) -> Tensor:
        points = regular(10).expand(batch, -1, -1)
        for p in hops:
            points = through(p, points)
        return (points - regular(10)).norm(dim=-1).mean() * (IMAGE_SIZE - 1) / 2

    index = {pair: p for p, pair in enumerate(pairs)}
    orders = [(index[b, a], index[c, b], index[a, c]) for a, b, c in itertools.permutations(range(3))]
    cycle = sum(homecoming((p, p ^ 1)) for p in range(6)) / 3
    transitivity = sum(homecoming(hops) for hops in orders) / 6
    folded = 0.0
    for p in range(6):
        places = through(p, regular(12).expand(batch, -1, -1)).unflatten(1, (12, 12))
        right, down = places[:, :-1, 1:] - places[:, :-1, :-1], places[:, 1:, :-1] - places[:, :-1, :-1]
        torn = right[..., 0] * down[..., 1] - right[..., 1] * down[..., 0] <= 0
        folded = folded + torn.flatten(1).any(1).double().mean() / 6
    terms = {"matching": matching, "cycle": cycle, "transitivity": transitivity, "consistency": consistency}
    return {"total": matching + 5 * cycle + 4 * transitivity + 2 * consistency, **terms, "folded": folded}


def joint_objective(model: MaCoSNetModel) -> JointObjective:
    return JointObjective(model, *STATISTICS, MaCoSNetObjective(WEIGHTS)).train()


def groups() -> dict[str, Tensor]:
    coarse = torch.rand(6, 3, 7, 7, generator=seeded(1))
    pixels = F.interpolate(coarse, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear") * 255
    views = torch.tensor([1.0, 0, 0, 0, 1, 0]).expand(2, 3, 6).clone()
    return {"images": pixels.to(torch.uint8).unflatten(0, (2, 3)), "views": views}


def test_two_steps_of_the_joint_stage():
    start = warping_model()
    models = [copy.deepcopy(start) for _ in range(3)]
    objectives = [joint_objective(model) for model in models]
    pixels, _ = objectives[0].prepare_images(groups())
    seen: list[list[dict[str, Tensor]]] = [[], [], []]

    def ours(step: int) -> Tensor:
        seen[0].append(objectives[0](groups(), seeded(step)))
        return seen[0][-1]["total"]

    def theirs(number: int, regularization: float) -> Tensor:
        outputs = objectives[number].model.relate_views(
            objectives[number].model.get_image_features(pixels.flatten(0, 1)), 3, None
        )
        seen[number].append(joint_reference(outputs, regularization))
        return seen[number][-1]["total"]

    two_steps(models[0], ours)
    two_steps(models[1], lambda step: theirs(1, REGULARIZATION))
    two_steps(models[2], lambda step: theirs(2, 0.0))
    for step in range(2):
        for name, value in seen[1][step].items():
            close(seen[0][step][name], value)
        assert abs(seen[2][step]["total"] - seen[1][step]["total"]) > FORGOTTEN * seen[1][step]["total"]
    compare(models, start)


@torch.no_grad()
def test_what_is_watched_knows_the_regularisation():
    model = warping_model()
    objective = joint_objective(model).eval()
    figures = label_free_validation([groups()])(objective, 0)
    pixels, _ = objective.prepare_images(groups())
    outputs = model.relate_views(model.get_image_features(pixels.flatten(0, 1)), 3, None)
    expected, wrong = joint_reference(outputs, REGULARIZATION), joint_reference(outputs, 0.0)
    half = (IMAGE_SIZE - 1) / 2
    assert figures["held_out_cycle_error"] == pytest.approx(float(expected["cycle"]) / half / 2, rel=1e-4)
    assert figures["held_out_cycle_error"] != pytest.approx(float(wrong["cycle"]) / half / 2, rel=FORGOTTEN)
    assert figures["held_out_folded"] == pytest.approx(float(expected["folded"]))
    masks = outputs.mask_logits.double().sigmoid()
    agreements = []
    for b, p in itertools.product(range(2), range(6)):
        places = carry(regular(IMAGE_SIZE), outputs.affine[b, p], outputs.tps[b, p], REGULARIZATION)
        warped = sampled(masks[b : b + 1, p : p + 1], places[None])
        agreements.append(torch.corrcoef(torch.stack((warped.flatten(), masks[b, p ^ 1].flatten())))[0, 1])
    assert figures["held_out_mask_agreement"] == pytest.approx(float(torch.stack(agreements).mean()), abs=1e-4)
