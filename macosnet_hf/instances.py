"""Instances: a mask of several objects as a map of labels, one for each object.

Connected components are instances; one that has several thick parts is divided between them, if the parts resemble one
another, as objects of one kind do and the head and body of one of them do not. The module travels with the model to the
Hub; [`~.collection.Collection.segment`] calls it.
"""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from .encoded_images import FeatureMaps
from .refinement import opencv

# All chosen on 58 images of msrc-coseg whose objects were counted by eye (benchmarks/instances.py): where a soft mask
# counts as thick; thinner than this share of a part's thickness is the place where two parts meet; the least share of
# the largest part's area, and the least cosine similarity of the mean features, that make a part an instance.
_SURE = 0.6
_WAIST = 0.85
_LEAST_AREA = 0.15
_LEAST_SIMILARITY = 0.6
_SMALL_COMPONENT = 0.1  # as in `mask_sharing.drop_small_components`
_LEVELS = 32  # of thickness that are told apart
_SMOOTHING = 1.0  # standard deviation, in pixels of the mask: ragged edges have no parts

Peak = tuple[float, int, int]  # thickness, row, column


def split_instances(masks: Tensor, features: Tensor | FeatureMaps) -> np.ndarray:
    """Labels `(N, S, S)` int32 of the objects of N images: 0 background, then 1, 2, ... from the largest.

    Args:
        masks: `(N, S, S)` in [0, 1]; the object is where they are 0.5 or more.
        features: `(N, C, h, w)`.
    """
    unit = (F.normalize(features[number].float(), dim=0).cpu().numpy() for number in range(len(features)))
    return np.stack([_split(mask, cells) for mask, cells in zip(masks.cpu().numpy(), unit, strict=True)])


def _split(mask: np.ndarray, cells: np.ndarray) -> np.ndarray:
    cv2 = opencv()
    inside = (mask >= 0.5).astype(np.uint8)
    smooth = (cv2.GaussianBlur(inside.astype(np.float32), (0, 0), _SMOOTHING) >= 0.5).astype(np.uint8)
    count, components, statistics, _ = cv2.connectedComponentsWithStats(smooth, connectivity=8)
    areas = statistics[:, cv2.CC_STAT_AREA]
    found = np.zeros(mask.shape, np.int32)
    for number in range(1, count):
        if areas[number] >= _SMALL_COMPONENT * areas[1:].max():
            parts = _parts(components == number, mask, cells)
            found[parts > 0] = parts[parts > 0] + found.max()
    return fill_labels(_by_area(found), inside > 0)


def _by_area(labels: np.ndarray) -> np.ndarray:
    """The same with labels 1, 2, ... in the order of their areas, the largest first."""
    names, areas = np.unique(labels[labels > 0], return_counts=True)
    renamed = np.zeros(int(labels.max()) + 1, np.int32)
    renamed[names[np.argsort(-areas, kind="stable")]] = np.arange(1, len(names) + 1)
    ordered: np.ndarray = renamed[labels]
    return ordered


def _parts(component: np.ndarray, mask: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Labels of the parts of a connected component `(S, S)` bool, 0 outside of it."""
    peaks = find_peaks(_thickness(component & (mask >= _SURE)))
    if len(peaks) < 2:
        return component.astype(np.int32)
    rows, columns = np.nonzero(component)
    # The nearest peak, in units of its thickness: the disc around each peak is its own.
    distances = [np.hypot(rows - row, columns - column) / thickness for thickness, row, column in peaks]
    labels = np.zeros(component.shape, np.int32)
    labels[rows, columns] = np.argmin(distances, axis=0) + 1
    while merge := _pair_to_merge(labels, cells):
        labels[labels == merge[0]] = merge[1]
    return labels


def _thickness(inside: np.ndarray) -> np.ndarray:
    """Distance of each pixel to the background, which also lies outside of the image: `(S, S)` float32."""
    cv2 = opencv()
    found: np.ndarray = cv2.distanceTransform(np.pad(inside.astype(np.uint8), 1), cv2.DIST_L2, 5)[1:-1, 1:-1]
    return found


def find_peaks(thickness: np.ndarray) -> list[Peak]:
    """Maxima of a map `(S, S)`; a path from one to a larger one falls below 0.85 of it."""
    cv2 = opencv()
    peaks: list[Peak] = []
    for level in np.linspace(float(thickness.max()), 0, _LEVELS, endpoint=False)[1:]:
        count, parts = cv2.connectedComponents((thickness >= level).astype(np.uint8), connectivity=8)
        for part in range(1, count):
            own = [peak for peak in peaks if parts[peak[1], peak[2]] == part]
            if not own:
                row, column = np.unravel_index(int(np.where(parts == part, thickness, 0).argmax()), parts.shape)
                peaks.append((float(thickness[row, column]), int(row), int(column)))
            for peak in own:
                if peak != max(own) and peak[0] * _WAIST <= level:
                    peaks.remove(peak)
    return peaks


def _pair_to_merge(labels: np.ndarray, cells: np.ndarray) -> tuple[int, int] | None:
    """The part that is least an instance, and the neighbour that it belongs to; None if all are instances."""
    cv2 = opencv()
    names = [int(name) for name in np.unique(labels) if name]
    if len(names) < 2:
        return None
    parts = {name: (labels == name).astype(np.uint8) for name in names}
    areas = {name: int(part.sum()) for name, part in parts.items()}
    means = {}
    for name, part in parts.items():
        share = cv2.resize(part.astype(np.float32), cells.shape[:0:-1], interpolation=cv2.INTER_AREA)
        mean = (cells * share).sum(axis=(1, 2))
        means[name] = mean / max(float(np.linalg.norm(mean)), 1e-12)
    worst, found = 0.0, None
    for name in names:
        near = labels[cv2.dilate(parts[name], np.ones((3, 3), np.uint8)) > 0]
        touching = np.bincount(near, minlength=max(names) + 1)
        touching[[0, name]] = 0
        if not touching.any():
            continue
        neighbour = int(touching.argmax())
        lack = max(_LEAST_AREA - areas[name] / max(areas.values()), 0.0) / _LEAST_AREA
        lack += max(_LEAST_SIMILARITY - float(means[name] @ means[neighbour]), 0.0)
        if lack > worst:
            worst, found = lack, (name, neighbour)
    return found


def fill_labels(labels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Labels `(H, W)` int32 of a hard mask `(H, W)` bool, in which each pixel has the nearest label.

    Args:
        labels: of any size, 0 for background, at least one other where the mask has an object.
        mask: the object.
    """
    cv2 = opencv()
    large = cv2.resize(labels, mask.shape[::-1], interpolation=cv2.INTER_NEAREST_EXACT)  # half-pixel centres
    if not (large > 0).any():  # nothing has a label: one object
        return mask.astype(np.int32)
    kind = cv2.DIST_LABEL_PIXEL
    _, nearest = cv2.distanceTransformWithLabels((large == 0).astype(np.uint8), cv2.DIST_L2, 5, labelType=kind)
    of_place = np.zeros(int(nearest.max()) + 1, np.int32)
    of_place[nearest[large > 0]] = large[large > 0]
    filled: np.ndarray = np.where(mask, of_place[nearest], 0).astype(np.int32)
    return filled
