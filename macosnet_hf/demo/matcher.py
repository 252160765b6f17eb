"""The models of a server."""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, InputError
from ..inference import ROLES
from ..io.checkpoints import check_checkpoint, fetch_checkpoint, load_model_and_processor
from ..io.image_files import load_image
from ..io.memory import trim
from ..io.package import DEFAULT_CHECKPOINT, EMBEDDED
from . import limits
from .reading import PhotoReader
from .zero_gpu import is_zero_gpu, on_gpu

if TYPE_CHECKING:
    from ..hints import Hint, PlacedHint
    from ..inference.files import MatchedPair, SegmentedCollection
    from ..io.working_copy import WorkingCopy


class Matcher:
    """The models of this process. Whichever thread asks for one first loads it; it then stays.

    One is loaded at a time, and nobody who asks for a loaded one waits for that.

    Args:
        checkpoint: folder, Hub id or embedded name of the model that is used where none is named.
        offered: of further models that visitors may choose.

    Attributes:
        checkpoints: of all of them, by the names that visitors see; the first is that of `checkpoint`.
        missing: why some of `offered` are not among them, by their names.
    """

    def __init__(self, checkpoint: str = DEFAULT_CHECKPOINT, offered: Sequence[str] = tuple(EMBEDDED)) -> None:
        self.checkpoints = _named([checkpoint, *offered])
        self.default = next(iter(self.checkpoints))
        self.missing: dict[str, str] = {}
        self._lock = threading.Lock()
        self._loaded: dict[str, dict[str, Any]] = {}
        self.reader = PhotoReader()
        self._turns = {kind: threading.Semaphore(count) for kind, count in limits.AT_ONCE.items()}
        self._trimmed = time.monotonic()
        self._match, self._segment = on_gpu(self._match_copies), on_gpu(self._segment_copies)
        self._hint = on_gpu(_with_hints)
        if is_zero_gpu():  # which forks: another thread may hold the lock just then
            os.register_at_fork(after_in_child=lambda: setattr(self, "_lock", threading.Lock()))

    def check(self) -> None:
        """Raises `CheckpointError` if one of the models is a folder that cannot be used; loads nothing."""
        for checkpoint in self.checkpoints.values():
            check_checkpoint(checkpoint)

    def fetch(self) -> None:
        """Fetches the offered models of the Hub; one that cannot be had is offered no longer."""
        for name, checkpoint in list(self.checkpoints.items()):
            if name != self.default:
                try:
                    fetch_checkpoint(checkpoint)
                except CheckpointError as error:
                    self.missing[name] = str(error)
                    del self.checkpoints[name]

    def load(self, name: str | None = None) -> dict[str, Any]:
        """The arguments `model` and `processor` of `match_pair`.

        Args:
            name: of a model; the first one if there is none.

        Raises:
            InputError: if no model of that name is offered.
            CheckpointError: if it cannot be loaded.
        """
        name = name or self.default
        if name not in self.checkpoints:
            raise InputError(f"There is no model {name!r} here; choose {' or '.join(self.checkpoints)}.")
        if name not in self._loaded:
            with self._lock:
                if name not in self._loaded:
                    try:
                        model, processor = load_model_and_processor(self.checkpoints[name])
                    except CheckpointError as error:  # visitors need not know where the folder is
                        raise CheckpointError(str(error).replace(self.checkpoints[name], name)) from error
                    # The import belongs under the lock as well: two threads that import torch and transformers from
                    # different ends at the same time can meet a module that is only half there.
                    _files()
                    self._loaded[name] = {"model": model, "processor": processor}
        return self._loaded[name]

    def pair(
        self,
        source: str,
        target: str,
        refine: str,
        orientations: str | None = None,
        model: str | None = None,
        roles: tuple[str, str] = ROLES,
        hints: Mapping[str, Hint | PlacedHint] | None = None,
    ) -> MatchedPair:
        """Matches the photos in two files. Who waits until large photos are read does not hold up others.

        Args:
            source, target, refine, orientations, hints: as in `match_files`.
            model: by name; the first one if there is none.
            roles: what errors call source and target.
        """
        with self._working(model):
            copies = _files().open_pair(source, target, read=self.reader.working_copy, roles=roles)
            with self._turns["pair"]:
                pair = self._match(model, _bare(copies), refine, orientations, hints)
                return replace(pair, copies=copies, checkpoint=self._shown(model))

    def hinted(self, pair: MatchedPair, hints: Mapping[str, Hint | PlacedHint]) -> MatchedPair:
        """A pair with these hints instead of earlier ones."""
        with self._working(None), self._turns["pair"]:
            source, target = _bare(pair.copies)
            return replace(self._hint(replace(pair, copies=(source, target)), hints), copies=pair.copies)

    def collection(
        self,
        paths: list[str],
        refine: str,
        progress: Any,
        model: str | None = None,
        orientations: str = "none",
        hints: Mapping[int, Hint | PlacedHint] | None = None,
    ) -> SegmentedCollection:
        """Segments the photos in some files; `refine`, `progress`, `orientations`, `hints` as in `segment_files`."""
        with self._working(model):
            names = [os.path.basename(path) for path in paths]
            copies = _files().open_collection(paths, names, progress, read=self.reader.working_copy)
            return self._segmented(model, copies, refine, orientations, hints, progress)

    def hinted_collection(
        self, collection: SegmentedCollection, hints: Mapping[int, PlacedHint], progress: Any
    ) -> SegmentedCollection:
        """A collection with these hints instead of earlier ones; the encoder sees the photos again."""
        model = next(name for name in self.checkpoints if self._shown(name) == collection.checkpoint)
        with self._working(model):
            return self._segmented(model, collection.copies, collection.refine, collection.searched, hints, progress)

    def _segmented(
        self,
        model: str | None,
        copies: Sequence[WorkingCopy],
        refine: str,
        orientations: str,
        hints: Mapping[int, Hint | PlacedHint] | None,
        progress: Any,
    ) -> SegmentedCollection:
        with self._turns["collection"]:
            # A callback does not reach another process; Stop then ends a run after the network.
            followed = None if is_zero_gpu() else progress
            collection = self._segment(model, _bare(copies), refine, orientations, hints, followed)
            if progress is not followed:
                progress(1.0, "Segmented")
            return replace(collection, copies=copies, checkpoint=self._shown(model))

    def _shown(self, model: str | None) -> str:
        """What results call a model: a folder of this server by its name alone."""
        name = model or self.default
        folder = self.checkpoints[name]
        if folder in EMBEDDED.values() or not os.path.isabs(folder):
            return folder
        return name if name not in EMBEDDED else f"./{name}"

    def _match_copies(
        self,
        model: str | None,
        copies: Sequence[WorkingCopy],
        refine: str,
        orientations: str | None,
        hints: Mapping[str, Hint | PlacedHint] | None,
    ) -> MatchedPair:
        options = {"refine": refine, "orientations": orientations, "hints": hints}
        return _files().match_copies(tuple(copies), **options, **self.load(model))

    def _segment_copies(
        self,
        model: str | None,
        copies: Sequence[WorkingCopy],
        refine: str,
        orientations: str,
        hints: Mapping[int, Hint | PlacedHint] | None,
        progress: Any,
    ) -> SegmentedCollection:
        options = {"refine": refine, "orientations": orientations, "progress": progress, "hints": hints}
        return _files().segment_opened(copies, **options, **self.load(model))

    @contextlib.contextmanager
    def _working(self, model: str | None) -> Iterator[None]:
        """Loads a model. Afterwards gives back free memory between the stored results; now and then only, for that
        takes some milliseconds."""
        self.load(model)
        try:
            yield
        finally:
            now = time.monotonic()
            if now - self._trimmed > limits.TRIM_SECONDS:
                self._trimmed = now
                trim()


