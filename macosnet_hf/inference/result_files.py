"""Result files of pairs and collections: one writer for the command line and the demo.

Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from PIL import Image

from ..io.image_files import save_image
from . import VIEWS as VIEWS
from .cutouts import CutoutStyle, make_cutout

if TYPE_CHECKING:
    from ..hints import PlacedHint
    from .files import MatchedPair, Progress, SegmentedCollection

PAIR_ARCHIVE, COLLECTION_ARCHIVE = "matches.zip", "collection.zip"

MOST_INSTANCES = 255  # labels of an 8-bit image

_T = TypeVar("_T")


# ---------------------------------------------------------------------------------------------------------------------
# Pairs
# ---------------------------------------------------------------------------------------------------------------------


def pair_file_names(
    *, flow: bool = False, archive: bool = False, style: CutoutStyle | None = None, instances: bool = False
) -> list[str]:
    """Names of the files that [`write_pair`] makes, and of [`zip_folder`]'s archive of them."""
    masks = [name for view in VIEWS for name in _mask_and_cutout(view, style)]
    masks += [_instances_name(view) for view in VIEWS] * instances
    names = ["matches.json", "matches.csv", "matches.png", *masks, "source_warped.png"]
    return names + ["flow.npz"] * flow + [PAIR_ARCHIVE] * archive


def _mask_and_cutout(name: str, style: CutoutStyle | None) -> tuple[str, str]:
    """Names of an image's mask and cutout."""
    return f"{name}_mask.png", f"{name}_cutout.{(style or CutoutStyle()).format}"


def pair_document(
    pair: MatchedPair, threshold: float = 0.0, *, model: str, points: Sequence[Sequence[float]] | None = None
) -> dict[str, Any]:
    """All numbers of a pair, as `matches.json` holds them.

    Args:
        pair: the pair.
        threshold: matches with a score up to this are left out.
        model: name of the checkpoint.
        points: `(N, 2)` points of the source to transfer to the target.

    Raises:
        InputError: for points outside of the source.
    """
    chosen = pair.result.scores > threshold
    document: dict[str, Any] = {
        view: {
            "file": copy.name,
            "width": copy.size[0],
            "height": copy.size[1],
            "object_share": round(float(mask.mean()), 4),
        }
        for view, copy, mask in zip(VIEWS, pair.copies, (pair.result.source_mask, pair.result.target_mask), strict=True)
    }
    document |= {
        "quality": pair.result.quality,
        "agreement": round(pair.result.agreement, 4),
        "reason": pair.result.reason,
        "common": pair.result.common,
        "orientation": pair.result.orientation,
    }
    document["matches"] = [
        {"source": _rounded(source), "target": _rounded(target), "score": round(float(score), 4)}
        for (source, target), score in zip(pair.keypoints[chosen], pair.result.scores[chosen], strict=True)
    ]
    # T_AB in normalised coordinates: takes points of the target to the source; `reverse` the other way.
    affine, tps = pair.result.affine.tolist(), pair.result.tps.tolist()
    document |= {"affine": affine[0], "tps": tps[0], "reverse": {"affine": affine[1], "tps": tps[1]}}
    document |= {"model": model, "refine": pair.refine, "threshold": threshold}
    if (found := pair.result.instances) is not None:
        for view, (name, count) in enumerate(zip(VIEWS, found.counts, strict=True)):
            document[name] |= {"instances": count, "matched_instance": found.chosen and found.chosen[view]}
    if points is not None:
        document["points"] = [
            {"source": list(point), "target": _rounded(found)}
            for point, found in zip(points, pair.transfer(points), strict=True)
        ]
    return document


def matches_table(document: dict[str, Any]) -> str:
    """The matches of a [`pair_document`] as CSV with a header."""
    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    writer.writerow(["source_x", "source_y", "target_x", "target_y", "score"])
    writer.writerows([*match["source"], *match["target"], match["score"]] for match in document["matches"])
    return stream.getvalue()


