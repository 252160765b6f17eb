"""The average of a collection: every image warped onto one of them, and their mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..collection import Collection
from ..errors import InputError
from ..geometry import resize_masks, warp
from .collection_transforms import CollectionMatches, match_collection

if TYPE_CHECKING:
    from ..image_processing_macosnet import MaCoSNetImageProcessor
    from ..modeling_macosnet import MaCoSNetForKeypointMatching

_ALL_PAIRS_UP_TO = 30  # images; of more, each is matched with its neighbours
_BACKGROUND_WEIGHT = 0.02  # so that the surroundings of the object are a faint mean of themselves


def repaired_matches(collection: Collection) -> CollectionMatches:
    """What the direct transforms of two or more images and the ways round through others agree on."""
    graph = "all" if len(collection) <= _ALL_PAIRS_UP_TO else "neighbours"
    return match_collection(collection, graph=graph).repaired()


@torch.inference_mode()
def aligned_average(
    images: Sequence[Image.Image],
    probabilities: np.ndarray,
    reference: int,
    *,
    model: MaCoSNetForKeypointMatching,
    processor: MaCoSNetImageProcessor,
    collection: Collection | None = None,
    matches: CollectionMatches | None = None,
    side: int = 480,
    progress: Callable[[int, int], None] | None = None,
) -> Image.Image:
    """The mean of images after each is warped onto a reference, where each shows the object.

    Each is warped by what the direct transform and the ways round through other images agree on (see
    [`CollectionMatches.repaired`]).

    Args:
        images: N upright RGB images.
        probabilities: `(N, S, S)` soft masks, as of a [`~macosnet_hf.collection.CollectionResult`].
        reference: index of the image that the others are warped onto; its frame is the result's.
        collection: of these images in this order, where they are encoded already.
        matches: of these images in this order, where there are [`repaired_matches`] already.
        side: longer side of the result in pixels, at most that of the reference.
        progress: called with (done, total) after each image.

    Returns:
        RGB; white where none of the images shows the object.

    Raises:
        InputError: if the reference is none of the images, or the masks are not as many.
    """
    if not 0 <= reference < len(images) or len(probabilities) != len(images):
        raise InputError(
            f"The reference must be one of the {len(images)} images, each with a mask; got {reference} and "
            f"{len(probabilities)} masks."
        )
    if matches is None and len(images) > 1:
        if collection is None:
            collection = Collection(model, processor)
            collection.add(images)
        matches = repaired_matches(collection)
    target = images[reference].copy()
    target.thumbnail((side, side))
    size = (target.height, target.width)
    total = torch.zeros(1, 3, *size)
    weights = torch.zeros(1, 1, *size)
    for number, image in enumerate(images):
        if progress is not None:
            progress(number + 1, len(images))
        mask = torch.from_numpy(probabilities[number])[None, None]
        if matches is None or number == reference:
            pixels = _as_tensor(target)
            shown = resize_masks(mask[0], size)[None] + _BACKGROUND_WEIGHT
        else:
            transform = matches.transforms[number : number + 1, reference]
            if not torch.isfinite(transform.affine).all():  # nothing leads there
                continue
            network = model.config.image_size
            grid = transform.grid(size, network)
            small = image.copy()
            small.thumbnail((side, side))
            pixels = warp(_as_tensor(small), grid, side=network)
            shown = warp(mask + _BACKGROUND_WEIGHT, grid, side=network)
        total += pixels * shown
        weights += shown
    mean = total / weights.clamp(min=1e-6)
    present = (1.5 * weights / len(images)).clamp(0, 1)
    blended = mean * present + 255 * (1 - present)
    return Image.fromarray(blended[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy())


def _as_tensor(image: Image.Image) -> Tensor:
    """`(1, 3, H, W)` float32, 0 to 255."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1)[None]
