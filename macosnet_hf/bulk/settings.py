"""Settings of a bulk run that decide its results; a folder holds shards of one such set only."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..directions import COLLECTION_ORIENTATIONS, check_orientations
from ..errors import InputError
from ..io.package import VERSION
from ..refinement import check_method

BLOCK_SIZE = 32
SHARD_SIZE = 256
"""Images of a shard, about: what a kill costs is at most one shard of each process, a minute on a CPU."""


@dataclass(frozen=True)
class ShardSettings:
    """What decides the rows of shards."""

    @property
    def parts(self) -> int:
        """How many parts the rows come in, each read on its own."""
        return 1

    def as_dict(self) -> dict[str, Any]:
        """The settings by name."""
        return asdict(self)

    def difference(self, other: dict[str, Any]) -> list[str]:
        """How these settings differ from older ones, a few words for each: `block_size 16, not 32`."""
        return [
            f"{field.name} {getattr(self, field.name)!r}, not {other.get(field.name)!r}"
            for field in fields(self)
            if getattr(self, field.name) != other.get(field.name)
        ]


@dataclass(frozen=True)
class BulkSettings(ShardSettings):
    """What decides the rows of the results; the number of processes does not.

    Attributes:
        dataset: a folder, or the id of a data set on the Hub.
        split: which split.
        image_column: column of the images.
        group_column: column of what the image shows; images are compared with others of their group only. None: all
            images are one group.
        id_column: column of the images' names in the results. None: the path in the data set, or the number of the row.
        block_size: images that are compared with one another, at most.
        shard_size: images of a shard, at least, but for the last one.
        parts: the files of the data set are divided into so many parts, each read on its own.
        partners, refine: as in [`~macosnet_hf.collection.Collection.segment`].
        orientations: as in [`~macosnet_hf.collection.Collection`].
        alpha: whether to add the soft alpha of [`~macosnet_hf.inference.cutouts.alpha_matte`].
        model: name of the checkpoint.
        weights: its digest, of [`~macosnet_hf.io.weights.weights_digest`].
        version: of this package; another one may give other masks.

    Raises:
        InputError: for a value that cannot be used.
    """

    dataset: str
    split: str = "train"
    image_column: str = "image"
    group_column: str | None = None
    id_column: str | None = None
    block_size: int = BLOCK_SIZE
    shard_size: int = SHARD_SIZE
    parts: int = 1
    partners: int = 2
    refine: str = "grabcut"
    orientations: str = "none"
    alpha: bool = False
    model: str = ""
    weights: str = ""
    version: str = VERSION

    def __post_init__(self) -> None:
        if os.path.isdir(self.dataset):  # by whatever path it is named, it is the same data set
            object.__setattr__(self, "dataset", os.path.realpath(self.dataset))
        if not re.fullmatch(r"\w+(\.\w+)*", self.split):
            raise InputError(f"split takes the name of one split; got {self.split!r}.")
        for name, least in (("block_size", 2), ("shard_size", 1), ("parts", 1), ("partners", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise InputError(f"{name} must be a whole number of at least {least}; got {value!r}.")
        check_method(self.refine)
        check_orientations(self.orientations, COLLECTION_ORIENTATIONS)
