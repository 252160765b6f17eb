"""The second pass on crops: images with small objects are cropped to them, and masks found and refined there.

The module travels with the model to the Hub; [`~.collection.Collection.segment`] puts the steps together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .hints import PlacedHint
from .mask_sharing import (
    NetworkMasks,
    drop_small_components,
    fix_hints,
    propagate_refined,
    refine_masks,
    wanted_cells,
)

# The second pass on crops: the object's box, wider by this share of its sides on each side, is cropped where it covers
# no more than that share of the image; no side of it is shorter than 0.4 of the image's. Chosen on msrc-coseg.
_MARGIN = 0.2
_LARGEST_CROP = 0.7
_SHORTEST_CROP = 0.4

Box = tuple[int, int, int, int]  # left, top, right, bottom, in cells of a mask; right and bottom excluded


class Crops(NamedTuple):
    """N images of which those with small objects are cropped.

    Attributes:
        images: crops and whole images.
        boxes: where the crops lie; None for a whole image.
        masks: of `images`.
        hints: by the number of the image, in shares of `images`.
    """

    images: Sequence[Image.Image]
    boxes: Sequence[Box | None]
    masks: NetworkMasks
    hints: Mapping[int, PlacedHint] = {}


def crop_to_objects(
    whole: Crops, look_at: Callable[[Sequence[Box | None]], tuple[Sequence[Image.Image], NetworkMasks]]
) -> Crops:
    """The second pass: images with small objects cropped to them, and the masks that the network gives then.

    Args:
        whole: the images without boxes, and their masks of the first pass.
        look_at: crops the images to boxes, and returns them and their masks. It is called again without the boxes in
            which no object is found.
    """
    boxes = object_boxes(whole.masks.propagated, whole.hints)
    while any(boxes):
        images, found = look_at(boxes)
        with_object = boxes_with_object(boxes, found.propagated)
        if with_object == boxes:
            return Crops(images, boxes, found, crop_hints(whole.hints, boxes, found.own.shape[-1]))
        boxes = with_object
    return whole


def refine_crops(
    crops: Crops,
    method: str,
    *,
    workers: int = 2,
    progress: Callable[[int], None] | None = None,
    hints: Mapping[int, PlacedHint] | None = None,
) -> Tensor:
    """Soft masks `(N, S, S)` of whole images, refined by their colours and propagated, without small components.

    Args:
        crops: see [`crop_to_objects`].
        method, workers, progress: as in [`~.mask_sharing.refine_masks`].
        hints: by the number of the image, in shares of whole images.
    """
    hints = hints or {}
    masks = refine_masks(
        crops.images, crops.masks.propagated, method, workers=workers, progress=progress, hints=crops.hints
    )
    if crops.masks.cells is not None:
        masks = propagate_refined(crops.masks.own, masks, crops.masks.cells)
    masks = drop_small_components(paste_masks(masks, crops.boxes), wanted_cells(masks, hints))
    return fix_hints(masks, hints)


def object_boxes(masks: Tensor, hints: Mapping[int, PlacedHint] | None = None) -> list[Box | None]:
    """The box of each image's object, with a margin, where that is small enough for a second pass.

    Args:
        masks: `(N, S, S)` in [0, 1].
        hints: whose included points lie in the boxes, by the number of the image.

    Returns:
        N boxes; None where the object fills the image, or there is none.
    """
    side = masks.shape[-1]
    inside = fix_hints(masks, hints or {}) >= 0.5
    ends = []
    for along in (inside.any(dim=1), inside.any(dim=2)):  # columns, rows
        first = along.int().argmax(dim=1)
        last = side - along.flip(1).int().argmax(dim=1)
        length = ((last - first) * (1 + 2 * _MARGIN)).clamp(_SHORTEST_CROP * side, side)
        start = ((first + last - length) / 2).clamp(min=0).minimum(side - length)
        ends.append((start.floor().int(), (start + length).ceil().int()))
    (left, right), (top, bottom) = ends
    small = (right - left) * (bottom - top) <= _LARGEST_CROP * side**2
    worth = (small & inside.flatten(1).any(dim=1)).tolist()
    boxes = torch.stack((left, top, right, bottom), dim=1).tolist()
    return [(box[0], box[1], box[2], box[3]) if use else None for box, use in zip(boxes, worth, strict=True)]


def shares_of(box: Box, side: int) -> tuple[float, float, float, float]:
    """A box of a mask `(side, side)` in shares of the image."""
    left, top, right, bottom = (value / side for value in box)
    return left, top, right, bottom


def crop_hints(hints: Mapping[int, PlacedHint], boxes: Sequence[Box | None], side: int) -> dict[int, PlacedHint]:
    """Hints of whole images in shares of their crops, whose boxes are those of masks `(side, side)`."""
    moved = {}
    for number, hint in hints.items():
        box = boxes[number]
        moved[number] = hint if box is None else hint.cropped(shares_of(box, side))
    return moved


def boxes_with_object(boxes: Sequence[Box | None], masks: Tensor) -> list[Box | None]:
    """The boxes without those in which the second pass found no object, by the masks `(N, S, S)` of the crops."""
    found = (masks >= 0.5).flatten(1).any(dim=1).tolist()
    return [box if there else None for box, there in zip(boxes, found, strict=True)]


def crop_to_box(image: Image.Image, box: Box | None, side: int) -> Image.Image:
    """The part of an image within a box of its mask `(side, side)`; the image itself without a box.

    The box seldom ends between two pixels of the image. The crop does not round it: the mask of the crop is pasted
    into the box, and would be off by as much.
    """
    if box is None:
        return image
    left, right = (value * image.width / side for value in box[::2])
    top, bottom = (value * image.height / side for value in box[1::2])
    size = (max(1, round(right - left)), max(1, round(bottom - top)))
    return image.resize(size, Image.Resampling.BICUBIC, box=(left, top, right, bottom))


def paste_masks(masks: Tensor, boxes: Sequence[Box | None]) -> Tensor:
    """Masks of cropped images as masks of whole ones, 0 outside the box: `(N, S, S)` both; those without a box stay.

    The cells of a mask are areas here, as in the processor's resizing.
    """
    if not any(boxes):
        return masks
    whole = masks.clone()
    for number, box in enumerate(boxes):
        if box is not None:
            left, top, right, bottom = box
            whole[number] = 0
            whole[number, top:bottom, left:right] = F.interpolate(
                masks[number][None, None], size=(bottom - top, right - left), mode="bilinear", antialias=True
            )[0, 0]
    return whole
