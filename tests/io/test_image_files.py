"""`load_image` on every kind of image that a person may hand over, and on everything that is none."""

import io
import os
import random
import struct
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from image_bytes import display_p3, encoded
from PIL import Image, ImageCms, ImageFile
from real_photos import PHOTOS

from macosnet_hf.errors import ImageError, MaCoSNetError
from macosnet_hf.images import as_upright_rgb
from macosnet_hf.io.image_files import image_size, load_image, save_image


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """A real image, not square: 160 x 109."""
    with Image.open(PHOTOS / "cheetah.jpg") as image:
        return image.convert("RGB").resize((160, 109), Image.Resampling.LANCZOS)


def difference(first: Image.Image, second: Image.Image) -> float:
    """Mean absolute difference of two images of the same size and mode."""
    assert first.mode == second.mode
    assert first.size == second.size
    return float(np.abs(np.asarray(first, dtype=int) - np.asarray(second, dtype=int)).mean())


def png(width: int, height: int, rows: bytes) -> bytes:
    """A greyscale PNG with any header and any compressed rows, made by hand."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


# ---------------------------------------------------------------------------------------------------------------------
# Where an image comes from
# ---------------------------------------------------------------------------------------------------------------------


def test_every_kind_of_source_gives_the_same_image(photo, tmp_path):
    data = encoded(photo, "PNG")
    path = tmp_path / "an image with ümlauts.png"
    path.write_bytes(data)
    with open(path, "rb") as file:
        sources = [str(path), path, data, bytearray(data), memoryview(data), file, io.BytesIO(data), photo]
        for source in [*sources, np.asarray(photo)]:
            loaded = load_image(source)
            assert loaded.mode == "RGB"
            assert difference(loaded, photo) == 0
        assert not file.closed
        assert difference(load_image(file), photo) == 0, "a file object that was read before starts from the beginning"


def test_a_stream_that_cannot_seek(photo):
    class Pipe(io.RawIOBase):
        def __init__(self, data):
            self.data = io.BytesIO(data)

        def readable(self):
            return True

        def readinto(self, buffer):
            return self.data.readinto(buffer)

    assert difference(load_image(io.BufferedReader(Pipe(encoded(photo, "PNG")))), photo) == 0


def test_the_result_is_independent_of_the_source(photo):
    copy = load_image(photo)
    copy.putpixel((0, 0), (1, 2, 3))
    assert photo.getpixel((0, 0)) != (1, 2, 3)


@pytest.mark.parametrize("channels", [None, 1, 3, 4])
def test_arrays(channels):
    shape = (7, 11) if channels is None else (7, 11, channels)
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    if channels == 4:
        array[..., 3] = 255
    expected = array[..., None] if channels is None else array
    expected = expected.repeat(3, 2) if expected.shape[2] == 1 else expected[..., :3]
    assert np.array_equal(np.asarray(load_image(array)), expected)


@pytest.mark.parametrize("shape", [(7, 11, 2), (3, 7, 11, 3), (7,), (0, 5, 3)])
def test_arrays_that_are_no_images(shape):
    with pytest.raises(ImageError):
        load_image(np.zeros(shape, np.uint8))


def test_float_arrays_are_refused():
    with pytest.raises(ImageError, match="uint8"):
        load_image(np.zeros((7, 11, 3), np.float32))


# ---------------------------------------------------------------------------------------------------------------------
# Modes and formats
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "tolerance"), [("PNG", 0), ("BMP", 0), ("TIFF", 0), ("PPM", 0), ("JPEG", 6), ("WEBP", 6), ("GIF", 12)]
)
def test_formats(photo, format, tolerance):
    assert difference(load_image(encoded(photo, format)), photo) <= tolerance


def test_greyscale(photo):
    loaded = np.asarray(load_image(encoded(photo.convert("L"), "PNG")))
    assert np.array_equal(loaded, np.asarray(photo.convert("L"))[..., None].repeat(3, 2))


def test_one_bit(photo):
    bits = photo.convert("1")
    assert np.array_equal(np.asarray(load_image(encoded(bits, "PNG")))[..., 0] == 255, np.asarray(bits))


def test_palette(photo):
    palette = photo.quantize(200)
    assert difference(load_image(encoded(palette, "PNG")), palette.convert("RGB")) == 0


def test_palette_with_transparency_is_laid_on_white():
    palette = Image.new("P", (4, 3), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putpixel((2, 1), 0)
    loaded = load_image(encoded(palette, "PNG", transparency=0))
    assert loaded.getpixel((2, 1)) == (255, 255, 255)
    assert loaded.getpixel((0, 0)) == (10, 20, 30)


def test_colour_key_is_laid_on_white():
    image = Image.new("RGB", (4, 3), (10, 20, 30))
    image.putpixel((2, 1), (1, 2, 3))
    loaded = load_image(encoded(image, "PNG", transparency=(1, 2, 3)))
    assert loaded.getpixel((2, 1)) == (255, 255, 255)
    assert loaded.getpixel((0, 0)) == (10, 20, 30)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_laid_on_white(mode):
    image = Image.new("RGBA", (4, 3), (100, 100, 100, 255))
    image.putpixel((1, 0), (100, 100, 100, 0))
    image.putpixel((3, 2), (100, 100, 100, 128))
    loaded = load_image(encoded(image.convert(mode), "PNG"))
    assert loaded.getpixel((0, 0)) == (100, 100, 100)
    assert loaded.getpixel((1, 0)) == (255, 255, 255)
    assert loaded.getpixel((3, 2)) == pytest.approx((177, 177, 177), abs=1)


def test_cmyk_jpeg(photo):
    assert difference(load_image(encoded(photo.convert("CMYK"), "JPEG", quality=95)), photo) < 6


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(format):
    ramp = np.linspace(0, 65535, 256 * 4).reshape(4, 256).astype(np.uint16)
    loaded = np.asarray(load_image(encoded(Image.fromarray(ramp), format)))
    assert np.abs(loaded[..., 0] - ramp / 257.0).max() <= 0.51
    assert len(np.unique(loaded)) == 256


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 100, 255], [0, 100, 255]),  # 8-bit values in a wide container
        ([0, 25700, 65535], [0, 100, 255]),  # 16-bit values
        ([0, 100, 256], [0, 100, 255]),  # a value too high turned an image black
        ([-5, 100, 300], [0, 100, 255]),  # a cubic filter's overshoot
        ([0, 500, 1000], [0, 128, 255]),  # more than 8 bits, and black in the range of 16
        ([0, 2048, 4095], [0, 128, 255]),
        ([0, 2570, 5140], [0, 10, 20]),  # 16 bits, dark
        ([-1000, 0, 1000], [0, 128, 255]),  # anything else is stretched
        ([0, 10_000_000, 20_000_000], [0, 128, 255]),
    ],
)
def test_32_bit_integers(values, expected):
    image = Image.fromarray(np.array([values, values], dtype=np.int32))
    assert np.asarray(load_image(encoded(image, "TIFF")))[0, :, 0] == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 100.0, 255.0], [0, 100, 255]),
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
        ([0.0, 1e6, 2e6], [0, 128, 255]),
        ([0.0, np.nan, 1.0], [0, 0, 255]),
        ([0.0, np.inf, 1.0], [0, 255, 255]),
        ([np.nan, np.nan, np.nan], [0, 0, 0]),
        ([7.0, 7.0, 7.0], [7, 7, 7]),
        ([0.0, 0.5, 1.0000001], [0, 128, 255]),  # a hair above 1 turned an image black
        ([-0.05, 0.5, 1.06], [0, 128, 255]),  # a cubic filter's overshoot
        ([-20.0, 100.5, 270.0], [0, 101, 255]),
        ([0.0, 3.0, 9.0], [0, 3, 9]),  # 8 bits, however dark
        ([0.0, 4.4, 8.8], [0, 128, 255]),
    ],
)
def test_floating_point(values, expected):
    image = Image.fromarray(np.array([values, values], dtype=np.float32))
    assert np.asarray(load_image(encoded(image, "TIFF")))[0, :, 0] == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(("format", "options"), [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})])
def test_the_first_frame_of_an_animation(format, options):
    frames = [Image.new("RGB", (12, 8), color) for color in ((200, 30, 40), (0, 255, 0), (0, 0, 255))]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(data)) as check:
        assert check.n_frames == 3, "the test needs an animation"
    assert np.abs(np.asarray(load_image(data), dtype=int) - (200, 30, 40)).max() <= 2


def test_a_real_animated_gif():
    loaded = load_image(PHOTOS / "screenshot.gif")
    with Image.open(PHOTOS / "screenshot.gif") as image:
        assert loaded.size == image.size
    assert np.asarray(loaded).std() > 5


def test_a_phones_multi_picture_jpeg(photo):
    data = encoded(photo, "MPO", save_all=True, append_images=[Image.new("RGB", photo.size)], quality=95)
    assert difference(load_image(data), photo) < 6


def test_extreme_aspect():
    assert load_image(encoded(Image.new("RGB", (5000, 3)), "PNG")).size == (5000, 3)
    assert load_image(encoded(Image.new("RGB", (2, 3000)), "PNG")).size == (2, 3000)


# ---------------------------------------------------------------------------------------------------------------------
# Orientation
# ---------------------------------------------------------------------------------------------------------------------

# What turns a stored image upright, from the EXIF standard: orientation -> function on an array (H, W, 3).
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}


def with_orientation(image: Image.Image, format: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {"quality": 95} if format == "JPEG" else {}
    return encoded(image, format, exif=exif, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_once(photo, format, orientation):
    data = with_orientation(photo, format, orientation)
    loaded = load_image(data)
    expected = Image.fromarray(np.ascontiguousarray(UPRIGHT[orientation](np.asarray(photo))))
    assert difference(loaded, expected) <= (6 if format == "JPEG" else 0)
    assert image_size(data) == (loaded.height, loaded.width)
    assert difference(load_image(loaded), loaded) == 0, "an upright image is not turned again"
    assert difference(load_image(encoded(loaded, "PNG")), loaded) == 0, "nor is it when it was saved in between"
    with Image.open(io.BytesIO(data)) as lazy:
        assert difference(load_image(lazy), loaded) == 0, "an image that PIL has not decoded yet"


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_a_meaningless_orientation_is_ignored(photo, orientation):
    assert load_image(with_orientation(photo, "JPEG", orientation)).size == photo.size


def test_an_orientation_beside_a_damaged_tag_is_applied(photo):
    """The resolution is text here, on which `PIL.ImageOps.exif_transpose` fails when it writes the block again."""
    tags = struct.pack("<HHIHHHHI4sI", 0x0112, 3, 1, 6, 0, 0x011A, 2, 4, b"abc\0", 0)
    block = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags
    data = encoded(photo, "JPEG", quality=95, exif=block)
    assert load_image(data).size == photo.size[::-1]


def test_a_damaged_exif_block_does_not_spoil_the_image(photo):
    data = encoded(photo, "JPEG", quality=95, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\x00\x99garbage")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert difference(load_image(data), photo) < 6


# ---------------------------------------------------------------------------------------------------------------------
# Size
# ---------------------------------------------------------------------------------------------------------------------


def test_too_many_pixels_are_refused_before_decoding(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(10_001, 10_000, bytes(1000)))  # damaged if anyone decoded it
    with pytest.raises(ImageError, match=r"bomb\.png' has 10001 x 10000 pixels, more than 100 megapixels"):
        load_image(path)
    with pytest.raises(ImageError, match="more than 100 megapixels"):
        image_size(path)


@pytest.mark.parametrize("side", [14_000, 60_000, 2**31 - 1])
def test_a_decompression_bomb_is_refused(side):
    with pytest.raises(ImageError, match="more than 100 megapixels"):
        load_image(png(side, side, bytes(1000)))


def test_the_limit_itself_is_allowed_and_pil_does_not_warn(photo):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert image_size(png(10_000, 10_000, bytes(10))) == (10_000, 10_000)
    assert load_image(photo, max_pixels=160 * 109).size == photo.size
    with pytest.raises(ImageError, match="megapixels"):
        load_image(photo, max_pixels=160 * 109 - 1)
    with pytest.raises(ImageError, match="megapixels"):
        load_image(np.asarray(photo), max_pixels=160 * 109 - 1)


def test_a_file_that_unpacks_to_more_than_its_header_says():
    """64 MB of zeros behind a header of 16 x 16: only the image's own rows may be unpacked."""
    data = png(16, 16, bytes(64 << 20))
    assert len(data) < 100_000
    assert load_image(data).size == (16, 16)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1)])
