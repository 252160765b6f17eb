"""Images for training: a folder, class folders, or a data set of the Hub; the only labels are class names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..errors import DataError, ImageError, InputError
from ..io.image_files import is_image_file, load_image

if TYPE_CHECKING:  # `macosnet adapt` looks for images before it asks for accelerate
    from accelerate import Accelerator

    from .settings import TrainingSettings


def find_images(folder: str | Path) -> tuple[list[Path], list[str]]:
    """Paths and class names below a folder, sorted. The class is the name of the folder that an image lies in.

    A folder in the layout `images/<class>/*` (with masks beside it) is read from `images`: masks are never training
    input.

    Raises:
        DataError: if the folder is missing or holds no image.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{folder} is not a folder.")
    if (root / "images").is_dir():
        root = root / "images"
    # A hidden folder holds what a system or a program left behind, such as thumbnails.
    found = (path for path in root.rglob("*") if not any(part.startswith(".") for part in path.relative_to(root).parts))
    paths = sorted(filter(is_image_file, found))
    if not paths:
        raise DataError(f"{folder} holds no images.")
    return paths, [path.parent.name for path in paths]


class TrainingImages(Dataset):
    """Images resized to a square, as uint8 tensors `(3, size, size)`; read each time, or kept in memory.

    Args:
        sources: folders, or ids of Hub data sets with an `image` column (and `label` or `class` when there are
            classes).
        size: side in pixels; no aspect is kept, as for the network's input.
        exclude: class names to leave out, such as a folder of background clutter.
        limit: at most so many images a class.
        streaming: read data sets (not folders) as streams: nothing is stored on the disk, and the resized images
            stay in memory, at most `stream_limit` of each data set.
        stream_limit: see `streaming`; 20,000 images of side 256 take 4 GB.

    Raises:
        DataError: if a source cannot be found, or no image is left.
        InputError: if the size is too small.
    """

    fresh_epochs = False

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
        # A file, a data set's row and column, or what a stream brought: identity and resized image.
        self._items: list[Path | tuple[Any, int, str] | tuple[str, Tensor]] = []
        self._marks: list[str] = []
        self.class_names: list[str] = []
        items: Any
        for source in sources:
            from_files = Path(source).exists() and not _is_prepared(Path(source))
            if from_files:
                items, names = find_images(source)
            elif streaming:
                items, names = _streamed_images(source, size, exclude, limit, stream_limit)
            else:
                items, names = _dataset_images(source)
            counts: dict[str, int] = {}
            for item, name in zip(items, names, strict=True):
                counts[name] = counts.get(name, 0) + 1
                if name in exclude or (limit is not None and counts[name] > limit):
                    continue
                self._items.append(item)
                self._marks.append(_mark(item, source))
                self.class_names.append(name)
        if not self._items:
            raise DataError(f"No images are left of {', '.join(sources)}.")
        self._cache: Tensor | None = None

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Tensor:
        return self._read(index) if self._cache is None else self._cache[index]

    def batch(self, indices: Iterable[int]) -> Tensor:
        """uint8 `(N, 3, size, size)`, the images with these numbers."""
        return torch.stack([self[index] for index in indices])

    def fingerprint(self) -> str:
        """Equal for equal images in equal order, wherever their folder lies: a digest of names, sizes, classes."""
        lines = [f"{mark}\t{name}" for mark, name in zip(self._marks, self.class_names, strict=True)]
        # The word of version 0.1, whose checkpoints and mask files hold such a line.
        return f"{len(self)} photographs, {hashlib.sha256(chr(10).join(lines).encode()).hexdigest()[:16]}"

    def _read(self, index: int) -> Tensor:
        item = self._items[index]
        if isinstance(item, Path):
            return _resized(load_image(item), self.size)
        return item[1] if isinstance(item[1], Tensor) else _resized(load_image(_cell(*item)), self.size)

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
                image = self._read(index)
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
        """Indices by class name."""
        groups: dict[str, list[int]] = {}
        for index, name in enumerate(self.class_names):
            groups.setdefault(name, []).append(index)
        return groups


def _resized(image: Image.Image, size: int) -> Tensor:
    resized = image.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=2.0)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


