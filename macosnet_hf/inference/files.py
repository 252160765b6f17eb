"""Pairs and collections of image files: processed as working copies, answered in pixels of the originals.

Points are (x, y) in pixels of the *original* images; `original_mask` gives masks of their size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps

from ..collection import CollectionResult, hard_mask, odd_ones_out, segment_collection
from ..drawing import overview
from ..errors import ImageError, InputError
from ..geometry import (
    SYMMETRIES,
    Transform,
    denormalize_points,
    dense_flow,
    identity_affine,
    identity_tps,
    normalize_points,
)
from ..hints import Hint, PlacedHint, place_hints
from ..instances import fill_labels
from ..io.working_copy import WorkingCopy, distinct_names, open_working_copy, told_apart
from . import DIRECTIONS, LARGEST_COLLECTION, ROLES, SMALLEST_COLLECTION, VIEWS, start_of
from .average import aligned_average, repaired_matches
from .cutouts import CutoutStyle, make_cutout
from .pair import PairResult, check_points, match_images, place_pair_hints

if TYPE_CHECKING:
    from ..image_processing_macosnet import MaCoSNetImageProcessor
    from ..modeling_macosnet import MaCoSNetForKeypointMatching
    from .collection_transforms import CollectionMatches

Progress = Callable[[float, str], None]
"""Called often with the share that is done, 0 to 1, and the current step in words; may raise to stop the work."""

ReadCopy = Callable[..., WorkingCopy]
"""As [`~macosnet_hf.io.working_copy.open_working_copy`]: takes a path, a name and a side."""

_READING = 0.15  # share of the work of a collection
_DEMO_SIDE = 512  # longer side of a collection's working copies, many of which a server holds at once

_FLOW_SIDE = 1024  # the spline is smooth: what lies between the samples is their linear interpolation
_SHEET_SIDE = 400
_STEPS = ("Segmented", "Second pass on crops:", "Refined")  # of `Collection.segment`


# ---------------------------------------------------------------------------------------------------------------------
# Pairs
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MatchedPair:
    """Two image files and their matches.

    Attributes:
        copies: working copies of source and target.
        result: of these copies.
        refine: how the masks were refined.
        orientations: in which the source was looked for; None for those of the model's configuration.
        checkpoint: of the model, where a server with several notes it.
    """

    copies: tuple[WorkingCopy, WorkingCopy]
    result: PairResult
    refine: str
    orientations: str | None = None
    checkpoint: str = ""

    def cutout(self, view: int, style: CutoutStyle | None = None) -> Image.Image:
        """The object of the source (view 0) or target (1) alone, at the working copy's size; see [`make_cutout`]."""
        masks = (self.result.source_mask, self.result.target_mask)
        hint = self.hints.get(view)
        return make_cutout(self.copies[view].image, self.result.soft_masks[view], masks[view], style, hint)

    @property
    def hints(self) -> Mapping[int, PlacedHint]:
        """What a person said of the object, by the number of the view."""
        return self.result.hints

    @property
    def same_image(self) -> bool:
        """Whether both files show the same pixels."""
        first, second = (np.asarray(copy.image) for copy in self.copies)
        return first.shape == second.shape and bool((first == second).all())

    @property
    def keypoints(self) -> np.ndarray:
        """`(N, 2, 2)` matched points of the originals: `[:, 0]` on the source, `[:, 1]` on the target, best first."""
        ends = [copy.to_original(self.result.keypoints[:, view]) for view, copy in enumerate(self.copies)]
        return np.stack(ends, axis=1)

    def refined(self, refine: str) -> MatchedPair:
        """The same pair with masks refined in another way; the pair is not matched again."""
        if refine == self.refine:
            return self
        return replace(self, result=self.result.with_options(refine=refine), refine=refine)

    def with_hints(self, hints: Mapping[str, Hint | PlacedHint]) -> MatchedPair:
        """The same pair with these hints, in pixels of the originals, instead of earlier ones.

        Raises:
            InputError: for a hint that cannot be used.
        """
        placed = place_pair_hints(hints, (self.copies[0].size, self.copies[1].size))
        named = {VIEWS[view]: hint for view, hint in placed.items()}
        return replace(self, result=self.result.with_hints(named, refine=self.refine))

    def above(self, threshold: float) -> MatchedPair:
        """The same pair without the matches whose score is not above the threshold."""
        chosen = self.result.scores > threshold
        result = replace(self.result, keypoints=self.result.keypoints[chosen], scores=self.result.scores[chosen])
        return replace(self, result=result)

    def transfer(self, points: Any, direction: str = DIRECTIONS[0]) -> np.ndarray:
        """Where points `(N, 2)` of one original lie in the other: `(N, 2)`.

        Raises:
            InputError: as [`PairResult.transfer`].
        """
        start = start_of(direction)
        here, there = self.copies[start], self.copies[1 - start]
        of_copy = here.from_original(check_points(points, here.size))
        return there.to_original(self.result._transfer(of_copy, direction))

    def original_mask(self, view: int) -> np.ndarray:
        """Mask `(H, W)` bool of the original source (view 0) or target (1)."""
        if self.copies[view].is_whole:
            return (self.result.source_mask, self.result.target_mask)[view]
        return hard_mask(self.result.soft_masks[view], self.copies[view].size[::-1])

    def warped_source(self) -> Image.Image:
        """The original source warped onto the target, in the original target's size; black outside of the source.

        Raises:
            ImageError: if the source's file has gone.
        """
        return self.result.warped_source(self.copies[0].open_original(), self.copies[1].size)

    def flow(self, side: int = _FLOW_SIDE) -> dict[str, np.ndarray]:
        """Dense flow between the originals, from the transforms, at the pixels of reduced copies.

        Each pixel is sampled where an image is no longer than `side`.

        Returns:
            `source_to_target (h, w, 2)` and `target_to_source (h', w', 2)` float32 displacements (x, y) in pixels: the
            place `((column + 0.5) * W / w - 0.5, (row + 0.5) * H / h - 0.5)` of the first-named image lies that much
            further in the other; `source_size` and `target_size` are (height, width) of the originals.
        """
        found: dict[str, np.ndarray] = {}
        network = self.result.network_side
        for name, row in zip(DIRECTIONS, (1, 0), strict=True):
            here, there = self.copies if row == 1 else self.copies[::-1]
            (width, height), (other_width, other_height) = here.size, there.size
            scale = min(1.0, side / max(width, height))
            rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
            with torch.inference_mode():
                transform = self.result.transforms[row : row + 1]
                flow = dense_flow(transform, (rows, columns), (other_height, other_width), (height, width), network)
            found[name] = flow[0].numpy().astype(np.float32)
        for name, copy in zip(("source_size", "target_size"), self.copies, strict=True):
            found[name] = np.array(copy.size[::-1])
        return found


