"""Training reads what `macosnet prepare` writes: each image once, with its class."""

import datasets
import pytest
import torch
from archives import disc, mask, pf_willow, write_image
from image_bytes import odd_files

from macosnet_hf import load_image
from macosnet_hf.datasets.images import find_images
from macosnet_hf.datasets.prepare import prepare
from macosnet_hf.training.images import TrainingImages


def test_pairs_of_a_prepared_data_set_give_each_image_once(tmp_path):
    archive = pf_willow(tmp_path / "archive", images=3, classes=("car(G)", "duck(S)"))
    prepare("pf-willow", archive, tmp_path / "prepared")
    images = TrainingImages([str(tmp_path / "prepared")], 32)
    assert len(images) == 6
    assert sorted(images.classes()) == ["car(G)", "duck(S)"]
    assert all(len(members) == 3 for members in images.classes().values())
    # The same images as in the archive, whatever their order.
    direct = TrainingImages([str(archive / "PF-dataset")], 32)
    found = sorted(tuple(images[index].flatten().tolist()) for index in range(6))
    assert found == sorted(tuple(direct[index].flatten().tolist()) for index in range(6))


def test_single_images_of_a_prepared_data_set_come_without_their_masks(tmp_path):
    for index in range(2):
        write_image(tmp_path / "mine" / "images" / "cat" / f"{index}.png", seed=index)
        mask(tmp_path / "mine" / "masks" / "cat" / f"{index}.png", disc())
    prepare("coseg", tmp_path / "mine", tmp_path / "prepared")
    images = TrainingImages([str(tmp_path / "prepared")], 32)
    assert len(images) == 2
    assert list(images.classes()) == ["cat"]
    assert images[0].dtype == torch.uint8
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize("limit", [1, 2])
def test_the_limit_counts_images_of_a_class(tmp_path, limit):
    archive = pf_willow(tmp_path / "archive", images=3, classes=("car(G)",))
    prepare("pf-willow", archive, tmp_path / "prepared")
    assert len(TrainingImages([str(tmp_path / "prepared")], 32, limit=limit)) == limit


def test_a_stream_gives_the_same_images(tmp_path):
    archive = pf_willow(tmp_path / "archive", images=3, classes=("car(G)", "duck(S)"))
    prepare("pf-willow", archive, tmp_path / "prepared")
    stored = TrainingImages([str(tmp_path / "prepared")], 32)
    streamed = TrainingImages([str(tmp_path / "prepared")], 32, streaming=True)
    assert sorted(streamed.class_names) == sorted(stored.class_names)

    def contents(images):
        return sorted(tuple(images[index].flatten().tolist()) for index in range(len(images)))

    assert contents(streamed) == contents(stored)
    assert len(TrainingImages([str(tmp_path / "prepared")], 32, streaming=True, stream_limit=4)) == 4
    assert len(TrainingImages([str(tmp_path / "prepared")], 32, streaming=True, limit=2)) == 4
    assert set(TrainingImages([str(tmp_path / "prepared")], 32, streaming=True, exclude=("car(G)",)).class_names) == {
        "duck(S)"
    }


def test_hidden_files_and_folders_are_no_training_images(tmp_path):
    for name in ("cats/a.png", "cats/b.png", "cats/.thumbnails/a.png", ".trash/old.png"):
        write_image(tmp_path / name)
    for name in ("cats/._a.png", "cats/.DS_Store", "cats/Thumbs.db", "__MACOSX/cats/._a.png", "cats/@eaDir/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07")
    paths, classes = find_images(tmp_path)
    assert [path.name for path in paths] == ["a.png", "b.png"]
    assert classes == ["cats", "cats"]


def test_files_of_every_kind_are_read_upright_and_in_srgb(tmp_path):
    """In a folder, in Parquet files and in a stream as in plain files: turned, of phones, of more bits, transparent."""
    files = odd_files()
    for kind in ("odd", "plain"):
        (tmp_path / kind / "cat").mkdir(parents=True)
    for name, content in files.items():
        (tmp_path / "odd" / "cat" / name).write_bytes(content)
        load_image(content).save(tmp_path / "plain" / "cat" / f"{name}.png")
    (tmp_path / "rows" / "data").mkdir(parents=True)
    rows = [{"image": {"bytes": files[name], "path": name}, "label": "cat"} for name in sorted(files)]
    columns = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    table = datasets.Dataset.from_list(rows, features=columns)
    table.to_parquet(tmp_path / "rows" / "data" / "train-00000-of-00001.parquet")
    expected = TrainingImages([str(tmp_path / "plain")], 32)
    for source, streaming in (("odd", False), ("rows", False), ("rows", True)):
        found = TrainingImages([str(tmp_path / source)], 32, streaming=streaming)
        assert len(found) == len(files)
        assert torch.equal(found.batch(range(len(files))), expected.batch(range(len(files))))
