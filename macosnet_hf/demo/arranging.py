"""Another order for the photos of a collection, whose result stays; `assets/arrange.js` is the browser's part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from . import components
from .viewer import asset

ORDER = "order"
"""Element id of the component that takes an order: numbers of photos, from 0."""


def arranging() -> gr.HTML:
    """What makes the photos of the gallery above it movable."""
    return gr.HTML(
        elem_id="arrange",
        html_template=asset("arrange.html"),
        js_on_load=asset("arrange.js"),
        apply_default_css=False,
    )


def on_order(place: gr.HTML, fn: Callable[..., Any], inputs: Sequence[Any], **options: Any) -> None:
    """Runs when a visitor moves a photo.

    Args:
        place: as [`arranging`] makes it.
        fn: takes the values of the inputs and the order.
        inputs: of the event.
        options: of the event.
    """
    sent = gr.JSON(visible=False, label="order", elem_id=ORDER)
    run = components.on_uploads(fn, [*inputs, sent])
    send = "(...values) => [...values.slice(0, -1), window.macosnetArrange.send()]"
    queue = {**components.QUIET, "concurrency_limit": 2}
    moved = place.submit(**run, js=send, **options, **queue)
    moved.then(None, js="() => window.macosnetArrange.done()", **components.INSTANT)
