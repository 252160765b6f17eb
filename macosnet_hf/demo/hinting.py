"""Marks on photos: points that say which object is meant, and what does not belong to it.

A mark is `[x, y, belongs]`, in shares of its photo: 0 and 1 are the outer edges. The page sends the marks of all photos
of a result, and draws those that the result has; `assets/viewer.js` and `assets/masks.js` are its part. Programs send
points `[image, x, y, belongs]` instead, in pixels of the originals.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr

from ..errors import InputError
from ..inference import VIEWS
from . import components, limits
from .sessions import Sessions
from .texts import PHOTOS, errors_for_visitors

if TYPE_CHECKING:
    from ..hints import Hint, PlacedHint
    from ..inference.files import MatchedPair
    from ..io.working_copy import WorkingCopy
    from .matcher import Matcher

HINTS, COLLECTION_HINTS, POINTS = "hints", "collection-hints", "hints-of-programs"
"""Element ids of the components that take marks on a pair, marks on a collection, and the points of programs."""

Mark = tuple[float, float, bool]
HintPoint = tuple[int, float, float, bool]


def marks(hints: Mapping[int, PlacedHint], count: int) -> list[list[Mark]]:
    """The marks that a result has, on each of `count` photos."""
    found: list[list[Mark]] = [[] for _ in range(count)]
    for number, hint in hints.items():
        found[number] = [(*point, True) for point in hint.include] + [(*point, False) for point in hint.exclude]
    return found


def hint_of(marks: Sequence[Mark], size: tuple[int, int]) -> Hint:
    """A hint in pixels of an original, rounded as *Copy as Python* writes it.

    Args:
        marks: on one photo.
        size: (width, height) of the original.
    """
    from ..hints import Hint  # needs torch, which the page does not wait for

    lists: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for *shares, belongs in marks:
        x, y = (
            round(min(max(share * side - 0.5, 0.0), side - 1.0), 1) for share, side in zip(shares, size, strict=True)
        )
        lists[belongs].append((x, y))
    return Hint(include=lists[True], exclude=lists[False])


def hints_of(
    marks: Sequence[Sequence[Mark]], copies: Sequence[WorkingCopy], names: Sequence[str]
) -> dict[int, PlacedHint]:
    """The hints of marks, by the number of the photo.

    Args:
        marks: on each photo.
        copies: the photos.
        names: what errors call them.

    Raises:
        InputError: if there are other photos, or a pixel is marked in both ways.
    """
    if len(marks) != len(copies):
        raise InputError("These marks are of other photos; run it again.")
    return {
        number: hint_of(some, copies[number].size).place(copies[number].size, names[number])
        for number, some in enumerate(marks)
        if some
    }


def hints_of_points(matcher: Matcher, points: Sequence[HintPoint], count: int) -> dict[int, Hint]:
    """The hints of a program's points, by the number of the image.

    Args:
        matcher: of the server. Its model is loaded first: no thread may import torch while another does.
        points: `[image, x, y, belongs]`, the image by its number from 0, (x, y) in pixels of the upright original.
        count: of images.

    Raises:
        InputError: for an image that is not there, or too many points on one.
    """
    matcher.load()
    from ..hints import Hint

    found: dict[int, tuple[list[tuple[float, float]], list[tuple[float, float]]]] = {}
    for number, x, y, belongs in points:
        if number >= count:
            raise InputError(f"There is no image {number} for a hint; there are {count}, counted from 0.")
        found.setdefault(number, ([], []))[0 if belongs else 1].append((x, y))
    for number, (include, exclude) in found.items():
        if len(include) + len(exclude) > limits.MAX_HINTS:
            raise InputError(f"An image takes at most {limits.MAX_HINTS} hints; image {number} has more.")
    return {number: Hint(include=include, exclude=exclude) for number, (include, exclude) in found.items()}


def on_marks(place: gr.HTML, fn: Callable[..., Any], inputs: Sequence[Any], name: str, **options: Any) -> Any:
    """Runs when a visitor sets or removes a mark, and returns the event.

    Args:
        place: where marks are set. Its script puts functions into `window.macosnetMarks`: `send` gives the marks,
            `undo` forgets those that the result does not have.
        fn: takes the values of the inputs and the marks.
        inputs: of the event.
        name: element id of the component that takes the marks.
        options: of the event.
    """
    sent = gr.JSON(visible=False, label="hints", elem_id=name)
    run = components.on_uploads(fn, [*inputs, sent])
    # Of the event's inputs the last one is empty: the script has what belongs there. Marks that are set during a run
    # are sent all together after it.
    send = f"(...values) => [...values.slice(0, -1), window.macosnetMarks['{name}'].send()]"
    done = place.submit(**run, js=send, trigger_mode="always_last", **options)
    done.failure(None, js=undo_marks(name), **components.INSTANT)
    return done


def undo_marks(name: str) -> str:
    """JavaScript that forgets the marks that the result does not have; see [`on_marks`]."""
    return f"() => window.macosnetMarks?.['{name}']?.undo()"


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
                hints = hints_of(marks, pair.copies, PHOTOS)
                return sessions.matcher.hinted(pair, {VIEWS[view]: hint for view, hint in hints.items()})

            return show((source, target), work, threshold, count, request)

    on_marks(drawing, hint_again, inputs, HINTS, **options)
