"""Mask propagation between the images of a collection, and refinement of their masks at low resolution.

The module travels with the model to the Hub; [`~.collection.Collection.segment`] puts the steps together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .common_object import centre_prior
from .encoded_images import FeatureMaps, UnitCells
from .errors import CheckpointError
from .geometry import on_device, resize_masks
from .hints import PlacedHint
from .refinement import opencv, refine_mask

# Mask propagation, chosen on every second image of msrc-coseg: each cell asks the cells that resemble it most in the
# most similar images, and their answer has this share in the mask (less in a pair, where one wrong mask is all that
# there is to ask).
SIMILAR_PARTNERS = 16
_SIMILAR_CELLS = 20
_SIMILAR_TEMPERATURE = 0.1
# For a decoder of common objects, cells that are no more similar than this answer for the most part that there is no
# object. Chosen on 24 composites of which-object, asked as collections of four, and on five images of each class of
# msrc-coseg: J of the masks after propagation 0.564 with the asked object (without this 0.540), 0.095 with the others
# (0.114), and 0.786 on whole images (0.787).
LEAST_SIMILARITY = 0.35
_LEAST_SHARE = 0.25
_HELD_PRODUCTS = 100_000_000  # bytes
_PROPAGATED_SHARE = 1 / 2
_PROPAGATED_SHARE_OF_TWO = 0.3
# Shares in a refined mask: the decoder's own, the propagated refined ones, and the refined one itself.
_REFINED_SHARES = (0.3, 0.4, 0.3)
# Components of the final mask that are smaller than this share of the largest are dropped.
_SMALL_COMPONENT = 0.1
# The centre prior counts so much beside a mask where objects are compared: a mask may be empty.
_CENTRE_SHARE = 0.3
# Refinement works on images of at most so many pixels a side, as `refine_mask` does.
_REFINED_SIDE = 320


class SimilarCells(NamedTuple):
    """For each cell of N images the K cells of other images that resemble it most.

    Attributes:
        places: `(N, h*w, K)` into the `N*h*w` cells of all images.
        weights: `(N, h*w, K)`, softmax(s / 0.1) of the cosine similarities s of the features; their sum is less than 1
            with the `least` of [`similar_cells`].
        size: (h, w).
    """

    places: Tensor
    weights: Tensor
    size: tuple[int, int]

    def without(self, alone: Tensor) -> SimilarCells:
        """The same, but no mask reaches the images where `alone` `(N,)` bool holds: their cells resemble themselves."""
        images, count, several = self.places.shape
        own = torch.arange(images * count, device=self.places.device).view(images, count, 1)
        rows = alone[:, None, None]
        weights = torch.where(rows, 1 / several, self.weights)
        return SimilarCells(torch.where(rows, own, self.places), weights, self.size)


def similar_cells(features: Tensor | FeatureMaps, others: Tensor, least: float | None = None) -> SimilarCells:
    """The 20 most similar cells, for each cell, in the 16 most similar images.

    Args:
        features: `(N, C, h, w)`.
        others: `(N, K)` for each image the numbers of others, most similar first.
        least: a quarter as many cells of this similarity and without any object are among them; none if not given.
    """
    height, width = features.shape[-2:]
    count = height * width
    cells = UnitCells(features)
    chosen = others[:, :SIMILAR_PARTNERS].tolist()
    held: dict[tuple[int, int], Tensor] = {}
    room = _HELD_PRODUCTS // (4 * count**2)
    indices, weights = [], []
    for number, partners in enumerate(chosen):
        products = []
        for partner in partners:
            # Of two that chose each other, one product is the other's transpose.
            product = held.pop((partner, number), None)
            if product is not None:
                product = product.t()
            else:
                product = cells[number].t() @ cells[partner]
                if partner > number and len(held) < room and number in chosen[partner]:
                    held[number, partner] = product
            products.append(product)
        similarity = torch.cat(products, dim=1)
        best = similarity.topk(min(_SIMILAR_CELLS, similarity.shape[1]), dim=1)
        starts = on_device(partners, features.device) * count
        indices.append(starts[best.indices // count] + best.indices % count)
        logits = best.values / _SIMILAR_TEMPERATURE
        if least is not None:
            share = least / _SIMILAR_TEMPERATURE + math.log(_LEAST_SHARE * logits.shape[1])
            logits = torch.cat((logits, logits.new_full((len(logits), 1), share)), dim=1)
        weights.append(logits.softmax(dim=1)[:, : best.values.shape[1]])
    return SimilarCells(torch.stack(indices), torch.stack(weights), (height, width))


def soft_masks(logits: Tensor) -> Tensor:
    """Soft masks of logits of any shape, float32.

    Raises:
        CheckpointError: if they are no numbers: of a model with hostile or damaged weights.
    """
    soft = logits.float().sigmoid()
    if not soft.isfinite().all():
        raise CheckpointError("The model's answers are no finite numbers: its weights or settings are damaged.")
    return soft


def object_means(features: Tensor | FeatureMaps, masks: Tensor) -> Tensor:
    """`(N, C)` float64 unit-length features of the objects of N images: the means of their cells, weighted by the soft
    masks and, less, by a centre prior.

    Args:
        features: `(N, C, h, w)`.
        masks: `(N, S, S)` in [0, 1].
    """
    size = features.shape[-2:]
    weights = F.interpolate(masks[:, None], size=size, mode="area")
    weights = weights + _CENTRE_SHARE * centre_prior(*size, device=masks.device)
    # In double precision, a few at once: see `unit_pooled`.
    means = [
        (F.normalize(maps.double(), dim=1) * weight).sum(dim=(2, 3))
        for maps, weight in zip(features.split(16), weights.split(16), strict=True)
    ]
    return F.normalize(torch.cat(means), dim=1)


def object_similarity(features: Tensor, masks: Tensor) -> Tensor:
    """`(N, N)` cosine similarities in [-1, 1] of the objects of N images, see [`object_means`]."""
    unit = object_means(features, masks)
    return unit @ unit.t()


class NetworkMasks(NamedTuple):
    """What the network finds in N images, before refinement.

    Attributes:
        own: `(N, S, S)` soft masks of the decoder.
        propagated: `(N, S, S)` the same after mask propagation.
        cells: along which they are propagated; None where they are not.
    """

    own: Tensor
    propagated: Tensor
    cells: SimilarCells | None

    @classmethod
    def of(cls, own: Tensor, cells: SimilarCells | None) -> NetworkMasks:
        """The decoder's masks, half (of two images: 0.3) of each replaced by what the other images say."""
        if cells is None:
            return cls(own, own, None)
        share = _PROPAGATED_SHARE if len(own) > 2 else _PROPAGATED_SHARE_OF_TWO
        return cls(own, (1 - share) * own + share * propagate_masks(own, cells), cells)

    def cpu(self) -> NetworkMasks:
        """The same in main memory."""
        cells = self.cells and SimilarCells(self.cells.places.cpu(), self.cells.weights.cpu(), self.cells.size)
        return NetworkMasks(self.own.cpu(), self.propagated.cpu(), cells)


