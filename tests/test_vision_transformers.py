"""Encoders that are vision transformers: one map, of patches that need not be of 16 pixels."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from small_models import small_model, small_processor
from transformers import AutoModel

from macosnet_hf import CheckpointError, InputError, MaCoSNetConfig, MaCoSNetForKeypointMatching
from macosnet_hf.io.checkpoints import load_model_and_processor
from macosnet_hf.training.encoder_weights import load_imagenet_encoder

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "out_indices": [2]}
KINDS = {
    "dinov2": {"model_type": "dinov2", "patch_size": 14, "mlp_ratio": 2, **SMALL},
    "dinov3": {"model_type": "dinov3_vit", "intermediate_size": 32, "num_register_tokens": 2, **SMALL},
}


def model_of(kind, **settings):
    return small_model(
        MaCoSNetForKeypointMatching, backbone_config=KINDS[kind], feature_strides=[16], **settings
    ).eval()


@pytest.mark.parametrize(("preset", "patch"), [("dinov2-small", 14), ("dinov3-small", 16)])
def test_presets_give_one_cell_a_patch(preset, patch):
    torch.manual_seed(0)
    model = MaCoSNetForKeypointMatching(MaCoSNetConfig.from_preset(preset)).eval()
    encoder = model.macosnet.encoder
    assert encoder.patch_size == patch
    assert encoder.feature_channels == 384
    assert sum(each.numel() for each in encoder.parameters()) == pytest.approx(21.6e6, rel=0.03)
    with torch.no_grad():
        outputs = model(torch.randn(1, 2, 3, 336, 336))
    assert outputs.features.shape == (1, 2, 384, 21, 21)
    assert outputs.mask_logits.shape == (1, 2, 336, 336)


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_the_backbone(kind):
    model = model_of(kind)
    side = model.config.image_size
    images = torch.rand(2, 3, side, side)
    patches = side // 16 * model.macosnet.encoder.patch_size
    with torch.no_grad():
        found = model.macosnet.get_image_features(images)
        resized = F.interpolate(images, size=(patches, patches), mode="bicubic", antialias=True)
        (expected,) = model.macosnet.encoder.backbone(resized).feature_maps
    torch.testing.assert_close(found.last, expected)
    assert found.skips == ()
    assert found.last.shape[-1] == side // 16


@pytest.mark.parametrize("kind", KINDS)
def test_models_are_saved_loaded_and_trained(kind, tmp_path):
    model = model_of(kind)
    side = model.config.image_size
    images = torch.rand(1, 2, 3, side, side)
    model.save_pretrained(tmp_path)
    loaded = MaCoSNetForKeypointMatching.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected, found = model(images), loaded(images)
        half = model_of(kind).to(torch.bfloat16)(images.to(torch.bfloat16))
    small_processor().save_pretrained(tmp_path)
    by_name, _ = load_model_and_processor(str(tmp_path), "cpu")
    assert by_name.state_dict().keys() == load_file(tmp_path / "model.safetensors").keys()
    for name in ("affine", "tps", "mask_logits", "features"):
        assert torch.equal(found[name], expected[name]), name
        assert half[name].isfinite().all(), name
    loaded.train()
    outputs = loaded(images)
    (outputs.affine.sum() + outputs.mask_logits.sum()).backward()
    gradients = [each.grad for each in loaded.macosnet.encoder.parameters() if each.grad is not None]
    assert sum(gradient.abs().sum() for gradient in gradients) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_pretrained_weights_of_a_folder(kind, tmp_path):
    """Of a plain model of transformers, as the Hub has it, that knows nothing of stages."""
    source, model = model_of(kind), model_of(kind)
    config = source.config.backbone_config
    torch.manual_seed(5)
    whole = AutoModel.from_config(config).eval()
    whole.save_pretrained(tmp_path / "encoder")
    load_imagenet_encoder(model, str(tmp_path / "encoder"))
    side = model.config.image_size
    images = torch.rand(1, 3, side, side)
    patches = side // 16 * model.macosnet.encoder.patch_size
    with torch.no_grad():
        found = model.macosnet.get_image_features(images).last
        resized = F.interpolate(images, size=(patches, patches), mode="bicubic", antialias=True)
        tokens = whole(resized).last_hidden_state[:, -((side // 16) ** 2) :]
    torch.testing.assert_close(found.flatten(2).transpose(1, 2), tokens, atol=1e-5, rtol=1e-4)


def save_encoder(model, folder, weights=None):
    """Writes an untrained encoder of the kind and size of a model's as a plain model of transformers."""
    AutoModel.from_config(model.config.backbone_config).save_pretrained(folder)
    if weights is not None:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_weights_that_do_not_fit_or_cannot_be_had(tmp_path):
    other = small_model(
        MaCoSNetForKeypointMatching,
        backbone_config={**KINDS["dinov2"], "hidden_size": 32},
        feature_strides=[16],
    )
    AutoModel.from_config(other.config.backbone_config).save_pretrained(tmp_path / "wide")
    with pytest.raises(CheckpointError, match="wide"):
        load_imagenet_encoder(model_of("dinov2"), str(tmp_path / "wide"))
    with pytest.raises(CheckpointError, match="nowhere/at-all, the encoder, could not be fetched"):
        load_imagenet_encoder(model_of("dinov3"), "nowhere/at-all")
    model = model_of("dinov2")
    weights = AutoModel.from_config(model.config.backbone_config).state_dict()
    save_encoder(model, tmp_path / "pickle")
    (tmp_path / "pickle" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pickle" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickle, the encoder, could not be fetched: .*model\.safetensors"):
        load_imagenet_encoder(model, str(tmp_path / "pickle"))
    save_encoder(model, tmp_path / "nan", {name: value * float("nan") for name, value in weights.items()})
    with pytest.raises(CheckpointError, match=r"nan, the encoder, are damaged: .* holds values that are not finite"):
        load_imagenet_encoder(model, str(tmp_path / "nan"))
    assert all(value.isfinite().all() for value in model.state_dict().values())
    lite = MaCoSNetForKeypointMatching(MaCoSNetConfig.from_preset("lite"))
    with pytest.raises(InputError, match="leave out the name of an encoder"):
        load_imagenet_encoder(lite, str(tmp_path / "wide"))
