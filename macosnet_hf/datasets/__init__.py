"""Readers of the benchmarks, one record schema, preparation as Parquet, and groups for training. See `docs/data.md`.

Names are imported on first use, so that importing this package stays cheap. The function `prepare` is not among them:
the name belongs to its module, `macosnet_hf.datasets.prepare`.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .benchmarks import BENCHMARKS as BENCHMARKS
    from .benchmarks import Problems as Problems
    from .benchmarks import iter_records as iter_records
    from .images import open_image as open_image
    from .masks import ObjectMask as ObjectMask
    from .masks import mask_from_image as mask_from_image
    from .masks import read_mask as read_mask
    from .prepare import open_records as open_records
    from .sampling import Group as Group
    from .sampling import GroupSampler as GroupSampler
    from .schema import features as features
    from .schema import flow_array as flow_array
    from .schema import keypoint_array as keypoint_array

_MODULES = {
    "benchmarks": ("BENCHMARKS", "Problems", "iter_records"),
    "images": ("open_image",),
    "masks": ("ObjectMask", "mask_from_image", "read_mask"),
    "prepare": ("open_records",),
    "sampling": ("Group", "GroupSampler"),
    "schema": ("features", "flow_array", "keypoint_array"),
}
_OLD_NAMES = {"mask_from_picture": "mask_from_image", "open_picture": "open_image"}  # of version 0.1

__all__ = [name for names in _MODULES.values() for name in names]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Imports the module that holds `name`."""
        wanted = _OLD_NAMES.get(name, name)
        for module, names in _MODULES.items():
            if wanted in names:
                value: object = getattr(importlib.import_module(f".{module}", __name__), wanted)
                globals()[name] = value
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
