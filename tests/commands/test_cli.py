"""The command line as a person uses it: good images, strange images, bad input, interruption, memory."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gradio
import numpy as np
import pytest
import torch
from PIL import Image

from macosnet_hf import DEFAULT_CHECKPOINT, match_pair
from macosnet_hf.commands.main import main
from macosnet_hf.geometry import apply_cascade, denormalize_points, normalize_points
from macosnet_hf.inference.result_files import pair_file_names

IMAGES = Path(gradio.__file__).parent / "media_assets" / "images"
CHEETAH, LION, RUNNER, TOWER = (IMAGES / name for name in ("cheetah1.jpg", "lion.jpg", "cheetah.jpg", "tower.jpg"))
ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "macosnet_hf")


class Outcome:
    """What a run printed and left."""

    def __init__(self, code, out, err, folder):
        self.code, self.out, self.err, self.folder = code, out, err, folder

    def json(self, name):
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def image(self, name):
        return np.asarray(Image.open(self.folder / name))

    def names(self):
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture
def run(tmp_path, capfd):
    """Runs a command in this process, with results in a folder that is not there yet."""

    def run_it(command, *arguments, refine="none", folder=None):
        folder = folder or tmp_path / "results" / command
        capfd.readouterr()
        options = ["--output-dir", str(folder), "--refine", refine, "--device", "cpu"]
        code = main([command, *map(str, arguments), *options])
        out, err = capfd.readouterr()
        return Outcome(code, out, err, folder)

    return run_it


def assert_refused(outcome, *words):
    """Exit code 2, one sentence, and neither files nor folders left."""
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith("macosnet: ")
    assert outcome.err.endswith(".\n")
    assert outcome.err.count("\n") == 1
    for word in words:
        assert word in outcome.err
    assert not outcome.folder.exists()
    if outcome.folder.parent.name == "results":  # a folder that the command would have had to make, too
        assert not outcome.folder.parent.exists()


# ---------------------------------------------------------------------------------------------------------------------
# match
# ---------------------------------------------------------------------------------------------------------------------


def test_match_writes_what_match_pair_finds(run):
    outcome = run("match", RUNNER, LION, "--edges", "hard", refine="grabcut")
    assert outcome.code == 0
    assert outcome.err == ""
    assert outcome.names() == sorted(pair_file_names())
    assert "matches.png" in outcome.out

    expected = match_pair(RUNNER, LION, device="cpu")
    document = outcome.json("matches.json")
    for view, path, image, mask in (
        ("source", RUNNER, expected.source, expected.source_mask),
        ("target", LION, expected.target, expected.target_mask),
    ):
        share = round(float(mask.mean()), 4)
        entry = {"file": str(path), "width": image.width, "height": image.height, "object_share": share}
        assert document[view] == entry
        cutout = outcome.image(f"{view}_cutout.png")
        np.testing.assert_array_equal(cutout[..., 3] > 0, mask)
        np.testing.assert_array_equal(cutout[mask][:, :3], np.asarray(image)[mask])
    rows = (outcome.folder / "matches.csv").read_text().splitlines()
    assert len(rows) == 1 + len(document["matches"])
    assert document["quality"] == expected.quality
    found = np.array([[match["source"], match["target"]] for match in document["matches"]]).reshape(-1, 2, 2)
    np.testing.assert_allclose(found, expected.keypoints, atol=0.0051)
    np.testing.assert_allclose([match["score"] for match in document["matches"]], expected.scores, atol=1e-4)
    assert "points" not in document
    # Every number that a reader needs to use the transform without us.
    assert len(document["affine"]) == len(document["reverse"]["affine"]) == 6
    assert len(document["tps"]) == len(document["reverse"]["tps"]) == 18
    np.testing.assert_allclose(document["affine"], expected.affine[0], atol=1e-6)
    np.testing.assert_allclose(document["tps"], expected.tps[0], atol=1e-6)
    np.testing.assert_allclose(document["reverse"]["affine"], expected.affine[1], atol=1e-6)
    np.testing.assert_allclose(document["reverse"]["tps"], expected.tps[1], atol=1e-6)

    for name, mask in (("source_mask.png", expected.source_mask), ("target_mask.png", expected.target_mask)):
        found = outcome.image(name)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, mask * 255)
    assert outcome.image("source_warped.png").shape == (expected.target.height, expected.target.width, 3)
    assert outcome.image("matches.png").ndim == 3


def test_match_again_gives_the_same_bytes(run, tmp_path):
    first, second = (run("match", CHEETAH, LION, refine="grabcut", folder=tmp_path / name) for name in ("a", "b"))
    for name in pair_file_names():
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes(), name


def test_transforms_of_the_document_take_target_points_to_the_source(run):
    document = run("match", RUNNER, LION, "--points", "100,200.5").json("matches.json")
    point = normalize_points(torch.tensor([[[100, 200.5]]], dtype=torch.float64), (343, 502), 240)
    reverse = document["reverse"]
    moved = apply_cascade(point, torch.tensor([reverse["affine"]]).double(), torch.tensor([reverse["tps"]]).double())
    by_transform = denormalize_points(moved, (256, 256), 240)[0, 0].numpy()
    (entry,) = document["points"]
    assert entry["source"] == [100, 200.5]
    # The answer is refined by the features near the place where the transform sends the point.
    assert np.linalg.norm(np.array(entry["target"]) - by_transform) < 0.3 * 256


def test_points_of_a_file_are_the_points_of_the_option(run, tmp_path):
    option = run("match", CHEETAH, LION, "--points", "10,20; 255,0;128.5,64").json("matches.json")["points"]
    assert [entry["source"] for entry in option] == [[10, 20], [255, 0], [128.5, 64]]
    expected = match_pair(CHEETAH, LION, device="cpu", refine="none").transfer([(10, 20), (255, 0), (128.5, 64)])
    np.testing.assert_allclose([entry["target"] for entry in option], expected, atol=0.0051)
    for name, text in (
        ("plain.csv", "10,20\n255,0\n128.5,64\n"),
        ("header.csv", "\ufeffx, y\r\n10,20\r\n\r\n255,0\r\n128.5,64"),
        ("quoted.csv", '"X","Y"\n"10","20"\n"255","0"\n" 128.5"," 64"\n'),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert run("match", CHEETAH, LION, "--points-file", tmp_path / name).json("matches.json")["points"] == option


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ("", "holds no points"),
        (" ; ", "holds no points"),
        ("1,2;3", "point 2: expected two numbers x,y; got '3'"),
        ("1,2;3,4,5", "point 2"),
        ("1,2;;a,b", "point 3"),
        ("nan,2", "point 1: the numbers must be finite"),
        ("1,1e999", "point 1: the numbers must be finite"),
        ("1,2;256,3", "point 2: 256,3 lies outside of the source, which is 256x256 pixels"),
        ("0,-0.5", "point 1: 0,-0.5 lies outside"),
    ],
)
def test_bad_points(run, points, words):
    assert_refused(run("match", CHEETAH, LION, "--points", points), "--points", words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no points"),
        (b"x,y\n", "holds no points"),
        (b"x,y\n1,2\n\n3;4\n", "line 4: expected two numbers x,y; got '3;4'"),
        (b"1,2\nx,y\n", "line 2"),
        (b"1,2\n400,2\n", "line 2: 400,2 lies outside"),
        (b"\xff\xfe1\x00,\x002\x00", "no text in UTF-8"),
        (b"1,2\n3,\x00\n", "points.csv"),
    ],
)
def test_bad_points_file(run, tmp_path, content, words):
    (tmp_path / "points.csv").write_bytes(content)
    assert_refused(run("match", CHEETAH, LION, "--points-file", tmp_path / "points.csv"), "points.csv", words)


def test_points_file_that_is_not_there(run, tmp_path):
    assert_refused(run("match", CHEETAH, LION, "--points-file", tmp_path / "no.csv"), "no.csv", "No such file")
    assert_refused(run("match", CHEETAH, LION, "--points-file", tmp_path), "Is a directory")


def test_threshold(run):
    scores = [match["score"] for match in run("match", CHEETAH, LION).json("matches.json")["matches"]]
    cut = scores[len(scores) // 2] + 5e-5  # they are rounded to four decimals
    strong = run("match", CHEETAH, LION, "--threshold", cut).json("matches.json")
    assert [match["score"] for match in strong["matches"]] == [score for score in scores if score > cut]
    assert strong["threshold"] == cut
    nothing = run("match", CHEETAH, LION, "--threshold", 1)
    assert nothing.code == 0
    assert nothing.out.startswith("0 matches")
    assert nothing.json("matches.json")["matches"] == []
    for bad in ("1.1", "-0.1", "nan"):
        assert_refused(run("match", CHEETAH, LION, f"--threshold={bad}", folder=Path("never")), "--threshold")


def test_same_file_twice(run):
    outcome = run("match", CHEETAH, CHEETAH)
    assert outcome.code == 0
    document = outcome.json("matches.json")
    assert document["quality"] == "good"
    moved = [np.subtract(match["source"], match["target"]) for match in document["matches"]]
    assert np.median(np.linalg.norm(moved, axis=1)) < 0.05 * 256
    np.testing.assert_array_equal(outcome.image("source_mask.png"), outcome.image("target_mask.png"))


def cheetah():
    return Image.open(CHEETAH).convert("RGB")


def save_rotated(path):
    """An image taken with the camera on its side: stored lying, upright by its EXIF orientation 6."""
    exif = Image.Exif()
    exif[0x0112] = 6
    cheetah().resize((300, 200)).transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=95)


def save_animation(path):
    frames = [cheetah().resize((300, 200)), Image.new("RGB", (300, 200), "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)


STRANGE_PHOTOS = {
    "grey.png": lambda path: cheetah().convert("L").save(path),
    "palette.png": lambda path: cheetah().convert("P").save(path),
    "rgba.png": lambda path: cheetah().convert("RGBA").save(path),
    "one-bit.png": lambda path: cheetah().convert("1").save(path),
    "cmyk.jpg": lambda path: cheetah().convert("CMYK").save(path),
    "16-bit.png": lambda path: Image.fromarray(np.asarray(cheetah().convert("L")).astype(np.uint16) * 257).save(path),
    "float.tiff": lambda path: cheetah().convert("F").save(path),
    "rotated.jpg": save_rotated,
    "animated.gif": save_animation,
    "wide.png": lambda path: cheetah().resize((3000, 4)).save(path),
    "tall.png": lambda path: cheetah().resize((4, 3000)).save(path),
    "tiny.png": lambda path: cheetah().resize((2, 2)).save(path),
    "plain.png": lambda path: Image.new("RGB", (100, 80), "white").save(path),
    "no suffix": lambda path: cheetah().save(path, format="PNG"),
    "grüße, 猫 & co.jpg": lambda path: cheetah().save(path),
    "wrong.png": lambda path: cheetah().save(path, format="JPEG"),
}


@pytest.mark.parametrize("name", STRANGE_PHOTOS)
def test_strange_images_work(run, tmp_path, name):
    STRANGE_PHOTOS[name](tmp_path / name)
    outcome = run("match", tmp_path / name, LION, refine="grabcut")
    assert outcome.err == ""
    assert outcome.code == 0
    document = outcome.json("matches.json")
    with Image.open(tmp_path / name) as photo:
        size = (300, 200) if name == "rotated.jpg" else photo.size
    assert (document["source"]["width"], document["source"]["height"]) == size
    assert outcome.image("source_mask.png").shape == size[::-1]
    assert outcome.names() == sorted(pair_file_names())


def test_coordinates_are_those_of_the_upright_image(run, tmp_path):
    save_rotated(tmp_path / "rotated.jpg")
    with Image.open(tmp_path / "rotated.jpg") as stored:
        assert stored.size == (200, 300)
        stored.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    rotated, upright = (
        run("match", tmp_path / name, LION, "--points", "299,100", folder=tmp_path / f"results {name}")
        for name in ("rotated.jpg", "upright.png")
    )
    expected = upright.json("matches.json")
    assert len(expected["matches"]) > 10
    for key in ("matches", "points", "affine"):
        assert rotated.json("matches.json")[key] == expected[key]
    np.testing.assert_array_equal(rotated.image("source_mask.png"), upright.image("source_mask.png"))


def save_huge(path):
    """10,001 x 10,000 pixels in a file of some kilobytes."""
    Image.new("1", (10_001, 10_000)).save(path, format="PNG")


BAD_PHOTOS = {
    "missing": (lambda path: None, "does not exist"),
    "folder": (lambda path: path.mkdir(), "is a folder"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "text": (lambda path: path.write_text("no image\n" * 100), "not an image"),
    "truncated JPEG": (lambda path: path.write_bytes(CHEETAH.read_bytes()[:5000]), "cut off"),
    "header only": (lambda path: path.write_bytes(CHEETAH.read_bytes()[:20]), "photo.jpg"),
    "one pixel": (lambda path: Image.new("RGB", (1, 1)).save(path), "1 x 1 pixels"),
    "one row": (lambda path: Image.new("RGB", (500, 1)).save(path), "500 x 1 pixels"),
    "too many pixels": (save_huge, "more than 100 megapixels"),
}


@pytest.mark.parametrize("place", ["source", "target"])
@pytest.mark.parametrize("kind", BAD_PHOTOS)
def test_bad_images_end_in_a_sentence(run, tmp_path, kind, place):
    make, words = BAD_PHOTOS[kind]
    make(tmp_path / "photo.jpg")
    photos = (tmp_path / "photo.jpg", LION) if place == "source" else (LION, tmp_path / "photo.jpg")
    assert_refused(run("match", *photos), "photo.jpg", words)


def test_web_addresses_are_not_fetched(run):
    assert_refused(run("match", "https://example.org/cat.jpg", LION), "web address")


# ---------------------------------------------------------------------------------------------------------------------
# Where results go, and the checkpoint
# ---------------------------------------------------------------------------------------------------------------------


def test_output_folder_that_cannot_be(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder, words in ((tmp_path / "file", "is a file"), (tmp_path / "file" / "below", "cannot be created")):
        outcome = run("match", CHEETAH, LION, folder=folder)
        assert outcome.code == 2
        assert words in outcome.err
        assert outcome.err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs Linux, where not even root writes into /proc")
@pytest.mark.parametrize("command", ["match", "segment"])
def test_unwritable_output_folder(run, command):
    outcome = run(command, CHEETAH, LION, folder=Path("/proc"))
    assert outcome.code == 2
    assert outcome.err.startswith("macosnet: Nothing can be written in the folder /proc")
    assert outcome.err.count("\n") == 1


def test_results_do_not_replace_the_images(run, tmp_path):
    for name in ("source_mask.png", "a.png", "a_mask.png"):
        cheetah().save(tmp_path / name)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for arguments in (("match", tmp_path / "source_mask.png"), ("segment", tmp_path / "a_mask.png")):
        outcome = run(arguments[0], tmp_path / "a.png", *arguments[1:], folder=tmp_path)
        assert outcome.code == 2
        assert "would replace the image" in outcome.err
    outcome = run("segment", tmp_path, folder=tmp_path)
    assert outcome.code == 2
    assert "is the folder of the images" in outcome.err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("command", ["match", "segment"])
def test_damaged_checkpoint(run, tmp_path, command):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    assert_refused(run(command, CHEETAH, LION, "--model", checkpoint), "has no config.json")
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        shutil.copy(os.path.join(DEFAULT_CHECKPOINT, name), checkpoint)
    os.truncate(checkpoint / "model.safetensors", 50_000)
    assert_refused(run(command, CHEETAH, LION, "--model", checkpoint), "model.safetensors is damaged or cut off")
    torch.save({}, checkpoint / "model.safetensors")
    assert_refused(run(command, CHEETAH, LION, "--model", checkpoint), "is a pickle")
    shutil.copy(os.path.join(DEFAULT_CHECKPOINT, "model.safetensors"), checkpoint)
    settings = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**settings, "decoder_widths": [8, 8, 8, 8]}))
    assert_refused(run(command, CHEETAH, LION, "--model", checkpoint), "another shape")
    (checkpoint / "config.json").write_text(json.dumps(settings))
    assert run(command, CHEETAH, LION, "--model", checkpoint).code == 0


def test_device_that_is_not_there(tmp_path, capfd):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    code = main(["match", str(CHEETAH), str(LION), "--output-dir", str(tmp_path / "new"), "--device", "cuda"])
    assert code == 2
    assert "no CUDA device" in capfd.readouterr().err
    assert not (tmp_path / "new").exists()


def test_missing_package_for_a_refinement(run):
    try:
        import pydensecrf  # noqa: F401
    except ImportError:
        for command in ("match", "segment"):
            assert_refused(run(command, CHEETAH, LION, refine="crf"), "macosnet-hf[crf]")
    else:
        assert run("match", CHEETAH, LION, refine="crf").code == 0


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["match"],
        ["match", "a.jpg", "b.jpg"],
        ["match", "a.jpg", "b.jpg", "--output-dir", "x", "--refine", "magic"],
        ["match", "a.jpg", "b.jpg", "--output-dir", "x", "--points", "1,1", "--points-file", "p.csv"],
        ["dance"],
    ],
)
def test_wrong_usage(arguments, capfd):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: macosnet" in capfd.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# segment
# ---------------------------------------------------------------------------------------------------------------------


def test_segment_writes_masks_cutouts_overview_and_summary(run):
    outcome = run("segment", CHEETAH, LION, RUNNER, "--partners", 1, "--edges", "hard", refine="grabcut")
    assert outcome.code == 0
    assert outcome.err == ""
    files = [f"{name}_{kind}.png" for name in ("cheetah", "cheetah1", "lion") for kind in ("cutout", "mask")]
    assert outcome.names() == sorted([*files, "overview.png", "summary.json"])
    document = outcome.json("summary.json")
    assert document["skipped"] == []
    assert [entry["photo"] for entry in document["photos"]] == [str(CHEETAH), str(LION), str(RUNNER)]
    for entry in document["photos"]:
        photo = np.asarray(Image.open(entry["photo"]).convert("RGB"))
        mask, cutout = outcome.image(entry["mask"]), outcome.image(entry["cutout"])
        assert (entry["height"], entry["width"]) == photo.shape[:2] == mask.shape
        assert set(np.unique(mask)) <= {0, 255}
        assert entry["object_share"] == pytest.approx((mask > 0).mean(), abs=1e-4)
        np.testing.assert_array_equal(cutout[..., 3] > 0, mask > 0)
        np.testing.assert_array_equal(cutout[mask > 0][:, :3], photo[mask > 0])
        assert len(entry["partners"]) == 1
        assert -1 <= entry["agreement"] <= 1


def test_segment_does_not_depend_on_the_order(run, tmp_path):
    photos = [CHEETAH, LION, RUNNER, TOWER]
    one = run("segment", *photos, "--partners", 2, refine="grabcut", folder=tmp_path / "one")
    other = run("segment", *reversed(photos), "--partners", 2, refine="grabcut", folder=tmp_path / "other")
    assert one.names() == other.names()
    for name in one.names():
        if name.endswith(("_mask.png", "_cutout.png")):
            assert (one.folder / name).read_bytes() == (other.folder / name).read_bytes(), name
    entries = {entry["photo"]: entry for entry in one.json("summary.json")["photos"]}
    assert entries == {entry["photo"]: entry for entry in other.json("summary.json")["photos"]}


def test_segment_a_folder_with_everything_in_it(run, tmp_path):
    folder = tmp_path / "my images"
    (folder / "deeper").mkdir(parents=True)
    shutil.copy(CHEETAH, folder / "Größe 1.JPG")
    shutil.copy(LION, folder / "same.jpg")
    cheetah().resize((80, 60)).save(folder / "same.png")
    (folder / "notes.txt").write_text("no image")
    (folder / "._same.jpg").write_bytes(b"\0\5\26\7 what another system leaves beside an image")
    (folder / "broken.jpg").write_bytes(CHEETAH.read_bytes()[:4000])
    outcome = run("segment", folder)
    assert outcome.code == 0
    assert outcome.err.count("\n") == 1
    assert "left out" in outcome.err
    assert "broken.jpg" in outcome.err
    document = outcome.json("summary.json")
    assert [Path(entry["photo"]).name for entry in document["photos"]] == ["Größe 1.JPG", "same.jpg", "same.png"]
    (skipped,) = document["skipped"]
    assert skipped["photo"] == str(folder / "broken.jpg")
    assert "cut off" in skipped["reason"]
    assert {"Größe 1_mask.png", "same_mask.png", "same_2_mask.png"} <= set(outcome.names())
    assert outcome.image("same_2_mask.png").shape == (60, 80)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["Größe 1.JPG", "same.jpg", "same.png", "notes.txt", "._same.jpg", "broken.jpg", "deeper"]
    )


def test_segment_images_of_the_same_name(run, tmp_path):
    for name, photo in (("a", CHEETAH), ("b", LION)):
        (tmp_path / name).mkdir()
        shutil.copy(photo, tmp_path / name / "photo.jpg")
    photos = [tmp_path / "b" / "photo.jpg", tmp_path / "a" / "photo.jpg"]
    one = run("segment", *photos, folder=tmp_path / "one")
    other = run("segment", *photos[::-1], folder=tmp_path / "other")
    for outcome in (one, other):
        by_photo = {entry["photo"]: entry["mask"] for entry in outcome.json("summary.json")["photos"]}
        assert by_photo == {str(photos[1]): "photo_mask.png", str(photos[0]): "photo_2_mask.png"}


def test_segment_counts_an_image_named_twice_once(run, tmp_path, monkeypatch):
    monkeypatch.chdir(IMAGES)
    twice = IMAGES / ".." / "images" / "cheetah1.jpg"
    outcome = run("segment", CHEETAH, "lion.jpg", "./cheetah1.jpg", twice)
    assert [entry["photo"] for entry in outcome.json("summary.json")["photos"]] == [str(CHEETAH), "lion.jpg"]
    assert_refused(run("segment", CHEETAH, "cheetah1.jpg", folder=tmp_path / "new"), "two or more different")


def test_segment_shows_a_rotated_image_upright(run, tmp_path):
    save_rotated(tmp_path / "rotated.jpg")
    outcome = run("segment", tmp_path / "rotated.jpg", LION)
    assert outcome.image("rotated_mask.png").shape == (200, 300)
    assert outcome.image("rotated_cutout.png").shape == (200, 300, 4)


@pytest.mark.parametrize("name", ["wide.png", "16-bit.png", "animated.gif", "plain.png", "tiny.png"])
def test_segment_strange_images(run, tmp_path, name):
    STRANGE_PHOTOS[name](tmp_path / name)
    outcome = run("segment", tmp_path / name, LION, refine="grabcut")
    assert outcome.code == 0
    assert outcome.err == ""


def test_segment_one_image_alone(run):
    outcome = run("segment", CHEETAH, refine="grabcut")
    assert outcome.code == 0
    assert outcome.names() == ["cheetah1_cutout.png", "cheetah1_mask.png", "overview.png", "summary.json"]
    assert "compared with itself" in outcome.out
    document = outcome.json("summary.json")
    assert document["alone"]
    (entry,) = document["photos"]
    assert entry["partners"] == []
    assert not entry["common"]
    assert 0 < entry["object_share"] < 1


def test_segment_cutouts_in_a_style(run, tmp_path):
    style = ["--trim", "--background", "#ff8800", "--format", "webp"]
    outcome = run("segment", CHEETAH, LION, *style, refine="grabcut")
    assert outcome.code == 0
    assert outcome.names() == sorted(
        [f"{name}_{kind}" for name in ("cheetah1", "lion") for kind in ("cutout.webp", "mask.png")]
        + ["overview.png", "summary.json"]
    )
    for entry in outcome.json("summary.json")["photos"]:
        cut = Image.open(outcome.folder / entry["cutout"])
        assert (cut.format, cut.mode) == ("WEBP", "RGB")
        assert cut.width <= entry["width"]
        assert cut.height <= entry["height"]
    assert_refused(
        run("segment", CHEETAH, LION, "--background", "nocolour", folder=tmp_path / "new"), "nocolour", "blur"
    )
    assert_refused(run("segment", CHEETAH, "--average", folder=tmp_path / "new"), "--average")
    assert not (tmp_path / "new").exists()


def test_segment_too_few_images(run, tmp_path):
    assert_refused(run("segment", tmp_path / "nowhere"), "nowhere", "does not exist")
    (tmp_path / "photos").mkdir()
    assert_refused(run("segment", tmp_path / "photos"), "photos holds none")
    shutil.copy(CHEETAH, tmp_path / "photos")
    assert_refused(run("segment", tmp_path / "photos"), "photos holds 1")
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"no image")
    assert_refused(run("segment", tmp_path / "photos"), "1 can be read", "broken.jpg")
    assert_refused(run("segment", tmp_path / "photos", CHEETAH), "is a folder")


@pytest.mark.parametrize("kind", ["missing", "truncated JPEG", "one pixel"])
def test_segment_refuses_a_bad_image_that_was_named(run, tmp_path, kind):
    make, words = BAD_PHOTOS[kind]
    make(tmp_path / "photo.jpg")
    assert_refused(run("segment", CHEETAH, LION, tmp_path / "photo.jpg"), "photo.jpg", words)


def test_segment_bad_number_of_partners(run):
    assert_refused(run("segment", CHEETAH, LION, "--partners", 0), "--partners")


# ---------------------------------------------------------------------------------------------------------------------
# As a process of its own
# ---------------------------------------------------------------------------------------------------------------------

# Runs the command line and reports which of the heavy packages it imported.
_WATCH_IMPORTS = """
import sys
from macosnet_hf.commands.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as error:
    code = error.code
