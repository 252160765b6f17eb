"""What the readers of all benchmarks share: the description of a benchmark, the treatment of invalid data, files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ...errors import DataError
from ...io.image_files import is_image_file
from ...io.system_files import is_of_system
from ..schema import Record, make_record

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
"""PASCAL VOC's order: PF-PASCAL's class 1 is aeroplane, 20 is tvmonitor. SPair-71k has 18 of them."""

Item = TypeVar("Item")


@dataclass
class Problems:
    """What was wrong with the data. With `skip=False` (default) the first problem is raised.

    Attributes:
        skip: leave invalid records out and go on, instead of raising.
        messages: one sentence for each record left out.
    """

    skip: bool = False
    messages: list[str] = field(default_factory=list)

    def report(self, error: DataError) -> None:
        """Raises the error, or notes it when skipping.

        Raises:
            DataError: the one given, unless `skip`.
        """
        if not self.skip:
            raise error
        self.messages.append(str(error))


@dataclass(frozen=True)
class Benchmark:
    """A benchmark and the reader of its archive.

    Attributes:
        name: the name on the command line.
        title: for cards and tables.
        kind: `"pairs"` or `"images"`.
        splits: the splits it may have.
        read: `(source, split, problems, pairs) -> iterator of records`.
        find_splits: `(source) -> splits of which the archive holds the files`; default: all of `splits`.
        classes: its classes (TSS: groups), `None` where any will do.
        citation: BibTeX.
        homepage: where the archive comes from.
        licence: identifier of the Hub's list; `other` or `unknown` where the archive states none.
    """

    name: str
    title: str
    kind: str
    splits: tuple[str, ...]
    read: Callable[[Path, str, Problems, Path | None], Iterator[Record]]
    find_splits: Callable[[Path], list[str]] | None = None
    classes: tuple[str, ...] | None = None
    citation: str = ""
    homepage: str = ""
    licence: str = "unknown"


def each(items: Iterable[Item], build: Callable[[Item], Record], problems: Problems) -> Iterator[Record]:
    """Builds a record of each item; a [`DataError`] is raised or, when skipping, noted."""
    for item in items:
        try:
            record = build(item)
        except DataError as error:
            problems.report(error)
        else:
            yield record


def pair_record(where: str, root: Path, source: Path, target: Path, **values: Any) -> Record:
    """The record of a pair; an image's id is its path below `root`.

    Args:
        where: file and row, for the error's text.
        **values: further columns.

    Raises:
        DataError: if an image is missing or a value cannot be right.
    """
    return make_record(
        where,
        source_id=image_id(source, root),
        target_id=image_id(target, root),
        source_image=image_file(source, where),
        target_image=image_file(target, where),
        **{"mirror_source": False, **values},
    )


def image_file(path: Path, where: str) -> dict[str, Any]:
    """An image column of a record.

    Raises:
        DataError: if there is no such file.
    """
    if not os.path.isfile(path):  # pathlib raises for a name that is too long
        raise DataError(f"{where}: the image {path} is missing.")
    return {"path": str(path), "bytes": None}


def image_id(path: Path, root: Path) -> str:
    """The path below the archive's folder, the same on every machine."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def inside(root: Path, name: str, where: str) -> Path:
    """The path of a name in a list or an annotation, which may come from anyone.

    Raises:
        DataError: if it leads out of the folder: what is not part of the data must not get into a prepared data set.
    """
    path = root / name
    if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(root)):
        raise DataError(f"{where}: {name!r} leads out of the data folder {root}.")
    return path


def images_in(folder: Path) -> list[Path]:
    """The image files directly in a folder, sorted; none if the folder is missing."""
    if not folder.is_dir():
        return []
    return sorted(filter(is_image_file, folder.iterdir()))


def subfolders(folder: Path) -> list[Path]:
    """The folders directly in a folder, sorted, without hidden ones and what macOS adds to an archive."""
    return sorted(
        path for path in folder.iterdir() if path.is_dir() and not is_of_system(path) and not path.name.startswith(".")
    )


def report_orphans(masks: Path, images: list[Path], problems: Problems) -> None:
    """Reports each mask of a folder that belongs to none of the images."""
    stems = {path.stem for path in images}
    for path in images_in(masks):
        if path.stem not in stems:
            problems.report(DataError(f"{path}: this mask has no image in {images[0].parent}."))


def required_folder(folder: Path, what: str) -> Path:
    """The folder itself.

    Raises:
        DataError: if it is missing.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: {what} is missing.")
    return folder


def subfolder(source: Path, name: str) -> Path:
    """The source itself where it is the named folder already, else the folder inside it."""
    return source if source.name == name else source / name


def refuse_empty(found: list[Item], folder: Path, what: str) -> None:
    """Raises [`DataError`] if nothing was found in a folder."""
    if not found:
        raise DataError(f"{folder}: there is no {what} in it.")
