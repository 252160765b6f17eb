"""Streams of data sets, in a folder or on the Hub, with errors that name the data set."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError

if TYPE_CHECKING:
    from datasets import IterableDataset

# Rows of a Parquet file that are in memory at a time. `datasets` takes a whole row group, which a file of half a
# kilobyte, whose rows all have one value, can say to hold gigabytes.
_ROWS_AT_ONCE = 16
# Parts of a Parquet file that are unpacked as a whole: larger ones must not be so many times as large as in the file.
_UNPACKED_BYTES, _UNPACKED_TIMES = 256 << 20, 20
# Readers of tables take a line as a whole, and ten times its length in memory.
_LONGEST_LINE = 64_000_000
_COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def open_stream(data: str, split: str) -> IterableDataset:
    """The rows of a split, of which few are in memory at a time.

    Args:
        data: a folder of images or of Parquet files, or the id of a data set on the Hub.
        split: which split.

    Raises:
        DataError: if it cannot be loaded, or a folder names files outside of it.
    """
    from datasets import load_dataset_builder

    folder = Path(data) if os.path.isdir(data) else None
    try:
        if folder is not None:
            _check_card(folder)
        builder = load_dataset_builder(data)
        if folder is not None:
            for files in (builder.config.data_files or {}).values():
                _check_files(files, folder)
        if hasattr(builder.config, "batch_size"):
            builder.config.batch_size = _ROWS_AT_ONCE
        return builder.as_streaming_dataset(split=split)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # of readers of all kinds of files, and of what a stranger wrote into the card
        raise DataError(f"{data}: the split {split!r} cannot be loaded: {_first_line(error)}") from error


def rows_of(stream: IterableDataset, data: str, split: str) -> Iterator[dict[str, Any]]:
    """The rows of a stream of [`open_stream`].

    Raises:
        DataError: if a file is damaged or cannot be reached.
    """
    rows = iter(stream)
    while True:
        try:
            row = next(rows, None)
        except MemoryError:
            raise
        except Exception as error:  # of readers of all kinds of files and values: a time zone that there is not
            raise DataError(f"{data}: the split {split!r} is damaged: {_first_line(error)}") from error
        if row is None:
            return
        yield row


def _check_card(folder: Path) -> None:
    """Refuses a folder whose card names files elsewhere: `datasets` would read them, or ask their addresses.

    Raises:
        DataError: naming the first one.
    """
    import yaml
    from huggingface_hub import metadata_load

    if (folder / "state.json").exists():
        raise DataError(f"{folder} was written by `save_to_disk`; write Parquet files instead (`to_parquet`).")
    for name in ("README.md", ".huggingface.yaml"):
        if not (folder / name).is_file():
            continue
        try:
            text = (folder / name).read_text(encoding="utf-8")
            card = metadata_load(folder / name) if name == "README.md" else yaml.safe_load(text)
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise DataError(f"{folder / name} is damaged: {_first_line(error)}") from error
        for path in _texts(card.get("configs") if isinstance(card, dict) else None):
            if "://" in path or path.startswith(("/", "~")) or ".." in path.replace("\\", "/").split("/"):
                raise DataError(f"{folder / name} names files outside of the data set: {path[:200]!r}.")


def _texts(value: Any) -> Iterator[str]:
    """All texts in nested lists and dictionaries, in each of these once: YAML may hold one a million times."""
    seen, waiting = set(), [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value


def _check_files(files: Iterable[Any], folder: Path) -> None:
    """Refuses links that lead out of a folder, and Parquet files that unpack to many times their size.

    Raises:
        DataError: naming the file.
    """
    root = os.path.realpath(folder)
    roots = [root]
    if os.path.basename(os.path.dirname(root)) == "snapshots":  # the Hub client's cache, of links to the files
        roots.append(os.path.join(os.path.dirname(os.path.dirname(root)), "blobs"))
    for path in map(str, files):
        place = os.path.realpath(path.split("::")[-1])
        if not any(os.path.commonpath([root, place]) == root for root in roots):
            raise DataError(f"{path} lies outside of the data set, or is a link out of it.")
        suffix = os.path.splitext(path)[1].lower()
        if suffix == ".parquet":
            _check_parquet(place)
        elif suffix == ".zip":
            _check_zip(place)
        elif suffix in _COMPRESSED:
            _check_lines(place, _COMPRESSED[suffix])


def _check_zip(path: str) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):  # damaged; whoever reads it says so
        return
    for member in members:
        if member.file_size > max(_UNPACKED_BYTES, _UNPACKED_TIMES * member.compress_size):
            raise DataError(f"{path} is refused: a file in it is {member.file_size / 1e6:.0f} MB, unpacked.")


def _check_lines(path: str, opened: Callable[..., Any]) -> None:
    """Refuses a compressed table with a line of which some hundred bytes of the file are gigabytes in memory."""
    length = 0
    try:
        with opened(path, "rb") as file:
            while length <= _LONGEST_LINE and (part := file.read(1 << 20)):
                length = len(part) - part.rfind(b"\n") - 1 + (0 if b"\n" in part else length)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError):  # damaged, likewise
        return
    if length > _LONGEST_LINE:
        raise DataError(f"{path} is refused: a line of it has more than {_LONGEST_LINE / 1e6:.0f} MB, unpacked.")


def _check_parquet(path: str) -> None:
    import pyarrow.parquet as pq

    try:
        found = pq.read_metadata(path)
    except (OSError, ValueError):  # damaged; whoever reads it says so
        return
    for number in range(found.num_row_groups):
        group = found.row_group(number)
        for column in map(group.column, range(group.num_columns)):
            size = column.total_uncompressed_size
            if size > max(_UNPACKED_BYTES, _UNPACKED_TIMES * column.total_compressed_size):
                raise DataError(f"{path} is refused: a part of it is {size / 1e6:.0f} MB, unpacked.")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