def write_pair(
    pair: MatchedPair,
    folder: Path,
    threshold: float = 0.0,
    *,
    model: str,
    points: Sequence[Sequence[float]] | None = None,
    flow: bool = False,
    style: CutoutStyle | None = None,
) -> dict[str, Any]:
    """Writes [`pair_file_names`] into a folder: matches, and masks, cutouts and warp in the originals' sizes.

    Args:
        pair, threshold, model, points: as in [`pair_document`].
        folder: an existing folder.
        flow: whether to write the dense flow.
        style: how the cutouts look.

    Returns:
        the document in `matches.json`.

    Raises:
        ImageError: if an image file has gone.
        InputError: as [`pair_document`].
    """
    document = pair_document(pair, threshold, model=model, points=points)
    (folder / "matches.json").write_text(_as_json(document), encoding="utf-8")
    (folder / "matches.csv").write_text(matches_table(document), encoding="utf-8", newline="")
    save_image(pair.above(threshold).result.draw_matches(), folder / "matches.png", compress_level=4)
    for view, name in enumerate(VIEWS):
        mask = pair.original_mask(view)
        paths = [folder / file for file in _mask_and_cutout(name, style)]
        save_mask(mask, paths[0])
        whole = pair.copies[view].open_original()
        _save_cutout(whole, pair.result.soft_masks[view], mask, style, paths[1], pair.hints.get(view))
        if (found := pair.result.instances) is not None:
            _save_labels(found.of_mask(view, mask), folder / _instances_name(name))
    save_image(pair.warped_source(), folder / "source_warped.png", compress_level=1)
    if flow:
        np.savez_compressed(folder / "flow.npz", allow_pickle=False, **pair.flow())
    return document


def _save_cutout(
    image: Image.Image,
    soft_mask: np.ndarray,
    mask: np.ndarray,
    style: CutoutStyle | None,
    path: Path,
    hint: PlacedHint | None,
) -> None:
    style = style or CutoutStyle()
    style.save(make_cutout(image, soft_mask, mask, style, hint), path)


def save_mask(mask: np.ndarray, path: Path) -> None:
    """Writes a mask `(H, W)` bool as a black and white PNG."""
    Image.fromarray(mask.astype(np.uint8) * 255).save(path, compress_level=4)


# ---------------------------------------------------------------------------------------------------------------------
# Collections
# ---------------------------------------------------------------------------------------------------------------------


def _instances_name(name: str) -> str:
    return f"{name}_instances.png"


def _instance_cutout(name: str, number: int, style: CutoutStyle | None) -> str:
    return f"{name}_cutout_{number}.{(style or CutoutStyle()).format}"


def collection_file_names(
    names: Sequence[str],
    *,
    average: bool = False,
    archive: bool = False,
    instances: bool = False,
    style: CutoutStyle | None = None,
) -> list[str]:
    """Names of the files that [`write_collection`] makes, and of [`zip_folder`]'s archive of them.

    Args:
        names: those of the images, as of a [`~macosnet_hf.inference.files.SegmentedCollection`].
    """
    masks = [file for name in names for file in _mask_and_cutout(name, style)]
    if instances:
        numbers = range(1, MOST_INSTANCES + 1)
        masks += [_instances_name(name) for name in names]
        masks += [_instance_cutout(name, number, style) for name in names for number in numbers]
    shared = ["summary.json", "overview.png", *["average.png"] * average, *[COLLECTION_ARCHIVE] * archive]
    return shared + masks


