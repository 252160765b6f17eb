"""The image processor: images to network input, network output back to pixels of the original images.

The images of a pair are never square and never of the same size here, so that no mix-up of height and width, or of
source and target, can hide.
"""

import base64
import io
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from real_photos import PHOTOS

from macosnet_hf.errors import ImageError, InputError, MaCoSNetError
from macosnet_hf.geometry import Transform
from macosnet_hf.image_processing_macosnet import MaCoSNetImageProcessor, read_image
from macosnet_hf.io.image_files import load_image
from macosnet_hf.modeling_macosnet import MaCoSNetKeypointMatchingOutput

SOURCE_SIZE = (34, 50)  # (height, width)
TARGET_SIZE = (61, 23)
SIZES = [[SOURCE_SIZE, TARGET_SIZE]]


def photo(name: str, size: tuple[int, int]) -> Image.Image:
    """A real image at (height, width)."""
    with Image.open(PHOTOS / name) as image:
        return image.convert("RGB").resize((size[1], size[0]), Image.Resampling.LANCZOS)


@pytest.fixture(scope="module")
def pair() -> list[Image.Image]:
    return [photo("cheetah1.jpg", SOURCE_SIZE), photo("lion.jpg", TARGET_SIZE)]


@pytest.fixture(scope="module")
def processor() -> MaCoSNetImageProcessor:
    return MaCoSNetImageProcessor()


# ---------------------------------------------------------------------------------------------------------------------
# Before the network
# ---------------------------------------------------------------------------------------------------------------------


def slow_antialiased_resize(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """Triangle filter widened by the reduction, in float64, one axis after the other."""

    def along_rows(values: np.ndarray, length: int) -> np.ndarray:
        scale = len(values) / length
        support = max(scale, 1.0)
        rows = []
        for k in range(length):
            middle = (k + 0.5) * scale
            total, weights = 0.0, 0.0
            for i in range(len(values)):
                weight = max(0.0, 1 - abs((i + 0.5 - middle) / support))
                total, weights = total + weight * values[i], weights + weight
            rows.append(total / weights)
        return np.array(rows)

    wide = along_rows(array.astype(np.float64).transpose(1, 0, 2), width).transpose(1, 0, 2)
    return along_rows(wide, height)


def test_pixel_values_against_a_slow_reference(pair):
    processor = MaCoSNetImageProcessor(
        size={"height": 16, "width": 20}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]
    )
    values = processor(pair, return_tensors="pt")["pixel_values"]
    assert values.shape == (1, 2, 3, 16, 20)
    assert values.dtype == torch.float32
    for view, image in enumerate(pair):
        resized = slow_antialiased_resize(np.asarray(image), 16, 20)
        expected = ((resized / 255 - (0.1, 0.2, 0.3)) / (0.4, 0.5, 0.6)).transpose(2, 0, 1)
        # PIL rounds to 8 bits after each axis.
        assert np.abs(values[0, view].numpy() - expected).max() < 1.6 / 255 / 0.4


def test_defaults(processor, pair):
    values = processor(pair)["pixel_values"]
    assert isinstance(values, np.ndarray)
    assert values.shape == (1, 2, 3, 240, 240)
    assert values.dtype == np.float32
    assert -1 <= values.min() < values.max() <= 1
    assert processor.model_input_names == ["pixel_values"]


def test_pairs_triplets_and_batches(processor, pair):
    a, b = pair
    single = processor([a, b], return_tensors="pt")["pixel_values"]
    other = processor([b, a], return_tensors="pt")["pixel_values"]
    assert torch.equal(single.flip(1), other)
    assert torch.equal(processor((a, b), return_tensors="pt")["pixel_values"], single)
    batch = processor([[a, b], [b, a]], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch, torch.cat((single, other)))
    assert torch.equal(processor([(a, b)], return_tensors="pt")["pixel_values"], single)
    triplet = processor([a, b, a], return_tensors="pt")["pixel_values"]
    assert triplet.shape == (1, 3, 3, 240, 240)
    assert torch.equal(triplet[:, :2], single)
    triplets = processor([[a, b, a], [b, b, a]], return_tensors="pt")["pixel_values"]
    assert torch.equal(triplets[:1], triplet)
    assert torch.equal(triplets[1, 0], triplet[0, 1])


def test_views_are_the_same_images_one_by_one(processor, pair):
    views = processor.preprocess_views(pair, return_tensors="pt")["pixel_values"]
    assert torch.equal(views, processor(pair, return_tensors="pt")["pixel_values"][0])
    assert processor.preprocess_views(pair[0])["pixel_values"].shape == (1, 3, 240, 240)
    assert processor.preprocess_views([*pair, *pair, pair[0]])["pixel_values"].shape == (5, 3, 240, 240)
    assert processor.preprocess_views(pair, size={"height": 32, "width": 48})["pixel_values"].shape == (2, 3, 32, 48)


