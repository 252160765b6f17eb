"""Mistakes that people make with the command line end in a sentence that names the way out; long commands say where
they are; images of the same name are told apart."""

import contextlib
import importlib
import io
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from archives import coseg
from PIL import Image
from real_photos import CHEETAH, LION, TOWER

import macosnet_hf.inference.files as files_module
from macosnet_hf.commands.arguments import progress_bar
from macosnet_hf.commands.main import main
from macosnet_hf.io.working_copy import told_apart


def refused(capfd, *arguments):
    """What a command says that ends with one sentence and leaves nothing."""
    capfd.readouterr()
    code = main([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("macosnet: ")
    assert err.endswith(".\n")
    assert err.count("\n") == 1
    return err


@pytest.fixture
def photo(tmp_path):
    return shutil.copy(LION, tmp_path / "lion.jpg")


# ---- the ways out ----------------------------------------------------------------------------------------------------


def test_match_of_a_folder(photo, tmp_path, capfd):
    said = refused(capfd, "match", tmp_path, photo, "--output-dir", tmp_path / "new")
    assert f"'{tmp_path}' is a folder; name two images, or give the folder to `macosnet segment`" in said


def test_match_of_three_images(photo, tmp_path, capfd):
    said = refused(capfd, "match", photo, CHEETAH, TOWER, "--output-dir", tmp_path / "new")
    assert "takes two images, not 3; `macosnet segment` takes any number" in said
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", ["match", "segment"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("photos.zip", "is an archive, not an image; unpack it and give the images or their folder"),
        ("clip.mp4", "is a film, not an image; save one of its frames as JPEG"),
        ("notes.docx.jpg", "is an archive, not an image; unpack it"),
        ("letter.txt", "is not an image in a format that can be read, or its start is damaged; save it as JPEG or PNG"),
    ],
)
def test_files_that_are_no_images(photo, tmp_path, capfd, command, name, words):
    if "zip" in name or "docx" in name:
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.write(photo, "lion.jpg")
    else:
        (tmp_path / name).write_bytes(b"Dear all" if "letter" in name else np.random.default_rng(0).bytes(9999))
    said = refused(capfd, command, photo, tmp_path / name, "--output-dir", tmp_path / "new")
    assert f"'{tmp_path / name}' {words}" in said


def test_an_archive_alone(photo, tmp_path, capfd):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.write(photo, "lion.jpg")
    said = refused(capfd, "segment", tmp_path / "photos.zip", "--output-dir", tmp_path / "new")
    assert "photos.zip' is an archive, not an image; unpack it and give the images or their folder" in said


def test_the_same_image_twice_is_said(photo, tmp_path, capfd):
    options = ["--output-dir", str(tmp_path / "new"), "--refine", "none", "--device", "cpu"]
    assert main(["match", str(photo), str(LION), *options]) == 0
    assert "both images are the same, so each point finds itself; name two images" in capfd.readouterr().err
    assert main(["match", str(photo), str(TOWER), *options]) == 0
    assert capfd.readouterr().err == ""


def test_a_missing_folder_is_said_at_once(tmp_path, capfd):
    before = time.process_time()
    said = refused(capfd, "evaluate", "coseg", "--data", tmp_path / "nowhere")
    assert f"{tmp_path / 'nowhere'}" in said
    assert time.process_time() - before < 2


@pytest.mark.parametrize(
    "words",
    [
        ["convert", "NOWHERE", "OUT"],
        ["convert", "HERE", "OUT", "--second", "NOWHERE"],
        ["evaluate", "coseg", "--data", "HERE", "--model", "NOWHERE"],
        ["match", "NOWHERE", "NOWHERE", "--output-dir", "OUT"],
        ["segment", "NOWHERE", "--output-dir", "OUT"],
        ["segment", "--dataset", "NOWHERE", "--output_dir", "OUT"],
        ["export", "OUT", "--model", "NOWHERE"],
        ["adapt", "NOWHERE", "--output-dir", "OUT"],
        ["prepare", "coseg", "NOWHERE", "OUT"],
        ["push", "dataset", "NOWHERE", "somebody/something"],
    ],
    ids=lambda words: " ".join(words[:1] + words[-1:]),
)
def test_what_is_missing_is_said_before_torch_is_imported(tmp_path, words):
    """The import takes seconds, of a busy machine 12."""
    here = tmp_path / "here"
    if words[0] == "convert":
        here.write_bytes(b"PK\x03\x04")
    else:
        here.mkdir()
    places = {"NOWHERE": str(tmp_path / "nowhere"), "HERE": str(here), "OUT": str(tmp_path / "out")}
    given = [places.get(word, word) for word in words]
    code = "import sys\nfrom macosnet_hf.commands.main import main\nprint(main(sys.argv[1:]), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True)
    assert done.stdout.split() == ["2", "False"], done.stderr
    assert "nowhere" in done.stderr


def test_what_a_killed_adaptation_left_does_not_stop_the_next_one(tmp_path, capfd):
    images, output = tmp_path / "images" / "cats", tmp_path / "adapted"
    images.mkdir(parents=True)
    for number, source in enumerate((LION, CHEETAH)):
        shutil.copy(source, images / f"{number}.jpg")
    (output / ".macosnet-killed01" / "best").mkdir(parents=True)
    said = refused(capfd, "adapt", images, "--output-dir", output, "--model", tmp_path / "nowhere")
    assert "nowhere" in said  # and nothing about the output folder
    assert list(output.iterdir()) == []
    (output / ".DS_Store").write_bytes(b"of the system")  # somebody made the folder in the Finder
    assert "nowhere" in refused(capfd, "adapt", images, "--output-dir", output, "--model", tmp_path / "nowhere")
    (output / "of-somebody.txt").write_text("theirs")
    assert "is not empty" in refused(capfd, "adapt", images, "--output-dir", output)


