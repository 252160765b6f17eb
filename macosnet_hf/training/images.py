"""Images for training: a folder, class folders, or a data set of the Hub; the only labels are class names."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..datasets.images import find_images
from ..errors import DataError, ImageError, InputError
from ..io.image_files import load_image
from ..io.system_files import parquet_files

if TYPE_CHECKING:  # `macosnet adapt` looks for images before it asks for accelerate
    from accelerate import Accelerator

    from .settings import TrainingSettings


class TrainingData(Dataset):
    """A map-style data set that can say which images it holds.

    Attributes:
        fresh_epochs: whether the numbers of an epoch go on where those of the one before ended.
    """

    fresh_epochs = False

    def __len__(self) -> int:
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Text that is equal for equal contents only."""
        raise NotImplementedError


class TrainingImages(TrainingData):
    """Images resized to a square, as uint8 tensors `(3, size, size)`; read each time, or once into memory.

    Args:
        sources: folders, or ids of Hub data sets with an `image` column (and `label` or `class` when there are
            classes).
        size: side in pixels; the aspect changes, as for the network's input.
        exclude: class names to leave out, such as a folder of background clutter.
        limit: at most so many images a class.
        streaming: read data sets (not folders) as streams: nothing is stored on the disk, and the resized images
            stay in memory, at most `stream_limit` of each data set.
        stream_limit: see `streaming`; 20,000 images of side 256 take 4 GB.

    Raises:
        DataError: if a source cannot be found, or no image is left.
        InputError: if the size is too small.
    """

    def __init__(
        self,
        sources: list[str],
        size: int,
        *,
        exclude: tuple[str, ...] = (),
        limit: int | None = None,
        streaming: bool = False,
        stream_limit: int = 20_000,
    ):
        if size < 16:
            raise InputError(f"Images need a side of at least 16 pixels, not {size}.")
        self.size = size
        self._items: list[_Item] = []
        for source in sources:
            streamed = streaming and not _holds_files(source)
            counts: Counter[str] = Counter()
            first = len(self._items)
            for item in _streamed_images(source) if streamed else _stored_images(source):
                counts[item.class_name] += 1
                if item.class_name in exclude or (limit is not None and counts[item.class_name] > limit):
                    continue
                if streamed:  # it does not come by again
                    item = item._replace(read=partial(_given, item.read(size)))
                self._items.append(item)
                if streamed and len(self._items) - first >= stream_limit:
                    break
        self.class_names = [item.class_name for item in self._items]
        if not self._items:
            raise DataError(f"No images are left of {', '.join(sources)}.")
        self._cache: Tensor | None = None

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Tensor:
        return self._items[index].read(self.size) if self._cache is None else self._cache[index]

    def batch(self, indices: Iterable[int]) -> Tensor:
        """uint8 `(N, 3, size, size)`, the images with these numbers."""
        return torch.stack([self[index] for index in indices])

    def fingerprint(self) -> str:
        """Equal for equal images in equal order, wherever their folder lies: a digest of names, sizes, classes."""
        lines = [f"{item.mark}\t{item.class_name}" for item in self._items]
        # The word of version 0.1, whose checkpoints and mask files hold such a line.
        # Names that are no UTF-8 as well.
        digest = hashlib.sha256("\n".join(lines).encode(errors="backslashreplace"))
        return f"{len(self)} photographs, {digest.hexdigest()[:16]}"

    def keep_in_memory(
        self, *, quiet: bool = False, workers: int = 2, device: torch.device | str | None = None
    ) -> None:
        """Decodes everything once, in parallel, into the memory of the CPU or of another device.

        Raises:
            DataError: naming the first image that cannot be read.
        """
        cache = torch.empty(len(self), 3, self.size, self.size, dtype=torch.uint8)
        self._read_all(cache, quiet, workers)
        self._cache = cache.to(device)

    def check(self, *, quiet: bool = False, workers: int = 2) -> None:
        """Tries to read every image, so that a damaged one is found before hours of training, not after.

        Raises:
            DataError: naming the first image that cannot be read.
        """
        self._read_all(None, quiet, workers)

    def _read_all(self, cache: Tensor | None, quiet: bool, workers: int) -> None:
        def read(index: int) -> None:
            try:
                image = self._items[index].read(self.size)
            except ImageError as error:
                raise DataError(f"Image {index} of the data set cannot be used: {error}") from error
            if cache is not None:
                cache[index] = image

        pool = ThreadPoolExecutor(workers)
        try:
            for _ in tqdm(pool.map(read, range(len(self))), total=len(self), desc="Reading images", disable=quiet):
                pass
        finally:
            pool.shutdown(cancel_futures=True)  # after a damaged one, nobody waits for the rest

    def classes(self) -> dict[str, list[int]]:
        """Numbers of the images of each class."""
        return by_class(self.class_names)


def by_class(class_names: Sequence[str]) -> dict[str, list[int]]:
    """The positions of each name, in the order in which the names first appear."""
    members: dict[str, list[int]] = {}
    for index, name in enumerate(class_names):
        members.setdefault(name, []).append(index)
    return members


class _Item(NamedTuple):
    """An image of a source.

    Attributes:
        mark: text that distinguishes it from others without opening it.
        read: from the side in pixels to uint8 `(3, size, size)`; an `ImageError` if it cannot be read.
    """

    mark: str
    class_name: str
    read: Callable[[int], Tensor]


