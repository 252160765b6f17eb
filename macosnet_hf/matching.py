"""Correlation maps, local matching, the mutual fit, matches: what relates two feature maps without a learnt weight.

The module travels with the model to the Hub. Transforms and coordinates are those of `geometry.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils.generic import maybe_autocast

from .configuration_macosnet import MaCoSNetConfig
from .directions import start_of
from .errors import InputError
from .geometry import (
    Transform,
    cell_centres,
    check_sizes,
    corner_weights,
    denormalize_points,
    identity_affine,
    inside,
    make_grid,
    normalize_points,
    normalize_relative,
    relative_points,
    sample_at,
)

# Added under the root of every L2 normalisation, as in the published networks (converted weights depend on it).
_NORM_EPSILON = 1e-6


def l2_normalize(tensor: Tensor, dim: int = 1) -> Tensor:
    """Unit length over a dimension, as in the published networks: `x / sqrt(sum x^2 + 1e-6)`."""
    return tensor * torch.rsqrt(tensor.float().square().sum(dim, keepdim=True) + _NORM_EPSILON).to(tensor.dtype)


def correlate(source: Tensor, target: Tensor) -> Tensor:
    """Correlation map S_AB of unit-length features.

    Inner products of all positions, ReLU, then unit length over the positions of A: S_AB of the paper's section 3.2,
    normalised as by Rocco et al., "Convolutional neural network architecture for geometric matching" (2017).

    Args:
        source: f_A, `(B, C, h, w)`.
        target: f_B, `(B, C, h', w')`.

    Returns:
        `(B, h*w, h', w')`: one channel per position of A (row by row), spatial layout of B.
    """
    return normalize_similarity(cell_similarity(source, target))


def cell_similarity(source: Tensor, target: Tensor) -> Tensor:
    """Inner products of all cells: `(B, C, h, w)` and `(B, C, h', w')` to `(B, h*w, h', w')`."""
    return torch.bmm(source.flatten(2).transpose(1, 2), target.flatten(2)).unflatten(-1, target.shape[-2:])


def normalize_similarity(similarity: Tensor) -> Tensor:
    """ReLU, then unit length over the source's cells: `(B, h*w, h', w')` to the correlation map of [`correlate`]."""
    return l2_normalize(F.relu(similarity))


