"""Lists of pairs in the columns of PF-WILLOW and PF-PASCAL, and the benchmark `pairs`: a list of your own.

The CSV has the columns `source_image,target_image,class,XA,YA,XB,YB`: paths relative to the folder of the data (by
default that of the list), and numbers separated by `;`, in pixels, 0 the centre of the first pixel. The form of other
code, with one column a number (`imageA,imageB,XA1,...,XA10,YA1,...,YB10`) and the class in the path, is read too.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import DataError, InputError
from ..schema import Record
from .common import Benchmark, Problems, each, inside, pair_record

COLUMNS = "source_image,target_image,class,XA,YA,XB,YB"
KEYPOINT_COLUMNS = ("XA", "YA", "XB", "YB")


def read_pair_list(
    root: Path,
    listing: Path,
    split: str,
    problems: Problems,
    class_names: tuple[str, ...] | None,
    with_keypoints: bool = True,
) -> Iterator[Record]:
    """Records of a list of pairs.

    Args:
        root: folder to which its paths are relative.
        listing: the CSV file.
        class_names: names of the classes 1, 2, ...; `None` if the column `class` holds any name, or is missing.
        with_keypoints: whether the list has keypoints (PF-PASCAL's training list has none).

    Raises:
        DataError: if the list is missing or damaged; of a row, as [`Problems`] says.
    """

    def build(item: tuple[int, dict[str, str]]) -> Record:
        line, row = item
        where = f"{listing}, line {line}"
        if None in row:
            raise DataError(f"{where}: the row has more columns than the header.")
        source, target = (inside(root, _text(row, f"{side}_image", where), where) for side in ("source", "target"))
        values: dict[str, Any] = {"class_name": _class_name(row, class_names, where)}
        if with_keypoints:
            values["source_keypoints"], values["target_keypoints"] = _keypoints(row, where)
        if row.get("flip") is not None:
            if row["flip"].strip() not in ("0", "1"):
                raise DataError(f"{where}: flip must be 0 or 1.")
            values["flip_both"] = row["flip"].strip() == "1"
        return pair_record(where, root, source, target, id=f"{split}-{line - 1:05d}", split=split, **values)

    yield from each(_rows(listing), build, problems)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """`(line number, row)` of a CSV file with a header."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, skipinitialspace=True)
            wide = {"imageA", "imageB"} <= set(reader.fieldnames or ())
            if not wide and not {"source_image", "target_image"} & set(reader.fieldnames or ()):
                raise DataError(
                    f"{path}: the columns must be {COLUMNS}, or imageA,imageB,XA1,...,YB10; "
                    f"they are {','.join(reader.fieldnames or ()) or 'missing'}."
                )
            for row in reader:
                yield reader.line_num, _narrow(row) if wide else row
    except FileNotFoundError as error:
        raise DataError(f"{path}: the pair list is missing.") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: the pair list cannot be read ({error}).") from error


def _narrow(row: dict[Any, Any]) -> dict[Any, Any]:
    """A row with one column a number, as a row with one column a coordinate; the class is the folder of the image."""
    narrow = {"source_image": row["imageA"], "target_image": row["imageB"]}
    narrow["class"] = row.get("class") or Path(row["imageA"] or "").parent.name
    for column in KEYPOINT_COLUMNS:
        count = sum(name is not None and name.startswith(column) and name[2:].isdecimal() for name in row)
        narrow[column] = ";".join(row[f"{column}{number}"] or "" for number in range(1, count + 1))
    return {**narrow, **({None: row[None]} if None in row else {})}


def _text(row: dict[str, str], column: str, where: str) -> str:
    text = (row.get(column) or "").strip()
    if not text:
        raise DataError(f"{where}: the column {column} is missing or empty.")
    return text


def _numbers(row: dict[str, str], column: str, where: str) -> list[float]:
    try:
        return [float(part) for part in _text(row, column, where).strip(";").split(";")]
    except ValueError as error:
        raise DataError(f"{where}: the column {column} holds something that is not a number.") from error


def _keypoints(row: dict[str, str], where: str) -> tuple[list[list[float]], list[list[float]]]:
    """Keypoints of source and target, without the -1 that pads absent points."""
    columns = [_numbers(row, column, where) for column in KEYPOINT_COLUMNS]
    counts = [len(numbers) for numbers in columns]
    if len(set(counts)) > 1:
        raise DataError(
            f"{where}: XA, YA, XB, YB hold {', '.join(map(str, counts))} numbers; the four counts must be equal."
        )
    points = [
        ([ax, ay], [bx, by]) for ax, ay, bx, by in zip(*columns, strict=True) if not (ax == ay == -1 or bx == by == -1)
    ]
    if not points:
        raise DataError(f"{where}: there is no keypoint in the row.")
    return [source for source, _ in points], [target for _, target in points]


def _class_name(row: dict[str, str], names: tuple[str, ...] | None, where: str) -> str:
    text = (row.get("class") or "").strip()
    if names is None:
        return text or "object"
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


def read(source: Path, split: str, problems: Problems, pairs: Path | None = None) -> Iterator[Record]:
    """A list of your own: the source itself, or `pairs` with paths relative to the source folder."""
    if pairs is None:
        if source.suffix.lower() != ".csv":
            raise InputError("A pair list is needed: give it with --pairs.")
        pairs, source = source, source.parent
    yield from read_pair_list(source, pairs, split, problems, None)


BENCHMARK = Benchmark(
    "pairs", "Pair list", "pairs", ("train", "validation", "test"), read, find_splits=lambda source: ["test"]
)
