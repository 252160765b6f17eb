"""Class folders of images, with or without masks: `images/<class>/*` and `masks/<class>/<same stem>.png`, or
`<class>/*`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ...errors import DataError
from ...io.image_files import IMAGE_SUFFIXES
from ...io.system_files import is_of_system
from ..schema import Record, make_record
from .common import (
    Benchmark,
    Problems,
    each,
    image_file,
    images_in,
    refuse_empty,
    report_orphans,
    required_folder,
    subfolders,
)


def read(source: Path, split: str, problems: Problems, pairs: Path | None = None) -> Iterator[Record]:
    """Single images. If there is a `masks` folder, every image needs a mask and every mask an image."""
    images = source / "images"
    masks = source / "masks" if images.is_dir() and (source / "masks").is_dir() else None
    if not images.is_dir():
        images = required_folder(source, "the folder of class folders")
    classes = subfolders(images)
    refuse_empty(classes, images, "class folder")
    for loose in images_in(images):
        problems.report(DataError(f"{loose}: this image is in no class folder."))
    for folder in subfolders(masks) if masks is not None else []:
        if not (images / folder.name).is_dir():
            problems.report(DataError(f"{images / folder.name}: there is no image of the class {folder.name!r}."))
    for folder in classes:
        yield from _read_class(folder, masks, split, problems)


def _read_class(folder: Path, masks: Path | None, split: str, problems: Problems) -> Iterator[Record]:
    paths = images_in(folder)
    for inner in subfolders(folder):
        problems.report(DataError(f"{inner}: folders inside a class folder are not read."))
    for other in _other_files(folder):
        problems.report(DataError(f"{other}: this is not an image in a format that can be read."))
    if not paths:
        problems.report(DataError(f"{folder}: there is no image in the class {folder.name!r}."))
        return
    own_masks: dict[str, Path] = {}
    if masks is not None:
        own_masks = {path.stem: path for path in images_in(masks / folder.name)}
        report_orphans(masks / folder.name, paths, problems)
    stems = Counter(path.stem for path in paths)

    def build(path: Path) -> Record:
        where, name = str(path), f"{folder.name}/{path.name}"
        if masks is not None and path.stem not in own_masks:
            raise DataError(f"{where}: the mask {masks / folder.name / (path.stem + '.png')} is missing.")
        if masks is not None and stems[path.stem] > 1:
            raise DataError(f"{where}: another image has the same name, so its mask is not certain.")
        return make_record(
            where,
            id=name,
            split=split,
            class_name=folder.name,
            source_id=name,
            source_image=image_file(path, where),
            source_mask=image_file(own_masks[path.stem], where) if masks is not None else None,
        )

    yield from each(paths, build, problems)


def _other_files(folder: Path) -> list[Path]:
    """Files that are neither images nor what operating systems leave behind, so that no image is overlooked."""
    known = (*IMAGE_SUFFIXES, ".db", ".ini")
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and path.suffix.lower() not in known and not (path.name.startswith(".") or is_of_system(path))
    )


BENCHMARK = Benchmark(
    "coseg",
    "Co-segmentation folder",
    "images",
    ("train", "validation", "test"),
    read,
    find_splits=lambda source: ["test" if (source / "masks").is_dir() else "train"],
)
