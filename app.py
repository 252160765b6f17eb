"""The demo: photos in, their matches, masks, points and averages out. Everything is computed by `macosnet_hf`.

Run it with `make demo`, or `python app.py --port 7860 --host 127.0.0.1 --model FOLDER_OR_HUB_ID`.
"""

import argparse
import contextlib
import html
import importlib
import logging
import os
import sys
import tempfile
import threading
import time
from abc import ABCMeta
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio import processing_utils
from gradio.media import MEDIA_ROOT
from PIL import Image

# Before torch is loaded: threads that spin while they wait slow each other down wherever cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from macosnet_hf import DEFAULT_CHECKPOINT, InputError, MaCoSNetError
from macosnet_hf.demo.result_store import KeptResults
from macosnet_hf.demo.viewer_page import PASTE, SCRIPT, STYLE, TEMPLATE
from macosnet_hf.drawing import cutout, overlay_mask
from macosnet_hf.inference.result_files import (
    COLLECTION_ARCHIVE,
    VIEWS,
    pair_document,
    pair_file_names,
    save_mask,
    write_collection,
    write_pair,
    zip_folder,
)
from macosnet_hf.io.checkpoints import load_model_and_processor
from macosnet_hf.io.memory import give_memory_back, trim
from macosnet_hf.io.package import checkpoint_name
from macosnet_hf.io.working_copy import for_browser

logger = logging.getLogger("macosnet_hf.app")

MAX_FILE_MEGABYTES = 30
MAX_WAITING = 100
MAX_POINTS = 1000  # of one request
KEPT_SECONDS = 1800
KEPT_PAIRS, KEPT_COLLECTIONS = 64, 8  # some 8 and 30 MB each
KEPT_PER_VISITOR = 4
FILE_SECONDS = 3600  # how long uploads and results stay on the disk
TIDY_SECONDS = 20  # between two looks for memory that can be given back
KEPT_SESSIONS = 256  # of which gradio remembers what their pages show; its own limit is 10,000
DISPLAY_SIDE = 720  # pixels of the smaller images

TITLE = "Show, Match and Segment"
SUMMARY = "Two photos of the same kind of object go in. Out come the places that match, and the object itself."
LIMITS = (
    "Best with one main object in each photo, the same kind of thing seen from a similar side; thin parts are "
    f"easily missed. Files up to {MAX_FILE_MEGABYTES} MB. Nothing is kept longer than two hours."
)
PAPER = "https://arxiv.org/abs/1906.05857"
VERDICTS = {
    "good": "These two fit together well.",
    "fair": "These two fit together in part.",
    "poor": "These two seem to have nothing in common; do not rely on the matches.",
}
REFINEMENTS = [("Follow the edges (GrabCut)", "grabcut"), ("Otsu", "otsu"), ("As the network says", "none")]

# The camera at the back of a phone, and not mirrored: a mirrored partner is not recognised.
WEBCAM = gr.WebcamOptions(mirror=False, constraints={"video": {"facingMode": {"ideal": "environment"}}})

PROGRESS = gr.Progress()  # what gradio looks for among the defaults of a function

# Photos that come with gradio itself, and a cat (CC0, Stefan van der Walt): examples without a download.
EXAMPLES_FOLDER = MEDIA_ROOT / "images"
OWN_EXAMPLES = Path(__file__).resolve().parent / "docs" / "images"
CHEETAH, LION, TOWER = (str(EXAMPLES_FOLDER / name) for name in ("cheetah1.jpg", "lion.jpg", "tower.jpg"))
CAT = str(OWN_EXAMPLES / "cat.jpg")
EXAMPLES = ((CHEETAH, CAT), (CHEETAH, LION), (LION, TOWER))
COLLECTION_EXAMPLE = (CHEETAH, LION, CAT, TOWER)

