"""Opens archives, prepared folders and data sets of the Hub, and prepares archives as Parquet that `datasets` loads.

A prepared folder holds `README.md` (the data set card, which also names the files of the splits) and
`data/<split>-00000-of-00003.parquet` with the images inside. It is written under another name and renamed when it is
complete; the next run removes what a killed run left.

Pairs repeat images. Parquet's dictionary encoding stores each image once in a row group, and records are sorted by
class, so PF-WILLOW's 450 pairs take little more room than its 100 images.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, InputError, OutputError
from ..io.hub import is_prepared
from ..io.output_folder import release_folder, start_folder
from ..io.system_files import is_of_system, parquet_files
from .benchmarks import Benchmark, Problems, available_splits, get_benchmark, iter_records
from .images import open_image
from .masks import read_mask
from .schema import IMAGE_COLUMNS, MEANINGS, Record, as_text, check_record, features
from .streams import open_stream, rows_of

MARKER = ".macosnet-partial"  # in unfinished outputs of version 0.1
CARD_MARK = "Prepared by `macosnet prepare "
ROW_GROUP_BYTES = 48 * 2**20
"""Bytes of the images and flows of one row group, which a reader of the stream holds at a time."""

SHARD_BYTES = 400 * 2**20

# Their lists are not in the order of classes; sorted, the pairs of an image follow each other.
_SORTED = ("pf-willow", "pf-pascal", "pairs")


# ---------------------------------------------------------------------------------------------------------------------
# Opening
# ---------------------------------------------------------------------------------------------------------------------


def open_records(
    benchmark: str,
    data: str | os.PathLike[str] | None,
    split: str = "test",
    *,
    pairs: str | os.PathLike[str] | None = None,
    problems: Problems | None = None,
) -> tuple[Iterable[Record], int | None]:
    """Records of an original archive, of a prepared folder, or of a data set on the Hub (streamed).

    Args:
        benchmark: name of the benchmark.
        data: folder or Hub id; for `pairs`, `None` is the folder of the list.
        split: which split.
        pairs: list of pairs, for original archives.
        problems: what to do with invalid records.

    Returns:
        the records, and their number where it is known without reading them all.

    Raises:
        DataError: for what is wrong with the data.
        InputError: if `data` is neither a folder nor a Hub id.
    """
    problems = problems if problems is not None else Problems()
    source, pairs = locate(benchmark, data, pairs)
    if isinstance(source, str) or is_prepared(source):
        return stream_prepared(str(source), benchmark, split, problems), None
    found = iter_records(benchmark, source, split, problems=problems, pairs=pairs)
    if benchmark == "tss":
        return found, None
    records = list(found)
    if benchmark in _SORTED:
        records.sort(key=lambda record: record["class_name"])
    return records, len(records)


def locate(
    benchmark: str, data: str | os.PathLike[str] | None, pairs: str | os.PathLike[str] | None
) -> tuple[Path | str, str | os.PathLike[str] | None]:
    """The folder, or the id of a data set on the Hub, and the list of pairs. Checks that folder and list exist.

    Raises:
        DataError: if `data` is neither a folder nor a Hub id, or the list is missing.
        InputError: if nothing is named.
    """
    if data is not None:
        folder = Path(data)
    elif pairs is not None:
        folder = Path(pairs).parent
    else:
        raise InputError("Either a data folder or a list of pairs is needed.")
    if benchmark == "pairs" and folder.suffix.lower() == ".csv" and folder.is_file():
        return folder.parent, folder
    if pairs is not None and not Path(pairs).exists():
        raise DataError(f"{pairs}: the pair list is missing.")
    if folder.is_dir():
        return folder, pairs
    if folder.exists():
        raise DataError(f"{folder} is a file; a folder is needed.")
    name = str(data)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name, pairs
    raise DataError(f"{name}: there is no such folder, and it is not the id of a data set on the Hub (owner/name).")


def stream_prepared(data: str, benchmark: str, split: str, problems: Problems) -> Iterator[Record]:
    """Streams a prepared data set, with one row group of its Parquet file in memory at a time.

    Raises:
        DataError: if it cannot be loaded, lacks columns of the schema, or a record is invalid.
    """
    from datasets import Image

    stream = open_stream(data, split)
    declared = features()
    present = stream.features or {}
    missing = [name for name in declared if name not in present]
    if missing:
        raise DataError(f"{data}: the column {missing[0]!r} is missing; see docs/data.md for the columns.")
    for column in IMAGE_COLUMNS:
        stream = stream.cast_column(column, Image(decode=False))
    count = 0
    for record in rows_of(stream, data, split):
        try:
            where = f"{data}, {split}, record {count} ({record.get('id')})"
            check_record(record, where)
            _check_benchmark(record, benchmark, where)
        except DataError as error:
            problems.report(error)
        else:
            yield record
        count += 1
    if count == 0:
        raise DataError(f"{data}: the split {split!r} is empty.")


def _check_benchmark(record: Record, benchmark: str, where: str) -> None:
    """Raises [`DataError`] for a record of another benchmark: a prepared data set does not name its own."""
    entry = get_benchmark(benchmark)
    if (record.get("target_image") is not None) != (entry.kind == "pairs"):
        has, wants = ("a single image", "pairs") if entry.kind == "pairs" else ("a pair", "single images")
        raise DataError(f"{where}: this is {has}, but {entry.title} has {wants}.")
    if entry.classes is not None and record.get("class_name") not in entry.classes:
        raise DataError(f"{where}: unknown class {record.get('class_name')!r}; it is not one of {entry.title}.")


# ---------------------------------------------------------------------------------------------------------------------
# Preparing
# ---------------------------------------------------------------------------------------------------------------------


def prepare(
    benchmark: str,
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    splits: Iterable[str] | None = None,
    pairs: str | os.PathLike[str] | None = None,
    problems: Problems | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    row_group_bytes: int = ROW_GROUP_BYTES,
    progress: Callable[[int], None] | None = None,
) -> dict[str, int]:
    """Writes an archive as Parquet with embedded images and a card. Every image and mask is decoded once as a check.

    Args:
        benchmark: name of the benchmark.
        source: its original archive.
        output: the folder to make; it must not exist, unless `overwrite`.
        splits: default: all that the archive holds.
        pairs: list of pairs, as in [`open_records`].
        problems: what to do with invalid records.
        overwrite: replace an earlier output of this function.
        shard_bytes, row_group_bytes: approximate upper bounds of a file and of a row group.
        progress: called with the number of records done.

    Returns:
        number of records of each split.

    Raises:
        DataError: for what is wrong with the archive.
        OutputError: if the output exists or cannot be written.
    """
    entry = get_benchmark(benchmark)
    problems = problems if problems is not None else Problems()
    folder = Path(os.path.abspath(output))
    partial, replaced = (folder.with_name(f".{folder.name}.{end}") for end in ("partial", "replaced"))
    if folder.exists() and not (overwrite and _is_complete_output(folder)):
        own = _is_complete_output(folder)
        state = "exists already" if own or folder.is_file() else "exists and holds what was not made by prepare"
        raise OutputError(f"{folder} {state}; choose another name{' or --overwrite' if own else ''}.")
    chosen = list(dict.fromkeys(splits)) if splits is not None else available_splits(benchmark, source)
    if not chosen:
        raise DataError(f"{source}: no split of {entry.title} was found.")
    if benchmark in ("coseg", "pairs") and len(chosen) > 1:
        raise InputError(f"{entry.title} has no splits of its own, so only one can be made of it at a time.")
    held = start_folder(partial, _holds_output, f"this output ({folder})")
    root = _data_root(Path(source))
    counts = {}
    try:
        if replaced.is_dir() and _holds_output(replaced):
            shutil.rmtree(replaced)
        (partial / "data").mkdir()
        for split in chosen:
            records, _ = open_records(benchmark, source, split, pairs=pairs, problems=problems)
            counts[split] = _write_split(
                _verified(records, problems, root), partial / "data", split, shard_bytes, row_group_bytes, progress
            )
            if counts[split] == 0:
                raise DataError(f"{source}: no valid record is left in the split {split!r}.")
        card = data_card(entry, counts, problems, _digest(partial / "data"))
        (partial / "README.md").write_text(card, encoding="utf-8")
        _put_in_place(partial, folder, replaced)
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        release_folder(held)
    return counts


def _holds_output(folder: Path) -> bool:
    """Whether a folder holds nothing but what [`prepare`] writes, complete or not, so that it may be removed."""
    if {path.name for path in folder.iterdir() if not is_of_system(path)} - {"README.md", "data", MARKER}:
        return False
    data = folder / "data"
    if not data.exists():
        return True
    return data.is_dir() and all(path.suffix == ".parquet" or is_of_system(path) for path in data.iterdir())


def _is_complete_output(folder: Path) -> bool:
    """Whether [`prepare`] made the folder, as a whole."""
    if not is_prepared(folder) or not _holds_output(folder):
        return False
    return CARD_MARK in (folder / "README.md").read_text(encoding="utf-8", errors="replace")


def _put_in_place(partial: Path, folder: Path, replaced: Path) -> None:
    """Gives the finished folder its name. An older output is renamed first: a kill while it is removed under its own
    name would leave some of its shards, which `datasets` would load as all of them."""
    if folder.exists():
        os.replace(folder, replaced)
    os.replace(partial, folder)
    shutil.rmtree(replaced, ignore_errors=True)


def _data_root(source: Path) -> str:
    """The folder of an archive, without links."""
    inner = source.is_file() or source.name in ("PF-dataset", "PF-dataset-PASCAL")
    return os.path.realpath(source.parent if inner else source)


def _verified(records: Iterable[Record], problems: Problems, root: str) -> Iterator[Record]:
    """Records with their images read and decoded once; invalid ones are reported."""
    sizes: dict[str, tuple[int, int]] = {}
    for record in records:
        try:
            embedded = dict(record)
            for side in ("source", "target"):
                if record.get(f"{side}_image") is None:
                    continue
                where = f"{record['id']}, {side}_image"
                embedded[f"{side}_image"] = _embedded(record[f"{side}_image"], where, root)
                key = record.get(f"{side}_id") or where
                if key not in sizes:
                    opened = open_image(record[f"{side}_image"], where)
                    sizes[key] = (opened.height, opened.width)
                if record.get(f"{side}_mask") is not None:
                    where = f"{record['id']}, {side}_mask"
                    read_mask(record[f"{side}_mask"], where, sizes[key])
                    embedded[f"{side}_mask"] = _embedded(record[f"{side}_mask"], where, root)
            flow_size = record.get("flow_size")
            if flow_size is not None and tuple(flow_size) != sizes[record["target_id"]]:
                raise DataError(f"{record['id']}: the flow {tuple(flow_size)} is not of its image's size.")
        except DataError as error:
            problems.report(error)
        else:
            yield embedded


def _embedded(image: dict[str, Any], where: str, root: str) -> dict[str, Any]:
    """Bytes and file name of an image, without the folder: no path of this machine gets into a data set.

    Raises:
        DataError: for a link that leads out of the archive, so that no other file gets into a data set either.
    """
    if image.get("bytes") is not None:
        return {"bytes": image["bytes"], "path": os.path.basename(image.get("path") or "") or None}
    if not Path(os.path.realpath(image["path"])).is_relative_to(root):
        raise DataError(f"{where}: {image['path']} is a link out of the data folder; put the file in its place.")
    try:
        return {"bytes": Path(image["path"]).read_bytes(), "path": as_text(os.path.basename(image["path"]))}
    except OSError as error:
        raise DataError(f"{where}: {image['path']} cannot be read.") from error


def _row_groups(records: Iterable[Record], limit: int) -> Iterator[list[Record]]:
    """Records in groups of about `limit` bytes."""
    rows: list[Record] = []
    size = 0
    for record in records:
        images = sum(len(record[column]["bytes"]) for column in IMAGE_COLUMNS if record[column] is not None)
        flow = None if record["flow"] is None else np.asarray(record["flow"], np.float32)
        rows.append({**record, "flow": flow})
        size += images + (0 if flow is None else flow.nbytes) + 256
        if size >= limit:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


def _write_split(
    records: Iterable[Record],
    folder: Path,
    split: str,
    shard_bytes: int,
    row_group_bytes: int,
    progress: Callable[[int], None] | None,
) -> int:
    """Writes the shards of a split; returns the number of records."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = features().arrow_schema
    writer: pq.ParquetWriter | None = None
    shards: list[Path] = []
    count = 0
    try:
        for rows in _row_groups(records, row_group_bytes):
            if writer is None:
                shards.append(folder / f"{split}-{len(shards):05d}.parquet")
                writer = pq.ParquetWriter(
                    shards[-1],
                    schema,
                    compression="zstd",
                    use_dictionary=True,
                    # Above this size Parquet gives the dictionary up and repeats every image in full.
                    dictionary_pagesize_limit=2 * row_group_bytes,
                    write_page_index=True,
                )
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
            count += len(rows)
            if shards[-1].stat().st_size >= shard_bytes:
                writer.close()
                writer = None
            if progress is not None:
                progress(len(rows))
    finally:
        if writer is not None:
            writer.close()
    for number, path in enumerate(shards):
        os.replace(path, folder / f"{split}-{number:05d}-of-{len(shards):05d}.parquet")
    return count