@pytest.mark.parametrize(
    "kind", ["path", "hwc", "chw", "tensor", "unit", "unit tensor", "bytes as float", "int64", "bf16"]
)
def test_every_kind_of_image(processor, pair, kind, tmp_path):
    array = np.asarray(pair[0])
    pair[0].save(tmp_path / "a.png")
    image, tolerance = {
        "path": (str(tmp_path / "a.png"), 0),
        "hwc": (array, 0),
        "chw": (np.ascontiguousarray(array.transpose(2, 0, 1)), 0),
        "tensor": (torch.from_numpy(array.copy()).permute(2, 0, 1), 0),
        "unit": (array.astype(np.float64) / 255, 2 / 255),  # floating-point images are not rounded in between
        "unit tensor": (torch.from_numpy(array.copy()).permute(2, 0, 1) / 255, 2 / 255),
        "bytes as float": (array.astype(np.float32), 2 / 255),
        "int64": (array.astype(np.int64), 0),
        "bf16": ((torch.from_numpy(array.copy()).permute(2, 0, 1) / 255).bfloat16(), 4 / 255),
    }[kind]
    expected = processor.preprocess_views(pair[0])["pixel_values"]
    found = processor.preprocess_views(image)["pixel_values"]
    assert np.abs(found - expected).max() <= 2 * tolerance
    together = processor([image, pair[1]])["pixel_values"]
    assert np.array_equal(together[0, 0], found[0])


def test_arrays_of_whole_batches(processor, pair):
    same = [pair[0], pair[1].resize(pair[0].size)]
    array = np.stack([np.asarray(image) for image in same])
    expected = processor(same)["pixel_values"]
    assert np.array_equal(processor(array)["pixel_values"], expected)
    assert np.array_equal(processor(torch.from_numpy(array[None]).permute(0, 1, 4, 2, 3))["pixel_values"], expected)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "I", "F"])
def test_pil_images_of_any_mode_look_as_load_image_sees_them(processor, pair, mode):
    if mode in ("I;16", "I"):
        image = Image.fromarray(
            np.asarray(pair[0].convert("L")).astype(np.uint16 if mode == "I;16" else np.int32) * 257
        )
    else:
        image = pair[0].convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    found = processor.preprocess_views(image)["pixel_values"]
    assert np.array_equal(found, processor.preprocess_views(load_image(image))["pixel_values"])
    assert found.std() > 0.05