# Fonts that every computer has: nothing on the page is fetched from elsewhere.
THEME = gr.themes.Soft(
    primary_hue=gr.themes.colors.orange,
    neutral_hue=gr.themes.colors.stone,
    font=["system-ui", "Segoe UI", "Helvetica Neue", "Arial", "sans-serif"],
    font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
).set(
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_400",
    body_background_fill="*neutral_100",
    block_label_background_fill="*block_background_fill",
    block_label_background_fill_dark="*block_background_fill",
    block_label_text_color="*body_text_color",
    block_label_text_color_dark="*body_text_color",
    block_label_text_weight="500",
    block_title_text_color="*body_text_color",
    block_title_text_color_dark="*body_text_color",
    block_title_text_weight="500",
    button_primary_background_fill="*primary_600",
    button_primary_background_fill_hover="*primary_700",
    # The theme's own are white on white, or orange under white letters that cannot be read.
    checkbox_border_color="*neutral_400",
    checkbox_label_background_fill_selected="*primary_600",
    input_border_color="*neutral_300",
    link_text_color="*primary_700",
    link_text_color_dark="*primary_400",
)
CSS = """
.gradio-container { width: 100%; max-width: 1160px !important; margin: 0 auto !important; }
#header { text-align: center; padding: 0.75rem 0 0; }
#header h1 { font-size: 2rem; font-weight: 650; line-height: 1.2; margin: 0 0 0.4rem; }
#header p { font-size: 1.05rem; margin: 0 auto; max-width: 60rem; color: var(--body-text-color-subdued); }
#verdict, #collection-verdict { min-height: 4.5rem; display: flex; align-items: center; justify-content: center; }
.verdict { display: flex; gap: 0.75rem; align-items: center; justify-content: center; flex-wrap: wrap; }
.verdict { font-size: 1.05rem; padding: 0.25rem 0; text-align: center; }
.verdict b.mark { padding: 0.1rem 0.75rem; border-radius: 999px; color: #fff; background: #78716c; }
.verdict b.good { background: #15803d; }
.verdict b.fair { background: #b45309; }
.verdict b.poor { background: #b91c1c; }
.agreement { display: grid; grid-template-columns: minmax(5rem, max-content) 1fr max-content; gap: 0.4rem 0.75rem; }
.agreement { align-items: center; font-size: 0.9rem; padding: 0.25rem 0; }
.agreement .name { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; max-width: 11rem; }
.agreement .bar { height: 0.6rem; border-radius: 999px; background: var(--border-color-primary); overflow: hidden; }
.agreement .bar i { display: block; height: 100%; border-radius: 999px; background: #15803d; }
.agreement .odd.bar i { background: #b91c1c; }
.agreement .odd.said { color: #b91c1c; font-weight: 600; }
.dark .agreement .odd.said { color: #f87171; }
.small p { text-align: center; font-size: 0.875rem; color: var(--body-text-color-subdued); }
/* The examples as a row of pairs instead of a table with a line for each. */
#examples .table-wrap, #examples table { border: none; background: none; box-shadow: none; width: auto; padding: 0; }
#examples thead { display: none; }
#examples tbody { display: flex; flex-wrap: wrap; gap: 0.75rem; }
#examples tr { display: flex; gap: 0.25rem; padding: 0.35rem; border: none; border-radius: var(--radius-md); }
#examples tr { background: var(--block-background-fill); box-shadow: var(--block-shadow); }
#examples td { padding: 0; border: none; }
#start { align-items: center; }
#start #match { flex: 1 1 220px; }
#start #examples { flex: 0 1 auto; width: auto; min-width: 0; }
#photos .grid-container { grid-template-columns: repeat(auto-fill, minmax(105px, 1fr)); }
#cutouts .grid-container, #masks .grid-container { grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); }
#cutouts .grid-wrap, #masks .grid-wrap { max-height: 46rem; }
input[type=range]::-webkit-slider-thumb { border: 1px solid var(--neutral-400); }
input[type=range]::-moz-range-thumb { border: 1px solid var(--neutral-400); }
@media (max-width: 640px) {
  #header h1 { font-size: 1.6rem; }
  #header p { font-size: 1rem; }
  #examples tbody { flex-wrap: nowrap; gap: 0.4rem; }
  #segment { flex-basis: 100%; }
  #examples td .container { width: 2.8rem; height: 2.8rem; }
  #examples tr { padding: 0.25rem; }
  #cutouts .grid-container, #masks .grid-container { grid-template-columns: repeat(auto-fill, minmax(125px, 1fr)); }
}
footer .divider { display: none; }
"""


# ---------------------------------------------------------------------------------------------------------------------
# What the page works with
# ---------------------------------------------------------------------------------------------------------------------


class Stopped(MaCoSNetError):
    """A visitor pressed stop, or closed the page."""


class Matcher:
    """The one model of this process: loaded once, by whichever thread asks first, while the others wait for it."""

    def __init__(self, checkpoint: str = DEFAULT_CHECKPOINT) -> None:
        self.checkpoint = checkpoint
        self._lock = threading.Lock()
        self._loaded: dict[str, Any] = {}
        self._tidied = time.monotonic()

    def load(self) -> dict[str, Any]:
        """Returns the arguments `model` and `processor` of `match_pair`. Raises `CheckpointError`."""
        with self._lock:
            if not self._loaded:
                model, processor = load_model_and_processor(self.checkpoint)
                # The import belongs under the lock as well: two threads that import torch and transformers from
                # different ends at the same time can meet a module that is only half there.
                importlib.import_module("macosnet_hf.inference.files")
                self._loaded = {"model": model, "processor": processor}
            return self._loaded

    def pair(self, source: str, target: str, refine: str) -> Any:
        """A [`~macosnet_hf.inference.files.MatchedPair`]."""
        loaded = self.load()
        try:
            return inference_of_files().match_files(source, target, refine=refine, **loaded)
        finally:
            self._tidy_up()

    def collection(self, paths: list[str], refine: str, progress: Any) -> Any:
        """A [`~macosnet_hf.inference.files.SegmentedCollection`]."""
        loaded = self.load()
        names = [os.path.basename(path) for path in paths]
        try:
            return inference_of_files().segment_files(paths, names, refine=refine, progress=progress, **loaded)
        finally:
            self._tidy_up()

    def _tidy_up(self) -> None:
        """Gives back what lies free between the results that are kept; now and then, for it takes some milliseconds."""
        now = time.monotonic()
        if now - self._tidied > TIDY_SECONDS:
            self._tidied = now
            trim()


