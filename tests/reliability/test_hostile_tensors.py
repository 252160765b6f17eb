"""Weights of strangers are judged before they are touched: each is refused by name, at once, in little memory.

The long form is tests/reliability/fuzz.py (`hostile tensors`).
"""

import io
import json
import re
import resource
import struct
import time
import zipfile
from collections.abc import Callable

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_models import save_small_checkpoint

from macosnet_hf import CheckpointError, MaCoSNetConfig, MaCoSNetForKeypointMatching
from macosnet_hf.collection import Collection
from macosnet_hf.conversion.published import convert, original_state_dict
from macosnet_hf.inference.pair import match_images
from macosnet_hf.io.checkpoints import load_model_and_processor

WEIGHT = "FeatureExtraction.model.0.weight"  # (64, 3, 7, 7)
BIAS = "FeatureRegression.linear.bias"  # (6,)
VARIANCES = "FeatureExtraction.model.1.running_var"  # (64,)
Change = Callable[[torch.Tensor], object]

HOSTILE: dict[str, tuple[str, Change, str]] = {
    "stride 0": (WEIGHT, lambda _: torch.zeros(1).expand(60_000, 60_000), r"shape \(60000, 60000\), but .* 4 bytes"),
    "stride 0, right shape": (WEIGHT, lambda w: torch.zeros(1).expand(w.shape), "holds 4 bytes for it"),
    "overlapping windows": (WEIGHT, lambda _: torch.zeros(70_000).as_strided((60_000, 9_000), (1, 1)), "but the file"),
    "another shape": (WEIGHT, lambda w: w[:3].clone(), r"another shape \(\(3, 3, 7, 7\), not \(64, 3, 7, 7\)\)"),
    "no dimension": (BIAS, lambda _: torch.tensor(1.0), r"another shape \(\(\), not \(6,\)\)"),
    "meta": (WEIGHT, lambda w: torch.empty_like(w, device="meta"), "has no values"),
    "huge meta": (WEIGHT, lambda _: torch.empty(10**6, 10**6, device="meta"), "has no values"),
    "sparse": (WEIGHT, lambda w: w.to_sparse(), "is a sparse tensor"),
    "compressed rows": (BIAS, lambda _: torch.eye(6).to_sparse_csr(), "is a sparse tensor"),
    "quantised": (BIAS, lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "is a quantised tensor"),
    "nested": (BIAS, lambda w: torch.nested.nested_tensor([w, w]), "is a nested tensor"),
    "1e300": (BIAS, lambda w: torch.full_like(w, 1e300, dtype=torch.float64), "not finite"),
    "NaN": (BIAS, lambda w: torch.full_like(w, float("nan")), "not finite"),
    "complex": (WEIGHT, lambda w: w.to(torch.complex64), "holds complex64, not floating-point"),
    "bool": (WEIGHT, lambda w: w > 0, "holds bool, not floating-point"),
    "int8": (WEIGHT, lambda w: w.to(torch.int8), "holds int8, not floating-point"),
    "negative variances": (VARIANCES, lambda w: -w, "negative variances"),
    "counter of fractions": (
        "FeatureExtraction.model.1.num_batches_tracked",
        lambda w: w.float() + 0.5,
        "holds float32, not int64",
    ),
    "Decoder's": ("Decoder.x", lambda _: torch.zeros(1).expand(60_000, 60_000), "but the file"),
}


@pytest.fixture(scope="module")
def published():
    """A whole published state dict, as `convert` takes it."""
    torch.manual_seed(0)
    return original_state_dict(MaCoSNetForKeypointMatching(MaCoSNetConfig.from_preset("paper")))


