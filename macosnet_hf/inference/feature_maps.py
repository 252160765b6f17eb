"""What the features of a pair say, as maps for drawings: similarity to a point, and parts of the common object."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import make_grid, normalize_points, sample_at, warp
from . import DIRECTIONS, start_of

if TYPE_CHECKING:
    from .pair import PairResult

_PARTS = 3  # principal components, a colour channel each
_LEAST_CELLS = 6  # on an object, for components that mean something
_SPREAD = 2.0  # standard deviations of a component that become the range of its channel


@torch.inference_mode()
def similarity_map(
    result: PairResult, point: tuple[float, float], direction: str = DIRECTIONS[0], side: int = 256
) -> np.ndarray:
    """Cosine similarity `(h, w)` of a point of one image to every place of the other, at most `side` samples long.

    Args:
        result: the pair.
        point: (x, y) in pixels of the image that `direction` starts on.

    Raises:
        InputError: for an unknown direction.
    """
    start = start_of(direction)
    images, maps = (result.source, result.target), _features(result)
    network = result.network_side
    here = normalize_points(torch.tensor([[point]], dtype=torch.float32), images[start].size[::-1], network)
    own = F.normalize(sample_at(maps[start : start + 1], here)[0, 0], dim=0)
    similarity = torch.einsum("chw,c->hw", maps[1 - start], own)
    return _over_image(similarity[None], images[1 - start].size, network, side)[0].numpy()


@torch.inference_mode()
def part_colors(result: PairResult, side: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Colours `(h, w, 3)` in [0, 1] of source and target that stand for parts of the object: places of equal colour
    have similar features.

    They are the first three principal components of the features within the masks, less the mean of each image's
    object: what tells a dog from a cat is no part of either. Each component points to where it is larger in the middle
    of the objects, so that colours do not depend on the eigenvectors' signs.
    """
    maps = _features(result)
    weights = F.adaptive_avg_pool2d(
        torch.from_numpy(result.soft_masks)[:, None].float(), (maps.shape[-2], maps.shape[-1])
    )[:, 0]
    cells = maps.permute(0, 2, 3, 1)
    on_object = weights >= 0.5
    chosen = on_object if on_object.sum() >= _LEAST_CELLS else torch.ones_like(on_object)
    counts = chosen.sum(dim=(1, 2)).clamp(min=1)
    means = torch.einsum("nhwc,nhw->nc", cells, chosen.float()) / counts[:, None]
    cells = cells - means[:, None, None]
    _, _, axes = torch.linalg.svd(cells[chosen], full_matrices=False)
    components = cells @ axes[:_PARTS].T  # (2, h, w, 3)
    inside = components[chosen]
    sign = torch.where((inside**3).sum(0) < 0, -1.0, 1.0)
    components = sign * components / (_SPREAD * inside.std(0)).clamp(min=1e-6)
    colors = [
        _over_image(part.permute(2, 0, 1), image.size, result.network_side, side).permute(1, 2, 0)
        for part, image in zip(components, (result.source, result.target), strict=True)
    ]
    source, target = (((1 + each) / 2).clamp(0, 1).numpy() for each in colors)
    return source, target


def _features(result: PairResult) -> Tensor:
    """`(2, C, h, w)` normalised features of source and target."""
    return result._found.outputs.features[0].float().cpu()


def _over_image(maps: Tensor, size: tuple[int, int], network: int, side: int) -> Tensor:
    """Maps `(C, h, w)` of the network at the pixels of a copy, at most `side` long, of an image of PIL size (W, H)."""
    scale = min(1.0, side / max(size))
    width, height = (max(1, round(length * scale)) for length in size)
    grid = make_grid(height, width, side=network)[None]
    return warp(maps[None], grid, padding_mode="border")[0]
