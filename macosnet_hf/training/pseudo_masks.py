"""First masks without a single label: what differs from the picture's border, near its middle, made sharp by colours.

Four steps, each on what the one before it gave:

1. *Border contrast*: one minus a cell's similarity to the most similar cells of the picture's border, times a centre
prior. 2. *GrabCut* turns it into a hard mask that follows colour edges.
3. *Discriminants*: ridge regressions from stride-16 features to those masks, one over all photographs and one a
   class. A single mask is often wrong, but what the masks of a class have in common is mostly the object, and a
   linear map of the features cannot learn the rest. This is where the class label (the only supervision there is)
   comes in.
4. *GrabCut* again, on the discriminants' mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from ..refinement import otsu_threshold, refine_mask


def centre_weight(side: int, sigma: float) -> Tensor:
    """`(side, side)` Gaussian around the middle, 1 at the middle; sigma in normalised coordinates."""
    axis = torch.linspace(-1, 1, side)
    return torch.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / (2 * sigma**2))


def stretch(maps: Tensor) -> Tensor:
    """Each map of `(N, h, w)` from its 5th to its 95th percentile to [0, 1]."""
    flat = maps.flatten(1)
    low, high = (torch.quantile(flat, q, dim=1).view(-1, 1, 1) for q in (0.05, 0.95))
    return ((maps - low) / (high - low + 1e-6)).clamp(0, 1)


def border_contrast(features: Tensor, neighbours: int = 6) -> Tensor:
    """How little each cell resembles the border of its own picture: `(N, C, h, w)` to `(N, h, w)` in [0, 1]."""
    side = features.shape[-1]
    unit = F.normalize(features, dim=1)
    border = torch.zeros(features.shape[-2], side, dtype=torch.bool)
    border[0], border[-1], border[:, 0], border[:, -1] = True, True, True, True
    similarity = torch.einsum("nchw,nck->nhwk", unit, unit[:, :, border])
    return stretch(1 - similarity.topk(neighbours, dim=-1).values.mean(-1))


def discriminants(features: Tensor, masks: Tensor, class_ids: Tensor, ridge: float = 0.01) -> Tensor:
    """Masks as far as features can explain them: `(N, C, h, w)` and `(N, h, w)` to `(N, h, w)` in [0, 1].

    The mean of two ridge regressions, one over all pictures and one over those of the same class.
    """
    count, channels = features.shape[:2]
    cells = features.flatten(2).transpose(1, 2)
    labels = masks.flatten(1)

    def fitted(rows: Tensor) -> Tensor:
        x, y = cells[rows].reshape(-1, channels), labels[rows].reshape(-1)
        x = (x - x.mean(0)) / (x.std(0) + 1e-5)
        x = torch.cat((x, torch.ones(len(x), 1)), dim=1)
        system = x.t() @ x + ridge * len(x) * torch.eye(channels + 1)
        return (x @ torch.linalg.solve(system, x.t() @ y)).view(len(rows), *features.shape[-2:])

    overall = stretch(fitted(torch.arange(count)))
    within = torch.empty_like(overall)
    for class_id in class_ids.unique():
        rows = torch.nonzero(class_ids == class_id).squeeze(1)
        within[rows] = fitted(rows)
    return (overall + stretch(within)) / 2


def sharpen(pictures: Tensor, maps: Tensor, *, working_size: int, workers: int = 2, quiet: bool = False) -> Tensor:
    """GrabCut from coarse maps split by Otsu's threshold: uint8 `(N, 3, S, S)` and `(N, h, w)` to bool `(N, S, S)`."""
    size = tuple(pictures.shape[-2:])

    def one(index: int) -> np.ndarray:
        soft = F.interpolate(maps[index][None, None], size=size, mode="bilinear", align_corners=True)[0, 0].numpy()
        soft = soft.clip(0, 1)
        threshold = otsu_threshold(soft) or 0.5
        centred = np.where(
            soft < threshold, soft / threshold / 2, 0.5 + (soft - threshold) / (1 - threshold + 1e-6) / 2
        )
        picture = pictures[index].permute(1, 2, 0).contiguous().numpy()
        return refine_mask(picture, centred.clip(0, 1), "grabcut", working_size=working_size)

    with ThreadPoolExecutor(workers) as pool:
        masks = tqdm(pool.map(one, range(len(pictures))), total=len(pictures), desc="GrabCut", disable=quiet)
        return torch.from_numpy(np.stack(list(masks)))


def pseudo_masks(pictures: Tensor, features: Tensor, class_names: Sequence[str], *, quiet: bool = False) -> Tensor:
    """Masks of photographs from their features and class names alone.

    Args:
        pictures: uint8 `(N, 3, S, S)`.
        features: stride-16 features `(N, C, h, w)`.
        class_names: N names.

    Returns:
        bool `(N, S, S)`.
    """
    features = features.float()
    names = sorted(set(class_names))
    class_ids = torch.tensor([names.index(name) for name in class_names])
    side = features.shape[-1]
    contrast = border_contrast(features) * centre_weight(side, 0.6)
    first = sharpen(pictures, contrast, working_size=128, quiet=quiet)  # only its mean over 16 pixels is looked at
    coarse = F.interpolate(first[:, None].float(), size=features.shape[-2:], mode="area")[:, 0]
    learnt = discriminants(features, coarse, class_ids) * centre_weight(side, 0.8)
    return sharpen(pictures, learnt, working_size=192, quiet=quiet)
