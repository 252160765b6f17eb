"""Hints and instances on the command line."""

import argparse
import json

import numpy as np
import pytest
from PIL import Image, ImageOps
from real_photos import LION

from macosnet_hf import InputError
from macosnet_hf.commands.hint_options import add_hint_arguments, read_hints
from macosnet_hf.commands.main import main
from macosnet_hf.io.working_copy import WorkingCopy


def read(*arguments, paths=("one/dog.jpg", "two/dog.jpg", "two/cat.jpg"), names=()):
    parser = argparse.ArgumentParser()
    add_hint_arguments(parser, "an image")
    image = Image.new("RGB", (20, 15))
    copies = [WorkingCopy(path, path, image, (40, 30)) for path in paths]
    return read_hints(parser.parse_args(arguments), copies, names)


def test_images_are_named_by_number_file_path_or_role():
    point = ((10.5 / 40, 5.5 / 30),)
    assert read("--include", "3:10,5")[2].include == point
    assert read("--include", "cat.jpg:10,5")[2].include == point
    assert read("--exclude", "two/dog.jpg:10,5")[1].exclude == point
    assert read("--exclude", "target:10,5", names=("source", "target"))[1].exclude == point
    assert read("--include", "10,5", paths=("dog.jpg",))[0].include == point
    assert read() == {}


def test_options_of_one_image_are_one_hint():
    hints = read("--include", "1:10,5", "--include", "1:12,5", "--exclude", "1:3,3", "--box", "1:8,0,39,29")
    assert list(hints) == [0]
    assert len(hints[0].include) == 2
    assert hints[0].box == (0.2, 0, 1, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--include", "10,5"], "--include must say in which of the 3 images"),
        (["--include", "dog.jpg:10,5"], "several images are called 'dog.jpg'"),
        (["--exclude", "cow.jpg:10,5"], "--exclude: none of the images is called 'cow.jpg'"),
        (["--include", "4:10,5"], "there is no image 4; there are 3"),
        (["--include", "0:10,5"], "there is no image 0"),
        (["--include", "1:10"], "expected numbers x,y"),
        (["--include", "1:ten,5"], "expected numbers x,y"),
        (["--box", "1:1,2,3"], "expected numbers x0,y0,x1,y1"),
        (["--box", "1:1,2,3,4", "--box", "1:1,2,3,4"], "has a box already"),
        (["--include", "1:40,5"], "outside of one/dog.jpg, which is 40x30 pixels"),
        (["--include", "1:5,5", "--exclude", "1:5,5"], "both included and excluded"),
        (["--box", "1:5,5,5,20"], "has no area"),
    ],
)
def test_a_hint_that_cannot_be_used_is_answered_in_a_sentence(arguments, message):
    with pytest.raises(InputError, match=message) as error:
        read(*arguments)
    assert str(error.value).endswith(".")


@pytest.mark.slow
def test_segment_follows_hints_and_writes_each_object(tmp_path):
    two = Image.new("RGB", (480, 240), "white")
    cat = Image.open("examples/cat.jpg").resize((240, 240))
    two.paste(cat, (0, 0))
    two.paste(Image.open("examples/cup.jpg").resize((240, 240)), (240, 0))
    two.save(tmp_path / "two.png")
    photos = [str(tmp_path / "two.png"), "examples/cat.jpg", "examples/tabby.jpg"]
    folder = tmp_path / "out"
    options = ["--output-dir", str(folder), "--device", "cpu", "--instances", "--box", "two.png:240,0,479,239"]
    assert main(["segment", *photos, *options]) == 0
    mask = np.asarray(Image.open(folder / "two_mask.png")) > 0
    assert not mask[:, :236].any()
    entries = json.loads((folder / "summary.json").read_text())["photos"]
    for entry in entries:
        labels = np.asarray(Image.open(folder / entry["instance_labels"]))
        assert labels.max() == entry["instances"] == len(entry["instance_cutouts"])
        assert ((labels > 0) == (np.asarray(Image.open(folder / entry["mask"])) > 0)).all()
        for cutout in entry["instance_cutouts"]:
            assert Image.open(folder / cutout).mode == "RGBA"


@pytest.mark.slow
def test_match_follows_hints(tmp_path):
    arguments = ["match", "examples/cat.jpg", "examples/dog.jpg", "--output-dir", str(tmp_path), "--device", "cpu"]
    assert main([*arguments, "--box", "target:0,0,239,479", "--include", "target:150,300"]) == 0
    mask = np.asarray(Image.open(tmp_path / "target_mask.png")) > 0
    assert mask[300, 150]
    assert not mask[:, 244:].any()
    matches = json.loads((tmp_path / "matches.json").read_text())["matches"]
    assert all(match["target"][0] <= 244 for match in matches)


@pytest.mark.slow
def test_match_says_which_objects_match(tmp_path, capsys):
    """Of two lions it is the one that faces as the target does."""
    two, lion = Image.new("RGB", (700, 400), "white"), Image.open(LION).convert("RGB")
    two.paste(ImageOps.mirror(lion).resize((260, 260)), (40, 80))
    two.paste(lion.resize((300, 300)), (340, 50))
    two.save(tmp_path / "two.png")
    lion.crop((12, 10, 244, 246)).save(tmp_path / "lion.png")
    arguments = ["match", str(tmp_path / "two.png"), str(tmp_path / "lion.png"), "--device", "cpu", "--instances"]
    assert main([*arguments, "--output-dir", str(tmp_path / "out")]) == 0
    document = json.loads((tmp_path / "out" / "matches.json").read_text())
    labels = np.asarray(Image.open(tmp_path / "out" / "source_instances.png"))
    chosen = document["source"]["matched_instance"]
    assert labels.max() == document["source"]["instances"] == 2
    assert document["target"]["matched_instance"] == document["target"]["instances"] == 1
    assert ((labels > 0) == (np.asarray(Image.open(tmp_path / "out" / "source_mask.png")) > 0)).all()
    assert len(document["matches"]) > 10
    for match in document["matches"]:
        column, row = np.rint(match["source"]).astype(int)
        assert column > 320
        assert labels[max(row - 4, 0) : row + 5, max(column - 4, 0) : column + 5].max() == chosen
    said = capsys.readouterr().out
    assert f"Object {chosen} of 2 of the source matches the only object of the target." in said
    assert main([*arguments[:-1], "--output-dir", str(tmp_path / "plain")]) == 0
    assert not (tmp_path / "plain" / "source_instances.png").exists()
    assert "instances" not in json.loads((tmp_path / "plain" / "matches.json").read_text())["source"]
