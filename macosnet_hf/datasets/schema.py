"""The one record that every data set of this project becomes, and the checks that a record must pass.

A record is a *pair* (both `source_*` and `target_*` filled) or a *single image* (`target_image` is `None`). Columns:

* `id` (string): unique in its split.
* `split` (string): `train`, `validation` or `test`.
* `class_name` (string): object class; for TSS the group (FG3DCar, JODS, PASCAL), by which the paper reports.
* `source_id`, `target_id` (string): id of each image; equal ids mean the same image.
* `source_image`, `target_image` (image): the image as in the original archive, bytes unchanged.
* `source_keypoints`, `target_keypoints` (list of [x, y]): in pixels of the original image, 0 is the centre of the
  first pixel; row i of both correspond; there is no padding.
* `keypoint_ids` (list of int): which part each keypoint is, where the data set says so.
* `source_box`, `target_box` ([x0, y0, x1, y1]): annotated box in pixels, where the data set has one.
* `source_mask`, `target_mask` (image): object mask of the image's own size; see [`mask_from_image`].
* `mirror_source` (bool): the source has to be mirrored left-right before matching (TSS `flip_gt.txt`); the annotations
  are
  *not* mirrored.
* `flip_both` (bool): training only: mirror both images (the `flip` column of PF-PASCAL's training list).
* `flow` (list of float), `flow_size` ([h, w]): for each pixel of the target, row by row, (dx, dy) in pixels to its
  place in the source; invalid is >= 1e9 or not finite.
* `difficulty` (struct of int): SPair-71k's `viewpoint`, `scale`, `truncation`, `occlusion`, `mirror`.

Absent values are `None`. Images in a record are `{"path": ..., "bytes": ...}`, the undecoded form of
`datasets.Image`.
"""

from __future__ import annotations

import math
import os
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..errors import DataError, ImageError

if TYPE_CHECKING:
    from datasets import Features

Record = dict[str, Any]

IMAGE_COLUMNS = ("source_image", "target_image", "source_mask", "target_mask")
COLUMNS = (
    "id",
    "split",
    "class_name",
    "source_id",
    "target_id",
    "source_image",
    "target_image",
    "source_keypoints",
    "target_keypoints",
    "keypoint_ids",
    "source_box",
    "target_box",
    "source_mask",
    "target_mask",
    "mirror_source",
    "flip_both",
    "flow",
    "flow_size",
    "difficulty",
)
DIFFICULTIES = ("viewpoint", "scale", "truncation", "occlusion", "mirror")

INVALID_FLOW = 1e9
"""Flow components of at least this size, or not finite, mark a pixel without ground truth (TSS writes 1e10)."""


def features() -> Features:
    """The declared `datasets.Features` of every data set here (see the module's table)."""
    from datasets import Features, Image, List, Value

    point_list = List(List(Value("float64"), length=2))
    return Features(
        {
            "id": Value("string"),
            "split": Value("string"),
            "class_name": Value("string"),
            "source_id": Value("string"),
            "target_id": Value("string"),
            "source_image": Image(),
            "target_image": Image(),
            "source_keypoints": point_list,
            "target_keypoints": point_list,
            "keypoint_ids": List(Value("int32")),
            "source_box": List(Value("float64")),
            "target_box": List(Value("float64")),
            "source_mask": Image(),
            "target_mask": Image(),
            "mirror_source": Value("bool"),
            "flip_both": Value("bool"),
            "flow": List(Value("float32")),
            "flow_size": List(Value("int32")),
            "difficulty": {name: Value("int8") for name in DIFFICULTIES},
        }
    )


def make_record(where: str, **values: Any) -> Record:
    """A checked record; columns that are not given are `None`.

    Args:
        where: file and row, for the error's text.
        **values: columns of the schema.

    Raises:
        DataError: if a value cannot be what the schema says it is.
    """
    unknown = set(values) - set(COLUMNS)
    if unknown:
        raise DataError(f"{where}: unknown column {sorted(unknown)[0]!r}.")
    record: Record = dict.fromkeys(COLUMNS)
    record.update(values)
    check_record(record, where)
    return record