def test_a_side_of_one_pixel_is_refused(size):
    with pytest.raises(ImageError, match=f"only {size[0]} x {size[1]} pixels"):
        load_image(encoded(Image.new("RGB", size), "PNG"))
    assert load_image(encoded(Image.new("RGB", size), "PNG"), min_side=1).size == size


def test_reduced_decoding(photo):
    large = photo.resize((1600, 1090))
    data = with_orientation(large, "JPEG", 6)
    reduced = load_image(data, reduced_to=250)
    assert reduced.size == (273, 400)  # 1/4; 1/8 would leave a side of 137
    assert image_size(data) == (1600, 1090)
    assert difference(reduced, load_image(data).resize((273, 400), Image.Resampling.BOX)) < 6
    assert load_image(data, reduced_to=1090).size == (1090, 1600)
    assert load_image(encoded(large, "PNG"), reduced_to=250).size == (1600, 1090)


# ---------------------------------------------------------------------------------------------------------------------
# What is no image
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", ["missing", "folder", "empty", "text", "pdf", "heic", "eps", "loop", "null", "web"])
def test_one_clear_sentence_that_names_the_file(tmp_path, make):
    path, words = tmp_path / f"{make}.jpg", "not an image"
    contents = {
        "text": b"Dear all, please find attached.",
        "pdf": b"%PDF-1.7\n" + bytes(100),
        "heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100),
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
        "empty": b"",
    }
    if make in contents:
        path.write_bytes(contents[make])
        words = {"heic": "is a HEIC", "empty": "is empty"}.get(make, words)
    elif make == "folder":
        path.mkdir()
        words = "is a folder"
    elif make == "loop":
        path.symlink_to(path)
        words = "cannot be opened"
    elif make == "missing":
        words = "does not exist"
    source = {"null": "a\0b.jpg", "web": "https://example.org/a.jpg"}.get(make, path)
    words = {"null": "not a usable path", "web": "web address"}.get(make, words)
    with pytest.raises(ImageError, match=words) as caught:
        load_image(source)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    assert make in ("null", "web") or str(path) in text
    assert isinstance(caught.value, MaCoSNetError)