def test_alpha_in_arrays_is_laid_on_white(processor):
    array = np.full((20, 30, 4), 77, np.uint8)
    array[..., 3] = 0
    for image in (array, array.astype(np.float32) / 255, array.astype(np.float32)):
        assert np.allclose(processor.preprocess_views(image)["pixel_values"], 1.0, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("white", [1, 255])
def test_values_a_little_beyond_white_change_nothing_else(processor, channels, white):
    """One value of 1.0000002 turned an image of 0..1 black."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(channels, 100, 100, generator=generator) * white
    image[-1, 0, 0] = white
    expected = processor.preprocess_views(image)["pixel_values"]
    assert expected.std() > 0.1
    for outlier in (1.0000002, 1.06, 1.2):
        changed = image.clone()
        changed[-1, 0, 0] = outlier * white
        assert np.abs(processor.preprocess_views(changed)["pixel_values"] - expected).max() <= 1e-5


def test_an_image_resized_by_a_cubic_filter_is_itself(processor, pair):
    small = np.asarray(pair[0], np.float32)[::2, ::2] / 255
    small[:, 5:9] = 1
    small[:, 9:13] = 0
    enlarged = torch.nn.functional.interpolate(
        torch.from_numpy(small).permute(2, 0, 1)[None], scale_factor=3, mode="bicubic"
    )[0]
    assert enlarged.min() < -0.01
    assert enlarged.max() > 1.01
    found = processor.preprocess_views(enlarged)["pixel_values"]
    np.testing.assert_array_equal(found, processor.preprocess_views(enlarged.clamp(0, 1))["pixel_values"])


def test_floating_point_ranges_are_not_guessed(processor):
    image = np.random.default_rng(0).random((20, 30, 3)).astype(np.float32)
    image[0, 0, 0] = 1
    with pytest.warns(UserWarning, match=r"from .* to 1\.7; it is taken as 0\.\.1"):
        processor.preprocess_views(image * 1.7)
    for values in (image * 2.1, image * 17, image * 253, image - 0.3, (image - 0.5) / 0.5, image * 400):
        with pytest.raises(InputError, match=r"must hold 0\.\.1 or 0\.\.255, but its values go from"):
            processor.preprocess_views(values)
    as_it_is = processor.preprocess_views(image * 17, do_rescale=False, do_normalize=False, do_resize=False)
    np.testing.assert_allclose(as_it_is["pixel_values"][0].transpose(1, 2, 0), image * 17)
    dark = np.full((20, 30, 3), 3.0)  # of 8 bits by its whole numbers
    expected = processor.preprocess_views(dark.astype(np.uint8))["pixel_values"]
    np.testing.assert_allclose(processor.preprocess_views(dark)["pixel_values"], expected, atol=1e-6)


def test_colours_and_an_alpha_of_different_ranges_are_refused(processor):
    colours = np.random.default_rng(0).random((20, 30, 3)).astype(np.float32)
    colours[0, 0, 0] = 1
    alpha = np.ones((20, 30, 1), np.float32)
    expected = processor.preprocess_views(colours)["pixel_values"]
    for scale in (1, 255):
        whole = np.concatenate((colours, alpha), axis=2) * np.float32(scale)
        np.testing.assert_allclose(processor.preprocess_views(whole)["pixel_values"], expected, atol=1e-5)
    for scales in ((1, 255), (255, 1)):
        mixed = np.concatenate((colours * np.float32(scales[0]), alpha * np.float32(scales[1])), axis=2)
        with pytest.raises(InputError, match=r"give both as 0\.\.1 or both as 0\.\.255"):
            processor.preprocess_views(mixed)
    black = np.concatenate((np.zeros_like(colours), alpha * 255), axis=2)
    np.testing.assert_allclose(
        processor.preprocess_views(black)["pixel_values"], processor.preprocess_views(0 * colours)["pixel_values"]
    )


def green_is_red() -> bytes:
    """An ICC profile."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"XYZ_").replace(b"gXYZ", b"rXYZ").replace(b"XYZ_", b"gXYZ")


def test_colours_of_a_profile_become_srgb(processor, pair, tmp_path):
    """By path, as an open file and as a PIL image, as `load_image` does it."""
    pair[0].save(tmp_path / "profile.png", icc_profile=green_is_red())
    red, green, blue = pair[0].split()
    loaded = load_image(tmp_path / "profile.png")
    difference = np.abs(np.asarray(loaded, int) - np.asarray(Image.merge("RGB", (green, red, blue)), int))
    assert difference.max() <= 2
    expected = processor.preprocess_views(loaded)["pixel_values"]
    with Image.open(tmp_path / "profile.png") as opened:
        for image in (str(tmp_path / "profile.png"), opened, opened.copy()):
            np.testing.assert_array_equal(processor.preprocess_views(image)["pixel_values"], expected)


def test_exif_orientation_is_applied_once(processor, pair):
    stored = pair[0].transpose(Image.Transpose.ROTATE_90)  # lies on its side, orientation 6 turns it back
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    stored.save(buffer, "PNG", exif=exif)
    expected = processor.preprocess_views(pair[0])["pixel_values"]
    with Image.open(buffer) as opened:
        assert np.array_equal(processor.preprocess_views(opened)["pixel_values"], expected)
    assert np.array_equal(processor.preprocess_views(load_image(buffer.getvalue()))["pixel_values"], expected)


def test_settings_for_one_call(processor, pair):
    values = processor(pair, do_rescale=False, do_normalize=False, size={"height": 34, "width": 50})["pixel_values"]
    assert np.array_equal(values[0, 0].transpose(1, 2, 0), np.asarray(pair[0]))
    raw = processor([pair[0], pair[0]], do_resize=False, do_normalize=False)["pixel_values"]
    assert raw.shape == (1, 2, 3, 34, 50)
    assert np.allclose(raw[0, 1].transpose(1, 2, 0), np.asarray(pair[0]) / 255)
    assert processor(pair, size=32)["pixel_values"].shape == (1, 2, 3, 32, 32)
    assert processor.size == {"height": 240, "width": 240}, "the processor itself is unchanged"
    nearest = processor(pair, resample=Image.Resampling.NEAREST)["pixel_values"]
    assert not np.array_equal(nearest, processor(pair)["pixel_values"])


@pytest.mark.parametrize(
    "images",
    [
        "single",
        [],
        "one",
        "four",
        "mixed",
        "nested deeper",
        None,
        7,
        [None, None],
        [np.zeros((5, 5, 2), np.uint8)] * 2,
        [np.zeros((0, 5, 3), np.uint8)] * 2,
        [np.zeros((5, 5, 3), bool)] * 2,
        [np.full((5, 5, 3), 300)] * 2,
        [np.full((5, 5, 3), -0.5)] * 2,
        [np.full((5, 5, 3), np.nan)] * 2,
    ],
)
def test_what_is_no_pair(processor, pair, images):
    a, b = pair
    named = {"single": a, "one": [a], "four": [a, b, a, b], "mixed": [[a, b], [a, b, a]], "nested deeper": [[[a, b]]]}
    with pytest.raises(InputError):
        processor(named[images] if isinstance(images, str) else images)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"image_std": [0, 1, 1]}, "image_std"),  # some versions of transformers take floating-point numbers only
        ({"image_std": [0.0, 1.0, 1.0]}, "image_std must be above 0"),
        ({"image_std": [-1.0, 1.0, 1.0]}, "image_std must be above 0"),
        ({"image_mean": [0.5] * 4}, "image_mean must be one finite number or three"),
        ({"image_std": [0.5] * 2}, "image_std must be one finite number or three"),
        ({"image_mean": [0.5, float("nan"), 0.5]}, "image_mean must be one finite number or three"),
        ({"image_mean": 0.5, "image_std": [[1.0, 1.0, 1.0]]}, "image_std"),
        ({"rescale_factor": 0.0}, "rescale_factor must be a positive number"),
        ({"rescale_factor": float("nan")}, "rescale_factor must be a positive number"),
        ({"rescale_factor": float("inf")}, "rescale_factor must be a positive number"),
    ],
)
def test_statistics_that_cannot_normalise(processor, pair, settings, named):
    with pytest.raises(InputError, match=named):
        processor(pair, **settings)


