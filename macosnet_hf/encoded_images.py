"""The images of a collection and their feature maps, each in memory or in a file from which it is read when needed.

The module travels with the model to the Hub; `inference/saved_collections.py` writes and reads the files.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol, overload

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

# Unit-length maps that are held while the cells of images are compared: 35 MB with the lite model.
_HELD_MAPS = 128


class StoredImage(Protocol):
    """An image in a file."""

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""

    def read(self) -> Image.Image:
        """Returns the upright RGB image."""


class ImageList(Sequence[Image.Image]):
    """Images, those in a file decoded anew each time that one is asked for.

    Args:
        entries: images, in memory or in a file.
    """

    def __init__(self, entries: Iterable[Image.Image | StoredImage] = ()):
        self._entries = list(entries)

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, number: int) -> Image.Image: ...

    @overload
    def __getitem__(self, number: slice) -> ImageList: ...

    def __getitem__(self, number: int | slice) -> Image.Image | ImageList:
        if isinstance(number, slice):
            return ImageList(self._entries[number])
        entry = self._entries[number]
        return entry if isinstance(entry, Image.Image) else entry.read()

    def __setitem__(self, number: int, image: Image.Image | StoredImage) -> None:
        self._entries[number] = image

    def extend(self, images: Iterable[Image.Image | StoredImage]) -> None:
        """Adds images."""
        self._entries.extend(images)

    def select(self, numbers: Iterable[int]) -> ImageList:
        """Some of the images, none of them decoded."""
        return ImageList(self._entries[number] for number in numbers)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(width, height) of each image."""
        return [entry.size for entry in self._entries]


class EncodedImage(NamedTuple):
    """What the encoder says of an image.

    Attributes:
        last: its stride-16 map `(C, h, w)`; in half precision where it lies in a file.
        pooled: `(C,)` float64, the mean of that map.
        skips: its projected maps `(c, H/s, W/s)`; None where memory is short.
    """

    last: Tensor
    pooled: Tensor
    skips: tuple[Tensor, ...] | None


class EncodedImages:
    """Encoded images by their content.

    Args:
        skip_memory: bytes for the maps of the skip connections.
        known: by key, images that are encoded already; they stay as they are.
    """

    def __init__(self, skip_memory: int, known: MutableMapping[str, EncodedImage] | None = None):
        self._skip_memory, self._skip_bytes = skip_memory, 0
        self._images: ChainMap[str, EncodedImage] = ChainMap({}, {} if known is None else known)

    def __contains__(self, key: str) -> bool:
        return key in self._images

    def __getitem__(self, key: str) -> EncodedImage:
        return self._images[key]

    def __setitem__(self, key: str, image: EncodedImage) -> None:
        self._images[key] = image

    def keys(self) -> Iterator[str]:
        """Keys of all images."""
        return iter(self._images)

    def more(self) -> EncodedImages:
        """The same images; further ones are added to it alone, and have as much memory again."""
        return EncodedImages(self._skip_memory, self._images)

    def replaced(self, images: MutableMapping[str, EncodedImage]) -> EncodedImages:
        """Other images, with the same memory for maps."""
        return EncodedImages(self._skip_memory, images)

    def add(self, key: str, last: Tensor, skips: tuple[Tensor, ...]) -> None:
        """Adds an image by its maps, which are those of [`EncodedImage`] in the model's precision."""
        self._images[key] = EncodedImage(last, last.double().mean(dim=(1, 2)), None)
        self.keep_skips(key, skips)

    def keep_skips(self, key: str, skips: tuple[Tensor, ...]) -> None:
        """Keeps the projected maps of an image if there is room for them."""
        size = sum(skip.numel() * skip.element_size() for skip in skips)
        if self._skip_bytes + size <= self._skip_memory:
            self._skip_bytes += size
            self._images[key] = self._images[key]._replace(skips=skips)

    def maps(self, keys: Sequence[str], dtype: torch.dtype, device: torch.device) -> FeatureMaps:
        """The stride-16 maps of images."""
        return FeatureMaps([self._images[key] for key in keys], dtype, device)


class FeatureMaps:
    """Stride-16 maps `(N, C, h, w)`, of which a few at a time are a tensor: all together may not fit into memory.

    What it offers, a tensor offers too.

    Args:
        images: N of them, at least one.
        dtype, device: of the tensors.
    """

    def __init__(self, images: Sequence[EncodedImage], dtype: torch.dtype, device: torch.device):
        self._images, self.dtype, self.device = images, dtype, device

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, number: int) -> Tensor:
        return self._images[number].last.to(self.device, self.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, C, h, w)."""
        return (len(self), *self._images[0].last.shape)

    def split(self, count: int) -> Iterator[Tensor]:
        """Tensors `(n, C, h, w)` of `count` maps, the last one of as many as are left."""
        for start in range(0, len(self), count):
            some = self._images[start : start + count]
            yield torch.stack([image.last for image in some]).to(self.device, self.dtype)

    @property
    def pooled(self) -> Tensor:
        """`(N, C)` float64, the mean of each map."""
        return torch.stack([image.pooled for image in self._images]).to(self.device)


class UnitCells:
    """The cells of maps with unit length over channels: `[number]` is `(C, h*w)` float32. The last ones are held.

    Args:
        maps: `(N, C, h, w)`.
    """

    def __init__(self, maps: Tensor | FeatureMaps):
        # Not a method: with the object itself in its cache, the maps would stay until the next garbage collection.
        self._of = lru_cache(_HELD_MAPS)(lambda number: F.normalize(maps[number].float(), dim=0).flatten(1))

    def __getitem__(self, number: int) -> Tensor:
        return self._of(number)
