"""The images of a collection, in any of which a visitor clicks a point to see it in all; `assets/points.js` draws."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import gradio as gr
import numpy as np

from .result_store import ResultStore
from .viewer import answer, asset, data_address, reduced

if TYPE_CHECKING:
    from ..inference.files import SegmentedCollection

_SIDE = 320  # pixels of the longer side of an image


def collection_points(collections: ResultStore[Any]) -> gr.HTML:
    """The component. Its value are the images of [`points_document`]."""

    def collection_transfer(question: Any) -> dict[str, Any]:
        """Where a point of one working copy lies in all: `{"points": [[x, y], null where it does not]}`."""

        def moved(collection: SegmentedCollection) -> dict[str, Any]:
            places = collection.transfer(question["point"], question["image"])
            return {"points": [place.round(1).tolist() if np.isfinite(place).all() else None for place in places]}

        return answer(collections, question, moved)

    return gr.HTML(
        elem_id="points",
        html_template=asset("points.html"),
        js_on_load=asset("points.js"),
        apply_default_css=False,
        server_functions=[collection_transfer],
    )


def points_document(key: str, collection: SegmentedCollection) -> str:
    """The images as JSON with data addresses, so that nobody can fetch them from the server."""
    images = [
        {
            "src": data_address(reduced(copy.image, _SIDE)),
            "w": copy.image.width,
            "h": copy.image.height,
            "name": copy.name,
            "odd": number in collection.odd,
        }
        for number, copy in enumerate(collection.copies)
    ]
    return json.dumps({"id": key, "images": images})
