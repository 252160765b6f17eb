"""What a mask file means: alpha, two values, label maps with void; everything else is refused."""

import io
import json

import numpy as np
import pytest
from archives import coseg, disc
from PIL import Image

from macosnet_hf.collection import hard_mask
from macosnet_hf.commands.main import main
from macosnet_hf.datasets import mask_from_image, read_mask
from macosnet_hf.datasets.images import image_size, open_image
from macosnet_hf.errors import DataError
from macosnet_hf.evaluation.baselines import centre_ellipse
from macosnet_hf.evaluation.predictors import MASK_SIDE
from macosnet_hf.io.image_files import load_image

ROWS, COLUMNS = np.mgrid[:100, :120]
DISTANCE = np.hypot(COLUMNS - 60, ROWS - 50)
OBJECT, RING = DISTANCE < 30, (DISTANCE >= 30) & (DISTANCE < 33)


def labels(number: int = 15) -> np.ndarray:
    """A label map as in PASCAL VOC: the object's label, and 255 around it."""
    values = np.zeros((100, 120), np.uint8)
    values[RING], values[OBJECT] = 255, number
    return values


def palette(values: np.ndarray, colours: list[int]) -> Image.Image:
    image = Image.fromarray(values)
    image.putpalette(colours)
    return image


def voc_palette() -> list[int]:
    """PASCAL VOC's colours: 0 is black, 255 is cream."""
    return [
        sum((index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3))
        for index in range(256)
        for channel in range(3)
    ]


def coloured(alpha: np.ndarray, colour: int) -> Image.Image:
    image = Image.new("RGB", (120, 100), (colour, colour, colour))
    image.putalpha(Image.fromarray(alpha))
    return image


def soft_alpha() -> np.ndarray:
    return np.clip(np.where(OBJECT, 128, 127) + ((30 - DISTANCE) * 40).astype(int), 0, 255).astype(np.uint8)


def nearly_opaque() -> Image.Image:
    """A mask that an editor saved with an alpha channel."""
    alpha = np.full((100, 120), 255, np.uint8)
    alpha[3, 4] = 254
    image = Image.fromarray(OBJECT.astype(np.uint8) * 255).convert("RGB")
    image.putalpha(Image.fromarray(alpha))
    return image


MASKS = {
    "grey 0 and 255": lambda: Image.fromarray(OBJECT.astype(np.uint8) * 255),
    "grey 0 and 1": lambda: Image.fromarray(OBJECT.astype(np.uint8)),
    "grey 30 and 40": lambda: Image.fromarray(np.where(OBJECT, 40, 30).astype(np.uint8)),
    "one bit": lambda: Image.fromarray(OBJECT),
    "16 bit": lambda: Image.fromarray(OBJECT.astype(np.uint16) * 65535),
    "float": lambda: Image.fromarray(OBJECT.astype(np.float32)),
    "colour": lambda: Image.fromarray(np.where(OBJECT[..., None], (220, 40, 40), (0, 0, 90)).astype(np.uint8)),
    "palette 0 and 1": lambda: palette(OBJECT.astype(np.uint8), [0, 0, 0, 128, 0, 0]),
    "palette, white is index 0": lambda: palette((~OBJECT).astype(np.uint8), [255, 255, 255, 0, 0, 0]),
    "white cutout": lambda: coloured(OBJECT.astype(np.uint8) * 255, 255),
    "black cutout": lambda: coloured(OBJECT.astype(np.uint8) * 255, 0),
    "cutout with a soft edge": lambda: coloured(soft_alpha(), 255),
    "grey cutout": lambda: coloured(OBJECT.astype(np.uint8) * 255, 200).convert("LA"),
    "opaque": lambda: Image.fromarray(OBJECT.astype(np.uint8) * 255).convert("RGBA"),
    "nearly opaque": lambda: nearly_opaque(),
    "white on white with a transparent colour": lambda: coloured(OBJECT.astype(np.uint8) * 255, 9).quantize(),
}
LABEL_MAPS = {
    "grey labels": lambda: Image.fromarray(labels()),
    "grey labels in colour": lambda: Image.fromarray(labels()).convert("RGB"),
    "palette": lambda: palette(labels(), voc_palette()),
    "palette of odd colours": lambda: palette(
        labels(), [value for index in range(256) for value in (index, 255 - index, 128)]
    ),
}