def _digest(folder: Path) -> str:
    """A digest of all shards of a folder."""
    digest = hashlib.sha256()
    for path in parquet_files(folder):
        with open(path, "rb") as shard:
            while block := shard.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def data_card(entry: Benchmark, counts: dict[str, int], problems: Problems, digest: str) -> str:
    """The `README.md` of a prepared data set: metadata that the Hub and `datasets` read, columns, citation.

    `datasets` keeps what it has loaded under a key made of the folder's name and the card's settings, not of the files:
    without the digest, another data set in a folder of the same name would come back as the old one.
    """
    from huggingface_hub import DatasetCardData

    files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in counts]
    settings = DatasetCardData(
        pretty_name=entry.title,
        license=entry.licence,
        task_categories=["image-segmentation" if entry.kind == "images" else "keypoint-detection"],
        tags=["semantic-correspondence", "object-co-segmentation", "macosnet"],
        configs=[{"config_name": "default", "description": f"content {digest}", "data_files": files}],
    )
    # A message begins with the file, or the record, that was left out; folders of this machine are not published.
    left_out = [os.path.basename(message.split(",")[0].split(":")[0]) for message in problems.messages]
    lines = [
        f"---\n{settings.to_yaml()}\n---\n",
        f"# {entry.title}\n",
        f"{CARD_MARK}{entry.name}` with the images' original bytes inside.",
        "The terms of the original archive hold; check them before sharing this data set.\n",
        f"Original archive: {entry.homepage}\n" if entry.homepage else "",
        "| split | records |\n|---|---|",
        *(f"| {split} | {count} |" for split, count in counts.items()),
        *([f"\nLeft out as invalid ({len(left_out)}):\n", *(f"- {name}" for name in left_out)] if left_out else []),
        "\n## Columns\n",
        "Coordinates are (x, y) in pixels of the image, 0 the centre of the first pixel; boxes are [x0, y0, x1, y1].",
        "Absent values are null.\n",
        "| column | meaning |\n|---|---|",
        *(f"| `{name}` | {meaning} |" for name, meaning in MEANINGS.items()),
        "\n## Citation\n",
        f"```bibtex\n{entry.citation}\n```\n" if entry.citation else "Not stated by the archive.\n",
    ]
    return "\n".join(lines)
