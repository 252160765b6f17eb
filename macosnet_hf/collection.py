"""N photographs of the same kind of object at once: each is encoded once and segmented with several partners."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .errors import InputError
from .modeling_macosnet import MaCoSNetFeatures, correlate
from .refinement import refine_mask

if TYPE_CHECKING:
    from .image_processing_macosnet import MaCoSNetImageProcessor
    from .modeling_macosnet import MaCoSNetForKeypointMatching


@dataclass
class CollectionResult:
    """Masks of a collection, in the order of the photographs.

    Attributes:
        probabilities: `(N, S, S)` soft masks at the network's resolution, averaged over each photograph's partners.
        partners: the indices of each photograph's partners, most alike first.
        agreement: `(N,)` mean cosine similarity of each photograph's feature to those of its partners, in [-1, 1];
            the odd one out has the smallest.
    """

    probabilities: np.ndarray
    partners: list[list[int]]
    agreement: np.ndarray


def choose_partners(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """For each of N pictures the `count` others that are most alike in their pooled features.

    Args:
        features: `(N, C, h, w)`.
        count: partners of each, at most N - 1.

    Returns:
        indices `(N, count)` and cosine similarities `(N, count)`.
    """
    pooled = F.normalize(features.float().mean(dim=(2, 3)), dim=1)
    similarity = pooled @ pooled.t()
    similarity.fill_diagonal_(-2)
    best = similarity.topk(min(count, len(pooled) - 1), dim=1)
    return best.indices, best.values


@torch.inference_mode()
def segment_collection(
    photos: Sequence[Image.Image],
    *,
    model: MaCoSNetForKeypointMatching,
    processor: MaCoSNetImageProcessor,
    partners: int = 4,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> CollectionResult:
    """Soft masks of the object that N photographs have in common.

    Every photograph goes through the encoder once. Its mask is the mean of the masks that the decoder gives it
    together with each of its partners, so the answer does not depend on the order of the photographs.

    Args:
        photos: two or more upright RGB pictures.
        partners: how many others each photograph is compared with.
        batch_size: pictures or pairs in one pass.
        progress: called with (done, total) after each photograph.

    Raises:
        InputError: for fewer than two photographs.
    """
    if len(photos) < 2:
        raise InputError("Co-segmentation needs two or more photographs.")
    base = model.macosnet
    parts = []
    for start in range(0, len(photos), batch_size):
        pixels = processor.preprocess_views(list(photos)[start : start + batch_size], return_tensors="pt")[
            "pixel_values"
        ]
        parts.append(base.get_image_features(pixels.to(model.device)))
    features = MaCoSNetFeatures(
        last=torch.cat([part.last for part in parts]),
        normalized=torch.cat([part.normalized for part in parts]),
        skips=tuple(torch.cat(maps) for maps in zip(*(part.skips for part in parts), strict=True)),
    )
    indices, similarity = choose_partners(features.last, partners)
    masks = []
    for number, chosen in enumerate(indices):
        source = features.normalized[chosen]
        correlation = correlate(source, features.normalized[number].expand_as(source))
        index = torch.zeros(len(chosen), dtype=torch.long, device=correlation.device)
        logits = base.predict_masks(features.select([number]), correlation, index)
        masks.append(logits.float().sigmoid().mean(dim=0).cpu())
        if progress is not None:
            progress(number + 1, len(photos))
    return CollectionResult(
        probabilities=torch.stack(masks).numpy(),
        partners=indices.tolist(),
        agreement=similarity.mean(dim=1).cpu().numpy(),
    )


def refined_masks(
    photos: Sequence[Image.Image], probabilities: np.ndarray, refine: str = "grabcut"
) -> Iterator[np.ndarray]:
    """Hard masks `(H, W)` of the photographs in their own size, one at a time, from soft masks `(N, S, S)`."""
    for photo, probability in zip(photos, probabilities, strict=True):
        soft = F.interpolate(
            torch.from_numpy(probability)[None, None],
            size=(photo.height, photo.width),
            mode="bilinear",
            align_corners=True,
        )
        yield refine_mask(photo, soft[0, 0].clamp(0, 1).numpy(), refine)
