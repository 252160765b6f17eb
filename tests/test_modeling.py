"""The joint network: shapes, directions, the cascade, point transfer, saving, and what it costs."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from small_models import GRID_SIZE, IMAGE_SIZE, random_images, small_config, small_model
from transformers import AutoBackbone, AutoConfig, ConvNextConfig, Dinov2Config, ResNetConfig, SwinConfig

from macosnet_hf import geometry
from macosnet_hf.configuration_macosnet import MaCoSNetConfig
from macosnet_hf.errors import InputError
from macosnet_hf.matching import cell_products, cell_similarity, correlate, match_locally
from macosnet_hf.modeling_macosnet import (
    MaCoSNetEncoder,
    MaCoSNetForKeypointMatching,
    MaCoSNetModel,
    MaCoSNetModelOutput,
    ordered_pairs,
)

CELLS = GRID_SIZE**2
DENSE_FIELDS = ("affine", "tps", "correlation", "mask_logits", "features")


@pytest.fixture(autouse=True)
def _flush_denormal():
    """Random weights let activations fade into denormal numbers, which are very slow."""
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


def run(model, *arguments, **kwargs):
    with torch.inference_mode():
        return model(*arguments, **kwargs)


def fields(outputs) -> dict[str, torch.Tensor]:
    return {name: outputs[name] for name in DENSE_FIELDS}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], **tolerance):
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


# --- configuration and encoders ---


@pytest.mark.parametrize(
    ("preset", "channels", "millions"),
    [
        ("lite-stride16", (16, 24, 40, 112), 0.70),
        ("vgg16", (128, 256, 512, 512), 14.71),
        ("paper", (64, 256, 512, 1024), 27.5),
    ],
)
def test_presets_build_and_run(preset, channels, millions):
    torch.manual_seed(0)
    model = MaCoSNetModel(MaCoSNetConfig.from_preset(preset, cascade="features")).eval()
    assert model.encoder.channels == channels
    assert model.encoder.strides == (2, 4, 8, 16)
    assert sum(p.numel() for p in model.encoder.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
    outputs = run(model, torch.randn(1, 2, 3, 240, 240))
    assert outputs.affine.shape == (1, 2, 6)
    assert outputs.tps.shape == (1, 2, 18)
    assert outputs.correlation.shape == (1, 2, 225, 15, 15)
    assert outputs.mask_logits.shape == (1, 2, 240, 240)
    assert outputs.features.shape == (1, 2, channels[-1], 15, 15)
    assert all(torch.isfinite(value).all() for value in fields(outputs).values())


@pytest.mark.parametrize(
    ("backbone", "strides"),
    [
        (ConvNextConfig(hidden_sizes=[8, 12, 16, 24], depths=[1] * 4, out_features=["stage2", "stage3"]), [8, 16]),
        (
            Dinov2Config(
                patch_size=16,
                image_size=IMAGE_SIZE,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                out_features=["stage2"],
            ),
            [16],  # a transformer has one scale only: no skip connections
        ),
    ],
)
def test_other_backbones_of_transformers_work(backbone, strides):
    model = MaCoSNetModel(small_config(backbone_config=backbone)).eval()
    assert model.config.feature_strides == strides
    outputs = run(model, random_images(1, 2))
    assert outputs.mask_logits.shape == (1, 2, IMAGE_SIZE, IMAGE_SIZE)
    assert outputs.correlation.shape == (1, 2, CELLS, GRID_SIZE, GRID_SIZE)


def test_the_attention_of_a_transformer_backbone_is_chosen_when_loading(tmp_path):
    backbone = SwinConfig(
        image_size=IMAGE_SIZE,
        embed_dim=16,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 2, 2],
        window_size=3,
        out_features=["stage1", "stage2", "stage3"],
    )
    saved = small_model(MaCoSNetModel, backbone_config=backbone)
    saved.save_pretrained(tmp_path)
    assert saved.config.feature_strides == [4, 8, 16]
    expected = run(saved, random_images(1, 2))
    for attention in ("eager", "sdpa"):
        model = MaCoSNetModel.from_pretrained(tmp_path, attn_implementation=attention).eval()
        assert model.encoder.backbone.config._attn_implementation == attention
        found = run(model, random_images(1, 2))
        torch.testing.assert_close(found.mask_logits, expected.mask_logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["efficientnet", "resnet"])
def test_stages_behind_the_last_one_used_are_cut_without_changing_the_others(kind):
    if kind == "efficientnet":
        backbone = MaCoSNetConfig.from_preset("lite-stride16").backbone_config
        config = MaCoSNetConfig(backbone_config=backbone)
    else:
        config = small_config()
        backbone = config.backbone_config
    torch.manual_seed(0)
    whole = AutoBackbone.from_config(backbone).eval()
    encoder = MaCoSNetEncoder(config).eval()
    assert len(encoder.backbone.state_dict()) < len(whole.state_dict())
    encoder.backbone.load_state_dict(whole.state_dict(), strict=False)
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        features, expected = encoder(images), whole(images).feature_maps
    for found, wanted in zip((*features.skips, features.last), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_size": 100},
        {"image_size": 0},
        {"image_size": 240.0},
        {"image_size": 32},
        {"predictor_channels": [128]},
        {"feature_strides": [4, 8]},
        {"feature_strides": [8, 4, 16]},
        {"feature_strides": [3, 16]},
        {"decoder_widths": [8, 8]},
        {"cascade": "twice"},
        {"padding_mode": "mirror"},
        {"backbone_config": {"hidden_size": 3}},
        {"backbone_config": {"model_type": "no-such-model"}},
    ],
    ids=str,
)
def test_impossible_configurations_are_refused(wrong):
    with pytest.raises(InputError):
        MaCoSNetConfig(**wrong)


def test_unknown_preset_is_named():
    with pytest.raises(InputError, match=r"'huge'.*base, dinov2-small, .*, lite-stride16, paper, vgg16"):
        MaCoSNetConfig.from_preset("huge")


def test_backbones_with_other_stages_than_named_are_refused():
    with pytest.raises(InputError, match="3 stages, but feature_strides names 2"):
        MaCoSNetModel(small_config(feature_strides=[8, 16]))
    coarse = ResNetConfig(hidden_sizes=[8, 12, 16, 24], embedding_size=8, depths=[1] * 4, out_features=["stage4"])
    model = MaCoSNetModel(small_config(backbone_config=coarse))  # stride 32 where 16 is claimed
    with pytest.raises(InputError, match="stride 16"):
        model(random_images(1, 2))


def test_configuration_survives_a_round_trip(tmp_path):
    config = small_config(cascade="features", local_matching_sigmas=[0.3, 0.1], tps_regularization=0.1)
    config.save_pretrained(tmp_path)
    loaded = MaCoSNetConfig.from_pretrained(tmp_path)
    assert loaded.backbone_config.to_dict() == config.backbone_config.to_dict()
    ignored = {"backbone_config", "auto_map", "transformers_version", "_name_or_path"}
    first, second = ({key: value for key, value in c.to_dict().items() if key not in ignored} for c in (config, loaded))
    assert first == second


# --- forward: shapes, directions ---


def test_ordered_pairs_are_followed_by_their_reverse():
    assert ordered_pairs(2) == ((0, 1), (1, 0))
    assert ordered_pairs(3) == ((0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1))


@pytest.mark.parametrize("cascade", ["exact", "features"])
@pytest.mark.parametrize("views", [2, 3])
def test_forward_shapes(views, cascade):
    model = small_model(MaCoSNetModel, cascade=cascade)
    sizes = torch.tensor([[[100, 200], [50, 30], [80, 80]][:views]] * 2)
    outputs = run(model, random_images(2, views), output_flow=True, image_sizes=sizes)
    pairs = views * (views - 1)
    assert outputs.affine.shape == (2, pairs, 6)
    assert outputs.tps.shape == (2, pairs, 18)
    assert outputs.correlation.shape == (2, pairs, CELLS, GRID_SIZE, GRID_SIZE)
    assert outputs.mask_logits.shape == (2, pairs, IMAGE_SIZE, IMAGE_SIZE)
    assert outputs.features.shape == (2, views, 16, GRID_SIZE, GRID_SIZE)
    assert outputs.flow.shape == (2, pairs, IMAGE_SIZE, IMAGE_SIZE, 2)
    assert isinstance(outputs, MaCoSNetModelOutput)


def test_outputs_on_request():
    model, images = small_model(MaCoSNetModel), random_images(1, 2)
    outputs = run(model, images, output_masks=False)
    assert outputs.mask_logits is None
    assert outputs.flow is None
    as_tuple = run(model, images, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], run(model, images).affine)
    matching = small_model(MaCoSNetForKeypointMatching)
    assert isinstance(run(matching, images, return_dict=False), tuple)


@pytest.mark.parametrize("cascade", ["exact", "features"])
def test_swapping_the_views_swaps_the_outputs(cascade):
    model, images = small_model(MaCoSNetModel, cascade=cascade), random_images(2, 2)
    forward, backward = run(model, images), run(model, images.flip(1))
    assert_same(fields(forward), {name: value.flip(1) for name, value in fields(backward).items()})
    assert (forward.affine[:, 0] - forward.affine[:, 1]).abs().max() > 0.01  # else the test could not tell


def test_a_triplet_holds_its_three_pairs():
    model, images = small_model(MaCoSNetModel), random_images(2, 3)
    triplet = run(model, images)
    for first, (i, j) in ((0, (0, 1)), (2, (0, 2)), (4, (1, 2))):
        pair = run(model, images[:, [i, j]])
        expected = {name: triplet[name][:, first : first + 2] for name in DENSE_FIELDS[:-1]}
        assert_same(fields(pair), {**expected, "features": triplet.features[:, [i, j]]}, atol=1e-4, rtol=1e-4)


def test_samples_of_a_batch_do_not_touch_each_other():
    model, images = small_model(MaCoSNetForKeypointMatching), random_images(3, 2)
    together = run(model, images)
    for b in range(3):
        alone = run(model, images[b : b + 1])
        assert_same(
            fields(alone), {name: value[b : b + 1] for name, value in fields(together).items()}, atol=1e-4, rtol=1e-4
        )
        torch.testing.assert_close(alone.keypoints, together.keypoints[b : b + 1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "shape", [(2, 3, IMAGE_SIZE, IMAGE_SIZE), (1, 4, 3, IMAGE_SIZE, IMAGE_SIZE), (1, 2, 3, 64, 64)]
)
@pytest.mark.parametrize("model_class", [MaCoSNetModel, MaCoSNetForKeypointMatching])
def test_images_of_another_shape_are_refused(model_class, shape):
    with pytest.raises(InputError):
        small_model(model_class)(torch.zeros(shape))


def test_triplets_are_not_keypoint_matching_and_flow_needs_sizes():
    with pytest.raises(InputError, match="B, 2, 3"):
        small_model(MaCoSNetForKeypointMatching)(random_images(1, 3))
    with pytest.raises(InputError, match="image_sizes"):
        small_model(MaCoSNetModel)(random_images(1, 2), output_flow=True)


# --- correlation, cascade, decoder input ---


def reference_correlation(source, target):
    """`(C, h, w)` and `(C, h', w')` to `[p][q]` by loops over row-major positions."""
    channels, height, width = source.shape
    found = [
        [
            max(0.0, sum(float(source[c, p // width, p % width] * target[c, r, s]) for c in range(channels)))
            for r, s in itertools.product(range(target.shape[1]), range(target.shape[2]))
        ]
        for p in range(height * width)
    ]
    for q in range(target.shape[1] * target.shape[2]):
        length = math.sqrt(sum(row[q] ** 2 for row in found) + 1e-6)
        for row in found:
            row[q] /= length
    return found


def test_correlation_matches_the_loop_reference_for_unequal_grids():
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(2, 3, 2, 4, generator=generator, dtype=torch.float64)
    target = torch.randn(2, 3, 3, 5, generator=generator, dtype=torch.float64)
    result = correlate(source, target)
    assert result.shape == (2, 8, 3, 5)
    for b in range(2):
        expected = torch.tensor(reference_correlation(source[b], target[b]), dtype=torch.float64)
        torch.testing.assert_close(result[b].flatten(1), expected, atol=1e-6, rtol=1e-6)


def test_inner_products_of_cells_match_the_loops():
    """Their own scale counts: a collection compares them over pairs."""
    generator = torch.Generator().manual_seed(1)
    source = torch.randn(2, 3, 2, 4, generator=generator)
    target = torch.randn(2, 3, 3, 5, generator=generator)
    found = cell_similarity(source, target)
    lengths, gram = cell_products(source)
    assert found.shape == (2, 8, 3, 5)
    for b in range(2):
        here, there = (list(image[b].flatten(1).t().double()) for image in (source, target))
        across = torch.stack([torch.stack([one @ other for other in there]) for one in here])
        within = torch.stack([torch.stack([one @ other for other in here]) for one in here])
        torch.testing.assert_close(found[b].flatten(1).double(), across, atol=1e-5, rtol=0)
        torch.testing.assert_close(gram[b].double(), within, atol=1e-5, rtol=0)
        torch.testing.assert_close(lengths[b].double(), within.diagonal().sqrt(), atol=1e-4, rtol=0)


def test_forward_s_correlation_has_the_source_s_positions_as_channels():
    outputs = run(small_model(MaCoSNetModel), random_images(1, 3))
    for p, (i, j) in enumerate(ordered_pairs(3)):
        expected = torch.tensor(reference_correlation(outputs.features[0, i], outputs.features[0, j]))
        torch.testing.assert_close(outputs.correlation[0, p].flatten(1), expected, atol=1e-5, rtol=1e-4)
    lengths = outputs.correlation.norm(dim=2)
    torch.testing.assert_close(lengths, torch.ones_like(lengths), atol=1e-3, rtol=0)
    assert outputs.correlation.min() >= 0
    lengths = outputs.features.norm(dim=2)
    torch.testing.assert_close(lengths, torch.ones_like(lengths), atol=1e-3, rtol=0)


def heads(model, correlation, stage):
    head = getattr(model, f"{stage}_head")
    return head.linear(head.conv(correlation).flatten(1))


@pytest.mark.parametrize("cascade", ["exact", "features"])
def test_cascade_is_the_two_stages_by_hand(cascade):
    """Affine on (A, B); A warped by torch's own affine_grid; TPS on (warped A, B)."""
    model, images = small_model(MaCoSNetModel, cascade=cascade), random_images(2, 2)
    outputs = run(model, images)
    with torch.inference_mode():
        for p, (i, j) in enumerate(ordered_pairs(2)):
            source, target = model.encoder(images[:, i]), model.encoder(images[:, j])
            affine = heads(model, correlate(source.normalized, target.normalized), "affine")
            size = (IMAGE_SIZE, IMAGE_SIZE) if cascade == "exact" else (GRID_SIZE, GRID_SIZE)
            grid = F.affine_grid(affine.view(-1, 2, 3), [2, 1, *size], align_corners=True)
            if cascade == "exact":
                warped = model.encoder(F.grid_sample(images[:, i], grid, align_corners=True)).last
            else:
                warped = F.grid_sample(source.last, grid, align_corners=True)
            warped = warped / (warped.square().sum(1, keepdim=True) + 1e-6).sqrt()
            tps = heads(model, correlate(warped, target.normalized), "tps")
            torch.testing.assert_close(outputs.affine[:, p], affine, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(outputs.tps[:, p], tps, atol=1e-4, rtol=1e-4)


def test_cascades_differ():
    images = random_images(1, 2)
    exact, features = (run(small_model(MaCoSNetModel, cascade=kind), images) for kind in ("exact", "features"))
    assert torch.equal(exact.affine, features.affine)
    assert (exact.tps - features.tps).abs().max() > 1e-3


@pytest.mark.parametrize("cascade", ["exact", "features"])
def test_encoding_once_and_pairing_later_equals_forward(cascade):
    model, images = small_model(MaCoSNetModel, cascade=cascade), random_images(1, 3)
    outputs = run(model, images)
    with torch.inference_mode():
        features = model.get_image_features(images[0])
        for p, (i, j) in enumerate(ordered_pairs(3)):
            source, target = features.select([i]), features.select([j])
            found = model.predict_transforms(source, target, images[:, i] if cascade == "exact" else None)
            torch.testing.assert_close(found.affine[0], outputs.affine[0, p], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(found.tps[0], outputs.tps[0, p], atol=1e-4, rtol=1e-4)
            # The mask of i given j is read off S_ji: the layout of i, one channel per position of j.
            masks = model.predict_masks(source, correlate(target.normalized, source.normalized))
            torch.testing.assert_close(masks[0], outputs.mask_logits[0, p], atol=1e-4, rtol=1e-4)


def test_mask_depends_on_the_partner():
    outputs = run(small_model(MaCoSNetModel), random_images(1, 3))
    assert (outputs.mask_logits[0, 0] - outputs.mask_logits[0, 2]).abs().max() > 1e-3  # view 0 given 1, and given 2


# --- cost ---


@pytest.mark.parametrize(
    ("model_class", "cascade", "views", "passes"),
    [
        (MaCoSNetModel, "exact", 2, 4),
        (MaCoSNetModel, "features", 2, 2),
        (MaCoSNetModel, "exact", 3, 9),
        (MaCoSNetModel, "features", 3, 3),
        (MaCoSNetForKeypointMatching, "exact", 2, 4),
        (MaCoSNetForKeypointMatching, "features", 2, 2),
    ],
)
def test_encoder_passes_over_single_images(model_class, cascade, views, passes):
    """Both directions and both masks of a pair cost four passes at most: each image once, and once warped."""
    model = small_model(model_class, cascade=cascade)
    encoder = getattr(model, "macosnet", model).encoder
    seen = []
    encoder.backbone.register_forward_pre_hook(lambda module, arguments: seen.append(len(arguments[0])))
    run(model, random_images(1, views))
    assert sum(seen) == passes


# --- flow and point transfer ---


def test_flow_is_the_transform_in_pixels_of_the_original_images():
    model = small_model(MaCoSNetModel, tps_regularization=0.1)
    sizes = torch.tensor([[[41, 101], [61, 31], [50, 50]], [[200, 50], [10, 400], [33, 77]]])
    outputs = run(model, random_images(2, 3), output_flow=True, image_sizes=sizes)
    for b, (p, (i, j)) in itertools.product(range(2), enumerate(ordered_pairs(3))):
        for row, column in ((0, 0), (3, 90), (50, 20), (95, 95)):
            target = torch.tensor([[[-1 + 2 * column / (IMAGE_SIZE - 1), -1 + 2 * row / (IMAGE_SIZE - 1)]]])
            mapped = geometry.apply_cascade(
                target, outputs.affine[b, p][None], outputs.tps[b, p][None], regularization=0.1
            )
            (height_i, width_i), (height_j, width_j) = sizes[b, i].tolist(), sizes[b, j].tolist()
            # From pixels of the network's input to those of the images, which were resized with half-pixel centres.
            (x, y), (u, v) = (((place[0, 0] + 1) / 2 * (IMAGE_SIZE - 1) + 0.5).tolist() for place in (target, mapped))
            expected = [
                (u * width_i - x * width_j) / IMAGE_SIZE,
                (v * height_i - y * height_j) / IMAGE_SIZE,
            ]
            assert outputs.flow[b, p, row, column].tolist() == pytest.approx(expected, abs=1e-2)


def hand_outputs() -> MaCoSNetModelOutput:
    """T_AB moves right by a quarter of A's width, T_BA halves B's height; features say nothing."""
    affine = torch.tensor([[[1, 0, 0.5, 0, 1, 0], [1, 0, 0, 0, 0.5, 0]]])
    features = torch.zeros(1, 2, 4, GRID_SIZE, GRID_SIZE)
    return MaCoSNetModelOutput(affine=affine, tps=geometry.identity_tps(1, 2), features=features)


@pytest.mark.parametrize("local_matching", [False, True])
def test_points_are_transferred_in_pixels_of_images_that_are_not_square(local_matching):
    model = small_model(MaCoSNetForKeypointMatching)
    sizes = torch.tensor([[[101, 41], [21, 201]]])  # source 41 wide and 101 high, target 201 wide and 21 high
    # Target to source by T_AB: B's middle (100, 10) lands a quarter of A's width, from the centre of the input's first
    # pixel to that of its last, to the right of A's middle (20, 50). The edges of the images lie on one another.
    points = torch.tensor([[[100.0, 10.0], [-0.5, -0.5], [200.5, 20.5]]])
    quarter = 41 * (IMAGE_SIZE - 1) / IMAGE_SIZE / 4
    expected = torch.tensor([[[20 + quarter, 50.0], [quarter - 0.5, -0.5], [40.5 + quarter, 100.5]]])
    found = model.transfer_points(hand_outputs(), points, sizes, "target_to_source", local_matching=local_matching)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    # Source to target by T_BA: half as far from the middle in y.
    points = torch.tensor([[[20.0, 50.0], [-0.5, -0.5], [40.5, 100.5]]])
    expected = torch.tensor([[[100.0, 10.0], [-0.5, 4.75], [200.5, 15.25]]])
    found = model.transfer_points(hand_outputs(), points, sizes, local_matching=local_matching)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    points = torch.tensor([[[20.0, 50.0], [0.0, 0.0], [40.0, 100.0]]])
    found = model.transfer_points(hand_outputs(), points, sizes, local_matching=local_matching)
    integers = model.transfer_points(hand_outputs(), points.long(), sizes.tolist(), local_matching=local_matching)
    torch.testing.assert_close(integers, found)


def test_transfer_uses_the_configuration_s_regularisation_and_local_matching():
    images, sizes = random_images(2, 2), torch.tensor([[[60, 90], [80, 50]]] * 2)
    points = torch.rand(2, 5, 2, generator=torch.Generator().manual_seed(3)) * 40
    found = {}
    for regularization, local in itertools.product((0.0, 0.5), (False, True)):
        model = small_model(MaCoSNetForKeypointMatching, tps_regularization=regularization, local_matching=local)
        outputs = run(model, images)
        found[regularization, local] = model.transfer_points(outputs, points, sizes)
        torch.testing.assert_close(
            model.transfer_points(outputs, points, sizes, local_matching=local), found[regularization, local]
        )
        if not local:
            mapped = geometry.apply_cascade(
                geometry.normalize_points(points, sizes[:, 0], IMAGE_SIZE),
                outputs.affine[:, 1],
                outputs.tps[:, 1],
                regularization=regularization,
            )
            expected = geometry.denormalize_points(mapped, sizes[:, 1], IMAGE_SIZE)
            torch.testing.assert_close(found[regularization, local], expected)
    for first, second in itertools.combinations(found.values(), 2):
        assert (first - second).abs().max() > 0.05


@pytest.mark.parametrize(
    ("points", "sizes", "direction"),
    [
        ((1, 3, 2), (1, 2, 2), "sideways"),
        ((3, 2), (1, 2, 2), "source_to_target"),
        ((1, 3, 3), (1, 2, 2), "source_to_target"),
        ((2, 3, 2), (1, 2, 2), "source_to_target"),
        ((1, 3, 2), (2, 2), "target_to_source"),
        ((1, 3, 2), (1, 2, 3), "target_to_source"),
    ],
)
def test_transfer_refuses_what_does_not_fit(points, sizes, direction):
    model = small_model(MaCoSNetForKeypointMatching)
    with pytest.raises(InputError):
        model.transfer_points(hand_outputs(), torch.zeros(points), torch.full(sizes, 50), direction)


def bilinear(image, x, y):
    """`image[c][row][column]` at normalised (x, y), clamped to the border."""
    height, width = len(image[0]), len(image[0][0])
    column = min(max((x + 1) / 2 * (width - 1), 0.0), width - 1.0)
    row = min(max((y + 1) / 2 * (height - 1), 0.0), height - 1.0)
    c0, r0 = min(int(column), width - 2), min(int(row), height - 2)
    u, v = column - c0, row - r0
    return [
        (1 - v) * ((1 - u) * channel[r0][c0] + u * channel[r0][c0 + 1])
        + v * ((1 - u) * channel[r0 + 1][c0] + u * channel[r0 + 1][c0 + 1])
        for channel in image
    ]


def test_local_matching_matches_the_loop_reference():
    generator = torch.Generator().manual_seed(8)
    batch, channels, count, temperature = 2, 5, 3, 9.0
    sigmas, windows = (0.3, 0.2), (0.4, 0.3)
    source = F.normalize(torch.randn(batch, channels, 5, 3, generator=generator), dim=1)
    target = F.normalize(torch.randn(batch, channels, 4, 6, generator=generator), dim=1)
    points = torch.rand(batch, count, 2, generator=generator) * 2 - 1
    affine = torch.tensor([[0.9, 0.1, 0.2, -0.1, 1.1, 0.0], [1.2, 0.0, -0.1, 0.2, 0.8, 0.1]])
    tps = geometry.identity_tps(batch) + 0.1 * torch.randn(batch, 18, generator=generator)
    given = geometry.Transform(affine, tps, 0.1)
    result = match_locally(source, target, points, given, sigmas=sigmas, windows=windows, temperature=temperature)
    for b, n in itertools.product(range(batch), range(count)):

        def transform(x, y, b=b):
            return given[b].apply(torch.tensor([[x, y]]))[0].tolist()

        x, y = points[b, n].tolist()
        moved = [0.0, 0.0]
        for sigma, half in zip(sigmas, windows, strict=True):
            sums = [0.0, 0.0, 0.0]
            for i, j in itertools.product(range(9), repeat=2):
                offset = [2.5 * sigma * (j / 4 - 1), 2.5 * sigma * (i / 4 - 1)]
                evidence = total = 0.0
                for k, m in itertools.product(range(5), repeat=2):
                    du, dv = m / 2 - 1, k / 2 - 1
                    around = (x + half * du, y + half * dv)
                    if max(map(abs, around)) > 1:
                        continue
                    descriptor = bilinear(source[b].tolist(), *around)
                    length = math.sqrt(sum(value**2 for value in descriptor) + 1e-6)
                    place = [t + m_ + o for t, m_, o in zip(transform(*around), moved, offset, strict=True)]
                    other = bilinear(target[b].tolist(), *place)
                    weight = math.exp(-2 * (du**2 + dv**2))
                    evidence += weight * sum(d / length * o for d, o in zip(descriptor, other, strict=True))
                    total += weight
                chance = math.exp(temperature * evidence / total - (offset[0] ** 2 + offset[1] ** 2) / (2 * sigma**2))
                for axis in (0, 1):
                    sums[axis] += chance * offset[axis]
                sums[2] += chance
            moved = [moved[axis] + sums[axis] / sums[2] for axis in (0, 1)]
        expected = [t + m for t, m in zip(transform(x, y), moved, strict=True)]
        assert result[b, n].tolist() == pytest.approx(expected, abs=1e-4)


def test_local_matching_does_not_depend_on_how_many_points_are_asked_at_once():
    generator = torch.Generator().manual_seed(3)
    source, target = (F.normalize(torch.randn(1, 4, 6, 6, generator=generator), dim=1) for _ in range(2))
    points = torch.rand(1, 1100, 2, generator=generator) * 2 - 1
    identity = geometry.Transform(geometry.identity_affine(1))
    together = match_locally(source, target, points, identity)
    some = [0, 1, 600, 1023, 1024, 1099]
    torch.testing.assert_close(match_locally(source, target, points[:, some], identity), together[:, some])


def test_local_matching_has_finite_gradients_on_the_grid_points_themselves():
    features = F.normalize(torch.randn(1, 3, 9, 9, generator=torch.Generator().manual_seed(1)), dim=1)
    affine = geometry.identity_affine(1).requires_grad_()
    points = geometry.make_grid(9, 9).reshape(1, -1, 2)
    match_locally(features, features, points, geometry.Transform(affine)).square().sum().backward()
    assert torch.isfinite(affine.grad).all()
    assert affine.grad.abs().max() > 0


def test_local_matching_finds_a_landmark_near_the_guess():
    features = torch.zeros(1, 2, 9, 9)
    features[:, 0] = 1.0
    target = features.clone()
    target[0, :, 4, 5] = torch.tensor([0.0, 1.0])  # the landmark: x = 0.25, y = 0
    source = features.clone()
    source[0, :, 2, 2] = torch.tensor([0.0, 1.0])  # x = y = -0.5
    points = torch.tensor([[[-0.5, -0.5]]])
    affine = torch.tensor([[1.0, 0.0, 0.6, 0.0, 1.0, 0.6]])  # sends the point to (0.1, 0.1)
    guess = geometry.Transform(affine)
    found = match_locally(source, target, points, guess, sigmas=[0.3], windows=[0.2], temperature=60.0)
    landmark = torch.tensor([[[0.25, 0.0]]])
    assert (found - landmark).norm() < 0.5 * (torch.tensor([[[0.1, 0.1]]]) - landmark).norm()


# --- the keypoint matcher's contract ---


def matching_model(mask_bias: float, mask_spread: float = 1e-3, **kwargs):
    """With masks that are nearly constant, unless `mask_spread` lets the random decoder have its say."""
    model = small_model(MaCoSNetForKeypointMatching, **kwargs)
    with torch.no_grad():
        model.macosnet.decoder.classifier.weight.mul_(mask_spread)
        model.macosnet.decoder.classifier.bias.fill_(mask_bias)
    return model


def test_matches_and_keypoints_follow_the_contract():
    model = matching_model(3.0)
    outputs = run(model, random_images(2, 2))
    count = CELLS
    assert outputs.loss is None
    assert outputs.matches.shape == outputs.matching_scores.shape == (2, 2, count)
    assert outputs.keypoints.shape == (2, 2, count, 2)
    assert outputs.matches.dtype == torch.int64
    assert outputs.keypoints.min() >= 0
    assert outputs.keypoints.max() <= 1
    assert outputs.matching_scores.min() >= 0
    assert outputs.matching_scores.max() <= 1
    matched = outputs.matches[:, 0] >= 0
    assert matched.any()
    index = torch.arange(count).expand(2, -1)
    assert torch.equal(outputs.matches[:, 0][matched], index[matched])
    assert torch.equal(outputs.matches[:, 0], outputs.matches[:, 1])
    assert torch.equal(outputs.matching_scores[:, 0] > 0, matched)
    assert torch.equal(outputs.matching_scores[:, 0], outputs.matching_scores[:, 1])
    # Source keypoints: centres of the cells of a regular grid, row by row.
    for n, (row, column) in enumerate(itertools.product(range(GRID_SIZE), repeat=2)):
        # from -1 to +1 between the centres of the input's corner pixels, then in shares of the image
        expected = [((2 * k + 1) / GRID_SIZE - 1) * (IMAGE_SIZE - 1) / IMAGE_SIZE / 2 + 0.5 for k in (column, row)]
        assert outputs.keypoints[0, 0, n].tolist() == pytest.approx(expected, abs=1e-6)
    # Matched keypoints of the target are where point transfer sends those of the source.
    size = torch.tensor([[[100, 100], [100, 100]]] * 2)
    sent = (model.transfer_points(outputs, outputs.keypoints[:, 0] * 100 - 0.5, size) + 0.5) / 100
    torch.testing.assert_close(outputs.keypoints[:, 1][matched], sent[matched], atol=1e-5, rtol=0)
    assert ((sent >= 0) & (sent <= 1)).all(-1)[matched].all()


def test_nothing_is_matched_off_the_object():
    outputs = run(matching_model(-3.0), random_images(1, 2))
    assert (outputs.matches == -1).all()
    assert (outputs.matching_scores == 0).all()


def test_scores_are_mask_times_similarity_times_consistency():
    model = matching_model(0.5, mask_spread=0.3, match_consistency_sigma=0.25, match_mask_threshold=0.4)
    outputs = run(model, random_images(1, 2))
    size = torch.tensor([[[IMAGE_SIZE, IMAGE_SIZE], [IMAGE_SIZE, IMAGE_SIZE]]])
    source = outputs.keypoints[:, 0] * IMAGE_SIZE - 0.5
    target = model.transfer_points(outputs, source, size)
    back = model.transfer_points(outputs, target, size, "target_to_source")
    half = (IMAGE_SIZE - 1) / 2
    error = (back - source).norm(dim=-1) / half
    places = [points / half - 1 for points in (source, target)]
    masks, features = [], []
    for view, place in enumerate(places):
        masks.append(geometry.sample_at(outputs.mask_logits[:, view, None].sigmoid(), place)[..., 0])
        features.append(geometry.sample_at(outputs.features[:, view], place))
    similarity = F.cosine_similarity(*features, dim=-1).clamp(0, 1)
    expected = (masks[0] * masks[1]).sqrt() * similarity * torch.exp(-(error**2) / (2 * 0.25**2))
    matched = outputs.matches[:, 0] >= 0
    on_both = (masks[0] > 0.4) & (masks[1] > 0.4) & ((target >= -0.5) & (target <= IMAGE_SIZE - 0.5)).all(-1)
    assert torch.equal(matched, on_both)
    assert 3 < matched.sum() < CELLS - 3
    torch.testing.assert_close(outputs.matching_scores[:, 0][matched], expected[matched], atol=1e-4, rtol=1e-3)


def test_without_masks_points_are_matched_and_scored_without_them():
    with_masks = matching_model(0.8, mask_spread=0.3)
    expected = run(with_masks, random_images(1, 2))
    found = run(with_masks, random_images(1, 2), output_masks=False)
    assert found.mask_logits is None
    assert torch.equal(found.keypoints, expected.keypoints)
    outside = found.matches[:, 0] < 0
    places = found.keypoints[:, 1]
    assert ((places[outside] == 0) | (places[outside] == 1)).any(dim=-1).all()  # at the border of the target
    matched = expected.matches >= 0
    assert matched.any()
    assert (found.matches[matched] >= 0).all()
    assert (found.matching_scores >= expected.matching_scores - 1e-6).all()


@pytest.mark.parametrize("model_class", [MaCoSNetModel, MaCoSNetForKeypointMatching])
def test_a_misspelt_keyword_is_no_silence(model_class):
    model, images = small_model(model_class), random_images(1, 2)
    with pytest.raises(TypeError, match="lables"):
        model(images, lables=torch.zeros(1, 2, 3, 2))
    with pytest.raises(TypeError, match="output_mask"):
        model(images, output_mask=False)
    run(model, images, output_hidden_states=False, num_items_in_batch=1)  # as transformers' own training loop passes


def test_loss_is_the_mean_distance_of_labelled_keypoints():
    model, images = small_model(MaCoSNetForKeypointMatching), random_images(2, 2)
    labels = torch.rand(2, 2, 4, 2, generator=torch.Generator().manual_seed(5))
    labels[0, 0, 3] = -1  # absent in one image, so absent in both
    labels[1, 1, :2] = -1
    outputs = run(model, images, labels=labels)
    size = torch.tensor([[[1, 1], [1, 1]]] * 2)  # images of one pixel, so pixels are the labels' own unit
    to_target = model.transfer_points(outputs, labels[:, 0] - 0.5, size) + 0.5
    to_source = model.transfer_points(outputs, labels[:, 1] - 0.5, size, "target_to_source") + 0.5
    distances = []
    for b, n in ((0, 0), (0, 1), (0, 2), (1, 2), (1, 3)):
        distances.append(math.dist(to_target[b, n].tolist(), labels[b, 1, n].tolist()))
        distances.append(math.dist(to_source[b, n].tolist(), labels[b, 0, n].tolist()))
    assert outputs.loss.item() == pytest.approx(sum(distances) / len(distances), rel=1e-4)
    none = run(model, images, labels=torch.full((2, 2, 4, 2), -1.0))
    assert none.loss == 0
    for wrong in ((2, 2, 4), (2, 4, 2), (2, 3, 4, 2)):
        with pytest.raises(InputError, match="labels"):
            model(images, labels=torch.zeros(wrong))


@pytest.mark.parametrize("local_matching", [False, True])
def test_loss_trains_the_encoder_and_both_heads(local_matching):
    model, images = small_model(MaCoSNetForKeypointMatching, local_matching=local_matching), random_images(2, 2)
    labels = torch.rand(2, 2, 4, 2, generator=torch.Generator().manual_seed(5))
    model(images, labels=labels).loss.backward()
    base = model.macosnet
    for module in (base.encoder, base.affine_head, base.tps_head):
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        assert any(gradient.abs().max() > 0 for gradient in gradients)
    assert all(parameter.grad is None for parameter in base.decoder.parameters())


# --- initialisation, precision, saving ---


def test_a_new_model_starts_near_the_identity():
    torch.manual_seed(0)
    outputs = run(MaCoSNetModel(small_config()).eval(), random_images(2, 2))
    assert (outputs.affine - geometry.identity_affine(2, 2)).abs().max() < 0.1
    assert (outputs.tps - geometry.identity_tps(2, 2)).abs().max() < 0.1


def test_bfloat16_runs_and_stays_close():
    images = random_images(1, 2)
    expected = run(small_model(MaCoSNetForKeypointMatching), images)
    outputs = run(small_model(MaCoSNetForKeypointMatching).to(torch.bfloat16), images)
    assert outputs.features.dtype == torch.bfloat16
    assert outputs.affine.dtype == outputs.tps.dtype == outputs.keypoints.dtype == torch.float32
    assert (outputs.affine - expected.affine).abs().max() < 0.1
    assert all(torch.isfinite(value.float()).all() for value in outputs.values() if value is not None)


def test_autocast_does_not_round_the_transforms():
    """A bfloat16 number near 1 is one of 128 steps: half a pixel at 240 pixels."""
    model, images = small_model(MaCoSNetModel), random_images(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = run(model, images)
    assert outputs.correlation.dtype == torch.bfloat16  # autocast was at work
    for parameters in (outputs.affine, outputs.tps):
        rounded = (parameters == parameters.bfloat16().float()).float().mean()
        assert rounded < 0.2


@pytest.mark.parametrize("source_class", [MaCoSNetModel, MaCoSNetForKeypointMatching])
@pytest.mark.parametrize("loaded_class", [MaCoSNetModel, MaCoSNetForKeypointMatching])
def test_saved_and_loaded_models_agree_to_the_bit(source_class, loaded_class, tmp_path):
    model, images = small_model(source_class), random_images(1, 2)
    model.save_pretrained(tmp_path)
    loaded, report = loaded_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    before, after = run(model, images), run(loaded.eval(), images)
    for name in DENSE_FIELDS:
        assert torch.equal(before[name], after[name]), name
    if source_class is loaded_class:
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("cascade", ["exact", "features"])
def test_the_default_model_agrees_to_the_bit_after_saving(cascade, tmp_path):
    torch.manual_seed(0)
    model = MaCoSNetForKeypointMatching(MaCoSNetConfig(cascade=cascade)).eval()
    images = torch.randn(1, 2, 3, 240, 240)
    model.save_pretrained(tmp_path)
    loaded = MaCoSNetForKeypointMatching.from_pretrained(tmp_path).eval()
    before, after = run(model, images), run(loaded, images)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_folder_holds_safetensors_and_names_every_auto_class(tmp_path):
    for number, model_class in enumerate((MaCoSNetModel, MaCoSNetForKeypointMatching)):
        folder = tmp_path / str(number)
        model = small_model(model_class)
        model.save_pretrained(folder)
        assert set(load_file(folder / "model.safetensors")) == set(model.state_dict())
        assert AutoConfig.from_pretrained(folder, trust_remote_code=True).auto_map == {
            "AutoConfig": "configuration_macosnet.MaCoSNetConfig",
            "AutoModel": "modeling_macosnet.MaCoSNetModel",
            "AutoModelForKeypointMatching": "modeling_macosnet.MaCoSNetForKeypointMatching",
        }


def test_every_part_is_trained_by_something_and_gradients_are_finite():
    model, images = small_model(MaCoSNetModel).train(), random_images(2, 2)
    outputs = model(images)
    sum(value.square().mean() for value in fields(outputs).values()).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
