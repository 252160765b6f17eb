"""Rows of a data set: id, group, and where the image is; no image is decoded before its block's turn."""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..datasets.schema import as_text
from ..datasets.streams import open_stream, rows_of
from ..errors import DataError, ImageError, InputError
from ..io.decoding_cost import MAX_DECODED_BYTES
from .image_folder import ImageFile, find_image_files
from .settings import BulkSettings

if TYPE_CHECKING:
    from datasets import Features, IterableDataset

_LONGEST_NAME = 4096  # characters; thousands of rows wait in memory


class Row(NamedTuple):
    """A row of a data set.

    Attributes:
        number: from 0 on, in its part of the data set.
        id: its name in the results.
        group: what its image shows; None where there are no groups.
        image: the bytes of its image's file, or the path; None where there is none.
    """

    number: int
    id: str
    group: str | None
    image: bytes | str | None

    @property
    def size(self) -> int:
        """Bytes that the row holds in memory, about."""
        return len(self.image) if isinstance(self.image, bytes) else 0

    def source(self, settings: BulkSettings) -> bytes | str:
        """The bytes of the image's file, or its path on this machine.

        Raises:
            DataError: if the Hub cannot be reached.
            ImageError: if there is no such file, or it lies outside of the data set: a row must not name other files.
        """
        if isinstance(self.image, bytes):
            return self.image
        if self.image is None:
            raise ImageError("The row has no image.")
        if os.path.isdir(settings.dataset):
            return _path_inside(self.image, settings.dataset)
        if f"hf://datasets/{settings.dataset}@" not in self.image:
            raise ImageError("The image's file lies outside of the data set.")
        import fsspec

        try:
            with fsspec.open(self.image, "rb") as file:
                content: bytes = file.read(MAX_DECODED_BYTES + 1)
        except FileNotFoundError as error:
            raise ImageError("The image's file is missing.") from error
        except OSError as error:
            raise DataError(f"{settings.dataset}: {self.id} cannot be fetched ({error}).") from error
        if len(content) > MAX_DECODED_BYTES:
            raise ImageError(f"The image's file has more than {MAX_DECODED_BYTES / 1e6:.0f} MB.")
        return content


def _path_inside(path: str, folder: str) -> str:
    if "\0" in path:
        raise ImageError("The image's file has no name that a file can have.")
    root = os.path.realpath(folder)
    place = os.path.realpath(os.path.join(root, path))
    if os.path.commonpath([root, place]) != root:
        raise ImageError("The image's file lies outside of the data set, or is a link out of it.")
    return place


def check_dataset(dataset: str) -> None:
    """Checks that a data set is a folder, or may be the id of one on the Hub.

    Raises:
        DataError: if it is neither.
    """
    if os.path.isdir(dataset):
        return
    if os.path.exists(dataset):
        raise DataError(f"{dataset} is a file; a folder is needed.")
    if dataset.count("/") != 1 or dataset.startswith((".", "/", "~")):
        raise DataError(
            f"{dataset}: there is no such folder, and it is not the id of a data set on the Hub (owner/name)."
        )


