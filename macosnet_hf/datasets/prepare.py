"""From an original archive to a folder of Parquet shards that plain `datasets` loads, and opening any kind of data.

The folder: `README.md` (the data set card, which also tells `datasets` where the splits are) and
`data/<split>-00000-of-00003.parquet` with the images inside. It is written under another name and renamed when it is
complete, so a run that was cut off leaves nothing that looks whole; the next run removes its rest and starts again.

Pairs repeat images. Parquet's dictionary encoding stores each image once in a row group, and records come sorted by
class, so PF-WILLOW's 450 pairs take little more room than its 100 images.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError, InputError, OutputError
from ..io.hub import is_prepared
from .benchmarks import Benchmark, Problems, available_splits, get_benchmark, iter_records
from .images import mask_from_image, open_image
from .schema import IMAGE_COLUMNS, Record, check_record, features

if TYPE_CHECKING:
    from filelock import FileLock

MARKER = ".macosnet-partial"
CARD_MARK = "Prepared by `macosnet prepare "
ROW_GROUP_BYTES = 48 * 2**20
"""Images and flows of one row group, decoded; what a reader of the stream holds at a time."""

SHARD_BYTES = 400 * 2**20

# Where a class is scattered over the list, sorting lets each image's pairs follow each other.
_SORTED = ("pf-willow", "pf-pascal", "pairs")


# ---------------------------------------------------------------------------------------------------------------------
# Opening
# ---------------------------------------------------------------------------------------------------------------------


def _is_own_output(folder: Path) -> bool:
    """Whether [`prepare`] made everything that is in the folder, so that it may be replaced."""
    if not is_prepared(folder) or {path.name for path in folder.iterdir()} - {MARKER} != {"README.md", "data"}:
        return False
    if any(path.suffix != ".parquet" for path in (folder / "data").iterdir()):
        return False
    return CARD_MARK in (folder / "README.md").read_text(encoding="utf-8", errors="replace")


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
        data: folder or Hub id; may be left out for `pairs`, where the folder of the list is taken.
        split: which split.
        pairs: list of pairs, for original archives.
        problems: what to do with invalid records.

    Returns:
        the records, and how many there are where that is known without reading them all.

    Raises:
        DataError: for what is wrong with the data.
        InputError: if `data` is neither a folder nor a Hub id.
    """
    problems = problems if problems is not None else Problems()
    if data is None:
        if pairs is None:
            raise InputError("Either a data folder or a list of pairs is needed.")
        data = Path(pairs).parent
    folder = Path(data)
    if folder.is_file() and folder.suffix.lower() == ".csv" and benchmark == "pairs":
        data, pairs, folder = folder.parent, folder, folder.parent
    if folder.exists():
        if is_prepared(folder):
            return stream_prepared(str(folder), benchmark, split, problems), None
        if not folder.is_dir():
            raise DataError(f"{folder} is a file; a folder is needed.")
        if benchmark == "tss":
            return iter_records(benchmark, folder, split, problems=problems, pairs=pairs), None
        records = list(iter_records(benchmark, folder, split, problems=problems, pairs=pairs))
        if benchmark in _SORTED:
            records.sort(key=lambda record: record["class_name"])
        return records, len(records)
    name = str(data)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return stream_prepared(name, benchmark, split, problems), None
    raise DataError(f"{name}: there is no such folder, and it is not the id of a data set on the Hub (owner/name).")


