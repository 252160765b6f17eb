"""What a request must be before gradio sees it: its Host, its route and the values in it.

One schema, made of the components of the page, says what every endpoint takes; all else that a program sends is
answered by 4xx and a sentence, and never reaches the code behind it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import gradio as gr
from fastapi import Depends, HTTPException, Request
from pydantic import BaseModel, Field, FiniteFloat, Strict, TypeAdapter, ValidationError
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..inference import LARGEST_COLLECTION
from . import limits
from .arranging import ORDER
from .components import OF_FILES, uploaded
from .hinting import COLLECTION_HINTS, HINTS, POINTS
from .viewer import LAYERS

LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")

# What the page does not need: recordings and state are written to the disk, statistics are of all visitors, and a
# proxy, a code editor or a remote call are nobody's business here.
_CLOSED = re.compile(
    r"/+(gradio_api/+(process_recording|deep_link|proxy=|vibe|undo-vibe|stream/|run-history|runs|profiling|mcp"
    r"|custom_component|dev/)|monitoring|runs|dev/|login|logout|gradio_api/+file/)"
)
_CALL = re.compile(r"/+gradio_api/+call/+(?P<named>v2/+)?(?P<name>[^/]+)/*")
_RUN = re.compile(r"/+gradio_api/+(?:queue/+join|run/+(?P<run>[^/]+)|api/+(?P<api>[^/]+))/*")
_COMPONENT = re.compile(r"/+gradio_api/+component_server/*")
_LONGEST_SESSION = 128
_UPLOAD = re.compile(r"/+gradio_api/+upload/*")  # which has a limit of its own

Number = Annotated[FiniteFloat, Strict()]
Point = tuple[Number, Number]
Share = Annotated[Number, Field(ge=0, le=1)]
Truth = Annotated[bool, Strict()]
ImageNumber = Annotated[int, Strict(), Field(ge=0)]
Mark = tuple[Share, Share, Truth]
Name = Annotated[str, Field(max_length=4096, pattern=r"^[^\x00]*$")]


class Upload(BaseModel):
    """A file that was uploaded before."""

    path: Name


class GalleryItem(BaseModel):
    """An image of a gallery."""

    image: Upload


class Question(BaseModel):
    """What the viewer asks of a result."""

    id: Name


class PointQuestion(Question):
    """Where a point of one image (side 0 or 1) lies in the other."""

    point: Point
    side: Literal[0, 1]


class CollectionQuestion(Question):
    """Where a point of an image of a collection lies in all."""

    point: Point
    image: ImageNumber


class LayerQuestion(Question):
    """The layers of a mode."""

    mode: Literal[tuple(LAYERS)]  # type: ignore[valid-type]


_MARKS = Annotated[list[Mark], Field(max_length=limits.MAX_HINTS)]
_OF_MARKS = f"one a photo, of at most {limits.MAX_HINTS} points [x, y, true or false], x and y from 0 to 1"
_MOST_POINTS = limits.MAX_HINTS * LARGEST_COLLECTION
_BY_NAME: dict[str, tuple[Any, str]] = {
    HINTS: (tuple[_MARKS, _MARKS], f"two lists, {_OF_MARKS}"),
    COLLECTION_HINTS: (Annotated[list[_MARKS], Field(max_length=LARGEST_COLLECTION)], f"a list of lists, {_OF_MARKS}"),
    POINTS: (
        Annotated[list[tuple[ImageNumber, Number, Number, Truth]], Field(max_length=_MOST_POINTS)],
        f"a list of at most {_MOST_POINTS} points [image, x, y, true or false], images counted from 0",
    ),
    ORDER: (Annotated[list[ImageNumber], Field(max_length=limits.MAX_POINTS)], "a list of numbers from 0"),
}
"""What components of JSON take, by their element ids, and what that is in words; others take points."""

_QUESTIONS: dict[str, type[BaseModel]] = {
    "viewer_transfer": PointQuestion,
    "viewer_heat": PointQuestion,
    "viewer_grid": Question,
    "viewer_layers": LayerQuestion,
    "collection_transfer": CollectionQuestion,
}


def guard(allowed_hosts: Sequence[str]) -> dict[str, Any]:
    """Options of the web application, gradio's `app_kwargs`.

    Args:
        allowed_hosts: names under which the server may be addressed, "*" for all; as starlette's
            `TrustedHostMiddleware`. Otherwise a page of another site could lead its own name to this machine.
    """
    trusted = Middleware(TrustedHostMiddleware, allowed_hosts=list(allowed_hosts), www_redirect=False)
    return {"middleware": [trusted, Middleware(_ShortBodies)], "dependencies": [Depends(_check)]}


class _ShortBodies:
    """Refuses bodies that are longer than any of the page, but uploads, before they are in memory.

    As objects of Python they take twenty times their length.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _UPLOAD.fullmatch(scope["path"]):
            await self.app(scope, receive, send)
            return
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > limits.MAX_BODY_BYTES:
                raise HTTPException(413, "The body of the request is too long.")
            return message

        await self.app(scope, counted, send)


