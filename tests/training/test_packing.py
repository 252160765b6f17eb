"""Images and encoders go out in a few files, heads come back."""

import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file, save_file
from small_models import random_images

from macosnet_hf.configuration_macosnet import MaCoSNetConfig
from macosnet_hf.errors import DataError, InputError
from macosnet_hf.io.checkpoints import load_model_and_processor
from macosnet_hf.modeling_macosnet import MaCoSNetForKeypointMatching
from macosnet_hf.training.encoder_weights import packaged_state_dict
from macosnet_hf.training.images import TrainingImages
from macosnet_hf.training.loop import steps_within
from macosnet_hf.training.packing import join_results, pack, unpack
from macosnet_hf.training.settings import SyntheticSettings

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    packaged_state_dict("tf_efficientnet_lite0") is None, reason="the ImageNet weights are not installed"
)


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "training" / "packed.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A data set of two classes, a list of one pair, and both packed."""
    root = tmp_path_factory.mktemp("packing")
    for number, pixels in enumerate(random_images(6).permute(0, 2, 3, 1)):
        path = root / "images" / ("cats", "dogs")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels[..., 0].sigmoid() * 255).byte().numpy()).resize((90 + number, 60)).save(path)
    table = root / "images" / "pairs.csv"
    row = "cats,cats/0.png,cats/2.png,10;20;40,10;20;30,12;22;41,11;21;31"
    table.write_text(f"class,source_image,target_image,XA,YA,XB,YB\n{row}\n", encoding="utf-8-sig")  # as Excel does
    words = ("--dataset_name", root / "images", "--images_per_class", 2, "--photo_size", 64, "--presets", "lite")
    done = run("pack", "--output_dir", root / "packed", *words, "--validation_pairs", table)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("4 images and 1 encoders in ")
    return root


def test_packed_images_are_the_resized_ones(folders, tmp_path):
    images = TrainingImages([str(folders / "images")], 64, limit=2)
    unpacked = unpack(folders / "packed", "lite", tmp_path)
    again = TrainingImages([unpacked["dataset_name"]], 64)
    assert again.class_names == images.class_names == ["cats", "cats", "dogs", "dogs"]
    for number in range(4):
        assert (again[number].float() - images[number].float()).abs().mean() < 8
    for name in ("cats/0.png", "cats/2.png"):
        places = folders / "images", tmp_path / "validation"
        original, packed = (np.asarray(Image.open(place / name).convert("L"), float) for place in places)
        assert original.shape == packed.shape
        assert np.abs(original - packed).mean() < 6


def test_heads_are_trained_elsewhere_and_joined_here(folders, tmp_path):
    options = ["--max_minutes", 0.05, "--per_device_train_batch_size", 2, "--logging_steps", 1, "--photo_size", 64]
    done = run("train", "--packed", folders / "packed", "--preset", "lite", "--output_dir", tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "affine_head.safetensors",
        "config.json",
        "log.jsonl",
        "tps_head.safetensors",
    ]
    assert "pck_cascade@0.1" in (tmp_path / "out" / "log.jsonl").read_text()
    done = run("join", "--results", tmp_path / "out", "--preset", "lite", "--output_dir", tmp_path / "model")
    assert done.returncode == 0, done.stderr
    model, processor = load_model_and_processor(str(tmp_path / "model"), "cpu")
    assert processor.size["height"] == model.config.image_size == 240
    for head in ("affine_head", "tps_head"):
        state = load_file(tmp_path / "out" / f"{head}.safetensors")
        assert all(
            torch.equal(value, state[name]) for name, value in getattr(model.macosnet, head).state_dict().items()
        )
        assert state["conv.1.running_mean"].abs().sum() > 0
    expected = packaged_state_dict("tf_efficientnet_lite0")
    encoder = model.macosnet.encoder.backbone._backbone.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in encoder.items())


def test_as_many_steps_as_fit_into_the_time(monkeypatch):
    now = [0.0]  # a clock of which other work on the machine takes nothing
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    class Slow(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, batch, generator):
            now[0] += 0.02
            return {"total": (self.weight * batch.float().mean()).sum()}

    objective, settings = Slow(), SyntheticSettings(dataset_name=["x"], output_dir="y", max_minutes=0.1)
    steps = steps_within(0.1, objective, torch.zeros(5, 3, 4, 4), settings, Accelerator(cpu=True))
    assert steps == int(6 / 0.022)
    assert objective.weight.item() == 1
    with pytest.raises(InputError, match="--max_minutes must be"):
        SyntheticSettings(dataset_name=["x"], output_dir="y", max_minutes=0)