def stream_prepared(data: str, benchmark: str, split: str, problems: Problems) -> Iterator[Record]:
    """Streams a prepared data set, one record in memory at a time (and one row group of its Parquet file).

    Raises:
        DataError: if it cannot be loaded, lacks columns of the schema, or a record is invalid.
    """
    from datasets import Image, load_dataset
    from datasets.exceptions import DatasetsError

    try:
        stream = load_dataset(data, split=split, streaming=True)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: it holds a script
        raise DataError(f"{data}: the split {split!r} cannot be loaded: {_first_line(error)}") from error
    declared = features()
    present = stream.features or {}
    missing = [name for name in declared if name not in present]
    if missing:
        raise DataError(f"{data}: the column {missing[0]!r} is missing; see docs/data.md for the columns.")
    for column in IMAGE_COLUMNS:
        stream = stream.cast_column(column, Image(decode=False))
    count = 0
    rows = iter(stream)
    while True:
        try:
            record = next(rows)
        except StopIteration:
            break
        except (OSError, ValueError) as error:
            raise DataError(f"{data}: the split {split!r} is damaged: {_first_line(error)}") from error
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
    """A prepared data set does not say of which benchmark it is, and figures under another's name would mislead."""
    entry = get_benchmark(benchmark)
    if (record.get("target_image") is not None) != (entry.kind == "pairs"):
        has, wants = ("a single image", "pairs") if entry.kind == "pairs" else ("a pair", "single images")
        raise DataError(f"{where}: this is {has}, but {entry.title} has {wants}.")
    if entry.classes is not None and record.get("class_name") not in entry.classes:
        raise DataError(f"{where}: unknown class {record.get('class_name')!r}; it is not one of {entry.title}.")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
    """Writes an archive as Parquet with embedded images, a card and splits.

    Every image and mask is decoded once, so that what `load_dataset` gives can be read.

    Args:
        benchmark: name of the benchmark.
        source: its original archive.
        output: the folder to make; it must not exist, unless `overwrite`.
        splits: which ones; default: all that the archive holds.
        pairs: list of pairs, as in [`open_records`].
        problems: what to do with invalid records.
        overwrite: replace an earlier output of this function.
        shard_bytes, row_group_bytes: upper bounds on a file and on what a reader decodes at a time, roughly.
        progress: called with the number of records done.

    Returns:
        number of records of each split.

    Raises:
        DataError: for what is wrong with the archive.
        OutputError: if the output exists or cannot be written.
    """
    entry = get_benchmark(benchmark)
    problems = problems if problems is not None else Problems()
    folder, partial = Path(output), _partial(output)
    if folder.exists() and not (overwrite and _is_own_output(folder)):
        own = _is_own_output(folder)
        state = "exists already" if own or folder.is_file() else "exists and holds what was not made by prepare"
        raise OutputError(f"{folder} {state}; choose another name{' or --overwrite' if own else ''}.")
    chosen = list(dict.fromkeys(splits)) if splits is not None else available_splits(benchmark, source)
    if not chosen:
        raise DataError(f"{source}: no split of {entry.title} was found.")
    if benchmark in ("coseg", "pairs") and len(chosen) > 1:
        raise InputError(f"{entry.title} has no splits of its own, so only one can be made of it at a time.")
    lock = _start(partial, _replaced(folder))
    root = _data_root(Path(source))
    try:
        counts = {}
        for split in chosen:
            records, _ = open_records(benchmark, source, split, pairs=pairs, problems=problems)
            counts[split] = _write_split(
                _verified(records, problems, root), partial / "data", split, shard_bytes, row_group_bytes, progress
            )
            if counts[split] == 0:
                raise DataError(f"{source}: no valid record is left in the split {split!r}.")
        card = data_card(entry, counts, problems, _digest(partial / "data"))
        (partial / "README.md").write_text(card, encoding="utf-8")
        (partial / MARKER).unlink(missing_ok=True)
        _put_in_place(partial, folder)
    except OSError as error:
        _discard_quietly(partial)
        raise OutputError(f"{folder} cannot be written: {error}.") from error
    except BaseException:
        _discard_quietly(partial)
        raise
    finally:
        lock.release()
    return counts


def _partial(output: str | os.PathLike[str]) -> Path:
    folder = Path(os.path.abspath(output))
    return folder.with_name(f".{folder.name}.partial")


def _replaced(folder: Path) -> Path:
    """Where an older output stands for the moment in which the new one takes its name."""
    return folder.with_name(f".{folder.name}.replaced")


