"""Photographs for training: a folder, class folders, or a data set of the Hub; the only labels are class names."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from macosnet_hf.errors import DataError, ImageError
from macosnet_hf.image_io import load_image

PHOTO_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def find_photographs(folder: str | Path) -> tuple[list[Path], list[str]]:
    """Paths and class names below a folder, sorted. The class is the name of the folder that a photograph lies in.

    A folder in the layout `images/<class>/*` (with masks beside it) is read from `images`: masks are never training
    input.

    Raises:
        DataError: if the folder is missing or holds no photograph.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{folder} is not a folder.")
    if (root / "images").is_dir():
        root = root / "images"
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in PHOTO_SUFFIXES and path.is_file())
    if not paths:
        raise DataError(f"{folder} holds no photographs.")
    return paths, [path.parent.name for path in paths]


class Photographs(Dataset):
    """Photographs resized to a square, as uint8 tensors `(3, size, size)`, kept in memory after the first reading.

    Args:
        sources: folders, or ids of Hub data sets with an `image` column (and `label` or `class` when there are
            classes).
        size: side in pixels; no aspect is kept, as for the network's input.
        exclude: class names to leave out, such as a folder of background clutter.
        limit: at most so many photographs a class.
    """

    def __init__(self, sources: list[str], size: int, *, exclude: tuple[str, ...] = (), limit: int | None = None):
        self.size = size
        self._items: list[Path | Image.Image] = []
        self.class_names: list[str] = []
        for source in sources:
            items, names = find_photographs(source) if Path(source).exists() else _hub_photographs(source)
            counts: dict[str, int] = {}
            for item, name in zip(items, names, strict=True):
                counts[name] = counts.get(name, 0) + 1
                if name in exclude or (limit is not None and counts[name] > limit):
                    continue
                self._items.append(item)
                self.class_names.append(name)
        if not self._items:
            raise DataError(f"No photographs are left of {', '.join(sources)}.")
        self._cache: Tensor | None = None

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Tensor:
        return self._read(index) if self._cache is None else self._cache[index]

    def _read(self, index: int) -> Tensor:
        item = self._items[index]
        picture = load_image(item)
        resized = picture.resize((self.size, self.size), Image.Resampling.BILINEAR, reducing_gap=2.0)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()

    def keep_in_memory(self, *, quiet: bool = False, workers: int = 2) -> None:
        """Decodes everything once, in parallel.

        Raises:
            DataError: naming the first photograph that cannot be read.
        """
        cache = torch.empty(len(self), 3, self.size, self.size, dtype=torch.uint8)

        def read(index: int) -> None:
            try:
                cache[index] = self._read(index)
            except ImageError as error:
                raise DataError(f"Photograph {index} of the data set cannot be used: {error}") from error

        with ThreadPoolExecutor(workers) as pool:
            list(tqdm(pool.map(read, range(len(self))), total=len(self), desc="Reading photographs", disable=quiet))
        self._cache = cache

    def classes(self) -> dict[str, list[int]]:
        """Indices by class name."""
        groups: dict[str, list[int]] = {}
        for index, name in enumerate(self.class_names):
            groups.setdefault(name, []).append(index)
        return groups


def _hub_photographs(dataset_id: str) -> tuple[list[Image.Image], list[str]]:
    from datasets import load_dataset

    try:
        dataset = load_dataset(dataset_id, split="train")
    except Exception as error:  # the client raises many kinds; to the user all mean that the data set cannot be had.
        raise DataError(f"{dataset_id} is neither a folder nor a data set that can be loaded: {error}") from error
    if "image" not in dataset.column_names:
        raise DataError(f"The data set {dataset_id} has no column 'image'.")
    column = next((name for name in ("class", "label") if name in dataset.column_names), None)
    names = [str(value) for value in dataset[column]] if column else ["all"] * len(dataset)
    return [row["image"] for row in dataset], names
