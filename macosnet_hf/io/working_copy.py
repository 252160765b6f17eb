"""Working copies: large images reduced for speed and memory, with the way back to pixels of the originals."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath

import numpy as np
from PIL import Image

from ..errors import ImageError
from .image_files import image_format, load_image, load_with_size, save_image

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
        read: reads the original; a server has it read elsewhere.
    """

    path: str
    name: str
    image: Image.Image
    size: tuple[int, int]
    read: Callable[[str], Image.Image] = load_image

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
            return self.read(self.path)
        except ImageError as error:
            raise ImageError(f"'{self.name}' can no longer be read; choose it again.") from error

    def _scale(self) -> np.ndarray:
        return np.array(self.size) / np.array(self.image.size)


def for_browser(path: str | os.PathLike[str], folder: Path, limits: Mapping[str, int] | None = None) -> Path | None:
    """A PNG copy, in `folder`, of an image that browsers cannot show; None if they can and all of it can be read.

    Browsers show what there is of a damaged file, or an empty place. The limits are `max_pixels` and `max_bytes` of
    [`load_image`].

    Raises:
        ImageError: as [`open_working_copy`].
    """
    try:
        if image_format(path) in _SHOWN_BY_BROWSERS:
            load_with_size(path, longer_side=WORKING_SIDE, **(limits or {}))
            return None
        copy = folder / f"{Path(path).stem}.png"
        save_image(load_image(path, **(limits or {})), copy, compress_level=1)
    except ImageError as error:
        raise _without_folder(error, path, os.path.basename(path)) from error
    return copy


def open_working_copy(
    path: str | os.PathLike[str],
    name: str | None = None,
    side: int | None = WORKING_SIDE,
    *,
    fine: bool = False,
    limits: Mapping[str, int] | None = None,
    content: bytes | None = None,
) -> WorkingCopy:
    """Reads an image at a bounded size; a JPEG is decoded at a fraction of its size where that is enough.

    Args:
        path: the file.
        name: what messages and results call it; the file's name by default.
        side: longer side of the copy in pixels; smaller images stay as they are, and all do with None.
        fine: whether to decode at least `side` pixels of the shorter side too, and to interpolate with a cubic kernel.
        limits: `max_pixels` and `max_bytes` of [`load_image`].
        content: the file's bytes, where there is no file of that path.

    Raises:
        ImageError: as [`load_image`]; the text calls the image by its name, without its folder.
    """
    name = name or os.path.basename(path)
    read = load_image if content is None else partial(_load_content, content)
    try:
        bound = {} if side is None else {"reduced_to": side} if fine else {"longer_side": side}
        image, (height, width) = load_with_size(path if content is None else content, **bound, **(limits or {}))
    except ImageError as error:
        raise _without_folder(error, path, name) from error
    if side is None:
        return WorkingCopy(os.fspath(path), name, image, image.size, read)
    kernel = Image.Resampling.BICUBIC if fine else Image.Resampling.BILINEAR
    image.thumbnail((side, side), kernel, reducing_gap=2.0)
    return WorkingCopy(os.fspath(path), name, image, (width, height), read)


def _load_content(content: bytes, path: str) -> Image.Image:
    return load_image(content)


def _without_folder(error: ImageError, path: str | os.PathLike[str], name: str) -> ImageError:
    return type(error)(str(error).replace(os.fspath(path), name))


def told_apart(paths: Sequence[str]) -> list[str]:
    """Short names of files for people: without folders, with as many as tell equal ones apart, else with numbers.

    The numbers are those of the photos in the sequence, from 1: `["cat.jpg (photo 1)", "cat.jpg (photo 2)"]`.
    """
    parts = [PurePath(path).parts for path in paths]
    depth = [1] * len(parts)
    while True:
        names = ["/".join(part[-count:]) for part, count in zip(parts, depth, strict=True)]
        often = Counter(names)
        longer = [often[name] > 1 and count < len(part) for name, part, count in zip(names, parts, depth, strict=True)]
        if not any(longer):
            break
        depth = [count + more for count, more in zip(depth, longer, strict=True)]
    return [f"{name} (photo {number})" if often[name] > 1 else name for number, name in enumerate(names, 1)]


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