def inference_of_files() -> Any:
    """`inference.files`, imported when the first image comes: it needs torch, the page does not."""
    return importlib.import_module("macosnet_hf.inference.files")


def viewer() -> Any:
    """`macosnet_hf.demo.viewer`."""
    return importlib.import_module("macosnet_hf.demo.viewer")


class Desk:
    """Results by unguessable key, and the runs that can be stopped."""

    def __init__(self, matcher: Matcher) -> None:
        self.matcher = matcher
        self.pairs: KeptResults[Any] = KeptResults(KEPT_PAIRS, KEPT_PER_VISITOR, KEPT_SECONDS)
        self.collections: KeptResults[Any] = KeptResults(KEPT_COLLECTIONS, KEPT_PER_VISITOR, KEPT_SECONDS)
        self._running: dict[str, threading.Event] = {}
        self._examples: dict[str, Any] = {}
        self._lock = threading.Lock()

    def example_pair(self) -> Any:
        """The pair that a new visitor sees; matched once for all of them."""
        return self._example("pair", lambda: self.matcher.pair(*EXAMPLES[0], "grabcut"))

    def example_collection(self) -> Any:
        """The same of a collection."""
        return self._example("collection", lambda: self.matcher.collection(list(COLLECTION_EXAMPLE), "grabcut", None))

    def _example(self, kind: str, work: Callable[[], Any]) -> Any:
        with self._lock:
            if kind not in self._examples:
                self._examples[kind] = work()
            return self._examples[kind]

    @contextlib.contextmanager
    def stoppable(self, session: str | None, progress: Any) -> Iterator[Any]:
        """A progress function that raises `Stopped` once the session's run was stopped."""
        stop = threading.Event()
        if session:
            self._running[session] = stop

        def report(share: float, text: str) -> None:
            if stop.is_set():
                raise Stopped("Stopped.")
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
        """The page was closed: its run ends, its results go."""
        self.stop(request)
        if request.session_hash:
            self.pairs.forget(request.session_hash)
            self.collections.forget(request.session_hash)


@contextlib.contextmanager
def in_plain_words() -> Iterator[None]:
    """Whatever goes wrong inside becomes a message on the page; the server lives on, the log has the details."""
    try:
        yield
    except gr.Error:
        raise
    except MaCoSNetError as error:
        raise gr.Error(str(error), print_exception=False) from error
    except Exception as error:
        logger.exception("A request failed")
        raise gr.Error("Something went wrong on our side. Please try other photos.", print_exception=False) from error


def checked_pair(source: str | None, target: str | None) -> tuple[str, str]:
    if not source or not target:
        raise InputError("Choose two photos first.")
    return source, target


# ---------------------------------------------------------------------------------------------------------------------
# What it shows
# ---------------------------------------------------------------------------------------------------------------------


def for_display(image: Image.Image, side: int = DISPLAY_SIDE) -> Image.Image:
    """A copy of at most `side` pixels on its longer side."""
    copy = image.copy()
    copy.thumbnail((side, side), reducing_gap=2.0)
    return copy


def annotated(image: Image.Image, mask: np.ndarray) -> tuple[Image.Image, list[tuple[np.ndarray, str]]]:
    """The value of a `gr.AnnotatedImage`: the photo with its object tinted and outlined."""
    shown = for_display(image)
    grey = Image.fromarray(mask.astype(np.uint8) * 255).resize(shown.size, Image.Resampling.BILINEAR)
    inside = np.asarray(grey) >= 128
    return overlay_mask(shown, inside, alpha=0, fade=0.8, contour=False), [(viewer().tint(inside), "object")]


def verdict(work: Any) -> str:
    """One line: how far the result of a pair can be trusted, and how many matches there are."""
    count = len(work.result.matches)
    if work.same_image:
        return "This is the same photo twice, so every point should find itself."
    words = VERDICTS[work.result.quality]
    if work.result.quality == "poor":
        return words  # a number of matches would contradict it
    return f"{words} {count} matching {'point' if count == 1 else 'points'} on the object."


def as_mark(mark: str, kind: str, words: str) -> str:
    return f'<div class="verdict"><b class="mark {kind}">{html.escape(mark)}</b><span>{html.escape(words)}</span></div>'


def collection_verdict(work: Any) -> str:
    """One line: which photos do not belong."""
    odd = [work.copies[number].name for number in work.odd]
    rest = len(work.copies) - len(odd)
    if rest < 4 and not odd:
        return f"{rest} photos are too few to tell whether one does not belong; four will do."
    if not odd:
        return f"All {rest} photos seem to show the same kind of object."
    named = " and ".join(odd) if len(odd) < 3 else f"{', '.join(odd[:-1])} and {odd[-1]}"
    belong = "does not seem" if len(odd) == 1 else "do not seem"
    return f"{named} {belong} to belong; the other {rest} agree."