def small(state: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """The weights around one of them: what is refused needs no others, and a test no 100 MB."""
    return {key: value for key, value in state.items() if key == name or key.endswith(("bias", "running_mean"))}


# These show in the whole model only.
NEEDS_ALL = ("stride 0, right shape", "another shape", "no dimension", "1e300", "NaN", "negative variances")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("kind", "older_format"),
    # torch's older format names a storage by its address: those of a nested tensor, made on the way, may share one.
    [(kind, older) for kind in HOSTILE for older in (False, True) if not (older and kind in (*NEEDS_ALL, "nested"))],
)
def test_a_hostile_tensor_is_refused_by_name_before_it_is_copied(published, tmp_path, kind, older_format):
    name, change, words = HOSTILE[kind]
    state = dict(published) if kind in NEEDS_ALL else small(published, name)
    state[name] = change(state.get(name))
    path = tmp_path / "hostile.pth.tar"
    torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=not older_format)
    assert kind in NEEDS_ALL or path.stat().st_size < 2_000_000
    before, began = _most_memory(), time.process_time()
    with pytest.raises(CheckpointError, match=re.escape(name)) as caught:
        convert(path)
    spent = time.process_time() - began
    assert re.search(words, str(caught.value))
    assert str(path) in str(caught.value)
    assert kind in NEEDS_ALL or spent < 1
    assert _most_memory() - before < 1000


def test_a_number_for_the_bias_of_a_single_head_is_refused(published, tmp_path):
    """A file of one stage is told by the length of this bias, and a number has none."""
    path = tmp_path / "hostile.pth.tar"
    state = {name: value for name, value in published.items() if not name.startswith("FeatureRegression2.")}
    torch.save({"state_dict": {**state, BIAS: torch.tensor(1.0)}}, path)
    with pytest.raises(CheckpointError, match=re.escape(BIAS)):
        convert(path)


def test_sound_weights_of_other_kinds_are_taken(published, tmp_path):
    """Views into a larger storage, other strides and other precisions are no attack."""
    state = dict(published)
    weight = state[WEIGHT]
    state[WEIGHT] = torch.cat([weight, weight])[: len(weight)]
    linear = "FeatureRegression.linear.weight"
    state[linear] = state[linear].t().contiguous().t()
    state[BIAS] = state[BIAS].double()
    state[VARIANCES] = state[VARIANCES].half()
    torch.save(state, tmp_path / "sound.pth.tar")
    found = original_state_dict(convert(tmp_path / "sound.pth.tar").model)
    for name in (WEIGHT, linear, BIAS, VARIANCES):
        torch.testing.assert_close(found[name], published[name], atol=1e-3, rtol=1e-3)


def test_a_compressed_archive_is_refused_by_its_size(tmp_path):
    path = tmp_path / "small.pth.tar"
    stream = io.BytesIO()
    torch.save({WEIGHT: torch.zeros(50_000_000)}, stream)
    with zipfile.ZipFile(stream) as archive, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for member in archive.infolist():
            packed.writestr(member.filename, archive.read(member))
    assert path.stat().st_size < 300_000
    began = time.process_time()
    with pytest.raises(CheckpointError, match=r"members would take 2\d{8} bytes, more than the file's"):
        convert(path)
    assert time.process_time() - began < 1


def test_an_archive_that_counts_its_bytes_twice_is_refused(tmp_path):
    """Many names for the same bytes: one directory entry each."""
    path = tmp_path / "twice.pth.tar"
    stream = io.BytesIO()
    torch.save({"a": torch.zeros(100_000)}, stream)
    with zipfile.ZipFile(stream, "a") as archive:
        member = max(archive.infolist(), key=lambda info: info.file_size)
        archive.filelist += [member] * 50
        archive._didModify = True
    path.write_bytes(stream.getvalue())
    with pytest.raises(CheckpointError, match="members would take 2"):
        convert(path)


def test_a_number_in_numpys_pickle_cannot_ask_for_gigabytes(tmp_path):
    """`numpy.core.multiarray.scalar` of a type without a value is as many zeros as the type says."""
    body = b"\x80\x02}X\x04\x00\x00\x00losscnumpy.core.multiarray\nscalar\n"
    body += b"cnumpy\ndtype\nX\x0b\x00\x00\x00V2000000000\x89\x88\x87R\x85Rs."
    path = tmp_path / "number.pth.tar"
    stream = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, stream)
    with zipfile.ZipFile(stream) as archive, zipfile.ZipFile(path, "w") as changed:
        for member in archive.infolist():
            content = body if member.filename.endswith("data.pkl") else archive.read(member)
            changed.writestr(member.filename, content)
    before = _most_memory()
    with pytest.raises(CheckpointError, match="pickle of something else"):
        convert(path)
    assert _most_memory() - before < 500


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoint folders
# ---------------------------------------------------------------------------------------------------------------------

