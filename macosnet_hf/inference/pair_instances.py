"""Pairs with several objects: which object of the source and which of the target match."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..instances import fill_labels, split_instances


@dataclass(frozen=True)
class MatchedInstances:
    """The single objects of a pair of images, and the two that match best.

    Attributes:
        labels: `(2, S, S)` int32, of source and target: 0 background, 1 the largest object.
        scores: `(n, m)` sums of the scores of the matches between each object of the source and each of the target.
        chosen: the labels of the two with the largest sum, of source and target; None if no match lies on the objects.
    """

    labels: np.ndarray
    scores: np.ndarray
    chosen: tuple[int, int] | None

    @property
    def counts(self) -> tuple[int, int]:
        """Numbers of objects of source and target."""
        return self.scores.shape[0], self.scores.shape[1]

    def of_mask(self, view: int, mask: np.ndarray) -> np.ndarray:
        """Labels `(H, W)` int32 of the objects in a hard mask `(H, W)` bool of the source (0) or target (1)."""
        return fill_labels(self.labels[view], mask)

    def in_words(self) -> str:
        """Which objects match, for people; empty where there is one in each image."""
        if self.chosen is None or max(self.counts) < 2:
            return ""
        source, target = (
            f"object {number} of {count}" if count > 1 else "the only object"
            for number, count in zip(self.chosen, self.counts, strict=True)
        )
        return f"{source} of the source matches {target} of the target"


def choose_instances(
    soft_masks: np.ndarray,
    features: Tensor,
    points: np.ndarray,
    scores: np.ndarray,
    sizes: tuple[tuple[int, int], tuple[int, int]],
) -> tuple[MatchedInstances, np.ndarray]:
    """The objects of a pair, and which matches lie on the two that match best.

    Args:
        soft_masks: `(2, S, S)`; objects are where they are 0.5 or more.
        features: `(2, C, h, w)`.
        points: `(M, 2, 2)` matches on the masks, in pixels of source and target.
        scores: `(M,)` of the matches.
        sizes: (width, height) of source and target.

    Returns:
        the objects, and `(M,)` bool.
    """
    labels = split_instances(torch.from_numpy(soft_masks), features)
    side = labels.shape[-1]
    ends = []
    for view, (map_of_view, size) in enumerate(zip(labels, sizes, strict=True)):
        nearest = fill_labels(map_of_view, np.ones_like(map_of_view, dtype=bool))
        cells = np.rint((points[:, view] + 0.5) * side / np.array(size) - 0.5).astype(int).clip(0, side - 1)
        ends.append(np.where(map_of_view.any(), nearest[cells[:, 1], cells[:, 0]], 0))
    counts = labels.reshape(2, -1).max(axis=1)
    sums = np.zeros((counts[0], counts[1]))
    source, target = ends
    on_both = (source > 0) & (target > 0)
    np.add.at(sums, (source[on_both] - 1, target[on_both] - 1), scores[on_both])
    if not sums.size or sums.max() <= 0:
        return MatchedInstances(labels, sums, None), on_both
    row, column = np.unravel_index(int(sums.argmax()), sums.shape)
    chosen = int(row) + 1, int(column) + 1
    return MatchedInstances(labels, sums, chosen), (source == chosen[0]) & (target == chosen[1])
