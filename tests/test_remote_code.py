"""A saved folder serves every auto class with `trust_remote_code=True` where `macosnet_hf` cannot be imported."""

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import random_images, small_model

from macosnet_hf.configuration_macosnet import MaCoSNetConfig
from macosnet_hf.geometry import relative_points
from macosnet_hf.image_processing_macosnet import MaCoSNetImageProcessor
from macosnet_hf.modeling_macosnet import MaCoSNetForKeypointMatching, MaCoSNetModel

# Runs in a process of its own. Writes what the models say to files, so that the test can compare bits.
PROGRAM = """
import importlib.util, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name == "macosnet_hf" or name.startswith("macosnet_hf."):
            raise ModuleNotFoundError(f"No module named {name!r} (blocked by the test)")

sys.meta_path.insert(0, Blocked())
try:
    import macosnet_hf
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the package could be imported, so this would prove nothing")

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForKeypointMatching

folder, images, results, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
torch.set_flush_denormal(True)
pixel_values = load_file(images)["pixel_values"]


def run(auto_class, source):
    model = auto_class.from_pretrained(source, trust_remote_code=True).eval()
    with torch.inference_mode():
        outputs = model(pixel_values)
    return model, {name: value.contiguous() for name, value in outputs.items() if value is not None}


config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
assert type(config).__name__ == "MaCoSNetConfig", config
for source, round_trip in ((folder, results + "/again"), (results + "/again", None)):
    base, base_outputs = run(AutoModel, source)
    matcher, matcher_outputs = run(AutoModelForKeypointMatching, source)
    names = (type(config).__module__, type(base).__module__, type(matcher).__module__)
    assert all(name.startswith("transformers_modules.") for name in names), names
    assert (type(base).__name__, type(matcher).__name__) == ("MaCoSNetModel", "MaCoSNetForKeypointMatching")
    which = "first" if round_trip else "second"
    save_file(base_outputs, f"{results}/{which}-AutoModel.safetensors")
    save_file(matcher_outputs, f"{results}/{which}-AutoModelForKeypointMatching.safetensors")
    if round_trip:
        # What was loaded as remote code can be saved and served again.
        base.save_pretrained(round_trip)
        sizes = torch.tensor([[[40, 90], [70, 30]]])
        points = matcher.transfer_points(matcher(pixel_values), torch.tensor([[[10.0, 20.0]]]), sizes)
        save_file({"points": points.detach().contiguous()}, f"{results}/points.safetensors")
assert "macosnet_hf" not in sys.modules
"""


def run_elsewhere(folder: Path, images: torch.Tensor, scratch: Path) -> Path:
    """Runs the program with nothing of the checkout on its path; returns the folder of its results."""
    results = scratch / "results"
    working = scratch / "elsewhere"
    results.mkdir()
    working.mkdir()
    save_file({"pixel_values": images.contiguous()}, scratch / "images.safetensors")
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(scratch / "hf"),
        "HF_MODULES_CACHE": str(scratch / "modules"),
    }
    arguments = [str(folder), str(scratch / "images.safetensors"), str(results), str(torch.get_num_threads())]
    finished = subprocess.run(
        [sys.executable, "-I", "-c", PROGRAM, *arguments],
        cwd=working,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return results


@pytest.fixture(autouse=True)
def _flush_denormal():
    """As the other process does: it changes the last bits, and random weights are slow without it."""
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize(
    "case",
    [
        "MaCoSNetModel, transformers backbone",
        "MaCoSNetForKeypointMatching, timm backbone",
        "MaCoSNetForKeypointMatching, timm backbone, fused",
    ],
)
def test_outputs_are_bit_equal_where_the_package_is_not_importable(case, tmp_path):
    if case.startswith("MaCoSNetModel"):
        saved, images = small_model(MaCoSNetModel), random_images(1, 2)
    else:
        torch.manual_seed(0)
        config = MaCoSNetConfig.from_preset("lite" if "fused" in case else "lite-stride16")
        saved, images = MaCoSNetForKeypointMatching(config).eval(), torch.randn(1, 2, 3, 240, 240)
    folder = tmp_path / "model"
    saved.save_pretrained(folder)
    results = run_elsewhere(folder, images, tmp_path)

    for model_class, auto_class in (
        (MaCoSNetModel, "AutoModel"),
        (MaCoSNetForKeypointMatching, "AutoModelForKeypointMatching"),
    ):
        model = saved if isinstance(saved, model_class) else model_class.from_pretrained(folder).eval()
        with torch.inference_mode():
            expected = {name: value for name, value in model(images).items() if value is not None}
        for which in ("first", "second"):
            found = load_file(results / f"{which}-{auto_class}.safetensors")
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.equal(found[name], value), f"{which} {auto_class}: {name}"
        if auto_class == "AutoModelForKeypointMatching":
            sizes = torch.tensor([[[40, 90], [70, 30]]])
            points = model.transfer_points(model(images), torch.tensor([[[10.0, 20.0]]]), sizes)
            assert torch.equal(load_file(results / "points.safetensors")["points"], points)

    # What the other process saved is loaded by the installed package, too.
    again = MaCoSNetForKeypointMatching.from_pretrained(results / "again").eval()
    state, expected_state = again.macosnet.state_dict(), getattr(saved, "macosnet", saved).state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected_state.items())
    assert state.keys() == expected_state.keys()


