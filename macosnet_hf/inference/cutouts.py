"""Cutouts: soft alpha at an image's own resolution, the object's colours without the background, and what lies behind.

Alpha is the closed-form matte (Levin, Lischinski and Weiss, "A closed-form solution to natural image matting", 2008) in
a band around the mask's edge. Products with its Laplacian are box filters (He, Sun and Tang, "Fast matting using large
kernel matting Laplacian matrices", 2010), so that OpenCV is enough. `pymatting` solves the same equation, but its first
import compiles for longer than a command runs, and it brings 210 MB with numba.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageFilter

from ..drawing import cutout
from ..errors import InputError
from ..images import as_shares
from ..io.image_files import save_image
from ..refinement import opencv

if TYPE_CHECKING:
    from ..hints import PlacedHint

EDGES = ("matting", "hard")
FORMATS = ("png", "webp")
BLUR = "blur"

# The matte is solved on a copy of the object's surroundings of at most so many pixels; a linear function of the colours
# in each window takes it to full size.
_WORKING_PIXELS = 400_000
_MARGIN = 0.1  # of the surroundings, as a share of the image's longer side
_BAND = 0.012  # half width of the band, as a share of the longer side
_RADIUS = 1  # of the windows in which alpha is a linear function of the colours
_EPSILON = 1e-4  # variance of colours in [0, 1] that counts as none
# Weights of the mask at its edge and at the band's limits. Without one, low contrast gives fog as wide as the band.
_EDGE_WEIGHT = 0.005
_LIMIT_WEIGHT = 0.1
_ITERATIONS = 40
_TOLERANCE = 1e-3
_LEAST_ALPHA = 0.03  # less is the noise of the solution, as is what lacks as little of 1
_STRIP_PIXELS = 1 << 20  # of a large image that are worked on at once
_BLUR_SHARE = 0.02  # standard deviation of a blurred background, as a share of the longer side
_LARGEST_WEBP = 16_383  # pixels a side


@dataclass(frozen=True)
class CutoutStyle:
    """How cutouts look.

    Attributes:
        edges: `"matting"`, soft in hair and motion blur, without the background's colours; or `"hard"`, the mask's.
        trim: whether to crop to the object.
        background: what lies behind: nothing, a colour as CSS writes it, or `"blur"`, the blurred image.
        format: `"png"` or `"webp"`, lossless both.

    Raises:
        InputError: for any other value.
    """

    edges: str = "matting"
    trim: bool = False
    background: str | None = None
    format: str = "png"

    def __post_init__(self) -> None:
        for name, value, known in (("edges", self.edges, EDGES), ("format", self.format, FORMATS)):
            if value not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}; got {value!r}.")
        if self.background not in (None, BLUR):
            self.color()

    def color(self) -> tuple[int, ...]:
        """The background's colour (red, green, blue)."""
        try:
            return ImageColor.getcolor(str(self.background), "RGB")  # type: ignore[return-value]
        except ValueError as error:
            raise InputError(
                f"{self.background!r} is no background; give a colour such as white or #ff8800, or {BLUR}."
            ) from error

    def save(self, image: Image.Image, path: Any) -> None:
        """Writes a cutout in this format.

        Raises:
            InputError: if WebP cannot hold so large an image.
        """
        if self.format == "png":
            save_image(image, path, compress_level=1)
            return
        if max(image.size) > _LARGEST_WEBP:
            raise InputError(f"WebP holds {_LARGEST_WEBP} pixels a side; {image.width}x{image.height} need PNG.")
        save_image(image, path, format="WEBP", lossless=True, quality=0, method=0)  # fastest


def make_cutout(
    image: Image.Image,
    soft_mask: np.ndarray,
    mask: np.ndarray,
    style: CutoutStyle | None = None,
    hint: PlacedHint | None = None,
) -> Image.Image:
    """The object alone: RGBA, transparent outside of it, or RGB where the style has a background.

    Args:
        image: upright RGB `(H, W)`.
        soft_mask: `(h, w)` float32 in [0, 1] of any size; the object is where it is 0.5 or more.
        mask: `(H, W)` bool, the same as a hard mask.
        style: how it looks.
        hint: which alpha obeys.
    """
    style = style or CutoutStyle()
    if style.edges == "hard":
        cut = cutout(image, mask)
    else:
        alpha = alpha_matte(image, soft_mask, hint)
        cut = cutout_by_alpha(image, alpha)
    box = cut.getchannel("A").getbbox() if style.trim else None
    if style.background is not None:
        if style.background == BLUR:
            behind = image.filter(ImageFilter.GaussianBlur(_BLUR_SHARE * max(image.size)))
        else:
            behind = Image.new("RGB", image.size, style.color())
        behind.paste(cut, mask=cut.getchannel("A"))
        cut = behind
    return cut.crop(box) if box else cut


