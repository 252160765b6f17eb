"""Heads that compare coarser maps than the rest of the network (`predictor_grid`)."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_models import FUSED, random_images, seeded, small_config, small_model

from macosnet_hf.collection import Collection
from macosnet_hf.configuration_macosnet import MaCoSNetConfig
from macosnet_hf.conversion.export import export
from macosnet_hf.encoder import MaCoSNetFeatures
from macosnet_hf.errors import InputError
from macosnet_hf.geometry import warp
from macosnet_hf.image_processing_macosnet import MaCoSNetImageProcessor
from macosnet_hf.inference.collection_transforms import match_collection
from macosnet_hf.matching import correlate
from macosnet_hf.modeling_macosnet import MaCoSNetForKeypointMatching, MaCoSNetModel
from macosnet_hf.training.pretraining import SyntheticObjective
from macosnet_hf.training.synthetic import WarpRange

SIZE = 144  # a grid of 9 cells a side
COARSE = {"image_size": SIZE, "predictor_grid": 6, "mutual_fit": True}


def structured_images(count: int) -> torch.Tensor:
    return F.interpolate(random_images(count), size=(SIZE, SIZE), mode="bilinear")


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def slow_on_grid(maps: np.ndarray, side: int) -> np.ndarray:
    """`(C, n, n)` to `(C, side, side)` in float64, corner on corner, cell by cell."""
    last = maps.shape[-1] - 1
    out = np.zeros((len(maps), side, side))
    for row in range(side):
        for column in range(side):
            y, x = row * last / (side - 1), column * last / (side - 1)
            for v in range(last + 1):
                for u in range(last + 1):
                    out[:, row, column] += max(0, 1 - abs(y - v)) * max(0, 1 - abs(x - u)) * maps[:, v, u]
    return out


def test_maps_on_a_coarser_grid_against_plain_loops():
    maps = torch.rand(2, 5, 9, 9, generator=seeded()) + 0.1
    found = MaCoSNetFeatures.from_map(maps).on_grid(6)
    for one, last, unit in zip(maps.double().numpy(), found.last, found.normalized, strict=True):
        expected = slow_on_grid(one, 6)
        np.testing.assert_allclose(last, expected, atol=1e-5)
        np.testing.assert_allclose(unit, expected / np.sqrt((expected**2).sum(0) + 1e-6), atol=1e-5)


def test_nothing_is_done_to_maps_that_are_on_the_grid():
    features = MaCoSNetFeatures.from_map(torch.rand(1, 5, 6, 6))
    assert features.on_grid(6) is features


@pytest.mark.parametrize("cascade", ["exact", "features"])
def test_the_heads_see_the_coarse_maps_and_all_else_the_fine_ones(cascade):
    model = small_model(MaCoSNetModel, **COARSE, cascade=cascade)
    pixels = structured_images(2).unsqueeze(0)
    output = model(pixels)
    assert output.correlation.shape == (1, 2, 81, 9, 9)
    assert output.features.shape[-2:] == (9, 9)
    first, second = (model.get_image_features(pixels[:, view]).on_grid(6) for view in (0, 1))
    affine = model.affine_head(correlate(first.normalized, second.normalized))
    torch.testing.assert_close(output.affine[:, 0], affine, atol=1e-5, rtol=1e-5)
    transform = model.make_transform(affine, torch.zeros(1, 18))
    if cascade == "exact":
        warped = warp(pixels[:, 0], transform.without_spline().grid((144, 144)))
        warped = model.get_image_features(warped).on_grid(6)
    else:
        warped = MaCoSNetFeatures.from_map(warp(first.last, transform.without_spline().grid((6, 6))))
    tps = model.tps_head(correlate(warped.normalized, second.normalized))
    torch.testing.assert_close(output.tps[:, 0], tps, atol=1e-4, rtol=1e-4)


def test_the_same_heads_fit_images_of_other_sizes():
    small, large = small_model(MaCoSNetModel), small_model(MaCoSNetModel, **COARSE)
    large.affine_head.load_state_dict(small.affine_head.state_dict())
    large.tps_head.load_state_dict(small.tps_head.state_dict())


@pytest.mark.parametrize("orientations", ["mirror", "all"])
def test_a_batch_is_as_its_pairs(orientations):
    model = small_model(MaCoSNetForKeypointMatching, **COARSE, **FUSED)
    pixels = structured_images(4).unflatten(0, (2, 2))
    both = model(pixels, orientations=orientations)
    for number in (0, 1):
        one = model(pixels[number : number + 1], orientations=orientations)
        torch.testing.assert_close(one.keypoints[0], both.keypoints[number], atol=2e-3, rtol=1e-3)
        assert one.orientation[0] == both.orientation[number]


def test_a_collection_is_as_its_pairs():
    model = small_model(MaCoSNetForKeypointMatching, **COARSE, cascade="features").float()
    processor = MaCoSNetImageProcessor(size={"height": 144, "width": 144})
    pixels = (structured_images(3).permute(0, 2, 3, 1).clamp(-1, 1) * 127 + 127).numpy().astype(np.uint8)
    collection = Collection(model, processor)
    collection.add([Image.fromarray(each) for each in pixels])
    matched = match_collection(collection, cascade="features")
    inputs = processor([[Image.fromarray(pixels[0]), Image.fromarray(pixels[2])]], return_tensors="pt")
    pair = model(**inputs)
    torch.testing.assert_close(matched.affine[0, 2], pair.affine[0, 0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(matched.tps[0, 2], pair.tps[0, 0], atol=5e-3, rtol=1e-3)


def test_half_precision():
    model = small_model(MaCoSNetForKeypointMatching, **COARSE).to(torch.bfloat16)
    assert torch.isfinite(model(structured_images(2).unsqueeze(0)).keypoints).all()


def test_the_exported_network_is_the_same(tmp_path):
    pytest.importorskip("onnxruntime")
    model = small_model(MaCoSNetForKeypointMatching, **COARSE, local_matching=False)
    written = export(model, MaCoSNetImageProcessor(size={"height": SIZE, "width": SIZE}), tmp_path)
    assert max(written.difference.values()) < 1e-3
    assert MaCoSNetConfig.from_pretrained(tmp_path).predictor_grid == 6


def test_synthetic_training_reaches_the_heads():
    model = small_model(MaCoSNetModel, **COARSE)
    model.train()
    images = (random_images(2).clamp(-1, 1) * 127 + 127).to(torch.uint8)
    objective = SyntheticObjective(model, [0.5] * 3, [0.25] * 3, WarpRange())
    with torch.enable_grad():
        objective(images, seeded())["total"].backward()
    assert all(head.conv[0].weight.grad.abs().sum() > 0 for head in (model.affine_head, model.tps_head))


def test_settings():
    assert small_config().predictor_grid == 6
    assert MaCoSNetConfig.from_preset("base").predictor_grid == 15
    with pytest.raises(InputError, match="predictor_grid 4 is too small"):
        small_config(predictor_grid=4)
    with pytest.raises(InputError, match="predictor_grid takes a whole number from 1 to 64"):
        small_config(predictor_grid="six")