def test_what_cannot_be_packed_or_joined_is_named(folders, tmp_path):
    with pytest.raises(InputError, match=r"holds no images\.zip and base\.safetensors"):
        unpack(folders / "packed", "base", tmp_path)
    with pytest.raises(InputError, match=r"affine_head\.safetensors does not hold that head"):
        join_results(tmp_path, "lite")
    with pytest.raises(DataError, match="the pair list is missing"):
        pack(tmp_path, TrainingImages([str(folders / "images")], 64), [], str(tmp_path / "none.csv"))
    with zipfile.ZipFile(folders / "packed" / "images.zip") as archive:
        assert len(archive.namelist()) == 4
    done = run("pack", "--output_dir", tmp_path, "--dataset_name", folders / "images", "--nonsense", 3)
    assert done.returncode == 2
    assert "--nonsense" in done.stderr


def archive_of(path, members, change=lambda content: content):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    path.write_bytes(change(path.read_bytes()))


def encrypted(content):
    """The flag of encryption in both headers of the first member."""
    changed, place = bytearray(content), content.rindex(b"PK\1\2")
    changed[6] |= 1
    changed[place + 8] |= 1
    return bytes(changed)


def with_other_sum(content):
    changed = bytearray(content)
    changed[content.rindex(b"PK\1\2") + 16] ^= 1
    return bytes(changed)


ARCHIVES = {
    "no archive": ("images", {}, lambda content: b"PK junk", "damaged"),
    "wrong check sum": ("images", {"a/0.webp": b"x"}, with_other_sum, "damaged"),
    "encrypted": ("images", {"a/0.webp": b"x"}, encrypted, "damaged"),
    "a file is a folder": ("images", {"a": b"x", "a/b": b"x"}, bytes, "damaged"),
    "a long name": ("images", {"a" * 300: b"x"}, bytes, "damaged"),
    "a bomb": ("images", {"a/0.webp": bytes(80_000_000)}, bytes, "many times its size"),
    "no pairs": ("validation", {"a/0.webp": b"x"}, bytes, r"holds no pairs\.csv"),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_a_hostile_archive_is_refused_by_name(folders, tmp_path, kind):
    name, members, change, message = ARCHIVES[kind]
    shutil.copytree(folders / "packed", tmp_path / "packed")
    archive_of(tmp_path / "packed" / f"{name}.zip", members, change)
    with pytest.raises(InputError, match=rf"{name}\.zip .*{message}"):
        unpack(tmp_path / "packed", "lite", tmp_path / "into")
    assert not (tmp_path / "into" / "start").exists()


def test_names_that_lead_out_of_the_folder_do_not(folders, tmp_path):
    shutil.copytree(folders / "packed", tmp_path / "packed")
    archive_of(tmp_path / "packed" / "images.zip", {"../../out.webp": b"x", "/absolute.webp": b"x", "a\0b.webp": b"x"})
    unpack(tmp_path / "packed", "lite", tmp_path / "into" / "deep")
    assert sorted(path.name for path in (tmp_path / "into" / "deep" / "images").iterdir()) == [
        "a",
        "absolute.webp",
        "out.webp",
    ]
    assert not list(tmp_path.rglob("../out.webp"))


WEIGHTS = {
    "more": lambda state: {**state, "more": torch.zeros(1)},
    "fewer": lambda state: dict(list(state.items())[1:]),
    "another shape": lambda state: {**state, next(iter(state)): torch.zeros(1)},
    "whole numbers": lambda state: {**state, next(iter(state)): next(iter(state.values())).to(torch.int8)},
    "not finite": lambda state: {**state, next(iter(state)): next(iter(state.values())).double() + 1e300},
    "negative variances": lambda state: {name: value - 1e3 * ("_var" in name) for name, value in state.items()},
}


@pytest.mark.parametrize("kind", [*WEIGHTS, "no weights"])
def test_weights_that_are_none_are_refused_by_name(folders, tmp_path, kind):
    model = MaCoSNetForKeypointMatching(MaCoSNetConfig.from_preset("lite"))
    shutil.copytree(folders / "packed", tmp_path / "packed")
    for name, part in (("lite", model.macosnet.encoder), ("affine_head", model.macosnet.affine_head)):
        path = tmp_path / "packed" / f"{name}.safetensors"
        if kind == "no weights":
            torch.save({}, path)
        else:
            save_file({key: value.clone() for key, value in WEIGHTS[kind](part.state_dict()).items()}, path)
    with pytest.raises(InputError, match=r"lite\.safetensors does not hold that encoder"):
        unpack(tmp_path / "packed", "lite", tmp_path / "into")
    with pytest.raises(InputError, match=r"affine_head\.safetensors does not hold that head"):
        join_results(tmp_path / "packed", "lite")
