"""Places for photos and results, the options of their events, and the checks of what is uploaded."""

from __future__ import annotations

import functools
import html
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from ..errors import InputError, MaCoSNetError
from .reading import PhotoReader
from .texts import EDGES, MODELS, REFINEMENTS, marked, without_detail
from .viewer import asset

PRIVATE: dict[str, Any] = {"api_visibility": "private"}  # programs have the endpoints of api.py
QUIET = {"show_progress": "hidden", "concurrency_limit": None, **PRIVATE}
INSTANT = {"show_progress": "hidden", "queue": False, **PRIVATE}
PROGRESS = gr.Progress()  # what gradio looks for among the defaults of a function

# The camera at the back of a phone, and not mirrored: a mirrored partner is not recognised.
_WEBCAM = gr.WebcamOptions(mirror=False, constraints={"video": {"facingMode": {"ideal": "environment"}}})
OF_FILES = (gr.Image, gr.Gallery, gr.File)


def on_uploads(
    fn: Callable[..., Any], inputs: Sequence[gr.components.Component], *, or_nothing: bool = False
) -> dict[str, Any]:
    """Options `fn`, `inputs` and `preprocess` of an event: uploads among its inputs reach `fn` as checked paths.

    Uploads are taken as the page sends them, since gradio's own reading does not turn a photo upright, has no words for
    a damaged one and decodes a bomb. The other inputs are read as always. With `or_nothing` nothing is done and
    nothing said where an upload is missing.
    """

    @functools.wraps(fn)
    def reading(*values: Any) -> Any:
        read = [
            uploaded(value, component.GRADIO_CACHE) if isinstance(component, OF_FILES) else component.preprocess(value)
            for component, value in zip(inputs, values[: len(inputs)], strict=True)
        ]
        given = [value for value, component in zip(read, inputs, strict=True) if isinstance(component, OF_FILES)]
        if or_nothing and not all(given):
            return gr.skip()
        return fn(*read, *values[len(inputs) :])  # behind the inputs: the request, the progress

    return {"fn": reading, "inputs": list(inputs), "preprocess": False}


def uploaded(value: Any, folder: str) -> Any:
    """The path of an uploaded file, a list of paths for several files, `None` for none.

    Args:
        value: what a page or a program sends: a file `{"path": ...}`, a gallery's item `{"image": file}`, or a list.
        folder: of all uploads.

    Raises:
        gr.Error: for any other file. gradio looks only at files that are marked as such; a program may send the bare
            path of any file of the server.
    """
    if isinstance(value, list):
        return [uploaded(each, folder) for each in value]
    if value is None:
        return None
    folder, path = os.path.realpath(folder), os.path.realpath(value.get("image", value).get("path") or "")
    if os.path.commonpath([folder, path]) != folder or not os.path.isfile(path):
        raise gr.Error("Only uploaded files can be used.", print_exception=False)
    return path


def in_cache(place: gr.Image | gr.Gallery, path: str) -> str:
    """The path of a file of the server where gradio serves it from: what its page says that it shows."""
    return os.path.realpath(place.move_resource_to_block_cache(path) or path)


def checked_pair(source: str | None, target: str | None) -> tuple[str, str]:
    """Both paths. Raises `InputError` unless there are two."""
    if not source or not target:
        raise InputError("Choose two photos first.")
    return source, target


def image_upload(name: str, label: str) -> gr.Image:
    """A place for a photo of the visitor, as high as a photo of the stage."""
    return gr.Image(
        elem_id=name,
        label=label,
        sources=["upload", "clipboard", "webcam"],
        type="filepath",
        webcam_options=_WEBCAM,
        height="var(--place)",
        min_width=240,
    )


def check_on_upload(place: gr.Image | gr.Gallery, reader: PhotoReader, lead: str = "") -> None:
    """Replaces an uploaded file that browsers do not show; takes one that cannot be used away, and a toast says why.

    Args:
        place: of the upload.
        reader: which decodes all of it, as a run would.
        lead: of what the toast says.
    """

    def shown(path: str) -> str | None:
        try:
            with tempfile.TemporaryDirectory() as folder:
                copy = reader.for_browser(path, folder)
                return path if copy is None else place.move_resource_to_block_cache(copy)
        except MaCoSNetError as error:
            gr.Warning(html.escape(lead + without_detail(str(error)), quote=False))
            return None

    def check(uploads: str | list[str] | None) -> Any:
        if isinstance(uploads, list):
            found: Any = [path for path in map(shown, uploads) if path]
        else:
            found = shown(uploads) if uploads else None
        return gr.skip() if found == uploads else found

    place.upload(**on_uploads(check, [place]), outputs=place, **QUIET)


def no_result(words: str = "") -> tuple[Any, ...]:
    """The values of key, verdict and column of results while there is no result; the words say what to do."""
    return None, marked("new photos", "new", words) if words else "", gr.Column(visible=False)


def run_on(event: Callable[..., Any], blank: list[Any], words: str = "", **run: Any) -> Any:
    """Runs at an event, such as the click of a button. The old result goes first, and if the run fails.

    Args:
        blank: key, verdict and column of results.
        words: what to do after a run that failed.
        run: of the event that runs.
    """
    done = event(no_result, outputs=blank, **INSTANT).then(**run)
    done.failure(functools.partial(no_result, words), outputs=blank, **INSTANT)
    return done


def download(name: str) -> gr.Button:
    """A button that makes a file; see [`download_of`]."""
    return gr.Button("Download", elem_id=f"{name}-download")


def download_place() -> gr.DownloadButton:
    """A hidden place for a file, which must not be in a column that is shown later: that shows all that is in it."""
    return gr.DownloadButton(visible="hidden")


def download_of(event: Any, file: gr.DownloadButton) -> None:
    """Gives the visitor the file that an event has put into its place, if it has."""
    event.success(None, file, None, js=asset("download.js"), **PRIVATE)


def code() -> gr.Code:
    """A folded place for the Python code that makes what is shown."""
    with gr.Accordion("Copy as Python", open=False, elem_classes="as-python"):
        return gr.Code(language="python", show_label=False, interactive=False, show_line_numbers=False, wrap_lines=True)


def result_image(label: str, **options: Any) -> gr.Image:
    """A place for a result."""
    return gr.Image(
        label=label, alt_text=label, interactive=False, **{"buttons": ["download", "fullscreen"], **options}
    )


def model_choice(names: Sequence[str], **options: Any) -> gr.Radio:
    """The choice of the model, the first of these names at the start; hidden where there is one only."""
    words = {"label": "Model", "info": MODELS if {"lite", "base"} <= set(names) else None}
    return gr.Radio(list(names), **{**words, **options}, value=names[0], visible=len(names) > 1, min_width=240)


def refinement_choice(**options: Any) -> gr.Radio:
    """The choice of how masks get their edges, in words for visitors unless `choices` and `label` are given."""
    words = {"choices": REFINEMENTS, "label": "Edges", "info": EDGES}
    return gr.Radio(**{**words, **options}, value=REFINEMENTS[0][1], min_width=240)
