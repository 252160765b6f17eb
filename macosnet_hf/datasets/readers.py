"""One reader for the original archive of each benchmark, all giving the record of [`macosnet_hf.datasets.schema`].

Layout under the source folder, and what a record is:

* `pf-willow`: `PF-dataset/<class>/*.png` with `*.mat`, and `test_pairs.csv`. Pairs with 10 keypoints (test).
* `pf-pascal`: `PF-dataset-PASCAL/JPEGImages/*.jpg` and `{train,val,test}_pairs.csv`. Pairs; keypoints in validation
  and test.
* `spair-71k`: `JPEGImages/<class>/*.jpg`, `PairAnnotation/{trn,val,test}/*.json`, `Layout/large/*.txt`,
  `Segmentation/<class>/*.png`. Pairs with keypoints, boxes and difficulty (train, validation, test).
* `tss`: `TSS_CVPR2016/{FG3DCar,JODS,PASCAL}/<pair>/` with `image{1,2}.png`, `mask{1,2}.png`, `flow{1,2}.flo`,
  `flip_gt.txt`. Each pair in both directions, with masks and flow (test).
* `internet`: `Data/{Airplane100,Car100,Horse100}/*.jpg` with `GroundTruth/*.png`. Single images with masks (test).
* `coseg`: `images/<class>/*` with optional `masks/<class>/*.png`, or plain class folders. Single images.
* `pairs`: a CSV in PF's columns and the images that it names. Pairs with keypoints.

Reading is lazy: a reader yields records with the paths of images; only flows are loaded. What is wrong with a file or
a row ends in a [`DataError`] that names both, or, with `Problems(skip=True)`, in a list of what was left out.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..errors import DataError, InputError
from .mat import read_matrix
from .schema import DIFFICULTIES, Record, features, make_record

if TYPE_CHECKING:
    from datasets import Dataset

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm")

VOC_CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
"""PASCAL VOC's order: PF-PASCAL's class 1 is aeroplane, 20 is tvmonitor. SPair-71k has 18 of them."""

WILLOW_CLASSES = (
    "car(G)",
    "car(M)",
    "car(S)",
    "duck(S)",
    "motorbike(G)",
    "motorbike(M)",
    "motorbike(S)",
    "winebottle(M)",
    "winebottle(wC)",
    "winebottle(woC)",
)
SPAIR_CLASSES = tuple(name for name in VOC_CLASSES if name not in ("diningtable", "sofa"))
TSS_GROUPS = ("FG3DCar", "JODS", "PASCAL")
INTERNET_CLASSES = {"Airplane100": "Airplane", "Car100": "Car", "Horse100": "Horse"}
KEYPOINT_COLUMNS = ("XA", "YA", "XB", "YB")

Item = TypeVar("Item")


@dataclass
class Problems:
    """What was wrong with the data. With `skip=False` (default) the first problem is raised.

    Attributes:
        skip: leave invalid records out and go on, instead of raising.
        messages: one sentence for each record left out.
    """

    skip: bool = False
    messages: list[str] = field(default_factory=list)

    def report(self, error: DataError) -> None:
        """Raises the error, or notes it when skipping.

        Raises:
            DataError: the one given, unless `skip`.
        """
        if not self.skip:
            raise error
        self.messages.append(str(error))


@dataclass(frozen=True)
class Benchmark:
    """What is known about a benchmark.

    Attributes:
        name: the name on the command line.
        title: for cards and tables.
        kind: `"pairs"` or `"images"`.
        splits: the splits it may have.
        read: `(source, split, problems, pairs) -> iterator of records`.
        licence: identifier of the Hub's list; `other` or `unknown` where the archive states none.
        citation: BibTeX.
        homepage: where the archive comes from.
        classes: its classes (TSS: groups), `None` where any will do.
    """

    name: str
    title: str
    kind: str
    splits: tuple[str, ...]
    read: Callable[[Path, str, Problems, Path | None], Iterator[Record]]
    licence: str = "unknown"
    citation: str = ""
    homepage: str = ""
    classes: tuple[str, ...] | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Helpers
# ---------------------------------------------------------------------------------------------------------------------


def _each(items: Iterable[Item], build: Callable[[Item], Record], problems: Problems) -> Iterator[Record]:
    """Builds a record of each item; a [`DataError`] is raised or, when skipping, noted."""
    for item in items:
        try:
            record = build(item)
        except DataError as error:
            problems.report(error)
        else:
            yield record


def _image(path: Path, where: str) -> dict[str, Any]:
    if not os.path.isfile(path):  # pathlib raises for a name that is too long
        raise DataError(f"{where}: the image {path} is missing.")
    return {"path": str(path), "bytes": None}


def _inside(root: Path, name: str, where: str) -> Path:
    """The path of a name that stands in a list or an annotation, which a stranger may have written.

    Raises:
        DataError: if it leads out of the folder: what is not part of the data must not get into a prepared data set.
    """
    path = root / name
    if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(root)):
        raise DataError(f"{where}: {name!r} leads out of the data folder {root}.")
    return path


def _images_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file())


def _strangers_in(folder: Path) -> list[Path]:
    """Files that are neither images nor what operating systems leave behind; no image may go unnoticed."""
    known = (*PICTURE_SUFFIXES, ".db", ".ini")
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and path.suffix.lower() not in known and not path.name.startswith(".")
    )


def _orphans(masks: Path, images: list[Path]) -> list[Path]:
    """Masks of a folder that belong to none of the images."""
    stems = {path.stem for path in images}
    return [path for path in _images_in(masks) if path.stem not in stems] if masks.is_dir() else []


def _subfolder(source: Path, name: str) -> Path:
    """The source itself when it already is the named folder, else the folder inside it."""
    return source if source.name == name else source / name


def _need_folder(folder: Path, what: str) -> Path:
    if not folder.is_dir():
        raise DataError(f"{folder}: {what} is missing.")
    return folder


def _need_some(found: list[Item], folder: Path, what: str) -> list[Item]:
    if not found:
        raise DataError(f"{folder}: there is no {what} in it.")
    return found


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """`(line number, row)` of a CSV file with a header."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, skipinitialspace=True)
            for row in reader:
                yield reader.line_num, row
    except FileNotFoundError as error:
        raise DataError(f"{path}: the pair list is missing.") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: the pair list cannot be read ({error}).") from error