def match_files(
    source: str,
    target: str,
    names: tuple[str, str] | None = None,
    *,
    model: MaCoSNetForKeypointMatching,
    processor: MaCoSNetImageProcessor,
    refine: str = "grabcut",
    orientations: str | None = None,
    hints: Mapping[str, Hint | PlacedHint] | None = None,
) -> MatchedPair:
    """Matches two image files.

    Args:
        source, target: paths.
        names: what messages and results call them; by default the files' names.
        model, processor, refine, orientations: as in [`~macosnet_hf.inference.pair.match_pair`].
        hints: likewise, in pixels of the originals.

    Raises:
        ImageError: if one cannot be read; the text says whether it is the source or the target.
        InputError: for an unknown refinement.
    """
    copies = open_pair(source, target, names)
    return match_copies(copies, model=model, processor=processor, refine=refine, orientations=orientations, hints=hints)


def open_pair(
    source: str,
    target: str,
    names: tuple[str, str] | None = None,
    *,
    read: ReadCopy = open_working_copy,
    roles: tuple[str, str] = ROLES,
) -> tuple[WorkingCopy, WorkingCopy]:
    """Working copies of two image files.

    Args:
        source, target, names: as in [`match_files`].
        read: makes a working copy of a path and a name.
        roles: what errors call source and target.

    Raises:
        ImageError: if one cannot be read; the text says whether it is the source or the target.
    """
    copies = []
    for index, (role, path) in enumerate(zip(roles, (source, target), strict=True)):
        try:
            copies.append(read(path, names[index] if names else None))
        except ImageError as error:
            raise ImageError(f"{role}: {error}") from error
    return copies[0], copies[1]


