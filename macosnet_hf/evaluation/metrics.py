"""The metrics, each with its protocol, units and source, in NumPy for one sample at a time, float64.

Points are (x, y) in pixels of the original image, 0 the centre of the first pixel; sizes are (height, width).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from ..datasets.schema import INVALID_FLOW
from ..errors import DataError, InputError

SCNET_SIDE = 224
"""Side to which the `image` protocol scales both images (SCNet, Han et al., ICCV 2017)."""

PCK_PROTOCOLS = ("bbox", "image")

BOUNDARY_TOLERANCE = 0.0075
"""How far two boundaries may lie apart, as a share of the image's diagonal (DAVIS, Perazzi et al., CVPR 2016)."""


def present_points(points: np.ndarray, padding: float = -1.0) -> np.ndarray:
    """Which rows of a padded point list `(N, 2)` are keypoints: bool `(N,)`.

    Published loaders pad absent keypoints with -1 in both coordinates, some with NaN. A box or a mean taken over the
    padding is wrong (it inflates the threshold of published PF-WILLOW figures), so this mask comes first.
    """
    points = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    return ~((points == padding).all(axis=-1) | np.isnan(points).any(axis=-1))


def points_box(points: np.ndarray, valid: np.ndarray | None = None) -> tuple[float, float, float, float]:
    """The tight box `(x0, y0, x1, y1)` of those points `(N, 2)` that are valid.

    Raises:
        DataError: if no point is valid.
    """
    points = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    points = points[present_points(points) if valid is None else np.asarray(valid, dtype=bool)]
    if len(points) == 0:
        raise DataError("A box cannot be taken of no keypoint at all.")
    (x0, y0), (x1, y1) = points.min(axis=0), points.max(axis=0)
    return float(x0), float(y0), float(x1), float(y1)


def box_length(box: Sequence[float]) -> float:
    """Reference length of protocol `bbox`: the longer side, in pixels, of a box `(x0, y0, x1, y1)`.

    Raises:
        DataError: if the box has no extent, so that no prediction could be right, or no finite one, so that all were.
    """
    length = float(max(box[2] - box[0], box[3] - box[1]))
    if not 0 < length < math.inf:
        raise DataError("The reference box has no extent, or no finite one, so PCK `bbox` is not defined.")
    return length


@dataclass(frozen=True)
class KeypointErrors:
    """Errors of one sample under one protocol.

    Attributes:
        errors: distance of each valid keypoint, `(N,)`, in the protocol's unit.
        length: reference length in the same unit; a keypoint is right at alpha when `error <= alpha * length`.
    """

    errors: np.ndarray
    length: float

    def correct(self, alpha: float) -> int:
        """How many keypoints are right at this alpha (`<=`, as in the published code)."""
        return int((self.errors <= alpha * self.length).sum())

    def pck(self, alpha: float) -> float:
        """Share of right keypoints of this sample."""
        return self.correct(alpha) / len(self.errors)


