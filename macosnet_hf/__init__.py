"""Show, Match and Segment: joint semantic matching and object co-segmentation for the Hugging Face ecosystem.

Names are imported on first use (PEP 562), so `import macosnet_hf` loads neither torch nor transformers. It also
registers the package's classes with transformers' auto classes and pipelines, once transformers imports these.
"""

import importlib
from typing import TYPE_CHECKING

from .errors import CheckpointError, DataError, ImageError, InputError, MaCoSNetError, OutputError
from .io.memory import collector_paused
from .io.moved import keep_old_names
from .io.package import DEFAULT_CHECKPOINT, VERSION
from .io.registration import register_lazily

if TYPE_CHECKING:
    from .configuration_macosnet import MaCoSNetConfig
    from .image_processing_macosnet import MaCoSNetImageProcessor
    from .inference.pair import PairResult, match_pair
    from .io.image_files import load_image
    from .modeling_macosnet import MaCoSNetForKeypointMatching, MaCoSNetModel

__version__ = VERSION
keep_old_names()
register_lazily()

__all__ = [
    "DEFAULT_CHECKPOINT",
    "CheckpointError",
    "DataError",
    "ImageError",
    "InputError",
    "MaCoSNetConfig",
    "MaCoSNetError",
    "MaCoSNetForKeypointMatching",
    "MaCoSNetImageProcessor",
    "MaCoSNetModel",
    "OutputError",
    "PairResult",
    "__version__",
    "load_image",
    "match_pair",
]

_LAZY_NAMES = {
    "MaCoSNetConfig": ".configuration_macosnet",
    "MaCoSNetForKeypointMatching": ".modeling_macosnet",
    "MaCoSNetImageProcessor": ".image_processing_macosnet",
    "MaCoSNetModel": ".modeling_macosnet",
    "PairResult": ".inference.pair",
    "load_image": ".io.image_files",
    "match_pair": ".inference.pair",
}


if not TYPE_CHECKING:  # a checker sees the imports above, and reports names that do not exist

    def __getattr__(name: str) -> object:
        """Imports the module that holds `name`; raises `AttributeError` for a name that the package does not export."""
        if name not in _LAZY_NAMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        with collector_paused():
            value: object = getattr(importlib.import_module(_LAZY_NAMES[name], __name__), name)
        globals()[name] = value  # later accesses do not come through here
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
