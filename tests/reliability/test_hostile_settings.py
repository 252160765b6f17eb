"""Settings of strangers, in `config.json` and YAML: each is refused by name, at once, or harmless.

The long form is tests/reliability/fuzz.py (`config.json`, `settings` and `YAML`).
"""

import json
import socket
import time
from pathlib import Path

import pytest
from small_models import save_small_checkpoint, small_config

from macosnet_hf import CheckpointError, InputError, MaCoSNetConfig
from macosnet_hf.io.checkpoints import load_model_and_processor
from macosnet_hf.modeling_macosnet import MaCoSNetModel

NAN, INFINITE = float("nan"), float("inf")
# Each was loaded by version 0.1, and failed at the first match, gave points that are no numbers, or took minutes.
HOSTILE = [
    ("local_matching_temperature", NAN),
    ("local_matching_temperature", "hot"),
    ("local_matching_temperature", -1e30),
    ("local_matching_temperature", 0),
    ("local_matching_temperature", None),
    ("tps_regularization", NAN),
    ("tps_regularization", "x"),
    ("tps_regularization", -1),
    ("tps_regularization", INFINITE),
    ("tps_regularization", True),
    ("match_consistency_sigma", 0),
    ("match_consistency_sigma", "x"),
    ("match_consistency_sigma", 1e-300),
    ("match_mask_threshold", None),
    ("match_mask_threshold", NAN),
    ("match_mask_threshold", "0.5"),
    ("local_matching", "no"),
    ("local_matching", 1),
    ("mutual_fit", None),
    ("orientations", "both"),
    ("local_matching_windows", [0.3] * 300),
    ("local_matching_windows", [INFINITE, INFINITE]),
    ("local_matching_sigmas", [NAN, 0.1]),
    ("local_matching_sigmas", "0.3"),
    ("local_matching_sigmas", {"0": 0.3}),
    ("image_size", True),
    ("image_size", 16 * 10**6),
    ("image_size", 10**400),
    ("predictor_kernel_sizes", [3.0, 3]),
    ("predictor_channels", [10**9, 12]),
    ("decoder_widths", [12, 10, 8, None]),
    ("fused_weights", [-1.0]),
    ("fused_weights", ["1"]),
    ("fused_strides", 16),
    ("feature_strides", {"16": 1}),
    ("feature_blocks", "012"),
    ("decoder_rounds", 1.5),
    ("decoder_input_width", 10**7),
    ("cascade", ["exact"]),
    ("padding_mode", None),
    ("decoder_inputs", 0),
    ("config_version", "3"),
    ("config_version", -1),
    # Of transformers itself: a name for each label took all memory, owner/name fetches code where `kernels` is.
    ("num_labels", 10**9),
    ("num_labels", -5),
    ("attn_implementation", "owner/kernel"),
    ("_attn_implementation", "owner/kernel:run"),
    ("attn_implementation", {"backbone_config": "owner/kernel"}),
    ("attn_implementation", 3),
    ("return_dict", False),
    ("quantization_config", {"quant_method": "fp8"}),
]
BACKBONES = {
    "backbone": {"model_type": "timm_backbone", "backbone": "hf-hub:owner/name"},
    "local-dir": {"model_type": "timm_backbone", "backbone": "local-dir:/etc"},
    "plain name": {"model_type": "timm_backbone", "backbone": "owner/name"},
    "None": {"model_type": "timm_backbone", "backbone": None},
    "model_type": {"model_type": ["resnet"]},
    "depths": {"model_type": "resnet", "depths": [10**6, 1, 1, 1]},
    "hidden_sizes": {"model_type": "resnet", "hidden_sizes": [8, 8, 8, 10**12]},
    "embedding_size": {"model_type": "resnet", "embedding_size": NAN},
    "layer_type": {"model_type": "resnet", "layer_type": "none"},
    "hidden_act": {"model_type": "resnet", "hidden_act": 3},
    "num_labels": {"model_type": "resnet", "num_labels": 10**9},
    "attn_implementation": {"model_type": "dinov2", "attn_implementation": "owner/kernel"},
    "return_dict": {"model_type": "resnet", "return_dict": False},
    "layer_norm_eps": {"model_type": "dinov2", "layer_norm_eps": -1.0},
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return save_small_checkpoint(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def checkpoint(sound, tmp_path):
    """A folder with the small network, whose files may be changed."""
    for path in sound.iterdir():
        if path.suffix in (".json", ".safetensors"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def change(folder: Path, **settings) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize(("name", "value"), HOSTILE, ids=lambda part: repr(part)[:20])
def test_a_hostile_setting_is_refused_by_name(checkpoint, name, value):
    with pytest.raises(InputError, match=rf"{name}\b.*(takes|version)"):
        small_config(**{name: value})
    change(checkpoint, **{name: value})
    began = time.process_time()
    with pytest.raises(CheckpointError, match=name if name != "config_version" else "version"):
        load_model_and_processor(checkpoint, "cpu")
    assert time.process_time() - began < 1


@pytest.mark.parametrize("word", BACKBONES)
def test_a_hostile_backbone_is_refused_by_name(checkpoint, word, monkeypatch):
    def no_network(*_):
        raise AssertionError("another repository was asked")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    with pytest.raises(InputError, match=f"backbone_config.*{word}"):
        MaCoSNetConfig(backbone_config=BACKBONES[word])
    change(checkpoint, backbone_config=BACKBONES[word])
    began = time.process_time()
    with pytest.raises(CheckpointError, match=word):
        load_model_and_processor(checkpoint, "cpu")
    assert time.process_time() - began < 1


def test_an_architecture_that_the_installed_timm_does_not_know():
    with pytest.raises(InputError, match=r"knows no architecture 'resnet1010'"):
        MaCoSNetModel(MaCoSNetConfig(backbone_config={"model_type": "timm_backbone", "backbone": "resnet1010"}))


def test_settings_of_transformers_itself(checkpoint):
    with pytest.raises(InputError, match=r"settings dtype cannot be used"):
        MaCoSNetConfig(dtype="float33")
    change(checkpoint, id2label=[1])
    with pytest.raises(CheckpointError, match="id2label"):
        load_model_and_processor(checkpoint, "cpu")


@pytest.mark.parametrize(
    "settings",
    [
        {"fused_weights": [1]},
        {"local_matching_temperature": 60, "tps_regularization": 0},
        {"local_matching_sigmas": (), "local_matching_windows": ()},
        {"match_mask_threshold": 1},
        {"image_size": 1024},
    ],
    ids=str,
)
def test_settings_at_the_ends_of_their_ranges_are_taken(settings):
    config = small_config(**settings)
    assert all(list(getattr(config, name)) == list(value) for name, value in settings.items() if type(value) is tuple)
    assert MaCoSNetConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


# ---------------------------------------------------------------------------------------------------------------------
# YAML
# ---------------------------------------------------------------------------------------------------------------------

_BOMB = "\n".join(["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10))])
YAML = {
    "aliases": (f"{_BOMB}\nexclude_classes: *a9\n", "aliases are not read here"),
    "an alias to itself": ("exclude_classes: &a [*a]\n", "aliases are not read here"),
    "a merged alias": ("a: &a {seed: 1}\n<<: *a\n", "aliases are not read here"),
    "lists in lists": ("exclude_classes: " + "[" * 10_000, "too many levels"),
    "closed lists in lists": ("exclude_classes: " + "[" * 10_000 + "]" * 10_000, "too many levels"),
    "mappings in mappings": ("seed: " + "{a: " * 10_000, "too many levels"),
    "sequences in lines": ("seed:\n" + "".join(" " * n + "-\n" for n in range(1, 300)), "too many levels"),
    "keys of keys": ("? " * 10_000, "too many levels"),
    "an integer of 5,000 digits": ("seed: " + "9" * 5000, "cannot be read"),
    "a hexadecimal one": ("seed: 0x" + "f" * 5000, "the number is too large"),
    "one of base 60": ("seed: 1" + ":59" * 3000, "cannot be read|the number is too large"),
    "a million of characters": ("a" * 1_000_000, "longer than 64000 characters"),
    "many keys": ("".join(f"k{n}: 1\n" for n in range(6000)), "unknown key"),
    "no date": ("seed: 2001-99-99", "cannot be read"),
    "no number": ("seed: 1e99999", "takes a whole number"),
    "a key that is no text": ("? [seed]\n: 1", "cannot be read"),
    "an object": ("seed: !!python/object/apply:os.system [true]", "cannot be read"),
    "bytes": ("seed: !!binary ////", "takes a whole number"),
    "a tag that does not fit": ("seed: !!int {a: 1}", "cannot be read"),
    "a float that is none": ("learning_rate: !!float x", "cannot be read"),
    "no number for a rate": ("learning_rate: .nan", "learning_rate"),
    "without end": ("learning_rate: .inf", "learning_rate"),
}


@pytest.mark.parametrize("kind", YAML)
def test_hostile_yaml_is_refused_in_a_sentence_within_a_second(tmp_path, kind):
    pytest.importorskip("accelerate", reason="accelerate is not installed (extra `train`)")
    settings = pytest.importorskip("macosnet_hf.training.settings", reason="PyYAML is not installed (extra `train`)")
    text, words = YAML[kind]
    path = tmp_path / "hostile.yaml"
    path.write_text(text)
    required = {"dataset_name": ["d"], "model_name_or_path": "m", "output_dir": "o"}
    began = time.process_time()
    with pytest.raises(InputError, match=words) as caught:
        settings.read_settings(settings.JointSettings, path, **required)
    assert time.process_time() - began < 1
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2000