VERSION_0_1 = "4c9c3700e779fb867dbdef466f5bdb5681839860"
SAVES_IN_0_1 = """
import sys
import torch
from safetensors.torch import load_file, save_file
from macosnet_hf import DEFAULT_CHECKPOINT, MaCoSNetForKeypointMatching, MaCoSNetImageProcessor

folder, images, outputs, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
torch.set_flush_denormal(True)
model = MaCoSNetForKeypointMatching.from_pretrained(DEFAULT_CHECKPOINT).eval()
model.save_pretrained(folder)
MaCoSNetImageProcessor.from_pretrained(DEFAULT_CHECKPOINT).save_pretrained(folder)
with torch.inference_mode():
    found = model(load_file(images)["pixel_values"])
save_file({name: value.contiguous() for name, value in found.items() if value is not None}, outputs)
"""


def test_a_folder_of_version_0_1_loads_with_its_own_code_and_with_the_package(tmp_path):
    """Its modules have other names (agreement.py), and the classes of this version must not import them."""
    root = Path(__file__).resolve().parents[1]
    archive = subprocess.run(["git", "archive", VERSION_0_1, "macosnet_hf"], cwd=root, capture_output=True, check=False)
    if archive.returncode != 0:
        pytest.skip("the history of version 0.1 is not here")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(tmp_path / "old", filter="data")
    torch.manual_seed(0)
    images, folder, outputs = torch.randn(1, 2, 3, 240, 240), tmp_path / "model", tmp_path / "outputs.safetensors"
    save_file({"pixel_values": images}, tmp_path / "images.safetensors")
    subprocess.run(
        [
            sys.executable,
            "-c",
            SAVES_IN_0_1,
            folder,
            tmp_path / "images.safetensors",
            outputs,
            str(torch.get_num_threads()),
        ],
        cwd=tmp_path / "old",
        env={**os.environ, "PYTHONPATH": str(tmp_path / "old"), "HF_HUB_OFFLINE": "1"},
        check=True,
    )
    expected = load_file(outputs)
    assert (folder / "agreement.py").is_file()
    with torch.inference_mode():
        installed = MaCoSNetForKeypointMatching.from_pretrained(folder).eval()(images)
    remote = load_file(run_elsewhere(folder, images, tmp_path) / "first-AutoModelForKeypointMatching.safetensors")
    for name, value in expected.items():
        assert torch.equal(remote[name], value), name
        if name == "keypoints":  # 0 and 1 were the centres of the corner pixels in 0.1; now they are the outer edges
            inside = (value > 0) & (value < 1)  # outside of the image they end at its border, which moved
            value = relative_points(2 * value - 1, 240)
            torch.testing.assert_close(installed[name][inside], value[inside], atol=1e-6, rtol=0)
        else:
            assert torch.equal(installed[name], value), name


@pytest.mark.parametrize("saved", [MaCoSNetImageProcessor, MaCoSNetConfig])
def test_what_is_saved_alone_leaves_no_module_of_another_version(saved, tmp_path):
    """Into a folder of 0.1, whose modeling_macosnet.py imports names that this version's modules do not have."""
    small_model(MaCoSNetForKeypointMatching).save_pretrained(tmp_path / "model")
    expected = {path.name: path.read_bytes() for path in (tmp_path / "model").glob("*.py")}
    folder = tmp_path / "old"
    folder.mkdir()
    for name in (*expected, "agreement.py"):
        (folder / name).write_text("from .geometry import a_name_of_0_1\n")
    saved().save_pretrained(folder)
    for name, content in expected.items():
        assert (folder / name).read_bytes() == content, name


def test_saved_code_imports_nothing_of_the_package_by_name(tmp_path):
    small_model(MaCoSNetForKeypointMatching).save_pretrained(tmp_path)
    saved = sorted(path.name for path in tmp_path.glob("*.py"))
    assert saved == [
        "collection.py",
        "common_object.py",
        "configuration_macosnet.py",
        "crops.py",
        "directions.py",
        "drawing.py",
        "encoded_images.py",
        "encoder.py",
        "errors.py",
        "geometry.py",
        "hints.py",
        "image_processing_macosnet.py",
        "images.py",
        "instances.py",
        "mask_sharing.py",
        "matching.py",
        "modeling_macosnet.py",
        "neighbours.py",
        "orientation.py",
        "pipeline_macosnet.py",
        "refinement.py",
        "saving.py",
    ]
    for name in saved:
        lines = (tmp_path / name).read_text().splitlines()
        assert not [line for line in lines if line.startswith(("import macosnet_hf", "from macosnet_hf"))]
