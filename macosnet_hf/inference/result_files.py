"""What the demo computes: pairs and collections worked on as small copies, and the files a visitor takes home.

Points are (x, y) in pixels of the *original* images, masks and cutouts that are written have their size.
"""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ..collection import CollectionResult, hard_mask, odd_ones_out, segment_collection
from ..drawing import cutout, overview
from ..errors import ImageError, InputError
from ..geometry import apply_cascade, denormalize_points, make_grid
from ..io.working_copy import WorkingCopy, distinct_names, open_working_copy
from .average import aligned_average
from .pair import DIRECTIONS, PairResult, check_points, match_images

if TYPE_CHECKING:
    from ..image_processing_macosnet import MaCoSNetImageProcessor
    from ..modeling_macosnet import MaCoSNetForKeypointMatching

# Pixels of the copies of a collection, of which many are kept at once. (Cut to a small object they have 205, a little
# less than the network sees.)
COLLECTION_SIDE = 512
SMALLEST_COLLECTION, LARGEST_COLLECTION = 2, 30

_FLOW_SIDE = 1024  # the spline is smooth: what lies between the samples is their linear interpolation
_SHEET_SIDE = 400
_STEPS = ("Found the object in", "Looked closer at", "Followed the colours of")  # of `Collection.segment`


# ---------------------------------------------------------------------------------------------------------------------
# Pairs
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairWork:
    """A matched pair: the copies, the result on them, and how its masks were refined. Never changed once made."""

    copies: tuple[WorkingCopy, WorkingCopy]
    result: PairResult
    refine: str

    @property
    def same_image(self) -> bool:
        """Whether both files show the same pixels."""
        first, second = (np.asarray(copy.image) for copy in self.copies)
        return first.shape == second.shape and bool((first == second).all())

    def refined(self, refine: str) -> PairWork:
        """The same pair with masks refined in another way; it is not matched again."""
        return self if refine == self.refine else PairWork(self.copies, self.result.with_options(refine=refine), refine)

    def transfer(self, points: Any, direction: str) -> np.ndarray:
        """Where points `(N, 2)` of one image lie in the other: `(N, 2)`.

        Raises:
            InputError: as [`PairResult.transfer`].
        """
        if direction not in DIRECTIONS:
            raise InputError(f"direction must be one of {' and '.join(DIRECTIONS)}; got {direction!r}.")
        here, there = self.copies if direction == DIRECTIONS[0] else self.copies[::-1]
        inside = here.from_original(check_points(points, here.size)).clip(0, np.array(here.image.size) - 1)
        return there.to_original(self.result.transfer(inside, direction))


def match_files(
    source: str,
    target: str,
    names: tuple[str, str] | None = None,
    *,
    model: MaCoSNetForKeypointMatching,
    processor: MaCoSNetImageProcessor,
    refine: str = "grabcut",
) -> PairWork:
    """Matches the images in two files.

    Args:
        source, target: paths.
        names: what their owner calls them.
        model, processor, refine: as in [`~macosnet_hf.inference.pair.match_pair`].

    Raises:
        ImageError: if one cannot be read; the text says whether it is the source or the target.
        InputError: for an unknown refinement.
    """
    copies = []
    for index, (role, path) in enumerate((("Source", source), ("Target", target))):
        try:
            copies.append(open_working_copy(path, names[index] if names else None))
        except ImageError as error:
            raise ImageError(f"{role}: {error}") from error
    images = (copies[0].image, copies[1].image)
    result = match_images(images, model=model, processor=processor, refine=refine)
    return PairWork((copies[0], copies[1]), result, refine)


def pair_document(work: PairWork, threshold: float = 0.0) -> dict[str, Any]:
    """Everything about a pair that is a number, ready for JSON: as `matches.json` of the command line."""
    result = work.result
    keep = result.scores > threshold
    ends = [copy.to_original(result.keypoints[keep, view]) for view, copy in enumerate(work.copies)]
    document: dict[str, Any] = {
        role: {
            "file": copy.name,
            "width": copy.size[0],
            "height": copy.size[1],
            "object_share": round(float(mask.mean()), 4),
        }
        for role, copy, mask in zip(
            ("source", "target"), work.copies, (result.source_mask, result.target_mask), strict=True
        )
    }
    document["quality"] = result.quality
    document["matches"] = [
        {"source": _rounded(start), "target": _rounded(end), "score": round(float(score), 4)}
        for start, end, score in zip(*ends, result.scores[keep], strict=True)
    ]
    # T_AB in normalised coordinates: takes points of the target to the source; `reverse` the other way.
    document["affine"] = result.affine[0].tolist()
    document["tps"] = result.tps[0].tolist()
    document["reverse"] = {"affine": result.affine[1].tolist(), "tps": result.tps[1].tolist()}
    document["refine"] = work.refine
    document["threshold"] = threshold
    return document


