"""Every fault of a checkpoint ends in one sentence that names what to mend."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from macosnet_hf import DEFAULT_CHECKPOINT, CheckpointError, InputError
from macosnet_hf.io.checkpoints import check_checkpoint, load_model_and_processor, pick_device

FILES = ("config.json", "preprocessor_config.json", "model.safetensors")


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the embedded checkpoint that a test may damage."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in FILES:
        shutil.copy(os.path.join(DEFAULT_CHECKPOINT, name), folder)
    return folder


def change(path, **settings):
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def change_weights(folder, function):
    weights = load_file(folder / "model.safetensors")
    function(weights, "macosnet.affine_head.linear.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_embedded_checkpoint_comes_ready_to_run():
    model, processor = load_model_and_processor(device="cpu")
    assert not model.training
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert processor.size["height"] == processor.size["width"] == model.config.image_size


def test_a_folder_without_the_python_files_is_enough(checkpoint):
    ours, _ = load_model_and_processor(checkpoint, torch.device("cpu"))
    embedded, _ = load_model_and_processor(device="cpu")
    for (name, weight), (_, other) in zip(ours.state_dict().items(), embedded.state_dict().items(), strict=True):
        assert torch.equal(weight, other), name


# What can be seen before torch is imported: `(what to do to the folder, words of the sentence)`.
LIGHT_FAULTS = {
    "no config": (lambda d: (d / "config.json").unlink(), r"has no config\.json"),
    "no processor": (lambda d: (d / "preprocessor_config.json").unlink(), r"has no preprocessor_config\.json"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), r"has no model\.safetensors"),
    "bad JSON": (lambda d: (d / "config.json").write_text("{"), r"config\.json is damaged"),
    "JSON of another shape": (lambda d: (d / "config.json").write_text("[1]"), r"config\.json is damaged"),
    "bytes for JSON": (
        lambda d: (d / "preprocessor_config.json").write_bytes(b"\xff\xfe\0"),
        r"config\.json is damaged",
    ),
    "another model": (lambda d: change(d / "config.json", model_type="bert"), "holds a bert model"),
    "truncated weights": (lambda d: os.truncate(d / "model.safetensors", 100_000), "damaged or cut off"),
    "truncated header": (lambda d: os.truncate(d / "model.safetensors", 100), "damaged or cut off"),
    "empty weights": (lambda d: os.truncate(d / "model.safetensors", 0), "damaged or cut off"),
    "text for weights": (lambda d: (d / "model.safetensors").write_text("x" * 100_000), "damaged or cut off"),
    "pickle under the name": (lambda d: torch.save({"a": torch.ones(3)}, d / "model.safetensors"), "is a pickle"),
    "old pickle under the name": (
        lambda d: torch.save({"a": torch.ones(3)}, d / "model.safetensors", _use_new_zipfile_serialization=False),
        "is a pickle",
    ),
    "pickle beside": (
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        r"pytorch_model\.bin is a pickle",
    ),
    "missing shard": (
        lambda d: (
            (d / "model.safetensors").unlink(),
            (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1-of-1.safetensors"}}'),
        ),
        r"has no model-1-of-1\.safetensors",
    ),
    "a shard elsewhere": (
        lambda d: (
            (d / "model.safetensors").rename(d.parent / "elsewhere.safetensors"),
            (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}'),
        ),
        "is no file beside it",
    ),
    "a shard with a name that no file has": (
        lambda d: (
            (d / "model.safetensors").unlink(),
            (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "' + "x" * 300 + '"}}'),
        ),
        r"has no x+\.",
    ),
    "index of another shape": (
        lambda d: (
            (d / "model.safetensors").unlink(),
            (d / "model.safetensors.index.json").write_text('{"weight_map": [1]}'),
        ),
        "names no weights",
    ),
}


@pytest.mark.parametrize("fault", LIGHT_FAULTS)
def test_faults_that_show_at_once(checkpoint, fault):
    damage, words = LIGHT_FAULTS[fault]
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=words) as caught:
        check_checkpoint(checkpoint)
    assert str(checkpoint) in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=words):
        load_model_and_processor(checkpoint)


def pop(weights, key):
    del weights[key]


def shrink(weights, key):
    weights[key] = weights[key][:3].clone()


def break_numbers(weights, key):
    weights[key][0, 0] = float("nan")


DEEP_FAULTS = {
    "image_size is no number": (lambda d: change(d / "config.json", image_size="big"), "image_size"),
    "unknown encoder": (lambda d: change(d / "config.json", backbone_config={"model_type": "nosuch"}), "nosuch"),
    "another image_size": (lambda d: change(d / "config.json", image_size=320), "have another shape for"),
    "a later version": (lambda d: change(d / "config.json", config_version=4), "version 4, but only versions up to 3"),
    "other widths": (lambda d: change(d / "config.json", decoder_widths=[8, 8, 8, 8]), "have another shape for"),
    "a weight is missing": (lambda d: change_weights(d, pop), r"lack macosnet\.affine_head\.linear\.weight"),
    "a weight of another shape": (
        lambda d: change_weights(d, shrink),
        r"another shape for macosnet\.affine_head\.linear\.weight:",
    ),
    "a weight is not finite": (lambda d: change_weights(d, break_numbers), "not finite"),
    "another size of images": (
        lambda d: change(d / "preprocessor_config.json", size={"height": 64, "width": 96}),
        "96x64 pixels, but its model takes",
    ),
    "images that no memory holds": (
        lambda d: change(d / "preprocessor_config.json", size={"height": 100_000, "width": 100_000}),
        "100000x100000 pixels, but the model takes 240x240",
    ),
    "size is no size": (lambda d: change(d / "preprocessor_config.json", size="big"), "cannot be used"),
    "mean of two channels": (lambda d: change(d / "preprocessor_config.json", image_mean=[0.5, 0.5]), "cannot be used"),
    "deviation of zero": (
        lambda d: change(d / "preprocessor_config.json", image_std=[0, 0, 0]),
        "image_std must be above 0",
    ),
}


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("fault", DEEP_FAULTS)
def test_faults_that_show_on_loading(checkpoint, fault, capfd):
    damage, words = DEEP_FAULTS[fault]
    damage(checkpoint)
    check_checkpoint(checkpoint)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_model_and_processor(checkpoint)
    assert str(checkpoint) in str(caught.value)
    assert "\n" not in str(caught.value)
    output = capfd.readouterr()
    assert output.out + output.err == ""  # no load report of transformers beside the sentence


@pytest.mark.parametrize("name", ["", "./nowhere", "/no/where", "~/nowhere", "C:\\nowhere", "one/two/three"])
def test_a_folder_that_is_not_there(name):
    with pytest.raises(CheckpointError, match="There is no checkpoint folder"):
        check_checkpoint(name)


def test_a_file_is_no_checkpoint(checkpoint):
    with pytest.raises(CheckpointError, match="is a file"):
        load_model_and_processor(checkpoint / "model.safetensors")


def test_a_hub_id_that_cannot_be_had():
    check_checkpoint("someone/macosnet-that-is-not-there")
    with pytest.raises(CheckpointError, match="could not be had from the Hub") as caught:
        load_model_and_processor("someone/macosnet-that-is-not-there")
    assert "\n" not in str(caught.value)


def test_python_files_of_a_checkpoint_do_not_run(checkpoint, tmp_path):
    witness = tmp_path / "witness"
    for module in ("configuration_macosnet", "modeling_macosnet", "image_processing_macosnet"):
        (checkpoint / f"{module}.py").write_text(f"open({str(witness)!r}, 'w').close()\n")
    load_model_and_processor(checkpoint)
    assert not witness.exists()


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(InputError, match="no device called 'gpu'"):
        pick_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no CUDA device"):
            load_model_and_processor(device="cuda")


def test_verbosity_and_progress_bars_of_transformers_stay_as_they_were(checkpoint):
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_model_and_processor()
    change(checkpoint / "config.json", image_size=320)
    with pytest.raises(CheckpointError):
        load_model_and_processor(checkpoint)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (verbosity, bars)


def test_the_quick_check_does_not_import_torch():
    script = (
        "import sys; from macosnet_hf import DEFAULT_CHECKPOINT;"
        "from macosnet_hf.io.checkpoints import check_checkpoint;"
        "check_checkpoint(DEFAULT_CHECKPOINT); assert 'safetensors' in sys.modules; assert 'torch' not in sys.modules"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", script], check=True, cwd=root)
