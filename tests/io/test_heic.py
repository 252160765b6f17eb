"""HEIC and AVIF, what phones make: real files of both, whole, turned, in colours of their own, damaged and forged."""

import io
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from image_bytes import display_p3, encoded
from PIL import Image
from real_photos import PHOTOS
from test_image_files import UPRIGHT, difference, png

import macosnet_hf
from macosnet_hf import ImageError, MaCoSNetImageProcessor
from macosnet_hf.bulk.image_folder import find_image_files
from macosnet_hf.datasets.images import find_images
from macosnet_hf.datasets.images import image_size as record_image_size
from macosnet_hf.datasets.images import open_image as open_record_image
from macosnet_hf.images import open_image, reads_heif
from macosnet_hf.io.image_files import IMAGE_SUFFIXES, image_size, is_image_file, load_image
from macosnet_hf.io.working_copy import for_browser, open_working_copy

pillow_heif = pytest.importorskip("pillow_heif", reason="HEIC needs the extra 'heic' (pillow-heif)")
reads_heif()


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """A real image, not square; its sides are multiples of 8, so that HEVC needs no padding."""
    with Image.open(PHOTOS / "cheetah.jpg") as image:
        return image.convert("RGB").resize((160, 104), Image.Resampling.LANCZOS)


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["HEIF", "AVIF"])
def test_turned_images_are_upright_once(photo, format, orientation):
    """pillow-heif writes `irot` and `imir` and leaves the EXIF tag beside them, as phones do."""
    data = encoded(photo, format, quality=95, exif=turned(orientation))
    assert format == "AVIF" or (b"irot" in data or b"imir" in data) == (orientation > 1)
    expected = Image.fromarray(np.ascontiguousarray(UPRIGHT[orientation](np.asarray(photo))))
    for loaded in (load_image(data), load_image(Image.open(io.BytesIO(data)))):
        assert difference(loaded, expected) < 3
    assert image_size(data) == (loaded.height, loaded.width)
    assert difference(load_image(loaded), loaded) == 0


@pytest.mark.parametrize("format", ["HEIF", "AVIF"])
def test_colours_of_a_phone_become_srgb(format):
    image = Image.new("RGB", (64, 48), (230, 60, 50))
    lossless = {"quality": -1, "chroma": 444} if format == "HEIF" else {"quality": 98, "subsampling": "4:4:4"}
    loaded = load_image(encoded(image, format, icc_profile=display_p3(), **lossless))
    assert np.abs(np.asarray(loaded, dtype=int) - (250, 31, 34)).max() <= 3


@pytest.mark.parametrize("bits", [10, 12])
def test_more_than_eight_bits(photo, bits, monkeypatch):
    monkeypatch.setattr(pillow_heif.options, "SAVE_HDR_TO_12_BIT", bits == 12)
    wide = pillow_heif.from_bytes("RGB;16", photo.size, (np.asarray(photo).astype(np.uint16) * 257).tobytes())
    stream = io.BytesIO()
    wide.save(stream, quality=-1, chroma=444)
    assert pillow_heif.open_heif(stream.getvalue()).info["bit_depth"] == bits
    assert difference(load_image(stream.getvalue()), photo) < 1.5


def test_grey_of_ten_bits_is_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 256 * 64).reshape(64, 256).astype(np.uint16)
    loaded = np.asarray(load_image(encoded(Image.fromarray(ramp), "HEIF", quality=-1)), dtype=int)
    assert np.abs(loaded[..., 0] - ramp / 257).max() <= 1.5


def test_of_several_images_the_primary_one_is_read(photo):
    others = [Image.new("RGB", (100, 50), "red"), Image.new("RGB", (50, 100), "blue")]
    options = {"save_all": True, "append_images": others, "quality": 95}
    assert difference(load_image(encoded(photo, "HEIF", **options)), photo) < 3
    assert load_image(encoded(photo, "HEIF", primary_index=1, **options)).getpixel((5, 5)) == pytest.approx(
        (255, 0, 0), abs=4
    )


def test_transparency_is_laid_on_white(photo):
    clear = photo.convert("RGBA")
    clear.putalpha(0)
    assert np.asarray(load_image(encoded(clear, "HEIF", quality=90))).min() >= 253


def test_tiles_and_thumbnails(photo):
    """Phones write tiles of 512 pixels; a thumbnail never stands for the image, since it may show another."""
    large = photo.resize((1200, 780))
    data = encoded(large, "HEIF", quality=90, tile_size=512, thumbnails=[512])
    assert load_image(data, reduced_to=300).size == large.size
    assert difference(load_image(data), large) < 3


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"mif1", b"msf1"])
def test_brands(photo, brand):
    data = bytearray(encoded(photo, "HEIF", quality=95))
    data[8:12] = brand
    assert difference(load_image(bytes(data)), photo) < 3


@pytest.mark.parametrize("name", ["IMG_0001.HEIC", "DSC0001.HIF", "scan.heif", "WhatsApp.jfif", "a.avif"])
def test_names_that_phones_and_cameras_give_are_images_of_a_folder(tmp_path, name):
    (tmp_path / name).write_bytes(b"an image")
    (tmp_path / f"._{name}").write_bytes(b"of a Mac")
    assert list(filter(is_image_file, tmp_path.iterdir())) == [tmp_path / name]


