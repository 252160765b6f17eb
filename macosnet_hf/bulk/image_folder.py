"""Folders of image files as data sets: every image that `macosnet segment` would find in them is a row.

`datasets` takes words such as "test" in a name for a split, and does not know all kinds of images: what it leaves
out would have no row in the results.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from ..datasets.images import find_images
from ..errors import DataError
from ..io.image_files import is_image_file
from ..io.system_files import is_of_system

# Files of these kinds are a data set of their own: the images that they hold, or what is known of those beside them.
_DATA_SUFFIXES = {".parquet", ".arrow", ".csv", ".tsv", ".json", ".jsonl", ".zip", ".tar", ".gz", ".zst", ".7z", ".rar"}
_SPLITS = {"train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval"}


class ImageFile(NamedTuple):
    """An image of a folder: its path in the folder, and the name of the folder that it lies in, if that is another."""

    path: str
    label: str | None


def find_image_files(folder: str, split: str) -> list[ImageFile] | None:
    """The images of a split, sorted by their paths; None if the folder is not one of image files alone.

    Where it holds folders only, all named after splits, each is a split. Else all of it is the split `train`.

    Raises:
        DataError: if there is no such split.
    """
    root = Path(folder)
    for _, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]  # what a system or a program left behind
        if any(Path(name).suffix.lower() in _DATA_SUFFIXES and not name.startswith(".") for name in names):
            return None
    visible = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
    visible = [path for path in visible if not is_of_system(path)]
    place = root
    if visible and {path.name for path in visible} <= _SPLITS and not any(map(is_image_file, root.iterdir())):
        place = root / split
    if not place.is_dir() or (place == root and split != "train"):
        raise DataError(f"{folder}: the split {split!r} cannot be loaded: there is no folder of that name.")
    try:
        paths, labels = find_images(place)
    except DataError:
        return None
    return [
        ImageFile(os.fspath(path.relative_to(root)), None if path.parent == place else label)
        for path, label in zip(paths, labels, strict=True)
    ]
