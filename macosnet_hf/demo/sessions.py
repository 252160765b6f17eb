"""What a server remembers of its visitors: their results, and the runs that they can stop."""

from __future__ import annotations

import contextlib
import html
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import gradio as gr
from cachetools import LRUCache

from ..errors import CheckpointError, MaCoSNetError
from . import limits
from .examples import COLLECTION_EXAMPLE, EXAMPLES
from .matcher import Matcher
from .result_store import ResultStore
from .texts import missing_models

if TYPE_CHECKING:
    from ..hints import PlacedHint

logger = logging.getLogger("macosnet_hf.demo")


class Stopped(MaCoSNetError):
    """A visitor pressed stop, or closed the page."""


@dataclass
class Place:
    """What a tab of a page holds now. A run that ends later compares it with what it was started for.

    Attributes:
        photos: the paths that are chosen.
        running: the paths that a run works on.
        shown: the paths that the result is of; None where there is no result.
        files: what the files for download are made of; None once that is no longer what is shown.
        last_key: the key of the result that a reload of the page shows again; empty for the example of a new page.
        hints: the visitor's marks on what is shown, by number of the photo.
    """

    photos: Any = None
    running: Any = None
    shown: Any = None
    files: Any = None
    last_key: str = ""
    hints: Mapping[int, PlacedHint] = field(default_factory=dict)

    def marks_on(self, photos: Any) -> Mapping[int, PlacedHint]:
        """The marks that a new run of these photos starts with: those on what is shown, if it is of them."""
        return self.hints if self.shown is not None and self.shown == photos else {}

    def changed(self, photos: Any) -> bool:
        """Notes what is chosen now; returns whether what is shown is of something else, and no run is of this."""
        self.photos = photos
        if photos and photos in (self.shown, self.running):
            return False
        self.shown = self.files = None
        return True

    @contextlib.contextmanager
    def run(self, photos: Any) -> Iterator[None]:
        """A run on these photos, which are what is chosen."""
        self.photos = self.running = photos
        self.files = None
        try:
            yield
        finally:
            self.running = None


class Sessions:
    """Results by unguessable key, the results of the examples, and what the tabs and the runs of sessions do."""

    def __init__(self, matcher: Matcher) -> None:
        self.matcher = matcher
        each = (limits.RESULTS_PER_VISITOR, limits.RESULT_SECONDS)
        self.pairs: ResultStore[Any] = ResultStore(limits.MAX_PAIRS, *each)
        self.collections: ResultStore[Any] = ResultStore(limits.MAX_COLLECTIONS, *each)
        self._running: dict[str, threading.Event] = {}
        self._examples: dict[tuple[str, ...], Any] = {}
        self._lock = threading.Lock()
        self._places: LRUCache[tuple[str | None, str], Place] = LRUCache(2 * limits.MAX_SESSIONS)
        self._places_lock = threading.Lock()

    def place(self, request: gr.Request, tab: str) -> Place:
        """What a tab of the session's page holds."""
        with self._places_lock:
            return self._places.setdefault((request.session_hash, tab), Place())

    def usable(self, model: str) -> str:
        """The model, or if it cannot be loaded the first one, and a line on the page says so."""
        try:
            self.matcher.load(model)
        except CheckpointError as error:
            logger.warning("%s", error)
            gr.Warning(html.escape(missing_models([model]), quote=False))
            return self.matcher.default
        return model

    def example_pair(self, model: str, refine: str, orientations: str) -> Any:
        """The pair that a new visitor sees; matched once for all of them."""
        pair, facing = EXAMPLES[0], self.facing(model)
        if orientations == facing:
            found = self._example(("pair", model), lambda: self.matcher.pair(*pair, "grabcut", model=model))
            return found.refined(refine)
        return self.matcher.pair(*pair, refine, orientations, model)

    def facing(self, model: str) -> str:
        """The orientations in which a model looks for the object where none are named."""
        return str(self.matcher.load(model)["model"].config.orientations)

    def example_collection(self, model: str, refine: str, orientations: str) -> Any:
        """The collection that a new visitor sees; segmented once for all of them."""
        photos = list(COLLECTION_EXAMPLE)
        self.matcher.load(model)  # before the lock, so that those who ask for others need not wait
        return self._example(
            ("collection", model, refine, orientations),
            lambda: self.matcher.collection(photos, refine, None, model, orientations),
        )

    def _example(self, kind: tuple[str, ...], work: Callable[[], Any]) -> Any:
        with self._lock:
            if kind not in self._examples:
                self._examples[kind] = work()
            return self._examples[kind]

    @contextlib.contextmanager
    def run(self, request: gr.Request, progress: Callable[..., Any] | None = None) -> Iterator[Callable[..., None]]:
        """Gives a progress callback `(share, text)` that raises `Stopped` once the session's run was stopped."""
        stop, session = threading.Event(), request.session_hash
        if session:
            self._running[session] = stop

        def report(share: float, text: str) -> None:
            if stop.is_set():
                raise Stopped("Stopped.")
            if progress is not None:
                progress(share, desc=text)

        try:
            yield report
        finally:
            if session and self._running.get(session) is stop:
                del self._running[session]

    def stop(self, request: gr.Request) -> None:
        """Ends the session's run at its next step."""
        running = self._running.get(request.session_hash or "")
        if running is not None:
            running.set()

    def leave(self, request: gr.Request) -> None:
        """Ends the run of a session whose page was closed, and drops its results.

        The last one of each tab stays for its time, since the page may be loaded again.
        """
        self.stop(request)
        if request.session_hash:
            self.pairs.drop_all_of(request.session_hash, self.place(request, "pair").last_key)
            self.collections.drop_all_of(request.session_hash, self.place(request, "collection").last_key)