@pytest.mark.parametrize("images", [[], None, [[]], 7])
def test_what_is_no_list_of_views(processor, images):
    with pytest.raises(InputError):
        processor.preprocess_views(images)


def test_a_path_that_cannot_be_read(processor, pair, tmp_path):
    (tmp_path / "text.jpg").write_text("hello")
    for path in (tmp_path / "missing.jpg", tmp_path / "text.jpg"):
        with pytest.raises(ImageError, match=path.name):
            processor([str(path), pair[0]])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16", "CMYK"])
def test_a_path_a_url_of_bytes_and_an_image_are_read_the_same_way(pair, tmp_path, mode):
    """transformers' loader clips 16 bits, shows what lies under transparency and loses a palette's profile."""
    image = pair[0].convert("RGB").resize((80, 60))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    image.save(path, **({"icc_profile": green_is_red()} if mode == "P" else {}))
    expected = np.asarray(load_image(path))
    inline = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    with Image.open(path) as opened:
        for source in (str(path), inline, opened):
            np.testing.assert_array_equal(np.asarray(read_image(source)), expected)


@pytest.mark.parametrize("where", ["path", "inline"])
def test_formats_that_start_programs_are_not_opened(tmp_path, where):
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    (tmp_path / "a.png").write_bytes(eps)
    inline = "data:image/png;base64," + base64.b64encode(eps).decode()
    with pytest.raises(ImageError, match="cannot identify image file"):
        read_image(str(tmp_path / "a.png") if where == "path" else inline)


@pytest.mark.parametrize(
    "options",
    [
        {"do_center_crop": True, "crop_size": {"height": 8, "width": 8}},
        {"do_pad": True},
        {"size": {"shortest_edge": 100}},
        {"do_resize": False},
        {"data_format": "channels_last"},
    ],
)
def test_settings_that_make_no_sense_here(processor, pair, options):
    with pytest.raises(InputError):
        processor(pair, **options)


# ---------------------------------------------------------------------------------------------------------------------
# Saving and loading
# ---------------------------------------------------------------------------------------------------------------------


def test_save_and_load(pair, tmp_path):
    original = MaCoSNetImageProcessor(
        size={"height": 96, "width": 128}, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
    )
    original.save_pretrained(tmp_path)
    loaded = MaCoSNetImageProcessor.from_pretrained(tmp_path)
    assert np.array_equal(loaded(pair)["pixel_values"], original(pair)["pixel_values"])
    settings = original.to_dict()
    settings["auto_map"] = {"AutoImageProcessor": "image_processing_macosnet.MaCoSNetImageProcessor"}
    assert loaded.to_dict() == settings
    overridden = MaCoSNetImageProcessor.from_pretrained(tmp_path, size={"height": 32, "width": 32})
    assert overridden(pair)["pixel_values"].shape[-2:] == (32, 32)