def agreement_table(work: Any) -> str:
    """HTML: a bar for each photo, the best first."""
    values = np.asarray(work.result.agreement, dtype=float)
    rows = []
    for number in np.argsort(-values, kind="stable").tolist():
        odd = "odd " if number in work.odd else ""
        share = 100 * min(max(values[number] / max(values.max(), 1e-6), 0.02), 1.0)
        rows.append(
            f'<span class="{odd}name" title="{html.escape(work.copies[number].name)}">'
            f"{html.escape(work.copies[number].name)}</span>"
            f'<span class="{odd}bar"><i style="width: {share:.0f}%"></i></span>'
            f'<span class="{odd}said">{"odd one out" if odd else f"{values[number]:.2f}"}</span>'
        )
    return f'<div class="agreement">{"".join(rows)}</div>'


# ---------------------------------------------------------------------------------------------------------------------
# Components
# ---------------------------------------------------------------------------------------------------------------------


def uploaded(component: Any, payload: Any) -> str:
    """The path of a file that was uploaded here.

    gradio looks only at files that are marked as such; a program may send the bare path of any file of the server.
    """
    folder, path = os.path.realpath(component.GRADIO_CACHE), os.path.realpath(payload.path or "")
    if os.path.commonpath([folder, path]) != folder or not os.path.isfile(path):
        raise gr.Error("Only uploaded files can be used.", print_exception=False)
    return path


def takes_files_as_they_are(kind: type[Any]) -> Any:
    """A kind of component that hands over uploaded files: `load_image` turns photos upright and says in plain
    words what is wrong with them; gradio's own reading would do neither, and would decode a bomb."""

    def one(self: Any, payload: Any) -> str | None:
        return uploaded(self, payload) if payload else None

    def several(self: Any, payload: Any) -> list[str]:
        return [uploaded(self, getattr(each, "image", each)) for each in payload.root] if payload else []

    # A class, because a session makes its components anew from theirs. Made by ABCMeta, because gradio's own metaclass
    # writes a file of type stubs beside every module that derives from a component.
    derived = {
        "preprocess": one if kind is gr.Image else several,
        "is_template": True,  # the page shows its base
        "__module__": kind.__module__,
    }
    return ABCMeta.__new__(type(kind), kind.__name__, (kind,), derived)


UploadedImage = takes_files_as_they_are(gr.Image)
UploadedGallery = takes_files_as_they_are(gr.Gallery)
UploadedFile = takes_files_as_they_are(gr.File)


def upload(name: str) -> Any:
    """A place for a photo of the visitor."""
    return UploadedImage(
        elem_id=name.lower(),
        label=name,
        sources=["upload", "clipboard", "webcam"],
        type="filepath",
        image_mode=None,
        webcam_options=WEBCAM,
        height=210,
        min_width=240,
    )


def picture(label: str, **options: Any) -> gr.Image:
    """A place for a result."""
    return gr.Image(
        label=label, type="pil", format="jpeg", interactive=False, buttons=["download", "fullscreen"], **options
    )


def refinement_choice() -> gr.Radio:
    return gr.Radio(REFINEMENTS, value="grabcut", label="Edges of the masks", min_width=240)


def into_cache(component: Any, paths: list[Path]) -> list[str]:
    """Copies files to where gradio serves and, later, deletes them. The copies can be fetched by who knows their names
    only, which hold a hash of the content."""
    return [component.move_resource_to_block_cache(str(path)) for path in paths]