def propagate_masks(masks: Tensor, cells: SimilarCells) -> Tensor:
    """Masks from other images alone: in each cell the weighted mean of the masks at the cells that resemble it most.

    Args:
        masks: `(N, S, S)` in [0, 1].
        cells: of the same images.

    Returns:
        `(N, S, S)` in [0, 1], as smooth as a map of `(h, w)` cells is.
    """
    small = F.interpolate(masks[:, None], size=cells.size, mode="area").flatten()
    found = (cells.weights * small[cells.places]).sum(dim=-1).view(len(masks), *cells.size)
    # The cells are the network's own map, whose corner centres are those of its input. With half-pixel centres J
    # of the collections of msrc-coseg before refinement falls from 0.767 to 0.762.
    return F.interpolate(found.unsqueeze(1), size=masks.shape[-2:], mode="bilinear", align_corners=True).squeeze(1)


def propagate_refined(own: Tensor, refined: Tensor, cells: SimilarCells) -> Tensor:
    """Masks of which 0.3 are the decoder's own, 0.4 the refined ones of other images, and 0.3 the refined ones.

    Args:
        own, refined: `(N, S, S)` masks of the decoder, and refined ones of the same images.
        cells: of the same images.
    """
    shares = _REFINED_SHARES
    return shares[0] * own + shares[1] * propagate_masks(refined, cells) + shares[2] * refined


