"""The photos of a result of a collection: a click on one shows a point in all, or says which object is meant in all.

`assets/photos.js` draws both, with `assets/points.js` and `assets/masks.js`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import gradio as gr
import numpy as np
from PIL import Image

from ..drawing import overlay_mask
from . import limits
from .hinting import marks
from .result_store import ResultStore
from .viewer import answer, asset, data_address, reduced

if TYPE_CHECKING:
    from ..inference.files import SegmentedCollection

_SIDE = 400  # pixels of the longer side of an image


def collection_points(collections: ResultStore[Any]) -> gr.HTML:
    """The component for points. Its value are the images of [`points_document`]."""

    def collection_transfer(question: Any) -> dict[str, Any]:
        """Where a point of one working copy lies in all: `{"points": [[x, y], null where it does not]}`."""

        def moved(collection: SegmentedCollection) -> dict[str, Any]:
            places = collection.transfer(question["point"], question["image"])
            return {"points": [place.round(1).tolist() if np.isfinite(place).all() else None for place in places]}

        return answer(collections, question, moved)

    return _photos("points", server_functions=[collection_transfer])


def collection_masks() -> gr.HTML:
    """The component for masks and marks, of which each is an event. Its value are the images of [`masks_document`]."""
    return _photos("masks")


def _photos(name: str, **options: Any) -> gr.HTML:
    return gr.HTML(
        elem_id=name,
        elem_classes="photos",
        html_template=asset(f"{name}.html"),
        js_on_load=asset("photos.js") + asset(f"{name}.js"),
        apply_default_css=False,
        **options,
    )


def points_document(key: str, collection: SegmentedCollection) -> str:
    """The images as JSON with data addresses, so that nobody can fetch them from the server."""
    return json.dumps({"id": key, "images": _images(collection, lambda number, image: image)})


def masks_document(collection: SegmentedCollection) -> str:
    """The images with their objects outlined, and the marks on them, likewise."""

    def outlined(number: int, image: Image.Image) -> Image.Image:
        mask = Image.fromarray(collection.masks[number]).convert("L").resize(image.size, Image.Resampling.BILINEAR)
        return overlay_mask(image, np.asarray(mask) >= 128, alpha=0.25, fade=0.8)

    hints = marks(collection.hints, len(collection.copies))
    images = _images(collection, outlined)
    return json.dumps({"images": images, "hints": hints, "mostHints": limits.MAX_HINTS})


def _images(collection: SegmentedCollection, drawn: Callable[[int, Image.Image], Image.Image]) -> list[dict[str, Any]]:
    """What the page needs of each photo, of which it shows a small copy as it is drawn."""
    return [
        {
            "src": data_address(drawn(number, reduced(copy.image, _SIDE))),
            "w": copy.image.width,
            "h": copy.image.height,
            "name": copy.name,
            "odd": number in collection.odd,
        }
        for number, copy in enumerate(collection.copies)
    ]