def _put_in_place(partial: Path, folder: Path) -> None:
    """Gives the finished folder its name. An older output goes as a whole first: were it removed under its name, a
    kill would leave some of its shards there, which `datasets` would load as if they were all."""
    old = _replaced(folder)
    if folder.exists():
        (folder / MARKER).touch()  # it is ours, and may be removed
        os.replace(folder, old)
    os.replace(partial, folder)
    if old.exists():
        _discard(old)


def _discard(folder: Path) -> None:
    """Removes a folder of ours. The marker goes last, so that a removal that is cut off can be told and repeated."""
    marker = folder / MARKER
    marker.touch()
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARKER:
            path.unlink()
    marker.unlink()
    folder.rmdir()


def _discard_quietly(folder: Path) -> None:
    with contextlib.suppress(OSError):
        _discard(folder)


def _start(partial: Path, old: Path) -> FileLock:
    """Makes the partial folder; the rest of a run that was cut off is removed. The marker stays locked while a run is
    alive (the system unlocks it when the run dies), so that two runs never write into one folder."""
    from filelock import FileLock, Timeout

    lock = FileLock(partial / MARKER)
    try:
        if partial.exists():
            # Without the marker it is complete, or empty: the run was cut off between the last file and the renaming,
            # or before the first file.
            ours = (partial / MARKER).is_file() or is_prepared(partial) or not any(partial.iterdir())
            if not ours:
                raise OutputError(f"{partial} is in the way; remove it.")
            with FileLock(partial / MARKER).acquire(timeout=0):
                _discard(partial)
        if (old / MARKER).is_file() or (old.is_dir() and not any(old.iterdir())):
            _discard(old)
        partial.mkdir(parents=True)
        # The marker is the first file: whatever bears it is ours, unfinished, and may be removed.
        lock.acquire(timeout=0)
        (partial / "data").mkdir()
    except (Timeout, FileExistsError) as error:
        raise OutputError(f"Another run is writing this output just now ({partial}).") from error
    except OSError as error:
        raise OutputError(f"The folder {partial.parent} cannot be written to: {error}.") from error
    return lock


def _data_root(source: Path) -> str:
    """The real folder that everything of an archive lies in."""
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
                    mask_from_image(record[f"{side}_mask"], where, sizes[key])
                    embedded[f"{side}_mask"] = _embedded(record[f"{side}_mask"], where, root)
            flow_size = record.get("flow_size")
            if flow_size is not None and tuple(flow_size) != sizes[record["target_id"]]:
                raise DataError(f"{record['id']}: the flow {tuple(flow_size)} is not of its image's size.")
        except DataError as error:
            problems.report(error)
        else:
            yield embedded


def _embedded(image: dict[str, Any], where: str, root: str) -> dict[str, Any]:
    """Bytes and file name, without the folder: a machine's paths have no place in a data set, nor has an image from
    elsewhere, to which a link in a stranger's archive may lead."""
    if image.get("bytes") is not None:
        return {"bytes": image["bytes"], "path": os.path.basename(image.get("path") or "") or None}
    if not Path(os.path.realpath(image["path"])).is_relative_to(root):
        raise DataError(f"{where}: {image['path']} is a link out of the data folder; put the file in its place.")
    try:
        return {"bytes": Path(image["path"]).read_bytes(), "path": os.path.basename(image["path"])}
    except OSError as error:
        raise DataError(f"{where}: {image['path']} cannot be read.") from error


def _record_bytes(record: Record) -> int:
    images = sum(len(record[column]["bytes"]) for column in IMAGE_COLUMNS if record[column] is not None)
    return images + (4 * len(record["flow"]) if record["flow"] is not None else 0) + 256