def fix_hints(masks: Tensor, hints: Mapping[int, PlacedHint]) -> Tensor:
    """Soft masks `(N, S, S)` that are 1 around included points, and 0 around excluded ones and outside of boxes.

    Args:
        hints: by the number of the image, in shares of what the masks cover.
    """
    if not hints:
        return masks
    fixed = masks.clone()
    for number, hint in hints.items():
        labels = torch.from_numpy(hint.labels((masks.shape[-2], masks.shape[-1]))).to(masks.device)
        fixed[number] = torch.where(labels == 0, masks[number], (labels > 0).to(masks.dtype))
    return fixed


def wanted_cells(masks: Tensor, hints: Mapping[int, PlacedHint]) -> dict[int, np.ndarray]:
    """Where hints fix the object: bool `(S, S)` for the numbers of the hinted images among the masks `(N, S, S)`."""
    return {number: hint.labels((masks.shape[-2], masks.shape[-1])) > 0 for number, hint in hints.items()}


def drop_small_components(masks: Tensor, wanted: Mapping[int, np.ndarray] | None = None) -> Tensor:
    """Soft masks without the small components of their objects.

    Components (8-connected) with less than a tenth of the largest one's area are capped just below 0.5, where the
    object begins; all else stays.

    Args:
        masks: `(N, S, S)` in [0, 1].
        wanted: by the number of the image, bool `(S, S)`; components that touch it stay.

    Raises:
        InputError: if OpenCV is not installed.
    """
    cv2 = opencv()
    small = np.zeros(masks.shape, dtype=bool)
    for number, inside in enumerate((masks >= 0.5).cpu().numpy()):
        _, labels, statistics, _ = cv2.connectedComponentsWithStats(inside.view(np.uint8), connectivity=8)
        areas = statistics[:, cv2.CC_STAT_AREA]
        areas[0] = 0  # the background
        few = areas < _SMALL_COMPONENT * areas.max()
        if wanted and number in wanted:
            few[np.unique(labels[wanted[number]])] = False
        small[number] = inside & few[labels]
    return torch.where(torch.from_numpy(small).to(masks.device), masks.clamp(max=0.499), masks)


def reduce_for_refinement(image: Image.Image) -> Image.Image:
    """A copy of at most 320 pixels a side, at which the refinement works; the image itself where it is no larger."""
    scale = _REFINED_SIDE / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BOX)


def refine_masks(
    images: Sequence[Image.Image],
    masks: Tensor,
    method: str,
    *,
    workers: int = 2,
    progress: Callable[[int], None] | None = None,
    hints: Mapping[int, PlacedHint] | None = None,
) -> Tensor:
    """Refined masks at the soft masks' resolution: the object's share in each pixel, `(N, S, S)` in [0, 1].

    Args:
        images: N upright RGB images; they are refined at 320 pixels a side.
        masks: `(N, S, S)` in [0, 1].
        method: one of `refinement.REFINEMENT_METHODS`.
        workers: threads.
        progress: called with the number of images that are done; may raise to stop the work.
        hints: which the refined masks obey, by the number of the image, in shares of `images`.
    """
    size = tuple(masks.shape[-2:])

    def one(number: int, probability: np.ndarray) -> Tensor:
        small, hint = reduce_for_refinement(images[number]), (hints or {}).get(number)
        soft = resize_masks(torch.from_numpy(probability)[None], small.size[::-1])[0].clamp(0, 1)
        fixed = None if hint is None else hint.labels((small.height, small.width))
        hard = torch.from_numpy(refine_mask(small, soft.numpy(), method, fixed=fixed))
        return resize_masks(hard[None].float(), size)[0]

    found = torch.empty(len(images), *size)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        waiting = [pool.submit(one, number, mask) for number, mask in enumerate(masks.cpu().numpy())]
        try:
            for number, refined in enumerate(waiting):
                found[number] = refined.result()
                if progress is not None:
                    progress(number + 1)
        except BaseException:  # Ctrl+C, or a visitor who stops: images whose turn has not come are not refined
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return found.to(masks.device)
