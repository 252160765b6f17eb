"""Saved collections: the same after loading, extended in place, whole or not at all, refused where damaged."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_models import random_images, save_small_checkpoint, small_model, small_processor

from macosnet_hf.collection import Collection
from macosnet_hf.errors import DataError, OutputError
from macosnet_hf.image_processing_macosnet import MaCoSNetImageProcessor
from macosnet_hf.inference import saved_collections
from macosnet_hf.inference.saved_collections import load_collection, save_collection
from macosnet_hf.io import output_folder
from macosnet_hf.modeling_macosnet import MaCoSNetForKeypointMatching


@pytest.fixture(scope="module")
def network():
    model = small_model(MaCoSNetForKeypointMatching, decoder_inputs="common")
    return {"model": model, "processor": small_processor()}


@pytest.fixture(scope="module")
def photos():
    values = random_images(12)
    values = (values - values.amin()) / (values.amax() - values.amin()) * 255
    images = [Image.fromarray(value.permute(1, 2, 0).to(torch.uint8).numpy()) for value in values]
    return [image.resize((100 + 5 * number, 90)) for number, image in enumerate(images)]


@pytest.fixture
def shards_of_four(monkeypatch):
    monkeypatch.setattr(saved_collections, "_SHARD", 4)


def collected(network, images, **options):
    collection = Collection(**network, **options)
    collection.add(images)
    return collection


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same_masks(first, second):
    np.testing.assert_allclose(first.probabilities, second.probabilities, atol=5e-3)
    assert first.partners == second.partners
    np.testing.assert_allclose(first.agreement, second.agreement, atol=1e-3)


def test_a_loaded_collection_gives_the_same(network, photos, tmp_path, shards_of_four):
    collection = collected(network, photos[:10])
    seen = []
    save_collection(collection, tmp_path / "new" / "shop", progress=lambda *each: seen.append(each))
    assert seen == [(4, 10), (8, 10), (10, 10)]
    loaded = load_collection(tmp_path / "new" / "shop", **network)
    assert loaded.keys == collection.keys
    assert loaded.images.sizes == collection.images.sizes
    for own, other in zip(loaded.images, collection.images, strict=True):
        np.testing.assert_array_equal(np.asarray(own), np.asarray(other))
    torch.testing.assert_close(
        loaded.features(range(10)).last, collection.features(range(10)).last, rtol=1e-3, atol=1e-3
    )
    same_masks(loaded.segment(), collection.segment())
    loaded.segment(refine="otsu")


def test_the_files_are_safetensors_and_json_in_half_precision(network, photos, tmp_path):
    save_collection(collected(network, photos), tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}
    (features,) = tmp_path.glob("features-*")
    tensors = load_file(features)
    assert tensors["maps"].dtype == torch.float16
    assert tensors["maps"].shape == (12, 16, 6, 6)
    assert tensors["pooled"].shape == (12, 16)


def test_features_beyond_half_precision_are_saved_whole():
    maps = torch.tensor([1.0, 1e6]).view(1, 2, 1, 1)
    assert torch.equal(saved_collections._in_half_precision(maps), maps)
    assert saved_collections._in_half_precision(maps / 1e4).dtype == torch.float16


def test_images_that_come_later_have_the_saved_ones_as_partners(network, photos, tmp_path):
    save_collection(collected(network, photos[:9]), tmp_path)
    loaded = load_collection(tmp_path, **network)
    passes = []
    hook = network["model"].macosnet.encoder.register_forward_hook(lambda *_: passes.append(1))
    numbers = loaded.add(photos[9:11])
    hook.remove()
    assert (numbers, len(passes)) == ([9, 10], 2)
    result = loaded.segment_some(numbers)
    assert any(other < 9 for several in result.partners for other in several)
    expected = collected(network, photos[:11]).segment_some(numbers)
    np.testing.assert_allclose(result.probabilities, expected.probabilities, atol=5e-3)
    assert result.partners == expected.partners


def test_saving_again_writes_what_is_new(network, photos, tmp_path, shards_of_four):
    save_collection(collected(network, photos[:6]), tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    loaded = load_collection(tmp_path, **network)
    loaded.add(photos[6:9])
    save_collection(loaded, tmp_path, release=True)
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 2
    again = load_collection(tmp_path, **network)
    assert again.keys == loaded.keys == collected(network, photos[:9]).keys
    same_masks(again.segment(), loaded.segment())


def test_a_released_collection_reads_from_the_folder(network, photos, tmp_path):
    collection = collected(network, photos[:6])
    before = collection.segment()
    save_collection(collection, tmp_path, release=True)
    assert all(not isinstance(entry, Image.Image) for entry in collection.images._entries)
    assert all(collection.encoded[key].skips is None for key in collection.keys)
    same_masks(collection.segment(), before)


def test_features_are_mapped_not_read(network, tmp_path, monkeypatch):
    """A file of 100 MB of features takes next to no memory."""
    folder = tmp_path / "large"
    images = [Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(2)]
    save_collection(collected(network, images), folder)
    index = json.loads((folder / "collection.json").read_text())
    (shard,) = index["shards"]
    count = 90_000  # of 16 * 6 * 6 numbers of two bytes
    maps = load_file(folder / shard["features"])
    row = torch.zeros(count, dtype=torch.long)
    shard["features"] = saved_collections._write_tensors(folder, "features", {k: v[row] for k, v in maps.items()})
    png = load_file(folder / shard["images"])
    one = png["png"][: png["ends"][0]]
    content = {"png": one.repeat(count), "ends": torch.arange(1, count + 1) * len(one)}
    content["crc32"] = png["crc32"][:1].repeat(count)
    shard["images"] = saved_collections._write_tensors(folder, "images", content)
    shard |= {"keys": [str(number) for number in range(count)], "sizes": [[8, 8]] * count}
    (folder / "collection.json").write_text(json.dumps(index))
    del maps, png, content
    assert os.path.getsize(folder / shard["features"]) > 100_000_000
    program = (
        "import sys, psutil\n"
        "from small_models import small_model, small_processor\n"
        "from macosnet_hf.modeling_macosnet import MaCoSNetForKeypointMatching\n"
        "from macosnet_hf.inference.saved_collections import load_collection\n"
        "model = small_model(MaCoSNetForKeypointMatching, decoder_inputs='common')\n"
        "loaded = load_collection(sys.argv[1], model, small_processor())\n"
        "maps = {str(entry.path): entry for entry in psutil.Process().memory_maps(grouped=True)}\n"
        "print(len(loaded), sum(entry.rss for path, entry in maps.items() if 'features-' in path))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True, env=environment()
    )
    loaded, resident = map(int, found.stdout.split())
    assert loaded == count
    assert resident < 30_000_000


def environment():
    paths = [os.getcwd(), os.path.join(os.getcwd(), "tests"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


# ---------------------------------------------------------------------------------------------------------------------
# Whole or not at all
# ---------------------------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_older_collection(network, photos, tmp_path, shards_of_four, monkeypatch):
    save_collection(collected(network, photos[:6]), tmp_path)
    before = contents(tmp_path)
    larger = collected(network, photos)
    written = []

    def replace(source, target):
        written.append(target)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        return os.rename(source, target)

    monkeypatch.setattr(output_folder.os, "replace", replace)
    with pytest.raises(OutputError, match="No space left"):
        save_collection(larger, tmp_path)
    monkeypatch.undo()
    now = contents(tmp_path)
    assert {name: now[name] for name in before} == before
    assert load_collection(tmp_path, **network).keys == larger.keys[:6]
    assert not list(tmp_path.glob(".macosnet-*"))
    save_collection(larger, tmp_path)
    assert load_collection(tmp_path, **network).keys == larger.keys


PROGRAM = """
import sys
from PIL import Image
from macosnet_hf.collection import Collection
from macosnet_hf.inference import saved_collections
from macosnet_hf.io.checkpoints import load_model_and_processor
model, processor = load_model_and_processor(sys.argv[1], "cpu")
saved_collections._SHARD = 1
collection = Collection(model, processor)
collection.add([Image.new("RGB", (120, 90), (20 * number, 90, 3)) for number in range(12)])
print("ready", flush=True)
saved_collections.save_collection(collection, sys.argv[2], progress=lambda done, _: print(done, flush=True))
print("end", flush=True)
"""


@pytest.mark.slow
def test_a_killed_run_leaves_the_older_collection_or_the_new_one(tmp_path):
    model = save_small_checkpoint(tmp_path / "model")
    network = {
        "model": MaCoSNetForKeypointMatching.from_pretrained(model).eval(),
        "processor": MaCoSNetImageProcessor.from_pretrained(model),
    }
    folder = tmp_path / "shop"
    first = collected(network, [Image.new("RGB", (120, 90), (20 * number, 90, 3)) for number in range(2)])
    save_collection(first, folder)
    command = [sys.executable, "-c", PROGRAM, str(model), str(folder)]
    for stop in ("3", "8", "12"):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
        for line in process.stdout:
            if line.strip() == stop:
                psutil.Process(process.pid).send_signal(signal.SIGKILL)
                break
        process.communicate()
        assert len(load_collection(folder, **network)) in (2, 12)
    subprocess.run(command, check=True, env=environment(), capture_output=True)
    loaded = load_collection(folder, **network)
    assert (len(loaded), loaded.keys[:2]) == (12, first.keys)


# ---------------------------------------------------------------------------------------------------------------------
# Refused
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(network, photos, tmp_path, shards_of_four):
    save_collection(collected(network, photos[:6]), tmp_path / "shop")
    return tmp_path / "shop"


def test_another_collection_in_the_folder_is_not_replaced(network, photos, saved):
    before = contents(saved)
    for other in (photos[6:], photos[:3], photos[1:7]):
        with pytest.raises(OutputError, match="holds another collection"):
            save_collection(collected(network, other), saved)
    assert contents(saved) == before


def test_another_model_is_refused(network, photos, saved):
    other = {**network, "model": small_model(MaCoSNetForKeypointMatching, seed=1, decoder_inputs="common")}
    with pytest.raises(DataError, match="saved with another model"):
        load_collection(saved, **other)
    with pytest.raises(OutputError, match="holds another collection"):
        save_collection(collected(other, photos[:7]), saved)


def test_another_image_processor_is_refused(network, saved):
    processor = small_processor()
    processor.image_mean, processor.image_std = [0.1, 0.9, 0.1], [0.02, 2.0, 0.1]
    with pytest.raises(DataError, match="this model and image processor do not give"):
        load_collection(saved, network["model"], processor)


def change(index, **values):
    return json.dumps({**index, **values})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda index: change(index, format=2), r"another version of this package \(format 2, not 1\)"),
        (lambda index: "", "damaged"),
        (lambda index: "[]", "damaged"),
        (lambda index: "[" * 100_000, "damaged"),
        (lambda index: change(index, shards=None), "damaged"),
        (lambda index: change(index, orientations="all"), "damaged"),
        (lambda index: change(index, shards=[{**index["shards"][0], "features": "../x"}]), "damaged"),
        (lambda index: change(index, shards=[{**index["shards"][0], "sizes": [[1, 2]]}]), "damaged"),
        (lambda index: change(index, shards=[{**index["shards"][0], "sizes": [[0, 2]] * 4}]), "damaged"),
        (lambda index: change(index, shards=[{**index["shards"][0], "keys": ["a"], "sizes": [[1, 2]]}]), "damaged"),
    ],
)
def test_a_damaged_index_is_refused(network, saved, content, message):
    path = saved / "collection.json"
    path.write_text(content(json.loads(path.read_text())))
    with pytest.raises(DataError, match=message):
        load_collection(saved, **network)


def test_damaged_features_are_refused(network, saved):
    path = sorted(saved.glob("features-*"))[0]
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="is damaged; save the collection again"):
        load_collection(saved, **network)
    path.unlink()
    with pytest.raises(DataError, match="is missing"):
        load_collection(saved, **network)


def test_damaged_images_are_refused(network, saved):
    index = json.loads((saved / "collection.json").read_text())
    path = saved / index["shards"][1]["images"]
    content = path.read_bytes()
    path.write_bytes(content[:-30])
    with pytest.raises(DataError, match="missing or damaged"):
        load_collection(saved, **network)
    path.write_bytes(content[:-200] + bytes(200))
    with pytest.raises(DataError, match=r"Image \d of .* is damaged"):
        load_collection(saved, **network).segment(refine="otsu")


def test_a_folder_without_a_collection(network, tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(DataError, match="holds no saved collection"):
            load_collection(folder, **network)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        save_collection(Collection(**network), tmp_path / "file")


def test_orientations_are_kept(network, photos, tmp_path):
    images = [*photos[:3], *(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in photos[:2])]
    collection = collected(network, images, orientations="mirror")
    expected = collection.orientations
    save_collection(collection, tmp_path, release=True)
    assert torch.equal(load_collection(tmp_path, **network).orientations, expected)
    assert torch.equal(collection.orientations, expected)
    same_masks(load_collection(tmp_path, **network).segment(), collection.segment())