@pytest.mark.skipif(os.name != "posix", reason="file modes are a Unix matter")
def test_a_file_that_may_not_be_read(photo, tmp_path):
    path = tmp_path / "secret.png"
    path.write_bytes(encoded(photo, "PNG"))
    path.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may read everything
    try:
        with pytest.raises(ImageError, match="permission denied"):
            load_image(path)
    finally:
        os.seteuid(user)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match="not a regular file"):
        load_image(tmp_path / "pipe")


@pytest.mark.parametrize("source", [None, 7, ["a.jpg"], object()])
def test_other_types(source):
    with pytest.raises(ImageError, match=type(source).__name__):
        load_image(source)


def test_file_objects_that_do_not_work(photo, tmp_path):
    closed = io.BytesIO(encoded(photo, "PNG"))
    closed.close()
    with pytest.raises(ImageError):
        load_image(closed)
    path = tmp_path / "a.txt"
    path.write_text("hello")
    with open(path) as text, pytest.raises(ImageError, match="binary mode"):
        load_image(text)
    with open(tmp_path / "out", "wb") as write_only, pytest.raises(ImageError):
        load_image(write_only)


# ---------------------------------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------------------------------

KINDS = [
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("PNG", {}),
    ("GIF", {}),
    ("WEBP", {}),
    ("BMP", {}),
    ("PPM", {}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
]


@pytest.mark.parametrize(("format", "options"), KINDS)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 0.9])
def test_truncated_files_are_refused(photo, tmp_path, format, options, share):
    plain = Image.fromarray(np.asarray(photo))  # no colour profile, which TIFF would write behind the pixels
    data = encoded(plain, format, **options)
    path = tmp_path / "cut"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ImageError, match="cut"):
        load_image(path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_a_truncated_image_object_is_refused(photo):
    """PIL opens lazily: the damage shows only when the pixels are asked for."""
    with Image.open(io.BytesIO(encoded(photo, "PNG")[:5000])) as lazy, pytest.raises(ImageError, match="cut off"):
        load_image(lazy)


@pytest.mark.parametrize(("format", "options"), KINDS)
def test_any_damage_gives_an_image_or_an_image_error(photo, format, options):
    intact = encoded(photo.resize((40, 27)), format, **options)
    generator = random.Random(f"{format}{options}")
    refused = []
    for _ in range(60):
        data = bytearray(intact)
        for _ in range(generator.choice((1, 3, 20))):
            # Headers break in more interesting ways than pixels.
            limit = generator.choice((64, len(data)))
            data[generator.randrange(min(limit, len(data)))] = generator.randrange(256)
        if generator.random() < 0.3:
            del data[generator.randrange(len(data)) :]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                loaded = load_image(bytes(data))
            except ImageError as error:
                refused.append(str(error))
            else:
                assert loaded.mode == "RGB"
    assert refused
    assert not [text for text in refused if "\n" in text or not text.endswith(".")]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files cannot be counted here")
def test_no_file_stays_open(photo, tmp_path):
    good, cut = tmp_path / "good.png", tmp_path / "cut.png"
    good.write_bytes(encoded(photo, "PNG"))
    cut.write_bytes(good.read_bytes()[:4000])
    (tmp_path / "none.png").write_bytes(b"nothing")
    before = len(os.listdir("/proc/self/fd"))
    held = []
    for _ in range(3):
        held.append(load_image(good))
        image_size(good)
        for bad in (cut, tmp_path / "none.png"):
            try:
                load_image(bad)
            except ImageError as error:
                held.append(error)  # its traceback keeps every frame alive
    assert len(os.listdir("/proc/self/fd")) == before


def test_many_threads_at_once(photo):
    data, results = encoded(photo, "PNG"), []
    filters = list(warnings.filters)
    threads = [threading.Thread(target=lambda: results.extend(load_image(data) for _ in range(20))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80
    assert all(difference(result, photo) == 0 for result in results)
    assert warnings.filters == filters, "the process's warning filters are left as they were"


# ---- colours ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_colours_of_a_phone_become_srgb(format, mode):
    image = Image.new("RGB", (64, 48), (230, 60, 50))
    if format != "JPEG":
        image = image.quantize(4) if mode == "P" else image.convert(mode)
    options = {"lossless": True} if format == "WEBP" else {"quality": 98} if format == "JPEG" else {}
    data = encoded(image, format, icc_profile=display_p3(), **options)
    for loaded in (load_image(data), load_image(Image.open(io.BytesIO(data))), load_image(data, reduced_to=12)):
        assert np.abs(np.asarray(loaded, dtype=int) - (250, 31, 34)).max() <= 2
        assert loaded.info == {}, "so that nothing converts it twice"
    with Image.open(io.BytesIO(data)) as opened:
        assert np.abs(np.asarray(as_upright_rgb(opened), dtype=int) - (250, 31, 34)).max() <= 2


def linear_grey():
    """A grey ICC profile whose values are proportional to light."""
    white = b"XYZ " + bytes(4) + struct.pack(">iii", *(round(v * 65536) for v in (0.9642, 1.0, 0.8249)))
    curve = b"curv" + bytes(4) + struct.pack(">I", 0)  # no entries: the identity
    text = b"desc" + bytes(4) + struct.pack(">I", 2) + b"g\0" + bytes(78)
    tags, data = b"", b""
    for name, content in ((b"wtpt", white), (b"kTRC", curve), (b"desc", text)):
        tags += struct.pack(">4sII", name, 128 + 4 + 36 + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    body = struct.pack(">I", 3) + tags + data
    header = struct.pack(">I", 128 + len(body)) + bytes(4) + b"\x02\x20\0\0" + b"mntrGRAYXYZ " + bytes(12) + b"acsp"
    header += bytes(28) + struct.pack(">iii", *(round(v * 65536) for v in (0.9642, 1.0, 0.8249)))
    return header + bytes(128 - len(header)) + body


def test_a_transparent_colour_stays_transparent():
    image = Image.new("RGB", (4, 2), (230, 60, 50))
    image.putpixel((0, 0), (1, 2, 3))
    loaded = load_image(encoded(image, "PNG", icc_profile=display_p3(), transparency=(1, 2, 3)))
    assert loaded.getpixel((0, 0)) == (255, 255, 255)
    assert np.abs(np.subtract(loaded.getpixel((1, 0)), (250, 31, 34))).max() <= 2


def test_profiles_of_grey_images_are_used():
    loaded = load_image(encoded(Image.new("L", (9, 9), 128), "PNG", icc_profile=linear_grey()))
    assert np.abs(np.asarray(loaded, dtype=int) - 188).max() <= 1  # half of the light


def test_profiles_of_greys_with_transparency_and_of_16_bits_are_used():
    grey, profile = Image.new("L", (9, 9), 55), linear_grey()
    plain = load_image(encoded(grey, "PNG", icc_profile=profile)).getpixel((4, 4))
    assert plain[0] > 120
    clear = grey.convert("LA")
    clear.putpixel((0, 0), (55, 0))
    one = grey.copy()
    one.putpixel((0, 0), 7)
    wide = Image.fromarray(np.full((9, 9), 55 * 257, np.uint16))
    files = [(clear, {}), (one, {"transparency": 7}), (wide, {})]
    for image, options in files:
        loaded = load_image(encoded(image, "PNG", icc_profile=profile, **options))
        assert np.abs(np.subtract(loaded.getpixel((4, 4)), plain)).max() <= 1
        assert options or image.mode != "LA" or loaded.getpixel((0, 0)) == (255, 255, 255)
    assert load_image(encoded(one, "PNG", icc_profile=profile, transparency=7)).getpixel((0, 0)) == (255, 255, 255)


def test_a_transparent_grey_of_16_bits_is_white():
    values = np.full((4, 5), 30_000, np.uint16)
    values[0, 0], values[0, 1] = 1234, 1235
    loaded = load_image(encoded(Image.fromarray(values), "PNG", transparency=1234))
    assert [loaded.getpixel((column, 0)) for column in range(3)] == [(255,) * 3, (5,) * 3, (117,) * 3]


@pytest.mark.parametrize("mode", ["L", "LA", "CMYK"])
def test_a_profile_of_another_colour_space_is_ignored(mode):
    image = Image.new(mode, (9, 9), {"L": 100, "LA": (100, 255), "CMYK": (10, 200, 180, 5)}[mode])
    format = "TIFF" if mode == "CMYK" else "PNG"
    with_profile, without = (
        load_image(encoded(image, format, **options)) for options in ({"icc_profile": display_p3()}, {})
    )
    np.testing.assert_array_equal(np.asarray(with_profile), np.asarray(without))


@pytest.mark.parametrize("profile", [b"no profile", b"", display_p3()[:200], bytes(500)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_broken_profile_is_ignored(profile, mode):
    image = Image.new("RGB", (64, 48), (230, 60, 50)).convert(mode)
    loaded = load_image(encoded(image, "PNG", icc_profile=profile))
    np.testing.assert_array_equal(np.asarray(loaded), np.asarray(image.convert("RGB")))


def test_an_image_that_is_srgb_stays_as_it_is():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    noise = Image.effect_noise((60, 50), 90).convert("RGB")
    with Image.open(io.BytesIO(encoded(noise, "PNG", icc_profile=profile))) as opened:
        assert as_upright_rgb(opened) is opened
        np.testing.assert_array_equal(np.asarray(load_image(opened)), np.asarray(noise))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_written_images_say_that_they_are_srgb(suffix, tmp_path):
    image = Image.new("RGB", (64, 48), (250, 31, 34))
    for name in ("one", "other"):
        save_image(image, tmp_path / f"{name}.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"other.{suffix}").read_bytes()
    with Image.open(tmp_path / f"one.{suffix}") as written:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(written.info["icc_profile"]))
    assert "sRGB" in ImageCms.getProfileDescription(profile)
    assert np.abs(np.asarray(load_image(tmp_path / f"one.{suffix}"), dtype=int) - (250, 31, 34)).max() <= 2


def test_threads_convert_colours_at_the_same_time():
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 256, (200, 300, 3), np.uint8)) for _ in range(4)]
    files = [encoded(image, "PNG", icc_profile=display_p3()) for image in images]
    expected = [np.asarray(load_image(file)) for file in files]
    with ThreadPoolExecutor(8) as pool:
        for number, found in enumerate(pool.map(load_image, files * 8)):
            np.testing.assert_array_equal(np.asarray(found), expected[number % 4])
