"""Drawings: matches of two images side by side, masks laid over images, cutouts, contact sheets.

All functions take and return PIL images. The module travels with the model to the Hub, where the image processor draws
matches with it. Points are (x, y) in pixels, 0 is the centre of the first pixel.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from .errors import InputError
from .images import as_shares, as_upright_rgb

ImageLike: TypeAlias = "Image.Image | np.ndarray"
Color: TypeAlias = tuple[int, int, int]

OBJECT_COLOR: Color = (255, 176, 0)
_MAX_WIDTH = 1600
# Matches
_GAP = 16  # between the images
_SUPERSAMPLING = 3  # lines and dots are drawn this much larger and reduced, which smooths their edges
_MAX_ASPECT = 3.0  # a wider image is shown at full width, not at full height
_FAINT = 0.25  # opacity of matches that are not to be relied on; `viewer.css` has the same
# Heat maps: for each channel, shares and values; matplotlib's "inferno" at six places
_HEAT = [
    (np.linspace(0, 1, 6), values)
    for values in ((0, 66, 147, 221, 252, 252), (0, 10, 38, 81, 165, 255), (4, 104, 103, 58, 10, 164))
]
# Contact sheets
_CELL = 300  # largest side of an image
_MARGIN = 14  # between cells
_SHEET_COLOR: Color = (250, 250, 250)
_ODD_COLOR: Color = (185, 28, 28)


def _as_rgb(image: ImageLike) -> Image.Image:
    """Upright RGB; it may be the image itself, which must not be changed."""
    if isinstance(image, Image.Image):
        return as_upright_rgb(image)
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise InputError(
            f"An image must be a PIL image or a uint8 array (height, width, 3), not {array.dtype} {array.shape}."
        )
    return Image.fromarray(np.ascontiguousarray(array))


def _as_stencil(mask: Any, size: tuple[int, int]) -> Image.Image:
    """A bool mask `(H, W)` of an image of PIL size (W, H) as a greyscale image, 255 on the object."""
    array = np.asarray(mask)
    if array.shape != (size[1], size[0]):
        raise InputError(
            f"A mask must have its image's height and width {(size[1], size[0])}; this one has {array.shape}."
        )
    if array.dtype != np.bool_:
        raise InputError(f"A mask must be bool, not {array.dtype}; compare it with a threshold first.")
    return Image.fromarray(np.where(array, np.uint8(255), np.uint8(0)))


def draw_matches(
    source: ImageLike,
    target: ImageLike,
    source_points: Any,
    target_points: Any,
    scores: Any = None,
    *,
    max_matches: int | None = 40,
    max_width: int = _MAX_WIDTH,
    faint: bool = False,
) -> Image.Image:
    """Two images side by side at the same height, with a line from each point to its partner.

    The hue of a line is the direction of its point from the middle of the source points, so that lines of
    neighbours look similar and each can be followed to its end. Lines of low score are fainter. Matches with a point
    outside its image are left out.

    Args:
        source, target: left and right image.
        source_points, target_points: `(N, 2)` points of both images, partners row by row, (x, y) in pixels.
        scores: `(N,)` non-negative, optional. A better match is drawn more likely and stronger.
        max_matches: draw at most so many, spread over the object; `None` for all.
        max_width: largest width of the result in pixels.
        faint: whether all matches are drawn faintly, for a pair whose matches are not to be relied on.

    Raises:
        InputError: images, points or scores of the wrong shape.
    """
    left, right = _as_rgb(source), _as_rgb(target)
    starts, partners = _points_array(source_points, "source"), _points_array(target_points, "target")
    if len(starts) != len(partners):
        raise InputError(
            f"source_points and target_points are partners row by row, but there are {len(starts)} and {len(partners)}."
        )
    points = np.stack((starts, partners))
    weights = _scores_array(scores, points.shape[1])
    canvas, boxes = _side_by_side(left, right, max_width)

    sizes = np.array([left.size, right.size], dtype=np.float64)[:, None]
    with np.errstate(invalid="ignore"):
        drawable = ((points >= -0.5) & (points <= sizes - 0.5)).all(axis=(0, 2))  # false for NaN
    points, weights = points[:, drawable], weights[drawable]
    chosen = spread_over_object(points[0], weights, max_matches)
    points, weights = points[:, chosen], weights[chosen]
    if not len(weights):
        return canvas
    # On the canvas pixel k covers [k, k+1].
    ends = (points + 0.5) * (np.array(boxes)[:, None, 2:] / sizes) + np.array(boxes)[:, None, :2]
    strength = 0.5 + 0.5 * weights / max(float(weights.max()), 1e-12)
    return _draw_lines(canvas, ends, position_colors(points[0]), strength, _FAINT if faint else 1.0)


def position_colors(points: np.ndarray) -> list[Color]:
    """A colour for each of `(N, 2)` points: hue by direction from their middle, paler towards the middle."""
    if not len(points):
        return []
    offset = points - np.median(points, axis=0)
    radius = np.hypot(offset[:, 0], offset[:, 1])
    radius = radius / max(float(radius.max()), 1e-12)
    angle = np.arctan2(offset[:, 1], offset[:, 0]) / (2 * math.pi) % 1.0
    colors = []
    for hue, distance in zip(angle.tolist(), radius.tolist(), strict=True):
        red, green, blue = colorsys.hsv_to_rgb(hue, 0.45 + 0.55 * distance, 1.0)
        colors.append((round(255 * red), round(255 * green), round(255 * blue)))
    return colors


def _points_array(points: Any, what: str) -> np.ndarray:
    array = np.asarray(points, dtype=np.float64)
    if array.size == 0:
        return np.zeros((0, 2))
    if array.ndim != 2 or array.shape[1] != 2:
        raise InputError(f"The {what} points must be an array (N, 2) of (x, y), not of shape {array.shape}.")
    return array


def _scores_array(scores: Any, count: int) -> np.ndarray:
    array = np.ones(count) if scores is None else np.asarray(scores, dtype=np.float64)
    if array.shape != (count,) or not np.isfinite(array).all() or (array < 0).any():
        raise InputError(f"scores must be {count} finite numbers of at least 0, one for each match.")
    return array


def spread_over_object(points: np.ndarray, weights: np.ndarray, count: int | None) -> np.ndarray:
    """Indices of at most `count` of the points `(N, 2)`, spread over all of them.

    The best point comes first, then always the one with the largest distance from the chosen ones times its weight.
    """
    if count is None or len(points) <= count:
        return np.arange(len(points))
    if count < 1:
        return np.arange(0)
    chosen = [int(weights.argmax())]
    distance = np.full(len(points), np.inf)
    while len(chosen) < count:
        distance = np.minimum(distance, np.hypot(*(points - points[chosen[-1]]).T))
        gain = distance * (weights + 1e-9 * max(1.0, float(weights.max())))
        gain[chosen] = -1.0
        chosen.append(int(gain.argmax()))
    return np.array(sorted(chosen))


def _side_by_side(
    left: Image.Image, right: Image.Image, max_width: int
) -> tuple[Image.Image, list[tuple[int, int, int, int]]]:
    """White canvas with both images, and the box (x, y, width, height) of each."""
    aspects = [min(max(p.width / p.height, 1 / _MAX_ASPECT), _MAX_ASPECT) for p in (left, right)]
    height = min(max(left.height, right.height, 480), 720)
    height = max(1, min(height, int((max_width - _GAP) / sum(aspects))))
    boxes, x = [], 0
    for image, aspect in zip((left, right), aspects, strict=True):
        cell = max(1, round(height * aspect))
        scale = min(cell / image.width, height / image.height)
        size = (max(1, min(cell, round(image.width * scale))), max(1, min(height, round(image.height * scale))))
        boxes.append((x + (cell - size[0]) // 2, (height - size[1]) // 2, *size))
        x += cell + _GAP
    canvas = Image.new("RGB", (x - _GAP, height), "white")
    for image, box in zip((left, right), boxes, strict=True):
        canvas.paste(_resized(image, box[2:]), box[:2])
    return canvas, boxes


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def _draw_lines(
    canvas: Image.Image, ends: np.ndarray, colors: list[Color], strength: np.ndarray, opacity: float
) -> Image.Image:
    """Antialiased lines and dots: drawn on a larger transparent layer, which is reduced and laid over the canvas.

    Args:
        canvas: RGB.
        ends: `(2, N, 2)` ends of the lines on the canvas.
        colors: N colours.
        strength: `(N,)` opacity of the lines, 0 to 1.
        opacity: of the whole layer, 0 to 1.
    """
    k = _SUPERSAMPLING
    layer = Image.new("RGBA", (canvas.width * k, canvas.height * k), (0, 0, 0, 0))
    draw = ImageDraw.Draw(layer)
    width = max(1.6, canvas.height / 280) * k
    radius = max(2.6, canvas.height / 130) * k
    places = [[(float(x) * k, float(y) * k) for x, y in side] for side in ends]
    for index in np.argsort(strength, kind="stable"):  # strong lines on top
        line = (places[0][index], places[1][index])
        alpha = round(255 * float(strength[index]))
        draw.line(line, fill=(0, 0, 0, alpha // 3), width=round(width * 2))
        draw.line(line, fill=(*colors[index], alpha), width=round(width))
    for side in places:
        for (x, y), color in zip(side, colors, strict=True):
            for size, fill in ((radius * 1.55, (0, 0, 0)), (radius * 1.3, (255, 255, 255)), (radius, color)):
                draw.ellipse((x - size, y - size, x + size, y + size), fill=(*fill, 255))
    layer = layer.reduce(k)
    if opacity < 1:
        layer.putalpha(layer.getchannel("A").point([round(opacity * value) for value in range(256)]))
    return Image.alpha_composite(canvas.convert("RGBA"), layer).convert("RGB")


def overlay_mask(
    image: ImageLike,
    mask: Any,
    color: Color = OBJECT_COLOR,
    alpha: float = 0.35,
    *,
    fade: float = 0.0,
    contour: bool = True,
) -> Image.Image:
    """The image with its object tinted and outlined.

    Args:
        image: image `(H, W)`.
        mask: bool `(H, W)`, true on the object.
        color: colour of the tint and of the outline.
        alpha: strength of the tint, 0 (none) to 1.
        fade: how far the background is turned to light grey, 0 (not at all) to 1.
        contour: whether to outline the object.

    Raises:
        InputError: a mask that does not fit its image, or is not bool.
    """
    rgb = _as_rgb(image)
    stencil = _as_stencil(mask, rgb.size)
    if not (0 <= alpha <= 1 and 0 <= fade <= 1):
        raise InputError("alpha and fade must lie between 0 and 1.")
    tinted = Image.blend(rgb, Image.new("RGB", rgb.size, color), alpha)
    result = Image.composite(tinted, _faded(rgb, fade), stencil)
    if contour and stencil.getextrema() == (0, 255):
        width = max(1.0, max(rgb.size) / 320)
        result.paste((255, 255, 255), mask=_outline(stencil, 2.2 * width))
        result.paste(color, mask=_outline(stencil, 1.2 * width))
    return result


def _faded(rgb: Image.Image, fade: float) -> Image.Image:
    """The image turned to light grey, from 0 (not at all) to 1."""
    grey = Image.blend(rgb.convert("L").convert("RGB"), Image.new("RGB", rgb.size, "white"), 0.55)
    return Image.blend(rgb, grey, fade)


def overlay_similarity(image: ImageLike, similarity: np.ndarray, alpha: float = 0.65) -> Image.Image:
    """The image under a heat map: dark where it is least similar to something, bright where it is most.

    Args:
        image: image `(H, W)`.
        similarity: `(h, w)` finite numbers over the whole image; their own range becomes that of the colours.
        alpha: strength of the colours, 0 to 1.

    Raises:
        InputError: for no map of numbers.
    """
    rgb, values = _as_rgb(image), np.asarray(similarity, dtype=np.float32)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise InputError(f"A similarity map must be finite numbers (h, w), not {values.shape}.")
    shares = (values - values.min()) / max(float(np.ptp(values)), 1e-9)
    # Squared: most places are somewhat similar to anything.
    colors = np.stack([np.interp(shares**2, *channel) for channel in _HEAT], axis=-1)
    heat = Image.fromarray(colors.round().astype(np.uint8)).resize(rgb.size, Image.Resampling.BICUBIC)
    return Image.blend(rgb.convert("L").convert("RGB"), heat, alpha)


def overlay_parts(image: ImageLike, colors: np.ndarray, mask: Any, alpha: float = 0.7) -> Image.Image:
    """The image with its object in colours that stand for parts, and the rest faded.

    Args:
        image: image `(H, W)`.
        colors: `(h, w, 3)` in [0, 1] over the whole image.
        mask: bool `(H, W)`, true on the object.
        alpha: strength of the colours, 0 to 1.

    Raises:
        InputError: a mask that does not fit its image, or is not bool; colours of another range.
    """
    rgb = _as_rgb(image)
    stencil = _as_stencil(mask, rgb.size)
    parts = Image.fromarray((255 * as_shares(colors, "Colours")).round().astype(np.uint8)).resize(
        rgb.size, Image.Resampling.BICUBIC
    )
    return Image.composite(Image.blend(rgb, parts, alpha), _faded(rgb, 0.8), stencil)


def _outline(stencil: Image.Image, width: float) -> Image.Image:
    """Soft line of about `width` pixels along a mask's edge: where the blurred mask is about one half."""
    blurred = stencil.filter(ImageFilter.GaussianBlur(width))
    # At a straight edge the blurred value falls by 1 / (sqrt(2 pi) width) a pixel; the ramp is one pixel wide at each
    # side.
    slope = 1 / (math.sqrt(2 * math.pi) * width)
    return blurred.point(
        [round(255 * min(1.0, max(0.0, width / 2 + 0.5 - abs(v / 255 - 0.5) / slope))) for v in range(256)]
    )