def test_remote_code_in_a_process_without_the_package(pair, tmp_path):
    """The folder alone is enough: loaded with `trust_remote_code` where macosnet_hf cannot be imported, saved again."""
    folder = tmp_path / "checkpoint"
    processor = MaCoSNetImageProcessor(size={"height": 32, "width": 48})
    processor.save_pretrained(folder)
    expected = processor(pair)["pixel_values"]
    np.save(tmp_path / "expected.npy", expected)
    for name, image in zip("ab", pair, strict=True):
        image.save(tmp_path / f"{name}.png")
    code = f"""
import sys
sys.modules["macosnet_hf"] = None  # importing it fails from here on
import numpy as np
from PIL import Image
from transformers import AutoImageProcessor
root = {str(tmp_path)!r}
pair = [Image.open(f"{{root}}/{{name}}.png") for name in "ab"]
for folder in ("checkpoint", "again"):
    processor = AutoImageProcessor.from_pretrained(f"{{root}}/{{folder}}", trust_remote_code=True)
    assert np.array_equal(processor(pair)["pixel_values"], np.load(f"{{root}}/expected.npy"))
    processor.save_pretrained(f"{{root}}/again")
drawing = processor.visualize_keypoint_matching(
    pair, [{{"keypoints0": [[1.0, 2.0]], "keypoints1": [[2.0, 1.0]], "matching_scores": [0.5]}}]
)
print(type(processor).__module__, drawing[0].size)
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("transformers_modules.")


def test_what_travels_to_the_hub():
    from transformers.dynamic_module_utils import get_imports, get_relative_import_files

    import macosnet_hf.image_processing_macosnet as module

    needed = {Path(file).name for file in get_relative_import_files(module.__file__)}
    flat = {path.name for path in Path(module.__file__).parent.glob("[a-z]*.py")}
    assert needed == flat, "beside modules of another version it would not load"
    for file in [module.__file__, *get_relative_import_files(module.__file__)]:
        assert "macosnet_hf" not in get_imports(file)
        assert "cv2" not in get_imports(file)


# ---------------------------------------------------------------------------------------------------------------------
# Matches
# ---------------------------------------------------------------------------------------------------------------------


def matching_outputs() -> MaCoSNetKeypointMatchingOutput:
    """Two pairs of five keypoints; partners are crossed, so that reading them row by row would be wrong."""
    generator = torch.Generator().manual_seed(0)
    return MaCoSNetKeypointMatchingOutput(
        keypoints=torch.rand((2, 2, 5, 2), generator=generator),
        matches=torch.tensor([[[3, -1, 0, 4, 1], [2, 4, -1, 0, 3]], [[-1, -1, 4, -1, 2], [-1, -1, 4, -1, 2]]]),
        matching_scores=torch.tensor(
            [[[0.9, 0.8, 0.3, 0.0, 0.6], [0.3, 0.6, 0.5, 0.9, 0.0]], [[0.1, 0.2, 0.7, 0.5, 0.4]] * 2]
        ),
    )


@pytest.mark.parametrize("threshold", [0.0, 0.35, 0.95])
@pytest.mark.parametrize("kind", ["list", "tensor", "array", "tuples"])
def test_matches_in_pixels(processor, threshold, kind):
    outputs = matching_outputs()
    sizes = [[(34, 50), (61, 23)], [(100, 301), (200, 11)]]
    given = {
        "list": sizes,
        "tensor": torch.tensor(sizes),
        "array": np.array(sizes),
        "tuples": tuple(tuple(pair) for pair in sizes),
    }[kind]
    results = processor.post_process_keypoint_matching(outputs, given, threshold)
    assert len(results) == 2
    for row, result in enumerate(results):
        expected0, expected1, scores = [], [], []
        for i in range(5):
            j = int(outputs.matches[row, 0, i])
            score = float(outputs.matching_scores[row, 0, i])
            if j == -1 or score <= threshold:
                continue
            (height0, width0), (height1, width1) = sizes[row]
            x0, y0 = outputs.keypoints[row, 0, i].tolist()
            x1, y1 = outputs.keypoints[row, 1, j].tolist()
            expected0.append((x0 * width0 - 0.5, y0 * height0 - 0.5))
            expected1.append((x1 * width1 - 0.5, y1 * height1 - 0.5))
            scores.append(score)
        assert result["keypoints0"].shape == (len(scores), 2)
        assert result["keypoints0"].dtype == torch.float32
        assert np.allclose(result["keypoints0"], np.array(expected0).reshape(-1, 2), atol=1e-4)
        assert np.allclose(result["keypoints1"], np.array(expected1).reshape(-1, 2), atol=1e-4)
        assert np.allclose(result["matching_scores"], scores)


def test_keypoints_of_zero_and_one_are_the_edges_of_the_image(processor):
    outputs = MaCoSNetKeypointMatchingOutput(
        keypoints=torch.tensor([[[[0.0, 0.0], [1.0, 1.0], [0.5, 0.0]]] * 2]),
        matches=torch.tensor([[[0, 1, 2]] * 2]),
        matching_scores=torch.ones(1, 2, 3),
    )
    result = processor.post_process_keypoint_matching(outputs, SIZES)[0]
    assert result["keypoints0"].tolist() == [[-0.5, -0.5], [49.5, 33.5], [24.5, -0.5]]
    assert result["keypoints1"].tolist() == [[-0.5, -0.5], [22.5, 60.5], [11, -0.5]]


def test_gradients_and_half_precision_do_not_disturb(processor):
    outputs = matching_outputs()
    outputs["keypoints"] = outputs.keypoints.bfloat16().requires_grad_()
    outputs["matching_scores"] = outputs.matching_scores.bfloat16()
    result = processor.post_process_keypoint_matching(outputs, [SIZES[0], SIZES[0]])[0]
    assert not result["keypoints0"].requires_grad
    assert result["keypoints0"].dtype == torch.float32


BAD_SIZES = [
    None,
    "240",
    [],
    [[34, 50]],
    [(34, 50), (61, 23)],
    [[(34, 50), (61, 23)], [(34, 50), (61, 23)]],
    [[(34, 50, 3), (61, 23, 3)]],
    [[(34, 50), (61,)]],
    [[(0, 50), (61, 23)]],
    [[(-34, 50), (61, 23)]],
    [[(34.5, 50), (61, 23)]],
    [[(math.nan, 50), (61, 23)]],
]


@pytest.mark.parametrize("sizes", BAD_SIZES)
def test_sizes_that_do_not_fit(processor, sizes):
    matches = MaCoSNetKeypointMatchingOutput(
        keypoints=torch.rand(1, 2, 3, 2), matches=torch.zeros(1, 2, 3).long(), matching_scores=torch.ones(1, 2, 3)
    )
    with pytest.raises(InputError, match="target_sizes"):
        processor.post_process_keypoint_matching(matches, sizes)
    with pytest.raises(InputError, match="target_sizes"):
        processor.post_process_dense_flow(Transform(torch.zeros(1, 2, 6)), sizes)
    if sizes is not None:
        with pytest.raises(InputError, match="target_sizes"):
            processor.post_process_cosegmentation(
                MaCoSNetKeypointMatchingOutput(mask_logits=torch.zeros(1, 2, 4, 4)), sizes
            )


def test_outputs_without_the_field_are_named(processor):
    empty = MaCoSNetKeypointMatchingOutput(loss=torch.zeros(()))
    with pytest.raises(InputError, match="keypoints"):
        processor.post_process_keypoint_matching(empty, SIZES)
    with pytest.raises(InputError, match="mask_logits"):
        processor.post_process_cosegmentation(empty, SIZES)
    with pytest.raises(InputError, match="affine"):
        processor.post_process_dense_flow(empty, SIZES)


# ---------------------------------------------------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------------------------------------------------


def slow_resize(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear with half-pixel centres, one pixel at a time in float64."""
    result = np.zeros((height, width))
    for row in range(height):
        for column in range(width):
            y = min(max((row + 0.5) * values.shape[0] / height - 0.5, 0), values.shape[0] - 1)
            x = min(max((column + 0.5) * values.shape[1] / width - 0.5, 0), values.shape[1] - 1)
            top, left = min(int(y), values.shape[0] - 2), min(int(x), values.shape[1] - 2)
            v, u = y - top, x - left
            result[row, column] = (
                values[top, left] * (1 - v) * (1 - u)
                + values[top, left + 1] * (1 - v) * u
                + values[top + 1, left] * v * (1 - u)
                + values[top + 1, left + 1] * v * u
            )
    return result