def _numbers(row: dict[str, str], column: str, where: str) -> list[float]:
    text = row.get(column)
    if text is None or not text.strip():
        raise DataError(f"{where}: the column {column} is missing or empty.")
    try:
        return [float(part) for part in text.strip().strip(";").split(";")]
    except ValueError as error:
        raise DataError(f"{where}: the column {column} holds something that is not a number.") from error


def _csv_keypoints(row: dict[str, str], where: str) -> tuple[list[list[float]], list[list[float]]]:
    """Keypoints of source and target from PF's columns, `;`-separated, without the -1 that pads absent points."""
    xa, ya, xb, yb = (_numbers(row, column, where) for column in KEYPOINT_COLUMNS)
    if len({len(xa), len(ya), len(xb), len(yb)}) > 1:
        raise DataError(
            f"{where}: XA, YA, XB, YB hold {len(xa)}, {len(ya)}, {len(xb)}, {len(yb)} numbers; they must be as many."
        )
    points = [
        ([ax, ay], [bx, by])
        for ax, ay, bx, by in zip(xa, ya, xb, yb, strict=True)
        if not (ax == ay == -1 or bx == by == -1)
    ]
    if not points:
        raise DataError(f"{where}: there is no keypoint in the row.")
    return [source for source, _ in points], [target for _, target in points]


def _row_paths(row: dict[str, str], root: Path, where: str) -> tuple[Path, Path]:
    for column in ("source_image", "target_image"):
        if not (row.get(column) or "").strip():
            raise DataError(f"{where}: the column {column} is missing or empty.")
    return _inside(root, row["source_image"].strip(), where), _inside(root, row["target_image"].strip(), where)


