"""Correlation maps, local matching and the mutual fit: what relates two feature maps, without a learnt weight.

The module travels with the model to the Hub. Transforms and coordinates are those of `geometry.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils.generic import maybe_autocast

from .geometry import apply_cascade, corner_weights, identity_affine, inside, make_grid, sample_at, tps_basis

# Added under the root of every L2 normalisation, as in the published networks (converted weights depend on it).
_NORM_EPSILON = 1e-6


def l2_normalize(tensor: Tensor, dim: int = 1) -> Tensor:
    """Unit length over a dimension, as in the published networks: `x / sqrt(sum x^2 + 1e-6)`."""
    return tensor * torch.rsqrt(tensor.float().square().sum(dim, keepdim=True) + _NORM_EPSILON).to(tensor.dtype)


def resample_map(maps: Tensor, stride: int, size: Sequence[int]) -> Tensor:
    """Maps `(N, C, h', w')` of a stage on the grid `(h, w)` of the stage of stride 16: means of finer cells, bilinear
    interpolation of coarser ones.

    Cells stand where the strided convolutions put them. Over an odd number of cells (15 to 8) a stride of 2 centres
    every output on an even cell, the last one included: corner lies on corner. Over an even number (20 to 10) it may
    centre it on either cell of two, as the padding decides; half-pixel centres are half a cell from both, and on
    leordeanu-cars (EfficientNet-Lite2, 320 pixels) none of the three is better by more than half a point of PCK.
    """
    height, width = size
    if stride <= 16:
        return F.avg_pool2d(maps, 16 // stride)
    corners = (maps.shape[-1] - 1) * stride == (width - 1) * 16 and (maps.shape[-2] - 1) * stride == (height - 1) * 16
    return F.interpolate(maps, size=(height, width), mode="bilinear", align_corners=corners)


def correlate(source: Tensor, target: Tensor) -> Tensor:
    """Correlation map S_AB of unit-length features.

    Inner products of all positions, ReLU, then unit length over the positions of A.

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
    affine: Tensor,
    tps: Tensor | None = None,
    *,
    sigmas: Sequence[float] = (0.3, 0.15),
    windows: Sequence[float] = (0.4, 0.25),
    temperature: float = 60.0,
    regularization: float = 0.0,
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
        affine: `(B, 6)` of the transform that maps the points into the other image.
        tps: `(B, 18)` of the same, or `None` for the affine alone.
        sigmas: for each pass, the width of the prior on the offset, normalised coordinates.
        windows: for each pass, half the side of the window, normalised coordinates; it fades to its border as a
            Gaussian of half that width.
        temperature: factor on the averaged similarity.
        regularization: regularisation factor of the TPS.

    Returns:
        `(B, N, 2)` normalised points of the other image.
    """
    source, target = source.float(), target.float()
    parts = [
        _match_some_locally(source, target, some, affine, tps, sigmas, windows, temperature, regularization)
        for some in points.split(_POINTS_AT_ONCE, dim=1)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _match_some_locally(
    source: Tensor,
    target: Tensor,
    points: Tensor,
    affine: Tensor,
    tps: Tensor | None,
    sigmas: Sequence[float],
    windows: Sequence[float],
    temperature: float,
    regularization: float,
) -> Tensor:
    """[`match_locally`] for as many points as memory bears."""
    batch, count = points.shape[:2]
    unit_window, unit_offsets = (
        make_grid(side, side, device=points.device, dtype=points.dtype).reshape(-1, 2)
        for side in (_WINDOW_SAMPLES, _OFFSET_SAMPLES)
    )
    # One channel per position of the target, spatial layout of the source. Descriptors between the source's cells are
    # mixtures of the cells', so their similarities are the same mixtures of these numbers: no descriptor is made.
    similarity = torch.bmm(target.flatten(2).transpose(1, 2), source.flatten(2)).unflatten(-1, source.shape[-2:])
    gram = torch.bmm(source.flatten(2).transpose(1, 2), source.flatten(2))
    answer = apply_cascade(points, affine, tps, regularization=regularization)
    moved = torch.zeros_like(points)
    for sigma, half in zip(sigmas, windows, strict=True):
        around = (points.unsqueeze(2) + half * unit_window).flatten(1, 2)
        weights = torch.exp(-2 * unit_window.square().sum(-1)) * inside(around).unflatten(1, (count, len(unit_window)))
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=_NORM_EPSILON)
        length = mixture_length(gram, *corner_weights(around, source.shape[-2:]))
        evidence_maps = (sample_at(similarity, around) / length.unsqueeze(-1)).unflatten(-1, target.shape[-2:])
        mapped = apply_cascade(around, affine, tps, regularization=regularization)
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


def fit_mutually(
    features: Tensor, affine: Tensor, tps: Tensor, *, temperature: float = 60.0, regularization: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Fits both transforms of a pair to the matches on which its two directions agree. Not in the paper.

    A grid of 7x7 points of each image is matched locally ([`match_locally`]) into the other and back. For each
    direction, a thin-plate spline is fitted by weighted least squares to the matches of its own grid and to those of
    the other direction, read backwards; a match weighs s^2 exp(-e^2 / 2 sigma^2) with the cosine similarity s of both
    features and the forward-backward error e, and nothing if it leaves the image by more than 0.05. The transform
    that one starts from holds on with a ridge, so that points stay where it sends them if the features say nothing.

    Args:
        features: unit-length features `(B, 2, C, h, w)` of both images.
        affine, tps: `(B, 2, 6)` and `(B, 2, 18)` of T_AB and T_BA.
        temperature, regularization: as in [`match_locally`].

    Returns:
        affine `(B, 2, 6)`, as it was (the identity where it nearly flattens the image), and tps
        `(B, 2, 18)`, float32.
    """
    with maybe_autocast(features.device.type, enabled=False):  # half precision is too coarse for places and sums
        return _fit_mutually(features.float(), affine.float(), tps.float(), temperature, regularization)


