"""Composites: images with objects of two or three classes, of which partners say which one is meant.

Objects stand side by side, or they are cut out by their masks and pasted onto a background; of two, one may stay where
it is. Training and the protocol `which-object` make their images here.

Everything is batched tensor code on the device of its input; all randomness comes from the generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..geometry import Transform, warp

_SIDE_BY_SIDE_SHARE = 0.55
_VERTICAL_CUT_SHARE = 0.75
_CUT_REACH = 0.3  # the cut between two halves lies within this distance of the middle, normalised coordinates
_WINDOW = (0.5, 0.85)  # what a half shows of its image, as a share of the side across the cut
_IN_PLACE_SHARE = 0.5  # of the pasted composites, how many leave the first object in its own image
_OBJECT_SIZE = (0.25, 0.55)  # half the longer side of a pasted object, normalised coordinates
_OBJECT_PLACE = (0.25, 0.6)  # its distance from the middle, to the left or to the right
_OBJECT_HEIGHT = (-0.4, 0.4)  # and its height
_NARROW_WINDOW = (0.35, 0.6)  # of three in a row
_SMALL_OBJECT = (0.2, 0.35)  # of three pasted objects
_JITTER = (-0.1, 0.1)  # of the cuts between three in a row
_SEAM = (0.3, 0.7)  # a pasted object is opaque where its mask exceeds the second, transparent below the first


Sample = tuple[Tensor, Tensor]
"""Images `(B, 3, H, W)` in [0, 1] and soft masks `(B, H, W)` of their objects."""


@dataclass
class Composites:
    """Images with N objects each.

    Attributes:
        images: `(B, 3, H, W)` in [0, 1].
        masks: `(B, N, H, W)` soft masks of what is visible of each object.
    """

    images: Tensor
    masks: Tensor


def uniform(generator: torch.Generator, count: int, limits: tuple[float, float], device: torch.device) -> Tensor:
    """`(count,)` numbers, drawn on the generator's device, so that runs on CPU and GPU make the same composites."""
    low, high = limits
    return (torch.rand(count, generator=generator, device=generator.device) * (high - low) + low).to(device)


def _chance(generator: torch.Generator, count: int, share: float, device: torch.device) -> Tensor:
    return uniform(generator, count, (0, 1), device) < share


def _sign(generator: torch.Generator, count: int, device: torch.device) -> Tensor:
    return torch.where(_chance(generator, count, 0.5, device), 1.0, -1.0)


