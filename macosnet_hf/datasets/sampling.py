"""Pairs and triplets for weak supervision: images of one class, nothing known but the class.

Balanced over classes, and a pure function of seed and number: group number k is the same in every process, for any
number of workers, and after any interruption. Horizontal flips and random crops as in the paper (section 3.4); a flip
is common to the whole group, as in the published pair lists, since a mirrored object would need another transform.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from PIL import Image, ImageOps

from ..errors import DataError, InputError
from .schema import Record

Member = TypeVar("Member")

Crop = tuple[float, float, float, float]


@dataclass(frozen=True)
class Group(Generic[Member]):
    """Two or three images of one class, and how to augment them.

    Attributes:
        class_name: their class.
        members: indices (from [`GroupSampler`]) or records (from [`stream_groups`]), all different.
        flip: mirror all of them left-right.
        crops: for each, (x0, y0, x1, y1) of the part to keep, as shares of width and height.
    """

    class_name: str
    members: tuple[Member, ...]
    flip: bool
    crops: tuple[Crop, ...]


def _generator(seed: int, purpose: str, number: int) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed} {purpose} {number}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def _augmentation(
    generator: np.random.Generator, count: int, flip_probability: float, smallest_crop: float
) -> tuple[bool, tuple[Crop, ...]]:
    flip = bool(generator.random() < flip_probability)
    crops = []
    for _ in range(count):
        side = generator.uniform(smallest_crop, 1.0)
        x, y = generator.uniform(0.0, 1.0 - side, size=2)
        crops.append((float(x), float(y), float(x + side), float(y + side)))
    return flip, tuple(crops)


def _check(group_size: int, flip_probability: float, smallest_crop: float) -> None:
    if group_size not in (2, 3):
        raise InputError(f"A group is a pair or a triplet (2 or 3), not {group_size}.")
    if not 0 <= flip_probability <= 1 or not 0 < smallest_crop <= 1:
        raise InputError("flip_probability must lie in [0, 1] and smallest_crop in (0, 1].")


class GroupSampler:
    """Groups from a list of classes, by number: a map-style data set of [`Group`] with indices as members.

    Every run of as many groups as there are classes holds each class exactly once, in an order of its own.

    Args:
        class_names: class of each image.
        group_size: 2 or 3.
        seed: another seed gives other groups.
        length: how many groups; default: as many as images.
        flip_probability: of a whole group.
        smallest_crop: side of the smallest crop, as a share; 1 for no crops.

    Raises:
        DataError: if a class has fewer images than a group.
        InputError: for options that make no sense.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        group_size: int = 2,
        *,
        seed: int = 0,
        length: int | None = None,
        flip_probability: float = 0.5,
        smallest_crop: float = 0.8,
    ):
        _check(group_size, flip_probability, smallest_crop)
        members: dict[str, list[int]] = {}
        for index, name in enumerate(class_names):
            members.setdefault(name, []).append(index)
        if not members:
            raise DataError("There is no image to take groups from.")
        for name, indices in members.items():
            if len(indices) < group_size:
                raise DataError(f"The class {name!r} has {len(indices)} image(s); a group needs {group_size}.")
        self.group_size, self.seed = group_size, seed
        self.flip_probability, self.smallest_crop = flip_probability, smallest_crop
        self.length = len(class_names) if length is None else length
        self._classes = sorted(members)
        self._members = {name: np.asarray(indices) for name, indices in members.items()}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> Group[int]:
        if not 0 <= number < self.length:
            raise IndexError(number)
        round_number, place = divmod(number, len(self._classes))
        order = _generator(self.seed, "classes", round_number).permutation(len(self._classes))
        name = self._classes[order[place]]
        generator = _generator(self.seed, "group", number)
        chosen = generator.choice(self._members[name], size=self.group_size, replace=False)
        flip, crops = _augmentation(generator, self.group_size, self.flip_probability, self.smallest_crop)
        return Group(name, tuple(int(index) for index in chosen), flip, crops)


def stream_groups(
    records: Iterable[Record],
    group_size: int = 2,
    *,
    seed: int = 0,
    buffer_per_class: int = 32,
    warm_up: int = 512,
    flip_probability: float = 0.5,
    smallest_crop: float = 0.8,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Group[Record]]:
    """Groups over a stream of any length, as many as it has records (of classes with enough images).

    The first `warm_up` records only fill the buffers; from then on each record brings one group, of the class that had
    the fewest so far, and the groups owed for the warm-up come at the end. At most `buffer_per_class` records of each
    class are held. A prepared data set is sorted by class, so shuffle its stream first
    (`stream.shuffle(buffer_size=...)`).

    Args:
        records: single images; the same order in every process.
        group_size, seed, flip_probability, smallest_crop: as in [`GroupSampler`].
        buffer_per_class: records of each class that may meet.
        warm_up: records before the first group.
        rank, world_size: this consumer (process, or worker of a process) and how many there are; each gets its share of
            the one sequence.

    Raises:
        InputError: for options that make no sense.
        DataError: if no class has enough images.
    """
    _check(group_size, flip_probability, smallest_crop)
    if buffer_per_class < group_size or not 0 <= rank < world_size:
        raise InputError("buffer_per_class must hold a group, and rank must be below world_size.")
    buffers: dict[str, list[Record]] = {}
    emitted: dict[str, int] = {}
    number = owed = 0

    def next_group() -> Group[Record] | None:
        nonlocal number
        if not emitted:
            return None
        generator = _generator(seed, "stream", number)
        fewest = min(emitted.values())
        name = str(generator.choice(sorted(key for key, count in emitted.items() if count == fewest)))
        places = generator.choice(len(buffers[name]), size=group_size, replace=False)
        flip, crops = _augmentation(generator, group_size, flip_probability, smallest_crop)
        emitted[name] += 1
        number += 1
        return Group(name, tuple(buffers[name][place] for place in places), flip, crops)

    def mine(group: Group[Record]) -> bool:
        return (number - 1) % world_size == rank

    for index, record in enumerate(records):
        name = record["class_name"]
        buffer = buffers.setdefault(name, [])
        if len(buffer) < buffer_per_class:
            buffer.append(record)
        else:
            buffer[int(_generator(seed, "buffer", index).integers(buffer_per_class))] = record
        if len(buffer) >= group_size and name not in emitted:
            # A class that comes late must not be the only one until it has caught up.
            emitted[name] = min(emitted.values(), default=0)
        owed += 1
        if index >= warm_up:
            group = next_group()
            if group is not None:
                owed -= 1
                if mine(group):
                    yield group
    if not emitted:
        raise DataError(f"No class of the stream has the {group_size} images that a group needs.")
    for _ in range(owed):
        group = next_group()
        if group is not None and mine(group):
            yield group


def augment(image: Image.Image, flip: bool, crop: Crop) -> Image.Image:
    """An image cropped and, if asked, mirrored left-right. The crop is at least two pixels wide and high."""
    width, height = image.size
    left, top = min(round(crop[0] * width), width - 2), min(round(crop[1] * height), height - 2)
    right, bottom = max(round(crop[2] * width), left + 2), max(round(crop[3] * height), top + 2)
    image = image.crop((left, top, min(right, width), min(bottom, height)))
    return ImageOps.mirror(image) if flip else image


def class_names_of(records: Iterable[Any]) -> list[str]:
    """Classes of records, for [`GroupSampler`]."""
    return [record["class_name"] for record in records]