class RowSource:
    """The rows of a data set, in parts that are read on their own.

    Args:
        settings: which data set, and which of its columns.

    Raises:
        DataError: if the data set cannot be loaded, or has no such columns.
        InputError: if it has fewer files than parts are wanted.
    """

    def __init__(self, settings: BulkSettings):
        from datasets import Image, Value

        self.settings = settings
        check_dataset(settings.dataset)
        self._files = find_image_files(settings.dataset, settings.split) if os.path.isdir(settings.dataset) else None
        self._labels = None
        if self._files is not None:
            labels = ["label"] * any(file.label is not None for file in self._files)
            _check_columns({"image": Image(), **dict.fromkeys(labels, Value("string"))}, settings)
            self._check_parts(len(self._files))
            return
        stream = open_stream(settings.dataset, settings.split)
        declared = stream.features or _features_of_first_row(stream, settings)
        _check_columns(declared, settings)
        names = [settings.image_column, settings.group_column, settings.id_column]
        columns = list(dict.fromkeys(name for name in names if name is not None))
        # First of all: from the Hub, streams of image files come decoded, and a damaged one would end them.
        self._stream = (stream.decode(False) if stream.features else stream).select_columns(columns)
        self._labels = getattr(declared.get(settings.group_column or ""), "names", None)
        self._check_parts(stream.n_shards)

    def _check_parts(self, most: int) -> None:
        if self.settings.parts > most:
            raise InputError(
                f"parts must be at most {most}, the number of files of {self.settings.dataset} that can be read on "
                f"their own; got {self.settings.parts}."
            )

    def rows(self, part: int) -> Iterator[Row]:
        """The rows of a part.

        Raises:
            DataError: if a file of the data set is damaged or cannot be reached.
        """
        if self._files is not None:
            yield from self._rows_of_files(self._files, part)
            return
        settings, stream = self.settings, self._stream
        if settings.parts > 1:
            stream = stream.shard(num_shards=settings.parts, index=part, contiguous=True)
        for number, row in enumerate(rows_of(stream, settings.dataset, settings.split)):
            image = row[settings.image_column]
            # A text is the name of a file, as in a table in CSV.
            path, content = (image.get("path"), image.get("bytes")) if isinstance(image, dict) else (image, image)
            content = content if isinstance(content, bytes) else None
            path = path if isinstance(path, str) and path and content is None else None
            if path is not None and "::" in path:
                raise DataError(f"{settings.dataset}: {path.split('::')[-1]} is an archive of images; unpack it first.")
            yield Row(
                number=number,
                id=self._id(row, number, path, part),
                group=self._group(row),
                image=path if content is None else content,
            )

    def _rows_of_files(self, files: Sequence[ImageFile], part: int) -> Iterator[Row]:
        parts = self.settings.parts
        start, end = (len(files) * number // parts for number in (part, part + 1))
        for number, (path, label) in enumerate(files[start:end]):
            name = path if self.settings.id_column is None or label is None else label
            group = None if self.settings.group_column is None or label is None else as_text(label)
            yield Row(number, _name(name), group, path)

    def _group(self, row: dict[str, Any]) -> str | None:
        if self.settings.group_column is None:
            return None
        value = row[self.settings.group_column]
        if value is None or value != value:  # NaN
            return None
        if self._labels is not None and isinstance(value, int) and 0 <= value < len(self._labels):
            return _name(self._labels[value])
        return _name(value)

    def _id(self, row: dict[str, Any], number: int, path: str | None, part: int) -> str:
        if self.settings.id_column is not None and row[self.settings.id_column] is not None:
            return _name(row[self.settings.id_column])
        if path is None:
            return f"{part:05d}-{number:09d}" if self.settings.parts > 1 else f"{number:09d}"
        if "://" in path:  # hf://datasets/owner/name@revision/folder/file
            return _name(path.split("@", 1)[-1].split("/", 1)[-1])
        folder = self.settings.dataset
        return _name(os.path.relpath(os.path.join(folder, path), folder) if os.path.isdir(folder) else path)


def _name(value: Any) -> str:
    """A value as the name of a row or a group. A very long one keeps its start, and its digest instead of the rest."""
    text: str = as_text(str(value))
    if len(text) <= _LONGEST_NAME:
        return text
    return f"{text[: _LONGEST_NAME - 20]}...{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _features_of_first_row(stream: IterableDataset, settings: BulkSettings) -> dict[str, Any]:
    """The names of the columns where the data set declares none; what they hold is not known."""
    return dict.fromkeys(next(rows_of(stream.take(1), settings.dataset, settings.split), {}))


def _check_columns(declared: Features | dict[str, Any], settings: BulkSettings) -> None:
    """Raises [`DataError`] for a column that is not there, or an image column of another kind."""
    from datasets import Image, Value

    if not declared:
        raise DataError(f"{settings.dataset}: the split {settings.split!r} is empty.")
    known = ", ".join(map(repr, declared))
    for name in (settings.image_column, settings.group_column, settings.id_column):
        if name is not None and name not in declared:
            nearest = difflib.get_close_matches(name, declared, n=2, cutoff=0.5)
            hint = f" (nearest: {', '.join(map(repr, nearest))})" if nearest else ""
            raise DataError(f"{settings.dataset} has no column {name!r}{hint}; its columns are {known}.")
    kind = declared[settings.image_column]
    embedded = isinstance(kind, Value) and kind.dtype in ("binary", "large_binary")
    structure = isinstance(kind, dict) and {"bytes", "path"} <= set(kind)
    if not (kind is None or isinstance(kind, Image) or embedded or structure):
        raise DataError(f"{settings.dataset}: the column {settings.image_column!r} holds no images.")
    if settings.image_column in (settings.group_column, settings.id_column):
        raise InputError(f"The column {settings.image_column!r} holds images, no names of them or of groups.")