def keypoint_errors(
    predicted: np.ndarray,
    truth: np.ndarray,
    protocol: str,
    *,
    size: tuple[int, int] | None = None,
    box: Sequence[float] | None = None,
    valid: np.ndarray | None = None,
) -> KeypointErrors:
    """Errors of transferred keypoints under a protocol of PCK (Yang and Ramanan, 2013).

    * `bbox` (the paper, section 4.1; SPair-71k): distance in pixels of the image that the points were transferred to;
      the reference is the longer side of that image's annotated box, or, without one (PF-WILLOW, PF-PASCAL), of the
      box of its own keypoints.
    * `image` (SCNet; the default of the authors' loaders for PF-PASCAL and PF-WILLOW, Tables 4 and 5): the image is
      scaled to 224x224, each axis by itself, and the reference is 224.

    Args:
        predicted: `(N, 2)` transferred keypoints in pixels.
        truth: `(N, 2)` annotated keypoints of the same image.
        protocol: `"bbox"` or `"image"`.
        size: `(height, width)` of that image; needed for `image`.
        box: `(x0, y0, x1, y1)` annotated box of that image, for `bbox`.
        valid: which rows count; default: rows that are not padding, see [`present_points`].

    Raises:
        InputError: for another protocol, shapes that differ, or a missing size.
        DataError: if no keypoint is valid, one or its prediction is not finite, or the box has no extent.
    """
    predicted = np.asarray(predicted, dtype=np.float64).reshape(-1, 2)
    truth = np.asarray(truth, dtype=np.float64).reshape(-1, 2)
    if predicted.shape != truth.shape:
        raise InputError(f"{len(predicted)} predicted keypoints cannot be compared with {len(truth)} annotated ones.")
    valid = present_points(truth) if valid is None else np.asarray(valid, dtype=bool)
    if not valid.any():
        raise DataError("There is no valid keypoint.")
    predicted, truth = predicted[valid], truth[valid]
    if not np.isfinite(predicted).all():
        raise DataError("A predicted keypoint is not a finite number.")
    if not np.isfinite(truth).all():
        raise DataError("An annotated keypoint is not a finite number.")
    difference = predicted - truth
    if protocol == "bbox":
        length = box_length(points_box(truth, np.ones(len(truth), dtype=bool)) if box is None else box)
        return KeypointErrors(np.hypot(difference[:, 0], difference[:, 1]), length)
    if protocol == "image":
        if size is None:
            raise InputError("PCK `image` needs the size of the image.")
        height, width = size
        return KeypointErrors(
            np.hypot(difference[:, 0] * SCNET_SIDE / width, difference[:, 1] * SCNET_SIDE / height), float(SCNET_SIDE)
        )
    raise InputError(f"There is no PCK protocol {protocol!r}; choose one of {', '.join(PCK_PROTOCOLS)}.")


def valid_flow(flow: np.ndarray) -> np.ndarray:
    """Pixels with ground truth: bool `(h, w)` for a flow `(h, w, 2)`. Invalid is >= 1e9 in size, or not finite."""
    with np.errstate(invalid="ignore"):
        return np.isfinite(flow).all(axis=-1) & (np.abs(flow) < INVALID_FLOW).all(axis=-1)


def flow_errors(
    places: np.ndarray, flow: np.ndarray, target_mask: np.ndarray, source_size: tuple[int, int]
) -> KeypointErrors:
    """Errors of a dense prediction on TSS (Taniai et al., CVPR 2016), over the target's foreground with valid flow.

    The reference is the longer side of the source image, in whose pixels the errors are measured (as in the
    benchmark's own evaluation, which takes the size of the other image's flow); alpha = 0.05 is the paper's Table 1.

    Args:
        places: `(h, w, 2)` predicted place in the source, in pixels, of each pixel of the target.
        flow: `(h, w, 2)` annotated (dx, dy).
        target_mask: bool `(h, w)`.
        source_size: `(height, width)` of the source.

    Raises:
        InputError: if the shapes differ.
        DataError: if no pixel of the foreground has valid flow, or a prediction there is not finite.
    """
    places, flow = np.asarray(places, dtype=np.float64), np.asarray(flow, dtype=np.float64)
    if places.shape != flow.shape or tuple(target_mask.shape) != flow.shape[:2]:
        raise InputError(
            f"Prediction {places.shape}, flow {flow.shape} and mask {target_mask.shape} must share a height and width."
        )
    used = valid_flow(flow) & np.asarray(target_mask, dtype=bool)
    if not used.any():
        raise DataError("No pixel of the target's foreground has a valid flow.")
    rows, columns = np.nonzero(used)
    truth = np.stack((columns, rows), axis=-1) + flow[rows, columns]
    difference = places[rows, columns] - truth
    if not np.isfinite(difference).all():
        raise DataError("A predicted place is not a finite number.")
    return KeypointErrors(np.hypot(difference[:, 0], difference[:, 1]), float(max(source_size)))