def matches_table(document: dict[str, Any]) -> str:
    """The matches of a [`pair_document`] as CSV with a header."""
    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    writer.writerow(["source_x", "source_y", "target_x", "target_y", "score"])
    for match in document["matches"]:
        writer.writerow([*match["source"], *match["target"], match["score"]])
    return stream.getvalue()


def pair_flow(work: PairWork, side: int = _FLOW_SIDE) -> dict[str, np.ndarray]:
    """Where every place of one image lies in the other, from the transforms, in pixels of the originals.

    Sampled on a regular grid that runs from corner pixel to corner pixel, at every pixel where an image is no
    longer than `side`.

    Returns:
        `source_to_target (h, w, 2)` and `target_to_source (h', w', 2)` float32 displacements (x, y): the place
        `(column * (W - 1) / (w - 1), row * (H - 1) / (h - 1))` of the first-named image lies that much further in
        the other; `source_size` and `target_size` are (height, width) of the originals.
    """
    result = work.result
    found: dict[str, np.ndarray] = {}
    for index, name in ((1, "source_to_target"), (0, "target_to_source")):
        here, there = work.copies if index == 1 else work.copies[::-1]
        (width, height), (other_width, other_height) = here.size, there.size
        scale = min(1.0, side / max(width, height))
        rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
        grid = make_grid(rows, columns).reshape(1, -1, 2)
        with torch.inference_mode():
            moved = apply_cascade(
                grid,
                torch.from_numpy(result.affine[index : index + 1]),
                torch.from_numpy(result.tps[index : index + 1]),
                regularization=result.tps_regularization,
            )
        flow = denormalize_points(moved, (other_height, other_width)) - denormalize_points(grid, (height, width))
        found[name] = flow.reshape(rows, columns, 2).numpy().astype(np.float32)
    for name, copy in zip(("source_size", "target_size"), work.copies, strict=True):
        found[name] = np.array(copy.size[::-1])
    return found


def write_pair_files(work: PairWork, folder: Path, threshold: float = 0.0) -> list[Path]:
    """Writes matches (JSON, CSV, drawing), flow, and masks and cutouts in the images' own sizes into a folder.

    Raises:
        ImageError: if an image is no longer where it was.
    """
    document = pair_document(work, threshold)
    (folder / "matches.json").write_text(_as_json(document), encoding="utf-8")
    (folder / "matches.csv").write_text(matches_table(document), encoding="utf-8")
    work.result.draw_matches().save(folder / "matches.png", compress_level=4)
    np.savez_compressed(folder / "flow.npz", allow_pickle=False, **pair_flow(work))
    paths = [folder / name for name in ("matches.json", "matches.csv", "matches.png", "flow.npz")]
    for role, copy, mask in zip(
        ("source", "target"), work.copies, (work.result.source_mask, work.result.target_mask), strict=True
    ):
        paths += _write_mask_and_cutout(copy, mask, folder, role)
    return paths


def _write_mask_and_cutout(copy: WorkingCopy, mask: np.ndarray, folder: Path, stem: str) -> list[Path]:
    full = copy.to_original_mask(mask)
    paths = [folder / f"{stem}_mask.png", folder / f"{stem}_cutout.png"]
    save_mask(full, paths[0])
    cutout(copy.open_original(), full).save(paths[1], compress_level=1)
    return paths


def save_mask(mask: np.ndarray, path: Path) -> None:
    """A mask `(H, W)` bool as a black and white PNG."""
    Image.fromarray(mask.astype(np.uint8) * 255).save(path, compress_level=4)


# ---------------------------------------------------------------------------------------------------------------------
# Collections
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CollectionWork:
    """A segmented collection, in the order of the images. Never changed once made.

    Attributes:
        copies: N images.
        names: N distinct names for files, without ending.
        result: soft masks, partners, agreement.
        masks: N bool masks in the copies' sizes.
        odd: indices of those that do not seem to belong, the oddest first.
        average: the rest, warped onto the one that agrees best.
        reference: the index of that one.
        refine: how the masks were refined.
    """

    copies: list[WorkingCopy]
    names: list[str]
    result: CollectionResult
    masks: list[np.ndarray]
    odd: list[int]
    average: Image.Image
    reference: int
    refine: str

    def sheet(self) -> Image.Image:
        """The contact sheet: each image with its object outlined, and the cutout below it."""
        images, masks = [], []
        for copy, mask in zip(self.copies, self.masks, strict=True):
            image = copy.image.copy()
            image.thumbnail((_SHEET_SIDE, _SHEET_SIDE))
            small = Image.fromarray(mask.astype(np.uint8) * 255).resize(image.size, Image.Resampling.BILINEAR)
            images.append(image)
            masks.append(np.asarray(small) >= 128)
        return overview(images, masks, [copy.name for copy in self.copies])


