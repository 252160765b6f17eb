"""Hints: what a person says of the object in one image, by points or a box, as evidence about the cells of all images.

The module travels with the model to the Hub; [`~.collection.Collection.segment`] takes hints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .common_object import CENTRE_SIGMA
from .encoded_images import FeatureMaps
from .errors import InputError
from .geometry import normalize_points, relative_points

Point = tuple[float, float]
Rectangle = tuple[float, float, float, float]  # left, top, right, bottom

# Chosen on msrc-coseg in collections of eight, with one automatic click in each (benchmarks/hints.py): the cosine
# similarity to a hinted point above which cells of the same image are of one kind with it (a threshold by Otsu's method
# is worse), and the difference that counts as one unit of evidence.
_LEAST_SIMILARITY = 0.35
_SOFTNESS = 0.06
_LARGEST_EVIDENCE = 3.0  # units, either way
# In a box without points the evidence falls from the sum of both in the middle to less than nothing at the border.
_BOX_EVIDENCE, _BOX_OFFSET = 2.0, -0.5
# Cells of other images ask the cells of hinted images that resemble them, with this temperature, how far the hint has
# changed them; a change by so much is one unit of evidence, and less than some counts as none.
_TEMPERATURE = 0.1
_CHANGE = 0.3
_LEAST_CHANGE = 0.09
# What a unit of evidence adds to the log-odds of a mask: of the hinted images, and of the others. Of 222 good masks of
# the others 4 lose more than 0.05 of their J; with the second at 0.7 and no least change 5, and their mean J is 0.877
# instead of 0.881.
_OWN_WEIGHT, _OTHERS_WEIGHT = 2.0, 0.8
_LEAST_PROBABILITY = 0.02  # the network may be so sure, no surer
# Radius of the disc around a point in which the label is fixed, as a share of the image's longer side.
_RADIUS = 0.012


@dataclass(frozen=True)
class Hint:
    """What a person says of the object in one image, in pixels of the upright image (docs/coordinates.md).

    Attributes:
        include: points (x, y) on the object.
        exclude: points (x, y) that do not belong to it.
        box: (left, top, right, bottom) around it; a box may reach beyond the image.
    """

    include: Sequence[Point] = ()
    exclude: Sequence[Point] = ()
    box: Rectangle | None = None

    def place(self, size: tuple[int, int], name: str) -> PlacedHint:
        """The hint in shares of its image.

        Args:
            size: (width, height) of the image.
            name: what errors call the image.

        Raises:
            InputError: if it says nothing, or for a point outside of the image or on both lists, a box without area
                in the image, or an included point outside of the box.
        """
        both = [_points(points, size, name) for points in (self.include, self.exclude)]
        if clash := {_pixel(point) for point in both[0]} & {_pixel(point) for point in both[1]}:
            column, row = min(clash)
            raise InputError(f"The point {column},{row} of {name} is both included and excluded.")
        box = None if self.box is None else _box(self.box, size, name)
        if box is None and not any(both):
            raise InputError(f"The hint for {name} says nothing; give a point or a box.")
        for x, y in both[0]:
            if box is not None and not (box[0] <= x <= box[2] and box[1] <= y <= box[3]):
                raise InputError(f"The included point {x:g},{y:g} of {name} lies outside of the box.")
        shares = [tuple(((x + 0.5) / size[0], (y + 0.5) / size[1]) for x, y in points) for points in both]
        if box is not None:
            # A box holds the whole of the pixels at its corners.
            box = (box[0] / size[0], box[1] / size[1], (box[2] + 1) / size[0], (box[3] + 1) / size[1])
        return PlacedHint(shares[0], shares[1], box)


def _numbers(values: Sequence[float], count: int, what: str) -> tuple[float, ...]:
    try:
        found = tuple(float(value) for value in values)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{what} must be {count} numbers; got {values!r}.") from error
    if len(found) != count or not all(map(math.isfinite, found)):
        raise InputError(f"{what} must be {count} finite numbers; got {values!r}.")
    return found


def _points(points: Sequence[Point], size: tuple[int, int], name: str) -> list[Point]:
    checked = []
    try:
        several = list(points)
    except TypeError as error:
        raise InputError(f"The points of a hint must be a list of (x, y); got {points!r}.") from error
    for point in several:
        x, y = _numbers(point, 2, "A point of a hint")
        if not (0 <= x <= size[0] - 1 and 0 <= y <= size[1] - 1):
            raise InputError(f"The point {x:g},{y:g} lies outside of {name}, which is {size[0]}x{size[1]} pixels.")
        checked.append((x, y))
    return checked


def _box(box: Rectangle, size: tuple[int, int], name: str) -> Rectangle:
    """The box within the image."""
    left, top, right, bottom = _numbers(box, 4, "The box of a hint")
    if right <= left or bottom <= top:
        raise InputError(f"The box {left:g},{top:g},{right:g},{bottom:g} of {name} has no area.")
    left, top = max(left, 0.0), max(top, 0.0)
    right, bottom = min(right, size[0] - 1.0), min(bottom, size[1] - 1.0)
    if right <= left or bottom <= top:
        raise InputError(f"The box of {name} lies outside of the image, which is {size[0]}x{size[1]} pixels.")
    return left, top, right, bottom


def _pixel(point: Point) -> tuple[int, int]:
    return math.floor(point[0] + 0.5), math.floor(point[1] + 0.5)


class PlacedHint(NamedTuple):
    """A hint in shares of its image: 0 and 1 are the outer edges.

    Attributes:
        include, exclude: points (x, y).
        box: (left, top, right, bottom), or None.
    """

    include: tuple[Point, ...]
    exclude: tuple[Point, ...]
    box: Rectangle | None

    def mirrored(self) -> PlacedHint:
        """The same on the mirror image."""
        include, exclude = (tuple((1 - x, y) for x, y in points) for points in self[:2])
        box = self.box and (1 - self.box[2], self.box[1], 1 - self.box[0], self.box[3])
        return PlacedHint(include, exclude, box)

    def cropped(self, box: Rectangle) -> PlacedHint:
        """The same in a crop, whose box is in shares of the image; what lies outside of it is outside of 0 to 1."""
        left, top, right, bottom = box

        def move(x: float, y: float) -> Point:
            return (x - left) / (right - left), (y - top) / (bottom - top)

        include, exclude = (tuple(move(*point) for point in points) for points in self[:2])
        return PlacedHint(include, exclude, self.box and (*move(*self.box[:2]), *move(*self.box[2:])))

    def labels(self, size: tuple[int, int]) -> np.ndarray:
        """What the hint fixes in an image of `size` (height, width): `(H, W)` int8, 1 object, -1 background, 0 open.

        The pixels around each point have its label; outside of the box is background.
        """
        height, width = size
        x, y = (np.arange(width) + 0.5)[None], (np.arange(height) + 0.5)[:, None]
        found = np.zeros(size, np.int8)
        if self.box is not None:
            left, top, right, bottom = self.box
            inside = (x >= left * width) & (x <= right * width) & (y >= top * height) & (y <= bottom * height)
            found[~inside] = -1
        radius = max(0.75, _RADIUS * max(size))
        # The nearest point decides where two discs meet.
        nearest = np.full(size, radius**2)
        for label, points in ((1, self.include), (-1, self.exclude)):
            for column, row in points:
                distance = (x - column * width) ** 2 + (y - row * height) ** 2
                found[distance <= nearest] = label
                nearest = np.minimum(nearest, distance)
        return found


def place_hints(
    hints: Mapping[int, Hint | PlacedHint], sizes: Sequence[tuple[int, int]], names: Sequence[str] | None = None
) -> dict[int, PlacedHint]:
    """Hints in shares of their images, by number.

    Args:
        hints: by the number of the image, from 0; those that are placed already stay as they are.
        sizes: (width, height) of all images.
        names: what errors call them.

    Raises:
        InputError: for an image that is not there, and as [`Hint.place`].
    """
    placed: dict[int, PlacedHint] = {}
    for number, hint in hints.items():
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(sizes):
            raise InputError(f"There is no image {number!r} for a hint; there are {len(sizes)}, counted from 0.")
        if isinstance(hint, PlacedHint):
            placed[number] = hint
        elif isinstance(hint, Hint):
            placed[number] = hint.place(sizes[number], names[number] if names else f"image {number}")
        else:
            raise InputError(f"A hint must be a Hint, not {type(hint).__name__}.")
    return placed


class HintedCells(NamedTuple):
    """What hints say about the cells of feature maps.

    Attributes:
        hints: by the number of the image.
        seeds: of each hinted image, unit-length features at its included points `(P, C)` and excluded ones `(Q, C)`.
        references: `(M, C)` unit-length features of all cells of the hinted images.
        change: `(M,)` how much the hints have changed the network's mask there, in [-1, 1]. A hint that confirms the
            masks changes no other image.
        side: S of the network's input.
    """

    hints: Mapping[int, PlacedHint]
    seeds: Mapping[int, tuple[Tensor, Tensor]]
    references: Tensor
    change: Tensor
    side: int

    @classmethod
    def of(cls, features: Tensor | FeatureMaps, masks: Tensor, hints: Mapping[int, PlacedHint]) -> HintedCells:
        """What hints say, given the images in which they are.

        Args:
            features: `(N, C, h, w)` of whole images.
            masks: `(N, S, S)` the network's own soft masks.
            hints: by the number of the image.
        """
        side = masks.shape[-1]
        unit = {number: F.normalize(features[number].float(), dim=0) for number in hints}
        seeds = {
            number: (sample_cells(unit[number], hint.include, side), sample_cells(unit[number], hint.exclude, side))
            for number, hint in hints.items()
        }
        for number, hint in hints.items():
            seeds[number] = _without_another_object(hint, seeds[number], unit[number], masks[number])
        known = cls(hints, seeds, masks.new_zeros(0), masks.new_zeros(0), side)
        changes = []
        for number, hint in hints.items():
            before = F.interpolate(masks[number][None, None].float(), size=unit[number].shape[-2:], mode="area")[0, 0]
            after = add_evidence(before, known.own_evidence(number, unit[number], hint), _OWN_WEIGHT)
            changes.append((after - before).flatten())
        references = torch.cat([maps.flatten(1).t() for maps in unit.values()])
        return known._replace(references=references, change=torch.cat(changes))

    def own_evidence(self, number: int, cells: Tensor, hint: PlacedHint) -> Tensor:
        """Evidence `(h, w)` in [-3, 3] about the cells of a hinted image.

        Args:
            number: of the image.
            cells: `(C, h, w)` unit-length features of it, or of a crop of it.
            hint: in shares of what the cells show.
        """
        height, width = cells.shape[-2:]
        include, exclude = self.seeds[number]
        evidence = cells.new_zeros(height, width)
        limit = _LEAST_SIMILARITY
        excluded = _best_similarity(cells, exclude).clamp(min=limit) if len(exclude) else evidence + limit
        if len(include):
            evidence = (_best_similarity(cells, include) - excluded) / _SOFTNESS
        elif len(exclude):
            evidence = (limit - excluded) / _SOFTNESS
        if hint.box is not None:
            x, y = (_cell_shares(count, self.side, cells.device) for count in (width, height))
            left, top, right, bottom = hint.box
            across, down = 2 * (x - left) / (right - left) - 1, 2 * (y - top) / (bottom - top) - 1
            if not len(include):
                evidence = evidence + _BOX_EVIDENCE * _gaussian(across, down) + _BOX_OFFSET
            # A cell counts by the share of it that lies in the box.
            share = _overlap(left, right, x)[None] * _overlap(top, bottom, y)[:, None]
            evidence = share * evidence - (1 - share) * _LARGEST_EVIDENCE
        return evidence.clamp(-_LARGEST_EVIDENCE, _LARGEST_EVIDENCE)

    def about(self, features: Tensor | FeatureMaps, boxes: Sequence[Rectangle | None] | None = None) -> Tensor:
        """Evidence `(N, h, w)` in [-3, 3] about the cells of N images, positive for the object.

        A cell of a hinted image is compared with its points; a cell of another image with the cells of the hinted
        images: it changes as those that resemble it, weighted by softmax(s / 0.1) of the cosine similarities s.

        Args:
            features: `(N, C, h, w)`.
            boxes: where the images are crops, in shares of the whole ones; None for a whole image.
        """
        found = []
        for number in range(len(features)):
            own = F.normalize(features[number].float(), dim=0)
            hint = self.hints.get(number)
            if hint is not None:
                box = boxes[number] if boxes else None
                found.append(self.own_evidence(number, own, hint if box is None else hint.cropped(box)))
                continue
            weights = (self.references @ own.flatten(1) / _TEMPERATURE).softmax(dim=0)  # (M, h*w)
            evidence = F.softshrink(self.change @ weights, _LEAST_CHANGE) / _CHANGE
            found.append(evidence.clamp(-_LARGEST_EVIDENCE, _LARGEST_EVIDENCE).view(own.shape[-2:]))
        return torch.stack(found)

    def apply(self, masks: Tensor, evidence: Tensor) -> Tensor:
        """Soft masks `(N, S, S)` with the evidence `(N, h, w)` in them."""
        weights = masks.new_full((len(masks), 1, 1), _OTHERS_WEIGHT)
        weights[list(self.hints)] = _OWN_WEIGHT
        # The cells are the network's own map, as in `propagate_masks`.
        large = F.interpolate(evidence[:, None], size=masks.shape[-2:], mode="bilinear", align_corners=True)[:, 0]
        return add_evidence(masks, large, weights)


def _without_another_object(
    hint: PlacedHint, seeds: tuple[Tensor, Tensor], cells: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Included and excluded features of a hint.

    Where all included points lie outside of the network's mask, and what it shows is of another kind, that is excluded
    too: whoever points at the dog beside a cup does not mean both.

    Args:
        seeds: of the hint.
        cells: `(C, h, w)` unit-length features of its image.
        mask: `(S, S)` the network's own soft mask.
    """
    include, exclude = seeds
    if not len(include) or len(exclude) or hint.box is not None:
        return seeds
    small = F.interpolate(mask[None, None].float(), size=cells.shape[-2:], mode="area")[0, 0]
    shown = small * (small >= 0.5)
    mean = F.normalize((cells * shown).sum(dim=(1, 2)), dim=0)
    rows, columns = (
        (torch.tensor(shares, device=mask.device) * len(mask)).long().clamp(max=len(mask) - 1)
        for shares in zip(*((y, x) for x, y in hint.include), strict=True)
    )
    if not shown.any() or (mask[rows, columns] >= 0.5).any() or float((include @ mean).max()) >= _LEAST_SIMILARITY:
        return seeds
    return include, mean[None]


