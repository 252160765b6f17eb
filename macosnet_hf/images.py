"""Images of any mode to upright RGB, and the formats and sizes that are read.

The module travels with the model to the Hub and needs PIL and numpy only.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from .errors import InputError

# The formats that are read from files, the common ones first. Left out on purpose: EPS and PDF (PIL would start
# Ghostscript on an untrusted file) and formats without a signature (TGA, PCX), which read random bytes as an image.
COMMON_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
FURTHER_FORMATS = ("AVIF", "HEIF", "JPEG2000", "ICO", "PSD", "SGI")  # HEIF where pillow-heif is installed
MAX_PIXELS = 100_000_000  # an image with more is refused before it is decoded
_OVERSHOOT = 0.25
_TWELVE_BITS = 4095
_BAND_PIXELS = 1 << 20  # of a large image that are converted at once
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PROFILED_MODES = {"L": "RGB", "RGB": "RGB", "RGBA": "RGBA", "CMYK": "RGB"}  # and what they become in sRGB


def open_image(file: str | IO[bytes]) -> Image.Image:
    """Opens an image of the formats that are read; nothing is decoded yet.

    Args:
        file: a path, or a seekable binary file, which is read from its start.

    Raises:
        UnidentifiedImageError: if it is none, and whatever else PIL raises.
    """
    try:
        return Image.open(file, formats=COMMON_FORMATS)
    except UnidentifiedImageError:
        Image.init()
        reads_heif()
        return Image.open(file, formats=[known for known in FURTHER_FORMATS if known in Image.OPEN])


@functools.cache
def reads_heif() -> bool:
    """Whether HEIC, the images of iPhones, can be read: where `pillow-heif` is installed, which is registered here."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def exif_orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) where there is none or it makes no sense."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        # A damaged block, on which PIL raises many kinds of errors (struct.error, SyntaxError, ...). The pixels are
        # sound, and any viewer would show them.
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def load_pixels(image: Image.Image) -> None:
    """Reads the pixels of an image that a caller has opened.

    PIL (12.3) maps an uncompressed greyscale TIFF file into memory with the sides that it has once it is turned, which
    mixes its rows up. Without the file's name it reads the pixels one by one.
    """
    name = getattr(image, "filename", "")
    if image.format != "TIFF" or not name:
        image.load()
        return
    image.filename = ""  # type: ignore[attr-defined]  # of ImageFile
    try:
        image.load()
    finally:
        image.filename = name  # type: ignore[attr-defined]