def _class_by_number(row: dict[str, str], names: tuple[str, ...], where: str) -> str:
    text = (row.get("class") or "").strip()
    if text in names:
        return text
    try:
        exact = float(text)
    except ValueError as error:
        raise DataError(f"{where}: unknown class {text!r}.") from error
    number = int(exact) if exact.is_integer() else 0
    if not 1 <= number <= len(names):
        raise DataError(f"{where}: unknown class {text!r}; the classes are 1 to {len(names)}.")
    return names[number - 1]


def _image_id(path: Path, root: Path) -> str:
    try:
        return path.relative_to(root).as_posix()
    except ValueError:
        return path.as_posix()


def _pair_list(
    source: Path,
    root: Path,
    listing: Path,
    split: str,
    problems: Problems,
    class_names: tuple[str, ...] | None,
    with_keypoints: bool = True,
) -> Iterator[Record]:
    """Records of a pair list in the columns of PF-WILLOW and PF-PASCAL."""

    def build(item: tuple[int, dict[str, str]]) -> Record:
        line, row = item
        where = f"{listing}, line {line}"
        if None in row:
            raise DataError(f"{where}: the row has more columns than the header.")
        first, second = _row_paths(row, root, where)
        if class_names is not None:
            class_name = _class_by_number(row, class_names, where)
        else:
            class_name = (row.get("class") or "").strip() or "object"
        values: dict[str, Any] = {}
        if with_keypoints:
            values["source_keypoints"], values["target_keypoints"] = _csv_keypoints(row, where)
        if row.get("flip") is not None:
            if row["flip"].strip() not in ("0", "1"):
                raise DataError(f"{where}: flip must be 0 or 1.")
            values["flip_both"] = row["flip"].strip() == "1"
        return make_record(
            where,
            id=f"{split}-{line - 1:05d}",
            split=split,
            class_name=class_name,
            source_id=_image_id(first, root),
            target_id=_image_id(second, root),
            source_image=_image(first, where),
            target_image=_image(second, where),
            mirror_source=False,
            **values,
        )

    yield from _each(_csv_rows(listing), build, problems)


# ---------------------------------------------------------------------------------------------------------------------
# Readers
# ---------------------------------------------------------------------------------------------------------------------


def read_pf_willow(source: Path, split: str, problems: Problems, pairs: Path | None = None) -> Iterator[Record]:
    """PF-WILLOW (Ham et al., "Proposal Flow"): the 450 pairs of `test_pairs.csv`, or, without a list, all pairs within
    each class from the `.mat` files (`pts_coord`, 2x10), which are the same 450 unordered pairs."""
    root = source.parent if source.name == "PF-dataset" else source
    listing = pairs or root / "test_pairs.csv"
    if pairs is not None or listing.is_file():
        yield from _pair_list(source, root, listing, split, problems, WILLOW_CLASSES)
    else:
        yield from _willow_from_mat(root, split, problems)


def _willow_from_mat(root: Path, split: str, problems: Problems) -> Iterator[Record]:
    folder = _need_folder(root / "PF-dataset", "the folder of PF-WILLOW")
    for class_folder in sorted(path for path in folder.iterdir() if path.is_dir()):
        if class_folder.name not in WILLOW_CLASSES:
            problems.report(DataError(f"{class_folder}: unknown class {class_folder.name!r}."))
            continue
        images = _images_in(class_folder)
        if not images:
            problems.report(DataError(f"{class_folder}: there is no image in the class {class_folder.name!r}."))
            continue
        pairs = [(a, b) for index, a in enumerate(images) for b in images[index + 1 :]]

        def build(item: tuple[Path, Path], class_name: str = class_folder.name) -> Record:
            first, second = item
            where = f"{class_name}, {first.name} and {second.name}"
            return make_record(
                where,
                id=f"{class_name}/{first.stem}-{second.stem}",
                split=split,
                class_name=class_name,
                source_id=_image_id(first, root),
                target_id=_image_id(second, root),
                source_image=_image(first, where),
                target_image=_image(second, where),
                source_keypoints=_mat_keypoints(first.with_suffix(".mat")),
                target_keypoints=_mat_keypoints(second.with_suffix(".mat")),
                mirror_source=False,
            )

        yield from _each(pairs, build, problems)