@pytest.fixture
def mask_outputs() -> MaCoSNetKeypointMatchingOutput:
    return MaCoSNetKeypointMatchingOutput(
        mask_logits=torch.randn((1, 2, 12, 12), generator=torch.Generator().manual_seed(1)) * 2
    )


def test_soft_masks_against_a_slow_reference(processor, mask_outputs):
    masks = processor.post_process_soft_masks(mask_outputs, SIZES)[0]
    for view, (height, width) in enumerate(SIZES[0]):
        soft = 1 / (1 + np.exp(-mask_outputs.mask_logits[0, view].double().numpy()))
        assert masks[view].shape == (height, width)
        assert np.allclose(masks[view], slow_resize(soft, height, width), atol=1e-5)


@pytest.mark.parametrize("threshold", [0.3, 0.5])
def test_hard_masks_in_each_images_own_size(processor, mask_outputs, threshold):
    hard = processor.post_process_cosegmentation(mask_outputs, SIZES, threshold=threshold)
    soft = processor.post_process_soft_masks(mask_outputs, SIZES)
    assert len(hard) == 1
    for mask, expected, size in zip(hard[0], soft[0], SIZES[0], strict=True):
        assert mask.dtype == torch.bool
        assert tuple(mask.shape) == size
        assert torch.equal(mask, expected >= threshold)
        assert 0 < mask.float().mean() < 1


def test_masks_without_sizes_have_the_networks_size(processor, mask_outputs):
    masks = processor.post_process_cosegmentation(mask_outputs)[0]
    assert torch.equal(torch.stack(masks), mask_outputs.mask_logits[0] >= 0)


def test_sizes_come_from_the_images(processor, mask_outputs, pair):
    expected = processor.post_process_cosegmentation(mask_outputs, SIZES)[0]
    exif = pair[0].transpose(Image.Transpose.ROTATE_90)
    exif.getexif()[0x0112] = 6
    for images in (
        pair,
        [pair],
        [[np.asarray(pair[0]), torch.from_numpy(np.asarray(pair[1]).copy()).permute(2, 0, 1)]],
    ):
        found = processor.post_process_cosegmentation(mask_outputs, images=images)[0]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    found = processor.post_process_cosegmentation(mask_outputs, images=[exif, pair[1]])[0]
    assert torch.equal(found[0], expected[0]), "the size of the upright image counts"
    with pytest.raises(InputError, match="disagree"):
        processor.post_process_cosegmentation(mask_outputs, [[SIZES[0][0][::-1], SIZES[0][1]]], images=pair)


def test_label_maps_are_the_masks_as_numbers(processor, mask_outputs):
    for sizes in (None, SIZES):
        maps = processor.post_process_semantic_segmentation(mask_outputs, target_sizes=sizes)
        masks = processor.post_process_cosegmentation(mask_outputs, sizes)
        for found, expected in zip(maps[0], masks[0], strict=True):
            assert found.dtype == torch.int64
            assert torch.equal(found, expected.long())
            assert set(found.unique().tolist()) == {0, 1}


