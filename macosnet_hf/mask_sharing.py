"""What images of a collection say of each other's masks, once each is encoded and has a first mask of its own.

The module travels with the model to the Hub; [`~.collection.Collection.segment`] puts the steps together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .refinement import opencv, refine_mask

# How masks are carried from image to image, chosen on every second image of msrc-coseg: each cell looks
# at the cells that resemble it most in the images most alike, and what they say has this share in the mask (less
# of a pair, where one wrong mask is all that can be asked).
_TRANSFER_PARTNERS = 16
_TRANSFER_CELLS = 20
_TRANSFER_TEMPERATURE = 0.1
_KEPT_PRODUCTS = 100_000_000  # bytes
_TRANSFER_SHARE = 1 / 2
_TRANSFER_SHARE_OF_TWO = 0.3
# Of refined masks: shares of the decoder's own, of what is carried over, and of the refined one itself.
_REFINED_SHARES = (0.3, 0.4, 0.3)
# Of the final mask, pieces smaller than this share of the largest one are dropped.
_CRUMB = 0.1
# Refinement looks at images of at most so many pixels a side, as `refine_mask` does.
_REFINED_SIDE = 320


class SimilarCells(NamedTuple):
    """For each cell of N images the K cells of other images that resemble it most.

    Attributes:
        places: `(N, h*w, K)` into the `N*h*w` cells of all images.
        weights: `(N, h*w, K)`, softmax(s / 0.1) of the cosine similarities s of the features.
        size: (h, w).
    """

    places: Tensor
    weights: Tensor
    size: tuple[int, int]


def similar_cells(features: Tensor, others: Tensor) -> SimilarCells:
    """The 20 most similar cells, for each cell, in the 16 images most alike.

    Args:
        features: `(N, C, h, w)`.
        others: `(N, K)` for each image the numbers of others, most alike first.
    """
    height, width = features.shape[-2:]
    count = height * width
    cells = F.normalize(features.float(), dim=1).flatten(2)  # (N, C, h*w)
    chosen = others[:, :_TRANSFER_PARTNERS].tolist()
    kept: dict[tuple[int, int], Tensor] = {}
    room = _KEPT_PRODUCTS // (4 * count**2)
    indices, weights = [], []
    for number, partners in enumerate(chosen):
        products = []
        for partner in partners:
            # Of two that chose each other, one product is the other's transpose.
            product = kept.pop((partner, number), None)
            if product is not None:
                product = product.t()
            else:
                product = cells[number].t() @ cells[partner]
                if partner > number and len(kept) < room and number in chosen[partner]:
                    kept[number, partner] = product
            products.append(product)
        similarity = torch.cat(products, dim=1)
        best = similarity.topk(min(_TRANSFER_CELLS, similarity.shape[1]), dim=1)
        starts = torch.tensor(partners, device=features.device) * count
        indices.append(starts[best.indices // count] + best.indices % count)
        weights.append((best.values / _TRANSFER_TEMPERATURE).softmax(dim=1))
    return SimilarCells(torch.stack(indices), torch.stack(weights), (height, width))


def transfer_masks(masks: Tensor, cells: SimilarCells) -> Tensor:
    """What the images of a collection say of each other's masks: in each cell the weighted mean of the masks where
    the cells lie that resemble it most.

    Args:
        masks: `(N, S, S)` in [0, 1].
        cells: of the same images.

    Returns:
        `(N, S, S)` in [0, 1], as smooth as a map of `(h, w)` cells is.
    """
    small = F.interpolate(masks[:, None], size=cells.size, mode="area").flatten()
    found = (cells.weights * small[cells.places]).sum(dim=-1).view(len(masks), 1, *cells.size)
    return F.interpolate(found, size=masks.shape[-2:], mode="bilinear", align_corners=True)[:, 0]


def share_masks(own: Tensor, cells: SimilarCells) -> Tensor:
    """The second step of [`Collection.segment`]: masks `(N, S, S)`, half of which (of two: 0.3) the others say."""
    share = _TRANSFER_SHARE if len(own) > 2 else _TRANSFER_SHARE_OF_TWO
    return (1 - share) * own + share * transfer_masks(own, cells)


def mix_refined(own: Tensor, refined: Tensor, cells: SimilarCells) -> Tensor:
    """Masks of which 0.3 are the decoder's own, 0.4 what the refined masks of the others say, and 0.3 the refined ones.

    Args:
        own, refined: `(N, S, S)` masks of the decoder, and refined ones of the same images.
        cells: of the same images.
    """
    shares = _REFINED_SHARES
    return shares[0] * own + shares[1] * transfer_masks(refined, cells) + shares[2] * refined


def drop_small_components(masks: Tensor) -> Tensor:
    """Soft masks of whose objects only the larger pieces are left.

    Pieces (8-connected) of the object that are smaller than a tenth of the largest are capped just below 0.5, where the
    object begins; the rest stays as it is.

    Args:
        masks: `(N, S, S)` in [0, 1].

    Raises:
        InputError: if OpenCV is not installed.
    """
    cv2 = opencv()
    crumbs = np.zeros(masks.shape, dtype=bool)
    for number, inside in enumerate((masks >= 0.5).cpu().numpy()):
        _, labels, numbers, _ = cv2.connectedComponentsWithStats(inside.view(np.uint8), connectivity=8)
        areas = numbers[:, cv2.CC_STAT_AREA]
        areas[0] = 0  # what is no object
        crumbs[number] = inside & (areas < _CRUMB * areas.max())[labels]
    return torch.where(torch.from_numpy(crumbs).to(masks.device), masks.clamp(max=0.499), masks)


def reduced(image: Image.Image) -> Image.Image:
    """What the refinement looks at: a copy of at most 320 pixels a side, or the image itself."""
    scale = _REFINED_SIDE / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BOX)


def refine_small(
    images: Sequence[Image.Image],
    masks: Tensor,
    method: str,
    *,
    workers: int = 2,
    tell: Callable[[int], None] | None = None,
) -> Tensor:
    """Refined masks as shares of the object, `(N, S, S)` in [0, 1].

    Args:
        images: N upright RGB images; copies of 320 pixels are looked at.
        masks: `(N, S, S)` in [0, 1].
        method: one of `refinement.REFINEMENT_METHODS`.
        workers: threads.
        tell: called with the number that are done; may raise to stop the work.
    """
    size = tuple(masks.shape[-2:])

    def one(image: Image.Image, probability: np.ndarray) -> Tensor:
        small = reduced(image)
        soft = torch.from_numpy(probability)[None, None]
        soft = F.interpolate(soft, size=small.size[::-1], mode="bilinear", align_corners=True)
        hard = torch.from_numpy(refine_mask(small, soft[0, 0].clamp(0, 1).numpy(), method))
        return F.interpolate(hard[None, None].float(), size=size, mode="bilinear", align_corners=True)[0, 0]

    found: list[Tensor] = []
    with ThreadPoolExecutor(max(1, workers)) as pool:
        waiting = [pool.submit(one, *both) for both in zip(images, masks.cpu().numpy(), strict=True)]
        try:
            for refined in waiting:
                found.append(refined.result())
                if tell is not None:
                    tell(len(found))
        except BaseException:  # Ctrl+C, or a visitor who stops: what has not begun is not begun
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return torch.stack(found).to(masks.device)
