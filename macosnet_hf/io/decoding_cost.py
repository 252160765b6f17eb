"""What decoding an image will cost, from its header: bytes of memory, and parts of which a file may hold thousands.

Pixels alone say little: one of a JPEG takes 8 bytes until it is RGB, one of a WebP 20, and each further scan of a
progressive JPEG goes through all of its pixels again.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from typing import IO, NamedTuple, TypeVar

from PIL import Image

from ..errors import ImageError

T = TypeVar("T")

# From the header of an image to upright RGB. 8-bit images of 100 megapixels stay below, also those that are turned.
MAX_DECODED_BYTES = 1_250_000_000
MAX_SCANS = 100  # of a JPEG; cameras and optimisers write at most 18. One of 100 megapixels takes 0.014 s each
MAX_TILES, MAX_LAYERS = 4096, 100  # of a JPEG 2000: 4,096 tiles of 256 x 256 are 268 megapixels
MAX_CHUNKS = 100_000  # of a PNG; 30 MB in the usual 8 kB are 3,800

REDUCIBLE = ("JPEG", "MPO", "JPEG2000")  # formats that can be decoded at a fraction of their size
OF_WEBP = 20  # bytes of a pixel, most of them from the moment when the file is opened
_STORED = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}  # bytes of a pixel in memory; else 4
_RGB = 4
# Bytes of a pixel that the libraries below PIL hold beside it; tests/reliability/bombs.py prints what files take.
_OF_DECODERS = {"WEBP": OF_WEBP - 8, "AVIF": 4, "HEIF": 6, "PSD": 4, "SGI": 4}
_COEFFICIENT = 2  # of a JPEG with several scans: one for each sample


class Jpeg2000(NamedTuple):
    """What the main header of a JPEG 2000 says."""

    components: int
    tiles: int
    layers: int
    levels: int


def check_cost(
    image: Image.Image, stream: IO[bytes], name: str, *, max_bytes: int, turned: bool, reduced_to: int | None = None
) -> None:
    """Prepares an open file for decoding, at a fraction of its size where that may be, and refuses what costs too much.

    Args:
        image: not decoded yet; with `reduced_to`, a JPEG is decoded at 1/2, 1/4 or 1/8 of its size afterwards, a
            JPEG 2000 where it would be refused otherwise.
        stream: the file.
        name: of the file, for errors.
        max_bytes: most memory that decoding may take.
        turned: whether the pixels do not lie upright.
        reduced_to: pixels that the shorter side must keep.

    Raises:
        CostError: if decoding takes more memory.
        ImageError: for too many scans, tiles or layers.
    """
    whole, extra = image.width * image.height, float(_OF_DECODERS.get(image.format or "", 0))
    stored = _STORED.get(image.mode, 4)
    each = stored + _RGB + (_RGB if turned else 0)
    if reduced_to is not None:
        image.draft(image.mode, (max(1, reduced_to), max(1, reduced_to)))
    pixels = image.width * image.height
    if image.format in ("JPEG", "MPO"):
        scans = _counted(stream, jpeg_scans)
        if scans > MAX_SCANS:
            raise ImageError(f"{name} consists of {scans} scans, more than {MAX_SCANS}; save it anew and try again.")
        if scans > 2 or image.info.get("progressive"):  # then all coefficients are in memory
            layers = [horizontal * vertical for _, horizontal, vertical, _ in getattr(image, "layer", [])]
            extra = _COEFFICIENT * sum(layers) / max(layers, default=1)
    elif image.format == "TIFF":
        extra = stored  # it may be one strip
    elif image.format == "JPEG2000":
        header = _counted(stream, jpeg2000_header)
        if header is None or header.tiles > MAX_TILES or header.layers > MAX_LAYERS:
            raise ImageError(f"{name} has too many tiles or layers, or is damaged; save it anew and try again.")
        each += 4 * header.components
        if reduced_to is not None and whole * each > max_bytes:
            levels = max(0, min(header.levels, (min(image.size) // max(1, reduced_to)).bit_length() - 1))
            image.reduce = levels  # type: ignore[method-assign,assignment]  # an attribute of this format
            pixels >>= 2 * levels
    needed = int(pixels * each + whole * extra)
    check_bytes(needed, name, max_bytes)


def check_bytes(needed: int, name: str, max_bytes: int) -> None:
    """Raises `CostError` if decoding needs more bytes than it may."""
    if needed > max_bytes:
        raise CostError(
            f"{name} takes {needed / 1e6:.0f} MB of memory to read, more than {max_bytes / 1e6:.0f}; make it smaller "
            "and try again."
        )


class CostError(ImageError):
    """An image that is sound as far as its header shows, but takes more memory to decode than it may."""


def _counted(stream: IO[bytes], count: Callable[[IO[bytes]], T]) -> T:
    """What `count` finds in a file, which stays where it is."""
    position = stream.tell()
    try:
        return count(stream)
    finally:
        stream.seek(position)


def jpeg_scans(stream: IO[bytes]) -> int:
    """The number of scans of a JPEG file, those of thumbnails in it included."""
    stream.seek(0)
    count, last = 0, b""
    while block := stream.read(1 << 20):
        # In the coded pixels 0xFF is followed by 0x00, so that a marker is never part of them.
        count += (last + block).count(b"\xff\xda")
        last = block[-1:] if block[-1:] == b"\xff" else b""
    return count


def jpeg2000_header(stream: IO[bytes]) -> Jpeg2000 | None:
    """What a JPEG 2000 file says before its first tile; None if that cannot be found."""
    stream.seek(0)
    start = stream.read(1 << 20)
    place = start.find(b"\xff\x4f\xff\x51") + 2
    tiles = layers = levels = components = 0
    try:
        while place >= 2:
            marker, length = struct.unpack_from(">HH", start, place)
            if marker == 0xFF51:
                right, bottom, _, _, across, down, left, top, components = struct.unpack_from(">8IH", start, place + 6)
                tiles = -(-(right - left) // across) * -(-(bottom - top) // down)
            elif marker == 0xFF52:
                layers, _, levels = struct.unpack_from(">HBB", start, place + 6)
            elif marker == 0xFF90 and tiles and layers:
                return Jpeg2000(components, tiles, layers, levels)
            place += 2 + max(length, 2)
    except (struct.error, ZeroDivisionError):
        pass
    return None


def webp_size(stream: IO[bytes]) -> tuple[int, int] | None:
    """(width, height) of a WebP file; None for another file. PIL makes room for two of its images when it opens it."""
    stream.seek(0)
    head = stream.read(30)
    if len(head) < 30 or head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return None
    number = functools.partial(int.from_bytes, byteorder="little")
    if head[12:16] == b"VP8X":
        return 1 + number(head[24:27]), 1 + number(head[27:30])
    if head[12:16] == b"VP8L":
        sides = number(head[21:25])
        return 1 + (sides & 0x3FFF), 1 + (sides >> 14 & 0x3FFF)
    return number(head[26:28]) & 0x3FFF, number(head[28:30]) & 0x3FFF


def late_exif(stream: IO[bytes], name: str) -> bytes:
    """The first EXIF block of a PNG file wherever it stands, hence also behind the pixels; empty if there is none.

    Raises:
        ImageError: for a file of very many chunks.
    """
    stream.seek(8)  # behind the signature
    for _ in range(MAX_CHUNKS):
        head = stream.read(8)
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if len(head) < 8 or kind == b"IEND":
            return b""
        if kind == b"eXIf":
            return stream.read(length)
        stream.seek(length + 4, 1)
    raise ImageError(f"{name} has more than {MAX_CHUNKS} parts; save it anew and try again.")