# ---- progress --------------------------------------------------------------------------------------------------------


@pytest.fixture
def steps(monkeypatch):
    """What a command says on a terminal."""
    said: list[tuple[float, str]] = []

    @contextlib.contextmanager
    def recording():
        yield lambda share, text: said.append((share, text))

    for command in ("match", "segment", "export", "evaluate", "segment_dataset"):
        monkeypatch.setattr(importlib.import_module(f"macosnet_hf.commands.{command}"), "progress_bar", recording)
    return said


def test_match_and_segment_say_where_they_are(photo, tmp_path, steps, capfd):
    options = ["--output-dir", str(tmp_path / "new"), "--refine", "none", "--device", "cpu"]
    assert main(["match", str(photo), CHEETAH, *options]) == 0
    assert [text for _, text in steps] == ["Loading the network", "Matching and segmenting", "Writing the results"]
    steps.clear()
    assert main(["segment", str(photo), CHEETAH, *options]) == 0
    assert [text for _, text in steps[:4]] == [
        "Read 1 of 2",
        "Read 2 of 2",
        "Loading the network",
        "Encoding all images",
    ]
    assert steps[-1][0] == pytest.approx(1)


def test_evaluations_and_bulk_runs_say_that_the_network_is_loaded(tmp_path, steps, capfd):
    """Before their bars of samples and images, of which there is none until then."""
    (tmp_path / "images").mkdir()
    for number, source in enumerate((LION, CHEETAH)):
        shutil.copy(source, tmp_path / "images" / f"{number}.jpg")
    options = ["--output_dir", str(tmp_path / "out"), "--refine", "none", "--device", "cpu"]
    assert main(["segment", "--dataset", str(tmp_path / "images"), *options]) == 0
    coseg(tmp_path / "coseg", classes=("Cat",))
    assert main(["evaluate", "coseg", "--data", str(tmp_path / "coseg"), "--baseline", "centre-grabcut"]) == 0
    assert [text for _, text in steps] == ["Loading the network"] * 2


def test_export_says_what_it_is_doing(tmp_path, steps, capfd):
    assert main(["export", "--format", "pt2", str(tmp_path / "graph")]) == 0
    assert [text for _, text in steps] == [
        "Loading the network",
        "Writing the graph, pt2",
        "Comparing with PyTorch",
        "Measuring the time",
    ]


def test_the_bar_is_shown_on_a_terminal_and_nowhere_else(monkeypatch):
    for terminal in (True, False):
        stream = io.StringIO()
        stream.isatty = lambda terminal=terminal: terminal
        monkeypatch.setattr(sys, "stderr", stream)
        with progress_bar() as progress:
            progress(0.5, "Halfway")
        assert ("Halfway" in stream.getvalue()) == terminal


# ---- equal names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["cat.jpg", "dog.jpg"], ["cat.jpg", "dog.jpg"]),
        (["a/cat.jpg", "b/dog.jpg"], ["cat.jpg", "dog.jpg"]),
        (["a/x.jpg", "b/x.jpg", "b/y.jpg"], ["a/x.jpg", "b/x.jpg", "y.jpg"]),
        (["a/c/x.jpg", "b/c/x.jpg"], ["a/c/x.jpg", "b/c/x.jpg"]),
        (["x.jpg", "y.jpg", "x.jpg"], ["x.jpg (photo 1)", "y.jpg", "x.jpg (photo 3)"]),
        (["x.jpg", "c/x.jpg"], ["x.jpg", "c/x.jpg"]),
        (["/x.jpg", "/c/x.jpg", "/c/x.jpg"], ["//x.jpg", "//c/x.jpg (photo 2)", "//c/x.jpg (photo 3)"]),
    ],
)
def test_names_for_people_differ(paths, names):
    assert [name.replace("//", "/") for name in told_apart(paths)] == [name.replace("//", "/") for name in names]


def test_equal_names_of_two_folders_are_told_apart(tmp_path, capfd, monkeypatch):
    photos = []
    for folder, source in (("cats", LION), ("towers", TOWER)):
        (tmp_path / folder).mkdir()
        photos.append(shutil.copy(source, tmp_path / folder / "image_0001.jpg"))
    photos += [CHEETAH, shutil.copy(CHEETAH, tmp_path / "second.jpg")]
    labels = []
    monkeypatch.setattr(
        files_module, "overview", lambda images, masks, names, odd: labels.extend(names) or Image.new("RGB", (9, 9))
    )
    options = ["--output-dir", str(tmp_path / "new"), "--refine", "none", "--device", "cpu"]
    assert main(["segment", *map(str, photos), *options]) == 0
    assert labels == ["cats/image_0001.jpg", "towers/image_0001.jpg", "cheetah1.jpg", "second.jpg"]
    assert f"{Path('towers') / 'image_0001.jpg'} does not seem to show" in capfd.readouterr().out
    written = {path.name for path in (tmp_path / "new").iterdir()}
    assert {"image_0001_mask.png", "image_0001_2_mask.png", "cheetah1_mask.png", "second_mask.png"} <= written
