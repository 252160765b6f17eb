"""Published checkpoints become ours: the same parameters as an independent copy of the original network."""

import argparse
import io
import json
import os
import pickle
import re
import tarfile
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save
from torch import nn
from torch.nn import functional as F

from macosnet_hf import CheckpointError, InputError, MaCoSNetConfig, MaCoSNetForKeypointMatching
from macosnet_hf.commands.main import main
from macosnet_hf.conversion.published import convert, original_state_dict, read_state_dict
from macosnet_hf.io.checkpoints import load_model_and_processor

# ---- the original network, written from its papers, with nothing of this project -------------------------------------


class FeatureExtraction(nn.Module):
    def __init__(self):
        super().__init__()
        network = torchvision.models.resnet101(weights=None)
        self.model = nn.Sequential(*list(network.children())[:7])  # to layer3

    def forward(self, image):
        return unit(self.model(image))


class FeatureRegression(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(225, 128, 7), nn.BatchNorm2d(128), nn.ReLU(), nn.Conv2d(128, 64, 5), nn.BatchNorm2d(64), nn.ReLU()
        )
        self.linear = nn.Linear(64 * 5 * 5, outputs)

    def forward(self, correlation):
        return self.linear(self.conv(correlation).flatten(1))


class TwoStageNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.FeatureExtraction = FeatureExtraction()
        self.FeatureRegression = FeatureRegression(6)
        self.FeatureRegression2 = FeatureRegression(18)

    def forward(self, source, target):
        """Affine of T_AB, then TPS on the warped source."""
        features = self.FeatureExtraction(target)
        affine = self.FeatureRegression(column_major_correlation(self.FeatureExtraction(source), features))
        grid = F.affine_grid(affine.view(-1, 2, 3), list(source.shape), align_corners=True)
        warped = self.FeatureExtraction(F.grid_sample(source, grid, align_corners=True))
        return affine, self.FeatureRegression2(column_major_correlation(warped, features))


def unit(tensor):
    return tensor / (tensor.pow(2).sum(1, keepdim=True) + 1e-6).sqrt()


def column_major_correlation(source, target):
    """Channel `j * h + i` is the product with the source's row i and column j, written as a loop."""
    batch, _, height, width = source.shape
    channels = torch.empty(batch, height * width, height, width)
    for i in range(height):
        for j in range(width):
            channels[:, j * height + i] = (source[:, :, i, j, None, None] * target).sum(1)
    return unit(channels.relu())


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(4)
    return F.interpolate(torch.randn(2, 3, 12, 12), size=(240, 240), mode="bicubic")


@pytest.fixture(scope="module")
def original(images):
    """Random weights; the statistics are those of the images, or a random network would say the same of all."""
    torch.manual_seed(3)
    network = TwoStageNetwork()
    identity = [torch.tensor([1.0, 0, 0, 0, 1, 0]), torch.tensor([-1.0] * 3 + [0] * 3 + [1] * 3 + [-1, 0, 1] * 3)]
    with torch.no_grad():
        for head, start in zip((network.FeatureRegression, network.FeatureRegression2), identity, strict=True):
            head.linear.weight.normal_(std=0.003)
            head.linear.bias.copy_(start)
        for name, module in network.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
                module.bias.uniform_(-0.3, 0.1)
                # Small residual branches, as in a trained network; otherwise 33 blocks turn rounding into noise.
                module.weight.uniform_(*((0.1, 0.3) if name.endswith("bn3") else (0.7, 1.3)))
        network.train()(images, images.flip(0))
    return network.eval()


@pytest.fixture(scope="module")
def expected(original, images):
    """T_AB and T_BA of the original network: affine `(2, 6)` and tps `(2, 18)`."""
    with torch.inference_mode():
        return original(images, images.flip(0))


def save_checkpoint(state, path, **more):
    torch.save({"epoch": 3, "args": argparse.Namespace(lr=1e-3, model="x"), "state_dict": state, **more}, path)
    return path