def match_copies(
    copies: tuple[WorkingCopy, WorkingCopy],
    *,
    model: MaCoSNetForKeypointMatching,
    processor: MaCoSNetImageProcessor,
    refine: str = "grabcut",
    orientations: str | None = None,
    hints: Mapping[str, Hint | PlacedHint] | None = None,
    instances: bool = False,
) -> MatchedPair:
    """[`match_files`] for files that are open already; `instances` as in [`~macosnet_hf.inference.pair.match_pair`]."""
    images = (copies[0].image, copies[1].image)
    placed = place_pair_hints(hints or {}, (copies[0].size, copies[1].size))
    result = match_images(
        images,
        model=model,
        processor=processor,
        refine=refine,
        orientations=orientations,
        hints={VIEWS[view]: hint for view, hint in placed.items()},
        instances=instances,
    )
    return MatchedPair(copies, result, refine, orientations)


# ---------------------------------------------------------------------------------------------------------------------
# Collections
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SegmentedCollection:
    """Image files and the object that they have in common, in the order of the images.

    Attributes:
        copies: N working copies.
        names: N distinct names for result files, without suffix.
        result: soft masks, partners, agreement.
        masks: N bool masks of the copies' sizes.
        odd: numbers of the images that do not seem to belong, the oddest first.
        reference: number of the image that agrees best.
        average: the images that belong, warped onto the reference; None if it was not asked for.
        refine: how the masks were refined.
        orientations: of each image, the name in [`~macosnet_hf.geometry.SYMMETRIES`] of how it shows the object,
            compared with the others: identity or mirror.
        transforms: `(N, N)`, `[i, j]` takes points of j to i; NaN where nothing leads there. None without an average.
        checkpoint: of the model, where a server with several notes it.
        hints: what a person said of the object, by the number of the image.
        searched: the orientations in which the images were looked for, as in [`~macosnet_hf.collection.Collection`].
    """

    copies: Sequence[WorkingCopy]
    names: Sequence[str]
    result: CollectionResult
    masks: Sequence[np.ndarray]
    odd: list[int]
    reference: int
    average: Image.Image | None
    refine: str
    orientations: Sequence[str]
    transforms: Transform | None = None
    checkpoint: str = ""
    hints: Mapping[int, PlacedHint] = field(default_factory=dict)
    searched: str = "none"

    def reordered(self, order: Sequence[int], names: Sequence[str]) -> SegmentedCollection:
        """The same collection with its images in another order.

        Args:
            order: the numbers of all images, each once.
            names: what the images are called, in the new order; equal names are numbered.
        """
        place = {number: at for at, number in enumerate(order)}
        named = zip(order, _numbered(names), strict=True)
        copies = [replace(self.copies[number], name=name) for number, name in named]
        rows = torch.tensor(order)
        found, chosen = self.result, np.asarray(order)
        result = replace(
            found,
            probabilities=found.probabilities[chosen],
            partners=[[place[partner] for partner in found.partners[number]] for number in order],
            agreement=found.agreement[chosen],
            common=None if found.common is None else found.common[chosen],
            instances=None if found.instances is None else found.instances[chosen],
        )
        return replace(
            self,
            copies=copies,
            names=distinct_names([copy.name for copy in copies]),
            result=result,
            masks=[self.masks[number] for number in order],
            odd=[place[number] for number in self.odd],
            reference=place[self.reference],
            orientations=[self.orientations[number] for number in order],
            transforms=None if self.transforms is None else self.transforms[rows[:, None], rows],
            hints={place[number]: hint for number, hint in self.hints.items()},
        )

    def transfer(self, point: Sequence[float], number: int) -> np.ndarray:
        """Where a point of one working copy lies in all of them.

        Args:
            point: (x, y) in pixels of the copy.
            number: of the image.

        Returns:
            `(N, 2)` as (x, y) in pixels of each copy; NaN where nothing leads, such as to an odd one out.

        Raises:
            InputError: if the point does not lie in the image, or there is no such image.
        """
        if not 0 <= number < len(self.copies):
            raise InputError(f"There is no image number {number}; there are {len(self.copies)}, counted from 0.")
        images = [copy.image for copy in self.copies]
        start = torch.from_numpy(check_points([point], images[number].size))
        moved = torch.full((len(images), 2), float("nan"))
        if self.transforms is not None:
            side = self.network_side
            placed = normalize_points(start, images[number].size[::-1], side).expand(len(images), -1, -1)
            sizes = torch.tensor([image.size[::-1] for image in images])
            moved = denormalize_points(self.transforms[:, number].apply(placed), sizes, side)[:, 0]
        moved[number] = start[0]
        return moved.numpy().astype(np.float64)

    @property
    def network_side(self) -> int:
        """S: the network sees each image at S x S."""
        return int(self.result.probabilities.shape[-1])

    def has_common_object(self, number: int) -> bool:
        """Whether the mask of an image shows an object that others have too; if not, what stands out in it."""
        return self.result.common is None or bool(self.result.common[number])

    @property
    def alone(self) -> bool:
        """Whether there is one image only, which was compared with its mirror image and crops."""
        return len(self.copies) == 1

    def cutout(self, number: int, style: CutoutStyle | None = None) -> Image.Image:
        """The object of an image alone, at the working copy's size; see [`make_cutout`]."""
        soft, mask = self.result.probabilities[number], self.masks[number]
        return make_cutout(self.copies[number].image, soft, mask, style, self.hints.get(number))

    def instances(self, number: int, mask: np.ndarray | None = None) -> np.ndarray | None:
        """Labels `(H, W)` int32 of the single objects of an image: 0 background, 1 the largest; None if not asked for.

        Args:
            number: of the image.
            mask: `(H, W)` bool, the image's mask at the size of the labels; by default the working copy's.
        """
        if self.result.instances is None:
            return None
        return fill_labels(self.result.instances[number], self.masks[number] if mask is None else mask)

    def instance_mask(self, number: int, instance: int) -> np.ndarray:
        """Soft mask `(S, S)` of one object of an image, by its label."""
        labels, soft = self.result.instances, self.result.probabilities[number]
        if labels is None or not 1 <= instance <= labels[number].max():
            raise InputError(f"There is no object {instance} in {self.copies[number].name}.")
        alone: np.ndarray = np.where((labels[number] == 0) | (labels[number] == instance), soft, np.float32(0))
        return alone

    def original_mask(self, number: int) -> np.ndarray:
        """Mask `(H, W)` bool of an original."""
        return hard_mask(self.result.probabilities[number], self.copies[number].size[::-1])

    def sheet(self, numbers: Sequence[int] | None = None) -> Image.Image:
        """The contact sheet of all images or some: each with its object outlined, and the cutout below it; odd ones are
        marked.

        All face one way: those that show the object mirrored, compared with the others, are drawn mirrored.
        """
        images, masks = [], []
        names = told_apart([copy.name for copy in self.copies])
        numbers = range(len(self.copies)) if numbers is None else numbers
        for number in numbers:
            image = self.copies[number].image.copy()
            image.thumbnail((_SHEET_SIDE, _SHEET_SIDE))
            mask = Image.fromarray(self.masks[number].astype(np.uint8) * 255)
            if self.orientations[number] == "mirror":
                image, mask = ImageOps.mirror(image), ImageOps.mirror(mask)
            images.append(image)
            masks.append(np.asarray(mask.resize(image.size, Image.Resampling.BILINEAR)) >= 128)
        odd = [place for place, number in enumerate(numbers) if number in self.odd]
        return overview(images, masks, [names[number] for number in numbers], odd)


