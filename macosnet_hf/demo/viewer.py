"""What the interactive image of a pair (see `viewer_page.py`) is told: photos, lines, grids."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..drawing import overlay_mask, position_colors, spread_over_object

if TYPE_CHECKING:
    from ..inference.pair import PairResult

_GRID_CELLS = 9  # across the longer side of the object


def viewer_images(key: str, images: tuple[Image.Image, Image.Image], names: tuple[str, str]) -> str:
    """Both photos for the script, as JSON; they travel inside it, so no address of them exists.

    Args:
        key: under which the server keeps the result.
        photos, names: source and target.
    """
    sides = [
        {"src": _data_address(image), "w": image.width, "h": image.height, "name": name}
        for image, name in zip(images, names, strict=True)
    ]
    return json.dumps({"id": key, "sides": sides})


def viewer_lines(result: PairResult, threshold: float, max_matches: int) -> str:
    """The matches to draw, as JSON: at most `max_matches` of those above the threshold, spread over the object.

    Each is `[x, y, x', y', colour, score]`. The colour tells the place on the source, see
    [`~macosnet_hf.drawing.position_colors`], and stays the same whatever the threshold.
    """
    above = result.scores > threshold
    colors = np.array(position_colors(result.keypoints[:, 0]), dtype=int).reshape(-1, 3)[above]
    points, scores = result.keypoints[above], result.scores[above]
    chosen = spread_over_object(points[:, 0], scores, max_matches)
    lines = [
        [
            *(round(float(value), 1) for value in points[index].ravel()),
            _hex(colors[index]),
            round(float(scores[index]), 3),
        ]
        for index in chosen
    ]
    return json.dumps({"lines": lines, "above": int(above.sum()), "all": len(above)})


def source_on_target(result: PairResult, side: int) -> Image.Image:
    """The source warped onto the target, at most `side` pixels long; the target itself, faded, where it is empty."""
    target = result.target.copy()
    target.thumbnail((side, side))
    small = replace(result, target=target)
    white = replace(small, source=Image.new("RGB", result.source.size, (255, 255, 255)))
    covered = white.warped_source().convert("L").point([0] * 128 + [255] * 128)
    rest = overlay_mask(target, np.zeros((target.height, target.width), dtype=bool), fade=0.8)
    return Image.composite(small.warped_source(), rest, covered)


def tint(mask: np.ndarray, strength: float = 0.28) -> np.ndarray:
    """Opacity `(H, W)` of a colour laid over a photo: `strength` inside a mask, 1 on its outline, 0 elsewhere."""
    width = max(1, round(max(mask.shape) / 320))
    grown = np.pad(mask, width)
    eroded = np.ones_like(mask)
    for offset in range(2 * width + 1):
        eroded &= grown[offset : offset + mask.shape[0], width:-width]
        eroded &= grown[width:-width, offset : offset + mask.shape[1]]
    return np.where(mask, np.where(eroded, strength, 1.0), 0.0)


def object_grid(mask: np.ndarray, cells: int = _GRID_CELLS) -> np.ndarray:
    """Points `(N, 2)` as (x, y) on a regular grid over the object of a mask `(H, W)` bool; of the whole image if the
    mask is empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return object_grid(np.ones_like(mask), cells)
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    step = max(1.0, max(bottom - top, right - left) / cells)
    across, down = (max(1, round(length / step)) for length in (right - left, bottom - top))
    x = left + (np.arange(across) + 0.5) * (right - left) / across - 0.5
    y = top + (np.arange(down) + 0.5) * (bottom - top) / down - 0.5
    grid = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    column, row = np.rint(grid).astype(int).T
    inside = mask[row.clip(0, mask.shape[0] - 1), column.clip(0, mask.shape[1] - 1)]
    return grid[inside].clip(0, np.array(mask.shape[::-1]) - 1)


def grid_document(result: PairResult) -> dict[str, Any]:
    """A grid over the object of the source and where it lies in the target: `{"points": [[x, y, x', y', colour]]}`."""
    source = object_grid(result.source_mask)
    target = result.transfer(source)
    colors = position_colors(source)
    return {
        "points": [
            [*(round(float(value), 1) for value in (*start, *end)), _hex(np.array(color))]
            for start, end, color in zip(source, target, colors, strict=True)
        ]
    }


def _hex(color: np.ndarray) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color.tolist())


def _data_address(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
