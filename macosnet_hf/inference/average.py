"""The average of a collection: every photograph bent onto one of them, and their mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..collection import Collection
from ..errors import InputError
from ..geometry import sampling_grid, warp
from .collection_transforms import match_collection

if TYPE_CHECKING:
    from ..image_processing_macosnet import MaCoSNetImageProcessor
    from ..modeling_macosnet import MaCoSNetForKeypointMatching

_ALL_PAIRS_UP_TO = 30  # photographs; of more, each is matched with its neighbours
_BACKGROUND_WEIGHT = 0.02  # so that the surroundings of the object are a faint mean of themselves


@torch.inference_mode()
def aligned_average(
    photos: Sequence[Image.Image],
    probabilities: np.ndarray,
    reference: int,
    *,
    model: MaCoSNetForKeypointMatching,
    processor: MaCoSNetImageProcessor,
    collection: Collection | None = None,
    side: int = 480,
    progress: Callable[[int, int], None] | None = None,
) -> Image.Image:
    """The mean of photographs after each is bent onto a reference, where each shows the object.

    Each is bent by what the direct transform and the ways round through other photographs agree on (see
    [`CollectionMatches.repaired`]).

    Args:
        photos: N upright RGB pictures.
        probabilities: `(N, S, S)` soft masks, as of a [`~macosnet_hf.collection.CollectionResult`].
        reference: index of the photograph that the others are bent onto; its frame is the result's.
        collection: of these photographs in this order, where they are encoded already.
        side: longer side of the result in pixels, at most that of the reference.
        progress: called with (done, total) after each photograph.

    Returns:
        RGB; white where none of the photographs shows the object.

    Raises:
        InputError: if the reference is none of the photographs, or the masks are not as many.
    """
    if not 0 <= reference < len(photos) or len(probabilities) != len(photos):
        raise InputError(
            f"The reference must be one of the {len(photos)} photographs, each with a mask; got {reference} and "
            f"{len(probabilities)} masks."
        )
    repaired = None
    if len(photos) > 1:
        if collection is None:
            collection = Collection(model, processor)
            collection.add(photos)
        graph = "all" if len(photos) <= _ALL_PAIRS_UP_TO else "neighbours"
        repaired = match_collection(collection, graph=graph).repaired()
    target = photos[reference].copy()
    target.thumbnail((side, side))
    size = (target.height, target.width)
    total = torch.zeros(1, 3, *size)
    weights = torch.zeros(1, 1, *size)
    for number, photo in enumerate(photos):
        if progress is not None:
            progress(number + 1, len(photos))
        mask = torch.from_numpy(probabilities[number])[None, None]
        if repaired is None or number == reference:
            picture = _as_tensor(target)
            shown = F.interpolate(mask, size=size, mode="bilinear", align_corners=True) + _BACKGROUND_WEIGHT
        else:
            affine, tps = repaired.affine[number, reference], repaired.tps[number, reference]
            if not torch.isfinite(affine).all():  # nothing leads there
                continue
            grid = sampling_grid(affine[None], tps[None], size=size, regularization=model.config.tps_regularization)
            small = photo.copy()
            small.thumbnail((side, side))
            picture, shown = warp(_as_tensor(small), grid), warp(mask + _BACKGROUND_WEIGHT, grid)
        total += picture * shown
        weights += shown
    mean = total / weights.clamp(min=1e-6)
    present = (1.5 * weights / len(photos)).clamp(0, 1)
    blended = mean * present + 255 * (1 - present)
    return Image.fromarray(blended[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy())


def _as_tensor(photo: Image.Image) -> Tensor:
    """`(1, 3, H, W)` float32, 0 to 255."""
    return torch.from_numpy(np.asarray(photo, dtype=np.float32)).permute(2, 0, 1)[None]
