"""What decoding costs is known from the header: images that take too much memory or hold too many parts are refused."""

import io
import re
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from macosnet_hf import ImageError
from macosnet_hf.images import upright_rgb
from macosnet_hf.io import decoding_cost
from macosnet_hf.io.decoding_cost import CostError
from macosnet_hf.io.image_files import image_size, load_as_stored, load_image, load_with_size
from macosnet_hf.io.working_copy import open_working_copy

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "reliability"))
import bombs  # noqa: E402

SIDE = 3000  # 9 megapixels

# Bytes of a pixel that a reader takes at most; measured with bombs.py.
BYTES = {
    "flat.jpg": 8,
    "progressive.jpg": 14,
    "f.tif": 12,
    "i16.tif": 8,
    "rgb.tif": 12,
    "one-strip.tif": 12,
    "group4.tif": 6,
    "rgba.png": 8,
    "turned.png": 12,
    "i16.png": 6,
    "palette.gif": 5,
    "lossless.webp": 20,
    "lossy.webp": 20,
    "flat.avif": 12,
    "rgb.jp2": 20,
}


@pytest.mark.parametrize("name", BYTES)
def test_an_image_is_refused_by_the_bytes_that_it_takes(name, monkeypatch):
    data = bombs.PIXELS[name](SIDE)
    needed = BYTES[name] * SIDE * SIDE
    assert load_image(data, max_bytes=needed).size == (SIDE, SIDE)
    assert load_as_stored(data, max_bytes=needed).size == (SIDE, SIDE)

    def decode(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    with pytest.raises(CostError, match=r"^the image takes \d+ MB of memory to read, more than \d+; make it smaller"):
        load_image(data, max_bytes=needed - SIDE)


_PEAK = """
import re, sys
from macosnet_hf.io.image_files import load_image
from macosnet_hf.io.memory import give_memory_back
give_memory_back()
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
load_image(sys.argv[1]); before = peak()
load_image(sys.argv[2]); print((peak() - before) / 1e3)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["progressive.jpg", "f.tif", "rgba.png", "turned.png", "lossless.webp", "flat.avif"])
def test_the_estimate_is_not_below_what_is_measured(name, tmp_path):
    """40 MB for the bands in which a large image is converted, and for the program."""
    (tmp_path / name).write_bytes(bombs.PIXELS[name](SIDE))
    (tmp_path / "small").write_bytes(bombs.PIXELS[name](64))
    command = [sys.executable, "-c", _PEAK, str(tmp_path / "small"), str(tmp_path / name)]
    megabytes = float(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert megabytes < BYTES[name] * SIDE * SIDE / 1e6 + 40


def test_a_photo_of_100_megapixels_is_within_the_limit_of_the_library():
    for each in (8, 12):  # upright, turned
        assert each * 100_000_000 <= decoding_cost.MAX_DECODED_BYTES


def test_scans_are_counted_before_decoding():
    data = bombs.jpeg_scans(5000, 20_000)
    began = time.process_time()
    with pytest.raises(ImageError, match=r"consists of 20001 scans, more than 100"):
        load_image(data)
    with pytest.raises(ImageError, match="scans"):
        load_image(data, reduced_to=100)
    assert time.process_time() - began < 1  # 75 s in version 0.1
    assert load_image(bombs.jpeg_scans(200, 98)).size == (200, 200)
    with pytest.raises(ImageError, match="101 scans"):
        load_image(bombs.jpeg_scans(200, 100))


def test_progressive_photos_and_photos_with_thumbnails_are_read():
    with Image.open(ROOT / "examples" / "cat.jpg") as cat:
        expected = cat.convert("RGB")
    stream = io.BytesIO()
    expected.save(stream, "JPEG", progressive=True, quality=95)
    assert decoding_cost.jpeg_scans(stream) > 5
    found = np.asarray(load_image(stream.getvalue()), dtype=int)
    assert np.abs(found - np.asarray(expected, dtype=int)).mean() < 3


@pytest.mark.parametrize(("tile", "layers"), [(8, 1), (512, 65535), (512, 101)])
def test_tiles_and_layers_of_jpeg_2000_are_counted(tile, layers):
    data = bombs.jpeg2000(1024, tile=tile, layers=layers)
    with pytest.raises(ImageError, match="too many tiles or layers"):
        load_image(data)
    header = decoding_cost.jpeg2000_header(io.BytesIO(data))
    assert (header.tiles, header.layers, header.components) == ((1024 // tile) ** 2, layers, 1)
    assert load_image(bombs.jpeg2000(1024, tile=512, layers=1)).size == (1024, 1024)


def test_a_large_jpeg_2000_is_reduced_where_it_would_be_refused():
    smooth = Image.effect_noise((700, 1000), 60).resize((70, 100)).resize((700, 1000), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    smooth.save(stream, "JPEG2000")
    data = stream.getvalue()
    with pytest.raises(CostError):
        load_image(data, max_bytes=2_000_000)
    reduced, size = load_with_size(data, reduced_to=100, max_bytes=2_000_000)
    assert size == (1000, 700)
    assert reduced.size == (175, 250)
    expected = np.asarray(smooth.resize((175, 250), Image.Resampling.BOX), dtype=int)
    assert np.abs(np.asarray(reduced.convert("L"), dtype=int) - expected).mean() < 8
    assert load_image(data, reduced_to=100).size == (700, 1000), "within the limit it stays as it is"


@pytest.mark.parametrize(
    "make", [lambda: bombs.png_frames(60_000), lambda: bombs.png_chunks(64, b"tEXt", 150_000, b"a\0b")]
)
def test_chunks_of_a_png_are_counted(make):
    with pytest.raises(ImageError, match="more than 100000 parts"):
        load_image(make())


@pytest.mark.parametrize("make", [lambda: bombs.gif_frames(200_000), lambda: bombs.tiff_pages(20_000)])
def test_of_many_frames_or_pages_only_the_first_is_looked_at(make):
    data = make()
    began = time.process_time()
    assert load_image(data).size == (64, 64)
    assert time.process_time() - began < 1


def test_a_webp_is_measured_before_it_is_opened(monkeypatch):
    """PIL makes room for two images of its size when it opens one."""
    for mode, options in (("RGBA", {"lossless": True}), ("RGB", {"lossless": True}), ("RGB", {}), ("RGBA", {})):
        data = bombs.flat("WEBP", mode, 400, **options)
        assert decoding_cost.webp_size(io.BytesIO(data)) == (400, 400)
        assert load_image(data, max_bytes=20 * 400 * 400).size == (400, 400)
        with monkeypatch.context() as patch:
            patch.setattr("PIL.Image.open", None)
            with pytest.raises(CostError, match="MB of memory"):
                load_image(data, max_bytes=20 * 400 * 400 - 1)
            with pytest.raises(ImageError, match="megapixels"):
                image_size(data, max_pixels=400 * 400 - 1)
    animated = io.BytesIO()
    Image.new("RGB", (30, 20)).save(animated, "WEBP", save_all=True, append_images=[Image.new("RGB", (30, 20), "red")])
    assert decoding_cost.webp_size(animated) == (30, 20)
    assert decoding_cost.webp_size(io.BytesIO(b"RIFF")) is None


# ---- one reading of the orientation ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "last", "turned"), [(1, 6, False), (6, 1, True), (0, 6, True), (8, 0, True), (0, 0, False)]
)
def test_a_png_with_two_exif_blocks_has_one_size(tmp_path, first, last, turned):
    """The first block counts, wherever it stands; version 0.1 took one here and the other there."""
    path = tmp_path / "photo.png"
    path.write_bytes(bombs.two_orientations(first, last, (60, 40)))
    size = (60, 40) if turned else (40, 60)
    image = load_image(path)
    assert (image.height, image.width) == size
    assert image_size(path) == size
    assert load_with_size(path, reduced_to=10)[1] == size
    copy = open_working_copy(path, side=20)
    assert copy.size == size[::-1]
    assert (copy.image.width > copy.image.height) == (not turned)
    with Image.open(path) as opened:
        plain = np.asarray(opened.convert("RGB"))
    turns = {1: 0, 6: -1, 8: 1, 0: 0}[first or last]
    np.testing.assert_array_equal(np.asarray(image), np.rot90(plain, turns))


def test_the_size_of_a_png_is_read_without_its_pixels(monkeypatch):
    data = bombs.two_orientations(0, 0)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    assert image_size(data) == (40, 60)


def test_a_profile_in_the_old_way_of_imagemagick_is_read_from_the_header(monkeypatch):
    whole = bombs.two_orientations(0, 0)
    body = b"Raw profile type exif\0\nexif\n" + f"{len(bombs.TURNED):8d}\n{bombs.TURNED.hex()}\n".encode()
    chunk = struct.pack(">I", len(body)) + b"tEXt" + body + struct.pack(">I", zlib.crc32(b"tEXt" + body))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    assert image_size(whole[:33] + chunk + whole[33:]) == (60, 40)


# ---- in bands --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I;16", "I", "F"])
@pytest.mark.parametrize("kind", ["plain", "transparent"])
def test_a_large_image_is_converted_as_a_small_one_is(mode, kind, monkeypatch):
    generator = np.random.default_rng(3)
    if mode in ("I;16", "I", "F"):
        values = generator.integers(0, 60_000, (37, 23)) if mode != "F" else generator.normal(3, 20, (37, 23))
        if mode == "F":
            values[3, 4], values[30, 2], values[12, 12] = np.nan, np.inf, -np.inf
        image = Image.fromarray(values.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
    else:
        colours = Image.fromarray(generator.integers(0, 256, (37, 23, 4), dtype=np.uint8))
        image = colours.convert("RGB").convert(mode) if mode not in ("RGBA", "LA") else colours.convert(mode)
    assert image.mode == mode
    if kind == "transparent" and mode in ("L", "P", "RGB"):
        image.info["transparency"] = image.getpixel((0, 0))
    whole = upright_rgb(image, 6)
    monkeypatch.setattr("macosnet_hf.images._BAND_PIXELS", 50)
    np.testing.assert_array_equal(np.asarray(upright_rgb(image, 6)), np.asarray(whole))
    assert whole.size == (37, 23)


def test_not_a_regular_file_is_said_plainly(tmp_path):
    with pytest.raises(ImageError, match=re.escape("is a folder, not an image.")) as caught:
        load_image(tmp_path)
    assert "usable path" not in str(caught.value)