def write_collection(
    collection: SegmentedCollection,
    folder: Path,
    *,
    model: str,
    skipped: Sequence[tuple[str, str]] = (),
    workers: int = 1,
    style: CutoutStyle | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes [`collection_file_names`] into a folder: masks and cutouts of the originals, contact sheet, summary.

    After Ctrl+C, the files of the images that are done by then, if there are any.

    Args:
        collection: the collection.
        folder: an existing folder.
        model: name of the checkpoint.
        skipped: names of images that could not be read, each with the reason.
        workers: originals that are processed at the same time.
        style: how the cutouts look.
        progress: see [`~macosnet_hf.inference.files.Progress`].

    Returns:
        the document in `summary.json`; `not_done` names the images that Ctrl+C has left out.

    Raises:
        ImageError: if an image file has gone.
        KeyboardInterrupt: if no image was done before Ctrl+C.
    """

    def write(number: int) -> float:
        mask = collection.original_mask(number)
        paths = [folder / file for file in _mask_and_cutout(collection.names[number], style)]
        save_mask(mask, paths[0])
        # The original is read now, so that few are in memory at a time.
        whole = collection.copies[number].open_original()
        soft = collection.result.probabilities[number]
        _save_cutout(whole, soft, mask, style, paths[1], collection.hints.get(number))
        _write_instances(collection, number, whole, mask, folder, style)
        return float(mask.mean())

    shares = _in_parallel(write, len(collection.names), workers, progress)
    save_image(collection.sheet(list(shares)), folder / "overview.png", compress_level=4)
    if collection.average is not None:
        save_image(collection.average, folder / "average.png", compress_level=4)
    document = _collection_document(collection, shares, model, skipped, style)
    (folder / "summary.json").write_text(_as_json(document), encoding="utf-8")
    return document


def _write_instances(
    collection: SegmentedCollection,
    number: int,
    image: Image.Image,
    mask: np.ndarray,
    folder: Path,
    style: CutoutStyle | None,
) -> None:
    """Labels and the cutout of each object of an image, if they were asked for."""
    labels = collection.instances(number, mask)
    if labels is None:
        return
    name = collection.names[number]
    _save_labels(labels, folder / _instances_name(name))
    for instance in _instances_of(collection, number):
        soft = collection.instance_mask(number, instance)
        path = folder / _instance_cutout(name, instance, style)
        _save_cutout(image, soft, labels == instance, style, path, None)


def _save_labels(labels: np.ndarray, path: Path) -> None:
    """Writes labels `(H, W)` int32 as a greyscale PNG."""
    Image.fromarray(np.minimum(labels, MOST_INSTANCES).astype(np.uint8)).save(path, compress_level=4)


def _instances_of(collection: SegmentedCollection, number: int) -> range:
    labels = collection.result.instances
    return range(1, 1 + (0 if labels is None else min(int(labels[number].max()), MOST_INSTANCES)))


def _collection_document(
    collection: SegmentedCollection,
    shares: dict[int, float],
    model: str,
    skipped: Sequence[tuple[str, str]],
    style: CutoutStyle | None,
) -> dict[str, Any]:
    """All numbers of a collection, as `summary.json` holds them.

    Args:
        shares: the object's share of each original whose files are written, by number.
    """
    files = [copy.name for copy in collection.copies]
    asked = collection.result.instances is not None
    photos = [
        {
            # Version 0.1 said "photo" on the command line and "file" in the demo.
            "photo": files[number],
            "file": files[number],
            **dict(zip(("mask", "cutout"), _mask_and_cutout(collection.names[number], style), strict=True)),
            "width": collection.copies[number].size[0],
            "height": collection.copies[number].size[1],
            "object_share": round(share, 4),
            "agreement": round(float(collection.result.agreement[number]), 4),
            "belongs": number not in collection.odd,
            "common": collection.has_common_object(number),
            # Relative to the others; the contact sheet shows those that are mirrored the other way round.
            "orientation": collection.orientations[number],
            "partners": [files[other] for other in collection.result.partners[number]],
            **(_instance_entries(collection, number, style) if asked else {}),
        }
        for number, share in shares.items()
    ]
    return {
        "photos": photos,
        "alone": collection.alone,
        "odd_ones_out": [files[number] for number in collection.odd],
        "reference_of_the_average": files[collection.reference],
        "skipped": [{"photo": file, "file": file, "reason": reason} for file, reason in skipped],
        "not_done": [file for number, file in enumerate(files) if number not in shares],
        "model": model,
        "refine": collection.refine,
    }


def _instance_entries(collection: SegmentedCollection, number: int, style: CutoutStyle | None) -> dict[str, Any]:
    """What `summary.json` says of the objects of an image."""
    name, numbers = collection.names[number], _instances_of(collection, number)
    cutouts = [_instance_cutout(name, instance, style) for instance in numbers]
    return {"instances": len(numbers), "instance_labels": _instances_name(name), "instance_cutouts": cutouts}


def _in_parallel(work: Callable[[int], _T], count: int, workers: int, progress: Progress | None) -> dict[int, _T]:
    """`work(number)` for 0 to count - 1, by number; after Ctrl+C what is done until then.

    Raises:
        KeyboardInterrupt: if nothing was done before Ctrl+C.
    """
    from concurrent.futures import ThreadPoolExecutor

    interrupt = None
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, number) for number in range(count)]
        try:
            for number, future in enumerate(futures, 1):
                future.result()
                if progress is not None:
                    progress(number / count, f"Wrote {number} of {count}")
        except KeyboardInterrupt as error:
            interrupt = error
        finally:
            for future in futures:  # those that run already are waited for
                future.cancel()
    done = {number: future.result() for number, future in enumerate(futures) if not future.cancelled()}
    if interrupt is not None and not done:
        raise interrupt
    return done


def zip_folder(folder: Path, name: str, *, remove: bool = False) -> Path:
    """Writes the files of a folder into one zip file in it, documents first; returns its path.

    The same files give the same bytes, so a server stores them once.

    Args:
        folder: with result files only.
        name: of the zip file.
        remove: whether each file is removed once it is in the archive.
    """
    paths = sorted(folder.iterdir(), key=lambda path: (path.suffix != ".json", path.name))
    with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_STORED) as archive:  # PNG does not get smaller
        for path in paths:
            member = zipfile.ZipInfo(path.name)  # without the time of day
            member.external_attr = 0o644 << 16  # else nobody may read what is unpacked
            archive.writestr(member, path.read_bytes())
            if remove:
                path.unlink()
    return folder / name


def _as_json(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=1) + "\n"


def _rounded(point: Sequence[float] | np.ndarray) -> list[float]:
    return [round(float(value), 2) for value in point]