async def _check(request: Request) -> None:
    """Raises `HTTPException` unless gradio may handle a request."""
    path = request.scope["path"]
    if "\0" in path or len(path) > 4096:
        raise HTTPException(400, "This is not an address of the demo.")
    if _CLOSED.match(path):
        raise HTTPException(404, "The demo does not have this.")
    if request.method != "POST":
        return
    if found := _CALL.fullmatch(path):
        body = await _body(request)
        name = found["name"]
        event = _event(request, lambda fn: fn.api_name == name)
        _check_values(event, body if found["named"] else body.get("data"))
    elif found := _RUN.fullmatch(path):
        # The page names a function by its number, also where the address names one; as gradio, the number first.
        body = await _body(request)
        number, name = body.get("fn_index"), found["run"] or found["api"]
        event = _event(request, lambda fn: fn.api_name == name if number is None else fn._id == number)
        _check_values(event, body.get("data"))
    elif _COMPONENT.fullmatch(path):
        _check_question(request, await _body(request))


async def _body(request: Request) -> dict[str, Any]:
    try:
        body = await request.json()
    except ValueError as error:  # UnicodeDecodeError, and a number of too many digits, are ones too
        raise HTTPException(400, "The body of the request is not JSON.") from error
    except RecursionError as error:
        raise HTTPException(400, "The body of the request is nested too deeply.") from error
    if not isinstance(body, dict):
        raise HTTPException(400, "The body of the request must be an object.")
    if len(str(body.get("session_hash"))) > _LONGEST_SESSION:  # which is remembered; the page's own has 11 characters
        raise HTTPException(422, "The name of the session is too long.")
    return body


def _event(request: Request, chosen: Callable[[Any], bool]) -> Any:
    fns = request.app.get_blocks().fns.values()
    found = [fn for fn in fns if chosen(fn)]
    if len(found) != 1:
        raise HTTPException(404, "The demo has no such endpoint.")
    return found[0]


def _check_values(event: Any, values: Any) -> None:
    """Raises an error of 422 that names each value that its component does not take, as gradio's validators do.

    Args:
        event: a function of the page.
        values: one for each of its inputs, or by their labels.
    """
    inputs = [each for each in event.inputs if not isinstance(each, gr.State)]  # a program does not send these
    if isinstance(values, dict):
        labels = {component.label: component for component in inputs}
        if not values.keys() <= labels.keys():
            raise HTTPException(400, f"This endpoint takes the values {', '.join(labels)}.")
        pairs = [(labels[label], value) for label, value in values.items()]
    else:
        inputs = event.inputs if isinstance(values, list) and len(values) == len(event.inputs) else inputs
        if not isinstance(values, list) or len(values) != len(inputs):
            raise HTTPException(400, f"This endpoint takes a list of {len(inputs)} values.")
        pairs = list(zip(inputs, values, strict=True))
    found = [_verdict(component, value) for component, value in pairs]
    if not all(verdict["is_valid"] for verdict in found):
        raise HTTPException(422, found)


def _verdict(component: Any, value: Any) -> dict[str, Any]:
    """What gradio's own validators say of a value."""
    kind, words = _schema(component)
    name = str(getattr(component, "label", None) or "value")
    try:
        TypeAdapter(kind).validate_python(value)
        if isinstance(component, OF_FILES):
            uploaded(value, component.GRADIO_CACHE)
    except (ValidationError, gr.Error):
        said = f"{name[:1].upper()}{name[1:]} must be {words}; it is {_shortened(value)}."
        return {**gr.validate(False, said), "parameter_name": name}
    return {**gr.validate(True, ""), "parameter_name": name}


def _shortened(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # a number of more than 4,300 digits
        text = "a very long number"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _schema(component: Any) -> tuple[Any, str]:
    """The type that a component takes, and what that is in words."""
    if isinstance(component, gr.Slider):
        low, high = component.minimum, component.maximum
        return Annotated[Number, Field(ge=low, le=high)], f"a number from {low} to {high}"
    if isinstance(component, gr.Radio):
        values = tuple(value for _, value in component.choices)
        return Literal[values], f"one of {', '.join(map(str, values))}"
    if isinstance(component, gr.Dataset):
        return Annotated[int, Strict(), Field(ge=0, lt=len(component.samples))], "the number of an example"
    if isinstance(component, gr.Gallery):
        return list[GalleryItem] | None, "images that were uploaded"
    if isinstance(component, gr.File):
        return list[Upload] | None, "files that were uploaded"
    if isinstance(component, gr.Image):
        return Upload | None, "a file that was uploaded"
    if isinstance(component, gr.JSON) and component.elem_id in _BY_NAME:
        return _BY_NAME[component.elem_id]
    if isinstance(component, gr.JSON):
        most = limits.MAX_POINTS
        return Annotated[list[Point], Field(max_length=most)], f"a list of at most {most} pairs of numbers [x, y]"
    if isinstance(component, gr.Textbox):
        return Name, "a short text"
    if isinstance(component, gr.DownloadButton):  # read in the browser only
        return None, "nothing"
    return Any, ""


def _check_question(request: Request, body: dict[str, Any]) -> None:
    """Raises `HTTPException` unless this is a question of the viewer."""
    kind, number = _QUESTIONS.get(str(body.get("fn_name"))), body.get("component_id")
    component = request.app.get_blocks().blocks.get(number) if type(number) is int else None
    if kind is None or not isinstance(component, gr.HTML):
        raise HTTPException(404, "The demo does not have this.")
    if not isinstance(body.get("session_hash"), str):
        raise HTTPException(422, "The session of the page is missing.")
    try:
        kind.model_validate(body.get("data"))
    except ValidationError as error:
        place = ".".join(str(part) for part in error.errors()[0]["loc"]) or "data"
        raise HTTPException(422, f"The question cannot be used: {place}: {error.errors()[0]['msg']}.") from error