def cutout(image: ImageLike, mask: Any, *, feather: float = 0.7) -> Image.Image:
    """The object alone: RGBA of the image's size, transparent outside the mask, with a soft edge inside it.

    Transparent pixels are white, so that no background stays in the file.

    Args:
        image: image `(H, W)`.
        mask: bool `(H, W)`, true on the object.
        feather: width of the soft edge in pixels; 0 for a hard one.

    Raises:
        InputError: a mask that does not fit its image, or is not bool.
    """
    rgb = _as_rgb(image)
    alpha = _as_stencil(mask, rgb.size)
    if feather > 0:
        # Just inside a straight edge the blurred mask is at least 0.7, so only that pixel is softened, and thin parts
        # stay visible.
        soft = alpha.filter(ImageFilter.GaussianBlur(feather)).point([min(255, round(v / 0.85)) for v in range(256)])
        alpha = Image.composite(soft, Image.new("L", rgb.size, 0), alpha)
    result = Image.new("RGBA", rgb.size, (255, 255, 255, 0))
    result.paste(rgb, mask=alpha.point([0] + [255] * 255))
    result.putalpha(alpha)
    return result


def on_checkerboard(cut: Image.Image, *, square: int = 8) -> Image.Image:
    """An RGBA cutout on a light checkerboard with squares of so many pixels, as RGB."""
    rows, columns = np.ogrid[: cut.height, : cut.width]
    board = np.where((rows // square + columns // square) % 2, np.uint8(255), np.uint8(226))
    result = Image.fromarray(board).convert("RGB")
    result.paste(cut, mask=cut.getchannel("A"))
    return result


def overview(
    images: Sequence[ImageLike],
    masks: Sequence[Any] | None = None,
    labels: Sequence[str] | None = None,
    odd: Sequence[int] = (),
) -> Image.Image:
    """A contact sheet: each image with its object outlined, below it the cutout, below that its label.

    Args:
        images: N images of any sizes.
        masks: N bool masks, each of its image's size; without them the sheet shows the images alone.
        labels: N short texts.
        odd: numbers of images that do not belong: their tiles are framed, and their labels say so.

    Raises:
        InputError: no images, or lists of different lengths, or masks that do not fit.
    """
    count = len(images)
    if not count:
        raise InputError("An overview needs at least one image.")
    for values, what in ((masks, "masks"), (labels, "labels")):
        if values is not None and len(values) != count:
            raise InputError(f"{count} images need {count} {what}, not {len(values)}.")
    parts = 1 if masks is None else 2
    row_count = math.ceil(count / max(1, round(math.sqrt(1.5 * count * parts))))  # a sheet of about 3:2
    columns = math.ceil(count / row_count)  # no single image alone in the last row
    cell = max(48, min(_CELL, (_MAX_WIDTH - _MARGIN) // columns - _MARGIN))
    tiles = [_tile(image, None if masks is None else masks[number], cell) for number, image in enumerate(images)]

    font_size = max(11, cell // 18)
    font = ImageFont.load_default(font_size)
    label_height = 0 if labels is None else round(font_size * 1.9)
    inner = _MARGIN // 3
    heights = [max(tile[0].height for tile in tiles[start : start + columns]) for start in range(0, count, columns)]
    row_heights = [height * parts + inner * (parts - 1) + label_height + _MARGIN for height in heights]
    sheet = Image.new("RGB", (columns * (cell + _MARGIN) + _MARGIN, sum(row_heights) + _MARGIN), _SHEET_COLOR)
    draw = ImageDraw.Draw(sheet)
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        left, top = _MARGIN + column * (cell + _MARGIN), _MARGIN + sum(row_heights[:row])
        for part, image in enumerate(tile):
            # Images stand on a common line, cutouts hang from it.
            offset = heights[row] - image.height if part == 0 and parts == 2 else 0
            place = (left + (cell - image.width) // 2, top + part * (heights[row] + inner) + offset)
            sheet.paste(image, place)
        if number in odd:
            frame = (left - inner, top - inner, left + cell + inner, top + row_heights[row] - _MARGIN + inner)
            draw.rectangle(frame, outline=_ODD_COLOR, width=max(2, inner // 2))
        if labels is not None:
            label, fill = str(labels[number]), (60, 60, 60)
            if number in odd:
                label, fill = f"odd one out: {label}", _ODD_COLOR
            middle = (left + cell / 2, top + row_heights[row] - _MARGIN - label_height / 2)
            draw.text(middle, _shortened(label, font, cell), fill=fill, font=font, anchor="mm")
    return sheet


def _tile(image: ImageLike, mask: Any, cell: int) -> list[Image.Image]:
    """An image at most `cell` pixels a side; with a mask, the image with its object outlined and the cutout."""
    rgb = _as_rgb(image)
    scale = cell / max(rgb.size)
    small = _resized(rgb, (max(1, round(rgb.width * scale)), max(1, round(rgb.height * scale))))
    if mask is None:
        return [small]
    soft = _as_stencil(mask, rgb.size).resize(small.size, Image.Resampling.BILINEAR)
    cut = small.copy()
    cut.putalpha(soft)
    return [overlay_mask(small, np.asarray(soft) >= 128, alpha=0.12, fade=0.55), on_checkerboard(cut)]


def _shortened(text: str, font: Any, width: int) -> str:
    """The text, on one line, cut with an ellipsis where it is wider than `width` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