def check_collection_size(count: int) -> None:
    """Raises `InputError` unless the demo accepts a collection of that many images."""
    if count < SMALLEST_COLLECTION:
        raise InputError("Choose two or more images of the same kind of object.")
    if count > LARGEST_COLLECTION:
        raise InputError(f"Choose at most {LARGEST_COLLECTION} images; these are {count}.")


def segment_files(
    paths: Sequence[str],
    names: Sequence[str],
    *,
    model: MaCoSNetForKeypointMatching,
    processor: MaCoSNetImageProcessor,
    refine: str = "grabcut",
    orientations: str = "none",
    progress: Progress | None = None,
    hints: Mapping[int, Hint | PlacedHint] | None = None,
) -> SegmentedCollection:
    """Segments the object that 2 to 30 image files have in common, and averages it.

    Args:
        paths, names: N files and what messages and results call them; equal names are numbered.
        model, processor, refine: as in [`~macosnet_hf.inference.pair.match_pair`].
        orientations: as in [`~macosnet_hf.collection.Collection`].
        progress: see [`Progress`].
        hints: as in [`segment_copies`].

    Raises:
        ImageError: if an image cannot be read.
        InputError: for too few or too many images, an unknown refinement or unknown orientations, or a hint that
            cannot be used.
    """
    copies = open_collection(paths, names, progress)
    return segment_opened(
        copies,
        model=model,
        processor=processor,
        refine=refine,
        orientations=orientations,
        progress=progress,
        hints=hints,
    )


