"""Images of records: the only place where they are opened, with errors that name record and file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import DataError, ImageError
from ..io import image_files
from ..io.system_files import is_of_system


def image_name(image: Any) -> str:
    """An image's name in an error: its path, or that it has none."""
    if isinstance(image, dict):
        return str(image.get("path") or "embedded image")
    if isinstance(image, (str, os.PathLike)):
        return os.fspath(image)
    return str(getattr(image, "filename", "") or "image in memory")


def source_of(image: Any) -> Any:
    """What [`load_image`] takes, of a record's image."""
    if not isinstance(image, dict):
        return image
    return image["bytes"] if image.get("bytes") is not None else image["path"]


def open_image(image: Any, where: str, reduced_to: int | None = None) -> Image.Image:
    """Decodes a record's image to upright RGB.

    Args:
        image: `{"path", "bytes"}`, an image, or a path.
        where: record and column, for the error's text.
        reduced_to: as in [`~macosnet_hf.io.image_files.load_image`].

    Raises:
        DataError: if the image is missing or damaged; the text names the record and the file.
    """
    try:
        return image_files.load_image(source_of(image), reduced_to=reduced_to)
    except ImageError as error:
        raise DataError(f"{where}: {image_name(image)}: {error}") from error


def image_size(image: Any, where: str) -> tuple[int, int]:
    """(height, width) of a record's image, upright, from its header.

    Raises:
        DataError: if the header cannot be read.
    """
    if isinstance(image, Image.Image):
        return image_files.upright_size(image)
    try:
        return image_files.image_size(source_of(image))
    except ImageError as error:
        raise DataError(f"{where}: {image_name(image)}: {error}") from error


def find_images(folder: str | Path) -> tuple[list[Path], list[str]]:
    """Paths and class names below a folder, sorted. The class is the name of the folder that an image lies in.

    A folder in the layout `images/<class>/*` (with masks beside it) is read from `images`: masks are never training
    input.

    Raises:
        DataError: if the folder is missing or holds no image.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{folder} is not a folder.")
    if (root / "images").is_dir():
        root = root / "images"

    def left_behind(path: Path) -> bool:
        """Whether a system or a program left it there, in a hidden folder perhaps, such as thumbnails."""
        return any(part.startswith(".") or is_of_system(Path(part)) for part in path.relative_to(root).parts)

    paths = sorted(path for path in root.rglob("*") if image_files.is_image_file(path) and not left_behind(path))
    if not paths:
        raise DataError(f"{folder} holds no images.")
    return paths, [path.parent.name for path in paths]