@pytest.mark.parametrize("refine", ["grabcut", "otsu"])
def test_refinement_gets_each_image_with_its_own_mask(processor, refine):
    """A red disc on green, left in one image and low in the other, under a vague soft mask."""
    from macosnet_hf.refinement import refine_mask

    images, truths = [], []
    for height, width, centre in ((60, 90, (30, 30)), (110, 70, (35, 70))):
        y, x = np.mgrid[:height, :width]
        truth = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < 20**2
        noise = np.random.default_rng(0).integers(0, 30, (height, width, 3))
        images.append(
            Image.fromarray((np.where(truth[..., None], (180, 40, 40), (40, 160, 60)) + noise).astype(np.uint8))
        )
        truths.append(truth)
    small = [np.asarray(Image.fromarray(t).convert("L").resize((15, 15), Image.Resampling.BOX)) / 255 for t in truths]
    soft = torch.tensor(np.stack(small)[None]).float() * 0.6 + 0.1
    outputs = MaCoSNetKeypointMatchingOutput(mask_logits=soft.logit())
    masks = processor.post_process_cosegmentation(outputs, images=images, refine=refine)[0]
    soft_masks = processor.post_process_soft_masks(outputs, images=images)[0]
    for mask, soft_mask, image, truth in zip(masks, soft_masks, images, truths, strict=True):
        assert mask.dtype == torch.bool
        assert np.array_equal(mask, refine_mask(np.asarray(image), soft_mask, refine))
        overlap = (mask.numpy() & truth).sum() / (mask.numpy() | truth).sum()
        assert overlap > (0.98 if refine == "grabcut" else 0.75)


def test_masks_that_cannot_be_made(processor, mask_outputs, pair):
    with pytest.raises(InputError, match="needs the images"):
        processor.post_process_cosegmentation(mask_outputs, SIZES, refine="grabcut")
    with pytest.raises(InputError, match="grabcut, otsu, crf, none"):
        processor.post_process_cosegmentation(mask_outputs, SIZES, refine="magic")
    with pytest.raises(InputError, match="pairs"):
        processor.post_process_cosegmentation(mask_outputs, images=[*pair, pair[0]])
    with pytest.raises(InputError):
        processor.post_process_cosegmentation(mask_outputs, images=[pair, pair])
    triplet = MaCoSNetKeypointMatchingOutput(mask_logits=torch.zeros(1, 6, 12, 12))
    with pytest.raises(InputError, match="pairs"):
        processor.post_process_cosegmentation(triplet)


# ---------------------------------------------------------------------------------------------------------------------
# Dense flow
# ---------------------------------------------------------------------------------------------------------------------


def slow_transform(
    x: float, y: float, affine: np.ndarray, tps: np.ndarray | None, regularization: float
) -> tuple[float, float]:
    """One normalised point through a spline and an affine transform, from their definitions, in float64."""
    if tps is not None:
        controls = [(a, b) for a in (-1.0, 0.0, 1.0) for b in (-1.0, 0.0, 1.0)]

        def kernel(dx: float, dy: float) -> float:
            square = dx * dx + dy * dy
            return square * math.log(square) if square > 0 else 0.0

        system = np.zeros((12, 12))
        for i, (xi, yi) in enumerate(controls):
            for j, (xj, yj) in enumerate(controls):
                system[i, j] = kernel(xi - xj, yi - yj) + regularization * (i == j)
            system[i, 9:] = system[9:, i] = (1, xi, yi)
        moved = []
        for values in (tps[:9], tps[9:]):
            weights = np.linalg.solve(system, np.concatenate((values, np.zeros(3))))
            bend = sum(w * kernel(x - a, y - b) for w, (a, b) in zip(weights, controls, strict=False))
            moved.append(bend + weights[9] + weights[10] * x + weights[11] * y)
        x, y = moved
    return affine[0] * x + affine[1] * y + affine[2], affine[3] * x + affine[4] * y + affine[5]


@pytest.mark.parametrize(("with_tps", "regularization"), [(False, 0.0), (True, 0.0), (True, 0.3)])
def test_flow_against_a_slow_reference(processor, with_tps, regularization):
    generator = torch.Generator().manual_seed(2)
    identity = torch.tensor([1.0, 0, 0, 0, 1, 0])
    resting = torch.tensor([-1.0, -1, -1, 0, 0, 0, 1, 1, 1, -1, 0, 1, -1, 0, 1, -1, 0, 1])
    affine = identity + 0.2 * torch.randn((1, 2, 6), generator=generator)
    tps = resting + 0.2 * torch.randn((1, 2, 18), generator=generator) if with_tps else None
    transforms = Transform(affine, tps, None if tps is None else regularization)
    flow = processor.post_process_dense_flow(transforms, SIZES)[0]
    assert flow["source_to_target"].shape == (*SOURCE_SIZE, 2)
    assert flow["target_to_source"].shape == (*TARGET_SIZE, 2)
    # Index 0 is T_AB, which takes points of the target to the source.
    cases = [("target_to_source", 0, TARGET_SIZE, SOURCE_SIZE), ("source_to_target", 1, SOURCE_SIZE, TARGET_SIZE)]
    for name, index, (height, width), (other_height, other_width) in cases:
        for row in range(0, height, 7):
            for column in range(0, width, 5):
                x, y = slow_transform(
                    ((2 * column + 1) / width - 1) * 240 / 239,
                    ((2 * row + 1) / height - 1) * 240 / 239,
                    affine[0, index].double().numpy(),
                    None if tps is None else tps[0, index].double().numpy(),
                    regularization,
                )
                other_x, other_y = (
                    ((place * 239 / 240 + 1) * count - 1) / 2 for place, count in ((x, other_width), (y, other_height))
                )
                expected = (other_x - column, other_y - row)
                assert flow[name][row, column].tolist() == pytest.approx(expected, abs=2e-3)


