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
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError

if TYPE_CHECKING:
    from datasets import Features

Record = dict[str, Any]

_KINDS = {
    "id": "string",
    "split": "string",
    "class_name": "string",
    "source_id": "string",
    "target_id": "string",
    "source_image": "image",
    "target_image": "image",
    "source_keypoints": "points",
    "target_keypoints": "points",
    "keypoint_ids": "integers",
    "source_box": "box",
    "target_box": "box",
    "source_mask": "image",
    "target_mask": "image",
    "mirror_source": "flag",
    "flip_both": "flag",
    "flow": "flow",
    "flow_size": "integers",
    "difficulty": "levels",
}
COLUMNS = tuple(_KINDS)
IMAGE_COLUMNS = tuple(name for name, kind in _KINDS.items() if kind == "image")
DIFFICULTIES = ("viewpoint", "scale", "truncation", "occlusion", "mirror")

INVALID_FLOW = 1e9
"""Flow components of at least this size, or not finite, mark a pixel without ground truth (TSS writes 1e10)."""


def features() -> Features:
    """The declared `datasets.Features` of every data set here (see the module's table)."""
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
    return Features({name: types[kind] for name, kind in _KINDS.items()})


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


def flow_array(record: Record) -> np.ndarray | None:
    """The record's flow as `(h, w, 2)` float32 (dx, dy) on the target's grid, or `None`."""
    if record.get("flow") is None:
        return None
    height, width = record["flow_size"]
    return np.asarray(record["flow"], dtype=np.float32).reshape(height, width, 2)


def keypoint_array(record: Record, side: str) -> np.ndarray:
    """Keypoints `(N, 2)` float64 of `"source"` or `"target"`; `(0, 2)` when the record has none."""
    return np.asarray(record.get(f"{side}_keypoints") or [], dtype=np.float64).reshape(-1, 2)