def cell_products(last: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths `(B, h*w)` of the cells of a map `(B, C, h, w)`, and their inner products `(B, h*w, h*w)`."""
    cells = last.float().flatten(2)
    lengths = (cells.square().sum(1) + _NORM_EPSILON).sqrt()
    return lengths, torch.bmm(cells.transpose(1, 2), cells)


def warp_similarity(
    similarity: Tensor, lengths: Tensor, gram: Tensor, grid: Tensor, maps: Tensor | None = None, *, padding_mode: str
) -> Tensor:
    """Inner products of A's map, once it is warped, with B's cells: from inner products alone, no feature is touched.

    A feature of the warped map is a mixture of A's features, so its inner products with B's features are the same
    mixture of inner products that are known already, and its length follows from those within A.

    Args:
        similarity: `(N, h*w, h, w)` of [`cell_similarity`], A's cells as channels, B's layout.
        lengths: `(M, h*w)` and gram `(M, h*w, h*w)`: of M maps, see [`cell_products`].
        grid: `(N, h, w, 2)`, where each cell of the warped map lies in A.
        maps: `(N,)`, which of the M maps is A's; without it M = N and each pair has its own.
        padding_mode: as in [`warp`](geometry.py).

    Returns:
        `(N, h*w, h, w)` as `similarity`, the warped map's cells as channels.
    """
    maps = torch.arange(similarity.shape[0], device=similarity.device) if maps is None else maps
    height, width = similarity.shape[-2:]
    index, weights = corner_weights(grid.flatten(1, 2), (height, width), padding_mode=padding_mode)
    # What each cell of the warped map is made of: its share of A's cells, before they had unit length, (N, A', A).
    scaled = weights * lengths.to(weights)[maps].gather(1, index.flatten(1)).view_as(index)
    shares = weights.new_zeros(grid.shape[0], height * width, height * width).scatter_add(2, index, scaled)
    length = mixture_length(gram.to(weights), index, weights, maps)
    warped = torch.bmm(shares, similarity.flatten(2).to(shares)) / length.unsqueeze(-1)
    return warped.to(similarity.dtype).unflatten(-1, (height, width))


def similarities(source: Tensor, target: Tensor, source_points: Tensor, target_points: Tensor) -> Tensor:
    """Cosine similarity `(B, N)` of features `(B, C, h, w)` at points `(B, N, 2)` of the one and of the other."""
    return F.cosine_similarity(sample_at(source, source_points), sample_at(target, target_points), dim=-1)


# How finely `match_locally` looks: samples a side of a point's surroundings, and of the places it may move to.
_WINDOW_SAMPLES = 5
_OFFSET_SAMPLES = 9
_OFFSET_REACH = 2.5  # in sigmas
_POINTS_AT_ONCE = 1024


def match_locally(
    source: Tensor,
    target: Tensor,
    points: Tensor,
    transform: Transform,
    *,
    sigmas: Sequence[float] = (0.3, 0.15),
    windows: Sequence[float] = (0.4, 0.25),
    temperature: float = 60.0,
) -> Tensor:
    """Moves transferred points to the best feature match near where the transform sent them.

    A point's surroundings move with it: for every offset from the place where the transform sends the point, the
    similarities of the whole window around it are averaged (as stereo matching aggregates costs), for one feature
    vector alone is ambiguous where an object repeats itself. The transform is a Gaussian prior on the offset, the
    averaged cosine similarity is the evidence, and the answer is the expectation over the offsets (a soft-argmax). Each
    pass starts from the answer of the one before; where features say nothing, a point stays where the transform put it.

    Args:
        source, target: unit-length features `(B, C, h, w)` of the image that the points are on, and of the other.
        points: `(B, N, 2)` normalised points.
        transform: `(B)`, maps the points into the other image.
        sigmas: for each pass, the width of the prior on the offset, normalised coordinates.
        windows: for each pass, half the side of the window, normalised coordinates; it fades to its border as a
            Gaussian of half that width.
        temperature: factor on the averaged similarity.

    Returns:
        `(B, N, 2)` normalised points of the other image.
    """
    source, target = source.float(), target.float()
    parts = [
        _match_some_locally(source, target, some, transform, sigmas, windows, temperature)
        for some in points.split(_POINTS_AT_ONCE, dim=1)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _match_some_locally(
    source: Tensor,
    target: Tensor,
    points: Tensor,
    transform: Transform,
    sigmas: Sequence[float],
    windows: Sequence[float],
    temperature: float,
) -> Tensor:
    """[`match_locally`] for as many points at once as memory allows."""
    batch, count = points.shape[:2]
    unit_window, unit_offsets = (
        make_grid(side, side, device=points.device, dtype=points.dtype).reshape(-1, 2)
        for side in (_WINDOW_SAMPLES, _OFFSET_SAMPLES)
    )
    # One channel per position of the target, spatial layout of the source. Descriptors between the source's cells are
    # mixtures of the cells', so their similarities are the same mixtures of these numbers: no descriptor is made.
    similarity = torch.bmm(target.flatten(2).transpose(1, 2), source.flatten(2)).unflatten(-1, source.shape[-2:])
    gram = torch.bmm(source.flatten(2).transpose(1, 2), source.flatten(2))
    answer = transform.apply(points)
    moved = torch.zeros_like(points)
    for sigma, half in zip(sigmas, windows, strict=True):
        around = (points.unsqueeze(2) + half * unit_window).flatten(1, 2)
        weights = torch.exp(-2 * unit_window.square().sum(-1)) * inside(around).unflatten(1, (count, len(unit_window)))
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=_NORM_EPSILON)
        length = mixture_length(gram, *corner_weights(around, source.shape[-2:]))
        evidence_maps = (sample_at(similarity, around) / length.unsqueeze(-1)).unflatten(-1, target.shape[-2:])
        mapped = transform.apply(around)
        mapped = mapped + moved.repeat_interleave(len(unit_window), dim=1)
        offsets = _OFFSET_REACH * sigma * unit_offsets
        places = mapped.unsqueeze(2) + offsets
        found = F.grid_sample(
            evidence_maps.flatten(0, 1).unsqueeze(1),
            places.flatten(0, 1).unsqueeze(2),
            align_corners=True,
            padding_mode="border",
        )
        found = found.view(batch, count, len(unit_window), len(offsets))
        evidence = torch.einsum("bnwo,bnw->bno", found, weights.to(found.dtype))
        chances = torch.softmax(temperature * evidence - offsets.square().sum(-1) / (2 * sigma**2), dim=-1)
        moved = moved + chances @ offsets
    return answer + moved


def map_points(
    points: Tensor,
    view: int,
    features: Tensor,
    transforms: Transform,
    config: MaCoSNetConfig,
    local_matching: bool | None = None,
) -> Tensor:
    """Normalised points `(B, N, 2)` of one view of a pair in the other view, as a model's configuration has it.

    Args:
        points: of the view.
        view: 0 for the source, 1 for the target.
        features: `(B, 2, C, h, w)`, unit length over channels.
        transforms: `(B, 2)`, T_AB and T_BA.
        config: of the model.
        local_matching: other than the configuration's; `False` for the transform alone.
    """
    # T_ij maps points of j into i: points of view 0 go by T_BA (index 1) and points of view 1 by T_AB (index 0).
    transform = transforms[:, 1 - view]
    if not (config.local_matching if local_matching is None else local_matching):
        return transform.apply(points)
    return match_locally(features[:, view], features[:, 1 - view], points, transform, **config.local_matching_options)


def match_grid(
    features: Tensor, mask_logits: Tensor | None, transforms: Transform, config: MaCoSNetConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Keypoints on a regular grid of the source, where they lie in the target, and how far to trust each match.

    The score is the product of three numbers in [0, 1]: the geometric mean of both masks, the cosine similarity of
    the features, and exp(-e^2 / 2 sigma^2) of the forward-backward error e. A match holds where both masks are above
    the configuration's threshold; without masks, wherever it lies in the target.

    Args:
        features: `(B, 2, C, h, w)`, unit length over channels.
        mask_logits: `(B, 2, H, W)`; without them the masks do not count.
        transforms: `(B, 2)`, T_AB and T_BA.
        config: of the model.

    Returns:
        keypoints `(B, 2, N, 2)`, relative, matches `(B, 2, N)` (-1 for unmatched) and scores `(B, 2, N)`.
    """
    batch, like = features.shape[0], transforms.affine
    source = cell_centres(config.grid_size, device=like.device, dtype=like.dtype).expand(batch, -1, -1)
    target = map_points(source, 0, features, transforms, config)
    back = map_points(target, 1, features, transforms, config)
    error = (back - source).norm(dim=-1)
    consistency = torch.exp(-0.5 * (error / config.match_consistency_sigma) ** 2)

    similarity = similarities(features[:, 0].float(), features[:, 1].float(), source, target)
    keypoints = relative_points(torch.stack((source, target), dim=1), config.image_size)
    matched = ((keypoints >= 0) & (keypoints <= 1)).all(dim=-1).all(dim=1)
    scores = similarity.clamp(0, 1) * consistency
    if mask_logits is not None:
        masks = mask_logits.float().sigmoid().unsqueeze(2)
        on_source = sample_at(masks[:, 0], source).squeeze(-1)
        on_target = sample_at(masks[:, 1], target).squeeze(-1)
        scores = (on_source * on_target).clamp(min=0).sqrt() * similarity.clamp(0, 1) * consistency
        threshold = config.match_mask_threshold
        matched = (on_source > threshold) & (on_target > threshold) & matched
    index = torch.arange(source.shape[1], device=source.device).expand(batch, -1)
    matches = torch.where(matched, index, -1)
    scores = torch.where(matched, scores, torch.zeros_like(scores))
    return keypoints.clamp(0, 1), matches.unsqueeze(1).expand(-1, 2, -1), scores.unsqueeze(1).expand(-1, 2, -1)


def transfer_points(
    points: Tensor,
    direction: str,
    image_sizes: Any,
    features: Tensor,
    transforms: Transform,
    config: MaCoSNetConfig,
    local_matching: bool | None = None,
) -> Tensor:
    """Points `(B, N, 2)` of one image of a pair in the other, in pixels of the original images.

    Args:
        points: as (x, y) of the image that they are on.
        direction: one of `DIRECTIONS`.
        image_sizes: `(B, 2, 2)` sizes (height, width) of source and target.
        features, transforms, config, local_matching: as in [`map_points`].

    Raises:
        InputError: for another direction or shapes that do not fit.
    """
    batch, view = transforms.shape[0], start_of(direction)
    if points.dim() != 3 or points.shape[0] != batch or points.shape[-1] != 2:
        raise InputError(f"points must be ({batch}, N, 2) as (x, y); got {tuple(points.shape)}.")
    sizes = check_sizes(image_sizes, batch, 2).to(transforms.device)
    normalized = normalize_points(points.to(transforms.affine), sizes[:, view], config.image_size)
    mapped = map_points(normalized, view, features, transforms, config, local_matching)
    return denormalize_points(mapped, sizes[:, 1 - view], config.image_size)


def keypoint_loss(labels: Tensor, features: Tensor, transforms: Transform, config: MaCoSNetConfig) -> Tensor:
    """Mean distance of transferred keypoints from their labels, both ways, the image's side being 1.

    Args:
        labels: `(B, 2, K, 2)` corresponding keypoints of source and target, relative: `(x + 0.5) / W` and
            `(y + 0.5) / H`; negative where absent.
        features, transforms, config: as in [`map_points`].

    Raises:
        InputError: for labels of another shape.
    """
    if labels.dim() != 4 or labels.shape[1] != 2 or labels.shape[-1] != 2:
        raise InputError(f"labels must be (B, 2, K, 2); got {tuple(labels.shape)}.")
    labels = labels.to(transforms.affine)
    present = (labels >= 0).all(dim=-1).all(dim=1)
    points = normalize_relative(labels, config.image_size)
    mapped = [map_points(points[:, view], view, features, transforms, config) for view in (0, 1)]
    found = [relative_points(each, config.image_size) for each in mapped]
    error = sum((found[view] - labels[:, 1 - view]).norm(dim=-1) for view in (0, 1))
    return (error * present).sum() / (2 * present.sum().clamp(min=1))


# Settings of `fit_mutually`, chosen on leordeanu-cars: points a side; width of the search and half the side of the
# compared windows (normalised coordinates); forward-backward error at which a match's weight falls to exp(-1/2); how
# strongly the first transform holds on; the smallest determinant of an affine part that is inverted.
_FIT_POINTS = 7
_FIT_SIGMA = 0.3
_FIT_WINDOW = 0.6
_FIT_ERROR_SIGMA = 0.1
_FIT_RIDGE = 0.1
_FIT_MARGIN = 0.05
_FIT_DETERMINANT = 0.01


def fit_mutually(features: Tensor, transforms: Transform, *, temperature: float = 60.0) -> Transform:
    """Fits both transforms of a pair to the matches on which its two directions agree. Not in the paper.

    A grid of 7x7 points of each image is matched locally ([`match_locally`]) into the other and back. For each
    direction, a thin-plate spline is fitted by weighted least squares to the matches of its own grid and to those of
    the other direction, read backwards; a match weighs s^2 exp(-e^2 / 2 sigma^2) with the cosine similarity s of both
    features and the forward-backward error e, and nothing if it leaves the image by more than 0.05. The transform
    that one starts from holds on with a ridge, so that points stay where it sends them if the features say nothing.

    Args:
        features: unit-length features `(B, 2, C, h, w)` of both images.
        transforms: `(B, 2)`, T_AB and T_BA.
        temperature: as in [`match_locally`].

    Returns:
        `(B, 2)` in float32: the affine parts as they were (the identity where one nearly flattens the image), and
        fitted splines.
    """
    with maybe_autocast(features.device.type, enabled=False):  # half precision is too coarse for places and sums
        return _fit_mutually(features.float(), transforms.to(torch.float32), temperature)


def _fit_mutually(features: Tensor, transforms: Transform, temperature: float) -> Transform:
    batch = features.shape[0]
    end, start = features.flatten(0, 1), features.flip(1).flatten(0, 1)  # T_AB takes points of B
    onward = transforms.flatten(0, 1)
    homeward = transforms.flip(1).flatten(0, 1)
    options: dict[str, Any] = {"sigmas": (_FIT_SIGMA,), "windows": (_FIT_WINDOW,), "temperature": temperature}
    grid = make_grid(_FIT_POINTS, _FIT_POINTS, device=features.device, dtype=features.dtype).reshape(1, -1, 2)
    grid = grid.expand(2 * batch, -1, -1)
    there = match_locally(start, end, grid, onward, **options)
    back = match_locally(end, start, there.clamp(-1, 1), homeward, **options)
    error = (back - grid).square().sum(-1)
    similarity = similarities(start, end, grid, there).clamp(0, 1)
    weights = similarity.square() * torch.exp(-error / (2 * _FIT_ERROR_SIGMA**2)) * inside(there, margin=_FIT_MARGIN)

    def reverse(of_pairs: Tensor) -> Tensor:
        return of_pairs.unflatten(0, (batch, 2)).flip(1).flatten(0, 1)

    basis = onward.basis(grid)
    rows = torch.cat((basis, onward.basis(reverse(there)), basis), dim=1)
    places = torch.cat((there, grid, onward.apply(grid)), dim=1)
    shares = torch.cat((weights, reverse(weights), torch.full_like(weights, _FIT_RIDGE)), dim=1).unsqueeze(-1)
    weighted = (shares * rows).transpose(1, 2)
    moved = _solve_definite(weighted @ rows, weighted @ places)  # (2B, 9, 2): where the control points go

    flat = onward.determinant().abs() < _FIT_DETERMINANT
    identity = identity_affine(1, device=features.device, dtype=features.dtype)
    affine = torch.where(flat[:, None], identity, onward.affine)
    a, b, x, c, d, y = affine.unsqueeze(1).unbind(-1)
    across, down = moved[..., 0] - x, moved[..., 1] - y
    control = torch.stack((d * across - b * down, a * down - c * across), dim=1) / (a * d - b * c).unsqueeze(1)
    return replace(onward, affine=affine, tps=control.flatten(1)).unflatten(0, (batch, 2))


def _solve_definite(system: Tensor, right: Tensor) -> Tensor:
    """Solves positive definite systems `(B, n, n)` for `(B, n, m)`: by elimination, which needs no pivots for them and,
    unlike a call of LAPACK, can be exported."""
    count = system.shape[-1]
    rows = torch.cat((system, right), dim=-1)
    unit = torch.eye(count, device=rows.device, dtype=rows.dtype)
    for k in range(count):
        pivot = rows[:, k : k + 1] / rows[:, k : k + 1, k : k + 1]
        rows = rows - (rows[:, :, k : k + 1] - unit[:, k : k + 1]) * pivot
    return rows[..., count:]


def mixture_length(gram: Tensor, index: Tensor, weights: Tensor, maps: Tensor | None = None) -> Tensor:
    """Length `(B, N)` of mixtures of a map's cells.

    Args:
        gram: inner products of the cells of M maps, `(M, h*w, h*w)`.
        index, weights: `(B, N, 4)`, see [`corner_weights`].
        maps: `(B,)`, of which map each row is; without it M = B and each has its own.
    """
    cells = gram.shape[-1]
    maps = torch.arange(gram.shape[0], device=gram.device) if maps is None else maps
    first = maps.view(-1, 1, 1, 1) * cells + index.unsqueeze(-1)
    products = gram.flatten()[first * cells + index.unsqueeze(-2)]
    square = ((weights.unsqueeze(-2) * products).sum(-1) * weights).sum(-1)
    return (square.clamp(min=0) + _NORM_EPSILON).sqrt()
