"""How far the matches of a pair can be trusted: a number, a word, and the reason in plain words.

`benchmarks/verdicts.py` chooses the constants; docs/figures.md says what the words are worth.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common_object import feature_structure
from ..encoder import MaCoSNetFeatures
from ..geometry import SYMMETRIES, Transform, inside, make_grid, sample_at, symmetry_matrix

if TYPE_CHECKING:
    from ..modeling_macosnet import MaCoSNetModel

REASONS = {
    "good": "The two fit together well.",
    "fair": "The two fit together in part.",
    "poor": "The two share little; do not rely on the matches.",
    "blank": "There is nothing to match: an image shows nothing but a plain or even surface.",
    "turned": "The two seem to be seen from different sides; do not rely on the matches.",
    "empty": "No match lies on the object of both images.",
}


class Verdict(NamedTuple):
    """How far the matches of a pair can be trusted.

    Attributes:
        agreement: in [0, 1].
        quality: `"good"`, `"fair"` or `"poor"`.
        reason: a sentence, one of `REASONS`.
    """

    agreement: float
    quality: str
    reason: str


WITHOUT_MATCHES = Verdict(0.0, "poor", REASONS["empty"])


class Evidence(NamedTuple):
    """What a verdict rests on, see [`evidence_of`]. `near` and `upright` are means over both directions of the pair.

    Attributes:
        similarity: cosine similarity of the mean features of both objects.
        near: share of the cells on both objects whose window of 3x3 cells finds its most similar place in the whole
            other image at most two cells from where the transforms send it. A window is moved as the transforms say.
        upright: how much more similar the most similar windows are than those turned or mirrored before the
            transforms move them; negative where the objects face in another way than the transforms have it.
        structure: [`~macosnet_hf.common_object.feature_structure`] of the image that has less.
    """

    similarity: float
    near: float
    upright: float
    structure: float


def evidence_of(features: Tensor, masks: Tensor, transforms: Transform) -> Evidence:
    """The evidence for the matches of a pair, from features alone.

    Args:
        features: `(2, C, h, w)` of source and target.
        masks: `(2, S, S)` soft masks.
        transforms: `(2)`; the first takes points of the target to the source.
    """
    height, width = features.shape[-2:]
    unit = F.normalize(features.float(), dim=1).flatten(2)
    small = F.interpolate(masks[:, None].float(), size=(height, width), mode="area").flatten(1)
    mean = (unit * small[:, None]).sum(-1)
    similarity = unit[0].T @ unit[1]
    transforms = transforms.to(torch.float32)
    ways = [
        _one_way(of_way.unflatten(1, (height, width)), transforms[1 - way : 2 - way], small[way], small[1 - way])
        for way, of_way in enumerate((similarity, similarity.T))
    ]
    near, upright = torch.stack(ways).mean(0).tolist()
    return Evidence(
        similarity=float(F.cosine_similarity(mean[0], mean[1], dim=0)),
        near=near,
        upright=upright,
        structure=float(feature_structure(features).min()),
    )


_NEAR = 2.0  # cells


def _one_way(similarity: Tensor, transform: Transform, mask: Tensor, other: Tensor) -> Tensor:
    """`near` and `upright` of the evidence in one direction: `(2,)`.

    Args:
        similarity: `(N, h, w)` of the N = h * w cells of an image to those of the other.
        transform: `(1)`, takes points of the image to the other.
        mask, other: `(N,)` share of the object in each cell of the image and of the other.
    """
    height, width = similarity.shape[-2:]
    cells = make_grid(height, width, device=similarity.device).view(-1, 2)
    places = transform.apply(cells[None])[0]
    linear = _linear_part(cells, places, mask)
    on_both = mask * sample_at(other.view(1, 1, height, width), places[None])[0, :, 0] * inside(places)
    best = []
    for name in SYMMETRIES:
        windows = _window_similarity(similarity, linear @ symmetry_matrix(name).to(linear))
        best.append(_mean(windows.flatten(1).amax(1), mask))
        if name == "identity":
            straight = windows
    nearest = cells[straight.flatten(1).argmax(1)]
    step = torch.tensor([2 / (width - 1), 2 / (height - 1)]).to(cells)
    near = ((nearest - places) / step).norm(dim=-1) <= _NEAR
    upright = best[0] - torch.stack(best[1:]).amax()
    return torch.stack((_mean(near.float(), on_both), upright))


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum() / weights.sum().clamp(min=1e-6)


def _linear_part(points: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """Matrix `(2, 2)` by which differences of points `(N, 2)` become those of their places: weighted least squares."""
    weights = (weights + 1e-3)[:, None]
    here, there = (each - (each * weights).sum(0) / weights.sum() for each in (points, places))
    return torch.linalg.solve(here.T @ (weights * here), here.T @ (weights * there)).T


def _window_similarity(similarity: Tensor, linear: Tensor) -> Tensor:
    """Similarity `(N, h, w)` of windows of 3x3 cells: of each around a cell, laid around each cell of the other image.

    Windows are laid there as a matrix `(2, 2)` moves them. Cells outside of an image do not count.
    """
    height, width = similarity.shape[-2:]
    grid = make_grid(height, width, device=similarity.device)
    rows = similarity.unflatten(0, (height, width))
    total, count = torch.zeros_like(rows), torch.zeros_like(rows)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            offset = linear.new_tensor([right * 2 / (width - 1), down * 2 / (height - 1)])
            there = grid + linear @ offset
            counts = inside(there, margin=1e-4)[None]
            moved = F.grid_sample(similarity[None], there[None], align_corners=True, padding_mode="border")[0] * counts
            here = [slice(max(0, -step), side - max(0, step)) for step, side in ((down, height), (right, width))]
            next_to = [slice(max(0, step), side - max(0, -step)) for step, side in ((down, height), (right, width))]
            total[here[0], here[1]] += moved.unflatten(0, (height, width))[next_to[0], next_to[1]]
            count[here[0], here[1]] += counts
    return (total / count.clamp(min=4.5)).flatten(0, 1)


UPRIGHT_SCALE = 0.05


class Rule(NamedTuple):
    """How a verdict follows from the evidence.

    Attributes:
        blank: least `structure` of an image of something.
        similarity, near, upright, bias: a logistic regression; of `upright` it takes `tanh(upright / UPRIGHT_SCALE)`.
        good, fair: least agreement for these words.
    """

    blank: float
    similarity: float
    near: float
    upright: float
    bias: float
    good: float
    fair: float


# What `python benchmarks/verdicts.py DATA --fit` chose for `lite`. Other encoders have other similarities.
RULE = Rule(blank=0.15, similarity=3.27, near=4.2, upright=2.93, bias=-4.56, good=0.9, fair=0.5)


def judged_features(model: MaCoSNetModel, features: Tensor) -> Tensor:
    """Features `(2, C, h, w)` of a pair on the grid of the transformation predictor, whose cells a rule counts in."""
    return MaCoSNetFeatures.from_map(features).on_grid(model.config.predictor_grid).last


def judge(model: MaCoSNetModel, features: Tensor, masks: Tensor, transforms: Transform) -> Verdict:
    """The verdict on a pair of images; features, masks and transforms as in [`evidence_of`]."""
    return verdict_of(evidence_of(judged_features(model, features), masks, transforms))


def verdict_of(evidence: Evidence, rule: Rule = RULE) -> Verdict:
    """The verdict that follows from the evidence."""
    if not evidence.structure >= rule.blank:  # also where it is not a number
        return Verdict(0.0, "poor", REASONS["blank"])
    total = rule.similarity * evidence.similarity + rule.near * evidence.near + rule.bias
    agreement = 1 / (1 + math.exp(-total - rule.upright * math.tanh(evidence.upright / UPRIGHT_SCALE)))
    quality = "good" if agreement >= rule.good else "fair" if agreement >= rule.fair else "poor"
    return Verdict(agreement, quality, REASONS["turned" if quality == "poor" and evidence.upright < 0 else quality])