def test_flow_is_computed_in_strips_without_seams(processor, monkeypatch):
    import macosnet_hf.image_processing_macosnet as module

    affine = torch.tensor([[[1.1, 0.1, 0.2, -0.2, 0.8, 0.1], [0.9, 0, 0, 0.1, 1.2, 0]]])
    transforms = Transform(affine)
    whole = processor.post_process_dense_flow(transforms, SIZES)[0]
    monkeypatch.setattr(module, "_POINTS_PER_CHUNK", 170)  # a few rows, not a divisor of the height
    strips = processor.post_process_dense_flow(transforms, SIZES)[0]
    for name, flow in whole.items():
        assert torch.allclose(flow, strips[name], atol=1e-4)


def test_flow_of_the_identity_scales_between_sizes(processor):
    transforms = Transform(torch.tensor([[[1.0, 0, 0, 0, 1, 0]] * 2]))
    flow = processor.post_process_dense_flow(transforms, SIZES)[0]["source_to_target"]
    # SOURCE_SIZE is (34, 50) and TARGET_SIZE (61, 23): the edges agree, so x -> (x + 0.5) * 23 / 50 - 0.5.
    assert flow[0, 0].tolist() == pytest.approx([0.23 - 0.5, 61 / 68 - 0.5], abs=1e-4)
    assert flow[33, 49].tolist() == pytest.approx([22.27 - 49, 60.5 - 61 / 68 - 33], abs=1e-4)
    assert flow[33, 0].tolist() == pytest.approx([0.23 - 0.5, 60.5 - 61 / 68 - 33], abs=1e-4)


def test_flow_agrees_with_the_models_point_transfer(processor):
    from macosnet_hf.geometry import denormalize_points, normalize_points

    affine = torch.tensor([[[1.1, 0.1, 0.2, -0.2, 0.8, 0.1], [0.9, 0, 0, 0.1, 1.2, 0]]])
    flow = processor.post_process_dense_flow(Transform(affine), SIZES)[0]
    point = torch.tensor([[[20.0, 10.0]]])  # of the source; T_BA, index 1, takes it to the target
    there = Transform(affine[:, 1]).apply(normalize_points(point, SOURCE_SIZE, 240))
    there = denormalize_points(there, TARGET_SIZE, 240)
    assert torch.allclose(flow["source_to_target"][10, 20] + point[0, 0], there[0, 0], atol=1e-3)


def test_flow_of_triplets_is_refused(processor):
    with pytest.raises(InputError, match="pairs"):
        processor.post_process_dense_flow(Transform(torch.zeros(1, 6, 6)), SIZES)


# ---------------------------------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------------------------------


def test_drawn_matches(processor, pair):
    results = processor.post_process_keypoint_matching(matching_outputs(), [SIZES[0], SIZES[0]])
    drawings = processor.visualize_keypoint_matching([pair, pair], results)
    assert len(drawings) == 2
    assert all(isinstance(drawing, Image.Image) for drawing in drawings)
    nothing = {"keypoints0": torch.zeros(0, 2), "keypoints1": torch.zeros(0, 2), "matching_scores": torch.zeros(0)}
    blank = processor.visualize_keypoint_matching(pair, [nothing])[0]
    assert blank.size == drawings[0].size
    assert np.abs(np.asarray(drawings[0], dtype=int) - np.asarray(blank, dtype=int)).max() > 100
    as_arrays = processor.visualize_keypoint_matching([np.asarray(image) / 255 for image in pair], [nothing])[0]
    assert np.abs(np.asarray(as_arrays, dtype=int) - np.asarray(blank, dtype=int)).max() <= 1


def test_drawing_needs_as_many_results_as_pairs(processor, pair):
    with pytest.raises(InputError, match="as many results"):
        processor.visualize_keypoint_matching([pair, pair], [])


def test_every_error_is_ours(processor):
    """One `except MaCoSNetError` is enough around the whole processor."""
    with pytest.raises(MaCoSNetError):
        processor(None)
    with pytest.raises(ValueError):  # noqa: PT011 (that it is one is the point)
        processor(None)