def _mark(item: Path | tuple[Any, int, str] | tuple[str, Tensor], source: str) -> str:
    """What tells one image from another without opening it."""
    if isinstance(item, Path):
        return f"{os.path.relpath(item, source)} {item.stat().st_size}"
    if isinstance(item[1], Tensor):
        return f"{source} {item[0]}"
    return f"{source} {item[1]} {item[2]} {getattr(item[0], '_fingerprint', '')}"


def _is_prepared(folder: Path) -> bool:
    """Whether a folder was made by `macosnet prepare`, or is another data set in Parquet files."""
    return any((folder / "data").glob("*.parquet"))


def _cell(dataset: Any, row: int, column: str) -> bytes | str:
    """The original bytes of one image, or what they are called."""
    return _encoded(dataset[row][column])


def _encoded(value: dict[str, Any]) -> bytes | str:
    return value["bytes"] if value.get("bytes") is not None else value["path"]


def _load_splits(source: str, streaming: bool = False) -> list[tuple[str, Any, list[str], str | None]]:
    """The splits to train on: name, data set, image columns (not decoded), class column.

    Raises:
        DataError: if the data set cannot be had, or has no images.
    """
    from datasets import Image, load_dataset

    try:
        splits = load_dataset(source, streaming=streaming)
    except Exception as error:  # the client raises many kinds; to the user all mean that the data set cannot be had.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(f"{source} is neither a folder nor a data set that can be loaded: {reason}.") from error
    chosen = []
    for split in ["train"] if "train" in splits else sorted(splits):
        dataset = splits[split]
        known = dataset.column_names or []
        columns = [name for name in ("image", "source_image", "target_image") if name in known]
        if not columns:
            raise DataError(f"The data set {source} has no column 'image' and no column 'source_image'.")
        for column in columns:
            dataset = dataset.cast_column(column, Image(decode=False))
        chosen.append(
            (split, dataset, columns, next((n for n in ("class_name", "class", "label") if n in known), None))
        )
    return chosen


def _streamed_images(
    source: str, size: int, exclude: tuple[str, ...], limit: int | None, stream_limit: int
) -> tuple[list[tuple[str, Tensor]], list[str]]:
    """The first `stream_limit` images of a stream, each once, decoded and resized as they come, and their classes."""
    from datasets import ClassLabel

    items: list[tuple[str, Tensor]] = []
    names: list[str] = []
    seen: set[str] = set()
    for split, dataset, columns, class_column in _load_splits(source, streaming=True):
        kind = (dataset.features or {}).get(class_column)
        for row, record in enumerate(dataset):
            value = record[class_column] if class_column else "all"
            name = kind.int2str(value) if isinstance(kind, ClassLabel) else str(value)
            if name in exclude or (limit is not None and names.count(name) >= limit):
                continue
            for column in columns:
                id_column = column.replace("_image", "_id")
                identity = record[id_column] if id_column in record and id_column != column else f"{split} {row}"
                if not identity or identity in seen or record[column] is None:
                    continue
                seen.add(identity)
                try:
                    image = load_image(_encoded(record[column]))
                except ImageError as error:
                    raise DataError(f"{source}, {split}, record {row + 1}: {error}") from error
                items.append((identity, _resized(image, size)))
                names.append(name)
                if len(items) >= stream_limit:
                    return items, names
    return items, names


def _dataset_images(source: str) -> tuple[list[tuple[Any, int, str]], list[str]]:
    """The images of a data set of the Hub or of a prepared folder, each once, and their class names.

    Takes the split `train` if there is one, else all splits; a column `image`, or the columns `source_image` and
    `target_image` of this project's records, in which one image may stand in many pairs.
    """
    from datasets import ClassLabel

    items: list[tuple[Any, int, str]] = []
    names: list[str] = []
    seen: set[str] = set()
    for split, dataset, columns, class_column in _load_splits(source):
        classes = ["all"] * len(dataset)
        if class_column:
            kind = dataset.features[class_column]
            classes = [kind.int2str(v) if isinstance(kind, ClassLabel) else str(v) for v in dataset[class_column]]
        for column in columns:
            id_column = column.replace("_image", "_id")
            identities = dataset[id_column] if id_column != column and id_column in dataset.column_names else None
            for row, name in enumerate(classes):
                identity = identities[row] if identities is not None else f"{split} {column} {row}"
                if not identity or identity in seen:
                    continue  # a single image has no target; an image of many pairs counts once
                seen.add(identity)
                items.append((dataset, row, column))
                names.append(name)
    return items, names


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