def test_every_reader_takes_it(photo, tmp_path):
    path = tmp_path / "IMG_0001.HEIC"
    path.write_bytes(encoded(photo, "HEIF", quality=95, exif=turned(6)))
    assert open_working_copy(path).size == photo.size[::-1]
    assert Image.open(for_browser(path, tmp_path)).size == photo.size[::-1]
    pixels = MaCoSNetImageProcessor()([[str(path), load_image(path)]], return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(pixels[0, 0], pixels[0, 1])


# ---------------------------------------------------------------------------------------------------------------------
# Damaged, forged, without the plug-in
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["HEIF", "AVIF"])
@pytest.mark.parametrize("share", [0.02, 0.2, 0.5, 0.8, 0.95])
def test_cut_files_are_refused(photo, tmp_path, format, share):
    path = tmp_path / "cut.heic"
    data = encoded(photo, format)
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ImageError, match=r"cut\.heic' is .*cut off") as caught:
        load_image(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("side", "words"), [(9000, "damaged"), (14_000, "megapixels"), (2**31 - 1, "megapixels")])
def test_a_forged_size_is_refused(photo, side, words):
    data = bytearray(encoded(photo, "HEIF"))
    where = data.find(b"ispe") + 8
    assert data[where : where + 8] == struct.pack(">II", *photo.size)
    data[where : where + 8] = struct.pack(">II", side, side)
    with pytest.raises(ImageError, match=words):
        load_image(bytes(data))


def test_a_stream_larger_than_its_header_is_refused(photo):
    """The tiny size passes the check of the header; the decoder must not believe it."""
    data = bytearray(encoded(photo.resize((1600, 1040)), "HEIF"))
    where = data.find(b"ispe") + 8
    data[where : where + 8] = struct.pack(">II", 16, 16)
    with pytest.raises(ImageError, match="damaged"):
        load_image(bytes(data))


def test_without_the_plug_in_the_way_out_is_said(photo, monkeypatch, tmp_path):
    path = tmp_path / "IMG_0001.HEIC"
    path.write_bytes(encoded(photo, "HEIF"))
    monkeypatch.delitem(Image.OPEN, "HEIF")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    reads_heif.cache_clear()
    try:
        with pytest.raises(ImageError, match=r"IMG_0001\.HEIC' is a HEIC image, .* pillow-heif.* save it as JPEG\."):
            load_image(path)
    finally:
        reads_heif.cache_clear()


def test_the_plug_in_is_not_loaded_for_common_formats():
    """It is a library of 27 MB, which few images need."""
    import subprocess

    code = (
        "import sys; from macosnet_hf import load_image; "
        f"load_image({str(PHOTOS / 'cheetah.jpg')!r}); assert 'pillow_heif' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_file_object_is_read_from_its_start(photo):
    stream = io.BytesIO(encoded(photo, "HEIF"))
    stream.seek(7)
    with open_image(stream) as opened:
        assert opened.size == photo.size


# ---------------------------------------------------------------------------------------------------------------------
# What else is handed over by mistake
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "clip.mp4",
            b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(99),
            "is a film, not an image; save one of its frames",
        ),
        ("noise.mp4", np.random.default_rng(0).bytes(5000), "is a film, not an image; save one of its frames"),
        ("photos.zip", b"PK\3\4" + bytes(99), "is an archive, not an image; unpack it"),
        ("notes.txt", b"hello", "is not an image in a format that can be read.*; save it as JPEG or PNG"),
        ("a.png", png(9, 9, b"")[:30], "damaged"),
    ],
)
def test_mistakes_are_named_with_the_way_out(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageError, match=f"{name}' {words}" if words != "damaged" else words):
        load_image(tmp_path / name)


def test_the_page_names_the_type_of_every_suffix_that_systems_do_not_know():
    """Browsers send `.hif` of cameras without a type, as they do `.heic` where the system does not know it."""
    script = (Path(macosnet_hf.__file__).parent / "demo" / "assets" / "paste.js").read_text(encoding="utf-8")
    pattern = re.search(r"!file\.type && /(.+)/i\.test\(file\.name\)", script)
    suffixes = [suffix for suffix in IMAGE_SUFFIXES if suffix.startswith((".he", ".hi"))]
    assert len(suffixes) == 3
    for suffix in suffixes:
        assert re.search(pattern[1], f"photo{suffix.upper()}", re.IGNORECASE), suffix


def test_every_reader_of_folders_finds_and_reads_them(tmp_path):
    """A data set in a folder, of the command line and of `prepare`, and the size in a header."""
    image = Image.new("RGB", (64, 48), (230, 60, 50))
    (tmp_path / "cats").mkdir()
    for name, format in (("a.HEIC", "HEIF"), ("b.hif", "HEIF"), ("c.avif", "AVIF")):
        (tmp_path / "cats" / name).write_bytes(encoded(image, format, icc_profile=display_p3(), quality=100))
    names = ["a.HEIC", "b.hif", "c.avif"]
    paths, classes = find_images(tmp_path)
    assert ([path.name for path in paths], classes) == (names, ["cats"] * 3)
    assert [file.path for file in find_image_files(str(tmp_path), "train")] == [f"cats/{name}" for name in names]
    for path in paths:
        record = {"path": str(path), "bytes": path.read_bytes()}
        assert record_image_size(record, "here") == (48, 64)
        colour = np.asarray(open_record_image(record, "here")).reshape(-1, 3).mean(axis=0)
        assert np.abs(colour - (250, 31, 34)).max() <= 3