def open_collection(
    paths: Sequence[str],
    names: Sequence[str],
    progress: Progress | None = None,
    *,
    read: ReadCopy = open_working_copy,
) -> list[WorkingCopy]:
    """Working copies of 2 to 30 image files: the first step of [`segment_files`], whose arguments these are.

    Args:
        paths, names, progress: as there.
        read: as in [`open_pair`].
    """
    check_collection_size(len(paths))
    copies = []
    names = _numbered(names)
    for number, (path, name) in enumerate(zip(paths, names, strict=True)):
        if progress is not None:
            progress(_READING * number / len(paths), f"Reading {name}")
        copies.append(read(path, name, _DEMO_SIDE))
    return copies


def _numbered(names: Sequence[str]) -> Sequence[str]:
    """What images are called; equal names are numbered."""
    return names if len(set(names)) == len(names) else told_apart(names)


def segment_opened(
    copies: Sequence[WorkingCopy],
    *,
    model: MaCoSNetForKeypointMatching,
    processor: MaCoSNetImageProcessor,
    refine: str,
    orientations: str = "none",
    progress: Progress | None,
    hints: Mapping[int, Hint | PlacedHint] | None = None,
) -> SegmentedCollection:
    """The second step of [`segment_files`]."""
    return segment_copies(
        copies,
        distinct_names([copy.name for copy in copies]),
        model=model,
        processor=processor,
        refine=refine,
        orientations=orientations,
        progress=progress and (lambda share, text: progress(_READING + (1 - _READING) * share, text)),
        hints=hints,
    )


def with_companions(image: Image.Image) -> list[Image.Image]:
    """An image, its mirror image, and both without a tenth of each side: a collection for an image that is alone."""
    across, down = image.width // 10, image.height // 10
    crop = image.crop((across, down, image.width - across, image.height - down))
    return [image, ImageOps.mirror(image), crop, ImageOps.mirror(crop)]


