"""The tab "Pair": two photos, a stage for what was found in them, and files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import gradio as gr

from ..inference.result_files import VIEWS
from . import components, limits
from .code import pair_code
from .downloads import pair_archive
from .examples import EXAMPLES, LABELS, MIRRORED
from .hinting import follow_marks, marks
from .last_result import LastResult
from .sessions import Sessions
from .settings import Settings
from .texts import FACING, PHOTOS, PRESS_MATCH, errors_for_visitors, marked, pair_verdict
from .viewer import viewer, viewer_images, viewer_lines

if TYPE_CHECKING:
    from ..inference.files import MatchedPair


class PairTab:
    """The components of the tab and what happens to them. Made inside the tab."""

    def __init__(self, sessions: Sessions, demo: gr.Blocks) -> None:
        self.sessions = sessions
        self.key, self.last = gr.State(), LastResult(sessions, sessions.pairs, "pair")
        self.verdict = gr.HTML(elem_id="verdict")
        with gr.Column(elem_id="stage"):
            self._stage()
        self._start()
        self._options()
        self.shown = [self.key, self.verdict, self.drawing, self.archive, self.code, self.results, self.last.noted]
        self._matching_events(demo)
        self._result_events()

    def _stage(self) -> None:
        """The places for photos; the result covers them, see `page.css`."""
        with gr.Row(elem_id="uploads"):
            self.uploads = [components.image_upload(name, label) for name, label in zip(VIEWS, PHOTOS, strict=True)]
        with gr.Column(visible=False, elem_id="pair-results") as self.results:
            self.drawing = viewer(self.sessions.pairs)

    def _start(self) -> None:
        with gr.Row(elem_id="start"):
            self.button = gr.Button("Match", variant="primary", size="lg", elem_id="match", min_width=220)
            self.examples = gr.Dataset(
                elem_id="examples",
                label="Or try one of these",
                components=[*self.uploads, gr.Textbox(visible=False)],
                samples=[[*pair, LABELS[pair]] for pair in EXAMPLES],
                show_label=False,
            )

    def _options(self) -> None:
        with gr.Accordion("Options", open=False, elem_id="options"), gr.Row():
            self.threshold = gr.Slider(
                0, 1, 0.0, step=0.01, label="Confidence, at least", elem_id="threshold", min_width=240
            )
            self.count = gr.Slider(5, 200, 40, step=5, label="Lines, at most", elem_id="count", min_width=240)
            self.refine = components.refinement_choice()
            self.orientations = gr.Radio(
                FACING, value="none", label="Photo B may be", elem_id="orientations", min_width=240
            )
            self.model = components.model_choice(tuple(self.sessions.matcher.checkpoints), elem_id="model")
        self.settings = Settings(
            {
                "threshold": self.threshold,
                "lines": self.count,
                "edges": self.refine,
                "facing": self.orientations,
                "model": self.model,
            }
        )
        with gr.Column(elem_id="pair-downloads"):
            self.download, self.archive = components.download("pair"), components.download_place()
            gr.Markdown(
                "One zip: matches as JSON and CSV, the dense flow as npz, masks and cutouts as PNG in the photos' own "
                "sizes.",
                elem_classes="small",
            )
            self.code = components.code()

    def _matching_events(self, demo: gr.Blocks) -> None:
        opening = demo.load(
            self.open_page,
            self.last.given,
            js=self.last.js,
            outputs=[*self.settings.inputs, *self.uploads, *self.shown],
            show_progress_on=self.verdict,
            **components.PRIVATE,
        )
        for place in self.uploads:
            components.check_on_upload(place, self.sessions.matcher.reader, f"{place.label}: ")
        inputs = [*self.uploads, *self.settings.inputs]
        matching: dict[str, Any] = {**components.on_uploads(self.match_photos, inputs), **self._of_runs()}
        again = {**matching, **components.on_uploads(self.match_photos, inputs, or_nothing=True)}
        chosen = self.examples.click(
            self.choose_example, [self.examples, self.model], [*self.uploads, self.orientations], **components.INSTANT
        )
        blank = [self.key, self.verdict, self.results]
        changed: dict[str, Any] = {"outputs": blank, **components.INSTANT}
        changed |= components.on_uploads(self.changed, self.uploads)
        starts: list[tuple[Callable[..., Any], dict[str, Any]]] = [
            (self.button.click, matching),
            (chosen.then, matching),
        ]
        starts += [(setting.input, again) for setting in (self.orientations, self.model)]
        for event, run in starts:
            # Once more at the end: its answer may overtake that of a change.
            components.run_on(event, blank, PRESS_MATCH, **run).then(**changed)
        self.settings.keep()
        for place in self.uploads:
            place.change(**changed)
            # Of a page that is still loading, the example would replace the photo.
            place.upload(None, cancels=[opening], **components.INSTANT)

    def _result_events(self) -> None:
        options = [self.threshold, self.count]
        inputs = [*self.uploads, self.key, *options, self.refine]
        refining: dict[str, Any] = {**self._of_runs(), "show_progress_on": self.verdict}
        self.refine.input(**components.on_uploads(self.refine_again, inputs), **refining)
        follow_marks(self.drawing, inputs[:-1], self.sessions, self._show_if_chosen, **refining)
        # One listener for both, so that answers cannot overtake each other.
        gr.on(
            [slider.input for slider in options],
            self.redraw,
            [self.key, *options],
            [self.drawing, self.archive, self.code],
            trigger_mode="always_last",
            **components.QUIET,
        )
        queue = {"concurrency_limit": 2, "show_progress_on": self.download, **components.PRIVATE}
        written = self.download.click(self.write_files, [self.key, self.threshold], self.archive, **queue)
        components.download_of(written, self.archive)

    def _of_runs(self) -> dict[str, Any]:
        queue = {"concurrency_id": "pair", "concurrency_limit": limits.STARTED["pair"]}
        return {"outputs": self.shown, "show_progress_on": self.verdict, **queue, **components.PRIVATE}

    def show(
        self, pair: MatchedPair, threshold: float, count: int, request: gr.Request, key: str = "", again: bool = True
    ) -> tuple[Any, ...]:
        """Stores a result and returns the values of `shown`.

        Args:
            pair: the result.
            threshold, count: of the lines.
            request: of the page.
            key: of a result that is stored already.
            again: whether a reload of the page shows it again.
        """
        key = key or self.sessions.pairs.add(pair, request.session_hash)
        self.sessions.place(request, "pair").hints = pair.hints
        result = pair.result
        names = (pair.copies[0].name, pair.copies[1].name)
        return (
            key,
            marked(result.quality, result.quality, pair_verdict(pair)),
            gr.HTML(
                value=viewer_lines(result, threshold, count),
                images=viewer_images(key, (result.source, result.target), names, marks(pair.hints, 2)),
            ),
            None,
            pair_code(pair, threshold, count),
            gr.Column(visible=True),
            self.last.note(request, key if again else ""),
        )

    def match_photos(
        self,
        source: str | None,
        target: str | None,
        threshold: float,
        count: int,
        refine: str,
        orientations: str,
        model: str,
        request: gr.Request,
    ) -> tuple[Any, ...]:
        with errors_for_visitors():
            photos = components.checked_pair(source, target)
            marked_before = self.sessions.place(request, "pair").marks_on(photos)
            hints = {VIEWS[view]: hint for view, hint in marked_before.items()}
            matcher = self.sessions.matcher
            work = partial(matcher.pair, *photos, refine, orientations, model, roles=PHOTOS, hints=hints)
            return self._show_if_chosen(photos, work, threshold, count, request)

    def _show_if_chosen(
        self,
        photos: tuple[str | None, ...],
        work: Callable[[], MatchedPair],
        threshold: float,
        count: int,
        request: gr.Request,
    ) -> tuple[Any, ...]:
        """The values of `shown`; those without a result if other photos were chosen during the work."""
        place = self.sessions.place(request, "pair")
        with place.run(photos):
            pair = work()
        if place.photos != photos:
            key, verdict, results = components.no_result(PRESS_MATCH)
            return key, verdict, gr.skip(), None, "", results, gr.skip()
        place.shown = photos
        return self.show(pair, threshold, count, request)

    def changed(self, source: str | None, target: str | None, request: gr.Request) -> Any:
        """Takes a result away that is not of these photos."""
        other = self.sessions.place(request, "pair").changed((source, target))
        return components.no_result(PRESS_MATCH) if other else gr.skip()

    def open_page(self, key: str, request: gr.Request) -> tuple[Any, ...]:
        """The result of before where the page is loaded again, else the example; all with the settings of the address.

        Where the address asks for another model, or for photos that face otherwise, it is no reload.
        """
        with errors_for_visitors():
            found = self.last.find(key, request) if key else None
            if key and found is None:
                no_key, verdict, results, noted = self.last.gone(request)
                values = self.settings.read(request)
                return *values.values(), None, None, no_key, verdict, gr.skip(), None, "", results, noted
            if found is not None:
                pair, model = found
                facing = pair.orientations or self.sessions.facing(model)
                values = self.settings.read(request, edges=pair.refine, facing=facing, model=model)
                if (values["model"], values["facing"]) == (model, facing):
                    again = pair.refined(values["edges"])
                    photos = self._chosen([copy.path for copy in pair.copies], request)
                    shown = self.show(
                        again, values["threshold"], values["lines"], request, key if again is pair else ""
                    )
                    return *values.values(), *photos, *shown
            return self.show_example(request)

    def _chosen(self, paths: Sequence[str], request: gr.Request) -> tuple[str, ...]:
        """What the places show of a result's photos, noted as what the result is of."""
        photos = tuple(components.in_cache(place, path) for place, path in zip(self.uploads, paths, strict=True))
        self.sessions.place(request, "pair").shown = photos
        return photos

    def show_example(self, request: gr.Request) -> tuple[Any, ...]:
        with errors_for_visitors():
            model = self.sessions.usable(self.settings.read(request, quiet=True)["model"])
            values = {**self.settings.read(request, facing=self.sessions.facing(model)), "model": model}
            photos = self._chosen(EXAMPLES[0], request)
            pair = self.sessions.example_pair(model, values["edges"], values["facing"])
            shown = self.show(pair, values["threshold"], values["lines"], request, again=False)
            return (*values.values(), *photos, *shown)

    def choose_example(self, sample: list[str], model: str) -> tuple[str, str, str]:
        """Two photos, and how the second may face."""
        source, target, label = sample
        return source, target, "mirror" if label == LABELS[MIRRORED] else self.sessions.facing(model)

    def redraw(self, key: str | None, threshold: float, count: int, request: gr.Request) -> tuple[Any, ...]:
        """The lines; the files for download are of another threshold, so they go."""
        with errors_for_visitors():
            self.sessions.place(request, "pair").files = None
            pair = self.sessions.pairs.get(key)
            return viewer_lines(pair.result, threshold, count), None, pair_code(pair, threshold, count)

    def refine_again(
        self,
        source: str | None,
        target: str | None,
        key: str | None,
        threshold: float,
        count: int,
        refine: str,
        request: gr.Request,
    ) -> tuple[Any, ...]:
        with errors_for_visitors():
            pair = self.sessions.pairs.get(key)
            return self._show_if_chosen((source, target), lambda: pair.refined(refine), threshold, count, request)

    def write_files(self, key: str | None, threshold: float, request: gr.Request) -> str | None:
        """A zip of all files of what is shown; none if that has changed meanwhile."""
        with errors_for_visitors():
            place = self.sessions.place(request, "pair")
            place.files = asked = (key, threshold)
            path = pair_archive(self.archive, self.sessions.pairs.get(key), threshold)
            return path if place.files == asked else None
