"""Batch norms folded for inference: the same values, and the model's own modules wherever a copy would not do."""

import copy
import pickle

import pytest
import torch
from small_models import FUSED, random_images, save_small_checkpoint, small_model
from torch import nn

from macosnet_hf import MaCoSNetForKeypointMatching
from macosnet_hf.io import folding
from macosnet_hf.io.checkpoints import load_model_and_processor
from macosnet_hf.io.folding import fold_batch_norms, folded_copy


def _pair(**kwargs):
    plain = small_model(MaCoSNetForKeypointMatching, **kwargs)
    folded = copy.deepcopy(plain)
    fold_batch_norms(folded.macosnet)
    return plain, folded


@pytest.fixture
def folds(monkeypatch):
    """How often a copy is made."""
    made = []
    monkeypatch.setattr(folding, "folded_copy", lambda module: made.append(module) or folded_copy(module))
    return made


@pytest.mark.parametrize("settings", [{}, FUSED, {"decoder_inputs": "common"}], ids=["paper", "fused", "common"])
def test_outputs_are_those_of_the_model(settings, folds):
    plain, folded = _pair(**settings)
    pixels = random_images(2, 2)
    with torch.inference_mode():
        expected, found, again = plain(pixels), folded(pixels), folded(pixels)
    assert len(folds) == 4  # backbone, decoder and two heads, once each
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    made = [part.forward._made[1] for part in folds]
    assert sum(isinstance(module, nn.BatchNorm2d) for part in made for module in part.modules()) <= norms // 4
    for name in expected:
        assert torch.allclose(found[name].float(), expected[name].float(), atol=1e-4), name
        assert torch.equal(found[name], again[name]), name


def test_gradients_training_and_half_precision_do_without(folds):
    plain, folded = _pair()
    pixels = random_images(1, 2)
    found, expected = folded(pixels), plain(pixels)
    assert torch.equal(found.mask_logits, expected.mask_logits)
    found.mask_logits.sum().backward()
    assert all(weight.grad is not None for weight in folded.macosnet.decoder.parameters())
    with torch.no_grad():
        folded.train()(pixels)
        folded.eval().to(torch.bfloat16)(pixels.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            folded.float()(pixels)
    assert not folds


def test_copies_follow_weights_and_statistics():
    plain, folded = _pair()
    pixels = random_images(1, 2)
    with torch.no_grad():
        before = folded(pixels).mask_logits
        for model in (plain, folded):
            model.macosnet.decoder.blocks[0].conv1.weight.mul_(1.5)
            model.macosnet.decoder.blocks[1].norm2.running_mean.add_(0.3)
        found, expected = folded(pixels).mask_logits, plain(pixels).mask_logits
        assert torch.allclose(found, expected, atol=1e-4)
        assert not torch.allclose(found, before, atol=1e-3)
        other = small_model(MaCoSNetForKeypointMatching, seed=3)
        folded.load_state_dict(other.state_dict())
        assert torch.allclose(folded(pixels).mask_logits, other(pixels).mask_logits, atol=1e-4)


def test_copies_of_the_model_are_their_own(folds):
    _, folded = _pair()
    pixels = random_images(1, 2)
    with torch.no_grad():
        expected = folded(pixels).mask_logits
        other, unpickled = copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))
        for weight in other.parameters():
            weight.zero_()
        assert torch.equal(folded(pixels).mask_logits, expected)
        assert torch.equal(unpickled(pixels).mask_logits, expected)
        assert other(pixels).mask_logits.abs().max() == 0
    assert other.state_dict().keys() == folded.state_dict().keys()


class _Backwards(nn.Module):
    """The batch norm stands behind the convolution but runs before it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        nn.init.normal_(self.norm.weight)
        self.norm.running_mean.normal_()

    def forward(self, images):
        return self.conv(self.norm(images))


def test_what_runs_in_another_order_is_left_alone():
    torch.manual_seed(0)
    module = _Backwards().eval()
    images = torch.rand(2, 3, 8, 8)
    expected = module(images)
    module.forward = folding._FoldedOrPlain(module)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(module(images), expected)


def test_loaded_models_fold_on_a_cpu_and_save_their_own_weights(tmp_path):
    save_small_checkpoint(tmp_path / "first")
    model, processor = load_model_and_processor(tmp_path / "first", "cpu")
    assert isinstance(model.macosnet.decoder.forward, folding._FoldedOrPlain)
    with torch.no_grad():
        expected = model(random_images(1, 2)).tps
    model.save_pretrained(tmp_path / "second")
    processor.save_pretrained(tmp_path / "second")
    again = MaCoSNetForKeypointMatching.from_pretrained(tmp_path / "second").eval()
    with torch.no_grad():
        assert torch.allclose(again(random_images(1, 2)).tps, expected, atol=1e-4)
