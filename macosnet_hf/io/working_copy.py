"""Large images worked on as small copies: quick to read, light to keep, and everything can be brought back to the
original's size."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import ImageError
from .image_files import image_format, image_size, load_image

WORKING_SIDE = 960  # pixels of the longer side; the network sees a quarter of that, a page shows it at half its width
_SHOWN_BY_BROWSERS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "AVIF", "ICO")


@dataclass(frozen=True)
class WorkingCopy:
    """An image in a file, and a small copy of it.

    Attributes:
        path: the file.
        name: what its owner calls it.
        image: upright RGB, at most [`WORKING_SIDE`] pixels on its longer side.
        size: (width, height) of the upright original.
    """

    path: str
    name: str
    image: Image.Image
    size: tuple[int, int]

    def to_original(self, points: np.ndarray) -> np.ndarray:
        """Points `(N, 2)` of the copy as (x, y) in pixels of the original; corner pixels stay corner pixels."""
        return np.asarray(points, dtype=np.float64) * self._scale()

    def from_original(self, points: np.ndarray) -> np.ndarray:
        """The inverse of [`to_original`]."""
        return np.asarray(points, dtype=np.float64) / self._scale()

    def to_original_mask(self, mask: np.ndarray) -> np.ndarray:
        """A mask `(h, w)` bool of the copy in the original's size `(H, W)`, with a smooth edge."""
        if self.size == self.image.size:
            return mask
        grey = Image.fromarray(mask.astype(np.uint8) * 255)
        return np.asarray(grey.resize(self.size, Image.Resampling.BILINEAR)) >= 128

    def open_original(self) -> Image.Image:
        """The image in full size, from its file.

        Raises:
            ImageError: if the file is gone, or damaged by now.
        """
        try:
            return load_image(self.path)
        except ImageError as error:
            raise ImageError(f"'{self.name}' is no longer on the server; choose it again.") from error

    def _scale(self) -> np.ndarray:
        # A side of one pixel has no extent; the loader refuses such images, a reduced copy may still have one.
        width, height = (max(side - 1, 1) for side in self.image.size)
        return np.array([max(self.size[0] - 1, 1) / width, max(self.size[1] - 1, 1) / height])


def for_browser(path: str | os.PathLike[str], folder: Path) -> Path | None:
    """An image as a file that a browser can show: a PNG of the same size in `folder`, or `None` if it is one.

    Only the header of a file that can be shown is read.

    Raises:
        ImageError: as [`open_working_copy`].
    """
    try:
        if image_format(path) in _SHOWN_BY_BROWSERS:
            return None
        copy = folder / f"{Path(path).stem}.png"
        load_image(path).save(copy, compress_level=1)
    except ImageError as error:
        raise _without_folder(error, path, os.path.basename(path)) from error
    return copy


def open_working_copy(path: str | os.PathLike[str], name: str | None = None, side: int = WORKING_SIDE) -> WorkingCopy:
    """Reads an image at a bounded size; a JPEG is not even decoded at its full one.

    Args:
        path: the file.
        name: what to call it; its base name by default.
        side: longer side of the copy in pixels; smaller images stay as they are.

    Raises:
        ImageError: as [`load_image`]; the text calls the image by its name, without the folder it lies in.
    """
    name = name or os.path.basename(path)
    try:
        height, width = image_size(path)
        # The reduction keeps the shorter side at least this long, hence the longer one at least `side`.
        image = load_image(path, reduced_to=max(1, round(side * min(width, height) / max(width, height))))
    except ImageError as error:
        raise _without_folder(error, path, name) from error
    if image.size != (width, height) and max(width, height) <= side:
        width, height = image.size  # some containers (ICO) tell their true size only when decoded
    image.thumbnail((side, side), Image.Resampling.BILINEAR, reducing_gap=2.0)
    return WorkingCopy(os.fspath(path), name, image, (width, height))


def _without_folder(error: ImageError, path: str | os.PathLike[str], name: str) -> ImageError:
    return ImageError(str(error).replace(os.fspath(path), name))


def distinct_names(names: list[str]) -> list[str]:
    """File names without their ending, numbered where several are alike: a phone calls every image `image.jpg`."""
    stems = [
        "".join(c for c in os.path.splitext(name)[0] if c.isprintable() and c not in '/\\:*?"<>|') for name in names
    ]
    seen: dict[str, int] = {}
    taken = {stem.lower() for stem in stems}
    distinct = []
    for stem in (stem.strip(" .") or "photograph" for stem in stems):
        candidate = stem
        while candidate.lower() in seen or (candidate != stem and candidate.lower() in taken):
            seen[stem.lower()] = seen.get(stem.lower(), 1) + 1
            candidate = f"{stem}-{seen[stem.lower()]}"
        seen.setdefault(candidate.lower(), 1)
        distinct.append(candidate)
    return distinct