class _Surroundings(NamedTuple):
    """Where a matte is solved: the box (left, top, right, bottom) of an image, and a copy of it.

    Attributes:
        rgb: `(h, w, 3)` float32 in [0, 1].
        soft: `(h, w)` float32 soft mask.
        scale: pixels of the copy for one of the image.
    """

    box: tuple[int, int, int, int]
    rgb: np.ndarray
    soft: np.ndarray
    scale: float

    def labels(self, hint: PlacedHint, image: Image.Image) -> np.ndarray:
        """What a hint fixes in the copy: see [`~macosnet_hf.hints.PlacedHint.labels`]."""
        left, top, right, bottom = self.box
        share = (left / image.width, top / image.height, right / image.width, bottom / image.height)
        return hint.cropped(share).labels((self.soft.shape[0], self.soft.shape[1]))


def _surroundings(image: Image.Image, soft_mask: np.ndarray) -> _Surroundings | None:
    """The object with a margin, reduced; None for a mask without an object."""
    rows, columns = (np.flatnonzero((soft_mask >= 0.5).any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return None
    margin = _MARGIN * max(image.size)
    ends = []
    for found, cells, length in ((columns, soft_mask.shape[1], image.width), (rows, soft_mask.shape[0], image.height)):
        start, end = found[0] * length / cells - margin, (found[-1] + 1) * length / cells + margin
        ends.append((max(0, math.floor(start)), min(length, math.ceil(end))))
    (left, right), (top, bottom) = ends
    box = (left, top, right, bottom)
    scale = min(1.0, math.sqrt(_WORKING_PIXELS / ((right - left) * (bottom - top))))
    size = (max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale)))
    small = image.resize(size, Image.Resampling.BOX, box=box, reducing_gap=2.0)
    # Half-pixel centres, as everywhere: the box in cells of the mask.
    cells = (
        left * soft_mask.shape[1] / image.width,
        top * soft_mask.shape[0] / image.height,
        right * soft_mask.shape[1] / image.width,
        bottom * soft_mask.shape[0] / image.height,
    )
    soft = Image.fromarray(soft_mask.astype(np.float32)).resize(size, Image.Resampling.BILINEAR, box=cells)
    return _Surroundings(box, np.asarray(small, np.float32) / 255, np.asarray(soft), scale)


def alpha_matte(image: Image.Image, soft_mask: np.ndarray, hint: PlacedHint | None = None) -> np.ndarray:
    """Alpha `(H, W)` float32 in [0, 1] of an object at its image's own size; 0 everywhere for a mask without object.

    The trimap comes from the soft mask: what lies outside of a band around its edge is object or background. The band
    is wide where the mask is uncertain, and narrow where it is sharp.

    Args:
        image: upright RGB `(H, W)`.
        soft_mask: `(h, w)` float32 in [0, 1] of any size; the object is where it is 0.5 or more.
        hint: in shares of the image; alpha is 1 around its included points, and 0 around excluded ones and outside of
            its box.

    Raises:
        InputError: for a soft mask of another range.
    """
    cv2 = opencv()
    alpha = np.zeros((image.height, image.width), np.float32)
    small = _surroundings(image, as_shares(soft_mask, "A soft mask"))
    if small is None:
        return alpha
    lines = MattingLaplacian(small.rgb)
    hard = small.soft >= 0.5
    distance = _edge_distance(hard) / max(1.0, _BAND * max(image.size) * small.scale)
    # 4 s (1 - s) is 1 where the mask says nothing, and 0 where it is sure.
    unknown = distance <= 0.5 + 4 * small.soft * (1 - small.soft)
    if hint is not None:
        fixed = small.labels(hint, image)
        hard, unknown = np.where(fixed == 0, hard, fixed > 0), unknown & (fixed == 0)
    weight = _EDGE_WEIGHT + _LIMIT_WEIGHT * np.minimum(distance, 1.0) ** 2
    solved = solve_matte(lines, hard.astype(np.float32), unknown, weight.astype(np.float32))
    solved = ((solved - _LEAST_ALPHA) / (1 - 2 * _LEAST_ALPHA)).clip(0, 1)
    left, top, right, bottom = small.box
    if small.scale == 1:
        alpha[top:bottom, left:right] = solved
        return alpha
    slopes = np.dstack([lines.mean(part) for part in lines.fit(solved)])
    around = np.ones((3, 3), np.uint8)
    whole = cv2.erode((solved == 1).view(np.uint8), around)
    kind = np.where(whole == 0, 2 * cv2.dilate((solved > 0).view(np.uint8), around), 1).astype(np.uint8)
    for strip in _strips(image, small):
        kinds = strip.nearest(kind)
        part = strip.of(alpha)
        part[:] = kinds == 1
        places = np.nonzero(kinds == 2)
        line = strip.sample(slopes, places)
        part[places] = ((line[:, :3] * strip.pixels[places]).sum(axis=1) / 255 + line[:, 3]).clip(0, 1)
    return alpha