def as_file(image: Image.Image) -> dict:
    stream = io.BytesIO()
    image.save(stream, "TIFF" if image.mode == "F" else "PNG")
    return {"bytes": stream.getvalue(), "path": None}


@pytest.mark.parametrize("name", MASKS)
def test_masks_without_void(name):
    for given in (MASKS[name](), as_file(MASKS[name]())):
        mask = read_mask(given, "here", (100, 120))
        np.testing.assert_array_equal(mask.object, OBJECT)
        assert mask.counted is None


@pytest.mark.parametrize("name", LABEL_MAPS)
def test_label_maps_leave_their_void_out(name):
    mask = read_mask(as_file(LABEL_MAPS[name]()), "here", (100, 120))
    np.testing.assert_array_equal(mask.object, OBJECT)
    np.testing.assert_array_equal(mask.counted, ~RING)
    np.testing.assert_array_equal(mask_from_image(LABEL_MAPS[name](), "here"), OBJECT)


def test_the_void_of_a_map_with_a_transparent_background_is_left_out():
    stream = io.BytesIO()
    palette(labels(), voc_palette()).save(stream, "PNG", transparency=0)
    mask = read_mask({"bytes": stream.getvalue(), "path": None}, "here")
    np.testing.assert_array_equal(mask.object, OBJECT)
    np.testing.assert_array_equal(mask.counted, ~RING)


def test_all_labels_of_a_map_are_object():
    values = labels()
    values[:, :60][OBJECT[:, :60]] = 3
    np.testing.assert_array_equal(mask_from_image(Image.fromarray(values), "here"), OBJECT)
    np.testing.assert_array_equal(mask_from_image(palette(values, voc_palette()), "here"), OBJECT)


def test_an_object_that_fills_its_image_up_to_the_void_is_the_object():
    """A map of PASCAL VOC without background holds two values, of which void is the brighter one."""
    filled = np.where(labels() == 255, 255, 15).astype(np.uint8)
    found = read_mask(palette(filled, voc_palette()), "here")
    np.testing.assert_array_equal(found.object, filled == 15)
    np.testing.assert_array_equal(found.counted, filled == 15)
    grey = palette(filled, np.arange(256).repeat(3).tolist())  # a grey image with a palette: two values
    np.testing.assert_array_equal(mask_from_image(grey, "here"), filled == 255)


@pytest.mark.parametrize(("value", "expected"), [(0, False), (1, True), (255, True)])
def test_one_value_is_all_or_nothing(value, expected):
    assert (mask_from_image(Image.new("L", (5, 4), value), "here") == expected).all()


def jpeg(values: np.ndarray) -> Image.Image:
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "JPEG", quality=60)
    return Image.open(stream)


def smooth(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values).resize((60, 50), Image.Resampling.BOX)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: jpeg(OBJECT.astype(np.uint8) * 255), "grey values"),
        (lambda: Image.fromarray((DISTANCE * 3).clip(0, 255).astype(np.uint8)), "grey values"),
        (lambda: smooth(OBJECT.astype(np.uint8) * 255), "grey edges"),
        (lambda: Image.fromarray(np.where(OBJECT, 255, np.where(RING, 128, 0)).astype(np.uint8)), "grey edges"),
        (lambda: Image.fromarray(OBJECT.astype(np.uint8) * 255).resize((60, 100), Image.Resampling.BOX), "grey edges"),
        (lambda: Image.fromarray(np.where(OBJECT, 1, np.where(RING, 3, 2)).astype(np.uint8)), "without a background"),
        (lambda: palette(labels(), voc_palette()).convert("RGB"), "3 colours"),
        (lambda: palette(OBJECT.astype(np.uint8), [9, 9, 9, 9, 9, 9]), "look the same"),
        (lambda: Image.fromarray(np.where(OBJECT, np.nan, 1).astype(np.float32)), "finite"),
        (lambda: Image.fromarray((DISTANCE > 60) * np.float32(0.3) + OBJECT * np.float32(0.7)), "whole numbers"),
        (lambda: Image.fromarray(np.int32(OBJECT) - np.int32(2) * (DISTANCE > 60)), "below 0"),
    ],
)
def test_what_is_no_mask_is_refused_with_the_reason(make, reason):
    with pytest.raises(DataError, match=f"photo 7.* is not a mask: .*{reason}") as error:
        read_mask(make(), "photo 7")
    assert "\n" not in str(error.value)


