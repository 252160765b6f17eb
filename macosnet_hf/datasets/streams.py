"""Streams of data sets, in a folder or on the Hub, with errors that name the data set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import DataError

if TYPE_CHECKING:
    from datasets import IterableDataset


def open_stream(data: str, split: str) -> IterableDataset:
    """The rows of a split, of which few are in memory at a time.

    Args:
        data: a folder of images or of Parquet files, or the id of a data set on the Hub.
        split: which split.

    Raises:
        DataError: if it cannot be loaded.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(data, split=split, streaming=True)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: it holds a script
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
        except (OSError, ValueError) as error:
            raise DataError(f"{data}: the split {split!r} is damaged: {_first_line(error)}") from error
        if row is None:
            return
        yield row


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
