"""Hints and instances on the command line."""

import argparse
import json

import numpy as np
import pytest
from PIL import Image

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
