"""Result files: the same set from the command line and from the demo, for a pair and for a collection."""

import csv
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from real_photos import CHEETAH, LION, TOWER

from macosnet_hf import ImageError, InputError
from macosnet_hf.commands.main import main
from macosnet_hf.inference.files import match_files, segment_files
from macosnet_hf.inference.result_files import (
    COLLECTION_ARCHIVE,
    PAIR_ARCHIVE,
    collection_file_names,
    matches_table,
    pair_document,
    pair_file_names,
    write_collection,
    write_pair,
    zip_folder,
)

# Keys that readers of version 0.1 know: those of its command line, then those of its demo.
PAIR_KEYS = {
    "source",
    "target",
    "quality",
    "agreement",
    "reason",
    "common",
    "matches",
    "affine",
    "tps",
    "reverse",
    "orientation",
    "model",
    "refine",
    "threshold",
}
VIEW_KEYS = {"file", "width", "height", "object_share"}
COLLECTION_KEYS = {
    "photos",
    "alone",
    "odd_ones_out",
    "skipped",
    "not_done",
    "model",
    "refine",
    "reference_of_the_average",
}
PHOTO_KEYS = {
    "photo",
    "file",
    "mask",
    "cutout",
    "width",
    "height",
    "object_share",
    "agreement",
    "belongs",
    "orientation",
    "common",
    "partners",
}


@pytest.fixture(scope="module")
def collection(network, large_lion):
    return segment_files([CHEETAH, large_lion, TOWER], ["a.jpg", "b.jpg", "a.png"], **network, refine="none")


def test_document_and_table_hold_the_same_matches(pair):
    document = pair_document(pair, 0.1, model="a model")
    assert json.loads(json.dumps(document)) == document
    assert (document["target"]["width"], document["target"]["height"]) == (2001, 1501)
    assert all(match["score"] > 0.1 for match in document["matches"])
    rows = list(csv.DictReader(io.StringIO(matches_table(document))))
    assert len(rows) == len(document["matches"]) == (pair.result.scores > 0.1).sum()
    for row, match in zip(rows, document["matches"], strict=True):
        assert [float(row["source_x"]), float(row["source_y"])] == match["source"]
        assert [float(row["target_x"]), float(row["target_y"])] == match["target"]


def test_points_of_the_document_are_transferred(pair):
    document = pair_document(pair, model="a model", points=[(100, 200.5)])
    (point,) = document["points"]
    assert point["source"] == [100, 200.5]
    np.testing.assert_allclose(point["target"], pair.transfer([(100, 200.5)])[0], atol=0.0051)
    with pytest.raises(InputError, match="outside"):
        pair_document(pair, model="a model", points=[(377, 0)])


def test_files_of_a_pair(pair, tmp_path):
    document = write_pair(pair, tmp_path, model="a model", flow=True)
    assert sorted(pair_file_names(flow=True)) == sorted(os.listdir(tmp_path))
    assert json.loads((tmp_path / "matches.json").read_text(encoding="utf-8")) == document
    assert (
        Image.open(tmp_path / "target_mask.png").size == Image.open(tmp_path / "target_cutout.png").size == (2001, 1501)
    )
    mask = np.asarray(Image.open(tmp_path / "source_mask.png")) > 127
    np.testing.assert_array_equal(mask, pair.result.source_mask)
    cutout = np.asarray(Image.open(tmp_path / "source_cutout.png"))
    assert (cutout[cutout[..., 3] == 0] == [255, 255, 255, 0]).all()
    assert ((cutout[..., 3] > 127) == mask).mean() > 0.95
    assert set(np.load(tmp_path / "flow.npz")) == {"source_to_target", "target_to_source", "source_size", "target_size"}


def test_matches_below_the_threshold_are_in_none_of_the_files(pair, tmp_path):
    document = write_pair(pair, tmp_path, 1.0, model="a model")
    assert document["matches"] == []
    assert (tmp_path / "matches.csv").read_text().splitlines() == ["source_x,source_y,target_x,target_y,score"]
    drawn = np.asarray(Image.open(tmp_path / "matches.png"))
    np.testing.assert_array_equal(drawn, np.asarray(pair.above(1.0).result.draw_matches()))
    assert (drawn != np.asarray(pair.result.draw_matches())).any()


