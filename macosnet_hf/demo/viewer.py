"""The stage of a pair, Python's part: images, lines, points, grids and layers for `assets/viewer.js`."""

from __future__ import annotations

import base64
import importlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.resources import files
from types import ModuleType
from typing import TYPE_CHECKING, Any

import gradio as gr
import numpy as np
from PIL import Image

from ..drawing import (
    Color,
    on_checkerboard,
    overlay_mask,
    overlay_parts,
    overlay_similarity,
    position_colors,
    spread_over_object,
)
from ..errors import MaCoSNetError
from ..inference import DIRECTIONS
from ..inference.cutouts import make_cutout
from . import limits
from .result_store import ResultStore

if TYPE_CHECKING:
    from ..inference.pair import PairResult

Layer = Callable[["PairResult"], list["Image.Image | None"]]

_GRID_CELLS = 9  # across the longer side of the object
_LAYER_SIDE = 720  # pixels of the longer side


def asset(name: str) -> str:
    """The text of a file of `assets/`."""
    return (files(__package__) / "assets" / name).read_text(encoding="utf-8")


def viewer(pairs: ResultStore[Any]) -> gr.HTML:
    """The component. Its value are the lines of [`viewer_lines`], its property `images` those of [`viewer_images`]."""

    def viewer_transfer(question: Any) -> dict[str, Any]:
        """Where one point of a working copy lies in the other one."""

        def moved(result: PairResult) -> dict[str, Any]:
            return {"point": _rounded(result.transfer([question["point"]], DIRECTIONS[question["side"]]))}

        return answer(pairs, question, lambda pair: moved(pair.result))

    def viewer_heat(question: Any) -> dict[str, Any]:
        """The photo that a point does not lie on, under a heat map of its similarity to that point."""

        def drawn(result: PairResult) -> dict[str, Any]:
            side = question["side"]
            similarity = _maps().similarity_map(result, question["point"], DIRECTIONS[side])
            other = reduced((result.target, result.source)[side], _LAYER_SIDE)
            row, column = np.unravel_index(similarity.argmax(), similarity.shape)
            scale = np.array(((result.target, result.source)[side]).size) / similarity.shape[::-1]
            best = (np.array([column, row]) + 0.5) * scale - 0.5
            return {"src": data_address(overlay_similarity(other, similarity)), "best": _rounded(best)}

        return answer(pairs, question, lambda pair: drawn(pair.result))

    def viewer_grid(question: Any) -> dict[str, Any]:
        """A grid of points over the object of the source, and where they lie in the target."""
        return answer(pairs, question, lambda pair: grid_document(pair.result))

    def viewer_layers(question: Any) -> dict[str, Any]:
        """What a mode lays over the photos: `{"sides": [address of source, of target]}`, null for nothing."""

        def drawn(result: PairResult) -> dict[str, Any]:
            return {"sides": [image and data_address(image) for image in LAYERS[question["mode"]](result)]}

        return answer(pairs, question, lambda pair: drawn(pair.result))

    return gr.HTML(
        elem_id="viewer",
        html_template=asset("viewer.html"),
        js_on_load=asset("viewer.js"),
        apply_default_css=False,
        server_functions=[viewer_transfer, viewer_heat, viewer_grid, viewer_layers],
        images="",
    )


