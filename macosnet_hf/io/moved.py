"""Old names of modules: they still import, with a warning, and give the module of the new name."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

_PACKAGE = __name__.partition(".")[0]
MOVED = {
    "adapt": "commands.adapt",
    "agreement": "mask_sharing",
    "average": "inference.average",
    "cli": "commands.main",
    "collection_matching": "inference.collection_transforms",
    "convert": "conversion.published",
    "encoder_weights": "training.encoder_weights",
    "export": "conversion.export",
    "hub": "io.hub",
    "image_io": "io.image_files",
    "loading": "io.checkpoints",
    "losses": "training.losses",
    "output_folder": "io.output_folder",
    "pair": "inference.pair",
    "datasets.readers": "datasets.benchmarks",
    "evaluation.inference": "evaluation.predictors",
}


class _MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module under its name of version 0.1."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != _PACKAGE or name not in MOVED:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        name = f"{_PACKAGE}.{MOVED[spec.name.partition('.')[2]]}"
        warnings.warn(f"{spec.name} is now {name}.", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(name)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """The module has run already, under its own name, which it keeps."""
        module.__spec__ = self._spec


def keep_old_names() -> None:
    """Lets the old names be imported; calling it again changes nothing."""
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModules())