def save_picture(img: Image.Image, cache_dir: str, name: str = "image", format: str = "webp") -> str:
    """In the place of gradio's `save_pil_to_cache`, which names an image after its content as well but writes it anew
    each time: whoever was fetching it for an equal request got a part of it, or nothing."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.{format}"
        path.write_bytes(processing_utils.encode_pil_to_bytes(img, format))
        return processing_utils.save_file_to_cache(path, cache_dir)  # whole, and only if it is not there


processing_utils.save_pil_to_cache = save_picture  # where all components look for it


def checked_upload(component: Any, paths: list[str]) -> list[str]:
    """Uploaded files that can be used, as files that a browser can show. A toast says what is wrong with the others."""
    usable = []
    for path in paths:
        try:
            with tempfile.TemporaryDirectory() as folder:
                shown = for_browser(path, Path(folder))
                usable.append(path if shown is None else into_cache(component, [shown])[0])
        except MaCoSNetError as error:
            gr.Warning(html.escape(str(error), quote=False))
    return usable


# ---------------------------------------------------------------------------------------------------------------------
# Tab "Pair"
# ---------------------------------------------------------------------------------------------------------------------


def pair_tab(desk: Desk, demo: gr.Blocks) -> None:
    """Two photos: matches, points, masks, warp, files."""

    def shown(work: Any, threshold: float, count: int, request: gr.Request) -> tuple[Any, ...]:
        """Everything that the page shows of a pair."""
        key = desk.pairs.keep(work, request.session_hash)
        result = work.result
        names = tuple(copy.name for copy in work.copies)
        return (
            key,
            as_mark(result.quality, result.quality, verdict(work)),
            gr.HTML(
                value=viewer().viewer_lines(result, threshold, count),
                photos=viewer().viewer_images(key, (result.source, result.target), names),
            ),
            annotated(result.source, result.source_mask),
            annotated(result.target, result.target_mask),
            (for_display(result.target), viewer().source_on_target(result, DISPLAY_SIDE)),
            None,
            gr.Column(visible=True),
        )

    def run(
        source_path: str | None,
        target_path: str | None,
        threshold: float,
        count: int,
        refine: str,
        request: gr.Request,
    ) -> tuple[Any, ...]:
        with in_plain_words():
            return shown(desk.matcher.pair(*checked_pair(source_path, target_path), refine), threshold, count, request)

    def show_example(threshold: float, count: int, request: gr.Request) -> tuple[Any, ...]:
        with in_plain_words():
            return (*EXAMPLES[0], *shown(desk.example_pair(), threshold, count, request))

    def redraw(key: str | None, threshold: float, count: int) -> str:
        with in_plain_words():
            return viewer().viewer_lines(desk.pairs.get(key).result, threshold, count)

    def refine_again(
        key: str | None, threshold: float, count: int, refine: str, request: gr.Request
    ) -> tuple[Any, ...]:
        with in_plain_words():
            return shown(desk.pairs.get(key).refined(refine), threshold, count, request)

    def write_files(key: str | None, threshold: float) -> list[str]:
        with in_plain_words(), tempfile.TemporaryDirectory() as folder:
            model = checkpoint_name(desk.matcher.checkpoint)
            write_pair(desk.pairs.get(key), Path(folder), threshold, model=model, flow=True)
            return into_cache(files, [Path(folder) / name for name in pair_file_names(flow=True)])

    def viewer_transfer(question: Any) -> dict[str, Any]:
        """Where one point of the small copies lies in the other photo."""
        try:
            side = int(question["side"])
            result = desk.pairs.get(question["id"]).result
            direction = ("source_to_target", "target_to_source")[side]
            point = [[float(value) for value in question["point"]]]
            return {"point": [round(float(value), 1) for value in result.transfer(point, direction)[0]]}
        except MaCoSNetError as error:
            return {"error": str(error)}
        except (KeyError, IndexError, TypeError, ValueError):
            return {"error": "This is not a point of a photo."}

    def viewer_grid(question: Any) -> dict[str, Any]:
        """A grid of points over the object of the source, and where they lie in the target."""
        try:
            return viewer().grid_document(desk.pairs.get(question["id"]).result)
        except MaCoSNetError as error:
            return {"error": str(error)}
        except (KeyError, TypeError):
            return {"error": "This is not a result of this page."}

    def check(path: str | None) -> Any:
        usable = checked_upload(source, [path] if path else [])
        return gr.skip() if usable == [path] else next(iter(usable), None)

    key = gr.State()
    with gr.Row(equal_height=True):
        source, target = upload("Source"), upload("Target")
    with gr.Row(elem_id="start"):
        button = gr.Button("Match", variant="primary", size="lg", elem_id="match", min_width=220)
        examples = gr.Dataset(
            elem_id="examples",
            label="Or try one of these",
            components=[source, target],
            samples=[list(pair) for pair in EXAMPLES],
            show_label=False,
        )
    line = gr.HTML(elem_id="verdict")
    with gr.Column(visible=False, elem_id="pair-results") as results:
        drawing = gr.HTML(
            elem_id="viewer",
            html_template=TEMPLATE,
            js_on_load=SCRIPT,
            apply_default_css=False,
            server_functions=[viewer_transfer, viewer_grid],
            photos="",
        )
        with gr.Row():
            threshold = gr.Slider(
                0, 1, 0.0, step=0.01, label="Confidence, at least", elem_id="threshold", min_width=240
            )
            count = gr.Slider(5, 200, 40, step=5, label="Lines, at most", elem_id="count", min_width=240)
            refine = refinement_choice()
        with gr.Row(equal_height=True):
            masks = [
                gr.AnnotatedImage(
                    label=f"{name}: the object",
                    elem_id=f"{name.lower()}-object",
                    format="jpeg",
                    color_map={"object": "#ff9d00"},
                    show_legend=False,
                    height=320,
                    min_width=260,
                )
                for name in ("Source", "Target")
            ]
            warped = gr.ImageSlider(
                label="Target | source warped onto it",
                elem_id="warped",
                type="pil",
                format="jpeg",
                interactive=False,
                buttons=["fullscreen"],
                height=320,
                max_height=320,
                min_width=260,
            )
        gr.Markdown(
            "**Take it with you:** matches as JSON and CSV, the dense flow as npz, masks and cutouts as PNG in the "
            "photos' own sizes."
        )
        make_files = gr.Button("Make the files", elem_id="make-files")
        files = gr.Files(label="Files", interactive=False, visible=False, elem_id="files")

    shows = [key, line, drawing, *masks, warped, files, results]
    options = [threshold, count]
    private = {"api_visibility": "private"}
    demo.load(show_example, options, [source, target, *shows], show_progress_on=line, **private)
    for place in (source, target):
        place.upload(check, place, place, show_progress="hidden", concurrency_limit=None, **private)
    matching = {
        "fn": run,
        "inputs": [source, target, *options, refine],
        "outputs": shows,
        "concurrency_id": "pair",
        "concurrency_limit": 2,
        "show_progress_on": line,
        **private,
    }
    runs = [
        button.click(**matching),
        # Not gr.Examples: it replaces the uploads by ones that read the photos in gradio's own way.
        examples.click(
            lambda pair: pair, examples, [source, target], queue=False, show_progress="hidden", **private
        ).then(**matching),
    ]
    for done in runs:
        # An old result does not belong to photos that could not be matched.
        done.failure(lambda: (None, "", gr.Column(visible=False)), outputs=[key, line, results], queue=False, **private)
    # One listener for both, so that answers cannot overtake each other.
    gr.on(
        [slider.input for slider in options],
        redraw,
        [key, *options],
        drawing,
        trigger_mode="always_last",
        show_progress="hidden",
        concurrency_limit=None,
        **private,
    )
    refine.input(
        refine_again,
        [key, *options, refine],
        shows,
        concurrency_id="pair",
        concurrency_limit=2,
        show_progress_on=line,
        **private,
    )
    make_files.click(
        write_files, [key, threshold], files, concurrency_limit=2, show_progress_on=make_files, **private
    ).success(lambda: gr.Files(visible=True), outputs=files, queue=False, **private)


# ---------------------------------------------------------------------------------------------------------------------
# Tab "Collection"
# ---------------------------------------------------------------------------------------------------------------------


def collection_tab(desk: Desk, tab: gr.Tab) -> None:
    """Two to thirty photos: cutouts, contact sheet, average, who agrees, zip."""

    def shown(work: Any, request: gr.Request) -> tuple[Any, ...]:
        """Everything that the page shows of a collection."""
        captions = [f"odd: {copy.name}" if number in work.odd else copy.name for number, copy in enumerate(work.copies)]
        cut = [cutout(copy.image, mask) for copy, mask in zip(work.copies, work.masks, strict=True)]
        black_and_white = [Image.fromarray(mask.astype(np.uint8) * 255) for mask in work.masks]
        return (
            desk.collections.keep(work, request.session_hash),
            as_mark(
                "odd one out" if work.odd else "all agree", "fair" if work.odd else "good", collection_verdict(work)
            ),
            list(zip(cut, captions, strict=True)),
            list(zip(black_and_white, captions, strict=True)),
            work.sheet(),
            work.average,
            agreement_table(work),
            None,
            gr.Column(visible=True),
        )

    def run(paths: list[str], refine: str, request: gr.Request, progress: Any = PROGRESS) -> tuple[Any, ...]:
        with in_plain_words(), desk.stoppable(request.session_hash, progress) as report:
            return shown(desk.matcher.collection(paths, refine, report), request)

    def show_example(paths: list[str], request: gr.Request) -> tuple[Any, ...]:
        """What a visitor sees who comes to this tab with nothing."""
        if paths:
            return tuple(gr.skip() for _ in range(10))
        with in_plain_words():
            return (list(COLLECTION_EXAMPLE), *shown(desk.example_collection(), request))

    def check(paths: list[str]) -> Any:
        usable = checked_upload(photographs, paths)
        return gr.skip() if usable == paths else usable

    def write_zip(key: str | None, request: gr.Request, progress: Any = PROGRESS) -> str:
        with (
            in_plain_words(),
            tempfile.TemporaryDirectory() as folder,
            desk.stoppable(request.session_hash, progress) as report,
        ):
            model = checkpoint_name(desk.matcher.checkpoint)
            write_collection(desk.collections.get(key), Path(folder), model=model, progress=report)
            return into_cache(archive, [zip_folder(Path(folder), COLLECTION_ARCHIVE, remove=True)])[0]

    key = gr.State()
    gr.Markdown(
        "**Two to thirty photos of the same kind of object.** Out come the object of each, their average, and the "
        "one that does not belong."
    )
    photographs = UploadedGallery(
        label="Photographs",
        show_label=False,
        elem_id="photographs",
        type="filepath",
        file_types=["image"],
        height=250,
        object_fit="cover",
        interactive=True,
    )
    with gr.Row():
        button = gr.Button("Find what they have in common", variant="primary", size="lg", elem_id="segment", scale=3)
        stop = gr.Button("Stop", size="lg", elem_id="stop", min_width=100)
        example = gr.Button("Example", size="lg", elem_id="collection-example", min_width=140)
    refine = refinement_choice()
    line = gr.HTML(elem_id="collection-verdict")
    with gr.Column(visible=False, elem_id="collection-results") as results:
        with gr.Row():
            with gr.Column(scale=3, min_width=300), gr.Tabs():
                gallery = {"show_label": False, "object_fit": "contain", "interactive": False}
                with gr.Tab("Cut-outs"):
                    cutouts = gr.Gallery(label="Cut-outs", format="png", elem_id="cutouts", **gallery)
                with gr.Tab("Masks"):
                    masks = gr.Gallery(label="Masks", format="png", elem_id="masks", **gallery)
                with gr.Tab("Contact sheet"):
                    sheet = picture("Contact sheet", show_label=False, elem_id="sheet")
            with gr.Column(scale=2, min_width=280):
                average = picture("The average of those that agree", elem_id="average", height=320)
                gr.Markdown("**How far each agrees with the others**")
                agreement = gr.HTML(elem_id="agreement")
        gr.Markdown("**Take it with you:** masks and cutouts in original size, contact sheet, average and summary.")
        make_zip = gr.Button("Make the zip", elem_id="make-zip")
        archive = gr.File(label="Zip", interactive=False, visible=False, elem_id="zip")

    private = {"api_visibility": "private"}
    segmenting = {
        "fn": run,
        "inputs": [photographs, refine],
        "outputs": [key, line, cutouts, masks, sheet, average, agreement, archive, results],
        "concurrency_id": "collection",
        "concurrency_limit": 1,
        "show_progress_on": line,
        **private,
    }
    photographs.upload(check, photographs, photographs, show_progress="hidden", concurrency_limit=None, **private)
    tab.select(
        show_example,
        photographs,
        [photographs, *segmenting["outputs"]],
        concurrency_limit=2,
        show_progress_on=line,
        **private,
    )
    runs = [
        button.click(**segmenting),
        example.click(
            lambda: list(COLLECTION_EXAMPLE), outputs=photographs, queue=False, show_progress="hidden", **private
        ).then(**segmenting),
    ]
    for done in runs:
        done.failure(lambda: (None, "", gr.Column(visible=False)), outputs=[key, line, results], queue=False, **private)
    zipping = make_zip.click(write_zip, key, archive, concurrency_limit=1, show_progress_on=make_zip, **private)
    zipping.success(lambda: gr.File(visible=True), outputs=archive, queue=False, **private)
    stop.click(desk.stop, queue=False, show_progress="hidden", cancels=[*runs, zipping], **private)


# ---------------------------------------------------------------------------------------------------------------------
# API
# ---------------------------------------------------------------------------------------------------------------------


def public_api(desk: Desk) -> None:
    """The end points for `gradio_client`; the page itself uses private ones."""

    def match(
        source: str | None, target: str | None, threshold: float, refine: str, request: gr.Request
    ) -> tuple[dict[str, Any], Image.Image, str, str, Image.Image]:
        """Matches two photos of the same kind of object and cuts the object out of both.

        Takes two image files, the smallest score of a match (0 to 1) and how masks get their edges ("grabcut", "otsu"
        or "none"). Returns a report (key `result` names the result in `/transfer_points` for half an hour; matches with
        points (x, y) in pixels of the originals; quality "good", "fair" or "poor", also in words), a drawing of the
        matches, the masks of source and target as PNG in original size, and the source warped onto the target (at most
        960 pixels).
        """
        with in_plain_words(), tempfile.TemporaryDirectory() as folder:
            work = desk.matcher.pair(*checked_pair(source, target), refine)
            paths = []
            for view, role in enumerate(VIEWS):
                paths.append(Path(folder) / f"{role}_mask.png")
                save_mask(work.original_mask(view), paths[-1])
            report = {
                "result": desk.pairs.keep(work, request.session_hash),
                "words": verdict(work),
                **pair_document(work, threshold, model=checkpoint_name(desk.matcher.checkpoint)),
            }
            return (report, work.result.draw_matches(), *into_cache(drawing, paths), work.result.warped_source())

    def transfer_points(result: str, points: list[list[float]], direction: str) -> list[list[float]]:
        """Where points of one photo lie in the other.

        Takes the key `result` of a report of `/match`, a list of points [x, y] in pixels of the original photo
        that they are on, and the direction ("source_to_target" or "target_to_source"). Returns the points in pixels
        of the other photo; one may lie outside of it. The network does not run again.
        """
        with in_plain_words():
            if not isinstance(points, list) or len(points) > MAX_POINTS:
                raise InputError(f"Points are a list of at most {MAX_POINTS} pairs of numbers [x, y].")
            return desk.pairs.get(result).transfer(points, direction).round(2).tolist()

    def segment_collection(
        photographs: list[str] | None, refine: str, request: gr.Request
    ) -> tuple[dict[str, Any], Image.Image, Image.Image, str]:
        """Cuts out what 2 to 30 photos have in common.

        Takes image files and how masks get their edges ("grabcut", "otsu" or "none"). Returns a report (for each
        photo its agreement with the others, whether it belongs, its partners; the odd ones out), a contact sheet,
        the average of those that agree, and a zip with masks and cutouts as PNG in original size.
        """
        with (
            in_plain_words(),
            tempfile.TemporaryDirectory() as folder,
            desk.stoppable(request.session_hash, lambda share, desc: None) as report,
        ):
            work = desk.matcher.collection(photographs or [], refine, report)
            model = checkpoint_name(desk.matcher.checkpoint)
            document = write_collection(work, Path(folder), model=model, progress=report)
            path = zip_folder(Path(folder), COLLECTION_ARCHIVE, remove=True)
            return (document, work.sheet(), work.average, into_cache(archive, [path])[0])

    choices = [value for _, value in REFINEMENTS]
    with gr.Row(visible=False):
        source, target = (UploadedImage(label=name, type="filepath") for name in ("source", "target"))
        threshold = gr.Slider(0, 1, 0.0, label="threshold")
        refine = gr.Radio(choices, value="grabcut", label="refine")
        report = gr.JSON(label="report")
        drawing = gr.Image(label="matches", type="pil", format="jpeg")
        masks = [gr.Image(label=f"{name} mask", type="filepath") for name in ("source", "target")]
        warped = gr.Image(label="source warped onto the target", type="pil", format="jpeg")
        gr.Button().click(
            match,
            [source, target, threshold, refine],
            [report, drawing, *masks, warped],
            api_name="match",
            concurrency_id="pair",
            concurrency_limit=2,
        )
        result = gr.Textbox(label="result")
        points = gr.JSON(label="points")
        direction = gr.Radio(["source_to_target", "target_to_source"], value="source_to_target", label="direction")
        moved = gr.JSON(label="points of the other photo")
        gr.Button().click(
            transfer_points, [result, points, direction], moved, api_name="transfer_points", concurrency_limit=4
        )
        photographs = UploadedFile(label="photographs", type="filepath", file_count="multiple")
        average = gr.Image(label="average", type="pil", format="jpeg")
        sheet = gr.Image(label="contact sheet", type="pil", format="jpeg")
        archive = gr.File(label="zip")
        gr.Button().click(
            segment_collection,
            [photographs, refine],
            [report, sheet, average, archive],
            api_name="segment_collection",
            concurrency_id="collection",
            concurrency_limit=1,
        )


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------


def model_card() -> str:
    """The text of the model card, without its front matter."""
    text = (Path(__file__).resolve().parent / "model_card.md").read_text(encoding="utf-8")
    return text.split("\n---\n", 1)[-1].strip()


def about_tab(matcher: Matcher) -> None:
    embedded = matcher.checkpoint == DEFAULT_CHECKPOINT
    gr.Markdown(
        "One network finds which place of one photo corresponds to which place of another, and which pixels "
        "belong to the object that both show. It was trained without a single keypoint and without a single mask.\n\n"
        f"**Limits.** {LIMITS}\n\n"
        f"**Paper.** Chen, Lin, Yang and Huang, [Show, Match and Segment]({PAPER}).\n\n"
        f"**Model.** {'The checkpoint that comes with the project.' if embedded else f'`{matcher.checkpoint}`'}\n\n"
        "**From a program.** `/match`, `/transfer_points` and `/segment_collection`: see *Use via API* at the bottom."
    )
    with gr.Accordion("Model card of the embedded checkpoint", open=False):
        gr.Markdown(model_card())


def build_demo(matcher: Matcher | None = None) -> gr.Blocks:
    """The page. Without a `matcher`, one with the embedded checkpoint is made, which loads at the first request."""
    matcher = matcher or Matcher()
    desk = Desk(matcher)
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(FILE_SECONDS, FILE_SECONDS)) as demo:
        gr.HTML(f"<h1>{TITLE}</h1><p>{SUMMARY}</p>", elem_id="header")
        with gr.Tabs():
            with gr.Tab("Pair", id="pair"):
                pair_tab(desk, demo)
            with gr.Tab("Collection", id="collection") as tab:
                collection_tab(desk, tab)
            with gr.Tab("About", id="about"):
                about_tab(matcher)
        gr.Markdown(
            f"{LIMITS} [Paper]({PAPER}); the model card is under *About*.", elem_classes="small", elem_id="limits"
        )
        public_api(desk)
        demo.unload(desk.leave)
    return demo.queue(max_size=MAX_WAITING)


def serve(demo: gr.Blocks, host: str = "127.0.0.1", port: int | None = None) -> str:
    """Starts the page in the background and returns its address. Raises `OSError` if the port is taken."""
    _, address, _ = demo.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        share=False,
        ssr_mode=False,
        max_file_size=MAX_FILE_MEGABYTES * gr.FileSize.MB,
        state_session_capacity=KEPT_SESSIONS,
        theme=THEME,
        css=CSS + STYLE,
        js=PASTE,
        footer_links=["api"],
        allowed_paths=[str(EXAMPLES_FOLDER), CAT],
        quiet=True,
    )
    return address


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=SUMMARY)
    parser.add_argument("--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), help="address")
    parser.add_argument("--port", type=int, default=int(os.environ.get("GRADIO_SERVER_PORT", "7860")), help="port")
    parser.add_argument(
        "--model",
        default=os.environ.get("MACOSNET_MODEL") or DEFAULT_CHECKPOINT,
        help="folder or Hub id of a checkpoint (default: the variable MACOSNET_MODEL, else the embedded one)",
    )
    options = parser.parse_args(arguments)

    give_memory_back()
    matcher = Matcher(options.model)
    demo = build_demo(matcher)
    try:
        address = serve(demo, options.host, options.port)
    except OSError:
        print(f"error: cannot listen on {options.host}:{options.port}; choose another --port.", file=sys.stderr)
        return 2
    print(f"Open {address} in a browser. Stop with Ctrl+C.", flush=True)
    try:
        matcher.load()  # while the person looks at the page, so that the first match does not wait for it
        demo.block_thread()
    except MaCoSNetError as error:
        demo.close(verbose=False)
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # gradio handles it while blocking; this is Ctrl+C while the model loads
        demo.close(verbose=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
