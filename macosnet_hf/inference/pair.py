"""Matches and masks of two images: `match_pair` and its result."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ..collection import COMMON_SIMILARITY, Collection, hard_mask
from ..crops import Box, Crops, crop_to_box, crop_to_objects, refine_crops, shares_of
from ..drawing import draw_matches
from ..errors import InputError
from ..geometry import SYMMETRIES, Transform, denormalize_points, make_grid, normalize_points
from ..hints import Hint, HintedCells, PlacedHint, place_hints
from ..io.checkpoints import load_model_and_processor
from ..io.image_files import load_image
from ..io.package import DEFAULT_CHECKPOINT
from ..mask_sharing import (
    LEAST_SIMILARITY,
    NetworkMasks,
    fix_hints,
    object_similarity,
    reduce_for_refinement,
    similar_cells,
    soft_masks,
)
from ..refinement import check_method
from . import VIEWS, start_of
from .pair_instances import MatchedInstances, choose_instances
from .verdict import REASONS, WITHOUT_MATCHES, Verdict, judge

if TYPE_CHECKING:
    from ..image_processing_macosnet import MaCoSNetImageProcessor
    from ..modeling_macosnet import MaCoSNetForKeypointMatching, MaCoSNetKeypointMatchingOutput


_MAX_REMAP_SIDE = 32_000  # OpenCV's remap takes images of at most 32,766 pixels a side
_TILE = 512
_EACH_OTHER = torch.tensor([[1], [0]])


@dataclass
class _Found:
    """What the network finds in a pair, before masks and threshold select matches.

    Attributes:
        points: `(M, 2, 2)` float32 pixels of both images.
        scores: `(M,)` float32.
        probabilities: `(2, S, S)` float32 soft masks.
        verdict: how far the matches can be trusted.
        common: see [`PairResult`].
        crops: of the second pass, which the first refinement makes.
        hinted: what hints say; None without any.
    """

    model: MaCoSNetForKeypointMatching
    processor: MaCoSNetImageProcessor
    outputs: MaCoSNetKeypointMatchingOutput
    points: np.ndarray
    scores: np.ndarray
    probabilities: np.ndarray
    verdict: Verdict
    common: bool
    crops: Crops | None = None
    hinted: HintedCells | None = None

    @property
    def hints(self) -> Mapping[int, PlacedHint]:
        """By the number of the view."""
        return self.hinted.hints if self.hinted else {}


@dataclass
class PairResult:
    """Matches, masks and transforms of a pair of images. Points are (x, y) in pixels.

    Attributes:
        source, target: the images, upright RGB.
        keypoints: `(N, 2, 2)`, matched points: `[:, 0]` on the source, `[:, 1]` on the target, best first.
        scores: `(N,)` in [0, 1].
        source_mask, target_mask: `(H, W)` bool, in each image's own size.
        soft_masks: `(2, S, S)` float32, refined; the object is where they are 0.5 or more.
        affine `(2, 6)`, tps `(2, 18)`: transforms in normalised coordinates; row 0 takes points of the target to the
            source (T_AB), row 1 the other way.
        agreement: how far the matches can be trusted, in [0, 1].
        quality: the same in a word, `"good"`, `"fair"` or `"poor"`; see [`~macosnet_hf.inference.verdict`]. Neither
            depends on the threshold.
        reason: for the word, a sentence.
        instances: the single objects of both images, and the two that the matches lie on; None unless asked for.
    """

    source: Image.Image
    target: Image.Image
    keypoints: np.ndarray
    scores: np.ndarray
    source_mask: np.ndarray
    target_mask: np.ndarray
    soft_masks: np.ndarray
    affine: np.ndarray
    tps: np.ndarray
    agreement: float
    quality: str
    reason: str
    _found: _Found = field(repr=False)
    instances: MatchedInstances | None = None

    @property
    def matches(self) -> list[dict[str, Any]]:
        """List of `{"source": (x, y), "target": (x, y), "score": s}`, best first."""
        return [
            {"source": tuple(pair[0].tolist()), "target": tuple(pair[1].tolist()), "score": float(score)}
            for pair, score in zip(self.keypoints, self.scores, strict=True)
        ]

    @property
    def common(self) -> bool:
        """Whether the masks show an object that the images have in common; if not, what stands out in each of them.

        An image of nothing, such as a plain surface, has no object, whatever its mask is.
        """
        return self._found.common and self._found.verdict.reason != REASONS["blank"]

    @property
    def hints(self) -> Mapping[int, PlacedHint]:
        """What a person said of the object, by the number of the view: 0 source, 1 target."""
        return self._found.hints

    @property
    def image_sizes(self) -> torch.Tensor:
        """`(1, 2, 2)` sizes (height, width) of source and target."""
        return _sizes((self.source, self.target))

    @property
    def transforms(self) -> Transform:
        """`(2)` on the CPU: T_AB and T_BA, with the parameters `affine` and `tps`."""
        return self._found.model.make_transform(torch.from_numpy(self.affine), torch.from_numpy(self.tps))

    @property
    def orientation(self) -> str:
        """How the source shows the object, compared with the target: the name of one of `SYMMETRIES`
        (`geometry.py`), such as `"identity"`, `"mirror"` or `"turn_90"` (clockwise)."""
        number = self._found.outputs.orientation
        assert number is not None  # every pair has one
        return list(SYMMETRIES)[int(number[0])]

    @property
    def probabilities(self) -> np.ndarray:
        """`(2, S, S)` float32 soft masks of the network, before refinement."""
        return self._found.probabilities

    @property
    def network_side(self) -> int:
        """S: the network sees each image at S x S."""
        return self._found.model.config.image_size

    def with_options(self, *, refine: str = "grabcut", threshold: float = 0.0) -> PairResult:
        """The same pair with masks refined in another way, or another threshold; the pair is not matched again.

        Args:
            refine, threshold: as in [`match_pair`]. The first refinement of a pair with small objects makes the
                second pass on crops, which encodes both images once more.

        Raises:
            InputError: if an option cannot be used.
        """
        _check_options(refine, threshold)
        return _result((self.source, self.target), self._found, refine, threshold, self.instances is not None)

    def with_hints(
        self, hints: Mapping[str, Hint | PlacedHint], *, refine: str = "grabcut", threshold: float = 0.0
    ) -> PairResult:
        """The same pair with these hints instead of earlier ones; neither image is encoded again as a whole.

        Args:
            hints, refine, threshold: as in [`match_pair`], which gives the same result.

        Raises:
            InputError: if an option cannot be used.
        """
        _check_options(refine, threshold)
        images = (self.source, self.target)
        placed = place_pair_hints(hints, (self.source.size, self.target.size))
        found = _find(images, self._found.model, self._found.processor, self._found.outputs, placed)
        return _result(images, found, refine, threshold, self.instances is not None)

    def transfer(
        self,
        points: Sequence[Sequence[float]] | np.ndarray,
        direction: str = "source_to_target",
        local_matching: bool | None = None,
    ) -> np.ndarray:
        """Where points of one image lie in the other: `(N, 2)` pixels to `(N, 2)` pixels.

        Raises:
            InputError: if the points are not N pairs of finite numbers, lie outside of the image, or the
                direction is unknown.
        """
        checked = check_points(points, (self.source, self.target)[start_of(direction)].size)
        return self._transfer(checked, direction, local_matching)

    def _transfer(self, points: np.ndarray, direction: str, local_matching: bool | None = None) -> np.ndarray:
        """[`transfer`] for an array `(N, 2)` of finite numbers, which may lie in the outer half of a border pixel."""
        model, outputs = self._found.model, self._found.outputs
        with torch.inference_mode():
            start = torch.from_numpy(points.astype(np.float32)).to(outputs.affine.device)[None]
            moved = model.transfer_points(outputs, start, self.image_sizes, direction, local_matching)
        return moved[0].cpu().numpy().astype(np.float64)

    def draw_matches(self, max_matches: int = 40) -> Image.Image:
        """Both images side by side with the best matches as lines; faint ones where the quality is poor."""
        return draw_matches(
            self.source,
            self.target,
            self.keypoints[:, 0],
            self.keypoints[:, 1],
            self.scores,
            max_matches=max_matches,
            faint=self.quality == "poor",
        )

    def warped_source(self, source: Image.Image | None = None, size: tuple[int, int] | None = None) -> Image.Image:
        """The source warped onto the target, in the target's size; black outside of the source.

        Args:
            source: the same image at another size, to be warped instead of `source`.
            size: (width, height) of the target at another size, for the result.
        """
        import cv2

        source = source or self.source
        if max(source.size) > _MAX_REMAP_SIDE:
            source = source.copy()
            source.thumbnail((_MAX_REMAP_SIDE, _MAX_REMAP_SIDE))
        width, height = size or self.target.size
        # The spline is smooth: evaluated on at most 512 points a side and interpolated, it is exact to 0.02 pixels.
        coarse = (min(height, 512), min(width, 512))
        with torch.inference_mode():
            side = self.network_side
            # From the centre of the first pixel to that of the last.
            corner = normalize_points(torch.tensor([width - 1.0, height - 1.0]), (height, width), side)
            samples = (make_grid(*coarse) * corner).reshape(1, -1, 2)
            places = denormalize_points(self.transforms[:1].apply(samples), (source.height, source.width), side)
            places = places.unflatten(1, coarse)[0].permute(2, 0, 1).float()
        pixels = _as_array(source)
        warped = Image.new("RGB", (width, height))
        rows, columns = _between(height, coarse[0]), _between(width, coarse[1])
        for top in range(0, height, _TILE):  # in tiles: the places of all pixels at once take more than the image
            across = slice(top, min(top + _TILE, height))
            strip = _interpolate(places, 1, rows, across)
            for left in range(0, width, _TILE):
                along = slice(left, min(left + _TILE, width))
                map_x, map_y = _interpolate(strip, 2, columns, along).numpy()
                tile = cv2.remap(pixels, map_x, map_y, cv2.INTER_LINEAR)
                warped.paste(Image.fromarray(tile), (left, top))
        return warped


def _as_array(image: Image.Image) -> np.ndarray:
    """`(H, W, 3)` uint8 of an RGB image, strip by strip: `np.asarray` holds all of it twice on the way."""
    pixels = np.empty((image.height, image.width, 3), dtype=np.uint8)
    for top in range(0, image.height, _TILE):
        bottom = min(top + _TILE, image.height)
        pixels[top:bottom] = np.asarray(image.crop((0, top, image.width, bottom)))
    return pixels


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


def check_points(points: Sequence[Sequence[float]] | np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """Points of an image as float32 `(N, 2)`.

    Args:
        points: N pairs (x, y) in pixels.
        size: (width, height) of the image that they must lie in; None for points anywhere.

    Raises:
        InputError: if they are not N pairs of finite numbers within the image.
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
    if size is not None and (outside := ((array < 0) | (array > np.array(size) - 1)).any(axis=1)).any():
        x, y = array[outside][0]
        raise InputError(f"The point ({x:g}, {y:g}) lies outside of the image, which is {size[0]}x{size[1]} pixels.")
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
    orientations: str | None = None,
    device: str = "auto",
    hints: Mapping[str, Hint] | None = None,
    instances: bool = False,
) -> PairResult:
    """Matches two images of the same kind of object and segments the object in both.

    Args:
        source, target: path, bytes, file object, PIL image or array, as for [`load_image`].
        model, processor: loaded already; otherwise `checkpoint` is loaded on `device`, once per process.
        refine: how soft masks become hard ones: `"grabcut"`, `"otsu"` or `"crf"`, by the steps of
            [`Collection.segment`](collection.py) for a collection of two; `"none"` for the decoder's masks at 0.5.
        threshold: matches with a smaller score are dropped.
        orientations: how the source may show the object, compared with the target: `"none"`, as the target does (the
            paper); `"mirror"`, perhaps as its mirror image; `"all"`, perhaps mirrored or turned by quarters. By default
            what the model's configuration says.
        hints: what a person says of the object, for `"source"`, `"target"` or both ([`~macosnet_hf.hints.Hint`]), in
            pixels. The masks of both images follow it, and matches lie on these masks.
        instances: whether to tell the objects of each image apart ([`~macosnet_hf.instances.split_instances`]); the
            matches are then those between the two objects, one in each image, that match best.

    Returns:
        [`PairResult`].

    Raises:
        ImageError: if an image cannot be read.
        InputError: if an option cannot be used.
        CheckpointError: if the checkpoint cannot be used.
    """
    _check_options(refine, threshold)
    images = (load_image(source), load_image(target))
    if model is None or processor is None:
        if model is not None or processor is not None:
            raise InputError("Pass model and processor together, or neither.")
        model, processor = _cached_checkpoint(os.fspath(checkpoint), device)
    options: dict[str, Any] = {"refine": refine, "threshold": threshold, "orientations": orientations, "hints": hints}
    return match_images(images, model=model, processor=processor, instances=instances, **options)


