"""The one record that every data set of this project becomes, and the checks that a record must pass.

A record is a *pair* (both `source_*` and `target_*` filled) or a *single image* (`target_image` is `None`); `_COLUMNS`
says what each column means. Coordinates are (x, y) in pixels of the original image, 0 is the centre of the first pixel;
boxes are [x0, y0, x1, y1]. Absent values are `None`. Images are `{"path": ..., "bytes": ...}`, the undecoded form of
`datasets.Image`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError

if TYPE_CHECKING:
    from datasets import Features

Record = dict[str, Any]

_COLUMNS = {
    "id": ("string", "unique in its split"),
    "split": ("string", "`train`, `validation` or `test`"),
    "class_name": ("string", "object class; for TSS the group, by which the paper reports"),
    "source_id": ("string", "id of the source's image; equal ids mean the same image"),
    "target_id": ("string", "id of the target's image"),
    "source_image": ("image", "the image as in the original archive, bytes unchanged"),
    "target_image": ("image", "the other image of a pair; a single image has none"),
    "source_keypoints": ("points", "(x, y) of each keypoint; there is no padding"),
    "target_keypoints": ("points", "row i corresponds to row i of the source"),
    "keypoint_ids": ("integers", "which part each keypoint is, where the data set says so"),
    "source_box": ("box", "annotated box, where the data set has one"),
    "target_box": ("box", "the same of the target"),
    "source_mask": ("image", "object mask of the image's own size, see docs/data.md"),
    "target_mask": ("image", "the same of the target"),
    "mirror_source": ("flag", "mirror the source left-right before matching; the annotations are not mirrored"),
    "flip_both": ("flag", "training only: mirror both images"),
    "flow": ("flow", "for each target pixel, row by row, (dx, dy) to its place in the source; 1e9 and more is invalid"),
    "flow_size": ("integers", "[height, width] of the flow"),
    "difficulty": ("levels", "SPair-71k's viewpoint, scale, truncation, occlusion, mirror"),
}
COLUMNS = tuple(_COLUMNS)
MEANINGS = {name: meaning for name, (_, meaning) in _COLUMNS.items()}
IMAGE_COLUMNS = tuple(name for name, (kind, _) in _COLUMNS.items() if kind == "image")
DIFFICULTIES = ("viewpoint", "scale", "truncation", "occlusion", "mirror")

INVALID_FLOW = 1e9
"""Flow components of at least this size, or not finite, mark a pixel without ground truth (TSS writes 1e10)."""


def features() -> Features:
    """The declared `datasets.Features` of every data set here (see `_COLUMNS`)."""
    from datasets import Features, Image, List, Value

    types = {
        "string": Value("string"),
        "image": Image(),
        "points": List(List(Value("float64"), length=2)),
        "integers": List(Value("int32")),
        "box": List(Value("float64")),
        "flag": Value("bool"),
        "flow": List(Value("float32")),
        "levels": {name: Value("int8") for name in DIFFICULTIES},
    }
    return Features({name: types[kind] for name, (kind, _) in _COLUMNS.items()})


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
    for column in ("id", "class_name", "source_id", "target_id"):
        record[column] = as_text(record[column])
    check_record(record, where)
    return record


def as_text(name: Any) -> Any:
    """A name of a file as text that can be written: bytes that are no UTF-8 show as `\\udcff`, each in its own way."""
    return name.encode("utf-8", "backslashreplace").decode() if isinstance(name, str) else name


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


def flow_array(record: Record) -> np.ndarray | None:
    """The record's flow as `(h, w, 2)` float32 (dx, dy) on the target's grid, or `None`."""
    if record.get("flow") is None:
        return None
    height, width = record["flow_size"]
    return np.asarray(record["flow"], dtype=np.float32).reshape(height, width, 2)


def keypoint_array(record: Record, side: str) -> np.ndarray:
    """Keypoints `(N, 2)` float64 of `"source"` or `"target"`; `(0, 2)` when the record has none."""
    return np.asarray(record.get(f"{side}_keypoints") or [], dtype=np.float64).reshape(-1, 2)
