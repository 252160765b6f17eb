"""N photographs of the same kind of object at once: each is encoded once and segmented with several partners."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .errors import InputError
from .modeling_macosnet import MaCoSNetFeatures, correlate, l2_normalize
from .refinement import refine_mask

if TYPE_CHECKING:
    from .image_processing_macosnet import MaCoSNetImageProcessor
    from .modeling_macosnet import MaCoSNetForKeypointMatching

# What the skip connections of a collection may take, in bytes: 800 photographs with the lite encoder, 130 with
# ResNet-101. Larger collections are encoded a second time instead.
_SKIP_MEMORY = 1 << 30
_REFINED_PIXELS = 4_000_000


@dataclass
class CollectionResult:
    """Masks of a collection, in the order of the photographs.

    Attributes:
        probabilities: `(N, S, S)` float32 soft masks at the network's resolution, averaged over each photograph's
            partners.
        partners: the indices of each photograph's partners, most alike first.
        agreement: `(N,)` mean cosine similarity of each photograph's pooled feature to those of its partners, in
            [-1, 1]; the odd one out has the smallest.
    """

    probabilities: np.ndarray
    partners: list[list[int]]
    agreement: np.ndarray


def odd_ones_out(agreement: np.ndarray) -> list[int]:
    """The photographs that agree much less than the rest, the oddest first; none of fewer than four.

    Each is compared with the median of the *others*, and is odd if it lies below that by more than 0.15 and by more
    than three times their spread (their median distance from it, as a standard deviation): of 12 collections of
    msrc-coseg, seven photographs of one class and one of another, with the embedded checkpoint, the other one was
    named first in 11.

    Args:
        agreement: `(N,)`, as of a [`CollectionResult`].
    """
    values = np.asarray(agreement, dtype=np.float64)
    if len(values) < 4:
        return []
    odd = []
    for number in np.argsort(values, kind="stable").tolist():
        others = np.delete(values, number)
        middle = float(np.median(others))
        spread = 1.4826 * float(np.median(np.abs(others - middle)))
        if values[number] < middle - max(0.15, 3 * spread):
            odd.append(number)
    return odd


def choose_partners(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """For each of N pictures the `count` others that are most alike in their pooled features.

    Args:
        features: `(N, C, h, w)`.
        count: partners of each, at least 1; with fewer others than that, all of them.

    Returns:
        indices `(N, min(count, N - 1))`, most alike first, and cosine similarities of the same shape.
    """
    # In double precision the similarity of two pictures hardly depends on where they stand among the others.
    pooled = F.normalize(features.double().mean(dim=(2, 3)), dim=1)
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
    batch_size: int | None = None,
    skip_memory: int = _SKIP_MEMORY,
    progress: Callable[[int, int], None] | None = None,
) -> CollectionResult:
    """Soft masks of the object that N photographs have in common.

    Every photograph goes through the encoder once. Its mask is the mean of the masks that the decoder gives it
    together with each of its partners, so the answer does not depend on the order of the photographs.

    Args:
        photos: two or more upright RGB pictures. The network sees them at its own resolution, so copies that are a
            few times larger than that do as well as the originals.
        partners: how many others each photograph is compared with.
        batch_size: photographs in one pass of the encoder; one on the CPU, where more are no faster, else 16.
        skip_memory: bytes that the maps for the skip connections may take. Where they would take more they are made
            again for each photograph, by a second pass of the encoder.
        progress: called with (done, total) after each photograph.

    Raises:
        InputError: for fewer than two photographs, or options that are not positive.
    """
    if len(photos) < 2:
        raise InputError("Co-segmentation needs two or more photographs.")
    if batch_size is None:
        batch_size = 1 if model.device.type == "cpu" else 16
    if partners < 1 or batch_size < 1:
        raise InputError(f"partners and batch_size must be at least 1; got {partners} and {batch_size}.")
    network = model.macosnet

    def encode(start: int) -> MaCoSNetFeatures:
        pictures = list(photos[start : start + batch_size])
        pixels = processor.preprocess_views(pictures, return_tensors="pt")["pixel_values"]
        features: MaCoSNetFeatures = network.get_image_features(pixels.to(model.device))
        return features

    last, skips = [], []
    keep_skips = True
    starts = range(0, len(photos), batch_size)
    for start in starts:
        features = encode(start)
        last.append(features.last)
        if start == 0:
            each = sum(skip.numel() * skip.element_size() for skip in features.skips) / len(features.last)
            keep_skips = each * len(photos) <= skip_memory
        if keep_skips:
            skips.append(features.skips)

    all_last = torch.cat(last)
    all_normalized = l2_normalize(all_last)
    indices, similarity = choose_partners(all_last, partners)
    probabilities = []
    for batch, start in enumerate(starts):
        batch_skips = skips[batch] if keep_skips else encode(start).skips
        for row, number in enumerate(range(start, min(start + batch_size, len(photos)))):
            probabilities.append(
                _mean_mask(model, all_last, all_normalized, batch_skips, row, number, indices[number]).cpu()
            )
            if progress is not None:
                progress(number + 1, len(photos))
    return CollectionResult(
        probabilities=torch.stack(probabilities).numpy(),
        partners=indices.tolist(),
        agreement=similarity.mean(dim=1).cpu().numpy(),
    )


def _mean_mask(
    model: MaCoSNetForKeypointMatching,
    last: Tensor,
    normalized: Tensor,
    skips: tuple[Tensor, ...],
    row: int,
    number: int,
    partners: Tensor,
) -> Tensor:
    """`(S, S)` soft mask of one picture: the mean over its partners `(K,)`.

    `last` and `normalized` hold all N pictures; `skips` those of one batch, in which the picture has the index `row`.
    """
    source = normalized[partners]
    correlation = correlate(source, normalized[number].expand_as(source))
    features = MaCoSNetFeatures(
        last=last[number : number + 1],
        normalized=normalized[number : number + 1],
        skips=tuple(skip[row : row + 1] for skip in skips),
    )
    index = torch.zeros(len(partners), dtype=torch.long, device=correlation.device)
    logits: Tensor = model.macosnet.predict_masks(features, correlation, index)
    return logits.float().sigmoid().mean(dim=0)


def refined_mask(photo: Image.Image, probability: np.ndarray, refine: str = "grabcut") -> np.ndarray:
    """Hard mask `(H, W)` bool of a photograph in its own size, from its soft mask `(S, S)` in [0, 1].

    As the image processor's `post_process_cosegmentation`; only that a photograph of more than 4 megapixels is
    refined at that size, which bounds the memory. (GrabCut itself works at 320 pixels a side.)

    Raises:
        InputError: as [`refine_mask`].
    """
    full_size = photo.size
    scale = (_REFINED_PIXELS / (photo.width * photo.height)) ** 0.5
    if scale < 1:
        width, height = (max(1, round(side * scale)) for side in full_size)
        photo = photo.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
    soft = F.interpolate(
        torch.from_numpy(probability)[None, None],
        size=(photo.height, photo.width),
        mode="bilinear",
        align_corners=True,
    )
    mask = refine_mask(photo, soft[0, 0].clamp(0, 1).numpy(), refine)
    if scale >= 1:
        return mask
    return np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize(full_size, Image.Resampling.BILINEAR)) >= 128