def upright_rgb(image: Image.Image, orientation: int | None = None) -> Image.Image:
    """An image of any mode as a new, upright image of mode "RGB" without EXIF, so that it is not turned twice.

    Colours of an ICC profile, such as a phone's Display P3, are converted to sRGB; a broken profile is ignored.
    Transparency is laid on white. 16-bit greyscale is scaled from 0..65535 to 0..255, not clipped. 32-bit integers are
    taken as 8-bit (values a quarter beyond are clipped) or, with more than 12 bits, as 16-bit where they fit,
    floating-point images as 0..1 or 0..255 (see [`white_level`]); other images are stretched from their smallest to
    their largest value.

    Large images are converted in bands, which takes little memory beside the image and the new one.

    Args:
        image: loaded, otherwise not changed.
        orientation: how its pixels lie, 1 to 8, where the caller has read that already.
    """
    load_pixels(image)  # before the orientation is read: TIFF turns its pixels itself while loading
    orientation = exif_orientation(image) if orientation is None else orientation
    wide = image.mode.startswith("I") or image.mode == "F"
    upright = _by_bands(image, _eight_bits(image) if wide else _to_rgb)
    upright.info = {}
    return turned(upright, orientation)


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """An image that was stored with an EXIF orientation, upright and in its own mode; the image itself for 1.

    PIL's `exif_transpose` writes the EXIF block again, which fails where it is damaged.
    """
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """An image in bands from top to bottom, each with its first row; a small one as it is."""
    rows = max(1, _BAND_PIXELS // image.width)
    if image.height <= rows:
        yield 0, image
        return
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _by_bands(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """A new image of mode "RGB": what `convert`, which looks at each pixel alone, makes of the image."""
    if image.width * image.height <= _BAND_PIXELS:
        return convert(image)
    upright = Image.new("RGB", image.size)
    for top, band in _bands(image):
        upright.paste(convert(band), (0, top))
    return upright


def _to_rgb(image: Image.Image) -> Image.Image:
    coloured = _in_srgb(image)
    # `convert` copies, also an RGB image.
    return _on_white(coloured) if coloured.has_transparency_data else coloured.convert("RGB")


def as_upright_rgb(image: Image.Image) -> Image.Image:
    """The image itself where it is upright RGB already, else [`upright_rgb`] of it: for callers that do not change it.

    A copy of 12 megapixels takes 48 MB.
    """
    load_pixels(image)
    if image.mode == "RGB" and not image.has_transparency_data and exif_orientation(image) == 1 and not _to_srgb(image):
        return image
    return upright_rgb(image)


def _in_srgb(image: Image.Image) -> Image.Image:
    """An image with its colours in sRGB; the image itself where they are, or its profile cannot be used."""
    transparent = image.has_transparency_data and image.mode != "RGBA"  # as one colour, or of a palette
    if transparent and image.mode in ("L", "LA"):
        grey = image.convert("L")
        grey.info = {"icc_profile": image.info.get("icc_profile")}
        of_grey = _to_srgb(grey)
        if of_grey is not None:
            coloured = of_grey.apply(grey)
            coloured.putalpha(image.convert("RGBA").getchannel("A"))
            return coloured
    if image.info.get("icc_profile") and (transparent or image.mode not in _PROFILED_MODES):
        image = image.convert("RGBA" if transparent else "RGB")
    transform = _to_srgb(image)
    return image if transform is None else transform.apply(image)


def _to_srgb(image: Image.Image) -> ImageCms.ImageCmsTransform | None:
    profile = image.info.get("icc_profile")
    usable = isinstance(profile, bytes) and image.mode in _PROFILED_MODES
    return _profile_to_srgb(profile, image.mode) if usable else None


@functools.lru_cache(maxsize=8)
def _profile_to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The conversion of an ICC profile's colours to sRGB; None where it changes nothing or the profile is broken."""
    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            mode,
            _PROFILED_MODES[mode],
            flags=ImageCms.Flags.NOCACHE,  # images are read by several threads
        )
        if mode == "CMYK":
            return transform
        # Most profiles are sRGB, under many names.
        levels = np.linspace(0, 255, 6, dtype=np.uint8)
        colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
        samples = Image.fromarray(colours).convert(mode)
        before, after = (np.asarray(each.convert("RGB"), dtype=int) for each in (samples, transform.apply(samples)))
        return None if np.abs(after - before).max() <= 1 else transform
    except Exception:  # LittleCMS and PIL raise many kinds; a viewer shows the pixels as they are
        return None


def white_level(values: np.ndarray) -> float | None:
    """The value of white, 1 or 255, in floating-point pixels (all finite); None if they have another range, as 0..17.6.

    Both ranges may be exceeded by a quarter at both ends, since a cubic filter overshoots. Whole numbers of 0..255 are
    pixels of 8 bits, however dark.
    """
    return _white_level(float(values.min()), float(values.max()), lambda: _is_whole(values))


def _white_level(low: float, high: float, whole: Callable[[], bool]) -> float | None:
    for white, brightest in ((1.0, 0.0), (255.0, 254.0)):
        if low >= -_OVERSHOOT * white and brightest <= high <= (1 + _OVERSHOOT) * white:
            return white
    return 255.0 if low >= 0 and high <= 255 and whole() else None


def as_shares(values: np.ndarray, what: str) -> np.ndarray:
    """Values in [0, 1], such as an alpha, as float32. What a cubic filter overshoots, up to a quarter, is clipped.

    Args:
        values: of any shape.
        what: their name in the error.

    Raises:
        InputError: for other values, which eight bits would turn around: 1.1 would be almost 0.
    """
    shares = np.asarray(values, dtype=np.float32)
    low, high = (float(shares.min()), float(shares.max())) if shares.size else (0.0, 1.0)
    if not (low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT):  # also where one is no number
        raise InputError(f"{what} must be finite numbers in [0, 1].")
    return shares.clip(0, 1) if low < 0 or high > 1 else shares  # which may be as large as an image


def _on_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    white = Image.new("RGB", rgba.size, (255, 255, 255))
    white.paste(rgba, mask=rgba.getchannel("A"))
    return white


def _eight_bits(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """The conversion of wide greyscale of PIL mode "I", "I;16*" or "F" to RGB that suits all pixels of an image."""
    mode = image.mode
    ends = [(part.min(), part.max()) for part in (_finite(band) for _, band in _bands(image)) if part.size]
    low, high = (float(min(low for low, _ in ends)), float(max(high for _, high in ends))) if ends else (0.0, 0.0)
    white: float | None
    if mode == "F":
        white = _white_level(low, high, lambda: all(_is_whole(_finite(band)) for _, band in _bands(image)))
    else:
        eight = mode == "I" and high <= 255 * (1 + _OVERSHOOT)
        sixteen = not eight and (mode != "I" or high > _TWELVE_BITS)  # less would be black in the range of 16 bits
        white = 255.0 if eight else 65535.0
        fits = low >= -_OVERSHOOT * white if eight else sixteen and low >= 0 and high <= white
        white = white if fits else None
    offset, scale = (0.0, 255.0 / white) if white is not None else (low, 255.0 / max(high - low, 1e-12))
    halved = high - low > float(np.finfo(np.float32).max)  # found by hypothesis: the difference has no place in 32 bits
    if halved:
        offset, scale = offset / 2, scale * 2

    clear = image.info.get("transparency")  # a grey, of a PNG
    profile = image.info.get("icc_profile")
    to_srgb = _profile_to_srgb(profile, "L") if isinstance(profile, bytes) else None

    def convert(band: Image.Image) -> Image.Image:
        stored = values = np.asarray(band)
        if mode == "F":
            values = np.nan_to_num(values.astype(np.float32), nan=low, posinf=high, neginf=low)
        values = values / 2 if halved else values
        levels = (values.astype(np.float32) - np.float32(offset)) * np.float32(scale) + 0.5
        grey = Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))
        shown = grey.convert("RGB") if to_srgb is None else to_srgb.apply(grey)
        if isinstance(clear, int):
            shown.paste((255, 255, 255), mask=Image.fromarray(stored == clear))
        return shown

    return convert


def _finite(band: Image.Image) -> np.ndarray:
    values = np.asarray(band)
    return values[np.isfinite(values)] if band.mode == "F" else values


def _is_whole(values: np.ndarray) -> bool:
    return bool((values == np.rint(values)).all())