def check_collection_size(count: int) -> None:
    """Raises `InputError` unless a collection may have so many images."""
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
    progress: Callable[[float, str], None] | None = None,
) -> CollectionWork:
    """Cuts out what the images in some files have in common.

    Args:
        paths, names: N files and what their owner calls them.
        model, processor, refine: as in [`~macosnet_hf.inference.pair.match_pair`].
        progress: called often with the share that is done, 0 to 1, and what is going on; may raise to stop the work.

    Raises:
        ImageError: if an image cannot be read.
        InputError: for too few or too many images, or an unknown refinement.
    """
    count = len(paths)
    check_collection_size(count)
    progress = progress or _say_nothing
    copies = []
    for number, (path, name) in enumerate(zip(paths, names, strict=True)):
        progress(0.15 * number / count, f"Reading {name}")
        copies.append(open_working_copy(path, name, COLLECTION_SIDE))
    images = [copy.image for copy in copies]
    progress(0.15, "Looking at all images")

    def look(done: int, total: int) -> None:
        step, number = divmod(done - 1, count)
        progress(0.15 + 0.5 * done / total, f"{_STEPS[step]} {number + 1} of {count}")

    result = segment_collection(
        images,
        model=model,
        processor=processor,
        refine=refine,
        progress=look,
    )
    masks = []
    for number, (image, probability) in enumerate(zip(images, result.probabilities, strict=True)):
        progress(0.65 + 0.1 * number / count, f"Cutting out {number + 1} of {count}")
        masks.append(hard_mask(probability, (image.height, image.width)))
    odd = odd_ones_out(result.agreement)
    reference = int(np.argmax(result.agreement))
    belonging = [number for number in range(count) if number not in odd]
    average = aligned_average(
        [images[number] for number in belonging],
        result.probabilities[belonging],
        belonging.index(reference),
        model=model,
        processor=processor,
        collection=result.collection.subset(belonging) if result.collection is not None else None,
        progress=lambda done, total: progress(0.75 + 0.25 * done / total, f"Averaging {done} of {total}"),
    )
    result = replace(result, collection=None)  # results are kept for visitors, features need not be
    return CollectionWork(copies, distinct_names(list(names)), result, masks, odd, average, reference, refine)


def _say_nothing(share: float, text: str) -> None:
    """Progress that nobody watches."""


def collection_document(work: CollectionWork) -> dict[str, Any]:
    """Everything about a collection that is a number or a name, ready for JSON."""
    return {
        "photos": [
            {
                "file": copy.name,
                "mask": f"{name}_mask.png",
                "cutout": f"{name}_cutout.png",
                "width": copy.size[0],
                "height": copy.size[1],
                "object_share": round(float(mask.mean()), 4),
                "agreement": round(float(agreement), 4),
                "belongs": number not in work.odd,
                "partners": [work.copies[other].name for other in partners],
            }
            for number, (copy, name, mask, agreement, partners) in enumerate(
                zip(work.copies, work.names, work.masks, work.result.agreement, work.result.partners, strict=True)
            )
        ],
        "odd_ones_out": [work.copies[number].name for number in work.odd],
        "reference_of_the_average": work.copies[work.reference].name,
        "refine": work.refine,
    }


def write_collection_zip(
    work: CollectionWork, path: Path, progress: Callable[[float, str], None] | None = None
) -> None:
    """Writes masks and cutouts in original size, contact sheet, average and summary into one zip file.

    Args:
        path: of the zip; the images pass through its folder one by one.
        progress: as in [`segment_files`].

    Raises:
        ImageError: if an image is no longer where it was.
    """
    progress = progress or _say_nothing
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:  # PNG does not get smaller
        _add(archive, "summary.json", _as_json(collection_document(work)).encode())
        for name, image in (("overview.png", work.sheet()), ("average.png", work.average)):
            stream = io.BytesIO()
            image.save(stream, "PNG", compress_level=4)
            _add(archive, name, stream.getvalue())
        for number, (copy, name, mask) in enumerate(zip(work.copies, work.names, work.masks, strict=True)):
            progress(number / len(work.copies), f"Writing {name}")
            for written in _write_mask_and_cutout(copy, mask, path.parent, name):
                _add(archive, written.name, written.read_bytes())
                written.unlink()


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    """Without the time of day: the same collection gives the same bytes, which a server then keeps only once."""
    member = zipfile.ZipInfo(name)
    member.external_attr = 0o644 << 16  # else nobody may read what is unpacked
    archive.writestr(member, content)


def _as_json(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=1) + "\n"


def _rounded(point: np.ndarray) -> list[float]:
    return [round(float(value), 2) for value in point]
