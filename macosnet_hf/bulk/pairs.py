"""Matches of many pairs: the rows of a CSV file, as Parquet shards of an output folder; see `shards.py`."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from ..datasets.schema import as_text
from ..directions import ORIENTATIONS, check_orientations
from ..errors import DataError, ImageError, InputError
from ..inference.files import match_copies
from ..io.memory import trim
from ..io.package import VERSION
from ..io.working_copy import WorkingCopy, open_working_copy
from ..refinement import check_method
from .blocks import Shard
from .run import BulkReport, Progress
from .settings import SHARD_SIZE, ShardSettings
from .shards import ShardFolder, ShardKind, card_text

if TYPE_CHECKING:
    from datasets import Features

    from ..image_processing_macosnet import MaCoSNetImageProcessor
    from ..modeling_macosnet import MaCoSNetForKeypointMatching

_COLUMNS = ("source", "target", "points", "id")
_HELD_IMAGES = 8  # lists often name an image in several pairs, one after another
_MEANINGS = {
    "id": "name of the pair: the column id, or the number of its row",
    "row": "number of the row in the list, from 0 on",
    "source": "file of the source, as the list names it",
    "target": "file of the target",
    "quality": "good, fair or poor: whether the matches can be trusted",
    "agreement": "the same as a number, in [0, 1]",
    "reason": "for the quality, a sentence",
    "common": "whether the masks show an object that the images have in common",
    "orientation": "how the source shows the object, compared with the target",
    "source_keypoints": "matched points (x, y) of the source in pixels, best first",
    "target_keypoints": "where they lie in the target",
    "scores": "of the matches, in [0, 1]",
    "points": "points (x, y) of the source that the list asks for",
    "points_in_target": "where they lie in the target",
    "source_mask": "255 where the object is, else 0; a PNG of the source's size",
    "target_mask": "the same of the target",
    "error": "why there are no matches; else null",
}


@dataclass(frozen=True)
class PairSettings(ShardSettings):
    """What decides the rows of matches.

    Attributes:
        pairs: a CSV file with a header: `source` and `target` name images, from the folder of the file or wherever
            they are; `points` ("x,y;x,y", pixels of the source) and `id` may stand beside them.
        threshold: matches with this score or less are left out.
        refine, orientations: as in [`~macosnet_hf.inference.pair.match_pair`].
        shard_size: pairs of a shard.
        model, weights, version: as in [`~macosnet_hf.bulk.settings.BulkSettings`].

    Raises:
        InputError: for a value that cannot be used.
    """

    pairs: str
    threshold: float = 0.0
    refine: str = "grabcut"
    orientations: str | None = None
    shard_size: int = SHARD_SIZE
    model: str = ""
    weights: str = ""
    version: str = VERSION

    def __post_init__(self) -> None:
        object.__setattr__(self, "pairs", str(Path(self.pairs).resolve()))
        if not 0 <= self.threshold <= 1:
            raise InputError(f"threshold must lie between 0 and 1; got {self.threshold:g}.")
        if not isinstance(self.shard_size, int) or self.shard_size < 1:
            raise InputError(f"shard_size must be a whole number of at least 1; got {self.shard_size!r}.")
        check_method(self.refine)
        if self.orientations is not None:
            check_orientations(self.orientations, ORIENTATIONS)


class PairRow(NamedTuple):
    """A row of a list, as it stands there; "" where it names nothing."""

    number: int
    id: str
    source: str
    target: str
    points: str


def read_pairs(path: str) -> Iterator[PairRow]:
    """The rows of a list that are not empty.

    Raises:
        DataError: if it cannot be read, or has no columns `source` and `target`.
    """
    number = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            names = [name.strip().lower() for name in reader.fieldnames or ()]
            for wanted in _COLUMNS[:2]:
                if wanted not in names:
                    known = ", ".join(map(repr, names)) or "none"
                    raise DataError(f"{path} has no column {wanted!r} in its first line; its columns are {known}.")
            reader.fieldnames = names
            for row in reader:
                cells = {name: as_text(row.get(name) or "").strip() for name in _COLUMNS}
                if any(cells.values()):
                    name = cells["id"] or f"{number:09d}"
                    yield PairRow(number, name, cells["source"], cells["target"], cells["points"])
                    number += 1
    except OSError as error:
        raise DataError(f"The list {path} cannot be read ({error.strerror or error}).") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"The list {path} cannot be read (it is no table in UTF-8).") from error


def match_list(
    settings: PairSettings,
    folder: str | Path,
    *,
    model: MaCoSNetForKeypointMatching,
    processor: MaCoSNetImageProcessor,
    rank: int = 0,
    processes: int = 1,
    progress: Progress | None = None,
) -> BulkReport:
    """Writes the matches of a list of pairs as Parquet shards, or what is missing of them after a run that ended early.

    A pair whose images cannot be read, or whose points are wrong, is a row with its error. The results are the same for
    any number of processes and interruptions.

    Args:
        settings: the list, and what decides the results.
        folder: see [`ShardFolder`].
        model, processor: the network.
        rank, processes: which process of how many this is.
        progress: called with the number of further pairs that are done; may raise to stop the work.

    Raises:
        DataError: for a list that cannot be read, or is empty.
        InputError: for a folder with shards of other settings, or a rank that is not below the number of processes.
        OutputError: if the folder cannot be written, or the list has changed.
    """
    if not 0 <= rank < processes:
        raise InputError(f"rank must be at least 0 and less than processes ({processes}); got {rank}.")
    rows = read_pairs(settings.pairs)
    first = next(rows, None)
    if first is None:
        raise DataError(f"The list {settings.pairs} holds no pairs.")
    shards = ShardFolder(folder, settings, MATCHES)
    opened = lru_cache(_HELD_IMAGES)(lambda path: open_working_copy(path, side=None))
    written = found = count = 0
    some = [first, *islice(rows, settings.shard_size - 1)]
    while some:
        shard = Shard(count, (), hashlib.sha256(repr(some).encode()).hexdigest()[:16], len(some))
        if count % processes == rank:
            if shards.has(0, shard):
                found += len(some)
            else:
                results = []
                for row in some:
                    results.append(_match_row(row, settings, opened, model=model, processor=processor))
                    if progress is not None:
                        progress(1)
                shards.write(0, shard, results)
                trim()
                written += len(some)
        count += 1
        some = list(islice(rows, settings.shard_size))
    shards.end_part(0, count)
    paths = shards.shards()
    if paths is not None and not shards.is_complete:
        shards.merge(paths)
    return BulkReport(written, found, None if paths is None else shards.counts())


def _match_row(row: PairRow, settings: PairSettings, opened: Any, **network: Any) -> dict[str, Any]:
    """The columns of a pair."""
    columns: dict[str, Any] = {"id": row.id, "row": row.number, "source": row.source, "target": row.target}
    try:
        points = _read_points(row.points)
        source, target = (_open(getattr(row, side), side, settings, opened) for side in ("source", "target"))
        pair = match_copies((source, target), refine=settings.refine, orientations=settings.orientations, **network)
        moved = pair.transfer(points) if points else np.zeros((0, 2))
    except (ImageError, InputError) as error:
        return columns | {"error": str(error)}
    result = pair.result
    chosen = result.scores > settings.threshold
    return columns | {
        "quality": result.quality,
        "agreement": result.agreement,
        "reason": result.reason,
        "common": result.common,
        "orientation": result.orientation,
        "source_keypoints": pair.keypoints[chosen, 0].tolist(),
        "target_keypoints": pair.keypoints[chosen, 1].tolist(),
        "scores": result.scores[chosen].tolist(),
        "points": points,
        "points_in_target": np.asarray(moved).tolist(),
        "source_mask": {"bytes": _png(pair.original_mask(0)), "path": None},
        "target_mask": {"bytes": _png(pair.original_mask(1)), "path": None},
    }


def _open(name: str, side: str, settings: PairSettings, opened: Any) -> WorkingCopy:
    """The image that a row names.

    Raises:
        ImageError: if it names none, or one that cannot be read.
    """
    if not name:
        raise ImageError(f"The row names no {side}.")
    copy: WorkingCopy = opened(str(Path(settings.pairs).parent / name))
    return copy


def _read_points(text: str) -> list[tuple[float, float]]:
    """Points "x,y;x,y".

    Raises:
        InputError: for anything else.
    """
    points = []
    for part in filter(str.strip, text.split(";")):
        try:
            x, y = (float(cell) for cell in part.split(","))
        except ValueError:
            raise InputError(
                f"points must be two numbers x,y each, with ; between them; got {part.strip()!r}."
            ) from None
        points.append((x, y))
    return points


def _png(mask: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(file, "PNG", compress_level=4)
    return file.getvalue()


def _features(_: PairSettings) -> Features:
    """Columns of the shards."""
    from datasets import Features, List, Value
    from datasets import Image as ImageFeature

    points = List(List(Value("float32")))
    kinds = {
        "row": Value("int64"),
        "agreement": Value("float32"),
        "common": Value("bool"),
        "scores": List(Value("float32")),
        **dict.fromkeys(("source_keypoints", "target_keypoints", "points", "points_in_target"), points),
        **dict.fromkeys(_MASK_COLUMNS, ImageFeature()),
    }
    return Features({name: kinds.get(name, Value("string")) for name in _MEANINGS})


def _card(settings: PairSettings, counts: dict[str, int], shards: int) -> str:
    shown = {**settings.as_dict(), "pairs": Path(settings.pairs).name, "model": Path(settings.model).name}
    return card_text(
        f"Matches of {shown['pairs']}",
        f"Made by `macosnet match --pairs`: {counts['rows']} pairs in {shards} shards, {counts['errors']} of them with "
        "an error instead of matches.",
        "data/*.parquet",
        "train",
        _MEANINGS,
        shown,
    )


_MASK_COLUMNS: Sequence[str] = ("source_mask", "target_mask")
MATCHES = ShardKind("matches", _features, _MASK_COLUMNS, _card)