def _with_hints(pair: MatchedPair, hints: Mapping[str, Hint | PlacedHint]) -> MatchedPair:
    return pair.with_hints(hints)


def _bare(copies: Sequence[WorkingCopy]) -> list[WorkingCopy]:
    """Copies without the reader of this server, so that they can be pickled."""
    return [replace(copy, read=load_image) for copy in copies]


def _named(checkpoints: Sequence[str]) -> dict[str, str]:
    """Checkpoints by names for visitors: the short ones of the package, the name of a folder, the id of the Hub."""
    found: dict[str, str] = {}
    for checkpoint in checkpoints:
        folder = EMBEDDED.get(checkpoint, checkpoint)
        if os.path.isdir(folder) and folder not in EMBEDDED.values():
            folder = os.path.abspath(folder)
        if folder in found.values():
            continue
        short = {path: name for name, path in EMBEDDED.items()}.get(folder)
        plain = name = short or (os.path.basename(folder) if os.path.isabs(folder) else folder)
        number = 1
        while name in found:
            number += 1
            name = f"{plain} ({number})"
        found[name] = folder
    return found


def _files() -> ModuleType:
    """`inference.files`, imported with the model: it needs torch, which the page does not wait for."""
    return importlib.import_module("macosnet_hf.inference.files")