def assert_same_parameters(model, images, expected, stages=("affine", "tps")):
    with torch.inference_mode():
        outputs = model(images[None])
    for stage in stages:
        wanted = expected[("affine", "tps").index(stage)]
        assert (outputs[stage][0] - wanted).abs().max() < 1e-4, stage
    return outputs


# ---- what it is for --------------------------------------------------------------------------------------------------


def test_converted_model_gives_the_original_s_parameters(original, images, expected, tmp_path, capsys):
    spread = torch.cat((expected[0][0] - expected[0][1], expected[1][0] - expected[1][1]))
    assert spread.abs().max() > 0.02  # both directions differ, so that a wrong direction or order shows
    state = {f"module.{name}": tensor for name, tensor in original.state_dict().items()}
    path = save_checkpoint(state, tmp_path / "weakalign.pth.tar", best_test_loss=np.float64(0.25), optimizer={"lr": 1})
    assert main(["convert", str(path), str(tmp_path / "ours")]) == 0
    assert "untrained" in capsys.readouterr().out

    model, processor = load_model_and_processor(tmp_path / "ours", "cpu")
    outputs = assert_same_parameters(model, images, expected)
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]
    assert outputs.mask_logits.min() > 5  # the decoder says "object" everywhere
    assert model.config.local_matching is False

    # The permutation of the correlation's channels matters: without it, the parameters are others.
    theirs = original.state_dict()["FeatureRegression.conv.0.weight"]
    with torch.no_grad():
        model.macosnet.affine_head.conv[0].weight.copy_(theirs)
    with pytest.raises(AssertionError):
        assert_same_parameters(model, images, expected)


def test_the_way_back_is_bit_equal(original, tmp_path):
    save_checkpoint(original.state_dict(), tmp_path / "a.pth.tar")
    back = original_state_dict(convert(tmp_path / "a.pth.tar").model)
    theirs = original.state_dict()
    assert list(back) == list(theirs)
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)
    original.load_state_dict(back)  # the original network takes it


def test_affine_and_tps_in_two_files(original, images, expected, tmp_path):
    state = original.state_dict()
    encoder = {name: tensor for name, tensor in state.items() if name.startswith("FeatureExtraction.")}
    old = {  # of a PyTorch that did not count batches, with the encoder's old name
        name.replace("FeatureExtraction.model", "FeatureExtraction.vgg"): tensor
        for name, tensor in encoder.items()
        if not name.endswith("num_batches_tracked")
    }
    affine = {name: tensor for name, tensor in state.items() if name.startswith("FeatureRegression.")}
    tps = {
        name.replace("Regression2", "Regression"): tensor
        for name, tensor in state.items()
        if name.startswith("FeatureRegression2.")
    }
    first = save_checkpoint(OrderedDict({**encoder, **affine}), tmp_path / "affine.pth.tar")
    second = tmp_path / "tps.pth.tar"
    torch.save({**old, **tps}, second, _use_new_zipfile_serialization=False)  # a bare state dict of an old version
    for files in ((first, second), (second, first)):
        assert_same_parameters(convert(*files).model, images, expected)

    alone = convert(first)
    assert any("no thin-plate-spline stage" in note for note in alone.notes)
    outputs = assert_same_parameters(alone.model, images, expected, ["affine"])
    assert torch.allclose(outputs.tps[0, 0], torch.tensor([-1.0] * 3 + [0] * 3 + [1] * 3 + [-1, 0, 1] * 3))

    with pytest.raises(CheckpointError, match=r"same stage as the first file \(FeatureRegression\.conv"):
        convert(first, first)
    encoder["FeatureExtraction.model.0.weight"] = encoder["FeatureExtraction.model.0.weight"] + 1
    with pytest.raises(CheckpointError, match=r"different encoders \(FeatureExtraction\.model\.0\.weight differs"):
        convert(save_checkpoint({**encoder, **affine}, tmp_path / "other.pth.tar"), second)


