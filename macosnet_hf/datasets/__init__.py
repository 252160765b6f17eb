"""Readers of the benchmarks, one record schema, preparation as Parquet, and pair sampling. See `docs/data.md`.

Names are imported on first use, so that importing this package stays cheap. The function `prepare` is not among them:
the name belongs to its module, `macosnet_hf.datasets.prepare`.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .prepare import open_records
    from .readers import BENCHMARKS, Problems, iter_records, load_records
    from .sampling import Group, GroupSampler, stream_groups
    from .schema import features, flow_array, keypoint_array, mask_from_image, open_image

_LAZY_NAMES = {
    "BENCHMARKS": ".readers",
    "Group": ".sampling",
    "GroupSampler": ".sampling",
    "Problems": ".readers",
    "features": ".schema",
    "flow_array": ".schema",
    "iter_records": ".readers",
    "keypoint_array": ".schema",
    "load_records": ".readers",
    "mask_from_image": ".schema",
    "open_image": ".schema",
    "open_records": ".prepare",
    "stream_groups": ".sampling",
}

__all__ = [
    "BENCHMARKS",
    "Group",
    "GroupSampler",
    "Problems",
    "features",
    "flow_array",
    "iter_records",
    "keypoint_array",
    "load_records",
    "mask_from_image",
    "open_image",
    "open_records",
    "stream_groups",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Imports the module that holds `name`."""
        if name not in _LAZY_NAMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value: object = getattr(importlib.import_module(_LAZY_NAMES[name], __name__), name)
        globals()[name] = value
        return value
