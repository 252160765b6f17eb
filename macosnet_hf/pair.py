"""Two photographs in, matches and masks out: the one call behind the command line, the app and the README."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from . import DEFAULT_CHECKPOINT
from .collection import refined_mask
from .drawing import draw_matches
from .errors import InputError
from .geometry import denormalize_points, normalize_points, sample_at, sampling_grid
from .image_io import load_image
from .loading import load_model_and_processor

if TYPE_CHECKING:
    from .image_processing_macosnet import MaCoSNetImageProcessor
    from .modeling_macosnet import MaCoSNetForKeypointMatching, MaCoSNetKeypointMatchingOutput

DIRECTIONS = ("source_to_target", "target_to_source")

_MAX_REMAP_SIDE = 32_000  # OpenCV's remap takes pictures of at most 32,766 pixels a side
_TILE = 1024


@dataclass
class _Candidates:
    """What the network found, before the hard masks and the threshold choose among it.

    Attributes:
        points: `(M, 2, 2)` float32 pixels of both photographs.
        scores: `(M,)` float32.
        probabilities: `(2, S, S)` float32 soft masks.
    """

    points: np.ndarray
    scores: np.ndarray
    probabilities: np.ndarray


@dataclass
class PairResult:
    """Everything known about a pair of photographs. Points are (x, y) in pixels of the original photographs.

    Attributes:
        source, target: the photographs, upright RGB.
        keypoints: `(N, 2, 2)`, matched points: `[:, 0]` on the source, `[:, 1]` on the target, best first.
        scores: `(N,)` in [0, 1].
        source_mask, target_mask: `(H, W)` bool, in each photograph's own size.
        affine `(2, 6)`, tps `(2, 18)`: transforms in normalised coordinates; row 0 takes points of the target to the
            source (T_AB), row 1 the other way.
        quality: how far the result can be trusted: `"good"`, `"fair"` or `"poor"`, see [`quality_in_words`]; whatever
            the threshold.
    """

    source: Image.Image
    target: Image.Image
    keypoints: np.ndarray
    scores: np.ndarray
    source_mask: np.ndarray
    target_mask: np.ndarray
    affine: np.ndarray
    tps: np.ndarray
    quality: str
    _outputs: MaCoSNetKeypointMatchingOutput = field(repr=False)
    _model: MaCoSNetForKeypointMatching = field(repr=False)
    _candidates: _Candidates = field(repr=False)

    @property
    def matches(self) -> list[dict[str, Any]]:
        """List of `{"source": (x, y), "target": (x, y), "score": s}`, best first."""
        return [
            {"source": tuple(pair[0].tolist()), "target": tuple(pair[1].tolist()), "score": float(score)}
            for pair, score in zip(self.keypoints, self.scores, strict=True)
        ]

    @property
    def image_sizes(self) -> torch.Tensor:
        """`(1, 2, 2)` sizes (height, width) of source and target."""
        return _sizes((self.source, self.target))

    @property
    def tps_regularization(self) -> float:
        """That of the spline whose parameters are `tps`."""
        return float(self._model.config.tps_regularization)

    @property
    def probabilities(self) -> np.ndarray:
        """`(2, S, S)` float32 soft masks of source and target, at the network's resolution."""
        return self._candidates.probabilities

    def with_options(self, *, refine: str = "grabcut", threshold: float = 0.0) -> PairResult:
        """The same pair with masks refined in another way, or another threshold; the network does not run again.

        Args:
            refine, threshold: as in [`match_pair`].

        Raises:
            InputError: if an option cannot be used.
        """
        _check_threshold(threshold)
        return _result((self.source, self.target), self._model, self._outputs, self._candidates, refine, threshold)

    def transfer(
        self,
        points: Sequence[Sequence[float]] | np.ndarray,
        direction: str = "source_to_target",
        local_matching: bool | None = None,
    ) -> np.ndarray:
        """Where points of one photograph lie in the other: `(N, 2)` pixels to `(N, 2)` pixels.

        Raises:
            InputError: if the points are not N pairs of finite numbers, lie outside of the photograph, or the
                direction is unknown.
        """
        if direction not in DIRECTIONS:
            raise InputError(f"direction must be 'source_to_target' or 'target_to_source'; got {direction!r}.")
        photo = self.source if direction == "source_to_target" else self.target
        checked = check_points(points, photo.size)
        with torch.inference_mode():
            moved = self._model.transfer_points(
                self._outputs,
                torch.from_numpy(checked).to(self._outputs.affine.device)[None],
                self.image_sizes,
                direction,
                local_matching,
            )
        return moved[0].cpu().numpy().astype(np.float64)

    def draw_matches(self, max_matches: int = 40) -> Image.Image:
        """Both photographs side by side with the best matches as lines."""
        return draw_matches(
            self.source, self.target, self.keypoints[:, 0], self.keypoints[:, 1], self.scores, max_matches=max_matches
        )

    def warped_source(self) -> Image.Image:
        """The source bent so that it lies on the target, in the target's size; black where the source shows nothing."""
        import cv2

        source = self.source
        if max(source.size) > _MAX_REMAP_SIDE:
            source = source.copy()
            source.thumbnail((_MAX_REMAP_SIDE, _MAX_REMAP_SIDE))
        width, height = self.target.size
        # The spline is smooth: evaluated on at most 512 points a side and interpolated, it is exact to 0.02 pixels.
        size = (min(height, 512), min(width, 512))
        with torch.inference_mode():
            grid = sampling_grid(
                torch.from_numpy(self.affine[:1]),
                torch.from_numpy(self.tps[:1]),
                size=size,
                regularization=self._model.config.tps_regularization,
            )
            places = denormalize_points(grid, (source.height, source.width))[0].permute(2, 0, 1).float()
        pixels = np.asarray(source)
        warped = np.empty((height, width, 3), dtype=np.uint8)
        rows, columns = _between(height, size[0]), _between(width, size[1])
        for top in range(0, height, _TILE):  # in tiles: the places of all pixels at once take more than the picture
            across = slice(top, min(top + _TILE, height))
            strip = _interpolate(places, 1, rows, across)
            for left in range(0, width, _TILE):
                along = slice(left, min(left + _TILE, width))
                map_x, map_y = _interpolate(strip, 2, columns, along).numpy()
                warped[across, along] = cv2.remap(pixels, map_x, map_y, cv2.INTER_LINEAR)
        return Image.fromarray(warped)