def segment_copies(
    copies: Sequence[WorkingCopy],
    names: Sequence[str],
    *,
    model: MaCoSNetForKeypointMatching,
    processor: MaCoSNetImageProcessor,
    refine: str = "grabcut",
    partners: int = 2,
    average: bool = True,
    orientations: str = "none",
    progress: Progress | None = None,
    hints: Mapping[int, Hint | PlacedHint] | None = None,
    instances: bool = False,
) -> SegmentedCollection:
    """[`segment_files`] for any number of files that are open already.

    One image alone gets its mirror image and crops for partners: the mask is that of what stands out in it.

    Args:
        copies: N working copies.
        names: N distinct names for result files, without suffix.
        model, processor, refine: as in [`~macosnet_hf.inference.pair.match_pair`].
        partners: as in [`~macosnet_hf.collection.Collection.segment`].
        average: whether to average the images that belong, which takes transforms of all pairs.
        orientations: as in [`~macosnet_hf.collection.Collection`].
        progress: see [`Progress`].
        hints: as in [`~macosnet_hf.collection.Collection.segment`], in pixels of the originals.
        instances: whether to tell the objects of each image apart.

    Raises:
        InputError: for no image, no partner, an unknown refinement, unknown orientations, or a hint that cannot be
            used.
    """
    placed = place_hints(hints or {}, [copy.size for copy in copies], [copy.name for copy in copies])
    report = progress or (lambda share, text: None)
    count, images = len(copies), [copy.image for copy in copies]
    if alone := count == 1:
        images, average = with_companions(images[0]), False
    first = 0.7 if average else 1.0  # share of the segmentation

    def segmented(done: int, total: int) -> None:
        step, number = divmod(done - 1, len(images))
        report(first * done / total, f"{_STEPS[step]} {number + 1} of {len(images)}")

    report(0.0, "Encoding all images")
    result = segment_collection(
        images,
        model=model,
        processor=processor,
        partners=partners,
        refine=refine,
        orientations=orientations,
        progress=segmented,
        hints=placed,
        instances=instances,
    )
    collection = result.collection
    assert collection is not None
    if alone:
        result = replace(
            result,
            probabilities=result.probabilities[:1],
            agreement=result.agreement[:1],
            partners=[[]],
            common=np.zeros(1, dtype=bool),
            instances=None if result.instances is None else result.instances[:1],
        )
    odd = odd_ones_out(result.agreement)
    reference = int(np.argmax(result.agreement))
    mean, transforms = None, None
    if average:
        belonging = [number for number in range(count) if number not in odd]
        subset = collection.subset(belonging)
        matches = repaired_matches(subset) if len(belonging) > 1 else None
        transforms = _spread(matches, belonging, count, model)
        mean = aligned_average(
            [images[number] for number in belonging],
            result.probabilities[belonging],
            belonging.index(reference),
            model=model,
            processor=processor,
            collection=subset,
            matches=matches,
            progress=lambda done, total: report(first + (1 - first) * done / total, f"Averaged {done} of {total}"),
        )
    return SegmentedCollection(
        copies=copies,
        names=names,
        result=replace(result, collection=None),  # a server stores results; nothing asks for their features again
        masks=[hard_mask(soft, image.size[::-1]) for soft, image in zip(result.probabilities, images, strict=False)],
        odd=odd,
        reference=reference,
        average=mean,
        refine=refine,
        orientations=[list(SYMMETRIES)[number] for number in collection.orientations[:count]],
        transforms=transforms,
        hints=placed,
        searched=orientations,
    )


def _spread(
    matches: CollectionMatches | None, numbers: Sequence[int], count: int, model: MaCoSNetForKeypointMatching
) -> Transform:
    """Transforms `(N, N)` between all of `count` images, NaN but for those of some of them, which have matches."""
    affine, tps = identity_affine(count, count), identity_tps(count, count)
    affine[~torch.eye(count, dtype=torch.bool)] = float("nan")
    if matches is not None:
        rows = torch.tensor(numbers)
        affine[rows[:, None], rows], tps[rows[:, None], rows] = matches.affine, matches.tps
    return model.make_transform(affine, tps)
