"""Image files that cost a reader much: few bytes and many pixels, scans, frames, pages, tiles or chunks.

    python tests/reliability/bombs.py [--side 7100]     # reads each in a process of its own, prints what that costs

Each is valid, or damaged only where its kind is damage. `side` is that of a square image; the library's limit is 10,000
and that of the demo 7,141 (`macosnet_hf/demo/limits.py`).
"""

from __future__ import annotations

import argparse
import functools
import io
import re
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
MOST_BYTES = 30 << 20  # of an upload

# ---------------------------------------------------------------------------------------------------------------------
# Pixels
# ---------------------------------------------------------------------------------------------------------------------


def flat(format: str, mode: str, side: int, **options: object) -> bytes:
    """One colour, which any compression makes small."""
    color = {"1": 1, "L": 99, "P": 1, "I;16": 500, "I": 500_000, "F": 0.5, "RGBA": (9, 9, 9, 100)}.get(
        mode, (9, 80, 160)
    )
    stream = io.BytesIO()
    Image.new(mode, (side, side), color).save(stream, format, **options)
    return stream.getvalue()


def noisy(format: str, side: int, **options: object) -> bytes:
    """Noise that is as large as an upload may be."""
    small = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), dtype=np.uint8)
    image = Image.fromarray(np.tile(small, (side // 1024 + 1, side // 1024 + 1, 1))[:side, :side])
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()[:MOST_BYTES]


TURNED = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"

# ---------------------------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------------------------


def jpeg_segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def jpeg_scans(side: int, scans: int) -> bytes:
    """A progressive JPEG in grey; its scans say of 32,767 blocks at a time that nothing is in them."""

    def huffman(table: int, symbols: list[int]) -> bytes:
        counts = [0] * 16
        counts[7] = len(symbols)
        return jpeg_segment(0xC4, bytes([table, *counts, *symbols]))

    def start(first: int, last: int) -> bytes:
        return jpeg_segment(0xDA, bytes([1, 1, 0, first, last, 0]))

    blocks = ((side + 7) // 8) ** 2
    runs = -(-blocks // 32767)
    bits = ("00000000" + "1" * 14) * runs
    bits += "1" * (-len(bits) % 8)
    body = bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8)).replace(b"\xff", b"\xff\0")
    frame = struct.pack(">BHHB", 8, side, side, 1) + bytes([1, 0x11, 0])
    head = b"\xff\xd8" + jpeg_segment(0xDB, bytes([0] + [1] * 64)) + jpeg_segment(0xC2, frame)
    head += huffman(0, [0]) + huffman(0x10, [0xE0, 0]) + start(0, 0) + bytes(blocks)
    return head + (start(1, 63) + body) * scans + b"\xff\xd9"


def jpeg_segments(count: int) -> bytes:
    """A small JPEG behind as many empty segments as fit."""
    small = flat("JPEG", "RGB", 64)
    return small[:2] + b"\xff\xe5\0\x02" * count + small[2:]


def png_chunks(side: int, kind: bytes, count: int, body: bytes = b"") -> bytes:
    """A PNG with so many chunks behind its pixels."""
    whole = flat("PNG", "RGB", side)
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return whole[:-12] + chunk * count + whole[-12:]


def two_orientations(first: int, last: int, size: tuple[int, int] = (60, 40)) -> bytes:
    """A PNG with an EXIF block before its pixels and another behind them (0: without that block)."""
    stream = io.BytesIO()
    Image.effect_noise(size, 80).convert("RGB").save(stream, "PNG")
    whole, blocks = stream.getvalue(), []
    for orientation in (first, last):
        body = TURNED[6:25] + bytes([orientation]) + TURNED[26:]
        chunk = struct.pack(">I", len(body)) + b"eXIf" + body + struct.pack(">I", zlib.crc32(b"eXIf" + body))
        blocks.append(chunk if orientation else b"")
    return whole[:33] + blocks[0] + whole[33:-12] + blocks[1] + whole[-12:]


def gif_frames(count: int) -> bytes:
    """An animation of so many frames, each as small as it can be."""
    small = flat("GIF", "P", 64)
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\0"
    return small[:-1] + frame * count + b"\x3b"


def png_frames(count: int) -> bytes:
    """An APNG of so many frames."""
    stream = io.BytesIO()
    frames = [Image.new("RGB", (16, 16), (shade, 0, 0)) for shade in (1, 2)]
    frames[0].save(stream, "PNG", save_all=True, append_images=frames[1:])
    whole = stream.getvalue()
    at = whole.rindex(b"fcTL") - 4
    return whole[:at] + whole[at:-12] * count + whole[-12:]


def tiff_pages(count: int) -> bytes:
    """A TIFF whose directories lead to one another, so many times."""
    entries = [(256, 64), (257, 64), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 64), (279, 4096)]
    size = 2 + 12 * len(entries) + 4
    pages = b""
    for number in range(count):
        at = 8 + 4096 + number * size
        body = struct.pack("<H", len(entries))
        body += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
        pages += body + struct.pack("<I", at + size if number < count - 1 else 0)
    return b"II*\0" + struct.pack("<I", 8 + 4096) + bytes(4096) + pages


def tiff_strips(rows: int) -> bytes:
    """An uncompressed TIFF of two columns with a strip for each row."""
    tables = 8 + 2 * 2
    entries = [(256, 1, 2), (257, 1, rows), (258, 1, 8), (259, 1, 1), (262, 1, 1), (273, rows, tables)]
    entries += [(277, 1, 1), (278, 1, 1), (279, rows, tables + 4 * rows)]
    body = (
        struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", t, 4, n, v) for t, n, v in entries) + bytes(4)
    )
    offsets = struct.pack("<I", 8) * rows + struct.pack("<I", 2) * rows
    return b"II*\0" + struct.pack("<I", tables + 8 * rows) + bytes(4) + offsets + body


def jpeg2000(side: int, *, tile: int, layers: int = 1) -> bytes:
    """A JPEG 2000 with tiles of that side, and so many layers by its own account."""
    data = bytearray(flat("JPEG2000", "L", side, tile_size=(tile, tile)))
    at = data.find(b"\xff\x52")
    data[at + 6 : at + 8] = struct.pack(">H", layers)
    return bytes(data)


def bmp_runs(side: int) -> bytes:
    """A run-length coded BMP, which PIL decodes in Python, of runs of one pixel."""
    pixels = (b"\x01\x05" * side + b"\0\0") * side
    head = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(pixels), 0, 0, 256, 0) + bytes(1024)
    return (b"BM" + struct.pack("<IHHI", 14 + len(head) + len(pixels), 0, 0, 14 + len(head)) + head + pixels)[
        :MOST_BYTES
    ]


def ppm_digits(side: int) -> bytes:
    """A PPM in digits, which PIL decodes in Python."""
    return (b"P3 %d %d 255\n" % (side, side) + b"7 " * (3 * side * side))[:MOST_BYTES]


# Whatever depends on its size, by kind. Each takes the side of the image.
PIXELS: dict[str, Callable[[int], bytes]] = {
    "flat.jpg": lambda side: flat("JPEG", "RGB", side),
    "cmyk.jpg": lambda side: flat("JPEG", "CMYK", side),
    "progressive.jpg": lambda side: flat("JPEG", "RGB", side, progressive=True, subsampling=0),
    "noisy.jpg": lambda side: noisy("JPEG", side, progressive=True, subsampling=0, quality=60),
    "f.tif": lambda side: flat("TIFF", "F", side, compression="tiff_adobe_deflate"),
    "i.tif": lambda side: flat("TIFF", "I", side, compression="tiff_adobe_deflate"),
    "i16.tif": lambda side: flat("TIFF", "I;16", side, compression="tiff_adobe_deflate"),
    "rgb.tif": lambda side: flat("TIFF", "RGB", side, compression="tiff_adobe_deflate"),
    "one-strip.tif": lambda side: flat("TIFF", "RGB", side, compression="tiff_lzw", strip_size=1 << 40),
    "group4.tif": lambda side: flat("TIFF", "1", side, compression="group4"),
    "cmyk.tif": lambda side: flat("TIFF", "CMYK", side, compression="tiff_adobe_deflate"),
    "rgba.png": lambda side: flat("PNG", "RGBA", side, compress_level=1),
    "turned.png": lambda side: flat("PNG", "RGBA", side, exif=TURNED, compress_level=1),
    "i16.png": lambda side: flat("PNG", "I;16", side, compress_level=1),
    "palette.gif": lambda side: flat("GIF", "P", side, transparency=0),
    "lossless.webp": lambda side: flat("WEBP", "RGBA", min(side, 16383), lossless=True, method=0),
    "lossy.webp": lambda side: flat("WEBP", "RGB", min(side, 16383), method=0),
    "flat.avif": lambda side: flat("AVIF", "RGB", side, speed=10),
    "rgb.jp2": lambda side: flat("JPEG2000", "RGB", side),
    "runs.bmp": bmp_runs,
    "digits.ppm": ppm_digits,
}
# Files of very many parts.
PARTS: dict[str, Callable[[], bytes]] = {
    "scans.jpg": lambda: jpeg_scans(7000, 3000),
    "hundred-scans.jpg": lambda: jpeg_scans(7000, 95),
    "small-scans.jpg": lambda: jpeg_scans(5000, 20_000),
    "segments.jpg": lambda: jpeg_segments(7_000_000),
    "frames.gif": lambda: gif_frames(1_500_000),
    "frames.png": lambda: png_frames(200_000),
    "texts.png": lambda: png_chunks(64, b"tEXt", 1_500_000, b"a\0b"),
    "chunks.png": lambda: png_chunks(64, b"quIz", 2_000_000),
    "pages.tif": lambda: tiff_pages(100_000),
    "strips.tif": lambda: tiff_strips(3_000_000),
    "tiles.jp2": lambda: jpeg2000(4096, tile=32),
    "layers.jp2": lambda: jpeg2000(2048, tile=2048, layers=65535),
}

_READ = """
import re, sys, time
from macosnet_hf.errors import ImageError
from macosnet_hf.io.memory import give_memory_back
from macosnet_hf.io.working_copy import open_working_copy
give_memory_back()
def peak():  # of this program; what `getrusage` gives includes that of the one that started it
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
base, start, said = peak(), time.process_time(), "read"
try:
    open_working_copy(sys.argv[1], limits={"max_bytes": int(sys.argv[2])})
except ImageError as error:
    said = str(error)
print(time.process_time() - start, (peak() - base) / 1e3, said)
"""


def cost(path: Path, max_bytes: int) -> tuple[float, float, str]:
    """Seconds of processor time and MB that a working copy of a file takes, and what is said of it."""
    done = subprocess.run(
        [sys.executable, "-c", _READ, str(path), str(max_bytes)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    found = re.match(r"(\S+) (\S+) (.*)", done.stdout)
    if found is None:
        return float("nan"), float("nan"), f"ended with {done.returncode}: {done.stderr[-300:]}"
    return float(found[1]), float(found[2]), found[3]


def files(folder: Path, side: int, only: str | None = None) -> Iterator[Path]:
    """All of them, or the one of a name, in a folder."""
    makers = {**{name: functools.partial(make, side) for name, make in PIXELS.items()}, **PARTS}
    for name, make in makers.items():
        if only in (None, name):
            (folder / name).write_bytes(make())
            yield folder / name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=7100)
    parser.add_argument("--only", help="name of one file")
    parser.add_argument("--max-megabytes", type=int, default=1250, help="limit of memory for the reader (1250)")
    args = parser.parse_args()
    print("| file | MB | processor, s | memory, MB | |\n|---|---:|---:|---:|---|")
    with tempfile.TemporaryDirectory() as folder:
        for path in files(Path(folder), args.side, args.only):
            seconds, megabytes, said = cost(path, args.max_megabytes * 1_000_000)
            said = said.replace(f"{folder}/", "")[:110]
            print(
                f"| {path.name} | {path.stat().st_size / 1e6:.2f} | {seconds:.2f} | {megabytes:.0f} | {said} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