def test_a_decoder_is_left_out_by_name(original, tmp_path, capsys):
    decoder = {"Decoder.deconv1.weight": torch.zeros(4, 4, 3, 3), "Decoder.bn1.weight": torch.zeros(4)}
    path = save_checkpoint({**original.state_dict(), **decoder}, tmp_path / "macosnet.pth.tar")
    assert main(["convert", str(path), str(tmp_path / "ours")]) == 0
    assert "Left out, because the decoder here has another shape: Decoder.deconv1.weight, Decoder.bn1.weight" in (
        capsys.readouterr().out
    )
    assert sorted(json.loads((tmp_path / "ours" / "config.json").read_text())["predictor_kernel_sizes"]) == [5, 7]


def test_only_the_paper_s_encoder_has_original_names():
    with pytest.raises(InputError, match="resnet101"):
        original_state_dict(MaCoSNetForKeypointMatching(MaCoSNetConfig()))


# ---- what cannot be used ---------------------------------------------------------------------------------------------


def drop(state, *parts):
    return {name: tensor for name, tensor in state.items() if not name.startswith(parts)}


def other_size(state):
    """Images of 320x320: 20x20 channels."""
    return {**state, "FeatureRegression.conv.0.weight": torch.zeros(128, 400, 7, 7)}


FAULTS = {
    "a weight is missing": (
        lambda s: drop(s, "FeatureExtraction.model.6.3.conv2.weight"),
        r"lacks FeatureExtraction\.model\.6\.3\.conv2\.weight",
    ),
    "no heads": (lambda s: drop(s, "FeatureRegression"), r"lacks FeatureRegression\.conv\.0\.weight"),
    "no linear layer": (lambda s: drop(s, "FeatureRegression.linear"), r"FeatureRegression\.linear\.weight"),
    "a ResNet-50": (
        lambda s: drop(s, *(f"FeatureExtraction.model.6.{number}." for number in range(6, 23))),
        r"lacks FeatureExtraction\.model\.6\.10\.bn1\.bias, .* and \d+ more",
    ),
    "more blocks": (
        lambda s: {**s, "FeatureExtraction.model.6.23.conv1.weight": torch.zeros(1)},
        r"has FeatureExtraction\.model\.6\.23\.conv1\.weight too many",
    ),
    "layer4": (
        lambda s: {**s, "FeatureExtraction.model.7.0.conv1.weight": torch.zeros(1)},
        r"no place .*FeatureExtraction\.model\.7\.0\.conv1\.weight",
    ),
    "an unknown weight": (lambda s: {**s, "Surprise.weight": torch.zeros(1)}, r"no place .*Surprise\.weight"),
    "another network": (lambda s: {"layer1.weight": torch.zeros(3)}, r"no CNNGeometric.*layer1\.weight"),
    "another image size": (other_size, r"images of 320x320 .*FeatureRegression\.linear\.weight would have 6400"),
    "no square": (
        lambda s: {**s, "FeatureRegression.conv.0.weight": torch.zeros(128, 226, 7, 7)},
        r"FeatureRegression\.conv\.0\.weight has the shape \(128, 226, 7, 7\)",
    ),
    "another shape": (
        lambda s: {**s, "FeatureExtraction.model.0.weight": torch.zeros(64, 3, 3, 3)},
        r"FeatureExtraction\.model\.0\.weight in another shape \(\(64, 3, 3, 3\), not \(64, 3, 7, 7\)\)",
    ),
    "not finite": (
        lambda s: {**s, "FeatureRegression.linear.bias": torch.full((6,), float("nan"))},
        r"damaged: FeatureRegression\.linear\.bias",
    ),
    "not a tensor": (lambda s: {**s, "step": 3}, "step is no tensor"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_name_the_weights(fault, original, tmp_path, capsys):
    damage, words = FAULTS[fault]
    path = save_checkpoint(damage(original.state_dict()), tmp_path / "bad.pth.tar")
    assert main(["convert", str(path), str(tmp_path / "ours")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("macosnet: ")
    assert "bad.pth.tar" in message
    assert re.search(words, message), message
    assert not (tmp_path / "ours").exists()


class Payload:
    def __init__(self, witness):
        self.witness = str(witness)

    def __reduce__(self):
        return os.system, (f"echo ran > {self.witness}",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain pickle", "in the arguments"])
def test_a_malicious_pickle_never_runs(kind, tmp_path, capsys):
    witness, path = tmp_path / "witness", tmp_path / "evil.pth.tar"
    payload = Payload(witness)
    if kind == "plain pickle":
        path.write_bytes(pickle.dumps({"state_dict": payload}))
    elif kind == "in the arguments":
        torch.save({"args": argparse.Namespace(a=payload), "state_dict": {"a": torch.ones(1)}}, path)
    else:
        torch.save({"state_dict": payload}, path, _use_new_zipfile_serialization=kind == "zip")
    assert main(["convert", str(path), str(tmp_path / "ours")]) == 2
    message = capsys.readouterr().err
    assert "refused" in message or "no PyTorch checkpoint" in message
    assert not witness.exists()
    # The same file does run where nobody is careful, so this test can fail.
    with path.open("rb") as file:
        if kind == "plain pickle":
            pickle.load(file)
        else:
            torch.load(path, weights_only=False)
    assert witness.exists()


def saved(content, **options):
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


def tar_of(content):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        entry = tarfile.TarInfo("storages")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def zip_of(name):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(name, "x")
    return stream.getvalue()


WEIGHTS = {"state_dict": {"a": torch.zeros(300)}}
JUNK = {
    "empty": (b"", "is empty"),
    "text": (b"hello" * 100, "is no PyTorch checkpoint"),
    "image": (b"\x89PNG\r\n\x1a\n" + bytes(50), "is no PyTorch checkpoint"),
    "number": (b"j\x75\x97\x6b\x0a" * 9, "is no PyTorch checkpoint"),  # torch: KeyError(174823285)
    "safetensors": (save({"a": torch.zeros(2)}), "holds safetensors"),
    "tar": (tar_of(b"x"), "is a tar archive"),
    "start of a zip": (b"PK\x03\x04" + bytes(50), "is damaged or cut off"),
    "another zip": (zip_of("a.txt"), "is damaged or cut off"),
    "cut off": (saved(WEIGHTS)[:900], "is damaged or cut off"),
    "cut off, legacy": (saved(WEIGHTS, _use_new_zipfile_serialization=False)[:-9], "is damaged or cut off"),
    "another pickle": (pickle.dumps(174812789), "is refused: it is a pickle of something else"),
    "list": (saved([1, 2]), "holds no state dict"),
    "number of torch": (saved({"step": 1}), "step is no tensor"),
}


@pytest.mark.parametrize("kind", JUNK)
def test_files_that_are_none_are_said_in_plain_words(kind, tmp_path, capsys):
    content, words = JUNK[kind]
    path = tmp_path / "junk.pth.tar"
    path.write_bytes(content)
    assert main(["convert", str(path), str(tmp_path / "ours")]) == 2
    message = capsys.readouterr().err.replace(str(path), "F")
    assert words in message
    assert len(message) < 200
    assert not re.search(r"\(|\d{4}|enforce|miniz|Error", message), message  # nothing of torch's own insides
    assert not (tmp_path / "ours").exists()


def test_paths_that_are_no_file(tmp_path):
    with pytest.raises(CheckpointError, match="There is no checkpoint file"):
        read_state_dict(tmp_path / "nothing.pth.tar")
    with pytest.raises(CheckpointError, match=r"is a folder; give the \.pth\.tar file"):
        read_state_dict(tmp_path)


def test_an_output_folder_that_cannot_be_made(original, tmp_path, capsys):
    path = save_checkpoint(original.state_dict(), tmp_path / "a.pth.tar")
    (tmp_path / "file").write_text("")
    assert main(["convert", str(path), str(tmp_path / "file")]) == 2
    assert "is a file, not a folder" in capsys.readouterr().err
