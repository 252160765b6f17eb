"""Pairs and triplets for weak supervision: images of one class, of which nothing but the class is known.

Groups are balanced over classes, and group number k depends on the seed and on k only: it is the same in every process,
for any number of workers, and after any interruption. Horizontal flips and random crops as in the paper (section 3.4);
a flip is common to the whole group, as in the published pair lists, since a mirrored object would need another
transform.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import DataError, InputError

Crop = tuple[float, float, float, float]


@dataclass(frozen=True)
class Group:
    """Two or three images of one class, and how to augment them.

    Attributes:
        class_name: their class.
        members: indices of the images, all different.
        flip: mirror all of them left-right.
        crops: for each, (x0, y0, x1, y1) of the part to keep, as shares of width and height.
    """

    class_name: str
    members: tuple[int, ...]
    flip: bool
    crops: tuple[Crop, ...]


def _generator(seed: int, purpose: str, number: int) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed} {purpose} {number}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


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
        if group_size not in (2, 3):
            raise InputError(f"A group is a pair or a triplet (2 or 3), not {group_size}.")
        if not 0 <= flip_probability <= 1 or not 0 < smallest_crop <= 1:
            raise InputError("flip_probability must lie in [0, 1] and smallest_crop in (0, 1].")
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

    def __getitem__(self, number: int) -> Group:
        if not 0 <= number < self.length:
            raise IndexError(number)
        round_number, place = divmod(number, len(self._classes))
        order = _generator(self.seed, "classes", round_number).permutation(len(self._classes))
        name = self._classes[order[place]]
        generator = _generator(self.seed, "group", number)
        chosen = generator.choice(self._members[name], size=self.group_size, replace=False)
        flip = bool(generator.random() < self.flip_probability)
        crops = tuple(self._crop(generator) for _ in chosen)
        return Group(name, tuple(int(index) for index in chosen), flip, crops)

    def _crop(self, generator: np.random.Generator) -> Crop:
        side = generator.uniform(self.smallest_crop, 1.0)
        x, y = generator.uniform(0.0, 1.0 - side, size=2)
        return float(x), float(y), float(x + side), float(y + side)
