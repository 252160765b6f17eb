"""Collections: partners, masks that do not depend on the order, bounded memory."""

import os

import gradio
import numpy as np
import pytest
import torch
from PIL import Image

from macosnet_hf import InputError, load_image
from macosnet_hf.collection import choose_partners, refined_mask, segment_collection
from macosnet_hf.loading import load_model_and_processor

IMAGES = os.path.join(os.path.dirname(gradio.__file__), "media_assets", "images")
NAMES = ("cheetah1.jpg", "lion.jpg", "cheetah.jpg", "tower.jpg", "bus.png")


@pytest.fixture(scope="module")
def network():
    model, processor = load_model_and_processor(device="cpu")
    return {"model": model, "processor": processor}


@pytest.fixture(scope="module")
def photos():
    return [load_image(os.path.join(IMAGES, name)) for name in NAMES]


def soft_mask_of_pair(network, first, second):
    """`(S, S)` the mask of the first given the second, by the model's own forward pass on a pair."""
    pixels = network["processor"]([first, second], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        return network["model"](pixels).mask_logits[0, 0].sigmoid().numpy()


@pytest.mark.parametrize("count", [2, 3, 5])
def test_masks_are_the_mean_over_the_partners(network, photos, count):
    result = segment_collection(photos[:count], **network, partners=2)
    size = network["model"].config.image_size
    assert result.probabilities.shape == (count, size, size)
    assert result.probabilities.dtype == np.float32
    assert result.agreement.shape == (count,)
    for number, partners in enumerate(result.partners):
        assert len(partners) == min(2, count - 1)
        assert number not in partners
        assert len(set(partners)) == len(partners)
        expected = np.mean([soft_mask_of_pair(network, photos[number], photos[other]) for other in partners], axis=0)
        np.testing.assert_allclose(result.probabilities[number], expected, atol=2e-4)


def test_order_does_not_matter(network, photos):
    order = [3, 0, 4, 2, 1]
    straight = segment_collection(photos, **network, partners=2)
    shuffled = segment_collection([photos[index] for index in order], **network, partners=2)
    for place, index in enumerate(order):
        np.testing.assert_array_equal(shuffled.probabilities[place], straight.probabilities[index])
        assert [order[other] for other in shuffled.partners[place]] == straight.partners[index]
        assert shuffled.agreement[place] == pytest.approx(straight.agreement[index], abs=1e-9)


def test_a_photograph_given_twice_gets_the_same_mask_twice(network, photos):
    result = segment_collection([photos[0], photos[1], photos[0]], **network)
    np.testing.assert_array_equal(result.probabilities[0], result.probabilities[2])
    assert result.partners[0][0] == 2
    assert result.partners[2][0] == 0


@pytest.mark.parametrize("options", [{"batch_size": 2}, {"batch_size": 16}, {"skip_memory": 0}])
def test_memory_options_change_nothing(network, photos, options):
    plain = segment_collection(photos, **network, partners=2)
    other = segment_collection(photos, **network, partners=2, **options)
    np.testing.assert_allclose(other.probabilities, plain.probabilities, atol=1e-4)
    assert other.partners == plain.partners


@pytest.mark.parametrize(("skip_memory", "passes"), [(1 << 30, 3), (0, 6)])
def test_each_photograph_is_encoded_once_unless_memory_is_short(network, photos, skip_memory, passes):
    encoded = []
    hook = network["model"].macosnet.encoder.register_forward_hook(lambda _, inputs, __: encoded.append(len(inputs[0])))
    try:
        segment_collection(photos[:3], **network, skip_memory=skip_memory)
    finally:
        hook.remove()
    assert sum(encoded) == passes


def test_progress_is_told(network, photos):
    seen = []
    segment_collection(photos[:3], **network, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_too_few_photographs_or_bad_options(network, photos):
    for few in ([], photos[:1]):
        with pytest.raises(InputError, match="two or more"):
            segment_collection(few, **network)
    for options in ({"partners": 0}, {"batch_size": 0}):
        with pytest.raises(InputError, match="at least 1"):
            segment_collection(photos[:2], **network, **options)


def test_partners_are_the_most_alike():
    features = torch.randn(6, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    indices, similarity = choose_partners(features, 3)
    pooled = features.numpy().astype(np.float64).mean((2, 3))
    for number in range(6):
        cosines = {
            other: pooled[number] @ pooled[other] / np.linalg.norm(pooled[number]) / np.linalg.norm(pooled[other])
            for other in range(6)
            if other != number
        }
        best = sorted(cosines, key=lambda other: -cosines[other])[:3]
        assert indices[number].tolist() == best
        np.testing.assert_allclose(similarity[number], [cosines[other] for other in best], atol=1e-6)
    assert choose_partners(features, 100)[0].shape == (6, 5)


def test_hard_masks_have_the_size_of_the_photograph():
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 90, 3)).astype(np.uint8))
    probability = np.zeros((24, 24), dtype=np.float32)
    probability[:, 12:] = 1  # the right half
    mask = refined_mask(photo, probability, "none")
    assert mask.shape == (50, 90)
    assert mask.dtype == bool
    assert not mask[:, :44].any()
    assert mask[:, 47:].all()
    with pytest.raises(InputError, match="Unknown refinement"):
        refined_mask(photo, probability, "magic")


@pytest.mark.parametrize("refine", ["none", "grabcut"])
def test_hard_masks_are_those_of_the_image_processor(network, photos, refine):
    pair = [photos[0], photos[2]]
    with torch.inference_mode():
        outputs = network["model"](network["processor"](pair, return_tensors="pt")["pixel_values"])
    expected = network["processor"].post_process_cosegmentation(outputs, images=pair, refine=refine)[0]
    for photo, logits, mask in zip(pair, outputs.mask_logits[0], expected, strict=True):
        np.testing.assert_array_equal(refined_mask(photo, logits.sigmoid().numpy(), refine), mask.numpy())


@pytest.mark.parametrize("size", [(4000, 3000), (9000, 40), (20_000, 400)])
def test_large_photographs_get_the_same_mask_in_their_own_size(photos, size):
    rows, columns = np.mgrid[0:60, 0:60]
    probability = (1 / (1 + np.exp((np.hypot((rows - 30) / 1.3, columns - 26) - 16) / 2))).astype(np.float32)
    photo = photos[0].resize(size)
    mask = refined_mask(photo, probability, "none")
    assert mask.shape == size[::-1]
    # The plain way: the soft mask at full size, then the threshold.
    soft = torch.nn.functional.interpolate(
        torch.from_numpy(probability)[None, None], size=size[::-1], mode="bilinear", align_corners=True
    )[0, 0]
    expected = soft.numpy() >= 0.5
    union = (mask | expected).sum()
    assert (mask & expected).sum() > 0.98 * union