def _mat_keypoints(path: Path) -> list[list[float]]:
    try:
        points = read_matrix(path.read_bytes(), "pts_coord")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: the keypoints (pts_coord) cannot be read ({error}).") from error
    if points.shape[0] != 2:
        raise DataError(f"{path}: pts_coord must be 2xN; it is {'x'.join(map(str, points.shape))}.")
    return points.T.tolist()


def read_pf_pascal(source: Path, split: str, problems: Problems, pairs: Path | None = None) -> Iterator[Record]:
    """PF-PASCAL in the split of SCNet: `{train,val,test}_pairs.csv` beside `PF-dataset-PASCAL` (or the list given)."""
    root = source.parent if source.name == "PF-dataset-PASCAL" else source
    names = {"train": "train_pairs.csv", "validation": "val_pairs.csv", "test": "test_pairs.csv"}
    if split not in names:
        raise InputError(f"PF-PASCAL has no split {split!r}; it has train, validation, test.")
    listing = pairs or root / names[split]
    yield from _pair_list(source, root, listing, split, problems, VOC_CLASSES, with_keypoints=split != "train")


def read_pairs(source: Path, split: str, problems: Problems, pairs: Path | None = None) -> Iterator[Record]:
    """A pair list of your own in PF's columns: `source_image,target_image,class,XA,YA,XB,YB`, paths relative to the
    source folder (default: the folder of the list)."""
    if pairs is None:
        if source.suffix.lower() == ".csv":
            pairs, source = source, source.parent
        else:
            raise InputError("A pair list is needed: give it with --pairs.")
    yield from _pair_list(source, source, pairs, split, problems, None)


def read_spair(source: Path, split: str, problems: Problems, pairs: Path | None = None) -> Iterator[Record]:
    """SPair-71k (Min et al.): pair annotations with boxes and difficulty, in the order of `Layout/large/<split>.txt`
    when it is there. A list of pair names of your own may be given instead."""
    names = {"train": "trn", "validation": "val", "test": "test"}
    if split not in names:
        raise InputError(f"SPair-71k has no split {split!r}; it has train, validation, test.")
    annotations = _need_folder(source / "PairAnnotation" / names[split], "the folder of pair annotations")
    listing = pairs or source / "Layout" / "large" / f"{names[split]}.txt"
    if pairs is not None or listing.is_file():
        try:
            lines = listing.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{listing}: the list of pairs cannot be read.") from error
        files = [
            _inside(annotations, f"{line.strip()}.json", f"{listing}, line {number}")
            for number, line in enumerate(lines, 1)
            if line.strip()
        ]
    else:
        files = sorted(annotations.glob("*.json"))
    _need_some(files, annotations, "pair annotation")

    def build(path: Path) -> Record:
        return _spair_record(source, path, split)

    yield from _each(files, build, problems)


