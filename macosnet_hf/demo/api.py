"""The public endpoints, for `gradio_client` and other programs; the page itself uses private ones."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ..inference import DIRECTIONS, VIEWS
from ..inference.result_files import pair_document
from ..io.package import checkpoint_name
from . import limits
from .components import checked_pair, on_uploads, refinement_choice
from .downloads import cached_images, collection_archive, pair_masks, sheet_and_average
from .hinting import POINTS, HintPoint, hints_of_points
from .sessions import Sessions
from .texts import REFINEMENTS, errors_for_visitors, pair_verdict


def public_api(sessions: Sessions) -> None:
    """Adds `/match`, `/transfer_points` and `/segment_collection`, with components that the page does not show."""
    with gr.Row(visible=False):
        _match_endpoint(sessions)
        _transfer_points_endpoint(sessions)
        _segment_collection_endpoint(sessions)


def _refine() -> gr.Radio:
    return refinement_choice(choices=[value for _, value in REFINEMENTS], label="refine")


def _hints() -> gr.JSON:
    return gr.JSON([], label="hints", elem_id=POINTS)


def _match_endpoint(sessions: Sessions) -> None:
    drawing = gr.Image(label="matches")

    def match(
        source: str | None,
        target: str | None,
        threshold: float,
        refine: str,
        hints: list[HintPoint],
        request: gr.Request,
    ) -> tuple[Any, ...]:
        """Matches two photos of the same kind of object and cuts the object out of both.

        Takes two image files, the smallest score of a match (0 to 1), how masks get their edges ("grabcut", "otsu"
        or "none"), and points that say which object is meant: a list of [image, x, y, belongs], image 0 for the source
        and 1 for the target, (x, y) in pixels of the upright original, belongs true or false. Returns
        a report (key `result` names the result in `/transfer_points` for half an hour; matches with points (x, y) in
        pixels of the originals; quality "good", "fair" or "poor", agreement, the number in [0, 1] behind it, and the
        reason), a drawing of the matches, the masks of source and target as PNG in original size, and the source warped
        onto the target (at most 960 pixels).
        """
        with errors_for_visitors():
            found = hints_of_points(sessions.matcher, hints, len(VIEWS))
            named = {VIEWS[number]: hint for number, hint in found.items()}
            pair = sessions.matcher.pair(*checked_pair(source, target), refine, hints=named)
            masks = pair_masks(drawing, pair)
            matches, warped = cached_images(drawing, [pair.result.draw_matches(), pair.result.warped_source()])
            document = pair_document(pair, threshold, model=checkpoint_name(pair.checkpoint))
            key = sessions.pairs.add(pair, request.session_hash)
            return {"result": key, "words": pair_verdict(pair), **document}, matches, *masks, warped

    photos = [gr.Image(label=label, type="filepath") for label in ("source", "target")]
    inputs = [*photos, gr.Slider(0, 1, 0.0, label="threshold"), _refine(), _hints()]
    images = [gr.Image(label=label) for label in ("source mask", "target mask", "source warped onto the target")]
    outputs = [gr.JSON(label="report"), drawing, *images]
    gr.Button().click(
        **on_uploads(match, inputs),
        outputs=outputs,
        api_name="match",
        concurrency_id="pair",
        concurrency_limit=limits.STARTED["pair"],
    )


def _transfer_points_endpoint(sessions: Sessions) -> None:
    def transfer_points(result: str, points: list[list[float]], direction: str) -> list[list[float]]:
        """Where points of one photo lie in the other.

        Takes the key `result` of a report of `/match`, a list of points [x, y] in pixels of the original photo
        that they are on, and the direction ("source_to_target" or "target_to_source"). Returns the points in pixels
        of the other photo; one may lie outside of it. The network does not run again.
        """
        with errors_for_visitors():
            return sessions.pairs.get(result).transfer(points, direction).round(2).tolist()

    direction = gr.Radio(DIRECTIONS, value=DIRECTIONS[0], label="direction")
    inputs = [gr.Textbox(label="result"), gr.JSON(label="points"), direction]
    moved = gr.JSON(label="points of the other photo")
    gr.Button().click(transfer_points, inputs, moved, api_name="transfer_points", concurrency_limit=4)


def _segment_collection_endpoint(sessions: Sessions) -> None:
    sheet = gr.Image(label="contact sheet")

    def segment_collection(
        photographs: list[str] | None, refine: str, hints: list[HintPoint], request: gr.Request
    ) -> tuple[Any, ...]:
        """Cuts out what 2 to 30 photos have in common.

        Takes image files, how masks get their edges ("grabcut", "otsu" or "none"), and points that say which object is
        meant: a list of [image, x, y, belongs], the image by its number from 0, (x, y) in pixels of the upright
        original, belongs true or false; the masks of all photos follow. Returns a report (for each
        photo its agreement with the others, whether it belongs, its partners; the odd ones out), a contact sheet,
        the average of those that agree, and a zip with masks and cutouts as PNG in original size.
        """
        with errors_for_visitors(), sessions.run(request) as progress:
            photos = photographs or []
            found = hints_of_points(sessions.matcher, hints, len(photos))
            collection = sessions.matcher.collection(photos, refine, progress, hints=found)
            archive, document = collection_archive(sheet, collection, progress)
            return document, *sheet_and_average(sheet, collection), archive

    inputs = [gr.File(label="photographs", type="filepath", file_count="multiple"), _refine(), _hints()]
    outputs = [gr.JSON(label="report"), sheet, gr.Image(label="average"), gr.File(label="zip")]
    gr.Button().click(
        **on_uploads(segment_collection, inputs),
        outputs=outputs,
        api_name="segment_collection",
        concurrency_id="collection",
        concurrency_limit=limits.STARTED["collection"],
    )