def cutout_by_alpha(image: Image.Image, alpha: np.ndarray) -> Image.Image:
    """RGBA of an image, with the object's own colours where it is transparent in part; white where it is not there.

    The colours are those of Forte ("Approximate fast foreground colour estimation", ICIP 2021): means of object and
    background nearby, corrected so that both together give the image's colour.

    Args:
        image: RGB `(H, W)`.
        alpha: `(H, W)` float32 in [0, 1].

    Raises:
        InputError: for an alpha of another range.
    """
    cv2 = opencv()
    alpha = as_shares(alpha, "Alpha")
    result = np.full((image.height, image.width, 4), (255, 255, 255, 0), np.uint8)
    small = _surroundings(image, alpha)
    if small is None:
        return Image.fromarray(result)
    inside = small.soft[..., None]
    front = back = small.rgb
    for size in (91, 7):
        blurred = [cv2.blur(part, (size, size)) for part in (front * inside, inside[..., 0])]
        near = blurred[0] / (blurred[1][..., None] + 1e-5)
        far = cv2.blur(back * (1 - inside), (size, size)) / (
            cv2.blur(1 - inside[..., 0], (size, size))[..., None] + 1e-5
        )
        front, back = (near + inside * (small.rgb - inside * near - (1 - inside) * far)).clip(0, 1), far
    both = np.dstack((front, back))
    for strip in _strips(image, small):
        own = strip.of(alpha)
        levels = (own * 255 + 0.5).astype(np.uint8)
        cut = strip.of(result)
        cut[..., 3] = levels
        # Nothing of the image stays where nothing of it is seen.
        np.copyto(cut[..., :3], strip.pixels, where=(levels > 0)[..., None])
        places = np.nonzero((levels > 0) & (levels < 255))
        near, far = np.split(strip.sample(both, places), 2, axis=1)
        share = own[places][:, None]
        colors = near + share * (strip.pixels[places] / np.float32(255) - share * near - (1 - share) * far)
        cut[..., :3][places] = (colors.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    return Image.fromarray(result)


class _Strip(NamedTuple):
    """Some rows of the box of an image, `(n, w)`.

    Attributes:
        rows, columns: where they lie in the image.
        pixels: uint8 `(n, w, 3)`.
        x, y: places of the columns `(w,)` and rows `(n,)` in the reduced copy, float32.
    """

    rows: slice
    columns: slice
    pixels: np.ndarray
    x: np.ndarray
    y: np.ndarray

    def of(self, values: np.ndarray) -> np.ndarray:
        """The part of a map of the whole image."""
        part: np.ndarray = values[self.rows, self.columns]
        return part

    def nearest(self, values: np.ndarray) -> np.ndarray:
        """A map of the copy at each pixel."""
        found: np.ndarray = values[(self.y + 0.5).astype(np.int64)][:, (self.x + 0.5).astype(np.int64)]
        return found

    def sample(self, values: np.ndarray, places: tuple[np.ndarray, ...]) -> np.ndarray:
        """Maps `(h, w, c)` of the copy, interpolated at N pixels (rows, columns) of the strip: `(N, c)`."""
        cv2 = opencv()
        count, width = len(places[0]), 1024  # OpenCV's remap gives at most 32,766 rows
        size = (count // width + 1, width)
        x, y = np.resize(self.x[places[1]], size), np.resize(self.y[places[0]], size)
        found = cv2.remap(values, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        return np.asarray(found.reshape(-1, values.shape[2])[:count])


def _strips(image: Image.Image, small: _Surroundings) -> Iterator[_Strip]:
    """The box of an image in strips."""
    left, top, right, bottom = small.box
    width, height = right - left, bottom - top
    x, y = (
        ((np.arange(length, dtype=np.float32) + 0.5) * (reduced / length) - 0.5)
        for length, reduced in ((width, small.soft.shape[1]), (height, small.soft.shape[0]))
    )
    step = max(1, _STRIP_PIXELS // width)
    for start in range(top, bottom, step):
        end = min(bottom, start + step)
        pixels = np.asarray(image.crop((left, start, right, end)))
        yield _Strip(slice(start, end), slice(left, right), pixels, x, y[start - top : end - top])


def _edge_distance(hard: np.ndarray) -> np.ndarray:
    """Distance in pixels of each pixel of a mask `(h, w)` bool to the nearest one of the other kind, float32."""
    cv2 = opencv()
    inside = hard.view(np.uint8)
    found: np.ndarray = cv2.distanceTransform(inside, cv2.DIST_L2, 5) + cv2.distanceTransform(
        1 - inside, cv2.DIST_L2, 5
    )
    return found


class MattingLaplacian:
    """The matting Laplacian of an image, as products with maps: L p = 0 where p is a linear function of the colours in
    every window of 3x3 pixels.

    Args:
        rgb: `(h, w, 3)` float32 in [0, 1].
        radius: of the windows.
        epsilon: variance of colours that counts as none.
    """

    def __init__(self, rgb: np.ndarray, radius: int = _RADIUS, epsilon: float = _EPSILON):
        self._side = (2 * radius + 1,) * 2
        self._box_filter = opencv().boxFilter
        self._colors = [np.ascontiguousarray(rgb[..., channel]) for channel in range(3)]
        self.count = self._sum(np.ones(rgb.shape[:2], np.float32))  # pixels in each window
        self._means = [self.mean(color) for color in self._colors]
        c = {
            (i, j): self.mean(self._colors[i] * self._colors[j]) - self._means[i] * self._means[j] + epsilon * (i == j)
            for i in range(3)
            for j in range(i, 3)
        }
        # The inverse of each window's symmetric covariance: adjugate by determinant.
        adjugate = {
            (0, 0): c[1, 1] * c[2, 2] - c[1, 2] ** 2,
            (0, 1): c[0, 2] * c[1, 2] - c[0, 1] * c[2, 2],
            (0, 2): c[0, 1] * c[1, 2] - c[0, 2] * c[1, 1],
            (1, 1): c[0, 0] * c[2, 2] - c[0, 2] ** 2,
            (1, 2): c[0, 1] * c[0, 2] - c[0, 0] * c[1, 2],
            (2, 2): c[0, 0] * c[1, 1] - c[0, 1] ** 2,
        }
        determinant = sum(c[0, i] * adjugate[0, i] for i in range(3))
        self._inverse = {place: value / determinant for place, value in adjugate.items()}

    def _sum(self, values: np.ndarray) -> np.ndarray:
        total: np.ndarray = self._box_filter(values, -1, self._side, normalize=False, borderType=0)  # zeros outside
        return total

    def mean(self, values: np.ndarray) -> np.ndarray:
        """The mean of a map `(h, w)` over the window around each pixel."""
        return self._sum(values) / self.count

    def fit(self, values: np.ndarray) -> list[np.ndarray]:
        """Slopes for red, green and blue, and the offset, of the linear function that fits a map best in each window:
        four maps `(h, w)`."""
        middle = self.mean(values)
        along = [
            self.mean(color * values) - mean * middle for color, mean in zip(self._colors, self._means, strict=True)
        ]
        slopes = [sum(self._inverse[min(i, j), max(i, j)] * along[j] for j in range(3)) for i in range(3)]
        return [*slopes, middle - sum(slope * mean for slope, mean in zip(slopes, self._means, strict=True))]

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """L p of a map p `(h, w)` float32."""
        *slopes, offset = self.fit(values)
        fitted = sum(self._sum(slope) * color for slope, color in zip(slopes, self._colors, strict=True))
        return self.count * values - fitted - self._sum(offset)


def solve_matte(lines: MattingLaplacian, known: np.ndarray, unknown: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The alpha that is `known` except where `unknown`, and there minimises a^T L a + sum of weight (a - known)^2.

    By conjugate gradients with the diagonal as preconditioner.

    Args:
        lines: of the image.
        known, weight: `(h, w)` float32.
        unknown: `(h, w)` bool.

    Returns:
        `(h, w)` float32 in [0, 1].
    """
    free = unknown.astype(np.float32)
    diagonal = lines.count + weight
    alpha = known.copy()
    residual = -lines(alpha) * free  # the term of the weights is 0 at the start
    direction = scaled = residual / diagonal
    error = first = float((residual * scaled).sum(dtype=np.float64))
    for _ in range(_ITERATIONS):
        if error <= _TOLERANCE**2 * first:
            break
        product = (lines(direction) + weight * direction) * free
        step = np.float32(error / float((direction * product).sum(dtype=np.float64)))
        alpha += step * direction
        residual = residual - step * product
        scaled = residual / diagonal
        before, error = error, float((residual * scaled).sum(dtype=np.float64))
        direction = scaled + np.float32(error / before) * direction
    return alpha.clip(0, 1)