def _read(image: Path | bytes | str, size: int) -> Tensor:
    resized = load_image(image).resize((size, size), Image.Resampling.BILINEAR, reducing_gap=2.0)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


def _read_cell(dataset: Any, row: int, column: str, size: int) -> Tensor:
    return _read(_encoded(dataset[row][column]), size)


def _read_record(place: str, value: dict[str, Any], size: int) -> Tensor:
    try:
        return _read(_encoded(value), size)
    except ImageError as error:
        raise DataError(f"{place}: {error}") from error


def _given(image: Tensor, size: int) -> Tensor:
    return image


def _encoded(value: dict[str, Any]) -> bytes | str:
    """The original bytes of an image in a data set, or what the file is called."""
    return value["bytes"] if value.get("bytes") is not None else value["path"]


def _holds_files(source: str) -> bool:
    """Whether a source is a folder of images, not one made by `macosnet prepare` or another data set in Parquet files,
    nor one of the Hub."""
    return Path(source).exists() and not parquet_files(Path(source) / "data")


def _splits(source: str, streaming: bool = False) -> Iterator[tuple[str, Any, list[str], str | None, Callable]]:
    """The splits to train on: name, data set, image columns (not decoded), class column, and how a class is named.

    Raises:
        DataError: if the data set cannot be had, or has no images.
    """
    from datasets import ClassLabel, Image, load_dataset

    try:
        splits = load_dataset(source, streaming=streaming)
    except Exception as error:  # the client raises many kinds; to the user all mean that the data set cannot be had.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(f"{source} is neither a folder nor a data set that can be loaded: {reason}.") from error
    for split in ["train"] if "train" in splits else sorted(splits):
        dataset = splits[split]
        known = dataset.column_names or []
        columns = [name for name in ("image", "source_image", "target_image") if name in known]
        if not columns:
            raise DataError(f"The data set {source} has no column 'image' and no column 'source_image'.")
        for column in columns:
            dataset = dataset.cast_column(column, Image(decode=False))
        class_column = next((name for name in ("class_name", "class", "label") if name in known), None)
        kind = (dataset.features or {}).get(class_column)
        yield split, dataset, columns, class_column, kind.int2str if isinstance(kind, ClassLabel) else str


def _id_column(image_column: str) -> str | None:
    """`source_id` for `source_image`; there is none for `image`."""
    return image_column.replace("_image", "_id") if "_image" in image_column else None


def _streamed_images(source: str) -> Iterator[_Item]:
    """The images of a stream, each once, in the order of the records."""
    seen: set[str] = set()
    for split, dataset, columns, class_column, name_of in _splits(source, streaming=True):
        for row, record in enumerate(dataset):
            for column in columns:
                identity = record.get(_id_column(column), f"{split} {row}")
                if identity and identity not in seen and record[column] is not None:
                    seen.add(identity)
                    name = name_of(record[class_column]) if class_column else "all"
                    read = partial(_read_record, f"{source}, {split}, record {row + 1}", record[column])
                    yield _Item(f"{source} {identity}", name, read)


def _stored_images(source: str) -> Iterator[_Item]:
    """The images of a folder, or of a data set of the Hub or of `macosnet prepare`, each once.

    Of a data set: the split `train` if there is one, else all splits; a column `image`, or the columns `source_image`
    and `target_image` of this project's records, in which one image may stand in many pairs.
    """
    if _holds_files(source):
        for path, name in zip(*find_images(source), strict=True):
            yield _Item(f"{os.path.relpath(path, source)} {path.stat().st_size}", name, partial(_read, path))
        return
    seen: set[str] = set()
    for split, dataset, columns, class_column, name_of in _splits(source):
        rows = range(len(dataset))
        names = [name_of(value) for value in dataset[class_column]] if class_column else ["all" for _ in rows]
        for column in columns:
            id_column = _id_column(column)
            known = id_column in dataset.column_names
            identities = dataset[id_column] if known else [f"{split} {column} {row}" for row in rows]
            for row, identity, name in zip(rows, identities, names, strict=True):
                if identity and identity not in seen:  # a single image has no target; one of many pairs counts once
                    seen.add(identity)
                    mark = f"{source} {row} {column} {getattr(dataset, '_fingerprint', '')}"
                    yield _Item(mark, name, partial(_read_cell, dataset, row, column))


def open_images(settings: TrainingSettings, limit: int | None = None) -> TrainingImages:
    """The images that a script's settings name, at most `limit` of a class.

    Raises:
        DataError, InputError: as [`TrainingImages`].
    """
    return TrainingImages(
        settings.dataset_name,
        settings.photo_size,
        exclude=tuple(settings.exclude_classes),
        limit=limit,
        streaming=settings.streaming,
    )


def read_images(accelerator: Accelerator, settings: TrainingSettings, images: TrainingImages) -> None:
    """Keeps all images in memory, or tries to read each of them once.

    Raises:
        DataError: naming the first image that cannot be read.
    """
    if settings.keep_in_memory:
        images.keep_in_memory(quiet=not accelerator.is_main_process)
    elif not settings.skip_data_check:
        with accelerator.main_process_first():
            if accelerator.is_main_process:
                images.check()