def match_images(
    images: tuple[Image.Image, Image.Image],
    *,
    model: MaCoSNetForKeypointMatching,
    processor: MaCoSNetImageProcessor,
    refine: str = "grabcut",
    threshold: float = 0.0,
    orientations: str | None = None,
    hints: Mapping[str, Hint | PlacedHint] | None = None,
    instances: bool = False,
) -> PairResult:
    """[`match_pair`] for images that are loaded already. The result holds them, not copies of them.

    Args:
        images: source and target, upright RGB as [`load_image`] gives them; nobody may change them afterwards.
        model, processor, refine, threshold, orientations, hints, instances: as in [`match_pair`].

    Raises:
        InputError: if an option cannot be used.
    """
    _check_options(refine, threshold)
    placed = place_pair_hints(hints or {}, (images[0].size, images[1].size))
    pixels = processor([list(images)], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        outputs = model(pixels.to(model.device), orientations=orientations)
    return _result(images, _find(images, model, processor, outputs, placed), refine, threshold, instances)


def _find(
    images: tuple[Image.Image, Image.Image],
    model: MaCoSNetForKeypointMatching,
    processor: MaCoSNetImageProcessor,
    outputs: MaCoSNetKeypointMatchingOutput,
    placed: Mapping[int, PlacedHint],
) -> _Found:
    """What the outputs for a pair, and hints by the number of the view, say."""
    points = processor.post_process_keypoint_matching(outputs, _sizes(images))[0]
    assert outputs.mask_logits is not None  # of a pair that was matched
    soft = soft_masks(outputs.mask_logits[0])
    hinted = HintedCells.of(outputs.features[0], soft, placed) if placed else None
    if hinted is not None:
        soft = hinted.apply(soft, hinted.about(outputs.features[0]))
    common = bool(object_similarity(outputs.features[0], soft)[0, 1] >= COMMON_SIMILARITY)
    own = soft
    if _stand_alone(model, common):
        own = _salient_masks(images, model, processor)
        own[list(placed)] = soft[list(placed)]
    return _Found(
        model,
        processor,
        outputs,
        points=torch.stack((points["keypoints0"], points["keypoints1"]), dim=1).float().cpu().numpy(),
        scores=points["matching_scores"].float().cpu().numpy(),
        probabilities=own.cpu().numpy(),
        verdict=judge(model.macosnet, outputs.features[0], soft, model.transforms(outputs)[0]),
        common=common,
        hinted=hinted,
    )


def _result(
    images: tuple[Image.Image, Image.Image], found: _Found, refine: str, threshold: float, instances: bool
) -> PairResult:
    """Hard masks, and the matches with a score above the threshold that lie on both, or on one object of each."""
    if refine == "none":
        soft = fix_hints(torch.from_numpy(found.probabilities), found.hints).numpy()
    else:
        if found.crops is None:
            found.crops = _second_pass(images, found)
        soft = refine_crops(found.crops, refine, hints=found.hints).numpy()
    masks = [hard_mask(mask, (image.height, image.width)) for image, mask in zip(images, soft, strict=True)]
    on_object = _on_masks(found.points, masks)
    objects = None
    if instances:
        numbers = np.flatnonzero(on_object)
        objects, on_chosen = choose_instances(
            soft,
            found.outputs.features[0].cpu(),
            found.points[numbers],
            found.scores[numbers],
            (images[0].size, images[1].size),
        )
        on_object[numbers[~on_chosen]] = False
    empty = not on_object.any() and found.verdict.quality != "poor"  # which has a reason already
    chosen = np.flatnonzero(on_object & (found.scores > threshold))
    chosen = chosen[np.argsort(-found.scores[chosen], kind="stable")]
    return PairResult(
        source=images[0],
        target=images[1],
        keypoints=found.points[chosen].astype(np.float64),
        scores=found.scores[chosen].astype(np.float64),
        source_mask=masks[0],
        target_mask=masks[1],
        soft_masks=soft,
        affine=found.outputs.affine[0].float().cpu().numpy(),
        tps=found.outputs.tps[0].float().cpu().numpy(),
        **(WITHOUT_MATCHES if empty else found.verdict)._asdict(),
        _found=found,
        instances=objects,
    )


def _second_pass(images: tuple[Image.Image, Image.Image], found: _Found) -> Crops:
    """The second pass on crops of a collection of two, see [`Collection.segment`]."""

    def look_at(boxes: Sequence[Box | None]) -> tuple[Sequence[Image.Image], NetworkMasks]:
        side = found.model.config.image_size
        collection = Collection(found.model, found.processor)
        collection.add([crop_to_box(image, box, side) for image, box in zip(images, boxes, strict=True)])
        common = torch.tensor([found.common] * 2)
        places = [box and shares_of(box, side) for box in boxes]
        first = collection.first_pass(common=common, hinted=found.hinted, boxes=places)
        return collection.images, first.masks.cpu()

    least = LEAST_SIMILARITY if found.model.config.decoder_inputs == "common" else None
    cells = similar_cells(found.outputs.features[0].float().cpu(), _EACH_OTHER, least)
    if _stand_alone(found.model, found.common):
        cells = cells.without(torch.tensor([True, True]))
    crops = crop_to_objects(
        Crops(images, (None, None), NetworkMasks.of(torch.from_numpy(found.probabilities), cells), found.hints), look_at
    )
    # Reduced at once: a server stores the result, and refines it again.
    return crops._replace(images=[reduce_for_refinement(image) for image in crops.images])


def _stand_alone(model: MaCoSNetForKeypointMatching, common: bool) -> bool:
    """Whether each mask is made without the other image, see [`Collection.segment`]."""
    return model.config.decoder_inputs == "common" and not common


def _salient_masks(
    images: tuple[Image.Image, Image.Image], model: MaCoSNetForKeypointMatching, processor: MaCoSNetImageProcessor
) -> torch.Tensor:
    """`(2, S, S)` soft masks of what stands out in each image."""
    collection = Collection(model, processor)
    return torch.stack([collection.salient_mask(number) for number in collection.add(images)])


def place_pair_hints(
    hints: Mapping[str, Hint | PlacedHint], sizes: tuple[tuple[int, int], tuple[int, int]]
) -> dict[int, PlacedHint]:
    """Hints in shares of source (0) and target (1), whose sizes are (width, height).

    Raises:
        InputError: for another name than source or target, and as [`~macosnet_hf.hints.Hint.place`].
    """
    numbers: dict[int, Hint | PlacedHint] = {}
    for name, hint in hints.items():
        if name not in VIEWS:
            raise InputError(f"A hint is for source or target, not {name!r}.")
        numbers[VIEWS.index(name)] = hint
    return place_hints(numbers, sizes, VIEWS)


def _check_options(refine: str, threshold: float) -> None:
    check_method(refine)
    if not 0 <= threshold <= 1:
        raise InputError(f"threshold must lie between 0 and 1; got {threshold}.")


def _sizes(images: tuple[Image.Image, Image.Image]) -> torch.Tensor:
    return torch.tensor([[[image.height, image.width] for image in images]])


def _on_masks(points: np.ndarray, masks: list[np.ndarray]) -> np.ndarray:
    """Which matches `(N, 2, 2)` lie on both hard masks: `(N,)` bool."""
    on_both = np.ones(len(points), dtype=bool)
    for view, mask in enumerate(masks):
        column, row = np.rint(points[:, view]).astype(int).T
        on_both &= mask[row.clip(0, mask.shape[0] - 1), column.clip(0, mask.shape[1] - 1)]
    return on_both