def object_boxes(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Centres and half sides, `(B, 2)` each as (x, y) in normalised coordinates, of the boxes around objects.

    Args:
        masks: `(B, H, W)`; the object is where they exceed 0.5. An empty mask has the whole image as its box.
    """
    inside = masks > 0.5
    lows, highs = [], []
    for present in (inside.any(dim=1), inside.any(dim=2)):  # columns, rows
        count = present.shape[1]
        place = torch.linspace(-1, 1, count, device=masks.device).expand_as(present)
        found = present.any(dim=1)
        low = torch.where(present, place, 2.0).amin(dim=1)
        high = torch.where(present, place, -2.0).amax(dim=1)
        lows.append(torch.where(found, low, -1.0))
        highs.append(torch.where(found, high, 1.0))
    low, high = torch.stack(lows, dim=1), torch.stack(highs, dim=1)
    return (low + high) / 2, (high - low) / 2


def _moved(images: Tensor, masks: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Images and masks after `old = scale * new + shift`, `(B, 2)` both as (x, y) in normalised coordinates."""
    zero = torch.zeros_like(scale[:, 0])
    affine = torch.stack((scale[:, 0], zero, shift[:, 0], zero, scale[:, 1], shift[:, 1]), dim=1)
    grid = Transform(affine).grid(images.shape[-2:])
    moved = warp(masks.unsqueeze(1), grid)
    return warp(images, grid, padding_mode="reflection"), moved.squeeze(1)


def side_by_side(first: Sample, second: Sample, generator: torch.Generator) -> Composites:
    """Two windows, each around the object of its image, on both sides of a cut through the middle."""
    count, device = len(first[0]), first[0].device
    vertical = _chance(generator, count, _VERTICAL_CUT_SHARE, device)
    before = _chance(generator, count, 0.5, device)  # whether the first image lies to the left of the cut, or above it
    cut = uniform(generator, count, (-_CUT_REACH, _CUT_REACH), device)
    low = torch.stack((torch.where(before, -1.0, cut), torch.where(before, cut, -1.0)))
    high = torch.stack((torch.where(before, cut, 1.0), torch.where(before, 1.0, cut)))
    return _windows((first, second), vertical, low, high, _WINDOW, generator)


def in_a_row(objects: Sequence[Sample], generator: torch.Generator) -> Composites:
    """Three or more windows of about equal width, each around the object of its image, in a random order."""
    count, device, number = len(objects[0][0]), objects[0][0].device, len(objects)
    vertical = _chance(generator, count, _VERTICAL_CUT_SHARE, device)
    place = _order(generator, number, count, device)
    inner = [2 * k / number - 1 + uniform(generator, count, _JITTER, device) for k in range(1, number)]
    edges = torch.stack((torch.full((count,), -1.0, device=device), *inner, torch.ones(count, device=device)))
    return _windows(objects, vertical, edges.gather(0, place), edges.gather(0, place + 1), _NARROW_WINDOW, generator)


def _order(generator: torch.Generator, number: int, count: int, device: torch.device) -> Tensor:
    """`(number, count)`: which place each of the objects has, a random permutation in each column."""
    return uniform(generator, number * count, (0, 1), device).view(number, count).argsort(dim=0)


def _windows(
    objects: Sequence[Sample],
    vertical: Tensor,
    low: Tensor,
    high: Tensor,
    share: tuple[float, float],
    generator: torch.Generator,
) -> Composites:
    """Images that show, between two cuts, a window around the object of each of N others.

    Args:
        objects: N of them.
        vertical: `(B,)` bool, whether the cuts are; else they are horizontal.
        low, high: `(N, B)` the cuts on both sides of each window, normalised coordinates.
        share: limits of what a window shows of its image across the cuts.
    """
    (height, width), device = objects[0][0].shape[-2:], vertical.device
    across = torch.stack((vertical, ~vertical), dim=1)  # of x and y: the one that the cuts divide
    x, y = torch.linspace(-1, 1, width, device=device), torch.linspace(-1, 1, height, device=device)
    place = torch.where(vertical[:, None, None], x[None, None, :], y[None, :, None])
    scene, shown = torch.zeros_like(objects[0][0]), []
    for (pixels, masks), start, end in zip(objects, low, high, strict=True):
        centre, _ = object_boxes(masks)
        window = uniform(generator, len(masks), share, device).unsqueeze(1)
        middle, half = ((start + end) / 2).unsqueeze(1), ((end - start) / 2).unsqueeze(1)
        scale = torch.where(across, window / half, 1.0)
        scale = scale * torch.stack((_sign(generator, len(masks), device), torch.ones_like(start)), dim=1)
        target = torch.where(across, centre.clamp(-1, 1).clamp(window - 1, 1 - window), 0.0)
        moved, moved_mask = _moved(pixels, masks, scale, target - scale * torch.where(across, middle, 0.0))
        last = (end == 1)[:, None, None]
        inside = (place >= start[:, None, None]) & ((place < end[:, None, None]) | last)
        scene = torch.where(inside.unsqueeze(1), moved, scene)
        shown.append(moved_mask * inside)
    return Composites(scene, torch.stack(shown, dim=1))


def pasted(first: Sample, second: Sample, backgrounds: Tensor, generator: torch.Generator) -> Composites:
    """The second object pasted beside the first, which stays in its image or is pasted onto a background as well.

    Args:
        first, second: the objects.
        backgrounds: `(B, 3, H, W)` in [0, 1].
    """
    images, masks = first
    count, device = len(images), images.device
    side = _sign(generator, count, device)
    in_place = _chance(generator, count, _IN_PLACE_SHARE, device)[:, None, None]
    view = torch.stack((_sign(generator, count, device), torch.ones(count, device=device)), dim=1)
    base, base_mask = _moved(images, masks, view, torch.zeros_like(view))
    cut, cut_mask = _object_at(first, side, _OBJECT_PLACE, _OBJECT_SIZE, generator)
    other, other_mask = _object_at(second, -side, _OBJECT_PLACE, _OBJECT_SIZE, generator)
    soft, other_soft = _opacity(cut_mask).unsqueeze(1), _opacity(other_mask).unsqueeze(1)
    scene = torch.where(in_place.unsqueeze(1), base, backgrounds * (1 - soft) + cut * soft)
    scene = scene * (1 - other_soft) + other * other_soft
    own_mask = torch.where(in_place, base_mask, cut_mask) * (1 - other_soft.squeeze(1))
    return Composites(scene, torch.stack((own_mask, other_mask), dim=1))


def scattered(objects: Sequence[Sample], backgrounds: Tensor, generator: torch.Generator) -> Composites:
    """Three objects pasted onto a background, to the left, in the middle and to the right, in a random order."""
    count, device = len(backgrounds), backgrounds.device
    middle = _order(generator, len(objects), count, device) - 1.0
    scene, shown = backgrounds, torch.zeros(count, 0, *backgrounds.shape[-2:], device=device)
    for given, side in zip(objects, middle, strict=True):
        cut, mask = _object_at(given, side, _OBJECT_PLACE, _SMALL_OBJECT, generator)
        soft = _opacity(mask).unsqueeze(1)
        scene = scene * (1 - soft) + cut * soft
        shown = torch.cat((shown * (1 - soft), mask.unsqueeze(1)), dim=1)
    return Composites(scene, shown)


def _object_at(
    given: Sample, side: Tensor, place: tuple[float, float], size: tuple[float, float], generator: torch.Generator
) -> Sample:
    """Images moved so that their object has a random size and lies to the left (-1), in the middle (0) or to the right
    (1)."""
    images, masks = given
    count, device = len(images), images.device
    centre, half = object_boxes(masks)
    zoom = half.amax(dim=1).clamp(min=0.1) / uniform(generator, count, size, device)
    goal = torch.stack(
        (side * uniform(generator, count, place, device), uniform(generator, count, _OBJECT_HEIGHT, device)), dim=1
    )
    scale = torch.stack((zoom * _sign(generator, count, device), zoom), dim=1)
    return _moved(images, masks, scale, centre - scale * goal)


def _opacity(masks: Tensor) -> Tensor:
    return ((masks - _SEAM[0]) / (_SEAM[1] - _SEAM[0])).clamp(0, 1)


def compose(first: Sample, second: Sample, backgrounds: Tensor, generator: torch.Generator) -> Composites:
    """Composites of two objects of both kinds, chosen at random for each row; arguments as in [`pasted`]."""
    beside, onto = side_by_side(first, second, generator), pasted(first, second, backgrounds, generator)
    rows = _chance(generator, len(first[0]), _SIDE_BY_SIDE_SHARE, first[0].device)[:, None, None, None]
    return Composites(
        torch.where(rows, beside.images, onto.images),
        torch.where(rows, beside.masks, onto.masks),
    )


__all__ = ["Composites", "compose", "in_a_row", "object_boxes", "pasted", "scattered", "side_by_side"]