def answer(results: ResultStore[Any], question: Any, work: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """What `work` makes of the result that a question is about, or `{"error": sentence}`.

    Questions of another form than `guard.py` says do not come here.
    """
    try:
        return work(results.get(question["id"]))
    except MaCoSNetError as error:
        return {"error": str(error)}


def viewer_images(
    key: str, images: tuple[Image.Image, Image.Image], names: tuple[str, str], hints: Sequence[Any] = ([], [])
) -> str:
    """Both images as JSON with data addresses, so that nobody can fetch them from the server.

    Args:
        key: of the result in the store.
        images, names: source and target.
        hints: as `hinting.marks` gives them.
    """
    sides = [
        {"src": data_address(image), "w": image.width, "h": image.height, "name": name}
        for image, name in zip(images, names, strict=True)
    ]
    return json.dumps({"id": key, "sides": sides, "hints": hints, "mostHints": limits.MAX_HINTS})


def viewer_lines(result: PairResult, threshold: float, max_matches: int) -> str:
    """The matches to draw, as JSON: at most `max_matches` of those above the threshold, spread over the object.

    Each is `[x, y, x', y', colour, score]`. The colour stands for the place on the source, see
    [`~macosnet_hf.drawing.position_colors`], and stays the same whatever the threshold. `faint` asks for faint lines:
    the pair's matches are not to be relied on.
    """
    above = result.scores > threshold
    shown = np.flatnonzero(above)
    shown = shown[spread_over_object(result.keypoints[shown, 0], result.scores[shown], max_matches)]
    colors = position_colors(result.keypoints[:, 0])
    lines = [
        [*_rounded(result.keypoints[index]), _hex(colors[index]), round(float(result.scores[index]), 3)]
        for index in shown
    ]
    return json.dumps({"lines": lines, "above": int(above.sum()), "all": len(above), "faint": result.quality == "poor"})


def _small(image: Image.Image, mask: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    """Small copies of an image and its mask `(H, W)` bool."""
    small = reduced(image, _LAYER_SIDE)
    grey = Image.fromarray(mask).convert("L").resize(small.size, Image.Resampling.BILINEAR)
    return small, np.asarray(grey) >= 128


def _copies(result: PairResult) -> tuple[tuple[Image.Image, np.ndarray], ...]:
    """Small copies of both images with their masks."""
    return _small(result.source, result.source_mask), _small(result.target, result.target_mask)


def _masks(result: PairResult) -> list[Image.Image | None]:
    return [overlay_mask(image, mask, alpha=0.25, fade=0.8) for image, mask in _copies(result)]


def _cutouts(result: PairResult) -> list[Image.Image | None]:
    """As the files that the visitor downloads have them, with soft edges."""
    return [
        on_checkerboard(make_cutout(image, result.soft_masks[view], mask, hint=result.hints.get(view)))
        for view, (image, mask) in enumerate(_copies(result))
    ]


def _parts(result: PairResult) -> list[Image.Image | None]:
    colors = _maps().part_colors(result)
    return [overlay_parts(image, each, mask) for (image, mask), each in zip(_copies(result), colors, strict=True)]


def _maps() -> ModuleType:
    """`inference.feature_maps`, imported late: it needs torch, which the page does not wait for."""
    return importlib.import_module("macosnet_hf.inference.feature_maps")


def source_on_target(result: PairResult, side: int) -> Image.Image:
    """The source warped onto the target, at most `side` pixels long; the target itself, faded, where it is empty."""
    target = reduced(result.target, side)
    small = replace(result, target=target)
    white = replace(small, source=Image.new("RGB", result.source.size, (255, 255, 255)))
    covered = white.warped_source().convert("L").point([0] * 128 + [255] * 128)
    rest = overlay_mask(target, np.zeros((target.height, target.width), dtype=bool), fade=0.8)
    return Image.composite(small.warped_source(), rest, covered)


def reduced(image: Image.Image, side: int) -> Image.Image:
    """A copy of at most `side` pixels."""
    copy = image.copy()
    copy.thumbnail((side, side), reducing_gap=2.0)
    return copy


LAYERS: dict[str, Layer] = {
    "masks": _masks,
    "cutout": _cutouts,
    "parts": _parts,
    "warp": lambda result: [None, source_on_target(result, _LAYER_SIDE)],
}
"""What the modes of the stage that are layers lay over source and target."""


def object_grid(mask: np.ndarray, cells: int = _GRID_CELLS) -> np.ndarray:
    """Points `(N, 2)` as (x, y) on a regular grid over the object of a mask `(H, W)` bool; of the whole image if the
    mask is empty."""
    if not mask.any():
        mask = np.ones_like(mask)
    ends = [np.flatnonzero(mask.any(axis=axis))[[0, -1]] + (-0.5, 0.5) for axis in (0, 1)]  # of columns, of rows
    step = max(1.0, max(last - first for first, last in ends) / cells)
    counts = [max(1, round((last - first) / step)) for first, last in ends]
    axes = [
        first + (np.arange(count) + 0.5) * (last - first) / count
        for (first, last), count in zip(ends, counts, strict=True)
    ]
    grid = np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, 2)
    column, row = np.rint(grid).astype(int).T
    inside = mask[row.clip(0, mask.shape[0] - 1), column.clip(0, mask.shape[1] - 1)]
    return grid[inside].clip(0, np.array(mask.shape[::-1]) - 1)


def grid_document(result: PairResult) -> dict[str, Any]:
    """A grid over the object of the source and where it lies in the target: `{"points": [[x, y, x', y', colour]]}`."""
    source = object_grid(result.source_mask)
    ends = np.stack((source, result.transfer(source)), axis=1)
    return {
        "points": [[*_rounded(pair), _hex(color)] for pair, color in zip(ends, position_colors(source), strict=True)]
    }


def _rounded(ends: np.ndarray) -> list[float]:
    return [round(float(value), 1) for value in ends.ravel()]


def _hex(color: Color) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


def data_address(image: Image.Image) -> str:
    """An image as the address of itself, so that a page holds it and nobody can fetch it from the server."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