def test_command_line_and_demo_give_the_same_files_of_a_pair(network, tmp_path):
    arguments = ["match", CHEETAH, LION, "--output-dir", str(tmp_path / "cli"), "--refine", "none", "--device", "cpu"]
    assert main([*arguments, "--flow", "--zip", "--threshold", "0.1"]) == 0
    (tmp_path / "demo").mkdir()
    # Both images are smaller than a working copy, so even the pixels are the same.
    pair = match_files(CHEETAH, LION, (CHEETAH, LION), **network, refine="none")
    write_pair(pair, tmp_path / "demo", 0.1, model="macosnet-lite", flow=True)
    zip_folder(tmp_path / "demo", PAIR_ARCHIVE)
    names = sorted(os.listdir(tmp_path / "cli"))
    assert names == sorted(os.listdir(tmp_path / "demo")) == sorted(pair_file_names(flow=True, archive=True))
    for name in names:
        assert (tmp_path / "cli" / name).read_bytes() == (tmp_path / "demo" / name).read_bytes(), name
    document = json.loads((tmp_path / "cli" / "matches.json").read_text())
    assert set(document) == PAIR_KEYS
    assert set(document["source"]) == set(document["target"]) == VIEW_KEYS


def test_files_of_a_collection(collection, tmp_path):
    document = write_collection(collection, tmp_path, model="a model", skipped=[("c.jpg", "is no image")])
    assert sorted(os.listdir(tmp_path)) == sorted(collection_file_names(["a", "b", "a_2"], average=True))
    assert json.loads((tmp_path / "summary.json").read_text()) == document
    assert set(document) == COLLECTION_KEYS
    assert [photo["photo"] for photo in document["photos"]] == ["a.jpg", "b.jpg", "a.png"]
    assert document["skipped"] == [{"photo": "c.jpg", "file": "c.jpg", "reason": "is no image"}]
    for photo, mask in zip(document["photos"], map(collection.original_mask, range(3)), strict=True):
        assert set(photo) == PHOTO_KEYS
        assert photo["file"] == photo["photo"]
        assert mask.shape == (photo["height"], photo["width"])
        assert photo["object_share"] == round(float(mask.mean()), 4)
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / photo["mask"])), mask * np.uint8(255))
        assert ((np.asarray(Image.open(tmp_path / photo["cutout"]))[..., 3] > 127) == mask).mean() > 0.95


def test_command_line_and_demo_give_the_same_files_of_a_collection(network, tmp_path):
    photos = [CHEETAH, LION]  # no larger than the working copies of either
    arguments = ["segment", *photos, "--output-dir", str(tmp_path / "cli"), "--refine", "none", "--device", "cpu"]
    assert main([*arguments, "--average", "--zip"]) == 0
    (tmp_path / "demo").mkdir()
    found = segment_files(photos, photos, **network, refine="none")
    found = type(found)(**{**vars(found), "names": [Path(path).stem for path in photos]})
    write_collection(found, tmp_path / "demo", model="macosnet-lite")
    zip_folder(tmp_path / "demo", COLLECTION_ARCHIVE)
    names = sorted(os.listdir(tmp_path / "cli"))
    assert names == sorted(os.listdir(tmp_path / "demo"))
    assert names == sorted(collection_file_names(["cheetah1", "lion"], average=True, archive=True))
    for name in names:
        assert (tmp_path / "cli" / name).read_bytes() == (tmp_path / "demo" / name).read_bytes(), name


def test_no_average_unless_it_is_asked_for(tmp_path):
    arguments = ["segment", CHEETAH, LION, "--output-dir", str(tmp_path), "--refine", "none", "--device", "cpu"]
    assert main(arguments) == 0
    assert sorted(os.listdir(tmp_path)) == sorted(collection_file_names(["cheetah1", "lion"]))


def test_an_original_that_has_gone_is_named(collection, tmp_path):
    gone = type(collection.copies[1])("gone.jpg", "b.jpg", collection.copies[1].image, (2001, 1501))
    changed = type(collection)(**{**vars(collection), "copies": [collection.copies[0], gone, collection.copies[2]]})
    with pytest.raises(ImageError, match=r"'b\.jpg' can no longer be read"):
        write_collection(changed, tmp_path, model="a model")


def test_the_same_files_give_the_same_zip(tmp_path):
    archives = []
    for folder in (tmp_path / "one", tmp_path / "other"):
        folder.mkdir()
        for name in sorted(("b.png", "a.png", "z.json"), reverse=folder.name == "one"):
            (folder / name).write_bytes(name.encode())
        archives.append(zip_folder(folder, "all.zip", remove=folder.name == "other"))
    assert archives[0].read_bytes() == archives[1].read_bytes()
    assert sorted(os.listdir(tmp_path / "one")) == ["a.png", "all.zip", "b.png", "z.json"]
    assert os.listdir(tmp_path / "other") == ["all.zip"]
    with zipfile.ZipFile(archives[0]) as archive:
        assert archive.namelist() == ["z.json", "a.png", "b.png"]
        assert archive.testzip() is None


def test_the_writer_loads_without_torch():
    """The command line asks for the names of its results before it loads anything heavy."""
    code = "import sys, macosnet_hf.inference.result_files; print({'torch', 'transformers', 'cv2'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
