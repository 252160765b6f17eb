"""Marks on the stage of a pair: points that say which object is meant, and what does not belong to it.

A mark is `[x, y, belongs]`, in shares of its photo: 0 and 1 are the outer edges. The page sends the marks of both
photos, and draws those that the result has; `assets/viewer.js` is its part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr

from ..inference import VIEWS
from . import components
from .sessions import Sessions
from .texts import errors_for_visitors

if TYPE_CHECKING:
    from ..hints import Hint
    from ..inference.files import MatchedPair

HINTS = "hints"
"""Element id of the component that takes marks."""

Mark = tuple[float, float, bool]

# Of the event's inputs the last one is empty: the stage has what belongs there.
_SEND = "(...values) => [...values.slice(0, -1), window.macosnetHints.send()]"
_UNDO = "() => window.macosnetHints.undo()"


def marks(pair: MatchedPair) -> list[list[Mark]]:
    """The marks that a result has, on source and target."""
    found: list[list[Mark]] = [[], []]
    for view, hint in pair.hints.items():
        found[view] = [(*point, True) for point in hint.include] + [(*point, False) for point in hint.exclude]
    return found


def hints_of(marks: Sequence[Sequence[Mark]], pair: MatchedPair) -> dict[str, Hint]:
    """Hints for source and target in pixels of the originals, rounded as *Copy as Python* writes them.

    Args:
        marks: on source and target.
        pair: that they are of.
    """
    from ..hints import Hint  # needs torch, which the page does not wait for

    found = {}
    for name, copy, of_photo in zip(VIEWS, pair.copies, marks, strict=True):
        lists: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        for *shares, belongs in of_photo:
            x, y = (
                round(min(max(share * side - 0.5, 0.0), side - 1.0), 1)
                for share, side in zip(shares, copy.size, strict=True)
            )
            lists[belongs].append((x, y))
        if of_photo:
            found[name] = Hint(include=lists[True], exclude=lists[False])
    return found


def follow_marks(
    drawing: gr.HTML,
    inputs: Sequence[Any],
    sessions: Sessions,
    show: Callable[..., tuple[Any, ...]],
    **options: Any,
) -> None:
    """Makes masks anew when a visitor sets or removes a mark.

    Args:
        drawing: the stage.
        inputs: both photos, the key of the result, threshold and number of lines.
        sessions: with the result.
        show: takes photos, work that gives a pair, threshold, number of lines and the request.
        options: of the event.
    """

    def hint_again(
        source: str | None,
        target: str | None,
        key: str | None,
        threshold: float,
        count: int,
        marks: list[list[Mark]],
        request: gr.Request,
    ) -> tuple[Any, ...]:
        with errors_for_visitors():
            pair = sessions.pairs.get(key)

            def work() -> MatchedPair:
                return sessions.matcher.hinted(pair, hints_of(marks, pair))

            return show((source, target), work, threshold, count, request)

    sent = gr.JSON(visible=False, label="hints", elem_id=HINTS)
    run = components.on_uploads(hint_again, [*inputs, sent])
    # Marks that are set during a run are sent all together after it.
    done = drawing.submit(**run, js=_SEND, trigger_mode="always_last", **options)
    done.failure(None, js=_UNDO, **components.INSTANT)
