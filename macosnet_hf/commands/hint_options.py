"""The options `--include`, `--exclude` and `--box` of `macosnet segment` and `macosnet match`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    from ..hints import PlacedHint, Point, Rectangle
    from ..io.working_copy import WorkingCopy

_OPTIONS = ("include", "exclude", "box")


def add_hint_arguments(parser: argparse.ArgumentParser, images: str) -> None:
    """Adds `--include`, `--exclude` and `--box`, which [`read_hints`] reads.

    Args:
        images: how one of the images is named.
    """
    group = parser.add_argument_group(
        "which object",
        "Points and boxes in pixels of one upright image; the masks of all images follow them. IMAGE is "
        f"{images}; it may be left out where there is one image only.",
    )
    add = group.add_argument
    add("--include", action="append", metavar='"IMAGE:x,y"', help="a point on the object; may be repeated")
    add("--exclude", action="append", metavar='"IMAGE:x,y"', help="a point that is not on it; may be repeated")
    add("--box", action="append", metavar='"IMAGE:x0,y0,x1,y1"', help="a box around it; one for each image")


def read_hints(
    args: argparse.Namespace, copies: Sequence[WorkingCopy], names: Sequence[str] = ()
) -> dict[int, PlacedHint]:
    """Hints by the number of the image, from 0.

    Args:
        args: of the command line.
        copies: of all images.
        names: what they may be called as well, such as source and target.

    Raises:
        InputError: naming the option with an unknown image or without the numbers that it needs, and as
            [`~macosnet_hf.hints.place_hints`].
    """
    if all(getattr(args, option) is None for option in _OPTIONS):
        return {}
    from ..hints import Hint, place_hints

    paths = [copy.path for copy in copies]
    points: dict[str, dict[int, list[Point]]] = {"include": {}, "exclude": {}}
    boxes: dict[int, Rectangle] = {}
    for option in _OPTIONS:
        for text in getattr(args, option) or ():
            image, _, rest = text.rpartition(":")
            number = _image_number(f"--{option}", image, paths, names)
            if option == "box":
                if number in boxes:
                    raise InputError(f"--box {text!r}: this image has a box already.")
                left, top, right, bottom = _read_numbers(option, text, rest, "x0,y0,x1,y1")
                boxes[number] = (left, top, right, bottom)
            else:
                x, y = _read_numbers(option, text, rest, "x,y")
                points[option].setdefault(number, []).append((x, y))
    include, exclude = points["include"], points["exclude"]
    hints = {
        number: Hint(include.get(number, ()), exclude.get(number, ()), boxes.get(number))
        for number in sorted({*include, *exclude, *boxes})
    }
    return place_hints(hints, [copy.size for copy in copies], [copy.name for copy in copies])


def _read_numbers(option: str, text: str, numbers: str, form: str) -> list[float]:
    try:
        found = [float(cell) for cell in numbers.split(",")]
    except ValueError:
        found = []
    if len(found) != form.count(",") + 1:
        raise InputError(f"--{option}: expected numbers {form}, perhaps after IMAGE and a colon; got {text!r}.")
    return found


def _image_number(option: str, image: str, paths: Sequence[str], names: Sequence[str]) -> int:
    """The number of the image that is called so: its place from 1, its path, its file's name, or one of `names`."""
    if not image:
        if len(paths) == 1:
            return 0
        raise InputError(f"{option} must say in which of the {len(paths)} images it lies, such as {option} 1:120,80.")
    if image in names:
        return names.index(image)
    if image.isascii() and image.isdigit():
        if not 1 <= int(image) <= len(paths):
            raise InputError(f"{option}: there is no image {image}; there are {len(paths)}, counted from 1.")
        return int(image) - 1
    found = [number for number, path in enumerate(paths) if path == image]
    found = found or [number for number, path in enumerate(paths) if os.path.basename(path) == image]
    if len(found) > 1:
        raise InputError(f"{option}: several images are called {image!r}; give the path or the number of one.")
    if not found:
        raise InputError(f"{option}: none of the images is called {image!r}.")
    return found[0]
