"""Images in groups of one class, for joint training: who meets whom, how each is cropped, and what is held out."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..datasets.sampling import Crop, GroupSampler
from ..errors import DataError
from .images import TrainingData, TrainingImages, by_class

HELD_OUT_SHARE = 0.1


def view_of(crop: Crop, flip: bool) -> Tensor:
    """`(6,)` affine parameters that take a point of the cropped (then mirrored) image to the whole image."""
    x0, y0, x1, y1 = crop
    width, height = x1 - x0, y1 - y0
    return torch.tensor([-width if flip else width, 0.0, x0 + x1 - 1, 0.0, height, y0 + y1 - 1])


def check_classes(class_names: Sequence[str], group_size: int) -> None:
    """Raises [`DataError`] naming the classes that have too few images for a group."""
    counts = Counter(class_names)
    small = sorted(name for name, count in counts.items() if count < group_size)
    if not small:
        return
    what = "pair" if group_size == 2 else "triplet"
    if len(counts) == 1:
        found = "one image" if counts[small[0]] == 1 else f"only {counts[small[0]]} images"
        raise DataError(f"There is {found} to train on, and a {what} takes {group_size}.")
    shown = ", ".join(f"{name!r} ({counts[name]})" for name in small[:3])
    more = f" and {len(small) - 3} more" if len(small) > 3 else ""
    hint = " --group_size 2," if group_size == 3 and all(counts[name] == 2 for name in small) else ""
    raise DataError(
        f"A {what} takes {group_size} images of a class, and these have fewer: {shown}{more}; add some, or pass"
        f"{hint} --exclude_classes."
    )


def hold_out(class_names: Sequence[str], group_size: int, seed: int) -> tuple[list[int], list[int]]:
    """Indices to train on and indices to judge on.

    A tenth of each class is held out where that is enough for a group. In a small collection that is true of no class:
    then nothing is held out, and the second list is empty.
    """
    members = by_class(class_names)
    generator = torch.Generator().manual_seed(seed)
    used, held_out = [], []
    for name in sorted(members):
        indices = members[name]
        count = int(len(indices) * HELD_OUT_SHARE)
        order = [indices[k] for k in torch.randperm(len(indices), generator=generator).tolist()]
        split = count if count >= group_size else 0
        held_out += order[:split]
        used += order[split:]
    return sorted(used), sorted(held_out)


class GroupedImages(TrainingData):
    """Groups of images by number; numbers go on from epoch to epoch, so that no two epochs hold the same groups.

    An item is a dictionary: `images` uint8 `(V, 3, S, S)`, `views` `(V, 6)` (crop and mirror as affine parameters,
    applied on the device), and `masks` bool `(V, S, S)` where there are pseudo-masks.

    Args:
        images: all of them.
        group_size: 2 or 3.
        indices: which images may be in a group; default all.
        masks: bool pseudo-masks of all images `(N, S, S)`.
        seed, flip_probability, smallest_crop: see [`GroupSampler`].
        length: groups in an epoch; default as many as images.

    Raises:
        DataError: if a class has fewer images than a group.
        InputError: for options that make no sense.
    """

    fresh_epochs = True

    def __init__(
        self,
        images: TrainingImages,
        group_size: int,
        *,
        indices: Sequence[int] | None = None,
        masks: Tensor | None = None,
        seed: int = 0,
        flip_probability: float = 0.5,
        smallest_crop: float = 0.8,
        length: int | None = None,
    ):
        self.indices = list(range(len(images))) if indices is None else list(indices)
        names = [images.class_names[index] for index in self.indices]
        check_classes(names, group_size)
        self.images, self.masks = images, masks
        self.length = len(self.indices) if length is None else length
        self.sampler = GroupSampler(
            names,
            group_size,
            seed=seed,
            length=sys.maxsize,
            flip_probability=flip_probability,
            smallest_crop=smallest_crop,
        )

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        group = self.sampler[number]
        members = [self.indices[member] for member in group.members]
        item = {
            "images": self.images.batch(members),
            "views": torch.stack([view_of(crop, group.flip) for crop in group.crops]),
        }
        if self.masks is not None:
            item["masks"] = self.masks[members]
        return item

    def fingerprint(self) -> str:
        """Of the images, of those that are used, and of the pseudo-masks."""
        used = hashlib.sha256(np.asarray(self.indices, dtype=np.int64).tobytes()).hexdigest()[:8]
        text = f"{self.images.fingerprint()}, {len(self.indices)} used ({used})"
        if self.masks is not None:
            text += f", masks {hashlib.sha256(np.packbits(self.masks.numpy()).tobytes()).hexdigest()[:16]}"
        return text


def fixed_groups(dataset: GroupedImages, count: int, batch_size: int = 8) -> list[dict[str, Tensor]]:
    """The first `count` groups in batches, for validation and images: the same ones every time."""
    groups = [dataset[number] for number in range(count)]
    return [
        {name: torch.stack([group[name] for group in groups[start : start + batch_size]]) for name in groups[0]}
        for start in range(0, count, batch_size)
    ]