def _spair_record(source: Path, path: Path, split: str) -> Record:
    where = str(path)
    try:
        annotation = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{where}: the pair annotation is missing.") from error
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, or no name of a file
        raise DataError(f"{where}: the pair annotation cannot be read.") from error
    try:
        class_name = annotation["category"]
        if class_name not in SPAIR_CLASSES:
            raise DataError(f"{where}: unknown class {class_name!r}.")
        images = source / "JPEGImages" / class_name
        first, second = (_inside(images, annotation[name], where) for name in ("src_imname", "trg_imname"))
        if len(annotation["src_kps"]) != len(annotation["trg_kps"]):
            raise DataError(
                f"{where}: {len(annotation['src_kps'])} keypoints in the source but "
                f"{len(annotation['trg_kps'])} in the target."
            )
        kept = [
            index
            for index, (a, b) in enumerate(zip(annotation["src_kps"], annotation["trg_kps"], strict=True))
            if a is not None and b is not None
        ]
        if not kept:
            raise DataError(f"{where}: there is no keypoint in the annotation.")
        ids = annotation.get("kps_ids")
        difficulty = {
            "viewpoint": annotation.get("viewpoint_variation"),
            "scale": annotation.get("scale_variation"),
            "truncation": annotation.get("truncation"),
            "occlusion": annotation.get("occlusion"),
            "mirror": annotation.get("mirror"),
        }
        values = {
            "source_keypoints": [list(map(float, annotation["src_kps"][index])) for index in kept],
            "target_keypoints": [list(map(float, annotation["trg_kps"][index])) for index in kept],
            "keypoint_ids": [int(ids[index]) for index in kept] if ids else None,
            "source_box": list(map(float, annotation["src_bndbox"])),
            "target_box": list(map(float, annotation["trg_bndbox"])),
            "difficulty": {name: None if difficulty[name] is None else int(difficulty[name]) for name in DIFFICULTIES},
        }
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where}: the pair annotation is not complete ({error}).") from error
    masks = {}
    for side, image in (("source", first), ("target", second)):
        mask = source / "Segmentation" / class_name / f"{image.stem}.png"
        masks[f"{side}_mask"] = _image(mask, where) if os.path.isfile(mask) else None
    return make_record(
        where,
        id=path.stem,
        split=split,
        class_name=class_name,
        source_id=f"{class_name}/{first.name}",
        target_id=f"{class_name}/{second.name}",
        source_image=_image(first, where),
        target_image=_image(second, where),
        mirror_source=False,
        **values,
        **masks,
    )


FLOW_TAG = 202021.25