def _write_split(
    records: Iterable[Record],
    folder: Path,
    split: str,
    shard_bytes: int,
    row_group_bytes: int,
    progress: Callable[[int], None] | None,
) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    declared = features()
    schema = declared.arrow_schema
    writer: pq.ParquetWriter | None = None
    shards: list[Path] = []
    count = 0
    waiting: list[Record] = []
    waiting_bytes = 0

    def flush() -> None:
        nonlocal writer, waiting, waiting_bytes
        if not waiting:
            return
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
        columns = {
            name: pa.array([row[name] for row in waiting], type=schema.field(name).type) for name in schema.names
        }
        writer.write_table(pa.table(columns, schema=schema))
        waiting, waiting_bytes = [], 0
        if shards[-1].stat().st_size >= shard_bytes:
            writer.close()
            writer = None

    try:
        for record in records:
            waiting.append(
                {**record, "flow": None if record["flow"] is None else np.asarray(record["flow"], np.float32)}
            )
            waiting_bytes += _record_bytes(record)
            count += 1
            if waiting_bytes >= row_group_bytes:
                flush()
            if progress is not None:
                progress(1)
        flush()
    finally:
        if writer is not None:
            writer.close()
    for number, path in enumerate(shards):
        os.replace(path, folder / f"{split}-{number:05d}-of-{len(shards):05d}.parquet")
    return count


def _digest(folder: Path) -> str:
    """A digest of all shards of a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.parquet")):
        with open(path, "rb") as shard:
            while block := shard.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def data_card(entry: Benchmark, counts: dict[str, int], problems: Problems, digest: str) -> str:
    """The `README.md` of a prepared data set: metadata that the Hub and `datasets` read, columns, citation.

    `datasets` keeps what it has loaded under a key made of the folder's name and the card's settings, not of the files:
    without the digest, another data set in a folder of the same name would come back as the old one.
    """
    tasks = ["image-segmentation"] if entry.kind == "images" else ["keypoint-detection"]
    configs = "\n".join(f"  - split: {split}\n    path: data/{split}-*.parquet" for split in counts)
    lines = [
        "---",
        f"pretty_name: {json.dumps(entry.title)}",
        f"license: {entry.licence}",
        "task_categories:",
        *(f"- {task}" for task in tasks),
        "tags:",
        "- semantic-correspondence",
        "- object-co-segmentation",
        "- macosnet",
        "configs:",
        "- config_name: default",
        f"  description: content {digest}",
        "  data_files:",
        configs,
        "---",
        "",
        f"# {entry.title}",
        "",
        f"{CARD_MARK}{entry.name}` with the images' original bytes inside.",
        "The terms of the original archive hold; check them before sharing this data set.",
        "",
    ]
    if entry.homepage:
        lines += [f"Original archive: {entry.homepage}", ""]
    lines += ["| split | records |", "|---|---|", *(f"| {split} | {count} |" for split, count in counts.items()), ""]
    if problems.messages:
        lines += [f"Left out as invalid ({len(problems.messages)}):", ""]
        lines += [f"- {os.path.basename(message.split(',')[0].split(':')[0])}" for message in problems.messages] + [""]
    lines += [
        "## Columns",
        "",
        "Coordinates are (x, y) in pixels of the image, 0 the centre of the first pixel; boxes are [x0, y0, x1, y1].",
        "",
        "| column | meaning |",
        "|---|---|",
        "| `id`, `split`, `class_name` | identity and class (the group, for TSS) |",
        "| `source_image`, `target_image` | the images; a single image has no target |",
        "| `source_id`, `target_id` | equal ids mean the same image |",
        "| `source_keypoints`, `target_keypoints` | row i of both correspond; `keypoint_ids` names the part |",
        "| `source_box`, `target_box` | annotated boxes |",
        "| `source_mask`, `target_mask` | object masks of the images' own size; object is what is not zero, in "
        "grey images that use the upper half of the range what is 128 and more |",
        "| `mirror_source` | mirror the source left-right before matching; annotations are not mirrored |",
        "| `flip_both` | training: mirror both images |",
        "| `flow`, `flow_size` | (dx, dy) of each target pixel to its place in the source, row by row, [h, w]; "
        "1e9 and more is invalid |",
        "| `difficulty` | viewpoint, scale, truncation, occlusion, mirror |",
        "",
        "## Citation",
        "",
    ]
    lines += ["```bibtex", entry.citation, "```", ""] if entry.citation else ["Not stated by the archive.", ""]
    return "\n".join(lines)