def quality_in_words(similarity: np.ndarray) -> str:
    """How far a pair's matches can be trusted: `"good"`, `"fair"` or `"poor"`.

    The measure is the mean cosine similarity of the matched features, with fewer than 20 matches counted as 20. On 104
    pairs of msrc-coseg, half of them of different classes, with the embedded checkpoint, the area under the ROC curve
    is 0.86. "good" is said of 62 % of the pairs of one class and of 10 % of the others, at least "fair" of 88 % and of
    31 %. Other encoders have other similarities.

    Args:
        similarity: `(N,)` cosine similarity of the features at both ends of each match.
    """
    strength = float(np.sum(similarity)) / max(len(similarity), 20)
    return "good" if strength >= 0.32 else "fair" if strength >= 0.25 else "poor"


def _between(count: int, coarse: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For `count` positions spread over `coarse` samples, end on end: lower and upper sample and the upper's weight."""
    position = torch.linspace(0, coarse - 1, count, dtype=torch.float64)
    lower = position.floor().long().clamp(max=max(coarse - 2, 0))
    return lower, (lower + 1).clamp(max=coarse - 1), (position - lower).float()


def _interpolate(values: torch.Tensor, dim: int, positions: tuple[torch.Tensor, ...], part: slice) -> torch.Tensor:
    """Linear interpolation of `(C, h, w)` along one dimension, at some of the positions that `_between` gave."""
    lower, upper, weight = (of_all[part] for of_all in positions)
    shape = [1] * values.dim()
    shape[dim] = -1
    return torch.lerp(values.index_select(dim, lower), values.index_select(dim, upper), weight.view(shape))


def check_points(points: Sequence[Sequence[float]] | np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Points of a photograph as float32 `(N, 2)`.

    Args:
        points: N pairs (x, y) in pixels.
        size: (width, height) of the photograph.

    Raises:
        InputError: if they are not N pairs of finite numbers within the photograph.
    """
    try:
        array = np.asarray(points, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:  # OverflowError: a whole number of 400 digits
        raise InputError("Points must be pairs of numbers (x, y).") from error
    if array.size == 0:
        return np.zeros((0, 2), dtype=np.float32)
    if array.ndim != 2 or array.shape[1] != 2:
        raise InputError(f"Points must be pairs of numbers (x, y); got an array of shape {array.shape}.")
    if not np.isfinite(array).all():
        raise InputError("Points must be finite numbers.")
    outside = ((array < 0) | (array > np.array(size) - 1)).any(axis=1)
    if outside.any():
        x, y = array[outside][0]
        raise InputError(
            f"The point ({x:g}, {y:g}) lies outside of the photograph, which is {size[0]}x{size[1]} pixels."
        )
    return array.astype(np.float32)


@functools.lru_cache(maxsize=2)
def _cached_checkpoint(checkpoint: str, device: str) -> tuple[MaCoSNetForKeypointMatching, MaCoSNetImageProcessor]:
    return load_model_and_processor(checkpoint, device)


def match_pair(
    source: Any,
    target: Any,
    *,
    model: MaCoSNetForKeypointMatching | None = None,
    processor: MaCoSNetImageProcessor | None = None,
    checkpoint: str | os.PathLike[str] = DEFAULT_CHECKPOINT,
    refine: str = "grabcut",
    threshold: float = 0.0,
    device: str = "auto",
) -> PairResult:
    """Matches two photographs of the same kind of object and cuts the object out of both.

    Args:
        source, target: path, bytes, file object, PIL picture or array: whatever [`load_image`] takes.
        model, processor: loaded already; otherwise `checkpoint` is loaded on `device`, once per process.
        refine: how soft masks become hard ones: `"grabcut"`, `"otsu"`, `"crf"` or `"none"`.
        threshold: matches with a smaller score are dropped.

    Returns:
        [`PairResult`].

    Raises:
        ImageError: if a photograph cannot be read.
        InputError: if an option cannot be used.
        CheckpointError: if the checkpoint cannot be used.
    """
    _check_threshold(threshold)
    photos = (load_image(source), load_image(target))
    if model is None or processor is None:
        if model is not None or processor is not None:
            raise InputError("Pass model and processor together, or neither.")
        model, processor = _cached_checkpoint(os.fspath(checkpoint), device)
    pixels = processor([list(photos)], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        outputs = model(pixels.to(model.device))
    found = processor.post_process_keypoint_matching(outputs, _sizes(photos))[0]
    candidates = _Candidates(
        points=torch.stack((found["keypoints0"], found["keypoints1"]), dim=1).float().cpu().numpy(),
        scores=found["matching_scores"].float().cpu().numpy(),
        probabilities=outputs.mask_logits[0].float().sigmoid().cpu().numpy(),
    )
    return _result(photos, model, outputs, candidates, refine, threshold)


def _result(
    photos: tuple[Image.Image, Image.Image],
    model: MaCoSNetForKeypointMatching,
    outputs: MaCoSNetKeypointMatchingOutput,
    candidates: _Candidates,
    refine: str,
    threshold: float,
) -> PairResult:
    """Hard masks, and the candidates that lie on both of them with a score above the threshold."""
    with ThreadPoolExecutor(2) as pool:  # GrabCut takes longer than the network, on one core
        masks = list(pool.map(refined_mask, photos, candidates.probabilities, (refine, refine)))
    points, scores = candidates.points, candidates.scores
    keep = _on_masks(points, masks)
    quality = quality_in_words(_feature_similarity(outputs.features, points[keep], _sizes(photos)))
    keep &= scores > threshold
    points, scores = points[keep], scores[keep]
    order = np.argsort(-scores, kind="stable")
    return PairResult(
        source=photos[0],
        target=photos[1],
        keypoints=points[order].astype(np.float64),
        scores=scores[order].astype(np.float64),
        source_mask=masks[0],
        target_mask=masks[1],
        affine=outputs.affine[0].float().cpu().numpy(),
        tps=outputs.tps[0].float().cpu().numpy(),
        quality=quality,
        _outputs=outputs,
        _model=model,
        _candidates=candidates,
    )


def _check_threshold(threshold: float) -> None:
    if not 0 <= threshold <= 1:
        raise InputError(f"threshold must lie between 0 and 1; got {threshold}.")


def _sizes(photos: tuple[Image.Image, Image.Image]) -> torch.Tensor:
    return torch.tensor([[[photo.height, photo.width] for photo in photos]])


def _feature_similarity(features: torch.Tensor, points: np.ndarray, sizes: torch.Tensor) -> np.ndarray:
    """Cosine similarity `(N,)` of the features `(1, 2, C, h, w)` at both ends of matches `(N, 2, 2)` in pixels."""
    found = []
    for view in (0, 1):
        normalized = normalize_points(torch.from_numpy(points[None, :, view]), sizes[:, view]).to(features.device)
        found.append(sample_at(features[:, view].float(), normalized.float()))
    similarity: np.ndarray = torch.nn.functional.cosine_similarity(found[0], found[1], dim=-1)[0].cpu().numpy()
    return similarity


def _on_masks(points: np.ndarray, masks: list[np.ndarray]) -> np.ndarray:
    """Which matches `(N, 2, 2)` lie on both hard masks: `(N,)` bool."""
    keep = np.ones(len(points), dtype=bool)
    for view, mask in enumerate(masks):
        column, row = np.rint(points[:, view]).astype(int).T
        keep &= mask[row.clip(0, mask.shape[0] - 1), column.clip(0, mask.shape[1] - 1)]
    return keep