def test_evaluate_leaves_void_out_of_p_and_j(tmp_path):
    """Against the measures by hand, of what is not void."""
    root = coseg(tmp_path, classes=("Cat",))
    expected = []
    for path in sorted((root / "masks" / "Cat").iterdir()):
        truth = np.asarray(Image.open(path))
        values = np.where(truth, 7, 0).astype(np.uint8)
        values[:, 40:] = 255  # beside the object
        Image.fromarray(values).save(path)
        found = hard_mask(centre_ellipse(MASK_SIDE, MASK_SIDE), truth.shape)
        assert found[:, 40:].any()
        found, truth = found[:, :40], truth[:, :40]
        expected.append(((found == truth).mean(), (found & truth).sum() / (found | truth).sum()))
    words = ["evaluate", "coseg", "--data", str(root), "--baseline", "centre-grabcut", "--refine", "none"]
    assert main([*words, "--json", str(tmp_path / "report.json")]) == 0
    metrics = json.loads((tmp_path / "report.json").read_text())["metrics"]
    np.testing.assert_allclose((metrics["precision"], metrics["jaccard"]), np.mean(expected, axis=0))


def test_the_size_of_an_image_in_memory_is_its_upright_size(tmp_path):
    image = Image.new("RGB", (130, 200), (9, 90, 200))
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in ("jpg", "png", "tiff"):
        image.save(tmp_path / f"a.{suffix}", exif=exif)
        with Image.open(tmp_path / f"a.{suffix}") as opened:
            assert image_size(opened, "here") == (130, 200)
            assert open_image(opened, "here").size == (200, 130)
            assert image_size(opened, "here") == (130, 200)  # loaded by now
        assert image_size(tmp_path / f"a.{suffix}", "here") == (130, 200)
    assert image_size(image, "here") == (200, 130)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA"])
def test_a_mask_is_turned_as_its_image_is(tmp_path, mode):
    """A program that copies the EXIF block of a phone's photo into the mask; square, so that no size tells."""
    stored = np.zeros((60, 60), bool)
    stored[5:20, 30:50] = True
    image = Image.fromarray(stored.astype(np.uint8) * 255)
    if mode == "P":
        image = palette(stored.astype(np.uint8) * 3, voc_palette())
    elif mode == "RGBA":
        image = Image.merge("RGBA", [Image.new("L", (60, 60), 9)] * 3 + [image])
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in ("png", "tiff"):
        image.save(tmp_path / f"mask.{suffix}", exif=exif)
        found = mask_from_image(tmp_path / f"mask.{suffix}", "here")
        np.testing.assert_array_equal(found, np.rot90(stored, -1))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "RGB"])
def test_turned_tiff_files_that_a_caller_has_opened_are_those_of_the_path(tmp_path, mode):
    """PIL mixes up the rows of those that it maps into memory: a stripe became a scatter, without a word."""
    stored = np.zeros((30, 50), np.uint8)
    stored[:10, :20] = 255
    image = Image.fromarray(stored.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(stored).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.tif", exif=exif)
    expected = np.asarray(load_image(tmp_path / "a.tif"))
    np.testing.assert_array_equal(expected[..., 0] > 127, np.rot90(stored > 127, -1))
    with Image.open(tmp_path / "a.tif") as opened:
        np.testing.assert_array_equal(np.asarray(load_image(opened)), expected)
    if mode != "CMYK":
        with Image.open(tmp_path / "a.tif") as opened:
            found = mask_from_image(opened, "here", (50, 30))
        np.testing.assert_array_equal(found, mask_from_image(tmp_path / "a.tif", "here", (50, 30)))


def test_the_disc_of_the_archives_is_read(tmp_path):
    Image.fromarray(disc()).save(tmp_path / "a.png")
    np.testing.assert_array_equal(mask_from_image(tmp_path / "a.png", "here"), disc())
