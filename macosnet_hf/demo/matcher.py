"""The model of a server."""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
import time
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..io.checkpoints import load_model_and_processor
from ..io.memory import trim
from ..io.package import DEFAULT_CHECKPOINT, checkpoint_name
from . import limits
from .reading import PhotoReader

if TYPE_CHECKING:
    from ..inference.files import MatchedPair, SegmentedCollection


class Matcher:
    """The one model of this process. Whichever thread asks first loads it, the others wait."""

    def __init__(self, checkpoint: str = DEFAULT_CHECKPOINT) -> None:
        self.checkpoint = checkpoint
        self.name = checkpoint_name(checkpoint)  # in result files
        self._lock = threading.Lock()
        self._loaded: dict[str, Any] = {}
        self.reader = PhotoReader()
        self._turns = {kind: threading.Semaphore(count) for kind, count in limits.AT_ONCE.items()}
        self._trimmed = time.monotonic()

    def load(self) -> dict[str, Any]:
        """The arguments `model` and `processor` of `match_pair`. Raises `CheckpointError`."""
        with self._lock:
            if not self._loaded:
                model, processor = load_model_and_processor(self.checkpoint)
                # The import belongs under the lock as well: two threads that import torch and transformers from
                # different ends at the same time can meet a module that is only half there.
                _files()
                self._loaded = {"model": model, "processor": processor}
            return self._loaded

    def pair(self, source: str, target: str, refine: str, orientations: str | None = None) -> MatchedPair:
        """Matches the photos in two files. Who waits until large photos are read does not hold up others."""
        with self._working() as loaded:
            copies = _files().open_pair(source, target, read=self.reader.working_copy)
            with self._turns["pair"]:
                return _files().match_copies(copies, refine=refine, orientations=orientations, **loaded)

    def collection(self, paths: list[str], refine: str, progress: Any) -> SegmentedCollection:
        """Segments the photos in some files; `progress` as in `segment_files`."""
        with self._working() as loaded:
            names = [os.path.basename(path) for path in paths]
            copies = _files().open_collection(paths, names, progress, read=self.reader.working_copy)
            with self._turns["collection"]:
                return _files().segment_opened(copies, refine=refine, progress=progress, **loaded)

    @contextlib.contextmanager
    def _working(self) -> Iterator[dict[str, Any]]:
        """Loads the model. Afterwards gives back free memory between the stored results; now and then only, for that
        takes some milliseconds."""
        loaded = self.load()
        try:
            yield loaded
        finally:
            now = time.monotonic()
            if now - self._trimmed > limits.TRIM_SECONDS:
                self._trimmed = now
                trim()


def _files() -> ModuleType:
    """`inference.files`, imported with the model: it needs torch, which the page does not wait for."""
    return importlib.import_module("macosnet_hf.inference.files")
