"""Images and masks of records: the only place where they are opened, with errors that name record and file."""

from __future__ import annotations

import os
import struct
from typing import Any

import numpy as np
from PIL import Image

from ..errors import DataError, ImageError
from ..io import image_files


def image_name(image: Any) -> str:
    """How to call an image in an error: its path, or that it is embedded."""
    if isinstance(image, dict):
        return str(image.get("path") or "embedded image")
    if isinstance(image, (str, os.PathLike)):
        return os.fspath(image)
    return str(getattr(image, "filename", "") or "picture")


def _source(image: Any) -> Any:
    """What [`load_image`] takes, of a record's image."""
    if not isinstance(image, dict):
        return image
    return image["bytes"] if image.get("bytes") is not None else image["path"]


def open_image(image: Any, where: str) -> Image.Image:
    """Decodes a record's image to upright RGB.

    Args:
        image: `{"path", "bytes"}`, an image, or a path.
        where: record and column, for the error's text.

    Raises:
        DataError: if the image is missing or damaged; the text names the record and the file.
    """
    try:
        return image_files.load_image(_source(image))
    except ImageError as error:
        raise DataError(f"{where}: {image_name(image)}: {error}") from error


def image_size(image: Any, where: str) -> tuple[int, int]:
    """(height, width) of a record's image, upright, from its header.

    Raises:
        DataError: if the header cannot be read.
    """
    if isinstance(image, Image.Image):
        return image.height, image.width
    try:
        return image_files.image_size(_source(image))
    except ImageError as error:
        raise DataError(f"{where}: {image_name(image)}: {error}") from error


def mask_from_image(image: Any, where: str, size: tuple[int, int] | None = None) -> np.ndarray:
    """Decodes an object mask.

    A mask is object where its value is not zero (1-bit, palette and label images), except for grey-scale images
    that use the upper half of the range: there 128 and more is object, so that an anti-aliased border is split in the
    middle.

    Args:
        image: `{"path", "bytes"}`, an image, or a path.
        where: record and column, for the error's text.
        size: `(height, width)` of the image that the mask belongs to; checked when given.

    Returns:
        bool `(height, width)`.

    Raises:
        DataError: if the mask is missing, damaged, or of another size than its image.
    """
    try:
        opened = image if isinstance(image, Image.Image) else image_files.load_as_stored(_source(image))
        if opened.mode in ("RGBA", "LA", "RGB", "CMYK"):
            array = np.asarray(opened.convert("RGB")).max(axis=-1)
        else:
            array = np.asarray(opened)
    except (ImageError, OSError, ValueError, SyntaxError, EOFError, struct.error) as error:
        # Of an image that a caller has opened, this is the first that its pixels are looked at.
        raise DataError(f"{where}: {image_name(image)} cannot be read as a mask.") from error
    if array.ndim != 2:
        raise DataError(f"{where}: {image_name(image)} is not a mask of one value a pixel.")
    if size is not None and array.shape != tuple(size):
        raise DataError(
            f"{where}: the mask {image_name(image)} is {array.shape[1]}x{array.shape[0]} pixels, "
            f"its image {size[1]}x{size[0]}."
        )
    if array.dtype == np.bool_ or opened.mode == "P" or array.max(initial=0) < 128:
        return array > 0
    return array >= 128
