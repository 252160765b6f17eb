"""In which of the symmetries of the square the object of a source faces as that of its target. Not in the paper.

A smooth transform cannot match an object with its mirror image, nor with itself turned by a quarter. Here a source is
also looked at through symmetries R of the square, `x_A = R x_A'`, the pair (A', B) that fits best is chosen, and its
output is brought back to the images as they are, which is exact (`Transform.compose_symmetry`).

The module travels with the model to the Hub.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .common_object import centre_prior
from .encoded_images import FeatureMaps
from .encoder import MaCoSNetFeatures
from .geometry import (
    SYMMETRIES,
    Transform,
    compose_symmetries,
    inside,
    inverse_symmetry,
    is_mirror,
    make_grid,
    on_device,
    sample_at,
    seen_through,
    symmetry_matrix,
)
from .matching import cell_similarity, normalize_similarity

if TYPE_CHECKING:
    from .modeling_macosnet import MaCoSNetModel, MaCoSNetModelOutput

# Symmetries of the source and of the target. Every combination is a hypothesis, the identity first, so that eight cost
# six encoder passes, not nine.
HYPOTHESES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "mirror": (("identity", "mirror"), ("identity",)),
    "all": (("identity", "turn_90", "turn_180", "turn_270"), ("identity", "mirror")),
}

# What a hypothesis must fit better by than one that does not mirror, and than the identity; see `docs/model.md`.
_MIRROR_MARGIN = 0.015
_TURN_MARGIN = 0.005
# Of `orientation_scores`, chosen on leordeanu-cars and msrc-coseg: what a distance of 1 costs in cosine similarity, and
# what a standard deviation is worth.
_DISTANCE_COST = 0.2
_UNUSUAL_SHARE = 0.02


def mirrors(orientations: str) -> list[bool]:
    """Which hypotheses mirror the source."""
    return [is_mirror(first) != is_mirror(second) for first, second in itertools.product(*HYPOTHESES[orientations])]


# How images of a collection face: cells a side of the maps that are compared; the cost of a partner cell's distance
# (its square, normalised coordinates); the evidence below which an image stays as it is.
_FACING_SIDE = 12
_FACING_COST = 0.1
_FACING_THRESHOLD = 0.01


class OrientedPairs(NamedTuple):
    """Images of B pairs seen through the chosen symmetries, source and target of a pair side by side.

    Attributes:
        pixel_values: `(2 B, 3, S, S)`.
        features: of these images.
        symmetries: the names of both symmetries R of each pair, `x = R x_seen`.
    """

    pixel_values: Tensor
    features: MaCoSNetFeatures
    symmetries: list[tuple[str, str]]


def orient(model: MaCoSNetModel, pixel_values: Tensor, orientations: str) -> OrientedPairs:
    """Encodes pairs under all hypotheses on how their images face, and chooses the one that fits best for each pair.

    Args:
        model: encodes and judges.
        pixel_values: `(B, 2, 3, S, S)`.
        orientations: `"mirror"` or `"all"`.
    """
    of_source, of_target = HYPOTHESES[orientations]
    names, batch = (*of_source, *of_target), len(pixel_values)
    sides = (0,) * len(of_source) + (1,) * len(of_target)
    images = torch.cat([seen_through(pixel_values[:, side], name) for side, name in zip(sides, names, strict=True)])
    features = model.get_image_features(images)
    rows = torch.arange(len(images), device=images.device).view(-1, batch)  # image number k of each pair
    hypotheses = list(itertools.product(range(len(of_source)), range(len(of_source), len(names))))
    source, target = (rows[on_device([pair[side] for pair in hypotheses], rows.device)].flatten() for side in (0, 1))
    scores = orientation_scores(model, features, source, target).view(-1, batch)
    best = [hypotheses[number] for number in choose(scores, mirrors(orientations)).tolist()]
    index = torch.stack([rows[number, pair] for pair, both in enumerate(best) for number in both])
    return OrientedPairs(
        images[index], features.select(index), [(names[first], names[second]) for first, second in best]
    )


def choose(scores: Tensor, mirrored: Sequence[bool]) -> Tensor:
    """Numbers `(B,)` of the hypotheses that fit best; number 0, the identity, and those without a mirror have an edge.

    Args:
        scores: `(K, B)`, see [`orientation_scores`].
        mirrored: which of the K hypotheses mirror the source.
    """
    edge = torch.where(on_device(mirrored, scores.device), 0.0, _MIRROR_MARGIN).unsqueeze(1)
    scores = scores.nan_to_num(nan=-1.0) + edge.to(scores)
    return torch.cat((scores[:1] + _TURN_MARGIN, scores[1:])).argmax(dim=0)


def orientation_scores(model: MaCoSNetModel, features: MaCoSNetFeatures, source: Tensor, target: Tensor) -> Tensor:
    """How well images fit as they face: `(P,)`, by inner products of features alone.

    The sum of two numbers, each the mean over both images and over their cells, weighted towards the middle. The first
    is the best similarity of a cell to one near the same place, each image's features being centred: what all of an
    image has in common says nothing of how it faces. The second says by how many standard deviations the similarity at
    the place where the affine head sends a cell exceeds that at other places.

    Args:
        model: its affine head is used.
        features: of N images, each perhaps seen through a symmetry.
        source, target: `(P,)` numbers of images.
    """
    side = model.config.predictor_grid
    maps = features.on_grid(side).normalized.float()
    cells = make_grid(side, side, device=maps.device).reshape(1, -1, 2)
    weights = centre_prior(side, side, device=maps.device).flatten()
    weights = weights / weights.sum()
    centred = F.normalize(maps - maps.mean(dim=(2, 3), keepdim=True), dim=1).flatten(2)
    near = torch.bmm(centred[source].transpose(1, 2), centred[target])
    near = near - _DISTANCE_COST * torch.cdist(cells, cells).square()
    score = ((near.amax(1) + near.amax(2)) / 2) @ weights
    for own, other in ((source, target), (target, source)):
        # One channel per cell of the one image, in the layout of the other; and the other way round.
        similarity = cell_similarity(maps[own], maps[other])
        reverse = similarity.flatten(2).transpose(1, 2).unflatten(2, (side, side))
        affine = model.affine_head(normalize_similarity(similarity.to(features.normalized.dtype)))
        places = Transform(affine).apply(cells)
        found = sample_at(reverse, places).diagonal(dim1=1, dim2=2)  # for each cell of the other image
        unusual = (found - similarity.mean(1).flatten(1)) / (similarity.std(1).flatten(1) + 1e-3)
        score = score + _UNUSUAL_SHARE / 2 * (unusual * inside(places)) @ weights
    return score


def turn_back(output: MaCoSNetModelOutput, transforms: Transform, symmetries: Sequence[tuple[str, str]]) -> None:
    """Brings the output of pairs of images seen through symmetries to the images as they are, in place.

    Args:
        output: of B pairs.
        transforms: `(B, 2)`, those of the output.
        symmetries: as of [`OrientedPairs`].
    """
    matrices = torch.stack([torch.stack([symmetry_matrix(name) for name in both]) for both in symmetries])
    # x_A = R_A x_A' and x_B = R_B x_B', so T_AB = R_A T_A'B' R_B^-1.
    whole = transforms.compose_symmetry(matrices, "source").compose_symmetry(matrices.flip(1), "target")
    assert whole.tps is not None  # as the output's have one
    output.affine, output.tps = whole.affine, whole.tps
    names = [compose_symmetries(first, inverse_symmetry(second)) for first, second in symmetries]
    output.orientation = on_device([list(SYMMETRIES).index(name) for name in names], whole.device)
    if all(name == "identity" for both in symmetries for name in both):
        return
    inverse = [[inverse_symmetry(name) for name in both] for both in symmetries]

    def turned(maps: Tensor, flip: bool = False) -> Tensor:
        """Maps `(B, 2, ..., S, S)` in the layout of source and target (flip: target and source), turned back."""
        return torch.stack(
            [
                torch.stack(
                    [seen_through(one, name) for one, name in zip(pair, both[::-1] if flip else both, strict=True)]
                )
                for pair, both in zip(maps, inverse, strict=True)
            ]
        )

    if output.mask_logits is not None:
        output.mask_logits = turned(output.mask_logits)
    output.features = turned(output.features)
    # S_ij has the layout of view j, and one channel per position of view i.
    side = output.correlation.shape[-1]
    channels = turned(output.correlation, flip=True).flatten(-2).transpose(-1, -2).unflatten(-1, (side, side))
    output.correlation = turned(channels).flatten(-2).transpose(-1, -2).unflatten(-1, (side, side))


def facing_sides(features: Tensor | FeatureMaps, mirrored: Tensor | FeatureMaps, others: Tensor) -> Tensor:
    """Which way the objects of N images face: `(N,)`, 1 on one side and -1 on the other, 0 where the image says little.

    Each pair is compared as it is and with one image mirrored, see [`facing_evidence`]. The signs of the leading
    eigenvector of these answers are the sides on which they agree best; which of both is 1 is arbitrary. Mirroring an
    image changes its side and no other.

    Args:
        features: `(N, C, h, w)` of the images.
        mirrored: the same of their mirror images.
        others: `(N, K)`, the numbers of those with which each is compared.
    """
    evidence = facing_evidence(features, mirrored, others).double().cpu()
    sides = torch.linalg.eigh(evidence).eigenvectors[:, -1].sign()
    support = sides * (evidence @ sides) / (evidence != 0).sum(1).clamp(min=1)
    return torch.where(support > _FACING_THRESHOLD, sides, 0)


def facing_evidence(features: Tensor | FeatureMaps, mirrored: Tensor | FeatureMaps, others: Tensor) -> Tensor:
    """How much better N images fit each other as they are than with one of both mirrored: symmetric `(N, N)`.

    Of the cells of a coarse map of one image, the most similar cell of the other counts, less a penalty for its
    distance, which keeps the answer from being the same whichever way the object faces; cells in the middle weigh more.
    No learnt weight is asked: for voc2007-6x2's horses and motorbikes that is as often right as the cascade.
    It is 0 where neither image is one of the `others` of the other.

    Args: as in [`facing_sides`].
    """
    side = min(_FACING_SIDE, features.shape[-1])

    def coarse(maps: Tensor) -> Tensor:
        return F.normalize(F.adaptive_avg_pool2d(F.normalize(maps.float(), dim=1), side), dim=1).flatten(2)

    own, other = (torch.cat([coarse(part) for part in maps.split(16)]) for maps in (features, mirrored))
    grid = make_grid(side, side, device=own.device).reshape(-1, 2)
    cost = _FACING_COST * (grid.unsqueeze(1) - grid).square().sum(-1).unsqueeze(1)
    prior = centre_prior(side, side, device=own.device).flatten()
    prior = prior / prior.sum()

    def fit(one: Tensor, several: Tensor) -> Tensor:
        """Of cells `(C, c)` with those of P images `(P, C, c)`: `(P,)`."""
        similarity = torch.einsum("cp,ncq->pnq", one, several) - cost
        return similarity.amax(0) @ prior + prior @ similarity.amax(2)

    evidence = own.new_zeros(len(own), len(own))
    compared = torch.zeros_like(evidence, dtype=torch.bool)
    compared.scatter_(1, others, True)
    compared = (compared | compared.t()).triu(1)
    for number in range(len(own)):
        partners = compared[number].nonzero().flatten()
        if len(partners):
            same = fit(own[number], own[partners]) + fit(other[number], other[partners])
            turned = fit(own[number], other[partners]) + fit(other[number], own[partners])
            evidence[number, partners] = evidence[partners, number] = same - turned
    return evidence