FOLDERS: dict[str, tuple[str, Change, str]] = {
    "another shape": ("macosnet.affine_head.linear.bias", lambda w: w[:3].clone(), "have another shape for"),
    "int8": ("macosnet.affine_head.linear.bias", lambda w: w.to(torch.int8), "hold no floating-point numbers in"),
    "bool": ("macosnet.affine_head.linear.bias", lambda w: w > 0, "hold no floating-point numbers in"),
    "8 bits": ("macosnet.affine_head.linear.bias", lambda w: w.to(torch.float8_e4m3fn), "hold no floating-point"),
    "1e300": ("macosnet.affine_head.linear.bias", lambda w: torch.full_like(w, 1e300, dtype=torch.float64), "finite"),
    "negative variances": ("macosnet.affine_head.conv.1.running_var", lambda w: -w - 1, "holds negative variances"),
}


@pytest.fixture
def checkpoint(tmp_path):
    return save_small_checkpoint(tmp_path / "checkpoint")


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_hostile_weight_of_a_folder_is_refused_by_name(checkpoint, kind):
    name, change, words = FOLDERS[kind]
    weights = load_file(checkpoint / "model.safetensors")
    weights[name] = change(weights[name])
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    began = time.process_time()
    with pytest.raises(CheckpointError, match=words) as caught:
        load_model_and_processor(checkpoint, "cpu")
    assert name in str(caught.value)
    assert time.process_time() - began < 1


def test_a_configuration_cannot_ask_for_more_memory_than_the_weights_have(checkpoint):
    """What the files lacked was filled with random numbers, of any size, before it was refused."""
    path = checkpoint / "config.json"
    settings = json.loads(path.read_text())
    settings["backbone_config"]["hidden_sizes"] = [8, 12, 20_000, 20_000]
    path.write_text(json.dumps(settings))
    before, began = _most_memory(), time.process_time()
    with pytest.raises(CheckpointError, match="have another shape for"):
        load_model_and_processor(checkpoint, "cpu")
    assert time.process_time() - began < 1
    assert _most_memory() - before < 200


def test_weights_whose_answers_are_no_numbers_give_no_masks(checkpoint):
    """Each value is finite; what the network makes of them is not, and would be an empty mask."""
    weights = load_file(checkpoint / "model.safetensors")
    large = {name: value * 1e30 if value.ndim > 1 else value for name, value in weights.items()}
    save_file(large, checkpoint / "model.safetensors", {"format": "pt"})
    model, processor = load_model_and_processor(checkpoint, "cpu")
    images = [Image.effect_noise((80, 60), 40).convert("RGB") for _ in range(2)]
    with pytest.raises(CheckpointError, match="answers are no finite numbers"):
        match_images(images, model=model, processor=processor)
    collection = Collection(model, processor)
    collection.add(images)
    with pytest.raises(CheckpointError, match="answers are no finite numbers"):
        collection.segment(refine="none")


def test_weights_of_half_precision_and_of_the_base_model_are_taken(checkpoint, tmp_path):
    weights = load_file(checkpoint / "model.safetensors")
    half = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
    save_file(half, checkpoint / "model.safetensors", {"format": "pt"})
    model, processor = load_model_and_processor(checkpoint, "cpu")
    model.macosnet.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    header = (tmp_path / "base" / "model.safetensors").read_bytes()
    names = json.loads(header[8 : 8 + struct.unpack("<Q", header[:8])[0]])
    assert "affine_head.linear.bias" in names
    again, _ = load_model_and_processor(tmp_path / "base", "cpu")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def _most_memory() -> float:
    """Megabytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
