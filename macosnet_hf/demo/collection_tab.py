"""The tab "Collection": two to thirty photos; their cutouts, contact sheet, average and zip, and who agrees."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image

from . import components, limits
from .code import collection_code
from .collection_points import collection_points, points_document
from .downloads import cached_images, collection_archive, sheet_and_average, small_cutout
from .examples import COLLECTION_EXAMPLE
from .sessions import Sessions, Stopped
from .settings import Settings
from .texts import FACING_EACH, PRESS_FIND, agreement, collection_verdict, errors_for_visitors

if TYPE_CHECKING:
    from ..inference.files import SegmentedCollection


class CollectionTab:
    """The components of the tab and what happens to them. Made inside the tab."""

    def __init__(self, sessions: Sessions, tab: gr.Tab) -> None:
        self.sessions = sessions
        self.key = gr.State()
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
                    gallery: dict[str, Any] = {"show_label": False, "object_fit": "contain", "interactive": False}
                    with gr.Tab("Cutouts"):
                        self.cutouts = gr.Gallery(label="Cutouts", elem_id="cutouts", **gallery)
                    with gr.Tab("Masks"):
                        self.masks = gr.Gallery(label="Masks", elem_id="masks", **gallery)
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
            self.download, self.archive = components.download("collection")
            gr.Markdown(
                "One zip: masks and cutouts in original size, contact sheet, average and summary.",
                elem_classes="small",
            )
            self.code = components.code()
        images = [self.cutouts, self.masks, self.points, self.sheet, self.average]
        self.shown = [self.key, self.verdict, *images, self.agreement, self.archive, self.code, self.results]

    def _events(self, tab: gr.Tab) -> None:
        components.check_on_upload(self.photos, self.sessions.matcher.reader)
        opening = tab.select(
            **components.on_uploads(self.show_example, [self.photos]),
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
        segmenting |= components.on_uploads(self.segment_photos, inputs)
        chosen = self.example.click(lambda: list(COLLECTION_EXAMPLE), outputs=self.photos, **components.INSTANT)
        blank = [self.key, self.verdict, self.results]
        changed: dict[str, Any] = {"outputs": blank, **components.INSTANT}
        changed |= components.on_uploads(self.changed, [self.photos])
        runs = [components.run_on(event, blank, **segmenting) for event in (self.button.click, chosen.then)]
        runs += [components.run_on(place.input, blank, **again) for place in self.settings.inputs]
        self.settings.keep()
        for run in runs:
            run.then(**changed)  # its answer may overtake that of a change
        queue = {"concurrency_limit": 1, "show_progress_on": self.download, **components.PRIVATE}
        zipping = self.download.click(self.write_zip, self.key, self.archive, **queue)
        components.download_of(zipping, self.archive)
        self.stop.click(self.sessions.stop, cancels=[*runs, zipping], **components.INSTANT)
        self.photos.change(**changed)
        # Of a page that is still loading, the example would replace the photos.
        self.photos.upload(None, cancels=[opening], **components.INSTANT)

    def show(self, collection: SegmentedCollection, owner: str | None) -> tuple[Any, ...]:
        """Stores a result and returns the values of `shown`."""
        copies = collection.copies
        captions = [
            ("odd one out: " if number in collection.odd else "") + copy.name for number, copy in enumerate(copies)
        ]
        cutouts = [small_cutout(collection, number) for number in range(len(copies))]
        masks = [Image.fromarray(mask) for mask in collection.masks]
        key = self.sessions.collections.add(collection, owner)
        return (
            key,
            collection_verdict(collection),
            list(zip(cached_images(self.cutouts, cutouts, "png"), captions, strict=True)),
            list(zip(cached_images(self.masks, masks, "png"), captions, strict=True)),
            points_document(key, collection),
            *sheet_and_average(self.sheet, collection),
            agreement(collection),
            None,
            collection_code(collection),
            gr.Column(visible=True),
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
        place = self.sessions.place(request, "collection")
        with errors_for_visitors(), place.run(paths), self.sessions.run(request, progress) as report:
            try:
                collection = self.sessions.matcher.collection(paths or [], refine, report, model, orientations)
            except Stopped:
                if place.photos == paths:
                    raise
            if place.photos != paths:
                key, verdict, results = components.no_result(PRESS_FIND if place.photos else "")
                return key, verdict, *([gr.skip()] * 6), None, "", results
            place.shown = paths
            return self.show(collection, request.session_hash)

    def changed(self, photos: list[str] | None, request: gr.Request) -> Any:
        """Takes a result away that is not of these photos, and ends a run of others."""
        place = self.sessions.place(request, "collection")
        if place.photos != photos:
            self.sessions.stop(request)
        return components.no_result(PRESS_FIND if photos else "") if place.changed(photos) else gr.skip()

    def show_example(self, paths: list[str] | None, request: gr.Request) -> Any:
        """Fills the tab of a visitor who comes to it with nothing."""
        if paths:
            return gr.skip()
        with errors_for_visitors():
            values = self.settings.read(request)
            photos = [components.in_cache(self.photos, path) for path in COLLECTION_EXAMPLE]
            self.sessions.place(request, "collection").shown = photos
            collection = self.sessions.example_collection(
                values["collection_model"], values["collection_edges"], values["collection_facing"]
            )
            return (*values.values(), photos, *self.show(collection, request.session_hash))

    def write_zip(self, key: str | None, request: gr.Request, progress: Any = components.PROGRESS) -> str:
        with errors_for_visitors(), self.sessions.run(request, progress) as report:
            collection = self.sessions.collections.get(key)
            path, _ = collection_archive(self.archive, collection, report)
            return path
