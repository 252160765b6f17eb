"""The tab "Collection": two to thirty photos; their cutouts, contact sheet, average and zip, and who agrees."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr

from . import components, limits
from .arranging import arranging, on_order
from .code import collection_code
from .collection_photos import collection_masks, collection_points, masks_document, points_document
from .downloads import cached_images, collection_archive, sheet_and_average, small_cutout
from .examples import COLLECTION_EXAMPLE
from .hinting import COLLECTION_HINTS, Mark, hints_of, on_marks, undo_marks
from .last_result import LastResult
from .sessions import Sessions, Stopped
from .settings import Settings
from .texts import FACING_EACH, PRESS_FIND, agreement, collection_verdict, errors_for_visitors

if TYPE_CHECKING:
    from ..inference.files import SegmentedCollection

Report = Callable[[float, str], None]


class CollectionTab:
    """The components of the tab and what happens to them. Made inside the tab."""

    def __init__(self, sessions: Sessions, tab: gr.Tab) -> None:
        self.sessions = sessions
        self.key, self.last = gr.State(), LastResult(sessions, sessions.collections, "collection")
        self._inputs()
        self._results()
        self._events(tab)

    def _inputs(self) -> None:
        gr.Markdown(
            "**Two to thirty photos of the same kind of object.** You get the object of each, their average, and the "
            "one that does not belong."
        )
        self.photos = gr.Gallery(
            label="Photos",
            show_label=False,
            elem_id="photos",
            type="filepath",
            file_types=["image"],
            height="var(--photos)",
            object_fit="cover",
            interactive=True,
        )
        self.arranging = arranging()
        with gr.Row():
            label = "Find what they have in common"
            self.button = gr.Button(label, variant="primary", size="lg", elem_id="segment", scale=3)
            self.stop = gr.Button("Stop", size="lg", elem_id="stop", min_width=100)
            self.example = gr.Button("Example", size="lg", elem_id="collection-example", min_width=140)
        with gr.Accordion("Options", open=False), gr.Row():
            self.refine = components.refinement_choice()
            self.model = components.model_choice(tuple(self.sessions.matcher.checkpoints), elem_id="collection-model")
            self.orientations = gr.Radio(
                FACING_EACH, value="none", label="Photos may be", elem_id="collection-orientations", min_width=240
            )
        self.settings = Settings(
            {"collection_edges": self.refine, "collection_model": self.model, "collection_facing": self.orientations}
        )
        self.verdict = gr.HTML(elem_id="collection-verdict")

    def _results(self) -> None:
        with gr.Column(visible=False, elem_id="collection-results") as self.results:
            with gr.Row():
                with gr.Column(scale=3, min_width=300), gr.Tabs():
                    with gr.Tab("Cutouts"):
                        self.cutouts = gr.Gallery(
                            label="Cutouts",
                            show_label=False,
                            elem_id="cutouts",
                            object_fit="contain",
                            interactive=False,
                        )
                    with gr.Tab("Masks"):
                        self.masks = collection_masks()
                    with gr.Tab("Points"):
                        self.points = collection_points(self.sessions.collections)
                    with gr.Tab("Contact sheet"):
                        self.sheet = components.result_image("Contact sheet", show_label=False, elem_id="sheet")
                with gr.Column(scale=2, min_width=280):
                    self.average = components.result_image(
                        "The average of those that agree", elem_id="average", height=320
                    )
                    gr.Markdown("**How far each agrees with the others**")
                    self.agreement = gr.HTML(elem_id="agreement")
            self.download = components.download("collection")
            gr.Markdown(
                "One zip: masks and cutouts in original size, contact sheet, average and summary.",
                elem_classes="small",
            )
            self.code = components.code()
        self.archive = components.download_place()
        images = [self.cutouts, self.masks, self.points, self.sheet, self.average]
        files = [self.archive, self.code]
        self.shown = [self.key, self.verdict, *images, self.agreement, *files, self.results, self.last.noted]

    def _events(self, tab: gr.Tab) -> None:
        components.check_on_upload(self.photos, self.sessions.matcher.reader)
        opening = tab.select(
            **components.on_uploads(self.open_tab, [self.photos, self.last.given]),
            js=self.last.js,
            outputs=[*self.settings.inputs, self.photos, *self.shown],
            concurrency_limit=2,
            show_progress_on=self.verdict,
            **components.PRIVATE,
        )
        started = limits.STARTED["collection"]
        queue = {"concurrency_id": "collection", "concurrency_limit": started, **components.PRIVATE}
        segmenting: dict[str, Any] = {"outputs": self.shown, "show_progress_on": self.verdict, **queue}
        inputs = [self.photos, *self.settings.inputs]
        again = {**segmenting, **components.on_uploads(self.segment_photos, inputs, or_nothing=True)}
        first = {**segmenting, **components.on_uploads(self.segment_photos, inputs)}
        chosen = self.example.click(lambda: list(COLLECTION_EXAMPLE), outputs=self.photos, **components.INSTANT)
        blank = [self.key, self.verdict, self.results]
        changed: dict[str, Any] = {"outputs": blank, **components.INSTANT}
        changed |= components.on_uploads(self.changed, [self.photos])
        runs = [components.run_on(event, blank, **first) for event in (self.button.click, chosen.then)]
        runs += [components.run_on(place.input, blank, **again) for place in self.settings.inputs]
        marked = [self.photos, self.key]
        runs.append(on_marks(self.masks, self.hint_again, marked, COLLECTION_HINTS, **segmenting))
        self.settings.keep()
        for run in runs:
            run.then(**changed)  # its answer may overtake that of a change
        queue = {"concurrency_limit": 1, "show_progress_on": self.download, **components.PRIVATE}
        zipping = self.download.click(self.write_zip, self.key, self.archive, **queue)
        components.download_of(zipping, self.archive)
        stopped = self.stop.click(self.sessions.stop, cancels=[*runs, zipping], **components.INSTANT)
        stopped.then(None, js=undo_marks(COLLECTION_HINTS), **components.INSTANT)
        self.photos.change(**changed)
        on_order(self.arranging, self.arrange, [self.photos, self.key], outputs=[self.photos, *self.shown])
        # Of a page that is still loading, the example would replace the photos.
        self.photos.upload(None, cancels=[opening], **components.INSTANT)

    def show(
        self, collection: SegmentedCollection, request: gr.Request, key: str = "", again: bool = True
    ) -> tuple[Any, ...]:
        """Stores a result and returns the values of `shown`; arguments as those of [`PairTab.show`]."""
        copies = collection.copies
        captions = [
            ("odd one out: " if number in collection.odd else "") + copy.name for number, copy in enumerate(copies)
        ]
        cutouts = [small_cutout(collection, number) for number in range(len(copies))]
        key = key or self.sessions.collections.add(collection, request.session_hash)
        self.sessions.place(request, "collection").hints = collection.hints
        return (
            key,
            collection_verdict(collection),
            list(zip(cached_images(self.cutouts, cutouts, "png"), captions, strict=True)),
            masks_document(collection),
            points_document(key, collection),
            *sheet_and_average(self.sheet, collection),
            agreement(collection),
            None,
            collection_code(collection),
            gr.Column(visible=True),
            self.last.note(request, key if again else ""),
        )

    def segment_photos(
        self,
        paths: list[str] | None,
        refine: str,
        model: str,
        orientations: str,
        request: gr.Request,
        progress: Any = components.PROGRESS,
    ) -> tuple[Any, ...]:
        hints = self.sessions.place(request, "collection").marks_on(paths)

        def work(report: Report) -> SegmentedCollection:
            return self.sessions.matcher.collection(paths or [], refine, report, model, orientations, hints)

        with errors_for_visitors():
            return self._show_if_chosen(paths, work, request, progress)

    def hint_again(
        self,
        paths: list[str] | None,
        key: str | None,
        marks: list[list[Mark]],
        request: gr.Request,
        progress: Any = components.PROGRESS,
    ) -> tuple[Any, ...]:
        """The masks of all photos follow the marks on some."""
        with errors_for_visitors():
            shown = self.sessions.collections.get(key)
            hints = hints_of(marks, shown.copies, [copy.name for copy in shown.copies])

            def work(report: Report) -> SegmentedCollection:
                return self.sessions.matcher.hinted_collection(shown, hints, report)

            return self._show_if_chosen(paths, work, request, progress)

    def _show_if_chosen(
        self, paths: list[str] | None, work: Callable[[Report], SegmentedCollection], request: gr.Request, progress: Any
    ) -> tuple[Any, ...]:
        """The values of `shown`; those without a result if other photos were chosen during the work."""
        place = self.sessions.place(request, "collection")
        with place.run(paths), self.sessions.run(request, progress) as report:
            try:
                collection = work(report)
            except Stopped:
                if place.photos == paths:
                    raise
            if place.photos != paths:
                if place.shown and place.shown == place.photos:  # the same in another order
                    return gr.skip()
                key, verdict, results = components.no_result(PRESS_FIND if place.photos else "")
                return key, verdict, *([gr.skip()] * 6), None, "", results, gr.skip()
            place.shown = paths
            return self.show(collection, request)

    def arrange(
        self, paths: list[str] | None, key: str | None, order: list[int], request: gr.Request
    ) -> tuple[Any, ...] | Any:
        """The photos in another order, and the result in the same."""
        paths = paths or []
        if sorted(order) != list(range(len(paths))):  # there are others by now
            return gr.skip()
        place = self.sessions.place(request, "collection")
        moved = [paths[number] for number in order]
        with errors_for_visitors():
            if key is None or place.shown != paths:
                return moved, *([gr.skip()] * len(self.shown))
            result = self.sessions.collections.get(key)
            place.photos = place.shown = moved
            result = result.reordered(order, [os.path.basename(path) for path in moved])
            return moved, *self.show(result, request)

    def changed(self, photos: list[str] | None, request: gr.Request) -> Any:
        """Takes a result away that is not of these photos, and ends a run of others."""
        place = self.sessions.place(request, "collection")
        if place.photos != photos:
            self.sessions.stop(request)
        return components.no_result(PRESS_FIND if photos else "") if place.changed(photos) else gr.skip()

    def open_tab(self, paths: list[str] | None, key: str, request: gr.Request) -> Any:
        """Fills the tab of a visitor who comes to it with nothing, as [`PairTab.open_page`]."""
        if paths:
            return gr.skip()
        with errors_for_visitors():
            found = self.last.find(key, request) if key else None
            if key and found is None:
                no_key, verdict, results, noted = self.last.gone(request)
                values = self.settings.read(request)
                return *values.values(), None, no_key, verdict, *([gr.skip()] * 6), None, "", results, noted
            if found is not None:
                collection, model = found
                starts = (collection.refine, model, collection.searched)
                values = self.settings.read(request, **dict(zip(self.settings.places, starts, strict=True)))
                if tuple(values.values()) == starts:
                    photos = self._chosen([copy.path for copy in collection.copies], request)
                    return *values.values(), photos, *self.show(collection, request, key)
            return self.show_example(request)

    def _chosen(self, paths: Sequence[str], request: gr.Request) -> list[str]:
        """What the gallery shows of a result's photos, noted as what the result is of."""
        photos = [components.in_cache(self.photos, path) for path in paths]
        self.sessions.place(request, "collection").shown = photos
        return photos

    def show_example(self, request: gr.Request) -> Any:
        with errors_for_visitors():
            values = self.settings.read(request)
            values["collection_model"] = self.sessions.usable(values["collection_model"])
            photos = self._chosen(COLLECTION_EXAMPLE, request)
            collection = self.sessions.example_collection(
                values["collection_model"], values["collection_edges"], values["collection_facing"]
            )
            return (*values.values(), photos, *self.show(collection, request, again=False))

    def write_zip(self, key: str | None, request: gr.Request, progress: Any = components.PROGRESS) -> str:
        with errors_for_visitors(), self.sessions.run(request, progress) as report:
            collection = self.sessions.collections.get(key)
            path, _ = collection_archive(self.archive, collection, report)
            return path
