"""Registers the package's classes with transformers' auto classes and pipelines; they need no `trust_remote_code` then.

`import macosnet_hf` calls [`register_lazily`], which imports neither transformers nor torch: each class is registered
right after transformers has imported its own table of that kind.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

_PACKAGE = __name__.partition(".")[0]


def _register_configuration() -> None:
    from transformers import AutoConfig

    from ..configuration_macosnet import MaCoSNetConfig

    AutoConfig.register(MaCoSNetConfig.model_type, MaCoSNetConfig, exist_ok=True)


def _register_models() -> None:
    from transformers import AutoModel, AutoModelForKeypointMatching

    from ..configuration_macosnet import MaCoSNetConfig
    from ..modeling_macosnet import MaCoSNetForKeypointMatching, MaCoSNetModel

    AutoModel.register(MaCoSNetConfig, MaCoSNetModel, exist_ok=True)
    AutoModelForKeypointMatching.register(MaCoSNetConfig, MaCoSNetForKeypointMatching, exist_ok=True)


def _register_image_processor() -> None:
    from transformers import AutoImageProcessor

    from ..configuration_macosnet import MaCoSNetConfig
    from ..image_processing_macosnet import MaCoSNetImageProcessor

    # One class serves both of transformers' back ends, whichever of them a caller's environment prefers.
    classes = {"pil": MaCoSNetImageProcessor, "torchvision": MaCoSNetImageProcessor}
    AutoImageProcessor.register(MaCoSNetConfig, image_processor_classes=classes, exist_ok=True)


def _register_pipelines() -> None:
    from transformers import AutoModelForKeypointMatching
    from transformers.pipelines import PIPELINE_REGISTRY
    from transformers.pipelines.keypoint_matching import KeypointMatchingPipeline

    from ..modeling_macosnet import MaCoSNetPreTrainedModel
    from ..pipeline_macosnet import MaCoSNetCosegmentationPipeline, MaCoSNetKeypointMatchingPipeline

    class PipelineOfTheModel(KeypointMatchingPipeline):
        """Our pipeline for our models; every other model gets the one of transformers."""

        _load_video_processor = False

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            ours = isinstance(args[0] if args else kwargs.get("model"), MaCoSNetPreTrainedModel)
            return (MaCoSNetKeypointMatchingPipeline if ours else KeypointMatchingPipeline)(*args, **kwargs)

    # Not `register_pipeline`, which warns about every task that is there already.
    tasks = PIPELINE_REGISTRY.supported_tasks
    tasks["keypoint-matching"] = {**tasks["keypoint-matching"], "impl": PipelineOfTheModel}
    tasks["image-co-segmentation"] = {
        "impl": MaCoSNetCosegmentationPipeline,
        "pt": (AutoModelForKeypointMatching,),
        "type": "image",
    }


# The module of transformers that holds a table, ours that holds its entry, and what enters it.
_TABLES: dict[str, tuple[str, Callable[[], None]]] = {
    "transformers.models.auto.configuration_auto": (f"{_PACKAGE}.configuration_macosnet", _register_configuration),
    "transformers.models.auto.modeling_auto": (f"{_PACKAGE}.modeling_macosnet", _register_models),
    "transformers.models.auto.image_processing_auto": (
        f"{_PACKAGE}.image_processing_macosnet",
        _register_image_processor,
    ),
    "transformers.pipelines": (f"{_PACKAGE}.pipeline_macosnet", _register_pipelines),
}


class _Registration(importlib.abc.MetaPathFinder):
    """Notices when transformers' tables and our modules have been imported, and registers what has both then."""

    def __init__(self) -> None:
        self._watched = {*_TABLES, *(ours for ours, _ in _TABLES.values())}
        self._imported: set[str] = set()
        self._registered: set[str] = set()

    def install(self) -> None:
        """Watches imports from now on, and registers what has been imported before."""
        sys.meta_path.insert(0, self)
        for name in self._watched & sys.modules.keys():
            if not getattr(sys.modules[name].__spec__, "_initializing", False):
                self._after_import(name)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target) if fullname in self._watched else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self._after_import(fullname)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def _after_import(self, name: str) -> None:
        self._imported.add(name)
        for table, (ours, register) in _TABLES.items():
            # Ours may be the one that imports the table, and unfinished: then its own import registers it.
            unfinished = ours in sys.modules and ours not in self._imported
            if table in self._imported and table not in self._registered and not unfinished:
                self._registered.add(table)
                try:
                    register()
                except ImportError as error:  # an import of transformers must not fail for our sake
                    warnings.warn(f"{_PACKAGE} cannot register its classes ({error}).", stacklevel=2)


def register_lazily() -> None:
    """Registers configuration, models, image processor and pipelines, now or when transformers imports their tables."""
    if not any(isinstance(finder, _Registration) for finder in sys.meta_path):
        _Registration().install()