def _masks(predicted: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both masks as arrays, which are boolean and of one shape."""
    predicted, truth = np.asarray(predicted), np.asarray(truth)
    if predicted.dtype != np.bool_ or truth.dtype != np.bool_:
        raise InputError("Masks must be boolean.")
    if predicted.shape != truth.shape or truth.size == 0:
        raise InputError(f"A predicted mask {predicted.shape} cannot be compared with a mask {truth.shape}.")
    return predicted, truth


def _counted(predicted: np.ndarray, truth: np.ndarray, counted: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The pixels of both masks that count."""
    predicted, truth = _masks(predicted, truth)
    return (predicted, truth) if counted is None else (predicted[counted], truth[counted])


def precision(predicted: np.ndarray, truth: np.ndarray, counted: np.ndarray | None = None) -> float:
    """P: share of correctly labelled pixels, foreground and background (the paper, section 4.1).

    Args:
        predicted, truth: bool `(h, w)`.
        counted: bool `(h, w)`, false for pixels that are left out, such as PASCAL VOC's void.

    Raises:
        InputError: if the masks are not boolean or differ in shape.
    """
    predicted, truth = _counted(predicted, truth, counted)
    return float((predicted == truth).mean())


def jaccard(predicted: np.ndarray, truth: np.ndarray, counted: np.ndarray | None = None) -> float | None:
    """J: intersection over union of the foreground; `None` where the truth holds no object (Internet's noise images),
    which the literature leaves out of the mean. Arguments and errors as [`precision`]."""
    predicted, truth = _counted(predicted, truth, counted)
    if not truth.any():
        return None
    return float((predicted & truth).sum() / (predicted | truth).sum())


def mask_boundary(mask: np.ndarray) -> np.ndarray:
    """The pixels of a mask that differ from their right, lower or lower right neighbour: bool `(h, w)` both.

    The boundary of the DAVIS benchmark (`seg2bmap`), one pixel wide.
    """
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask != padded[1:, :-1]) | (mask != padded[:-1, 1:]) | (mask != padded[1:, 1:])


def boundary_f(predicted: np.ndarray, truth: np.ndarray, counted: np.ndarray | None = None) -> float | None:
    """Boundary F: harmonic mean of the shares of both boundaries that lie near the other one (DAVIS, Perazzi et al.,
    CVPR 2016); `None` where the truth has no boundary.

    Near is within 0.75 % of the image's diagonal, rounded up to whole pixels. DAVIS matches by dilation with a disc,
    which is the same.

    Args:
        predicted, truth: bool `(h, w)`.
        counted: bool `(h, w)`, false for pixels that are left out: they are background in both masks, as in DAVIS.

    Raises:
        InputError: if the masks are not boolean or differ in shape.
    """
    predicted, truth = _masks(predicted, truth)
    if counted is not None:
        predicted, truth = predicted & counted, truth & counted
    found, right = mask_boundary(predicted), mask_boundary(truth)
    if not right.any():
        return None
    if not found.any():
        return 0.0
    reach = math.ceil(BOUNDARY_TOLERANCE * math.hypot(*truth.shape))
    shares = [
        float((cv2.distanceTransform((~other).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[own] <= reach).mean())
        for own, other in ((found, right), (right, found))
    ]
    return 2 * shares[0] * shares[1] / max(sum(shares), 1e-12)


def transfer_mask(source_mask: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The source's mask as seen from the target: bool `(h, w)`.

    Args:
        source_mask: bool `(H, W)`.
        places: `(h, w, 2)` place in the source, in pixels, of each pixel of the target; rounded to the nearest pixel,
            and background outside the source.
    """
    height, width = source_mask.shape
    places = np.asarray(places)
    finite = np.isfinite(places).all(axis=-1)
    nearest = np.floor(np.where(finite[..., None], places, -1.0) + 0.5)
    x, y = nearest[..., 0], nearest[..., 1]
    inside = finite & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    result = np.zeros(places.shape[:2], dtype=bool)
    result[inside] = source_mask[y[inside].astype(np.int64), x[inside].astype(np.int64)]
    return result


def label_transfer(
    source_mask: np.ndarray, target_mask: np.ndarray, places: np.ndarray, counted: np.ndarray | None = None
) -> tuple[float, float | None]:
    """Label transfer: the source's annotated mask, warped onto the target, against the target's annotated mask.

    Joins both tasks and needs no keypoints (Liu et al., "SIFT Flow", 2011; Kim et al., "Deformable Spatial Pyramid",
    2013, where the figures are called LT-ACC and IoU).

    Returns:
        accuracy (share of equal pixels) and intersection over union (`None` if the target's mask is empty).

    Raises:
        InputError: if the masks are not boolean or `places` is not of the target's size.
    """
    warped = transfer_mask(np.asarray(source_mask, dtype=bool), places)
    return precision(warped, target_mask, counted), jaccard(warped, target_mask, counted)
