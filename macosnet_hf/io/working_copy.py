"""Working copies: large images reduced for speed and memory, with the way back to pixels of the originals."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import ImageError
from .image_files import image_format, image_size, load_image, save_image

WORKING_SIDE = 960  # pixels of the longer side: four times the network's input, twice what the page shows
_SHOWN_BY_BROWSERS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "AVIF", "ICO")


@dataclass(frozen=True)
class WorkingCopy:
    """An image file and a copy of the image, usually a smaller one.

    Attributes:
        path: the file.
        name: what messages and results call it.
        image: the copy, upright RGB.
        size: (width, height) of the upright original.
    """

    path: str
    name: str
    image: Image.Image
    size: tuple[int, int]

    @property
    def is_whole(self) -> bool:
        """Whether the copy is as large as the original."""
        return self.image.size == self.size

    def to_original(self, points: np.ndarray) -> np.ndarray:
        """Points `(N, 2)` of the copy as (x, y) in pixels of the original; the edges of both agree, not the centres."""
        return (np.asarray(points, dtype=np.float64) + 0.5) * self._scale() - 0.5

    def from_original(self, points: np.ndarray) -> np.ndarray:
        """The inverse of [`to_original`]."""
        return (np.asarray(points, dtype=np.float64) + 0.5) / self._scale() - 0.5

    def open_original(self) -> Image.Image:
        """The image in full size, from its file unless the copy is whole.

        Raises:
            ImageError: if the file is gone, or damaged by now.
        """
        if self.is_whole:
            return self.image
        try:
            return load_image(self.path)
        except ImageError as error:
            raise ImageError(f"'{self.name}' can no longer be read; choose it again.") from error

    def _scale(self) -> np.ndarray:
        return np.array(self.size) / np.array(self.image.size)


def for_browser(path: str | os.PathLike[str], folder: Path) -> Path | None:
    """A PNG copy, in `folder`, of an image that browsers cannot show; None, after a look at the header, if they can.

    Raises:
        ImageError: as [`open_working_copy`].
    """
    try:
        if image_format(path) in _SHOWN_BY_BROWSERS:
            return None
        copy = folder / f"{Path(path).stem}.png"
        save_image(load_image(path), copy, compress_level=1)
    except ImageError as error:
        raise _without_folder(error, path, os.path.basename(path)) from error
    return copy


def open_working_copy(
    path: str | os.PathLike[str], name: str | None = None, side: int | None = WORKING_SIDE, *, fine: bool = False
) -> WorkingCopy:
    """Reads an image at a bounded size; a JPEG is decoded at a fraction of its size where that is enough.

    Args:
        path: the file.
        name: what messages and results call it; the file's name by default.
        side: longer side of the copy in pixels; smaller images stay as they are, and all do with None.
        fine: whether to decode at least `side` pixels of the shorter side too, and to interpolate with a cubic kernel.

    Raises:
        ImageError: as [`load_image`]; the text calls the image by its name, without its folder.
    """
    name = name or os.path.basename(path)
    try:
        height, width = image_size(path)
        if side is None:
            image = load_image(path)
            return WorkingCopy(os.fspath(path), name, image, image.size)
        # The reduction bounds the shorter side, hence the longer one by `side`.
        shorter = side if fine else max(1, round(side * min(width, height) / max(width, height)))
        image = load_image(path, reduced_to=shorter)
    except ImageError as error:
        raise _without_folder(error, path, name) from error
    if image.size != (width, height) and max(width, height) <= side:
        width, height = image.size  # some containers (ICO) tell their true size only when decoded
    kernel = Image.Resampling.BICUBIC if fine else Image.Resampling.BILINEAR
    image.thumbnail((side, side), kernel, reducing_gap=2.0)
    return WorkingCopy(os.fspath(path), name, image, (width, height))


def _without_folder(error: ImageError, path: str | os.PathLike[str], name: str) -> ImageError:
    return ImageError(str(error).replace(os.fspath(path), name))


def distinct_names(names: Sequence[str]) -> list[str]:
    """Names for result files from file names: without suffix, numbered where several are equal.

    Only characters that every file system takes stay. A name that one image has alone is not given to another.
    """
    stems = [
        "".join(c for c in os.path.splitext(name)[0] if c.isprintable() and c not in '/\\:*?"<>|').strip(" .")
        or "image"
        for name in names
    ]
    reserved, given = {stem.lower() for stem in stems}, set[str]()
    distinct = []
    for stem in stems:
        candidate, number = stem, 2
        while candidate.lower() in given or (candidate != stem and candidate.lower() in reserved):
            candidate, number = f"{stem}_{number}", number + 1
        given.add(candidate.lower())
        distinct.append(candidate)
    return distinct