heavy = sorted({"torch", "transformers", "timm", "cv2", "scipy", "datasets", "gradio"} & set(sys.modules))
print("IMPORTED", *heavy)
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["match", "--help"], 0),
        (["segment", "--help"], 0),
        (["--version"], 0),
        (["match", "no.jpg", str(LION), "--output-dir", "new"], 2),
        (["match", str(CHEETAH), str(LION), "--output-dir", "new", "--model", "./nowhere"], 2),
        (["match", str(CHEETAH), str(LION), "--output-dir", "new", "--points", "1,a"], 2),
        (["match", str(CHEETAH), str(LION), "--output-dir", str(LION)], 2),
        (["segment", "no.jpg", str(LION), "--output-dir", "new"], 2),
        (["segment", str(CHEETAH), "--output-dir", "new", "--background", "nocolour"], 2),
    ],
)
def test_help_and_typing_errors_answer_without_torch(arguments, code, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", _WATCH_IMPORTS, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines()[-1] == "IMPORTED"
    assert done.stderr.count("\n") == (1 if code else 0)
    assert list(tmp_path.iterdir()) == []


def test_bad_path_as_a_process(tmp_path):
    done = subprocess.run(
        [*COMMAND, "match", tmp_path / "no.jpg", LION, "--output-dir", tmp_path / "new"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2
    assert done.stderr == f"macosnet: '{tmp_path / 'no.jpg'}' does not exist.\n"
    assert list(tmp_path.iterdir()) == []


def test_two_phone_images_take_bounded_time_and_memory(tmp_path):
    photos = []
    for photo in (CHEETAH, LION):
        photos.append(tmp_path / photo.name)
        Image.open(photo).convert("RGB").resize((4000, 3000), Image.Resampling.BICUBIC).save(photos[-1], quality=90)
    # A process between this one and the command, for the figures of the command alone.
    measure = (
        "import json, resource, subprocess, sys\n"
        "code = subprocess.run(sys.argv[1:]).returncode\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(json.dumps([code, used.ru_maxrss, used.ru_utime + used.ru_stime]))\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    done = subprocess.run(
        [sys.executable, "-c", measure, *COMMAND, "match", *photos, "--output-dir", tmp_path / "new"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    code, peak, seconds = json.loads(done.stdout.splitlines()[-1])
    assert code == 0, done.stderr
    assert done.stderr == ""
    bytes_of_unit = 1 if sys.platform == "darwin" else 1024
    assert peak * bytes_of_unit < 1.5e9
    # 12 s are promised; processor time instead of wall time, so that a busy machine cannot fail the test.
    assert seconds < 2 * 12
    assert (tmp_path / "new" / "source_warped.png").is_file()
    with Image.open(tmp_path / "new" / "source_mask.png") as mask:
        assert mask.size == (4000, 3000)


def test_many_large_images_are_not_all_in_memory(tmp_path):
    """Twelve of 12 megapixels would be 430 MB more than two, if all were held."""
    photo = Image.open(CHEETAH).convert("RGB").resize((4000, 3000))
    for number in range(12):
        photo.save(tmp_path / f"{number}.jpg", quality=60)
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from macosnet_hf.commands.segment import _read_copies\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "paths = sorted(Path(sys.argv[1]).glob('*.jpg'))\n"
        "_read_copies(paths[:1], skip_damaged=False, progress=lambda *_: None)\n"
        "before = peak()\n"
        "copies, skipped = _read_copies(paths, skip_damaged=False, progress=lambda *_: None)\n"
        "assert len(copies) == 12 and {copy.image.size for copy in copies} == {(640, 480)}\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    bytes_of_unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * bytes_of_unit < 120e6


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("command", ["match", "segment"])
def test_ctrl_c_leaves_nothing(tmp_path, command):
    output = tmp_path / "some" / "new"
    process = subprocess.Popen(
        [*COMMAND, command, CHEETAH, LION, "--output-dir", output],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    while not (output.is_dir() and list(output.iterdir())):  # until the work has begun
        assert process.poll() is None
        time.sleep(0.005)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130, err
    assert out == ""
    assert err == "macosnet: interrupted; nothing half-written is left.\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_while_cutting_out_keeps_what_is_done(tmp_path):
    photos, output = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    with Image.open(LION) as image:
        for number in range(12):
            image.convert("RGB").resize((3000, 2000 + number)).save(photos / f"{number:02}.jpg")
    process = subprocess.Popen(
        [*COMMAND, "segment", photos, "--output-dir", output],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    while not list(output.glob(".macosnet-*/*_cutout.png")):  # until the first one is being written
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130, err
    summary = json.loads((output / "summary.json").read_text())
    done = len(summary["photos"])
    assert 1 <= done < 12
    assert len(summary["not_done"]) == 12 - done
    assert f"interrupted; {done} of 12 images were segmented and written" in err
    for entry in summary["photos"]:
        for kind in ("mask", "cutout"):
            with Image.open(output / entry[kind]) as image:
                image.load()
                assert image.size == (entry["width"], entry["height"])
    assert len(list(output.iterdir())) == 2 * done + 2


def test_main_leaves_the_garbage_collector_on(run):
    import gc

    assert gc.isenabled()
    run("match", CHEETAH, LION)
    assert gc.isenabled()


@pytest.mark.skipif(sys.platform != "linux", reason="the variable is that of GNU's OpenMP")
def test_threads_do_not_spin_for_long(monkeypatch, run):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    assert run("match", "no.jpg", LION).code == 2
    assert os.environ["GOMP_SPINCOUNT"] == "1000"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")  # a choice of the user's stays
    assert run("match", "no.jpg", LION).code == 2
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    assert "GOMP_SPINCOUNT" not in os.environ