def check_record(record: Record, where: str) -> None:
    """Checks what can be checked without opening an image.

    Raises:
        DataError: for keypoint lists of different lengths, numbers that are not finite, a box without extent,
            a flow of another size than its `flow_size`, or a record without an image or an id.
    """
    if not record.get("id"):
        raise DataError(f"{where}: a record needs an id.")
    if record.get("source_image") is None:
        raise DataError(f"{where}: a record needs an image.")
    points = {side: record.get(f"{side}_keypoints") for side in ("source", "target")}
    if (points["source"] is None) != (points["target"] is None) and record.get("target_image") is not None:
        raise DataError(f"{where}: keypoints are given for one image only.")
    for side, values in points.items():
        if values is None:
            continue
        if any(len(point) != 2 for point in values):
            raise DataError(f"{where}: a keypoint of the {side} does not have two numbers.")
        if not all(math.isfinite(number) for point in values for number in point):
            raise DataError(f"{where}: a keypoint of the {side} is not a finite number.")
    if points["source"] is not None and points["target"] is not None and len(points["source"]) != len(points["target"]):
        raise DataError(
            f"{where}: {len(points['source'])} keypoints in the source but {len(points['target'])} in the target."
        )
    for side in ("source", "target"):
        box = record.get(f"{side}_box")
        if box is None:
            continue
        if len(box) != 4 or not all(math.isfinite(number) for number in box):
            raise DataError(f"{where}: the box of the {side} is not four finite numbers.")
        if box[2] <= box[0] or box[3] <= box[1]:
            raise DataError(f"{where}: the box of the {side} has no extent.")
    ids = record.get("keypoint_ids")
    if ids is not None:
        if points["source"] is not None and len(ids) != len(points["source"]):
            raise DataError(f"{where}: {len(points['source'])} keypoints but {len(ids)} ids.")
        if not all(0 <= number < 2**31 for number in ids):
            raise DataError(f"{where}: the id of a keypoint is negative or too large.")
    for name, level in (record.get("difficulty") or {}).items():
        if level is not None and not 0 <= level < 128:
            raise DataError(f"{where}: the difficulty {name} is {level}; it must be a small number.")
    flow = record.get("flow")
    if flow is not None:
        size = record.get("flow_size")
        if size is None or len(size) != 2 or len(flow) != 2 * size[0] * size[1]:
            raise DataError(f"{where}: the flow does not have two numbers for each pixel of {size}.")


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
    from ..io.image_files import load_image

    try:
        return load_image(_source(image))
    except ImageError as error:
        raise DataError(f"{where}: {image_name(image)}: {error}") from error


def image_size(image: Any, where: str) -> tuple[int, int]:
    """(height, width) of a record's image, upright, from its header.

    Raises:
        DataError: if the header cannot be read.
    """
    from ..io.image_files import image_size

    if isinstance(image, Image.Image):
        return image.height, image.width
    try:
        return image_size(_source(image))
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
    from ..io.image_files import load_as_stored

    try:
        opened = image if isinstance(image, Image.Image) else load_as_stored(_source(image))
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


def flow_array(record: Record) -> np.ndarray | None:
    """The record's flow as `(h, w, 2)` float32 (dx, dy) on the target's grid, or `None`."""
    if record.get("flow") is None:
        return None
    height, width = record["flow_size"]
    return np.asarray(record["flow"], dtype=np.float32).reshape(height, width, 2)


def keypoint_array(record: Record, side: str) -> np.ndarray:
    """Keypoints `(N, 2)` float64 of `"source"` or `"target"`; `(0, 2)` when the record has none."""
    return np.asarray(record.get(f"{side}_keypoints") or [], dtype=np.float64).reshape(-1, 2)