def _fit_mutually(
    features: Tensor, affine: Tensor, tps: Tensor, temperature: float, regularization: float
) -> tuple[Tensor, Tensor]:
    batch = features.shape[0]
    end, start = features.flatten(0, 1), features.flip(1).flatten(0, 1)  # T_AB takes points of B
    onward = affine.flatten(0, 1), tps.flatten(0, 1)
    homeward = affine.flip(1).flatten(0, 1), tps.flip(1).flatten(0, 1)
    options: dict[str, Any] = {
        "sigmas": (_FIT_SIGMA,),
        "windows": (_FIT_WINDOW,),
        "temperature": temperature,
        "regularization": regularization,
    }
    grid = make_grid(_FIT_POINTS, _FIT_POINTS, device=affine.device, dtype=affine.dtype).reshape(1, -1, 2)
    grid = grid.expand(2 * batch, -1, -1)
    there = match_locally(start, end, grid, *onward, **options)
    back = match_locally(end, start, there.clamp(-1, 1), *homeward, **options)
    error = (back - grid).square().sum(-1)
    likeness = similarities(start, end, grid, there).clamp(0, 1)
    weights = likeness.square() * torch.exp(-error / (2 * _FIT_ERROR_SIGMA**2)) * inside(there, margin=_FIT_MARGIN)

    def reverse(of_pairs: Tensor) -> Tensor:
        return of_pairs.unflatten(0, (batch, 2)).flip(1).flatten(0, 1)

    basis = tps_basis(grid, regularization=regularization)
    first = apply_cascade(grid, *onward, regularization=regularization)
    rows = torch.cat((basis, tps_basis(reverse(there), regularization=regularization), basis), dim=1)
    places = torch.cat((there, grid, first), dim=1)
    shares = torch.cat((weights, reverse(weights), torch.full_like(weights, _FIT_RIDGE)), dim=1).unsqueeze(-1)
    weighted = (shares * rows).transpose(1, 2)
    moved = _solve_definite(weighted @ rows, weighted @ places)  # (2B, 9, 2): where the control points go

    matrix = onward[0].unflatten(-1, (2, 3))
    flat = (matrix[:, 0, 0] * matrix[:, 1, 1] - matrix[:, 0, 1] * matrix[:, 1, 0]).abs() < _FIT_DETERMINANT
    kept = torch.where(flat[:, None], identity_affine(1, device=matrix.device, dtype=matrix.dtype), matrix.flatten(1))
    a, b, x, c, d, y = kept.unsqueeze(1).unbind(-1)
    across, down = moved[..., 0] - x, moved[..., 1] - y
    control = torch.stack((d * across - b * down, a * down - c * across), dim=1) / (a * d - b * c).unsqueeze(1)
    return kept.unflatten(0, (batch, 2)), control.flatten(1).unflatten(0, (batch, 2))


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
