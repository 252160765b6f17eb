"""Divides many images into blocks of similar ones, by their pooled features alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from .blocks import LEAST_COMPANY, Block
from .rows import Row

if TYPE_CHECKING:
    from ..image_processing_macosnet import MaCoSNetImageProcessor
    from ..modeling_macosnet import MaCoSNetForKeypointMatching


@torch.inference_mode()
def pooled_features(
    images: Iterable[Image.Image | None],
    *,
    model: MaCoSNetForKeypointMatching,
    processor: MaCoSNetImageProcessor,
) -> np.ndarray:
    """`(N, C)` float16 mean features of unit length; zeros where there is no image. One image is in memory at a time.

    As [`~macosnet_hf.collection.choose_partners`] compares images.
    """
    rows: list[np.ndarray | None] = []
    for image in images:
        if image is None:
            rows.append(None)
            continue
        pixels = processor.preprocess_views([image], return_tensors="pt")["pixel_values"].to(model.device)
        mean = model.macosnet.get_image_features(pixels).last.double().mean(dim=(2, 3))[0]
        rows.append(torch.nn.functional.normalize(mean, dim=0).half().cpu().numpy())
    width = next((len(row) for row in rows if row is not None), 1)
    return np.stack([np.zeros(width, np.float16) if row is None else row for row in rows])


def divide(block: Block, features: np.ndarray, size: int) -> Iterator[Block]:
    """Blocks of at most `size` rows: the first row that is left, and those that resemble it most.

    A very small one gets those that resemble its rows most for company. Rows without features are blocks of their own.

    Args:
        block: N rows; its company stays with a block that is not divided.
        features: `(N, C)` of its rows, of [`pooled_features`].
        size: of a block.
    """
    # In double precision a similarity does not depend on the order of a sum.
    known = features.astype(np.float64)
    there = (features != 0).any(axis=1)
    left = np.flatnonzero(there)
    if len(left) <= size:
        yield from _chunks(block, np.arange(len(block.rows)), size)
        return
    while len(left):
        similarity = known[left] @ known[left[0]]
        similarity[0] = np.inf
        chosen = np.sort(left[np.argsort(-similarity, kind="stable")[:size]])
        left = np.setdiff1d(left, chosen)
        yield Block([block.rows[number] for number in chosen], _company(block, known, there, chosen, size))
    yield from _chunks(Block(block.rows, ()), np.flatnonzero(~there), size)


def _chunks(block: Block, numbers: np.ndarray, size: int) -> Iterator[Block]:
    for start in range(0, len(numbers), size):
        yield Block([block.rows[number] for number in numbers[start : start + size]], block.company)


def _company(block: Block, features: np.ndarray, there: np.ndarray, chosen: np.ndarray, size: int) -> Sequence[Row]:
    """The rows outside of a very small block that resemble it most."""
    missing = min(LEAST_COMPANY, size) - len(chosen)
    if missing <= 0:
        return ()
    similarity = features @ features[chosen].mean(axis=0)
    similarity[chosen], similarity[~there] = -np.inf, -np.inf
    others = [number for number in np.argsort(-similarity, kind="stable")[:missing] if np.isfinite(similarity[number])]
    return [block.rows[number] for number in sorted(others)]
