"""Soft masks to hard masks: GrabCut (default), Otsu's threshold or DenseCRF, as in Table 9 of the paper.

The module travels with the model to the Hub. OpenCV and pydensecrf are imported where they are used only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from .errors import InputError

REFINEMENT_METHODS = ("grabcut", "otsu", "crf", "none")

# The soft mask's values below and above which GrabCut may not change the label. Where object and background share few
# colours (a small overlap of their histograms), GrabCut is better than the soft mask and gets wide limits; elsewhere it
# floods. Chosen on every second image of msrc-coseg with the soft masks of the embedded checkpoint. J on all images by
# overlap, wide limits and narrow ones: below 0.72 0.909 and 0.902; to 0.78 0.874 and 0.870; to 0.83 0.774 and 0.778;
# from 0.91 to 0.95 0.671 and 0.686.
NARROW_LIMITS = (0.15, 0.75)
WIDE_LIMITS = (0.05, 0.9)
_DISTINCT_BELOW = 0.8
_COLOUR_BINS = 24
_BINOMIAL = np.array([1, 4, 6, 4, 1]) / 16

_COMPONENTS = 5  # of each of GrabCut's two colour models, which need at least as many samples
# A soft mask that lies on one side of the threshold is split by Otsu's only if it varies by at least this much.
_MIN_CONTRAST = 0.1
_MIN_REMAINING_AREA = 0.1  # share of the first guess; GrabCut's answer is refused where it has less


def check_method(method: str) -> None:
    """Raises `InputError` for a method that is not in `REFINEMENT_METHODS`."""
    if method not in REFINEMENT_METHODS:
        raise InputError(f"Unknown refinement {method!r}; choose one of {', '.join(REFINEMENT_METHODS)}.")


def refine_mask(
    image: Any,
    probability: Any,
    method: str = "grabcut",
    *,
    threshold: float = 0.5,
    working_size: int = 320,
    iterations: int = 1,
    sure_background: float | None = None,
    sure_foreground: float | None = None,
    fixed: np.ndarray | None = None,
) -> np.ndarray:
    """Hard mask of the object from its soft mask and the image's colours.

    - `"grabcut"`: two colour mixtures and a graph cut (Rother et al., 2004), started from the soft mask: below
      `sure_background` and above `sure_foreground` the label is fixed, in between the threshold gives the first guess.
      The defaults are 0.15 and 0.75; where the colours of object and background differ ([`colour_overlap`] below 0.8)
      they are 0.05 and 0.9, so that the colours may correct even a confident soft mask.
    - `"otsu"`: the threshold that separates the soft mask's values best (Otsu, 1979); ignores the colours.
    - `"crf"`: fully connected conditional random field (Krähenbühl and Koltun, 2011); needs the extra `crf`.
    - `"none"`: `probability >= threshold`.

    GrabCut and the CRF run on a copy whose longer side is at most `working_size`; the result is enlarged with a smooth
    edge. Both are deterministic (GrabCut sets the random generator of OpenCV in the calling thread).

    The thresholded mask is returned where there is nothing to refine (the soft mask is constant, or object or
    background would have almost no pixel) and where GrabCut loses the object (less than a tenth of the first guess
    remains). For GrabCut, a soft mask that varies but lies on one side of `threshold` is split by Otsu's threshold.

    Args:
        image: uint8 `(H, W, 3)` RGB array, or a PIL image (its EXIF orientation is ignored).
        probability: `(H, W)` numbers in [0, 1], numpy or torch; high on the object.
        method: one of `REFINEMENT_METHODS`.
        threshold: where the object begins, for "none" and as the first guess of "grabcut".
        working_size: longer side, in pixels, at which GrabCut and the CRF run.
        iterations: rounds of GrabCut; the CRF takes five mean-field steps whatever this says.
        sure_background: soft mask value below which GrabCut may not see the object; `None` chooses by the colours.
        sure_foreground: soft mask value above which GrabCut must see the object; likewise.
        fixed: `(H, W)` int8, labels that the result has: 1 object, -1 background, 0 open. GrabCut also learns its
            colours from them.

    Returns:
        bool `(H, W)`, true on the object.

    Raises:
        InputError: wrong shapes or types, values that are not finite or not in [0, 1], an unknown method, or "crf"
            without its package.
    """
    check_method(method)
    rgb = _as_rgb_array(image)
    soft = _as_probability(probability, rgb.shape[:2])
    if fixed is not None:
        if np.shape(fixed) != soft.shape:
            raise InputError(f"The fixed labels must have the soft mask's shape {soft.shape}, not {np.shape(fixed)}.")
        soft = fix_labels(soft, fixed)
        found = refine_mask(
            rgb,
            soft,
            method,
            threshold=threshold,
            working_size=working_size,
            iterations=iterations,
            sure_background=sure_background,
            sure_foreground=sure_foreground,
        )
        return fix_labels(found, fixed)
    if method == "none":
        return soft >= threshold
    if method == "otsu":
        return _above_otsu(soft, threshold)
    small_rgb, small_soft = _at_working_size(rgb, soft, working_size)
    if method == "grabcut":
        refined = _grabcut(small_rgb, small_soft, threshold, iterations, sure_background, sure_foreground)
    else:
        refined = _dense_crf(small_rgb, small_soft)
    if refined is None:
        return soft >= threshold
    return _smooth_upsample(refined, *soft.shape) >= 0.5


def fix_labels(mask: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    """A soft or hard mask that is 1 where `fixed` is 1, and 0 where it is -1; all of the same shape."""
    found: np.ndarray = np.where(fixed == 0, mask, fixed > 0).astype(mask.dtype)
    return found


def _as_rgb_array(image: Any) -> np.ndarray:
    array = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise InputError(f"The image must be uint8 of shape (height, width, 3), not {array.dtype} of {array.shape}.")
    return np.ascontiguousarray(array)


def _as_probability(probability: Any, size: tuple[int, ...]) -> np.ndarray:
    if hasattr(probability, "detach"):  # a torch tensor, of any precision and device
        probability = probability.detach().cpu().float().numpy()
    array = np.asarray(probability)
    if array.shape != tuple(size):
        raise InputError(f"The soft mask must have the image's height and width {tuple(size)}, not {array.shape}.")
    if array.dtype != np.bool_ and not np.issubdtype(array.dtype, np.floating):
        raise InputError(f"The soft mask must hold floating-point numbers in [0, 1], not {array.dtype}.")
    array = array.astype(np.float32, copy=False)  # `clip` copies
    if not np.isfinite(array).all():
        raise InputError("The soft mask contains values that are not finite numbers.")
    if array.min() < -1e-3 or array.max() > 1 + 1e-3:
        raise InputError("The soft mask must lie in [0, 1]; put logits through a sigmoid first.")
    return array.clip(0, 1)


def _at_working_size(rgb: np.ndarray, soft: np.ndarray, working_size: int) -> tuple[np.ndarray, np.ndarray]:
    height, width = soft.shape
    scale = working_size / max(height, width)
    if working_size < 1:
        raise InputError(f"working_size must be at least 1 pixel, not {working_size}.")
    if scale >= 1:
        return rgb, soft
    cv2 = opencv()
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    # The mean over each pixel's area, for image and mask, keeps the two aligned.
    return cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), cv2.resize(soft, size, interpolation=cv2.INTER_AREA)


def otsu_threshold(values: np.ndarray, bins: int = 256) -> float | None:
    """The threshold that maximises the variance between two classes (Otsu, 1979); `None` if all values are equal.

    Args:
        values: floating-point numbers of any shape.
        bins: of their histogram, at most 256: OpenCV's threshold takes 8-bit values.
    """
    low, high = float(values.min()), float(values.max())
    if not high > low:
        return None
    edges = np.histogram_bin_edges(values, bins, (low, high))
    index = (np.searchsorted(edges, values.ravel(), side="right") - 1).clip(0, bins - 1)
    cv2 = opencv()
    split, _ = cv2.threshold(index.astype(np.uint8), 0, 255, cv2.THRESH_OTSU)
    return float(edges[int(split) + 1])


def _above_otsu(soft: np.ndarray, threshold: float) -> np.ndarray:
    found = otsu_threshold(soft)
    return soft >= (threshold if found is None else found)


def _grabcut(
    rgb: np.ndarray,
    soft: np.ndarray,
    threshold: float,
    iterations: int,
    background_below: float | None,
    foreground_above: float | None,
) -> np.ndarray | None:
    """float32 `(h, w)` of 0 and 1, or `None` where GrabCut has nothing to work on."""
    if iterations < 1:
        raise InputError(f"GrabCut needs at least 1 iteration, not {iterations}.")
    guess = soft >= threshold
    if background_below is None or foreground_above is None:
        limits = WIDE_LIMITS if colour_overlap(rgb, soft) < _DISTINCT_BELOW else NARROW_LIMITS
        background_below = limits[0] if background_below is None else background_below
        foreground_above = limits[1] if foreground_above is None else foreground_above
    sure_background, sure_foreground = soft < background_below, soft > foreground_above
    if not _both_sides(guess):
        if float(soft.max() - soft.min()) < _MIN_CONTRAST:
            return None
        guess = _above_otsu(soft, threshold)
        # Where the threshold does not fit, the fixed limits do not either.
        sure_background, sure_foreground = np.zeros_like(guess), np.zeros_like(guess)
        if not _both_sides(guess):
            return None
    cv2 = opencv()
    labels = np.where(guess, np.uint8(cv2.GC_PR_FGD), np.uint8(cv2.GC_PR_BGD))
    # No limit takes all pixels from object or background: GrabCut needs samples of both.
    labels[sure_background & ~guess] = cv2.GC_BGD
    labels[sure_foreground & guess] = cv2.GC_FGD
    cv2.setRNGSeed(0)  # the colour mixtures start from a random k-means
    models = np.zeros((1, 65)), np.zeros((1, 65))
    # RGB or BGR is the same to GrabCut: its mixtures have full covariances.
    cv2.grabCut(rgb, labels, None, *models, iterations, cv2.GC_INIT_WITH_MASK)
    refined = (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)
    answer = refined if refined.sum() >= _MIN_REMAINING_AREA * guess.sum() else guess
    return answer.astype(np.float32)


def colour_overlap(rgb: np.ndarray, soft: np.ndarray) -> float:
    """The share of colours that object and background have in common, from 0 to 1.

    The Bhattacharyya coefficient of two CIELAB histograms of 24 bins a channel, smoothed by (1, 4, 6, 4, 1) / 16. Each
    pixel counts as object with its soft mask's value, and as background with the rest.

    Args:
        rgb: uint8 `(h, w, 3)`.
        soft: float32 `(h, w)` in [0, 1].
    """
    cv2 = opencv()
    bins = (cv2.cvtColor(rgb, cv2.COLOR_RGB2LAB).astype(np.int32) * _COLOUR_BINS) >> 8
    index = ((bins[..., 0] * _COLOUR_BINS + bins[..., 1]) * _COLOUR_BINS + bins[..., 2]).ravel()
    shares = []
    for weight in (soft, 1 - soft):
        histogram = np.bincount(index, weights=weight.ravel(), minlength=_COLOUR_BINS**3)
        for _ in range(3):  # along the first axis, which becomes the last
            histogram = np.ascontiguousarray(histogram.reshape(_COLOUR_BINS, -1))
            histogram = cv2.sepFilter2D(histogram, -1, np.ones(1), _BINOMIAL, borderType=cv2.BORDER_CONSTANT).T
        shares.append(histogram / max(float(histogram.sum()), 1e-12))
    return float(np.sqrt(shares[0] * shares[1]).sum())


def _both_sides(mask: np.ndarray) -> bool:
    """Whether object and background have enough pixels for a colour model each."""
    inside = int(mask.sum())
    return 2 * _COMPONENTS <= inside <= mask.size - 2 * _COMPONENTS


def _dense_crf(rgb: np.ndarray, soft: np.ndarray) -> np.ndarray | None:
    """float32 `(h, w)` posterior of the object, or `None` where the soft mask is the same everywhere."""
    crf = _pydensecrf()
    if float(soft.max() - soft.min()) < 1e-6:
        return None
    height, width = soft.shape
    clipped = soft.clip(1e-3, 1 - 1e-3)
    unary = -np.log(np.stack((1 - clipped, clipped)).reshape(2, -1))
    field = crf.DenseCRF2D(width, height, 2)
    field.setUnaryEnergy(np.ascontiguousarray(unary, dtype=np.float32))
    # The weights of the authors' example, whose 80 pixels are for images of about 500.
    field.addPairwiseGaussian(sxy=3, compat=3)
    reach = max(1.0, 80 * max(height, width) / 500)
    field.addPairwiseBilateral(sxy=reach, srgb=13, rgbim=np.array(rgb, order="C"), compat=10)  # must be writable
    return np.asarray(field.inference(5), dtype=np.float32).reshape(2, height, width)[1]


def opencv() -> Any:
    """The module cv2. Raises `InputError` where it is not installed."""
    try:
        import cv2
    except ImportError as error:
        raise InputError(
            "This refinement needs OpenCV, which is not installed: pip install opencv-python-headless."
        ) from error
    return cv2


def _pydensecrf() -> Any:
    try:
        import pydensecrf.densecrf
    except ImportError as error:
        raise InputError(
            "The refinement 'crf' needs a package that is not installed: pip install macosnet-hf[crf]."
        ) from error
    return pydensecrf.densecrf


def _smooth_upsample(small: np.ndarray, height: int, width: int) -> np.ndarray:
    """A map `(h, w)` enlarged to full size with a smooth edge."""
    if small.shape == (height, width):
        return small
    cv2 = opencv()
    # Masks of msrc-coseg reduced to 80 pixels and enlarged to 320 have J 0.961 this way, 0.951 with the nearest pixel,
    # 0.958 bilinear, 0.925 with a guided filter, which follows texture as well as outlines.
    smooth = cv2.GaussianBlur(small, (0, 0), 0.6, borderType=cv2.BORDER_REPLICATE)
    return cv2.resize(smooth, (width, height), interpolation=cv2.INTER_CUBIC)