def add_evidence(masks: Tensor, evidence: Tensor, weight: Tensor | float) -> Tensor:
    """Soft masks whose log-odds have grown by the weighted evidence; all of the same shape."""
    odds = torch.logit(masks.clamp(_LEAST_PROBABILITY, 1 - _LEAST_PROBABILITY))
    return torch.sigmoid(odds + weight * evidence)


def sample_cells(cells: Tensor, points: Sequence[Point], side: int) -> Tensor:
    """Unit-length features `(P, C)` at points of an image, in shares of it.

    Args:
        cells: `(C, h, w)`.
        points: P pairs (x, y).
        side: S of the network's input, at whose corner centres the cells at the corners lie.
    """
    if not points:
        return cells.new_zeros(0, cells.shape[0])
    pixels = torch.tensor(points, dtype=torch.float32, device=cells.device) * side - 0.5
    grid = normalize_points(pixels, (side, side), side)[None, None]
    found = F.grid_sample(cells[None], grid, align_corners=True, padding_mode="border")[0, :, 0]
    return F.normalize(found.t(), dim=1)


def _best_similarity(cells: Tensor, points: Tensor) -> Tensor:
    """`(h, w)` the largest cosine similarity of each cell `(C, h, w)` to points `(P, C)`."""
    return torch.einsum("chw,pc->phw", cells, points).amax(dim=0)


def _gaussian(across: Tensor, down: Tensor) -> Tensor:
    """The centre prior of a box ([`~.common_object.centre_prior`]), at places in it from -1 to 1: `(h, w)`."""
    return torch.exp(-(down[:, None] ** 2 + across[None] ** 2) / (2 * CENTRE_SIGMA**2))


def _cell_shares(count: int, side: int, device: torch.device | None = None) -> Tensor:
    """Where the centres of `count` cells lie, in shares of the image: `(count,)`.

    Args:
        side: S of the network's input, at whose corner centres the first and the last cell lie, as in [`sample_cells`].
    """
    places = torch.linspace(-1, 1, count, device=device) if count > 1 else torch.zeros(1, device=device)
    return relative_points(places, side)


def _overlap(start: float, end: float, centres: Tensor) -> Tensor:
    """The share of each cell that lies between start and end, of the part of it that lies in the image."""
    middles = (centres[1:] + centres[:-1]) / 2
    edges = torch.cat((centres.new_zeros(1), middles, centres.new_ones(1)))
    inside = edges[1:].clamp(max=end) - edges[:-1].clamp(min=start)
    return (inside / (edges[1:] - edges[:-1])).clamp(0, 1)