def read_flow(path: Path) -> np.ndarray:
    """A Middlebury `.flo` file as `(h, w, 2)` float32 (dx, dy) in pixels.

    Raises:
        DataError: if it is missing, has another tag, or is shorter or longer than its header says.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: the flow is missing or cannot be read.") from error
    if len(data) < 12 or np.frombuffer(data, "<f4", 1)[0] != np.float32(FLOW_TAG):
        raise DataError(f"{path}: this is not a .flo file.")
    # The header says width first, the array is height first.
    width, height = (int(number) for number in np.frombuffer(data, "<i4", 2, offset=4))
    if width <= 0 or height <= 0 or len(data) != 12 + 8 * width * height:
        raise DataError(f"{path}: the flow says {width}x{height} pixels but holds {len(data) - 12} bytes.")
    return np.frombuffer(data, "<f4", offset=12).reshape(height, width, 2)


def read_tss(source: Path, split: str, problems: Problems, pairs: Path | None = None) -> Iterator[Record]:
    """TSS (Taniai et al., CVPR 2016). Each pair gives two records: `/1` has image 1 as target (`flow1.flo` lives on its
    grid and leads into image 2, the source), `/2` the other way round.

    `flip_gt.txt` = 1 sets `mirror_source`: the source is mirrored before matching. The flow files are in coordinates of
    the images as they are stored, *not* mirrored, so a prediction has to be mirrored back before it is compared.
    """
    root = _need_folder(_subfolder(source, "TSS_CVPR2016"), "the folder of TSS")
    groups = sorted(path for path in root.iterdir() if path.is_dir())
    _need_some(groups, root, "group of pairs")
    items: list[tuple[Path, int]] = []
    for group in groups:
        if group.name not in TSS_GROUPS:
            problems.report(DataError(f"{group}: unknown group {group.name!r}; TSS has {', '.join(TSS_GROUPS)}."))
            continue
        folders = sorted(path for path in group.iterdir() if path.is_dir())
        if not folders:
            problems.report(DataError(f"{group}: there is no pair in the group {group.name!r}."))
        items += [(folder, number) for folder in folders for number in (1, 2)]
    yield from _each(items, lambda item: _tss_record(root, *item, split), problems)


def _tss_record(root: Path, folder: Path, target: int, split: str) -> Record:
    where = str(folder)
    source = 3 - target
    flip_file = folder / "flip_gt.txt"
    try:
        flip = flip_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{flip_file}: the file is missing or cannot be read.") from error
    if flip not in ("0", "1"):
        raise DataError(f"{flip_file}: it must hold 0 or 1.")
    flow = read_flow(folder / f"flow{target}.flo")
    return make_record(
        where,
        id=f"{folder.parent.name}/{folder.name}/{target}",
        split=split,
        class_name=folder.parent.name,
        source_id=_image_id(folder / f"image{source}.png", root),
        target_id=_image_id(folder / f"image{target}.png", root),
        source_image=_image(folder / f"image{source}.png", where),
        target_image=_image(folder / f"image{target}.png", where),
        source_mask=_image(folder / f"mask{source}.png", where),
        target_mask=_image(folder / f"mask{target}.png", where),
        mirror_source=flip == "1",
        flow=flow.reshape(-1),
        flow_size=list(flow.shape[:2]),
    )


def read_internet(source: Path, split: str, problems: Problems, pairs: Path | None = None) -> Iterator[Record]:
    """Internet / Object Discovery (Rubinstein et al., CVPR 2013), the 100-image subsets. Images without the object
    have an empty mask; they count for the precision and are left out of the Jaccard index, as in the literature."""
    root = _need_folder(_subfolder(source, "Data"), "the folder Data of the Internet set")
    for folder_name, class_name in INTERNET_CLASSES.items():
        folder = root / folder_name
        images = _images_in(folder) if folder.is_dir() else []
        if not images:
            problems.report(DataError(f"{folder}: there is no image of the class {class_name!r}."))
            continue
        for orphan in _orphans(folder / "GroundTruth", images):
            problems.report(DataError(f"{orphan}: this mask has no image in {folder}."))

        def build(path: Path, class_name: str = class_name, folder: Path = folder) -> Record:
            where = str(path)
            return make_record(
                where,
                id=f"{class_name}/{path.stem}",
                split=split,
                class_name=class_name,
                source_id=f"{class_name}/{path.name}",
                source_image=_image(path, where),
                source_mask=_image(folder / "GroundTruth" / f"{path.stem}.png", where),
            )

        yield from _each(images, build, problems)


def read_coseg(source: Path, split: str, problems: Problems, pairs: Path | None = None) -> Iterator[Record]:
    """Class folders of images: `images/<class>/*` with `masks/<class>/<same stem>.png`, or plain `<class>/*`.

    If there is a `masks` folder, every image needs a mask and every mask an image.
    """
    images = source / "images"
    if not images.is_dir():
        images = _need_folder(source, "the folder of class folders")
    masks = source / "masks"
    with_masks = images != source and masks.is_dir()
    classes = sorted(path for path in images.iterdir() if path.is_dir() and not path.name.startswith("."))
    _need_some(classes, images, "class folder")
    for loose in _images_in(images):
        problems.report(DataError(f"{loose}: this image is in no class folder."))
    if with_masks:
        for folder in sorted(path for path in masks.iterdir() if path.is_dir() and not path.name.startswith(".")):
            if not (images / folder.name).is_dir():
                problems.report(DataError(f"{images / folder.name}: there is no image of the class {folder.name!r}."))
    for folder in classes:
        paths = _images_in(folder)
        for inner in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
            problems.report(DataError(f"{inner}: folders inside a class folder are not read."))
        for stranger in _strangers_in(folder):
            problems.report(DataError(f"{stranger}: this is not an image in a format that can be read."))
        if not paths:
            problems.report(DataError(f"{folder}: there is no image in the class {folder.name!r}."))
            continue
        available = {path.stem: path for path in _images_in(masks / folder.name)} if _is_dir(masks, folder) else {}
        for orphan in _orphans(masks / folder.name, paths) if with_masks else []:
            problems.report(DataError(f"{orphan}: this mask has no image in {folder}."))

        stems = [path.stem for path in paths]

        def build(
            path: Path,
            class_name: str = folder.name,
            available: dict[str, Path] = available,
            stems: list[str] = stems,
        ) -> Record:
            where = str(path)
            if with_masks and path.stem not in available:
                raise DataError(f"{where}: the mask {masks / class_name / (path.stem + '.png')} is missing.")
            if with_masks and stems.count(path.stem) > 1:
                raise DataError(f"{where}: another image has the same name, so its mask is not certain.")
            return make_record(
                where,
                id=f"{class_name}/{path.name}",
                split=split,
                class_name=class_name,
                source_id=f"{class_name}/{path.name}",
                source_image=_image(path, where),
                source_mask=_image(available[path.stem], where) if with_masks else None,
            )

        yield from _each(paths, build, problems)


def _is_dir(masks: Path, folder: Path) -> bool:
    return (masks / folder.name).is_dir()


BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "pf-willow",
            "PF-WILLOW",
            "pairs",
            ("test",),
            read_pf_willow,
            classes=WILLOW_CLASSES,
            citation="@inproceedings{ham2016proposal, title={Proposal Flow}, author={Ham, Bumsub and Cho, Minsu and "
            "Schmid, Cordelia and Ponce, Jean}, booktitle={CVPR}, year={2016}}",
            homepage="https://www.di.ens.fr/willow/research/proposalflow/",
        ),
        Benchmark(
            "pf-pascal",
            "PF-PASCAL",
            "pairs",
            ("train", "validation", "test"),
            read_pf_pascal,
            classes=VOC_CLASSES,
            citation="@article{ham2018proposal, title={Proposal Flow: Semantic Correspondences from Object Proposals}, "
            "author={Ham, Bumsub and Cho, Minsu and Schmid, Cordelia and Ponce, Jean}, journal={TPAMI}, year={2018}}",
            homepage="https://www.di.ens.fr/willow/research/proposalflow/",
        ),
        Benchmark(
            "spair-71k",
            "SPair-71k",
            "pairs",
            ("train", "validation", "test"),
            read_spair,
            classes=SPAIR_CLASSES,
            citation="@article{min2019spair, title={SPair-71k: A Large-scale Benchmark for Semantic Correspondence}, "
            "author={Min, Juhong and Lee, Jongmin and Ponce, Jean and Cho, Minsu}, journal={arXiv:1908.10543}, "
            "year={2019}}",
            homepage="https://cvlab.postech.ac.kr/research/SPair-71k/",
        ),
        Benchmark(
            "tss",
            "TSS",
            "pairs",
            ("test",),
            read_tss,
            classes=TSS_GROUPS,
            citation="@inproceedings{taniai2016joint, title={Joint Recovery of Dense Correspondence and "
            "Cosegmentation in Two Images}, author={Taniai, Tatsunori and Sinha, Sudipta N. and Sato, Yoichi}, "
            "booktitle={CVPR}, year={2016}}",
            homepage="https://taniai.space/projects/cvpr16_dccs/",
        ),
        Benchmark(
            "internet",
            "Internet (Object Discovery)",
            "pictures",
            ("test",),
            read_internet,
            classes=tuple(INTERNET_CLASSES.values()),
            citation="@inproceedings{rubinstein2013unsupervised, title={Unsupervised Joint Object Discovery and "
            "Segmentation in Internet Images}, author={Rubinstein, Michael and Joulin, Armand and Kopf, Johannes and "
            "Liu, Ce}, booktitle={CVPR}, year={2013}}",
            homepage="https://people.csail.mit.edu/mrub/ObjectDiscovery/",
        ),
        Benchmark("coseg", "Co-segmentation folder", "pictures", ("train", "validation", "test"), read_coseg),
        Benchmark("pairs", "Pair list", "pairs", ("train", "validation", "test"), read_pairs),
    )
}


def get_benchmark(name: str) -> Benchmark:
    """The benchmark of that name.

    Raises:
        InputError: if there is none.
    """
    if name not in BENCHMARKS:
        raise InputError(f"There is no benchmark {name!r}; choose one of {', '.join(BENCHMARKS)}.")
    return BENCHMARKS[name]


def iter_records(
    benchmark: str,
    source: str | os.PathLike[str],
    split: str = "test",
    *,
    problems: Problems | None = None,
    pairs: str | os.PathLike[str] | None = None,
) -> Iterator[Record]:
    """Records of one split of an original archive, one after the other.

    Args:
        benchmark: a name of [`BENCHMARKS`].
        source: folder of the archive (see the module's table).
        split: `train`, `validation` or `test`.
        problems: what to do with invalid records; default: raise.
        pairs: another list of pairs (`pf-willow`, `pf-pascal`, `pairs`: CSV; `spair-71k`: names of annotations).

    Raises:
        DataError: for what is wrong with a file or a row, and when no record is left.
        InputError: for an unknown benchmark or split.
    """
    entry = get_benchmark(benchmark)
    if split not in entry.splits:
        raise InputError(f"{entry.title} has no split {split!r}; it has {', '.join(entry.splits)}.")
    folder = Path(source)
    if not folder.exists():
        raise DataError(f"{folder}: the data folder is missing.")
    count = 0
    for record in entry.read(folder, split, problems or Problems(), Path(pairs) if pairs is not None else None):
        count += 1
        yield record
    if count == 0:
        raise DataError(f"{folder}: no record of {entry.title}, split {split!r}, was found.")


def available_splits(benchmark: str, source: str | os.PathLike[str]) -> list[str]:
    """Splits of which the archive holds the lists: for benchmarks of several splits, those whose files are there."""
    entry = get_benchmark(benchmark)
    folder = Path(source)
    if benchmark == "pf-pascal":
        root = folder.parent if folder.name == "PF-dataset-PASCAL" else folder
        names = {"train": "train_pairs.csv", "validation": "val_pairs.csv", "test": "test_pairs.csv"}
        return [split for split in entry.splits if (root / names[split]).is_file()]
    if benchmark == "spair-71k":
        names = {"train": "trn", "validation": "val", "test": "test"}
        return [split for split in entry.splits if (folder / "PairAnnotation" / names[split]).is_dir()]
    if benchmark == "coseg":
        return ["test" if (folder / "masks").is_dir() else "train"]
    return ["test"]


def load_records(
    benchmark: str,
    source: str | os.PathLike[str],
    split: str = "test",
    *,
    problems: Problems | None = None,
    pairs: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Dataset:
    """One split of an original archive as a `datasets.Dataset` with the declared features.

    Images stay files until they are looked at. Flows (TSS) are written to `cache_dir` (default: the cache of
    `datasets`), under a name that changes whenever the archive's files do, so memory stays small.

    Raises:
        DataError: for what is wrong with a file or a row.
    """
    from datasets import Dataset

    problems = problems or Problems()
    if benchmark != "tss":
        records = list(iter_records(benchmark, source, split, problems=problems, pairs=pairs))
        return Dataset.from_list(records, features=features())
    files = sorted(path for path in Path(source).rglob("*") if path.is_file())
    state = repr([(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files])
    stamp = hashlib.sha256(state.encode()).hexdigest()
    # Errors are to come as our own, not wrapped by the builder, so the archive is gone through once beforehand.
    good = [record["id"] for record in iter_records(benchmark, source, split, problems=problems, pairs=pairs)]
    return Dataset.from_generator(
        _generate,
        features=features(),
        cache_dir=str(cache_dir) if cache_dir is not None else None,
        gen_kwargs={"benchmark": benchmark, "source": str(source), "chosen": (split, tuple(good)), "stamp": stamp},
    )


def _generate(benchmark: str, source: str, chosen: tuple[str, tuple[str, ...]], stamp: str) -> Iterator[Record]:
    split, ids = chosen
    wanted = set(ids)
    for record in iter_records(benchmark, source, split, problems=Problems(skip=True)):
        if record["id"] in wanted:
            yield record
