"""What a mask file means: the only reader of masks of the repository.

* An image with an alpha channel that is below 128 somewhere, such as a cutout: object where alpha is 128 or more. Of a
  label map with a transparent colour, 255 is void as well.
* Two values (1-bit, grey, palette or colour): object where the image is brighter. A palette image of a label and 255,
  which is not white, is a label map.
* A label map (palette, or grey with at most 32 whole numbers): object where the label is neither 0 nor 255; 255 is
  *void*, the border that PASCAL VOC leaves out of its measures. A grey one has a background, and greys above 32 are
  no labels where most of it is void: they are edges.
* One value: no object where it is black, else object everywhere.

Anything else is refused. Nothing is concluded from the largest value.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..errors import DataError, ImageError
from ..images import exif_orientation, load_pixels, turned
from ..io import image_files
from .images import image_name, source_of

VOID = 255
MOST_LABELS = 32  # PASCAL VOC has 21 and void; a mask with smooth borders, or saved as JPEG, has more grey values
_ADVICE = "save it as PNG with two values, or as a label map with a palette"


@dataclass(frozen=True)
class ObjectMask:
    """A mask that was read.

    Attributes:
        object: bool `(height, width)`.
        counted: bool `(height, width)`, false where the mask is void: such pixels are left out of P and J. `None` where
            every pixel counts.
    """

    object: np.ndarray
    counted: np.ndarray | None = None


def read_mask(image: Any, where: str, size: tuple[int, int] | None = None) -> ObjectMask:
    """The object and the void of a mask file, by the rules of this module.

    Args:
        image: `{"path", "bytes"}`, an image, or a path.
        where: record and column, for the error's text.
        size: `(height, width)` of the image that the mask belongs to; checked when given.

    Raises:
        DataError: if the mask is missing, damaged, of another size than its image, or no mask by these rules.
    """
    try:
        opened = image if isinstance(image, Image.Image) else image_files.load_as_stored(source_of(image))
        load_pixels(opened)
        opened = turned(opened, exif_orientation(opened))
    except (ImageError, OSError, ValueError, SyntaxError, EOFError, struct.error) as error:
        # Of an image that a caller has opened, this is the first that its pixels are looked at.
        raise DataError(f"{where}: {image_name(image)} cannot be read as a mask.") from error
    if size is not None and (opened.height, opened.width) != tuple(size):
        raise DataError(
            f"{where}: the mask {image_name(image)} is {opened.width}x{opened.height} pixels, "
            f"its image {size[1]}x{size[0]}."
        )
    try:
        return _meaning(opened)
    except ValueError as error:
        raise DataError(f"{where}: {image_name(image)} is not a mask: {error}.") from error


def mask_from_image(image: Any, where: str, size: tuple[int, int] | None = None) -> np.ndarray:
    """The object of a mask file as bool `(height, width)`, without the void; arguments and errors as [`read_mask`]."""
    return read_mask(image, where, size).object


def _meaning(image: Image.Image) -> ObjectMask:
    """The object and the void of a decoded image; raises `ValueError` with the reason for what is no mask."""
    if image.has_transparency_data:
        alpha = np.asarray(image.convert("RGBA").getchannel("A"))
        if alpha.min() < 128:
            return _cut_out(image, alpha >= 128)
    # `shown` is how bright a pixel looks: of two values the brighter one is the object, whatever their numbers are.
    if image.mode == "P":
        values, shown = np.asarray(image), np.asarray(image.convert("L"))
    elif image.mode in ("1", "L", "F") or image.mode.startswith("I"):
        values = shown = np.asarray(image)
    else:
        colours = np.asarray(image.convert("RGB"))
        values = shown = colours[..., 0]
        if (colours != colours[..., :1]).any():
            values, shown = colours @ np.array([1 << 16, 1 << 8, 1]), np.asarray(image.convert("L"))
    found, first = np.unique(values, return_index=True)
    levels = shown.reshape(-1)[first]
    if not np.isfinite(found).all():
        raise ValueError("it holds values that are not finite numbers")
    if len(found) == 1:
        return ObjectMask(np.full(values.shape, levels[0] > 0))
    # A label map in colours whose object leaves no background: void is bright there, but no object.
    filled = image.mode == "P" and len(found) == 2 and found[0] > 0 and found[1] == VOID and levels[1] < 255
    if len(found) == 2 and not filled:
        if levels[0] == levels[1]:
            raise ValueError(f"its two values look the same; {_ADVICE}")
        return ObjectMask(values == found[levels.argmax()])
    if values is not shown and image.mode != "P":
        raise ValueError(f"it has {len(found)} colours; {_ADVICE}")
    if image.mode != "P" and len(found) > MOST_LABELS:
        raise ValueError(f"it has {len(found)} grey values, as a photo or a mask saved as JPEG; {_ADVICE}")
    if found[0] < 0 or (found != np.rint(found)).any():
        fault = "are below 0" if found[0] < 0 else "are no whole numbers, as in a soft mask"
        raise ValueError(f"some of its {len(found)} values {fault}; {_ADVICE}")
    void = values == VOID
    labelled = (values != 0) & ~void
    if image.mode != "P":
        if found[0] != 0:
            raise ValueError(f"it is a label map of {len(found)} labels without a background (0); {_ADVICE}")
        # A two-valued mask at half its size has greys at its edges, and more white than grey.
        edges = len(found) > 4 or found[found != VOID].max() > MOST_LABELS
        if edges and void.sum() > labelled.sum():
            raise ValueError(f"it is a label map that is mostly void ({VOID}), or a mask with grey edges; {_ADVICE}")
    return ObjectMask(labelled, ~void if void.any() else None)


def _cut_out(image: Image.Image, opaque: np.ndarray) -> ObjectMask:
    """What is opaque; the void of a label map is not counted even there."""
    if image.mode == "P":
        values = np.asarray(image)
        void = opaque & (values == VOID)
        if void.any() and 2 < len(np.unique(values)) <= MOST_LABELS:
            return ObjectMask(opaque & ~void, ~void)
    return ObjectMask(opaque)
