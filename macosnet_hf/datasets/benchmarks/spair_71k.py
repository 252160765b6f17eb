"""SPair-71k (Min et al., 2019): pairs with keypoints, boxes and difficulty; masks where there are any.

Layout: `JPEGImages/<class>/*.jpg`, `PairAnnotation/{trn,val,test}/*.json`, `Layout/large/*.txt`,
`Segmentation/<class>/*.png`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import DataError
from ..schema import Record
from .common import (
    VOC_CLASSES,
    Benchmark,
    Problems,
    each,
    image_file,
    inside,
    pair_record,
    refuse_empty,
    required_folder,
)

CLASSES = tuple(name for name in VOC_CLASSES if name not in ("diningtable", "sofa"))
_SPLITS = {"train": "trn", "validation": "val", "test": "test"}
_DIFFICULTIES = {
    "viewpoint": "viewpoint_variation",
    "scale": "scale_variation",
    "truncation": "truncation",
    "occlusion": "occlusion",
    "mirror": "mirror",
}


def _folder(source: Path, split: str) -> Path:
    return source / "PairAnnotation" / _SPLITS[split]


def read(source: Path, split: str, problems: Problems, pairs: Path | None = None) -> Iterator[Record]:
    """Pairs in the order of `Layout/large/<split>.txt` where it is there, else in that of the annotations' names. A
    list of names of annotations may be given instead."""
    annotations = required_folder(_folder(source, split), "the folder of pair annotations")
    listing = pairs or source / "Layout" / "large" / f"{_SPLITS[split]}.txt"
    if pairs is not None or listing.is_file():
        try:
            lines = listing.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{listing}: the list of pairs cannot be read.") from error
        files = [
            inside(annotations, f"{line.strip()}.json", f"{listing}, line {number}")
            for number, line in enumerate(lines, 1)
            if line.strip()
        ]
    else:
        files = sorted(path for path in annotations.glob("*.json") if not path.name.startswith("."))
    refuse_empty(files, annotations, "pair annotation")
    yield from each(files, lambda path: _record(source, path, split), problems)


def _record(root: Path, path: Path, split: str) -> Record:
    where = str(path)
    try:
        annotation = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{where}: the pair annotation is missing.") from error
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, or no name of a file
        raise DataError(f"{where}: the pair annotation cannot be read.") from error
    try:
        class_name = annotation["category"]
        if class_name not in CLASSES:
            raise DataError(f"{where}: unknown class {class_name!r}.")
        folder = root / "JPEGImages" / class_name
        images = {
            "source": inside(folder, annotation["src_imname"], where),
            "target": inside(folder, annotation["trg_imname"], where),
        }
        values = _annotated(annotation, where)
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        raise DataError(f"{where}: the pair annotation is not complete ({error}).") from error
    for side, image in images.items():
        mask = root / "Segmentation" / class_name / f"{image.stem}.png"
        values[f"{side}_mask"] = image_file(mask, where) if os.path.isfile(mask) else None
    return pair_record(
        where, folder.parent, *images.values(), id=path.stem, split=split, class_name=class_name, **values
    )


def _annotated(annotation: dict[str, Any], where: str) -> dict[str, Any]:
    """Keypoints that both images show, boxes and difficulty, as columns of a record."""
    source, target, ids = annotation["src_kps"], annotation["trg_kps"], annotation.get("kps_ids")
    if len(source) != len(target):
        raise DataError(f"{where}: {len(source)} keypoints in the source but {len(target)} in the target.")
    both = [index for index in range(len(source)) if source[index] is not None and target[index] is not None]
    if not both:
        raise DataError(f"{where}: there is no keypoint in the annotation.")
    levels = {name: annotation.get(key) for name, key in _DIFFICULTIES.items()}
    return {
        "source_keypoints": [list(map(float, source[index])) for index in both],
        "target_keypoints": [list(map(float, target[index])) for index in both],
        "keypoint_ids": [int(ids[index]) for index in both] if ids else None,
        "source_box": list(map(float, annotation["src_bndbox"])),
        "target_box": list(map(float, annotation["trg_bndbox"])),
        "difficulty": {name: None if level is None else int(level) for name, level in levels.items()},
    }


BENCHMARK = Benchmark(
    "spair-71k",
    "SPair-71k",
    "pairs",
    tuple(_SPLITS),
    read,
    find_splits=lambda source: [
        split for split, name in _SPLITS.items() if (source / "PairAnnotation" / name).is_dir()
    ],
    classes=CLASSES,
    citation="@article{min2019spair, title={SPair-71k: A Large-scale Benchmark for Semantic Correspondence}, "
    "author={Min, Juhong and Lee, Jongmin and Ponce, Jean and Cho, Minsu}, journal={arXiv:1908.10543}, year={2019}}",
    homepage="https://cvlab.postech.ac.kr/research/SPair-71k/",
)
