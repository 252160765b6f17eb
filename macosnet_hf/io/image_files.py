"""Reads images of any source and kind as upright RGB images; what cannot be read is an error of one sentence.

Nowhere else in the package are bytes from outside decoded.
"""

from __future__ import annotations

import functools
import io
import os
import re
import stat
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from ..errors import ImageError
from ..images import MAX_PIXELS, exif_orientation, open_image, reads_heif, upright_rgb
from .decoding_cost import MAX_DECODED_BYTES, OF_WEBP, REDUCIBLE, check_bytes, check_cost, late_exif, webp_size

ImageFile: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes]"
ImageSource: TypeAlias = "ImageFile | Image.Image | np.ndarray"

MIN_SIDE = 2

# Of the files of a folder, those with these suffixes are images (a file that is named may have any).
_HEIF_SUFFIXES = (".heic", ".heif", ".hif")
IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif", *_HEIF_SUFFIXES)
)

# `warnings.catch_warnings` changes the state of the whole process, so two threads must not be inside it at once.
_WARNINGS_LOCK = threading.Lock()


def is_image_file(path: Path) -> bool:
    """Whether a file of a folder is an image by its name; hidden files are none, such as the `._name.jpg` of a Mac."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def load_image(
    source: ImageSource,
    *,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_DECODED_BYTES,
    min_side: int = MIN_SIDE,
    reduced_to: int | None = None,
) -> Image.Image:
    """Reads an image of any source and kind, upright and in RGB.

    Applies the EXIF orientation, lays transparent images on white, converts every other mode to 8-bit RGB (see
    [`~macosnet_hf.images.upright_rgb`]), and takes the first frame of an animation. The size, and what decoding will
    cost, are checked in the header, before any pixel is decoded. The result carries no EXIF block, so nothing can turn
    it twice.

    Args:
        source: a path, the bytes of a file, a binary file object (read from its start, left open), an image (not
            changed) or an array `(H, W)`, `(H, W, 1)`, `(H, W, 3)` or `(H, W, 4)` of uint8.
        max_pixels: an image with more pixels than this is refused. PIL's own limit (`2 *
            PIL.Image.MAX_IMAGE_PIXELS`, 179 megapixels unless changed) holds as well.
        max_bytes: a file that takes more memory than this until it is upright RGB is refused. A pixel takes 8 to 24
            bytes, which depends on the format; those of 8 bits are below up to 100 megapixels.
        min_side: an image with a side shorter than this many pixels is refused: it can show no object.
        reduced_to: if given, a JPEG is decoded at 1/2, 1/4 or 1/8 of its size as long as its shorter side stays at
            least this many pixels, which is several times faster and smaller. Coordinates then refer to the reduced
            image; [`load_with_size`] gives the size of the whole one as well. JPEG 2000 is reduced likewise where it
            would be refused otherwise; other formats are not affected.

    Returns:
        An image of mode "RGB", independent of `source`.

    Raises:
        ImageError: the source is missing, no image, damaged, too large or too small. The text names the file.
    """
    name = _name(source)
    if isinstance(source, Image.Image):
        _check_size(source.size, name, max_pixels, min_side)
        with _damage_as_image_error(name):
            return upright_rgb(source)
    if isinstance(source, np.ndarray):
        return _from_array(source, name, max_pixels, min_side)
    limits = {"max_pixels": max_pixels, "max_bytes": max_bytes, "min_side": min_side}
    return load_with_size(source, reduced_to=reduced_to, **limits)[0]


def load_with_size(
    source: ImageFile,
    *,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_DECODED_BYTES,
    min_side: int = MIN_SIDE,
    reduced_to: int | None = None,
    longer_side: int | None = None,
) -> tuple[Image.Image, tuple[int, int]]:
    """An image file as [`load_image`] reads it, and the size (height, width) of the whole upright image.

    The file is opened once and its orientation read once, so both always agree.

    Args:
        source, max_pixels, max_bytes, min_side, reduced_to: as in [`load_image`].
        longer_side: instead of `reduced_to`, the pixels that the longer side must keep.
    """
    with _opened(source, max_pixels, min_side, max_bytes) as (image, stream):
        orientation, whole = _stored_orientation(image), image.size
        if longer_side is not None:
            reduced_to = round(longer_side * min(whole) / max(whole))
        _decode(image, stream, _name(source), max_pixels, max_bytes, reduced_to)
        if image.size == whole or image.format not in REDUCIBLE:  # some containers (ICO) tell their true size only now
            upright = upright_rgb(image, orientation)
            return upright, (upright.height, upright.width)
        reduction = 2 ** round(np.log2(max(whole) / max(image.size)))
        shown = whole[0] / reduction, whole[1] / reduction
        if shown != image.size:
            # Where the size is no multiple of the reduction, the last column or row shows what the encoder filled up.
            image = image.resize(image.size, Image.Resampling.BICUBIC, box=(0, 0, *shown))
        return upright_rgb(image, orientation), whole if orientation >= 5 else whole[::-1]


def save_image(image: Image.Image, path: str | os.PathLike[str] | IO[bytes], **options: Any) -> None:
    """Writes an image whose colours are sRGB, and says so in the file.

    Args:
        image: of mode "RGB" or "RGBA".
        path: of the file, or a file object.
        options: of PIL's `save`.
    """
    image.save(path, icc_profile=_srgb_profile(), **options)


@functools.cache
def _srgb_profile() -> bytes:
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[24:36] = struct.pack(">6H", 2000, 1, 1, 0, 0, 0)  # the time now: equal images would be unequal files
    return bytes(profile)


def load_as_stored(
    source: ImageFile, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_DECODED_BYTES
) -> Image.Image:
    """Reads an image whose values have a meaning, such as a mask: not turned, in its own mode.

    Raises:
        ImageError: as [`load_image`]; one pixel is enough here.
    """
    with _opened(source, max_pixels, 1, max_bytes) as (image, stream):
        _decode(image, stream, _name(source), max_pixels, max_bytes)
        return image


def image_size(source: ImageFile, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """The size `(height, width)` that [`load_image`] would return for a file, read from its header without decoding it.

    Raises:
        ImageError: as [`load_image`], as far as the header shows.
    """
    with _opened(source, max_pixels) as (image, _):
        return upright_size(image)


def _stored_orientation(image: Image.Image) -> int:
    """The orientation of an open file's pixels, read once and before they are decoded: 1 where PIL turns them itself.

    Decoding may change what PIL knows, as where a PNG has a second EXIF block behind its pixels.
    """
    return 1 if image.format == "TIFF" else exif_orientation(image)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """The size `(height, width)` that an open image has once it is upright."""
    # The orientations 5 to 8 lie on their side.
    return (image.width, image.height) if _stored_orientation(image) >= 5 else (image.height, image.width)


def image_format(source: ImageFile, *, max_pixels: int = MAX_PIXELS) -> str:
    """PIL's name of a file's format, such as "JPEG", read from its header.

    Raises:
        ImageError: as [`load_image`], as far as the header shows.
    """
    with _opened(source, max_pixels) as (image, _):
        return image.format or ""


@contextmanager
def _opened(
    source: ImageFile, max_pixels: int, min_side: int = MIN_SIDE, max_bytes: int = MAX_DECODED_BYTES
) -> Iterator[tuple[Image.Image, IO[bytes]]]:
    """An image file whose header is read and checked, and its bytes; nothing is decoded yet."""
    name = _name(source)
    with _stream(source, name) as stream:
        if (size := webp_size(stream)) is not None:
            _check_size(size, name, max_pixels, min_side)
            check_bytes(OF_WEBP * size[0] * size[1], name, max_bytes)
        stream.seek(0)
        image = _open_header(stream, name, max_pixels)
        with _damage_as_image_error(name), image:
            _check_size(image.size, name, max_pixels, min_side)
            if image.format == "PNG":
                _find_exif(image, stream, name)
            yield image, stream


def _find_exif(image: Image.Image, stream: IO[bytes], name: str) -> None:
    """Lets the EXIF block of a PNG be known without decoding: where none is before the pixels, PIL decodes them."""
    if "exif" in image.info:
        return
    position = stream.tell()
    image.info["exif"] = late_exif(stream, name)
    stream.seek(position)
    if not image.info["exif"] and (text := image.info.get("Raw profile type exif")):  # of old versions of ImageMagick
        image.info["exif"] = bytes.fromhex("".join(text.split("\n")[3:]))


def _decode(
    image: Image.Image,
    stream: IO[bytes],
    name: str,
    max_pixels: int,
    max_bytes: int,
    reduced_to: int | None = None,
) -> None:
    turned = exif_orientation(image) > 1
    check_cost(image, stream, name, max_bytes=max_bytes, turned=turned, reduced_to=reduced_to)
    image.load()
    _check_size(image.size, name, max_pixels, 1)  # some containers (ICO) tell their true size only now


def _name(source: object) -> str:
    """The source's name in errors: its path where there is one."""
    if isinstance(source, str | os.PathLike):
        return f"'{os.fspath(source)}'"
    name = getattr(source, "filename", None) or getattr(source, "name", None)
    return f"'{name}'" if isinstance(name, str) and name else "the image"


@contextmanager
def _stream(source: Any, name: str) -> Iterator[IO[bytes]]:
    """A seekable binary stream over the source, closed at the end unless it is the caller's."""
    if isinstance(source, bytes | bytearray | memoryview):
        with io.BytesIO(source) as memory:
            _refuse_empty(memory, name)
            yield memory
    elif isinstance(source, str | os.PathLike):
        with _open_file(source, name) as file:
            _refuse_empty(file, name)
            yield file
    elif hasattr(source, "read"):
        stream = _as_seekable(source, name)
        _refuse_empty(stream, name)
        yield stream
    else:
        raise ImageError(
            f"An image is a path, bytes, a file object, an image or an array, not {type(source).__name__}."
        )


def _open_file(path: str | os.PathLike[str], name: str) -> IO[bytes]:
    text = os.fspath(path)
    if isinstance(text, str) and re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", text):
        raise ImageError(f"{name} is a web address; download the image first and give the file.")
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise ImageError(f"{name} is a folder, not an image.")
        if not stat.S_ISREG(mode):  # opening a pipe or a device could wait forever
            raise ImageError(f"{name} is not a regular file.")
        return open(path, "rb")
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(f"{name} does not exist.") from error
    except PermissionError as error:
        raise ImageError(f"{name} may not be read (permission denied).") from error
    except OSError as error:
        raise ImageError(f"{name} cannot be opened ({error.strerror or error}).") from error
    except ValueError as error:  # a path with a null byte
        raise ImageError(f"{name!r} is not a usable path ({error}).") from error


def _as_seekable(source: IO[bytes], name: str) -> IO[bytes]:
    """The caller's file object where it is seekable, otherwise its bytes in memory."""
    try:
        if getattr(source, "seekable", lambda: False)():
            return source
        return io.BytesIO(source.read())
    except (OSError, ValueError, TypeError) as error:
        raise ImageError(f"{name} cannot be read as a file of bytes ({error}).") from error


def _refuse_empty(stream: IO[bytes], name: str) -> None:
    try:
        stream.seek(0)
        start = stream.read(1)
        stream.seek(0)
    except (OSError, ValueError) as error:
        raise ImageError(f"{name} cannot be read ({error}).") from error
    if isinstance(start, str):
        raise ImageError(f"{name} was opened as text; open it in binary mode ('rb').")
    if not start:
        raise ImageError(f"{name} is empty.")


def _open_header(stream: IO[bytes], name: str, max_pixels: int) -> Image.Image:
    """Opens an image without decoding it."""
    with _damage_as_image_error(name), _WARNINGS_LOCK, warnings.catch_warnings():
        # PIL warns from 89 megapixels on and refuses more than 179; the limit here is `max_pixels`.
        warnings.simplefilter("ignore")
        try:
            return open_image(stream)
        except Image.DecompressionBombError as error:
            limit = min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or max_pixels))
            raise ImageError(
                f"{name} has more than {_megapixels(limit)} megapixels; make it smaller and try again."
            ) from error
        except UnidentifiedImageError as error:
            stream.seek(0)
            raise ImageError(f"{name} {_what_it_is(stream.read(12), name)}.") from error


def _what_it_is(start: bytes, name: str) -> str:
    """The fault of a file that PIL does not know, and the way out, from its first 12 bytes and its name."""
    brand = start[8:] if start[4:8] == b"ftyp" else b""
    heif = brand.startswith((b"he", b"mif", b"msf"))
    if brand.startswith(b"avi") or (heif and reads_heif()):
        return "is a HEIC or AVIF image that is damaged, cut off or of an unusual kind and cannot be read"
    if heif:
        return "is a HEIC image, which cannot be read without pillow-heif; install that, or save it as JPEG"
    if brand or name.strip("'").lower().endswith((".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm")):
        return "is a film, not an image; save one of its frames as JPEG"
    if start.startswith((b"PK", b"\x1f\x8b", b"Rar!", b"7z")):
        return "is an archive, not an image; unpack it and give the images or their folder"
    return "is not an image in a format that can be read, or its start is damaged; save it as JPEG or PNG"


def _check_size(size: tuple[int, int], name: str, max_pixels: int, min_side: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise ImageError(
            f"{name} has {width} x {height} pixels, more than {_megapixels(max_pixels)} megapixels; "
            "make it smaller and try again."
        )
    if min(width, height) < min_side:
        raise ImageError(f"{name} has only {width} x {height} pixels, too few to show an object.")


def _megapixels(pixels: int) -> str:
    return f"{pixels / 1e6:.6g}"


@contextmanager
def _damage_as_image_error(name: str) -> Iterator[None]:
    """Turns whatever PIL raises on damaged bytes into an ImageError.

    Its decoders raise OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error, SystemError and
    more, depending on which byte is wrong; no list is complete.
    """
    try:
        yield
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError(f"{name} needs more memory than there is, or is damaged.") from error
    except Exception as error:
        reason = str(error).strip().rstrip(".").splitlines()
        detail = f" ({reason[0]})" if reason else ""
        raise ImageError(f"{name} is damaged, cut off or of an unusual kind and cannot be read{detail}.") from error


def _from_array(array: np.ndarray, name: str, max_pixels: int, min_side: int) -> Image.Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise ImageError(
            "An array image must be uint8 of shape (height, width), or (height, width, 1, 3 or 4), "
            f"not {array.dtype} of shape {tuple(array.shape)}."
        )
    _check_size((array.shape[1], array.shape[0]), name, max_pixels, min_side)
    if array.ndim == 3 and channels == 1:
        array = array[:, :, 0]
    return upright_rgb(Image.fromarray(np.ascontiguousarray(array)))
