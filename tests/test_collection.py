"""Collections: partners, masks that do not depend on the order, bounded memory."""

import math
import os

import gradio
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from macosnet_hf import InputError, load_image, mask_sharing
from macosnet_hf.collection import (
    Collection,
    choose_partners,
    hard_mask,
    segment_collection,
    spread_ranks,
)
from macosnet_hf.crops import crop_to_box, object_boxes, paste_masks
from macosnet_hf.hints import Hint
from macosnet_hf.io.checkpoints import load_model_and_processor
from macosnet_hf.mask_sharing import drop_small_components, propagate_masks, refine_masks, similar_cells
from macosnet_hf.refinement import refine_mask
from macosnet_hf.training.decoder_start import with_fresh_decoder

IMAGES = os.path.join(os.path.dirname(gradio.__file__), "media_assets", "images")
NAMES = ("cheetah1.jpg", "lion.jpg", "cheetah.jpg", "tower.jpg", "bus.png")


@pytest.fixture(scope="module")
def network():
    model, processor = load_model_and_processor(device="cpu")
    return {"model": model, "processor": processor}


@pytest.fixture(scope="module")
def paper_network(network):
    """The same with a decoder of the paper's kind, which sees one partner at a time; it is not trained."""
    torch.manual_seed(0)
    return {**network, "model": with_fresh_decoder(network["model"], "paper")}


@pytest.fixture(scope="module")
def photos():
    return [load_image(os.path.join(IMAGES, name)) for name in NAMES]


def soft_mask_of_pair(network, first, second):
    """`(S, S)` the mask of the first given the second, by the model's own forward pass on a pair."""
    pixels = network["processor"]([first, second], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        return network["model"](pixels).mask_logits[0, 0].sigmoid().numpy()


@pytest.mark.parametrize("kind", ["turned", "upside down", "transparent", "print"])
def test_images_of_every_kind_have_the_masks_of_their_upright_pixels(network, photos, tmp_path, kind):
    """Also where images are cut out sharply, cropped, and pointed at."""
    upright = [photo.resize((120, 80)) for photo in photos[:3]]
    given = []
    for photo in upright:
        if kind in ("turned", "upside down"):
            exif = Image.Exif()
            exif[0x0112] = 6 if kind == "turned" else 3
            stored = photo.transpose(Image.Transpose.ROTATE_90 if kind == "turned" else Image.Transpose.ROTATE_180)
            stored.save(tmp_path / "stored.png", exif=exif)
            given.append(Image.open(tmp_path / "stored.png"))
            given[-1].load()
        else:
            given.append(photo.convert("RGBA" if kind == "transparent" else "CMYK"))
    if kind == "print":
        upright = [load_image(image) for image in given]
    hints = {0: Hint(include=[(100, 20)])}
    found, expected = (segment_collection(each, refine="grabcut", hints=hints, **network) for each in (given, upright))
    np.testing.assert_array_equal(found.probabilities, expected.probabilities)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_masks_are_the_mean_over_the_partners(paper_network, photos, count):
    collection = Collection(**paper_network)
    collection.add(photos[:count])
    result = collection.segment(partners=2, propagate=False)
    size = paper_network["model"].config.image_size
    assert result.probabilities.shape == (count, size, size)
    assert result.probabilities.dtype == np.float32
    assert result.agreement.shape == (count,)
    for number, partners in enumerate(result.partners):
        assert len(partners) == min(2, count - 1)
        assert number not in partners
        assert len(set(partners)) == len(partners)
        expected = np.mean(
            [soft_mask_of_pair(paper_network, photos[number], photos[other]) for other in partners], axis=0
        )
        np.testing.assert_allclose(result.probabilities[number], expected, atol=2e-4)


def slow_propagation(features, masks, others):
    """Cell by cell in float64; the masks have the features' size."""
    count, _, height, width = features.shape
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    result = np.zeros((count, height, width))
    for number in range(count):
        for y in range(height):
            for x in range(width):
                found = []
                for other in others[number][:16]:
                    for v in range(height):
                        for u in range(width):
                            similarity = float(unit[number, :, y, x] @ unit[other, :, v, u])
                            found.append((similarity, masks[other, v, u]))
                best = sorted(found, reverse=True)[:20]
                weights = [math.exp(similarity / 0.1) for similarity, _ in best]
                result[number, y, x] = sum(w * m for w, (_, m) in zip(weights, best, strict=True)) / sum(weights)
    return result


@pytest.mark.parametrize("count", [2, 3, 19])
def test_masks_are_propagated_as_in_plain_loops(count):
    random = np.random.default_rng(count)
    features, masks = random.normal(size=(count, 5, 3, 4)), random.random((count, 3, 4))
    others = np.stack([random.permutation(np.delete(np.arange(count), number)) for number in range(count)])
    cells = similar_cells(torch.from_numpy(features), torch.from_numpy(others))
    found = propagate_masks(torch.from_numpy(masks), cells)
    np.testing.assert_allclose(found.numpy(), slow_propagation(features, masks, others), atol=1e-5)


def test_masks_are_propagated_along_similarity():
    """Two images of the same three things in other places: a wrong mask is outvoted by those of the others."""
    kinds = torch.eye(3)
    layout = torch.tensor([[[0, 1], [2, 2]], [[2, 0], [1, 1]], [[1, 2], [0, 2]]])
    features = kinds[layout].permute(0, 3, 1, 2)
    masks = (layout == 0).float()
    masks[0] = 1 - masks[0]
    others = torch.tensor([[1, 2], [2, 0], [0, 1]])
    found = propagate_masks(masks, similar_cells(features, others))
    assert (found[0] > 0.5).tolist() == (layout[0] == 0).tolist()


def test_spread_ranks():
    assert spread_ranks(29, 2) == [0, 14]
    assert spread_ranks(29, 3) == [0, 9, 19]
    assert spread_ranks(3, 1) == [0]
    assert spread_ranks(1, 2) == [0]
    assert spread_ranks(5, 5) == [0, 1, 2, 3, 4]
    for count in range(1, 40):
        for wanted in range(1, 45):
            ranks = spread_ranks(count, wanted)
            assert len(set(ranks)) == len(ranks) == min(count, wanted)
            assert all(0 <= rank < count for rank in ranks)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_three_steps_of_a_mask(paper_network, photos, count):
    """Decoder, what the others say, and the image's own colours, put together by hand."""
    collection = Collection(**paper_network)
    collection.add(photos[:count])
    features = collection.features(range(count)).last
    others, _ = choose_partners(features, count)
    first = torch.from_numpy(collection.segment(propagate=False).probabilities)
    share = 0.5 if count > 2 else 0.3
    cells = similar_cells(features, others)
    propagated = (1 - share) * first + share * propagate_masks(first, cells)
    np.testing.assert_allclose(collection.segment().probabilities, propagated.numpy(), atol=1e-6)
    sharp = []
    for photo, mask in zip(photos, propagated, strict=False):
        small = photo.copy()
        if max(photo.size) > 320:
            scale = 320 / max(photo.size)
            small = photo.resize([round(side * scale) for side in photo.size], Image.Resampling.BOX)
        enlarged = F.interpolate(mask[None, None], small.size[::-1], mode="bilinear", align_corners=False)[0, 0]
        hard = refine_mask(small, enlarged.clamp(0, 1).numpy(), "grabcut")
        soft = F.interpolate(
            torch.from_numpy(hard)[None, None].float(), mask.shape, mode="bilinear", align_corners=False
        )
        sharp.append(soft[0, 0])
    sharp = torch.stack(sharp)
    expected = drop_small_components(0.3 * first + 0.4 * propagate_masks(sharp, cells) + 0.3 * sharp)
    refined = collection.segment(refine="grabcut", second_pass=False, workers=3)
    np.testing.assert_allclose(refined.probabilities, expected.numpy(), atol=1e-5)
    assert (np.abs(refined.probabilities - propagated.numpy()) > 0.05).any()


def test_the_second_pass_is_the_collection_of_the_crops(network, photos, monkeypatch):
    """Small objects, cropped by hand: the masks of the crops are the masks of the whole images."""
    monkeypatch.setattr(
        "macosnet_hf.crops.drop_small_components", lambda masks, wanted: masks
    )  # which differ in a reduced mask
    small = []
    for number, photo in enumerate(photos[:3]):
        frame = Image.new("RGB", (640, 480), (90, 120, 90))
        frame.paste(photo.resize((240, 180)), (40 + 150 * number, 30 + 120 * number))
        small.append(frame)
    small.append(photos[0])
    collection = Collection(**network)
    collection.add(small)
    propagated = torch.from_numpy(collection.segment().probabilities)
    boxes = object_boxes(propagated)
    assert all(boxes[:3])
    side = propagated.shape[-1]
    crops = []
    for photo, box in zip(small, boxes, strict=True):
        left, top, right, bottom = box or (0, 0, side, side)
        x, y = photo.width / side, photo.height / side
        size = (round((right - left) * x), round((bottom - top) * y))
        crops.append(photo.resize(size, Image.Resampling.BICUBIC, box=(left * x, top * y, right * x, bottom * y)))
    again = Collection(**network)
    again.add(crops)
    found = again.segment(refine="grabcut", second_pass=False).probabilities
    whole = collection.segment(refine="grabcut").probabilities
    for mask, box, crop in zip(whole, boxes, found, strict=True):
        if box is None:
            np.testing.assert_allclose(mask, crop, atol=1e-5)
            continue
        left, top, right, bottom = box
        assert mask[:top].max(initial=0) == mask[bottom:].max(initial=0) == 0
        assert mask[:, :left].max(initial=0) == mask[:, right:].max(initial=0) == 0
        reduced = Image.fromarray(crop).resize((right - left, bottom - top), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(mask[top:bottom, left:right], np.asarray(reduced), atol=1e-3)


def test_an_image_in_whose_crop_nothing_is_found_stays_whole(network, photos, monkeypatch):
    small = []
    for number, photo in enumerate(photos[:3]):
        small.append(Image.new("RGB", (640, 480), (90, 120, 90)))
        small[-1].paste(photo.resize((240, 180)), (40 + 150 * number, 30 + 120 * number))
    collection = Collection(**network)
    collection.add(small)
    real, seen = Collection.first_pass, []

    def first_pass(self, *given, **named):
        found = real(self, *given, **named)
        seen.append([photo.size == (640, 480) for photo in self.images])
        if len(seen) == 2:
            found.masks.propagated[1] = 0.4
        return found

    monkeypatch.setattr(Collection, "first_pass", first_pass)
    masks = collection.segment(refine="grabcut").probabilities
    assert seen == [[True, True, True], [False, False, False], [False, True, False]]
    assert (masks >= 0.5).any(axis=(1, 2)).all()


def test_the_second_pass_can_be_stopped(network, photos):
    small = Image.new("RGB", (640, 480), (90, 120, 90))
    small.paste(photos[0].resize((200, 200)), (100, 100))
    collection = Collection(**network)
    collection.add([small, *photos[1:4], small.rotate(180)])
    told = []
    collection.segment(refine="otsu", second_pass=False, progress=lambda *step: told.append(step))
    first_step = told.count((5, 15))
    told.clear()

    def stop(done, total):
        told.append((done, total))
        if told.count((5, 15)) > first_step:  # a crop
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collection.segment(refine="grabcut", progress=stop)
    assert told == sorted(told)
    assert told[-1] == (5, 15)
    assert collection.segment().probabilities.shape[0] == 5  # the collection is as it was


def test_boxes_of_small_objects():
    masks = torch.zeros(6, 100, 100)
    masks[0, 10:30, 40:80] = 0.9  # 20 high and 40 wide: 56 wide with the margins, and at least 40 high
    masks[1, 90:, :5] = 0.5  # in a corner
    masks[2, 5:95, 5:95] = 1  # large
    masks[3, 50, 50] = 0.49  # nothing
    masks[4, :, 30:60] = 1  # 100 high, 42 wide
    masks[5, 0, 0] = masks[5, 99, 99] = 1  # everywhere
    expected = [(32, 0, 88, 40), (0, 60, 40, 100), None, None, (24, 0, 66, 100), None]
    assert object_boxes(masks) == expected


def test_masks_of_crops_are_pasted(photos):
    masks = torch.rand(3, 60, 60)
    boxes = [(6, 12, 36, 60), None, (0, 0, 24, 24)]
    whole = paste_masks(masks, boxes)
    assert torch.equal(whole[1], masks[1])
    assert whole[0].sum() == pytest.approx(float(masks[0].sum()) * 30 * 48 / 3600, rel=0.01)
    outside = whole[0].clone()
    outside[12:60, 6:36] = 0
    assert not outside.any()
    assert crop_to_box(photos[0], None, 60) is photos[0]
    assert crop_to_box(Image.new("RGB", (600, 30)), boxes[0], 60).size == (300, 24)
    assert crop_to_box(Image.new("RGB", (1, 2000)), boxes[0], 60).size == (1, 1600)


def test_small_components_are_dropped():
    mask = torch.full((20, 20), 0.2)
    mask[2:12, 2:12] = 0.9  # 100 pixels
    mask[0, 15:19] = mask[1, 19] = 0.8  # 5, connected by a corner
    mask[15:17, 1:6] = 0.7  # 10: a tenth
    mask[19, 19] = 0.5
    found = drop_small_components(torch.stack([mask, torch.zeros(20, 20), torch.ones(20, 20), mask.T]))
    expected = mask.clone()
    expected[0, 15:19] = expected[1, 19] = expected[19, 19] = 0.499
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], torch.zeros(20, 20))
    assert torch.equal(found[2], torch.ones(20, 20))
    assert torch.equal(found[3], expected.T)


def test_a_stopped_refinement_does_not_wait_for_the_rest(photos, monkeypatch):
    begun = []
    real = mask_sharing.refine_mask

    def counted(*given, **named):
        begun.append(1)
        return real(*given, **named)

    monkeypatch.setattr(mask_sharing, "refine_mask", counted)

    def stop(done):
        raise KeyboardInterrupt

    many = [photo.resize((160, 120)) for photo in photos] * 6
    masks = torch.linspace(0, 1, 40).expand(30, 40, 40)
    with pytest.raises(KeyboardInterrupt):
        refine_masks(many, masks, "grabcut", progress=stop)
    assert len(begun) <= 10
    assert len(refine_masks(many, masks, "otsu", workers=1)) == 30


@pytest.mark.parametrize("refine", ["none", "grabcut"])
def test_order_does_not_matter(network, photos, refine):
    order = [3, 0, 4, 2, 1]
    straight = segment_collection(photos, **network, partners=2, refine=refine)
    shuffled = segment_collection([photos[index] for index in order], **network, partners=2, refine=refine)
    for place, index in enumerate(order):
        np.testing.assert_array_equal(shuffled.probabilities[place], straight.probabilities[index])
        assert [order[other] for other in shuffled.partners[place]] == straight.partners[index]
        assert shuffled.agreement[place] == pytest.approx(straight.agreement[index], abs=1e-9)


def test_an_image_given_twice_gets_the_same_mask_twice(network, photos):
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
def test_each_image_is_encoded_once_unless_memory_is_short(paper_network, photos, skip_memory, passes):
    encoded = []
    hook = paper_network["model"].macosnet.encoder.register_forward_hook(
        lambda _, inputs, __: encoded.append(len(inputs[0]))
    )
    try:
        segment_collection(photos[:3], **paper_network, skip_memory=skip_memory)
    finally:
        hook.remove()
    assert sum(encoded) == passes


def test_progress_is_reported(network, paper_network, photos):
    seen = []
    segment_collection(photos[:3], **paper_network, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    seen.clear()
    segment_collection(photos[:3], **network, refine="otsu", progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)  # a second round of the decoder and a crop are reported as well
    assert set(seen) == {(done, 9) for done in range(10)}


def test_too_few_images_or_bad_options(network, photos):
    for few in ([], photos[:1]):
        with pytest.raises(InputError, match="two or more"):
            segment_collection(few, **network)
    for options in ({"partners": 0}, {"batch_size": 0}):
        with pytest.raises(InputError, match="at least 1"):
            segment_collection(photos[:2], **network, **options)


def test_partners_are_the_most_similar():
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


def test_hard_masks_have_the_size_of_the_image():
    probability = np.zeros((24, 24), dtype=np.float32)
    probability[:, 12:] = 1  # the right half
    mask = hard_mask(probability, (50, 90))
    assert mask.shape == (50, 90)
    assert mask.dtype == bool
    assert not mask[:, :44].any()
    assert mask[:, 47:].all()


def test_hard_masks_are_those_of_the_image_processor(network, photos):
    pair = [photos[0], photos[2]]
    with torch.inference_mode():
        outputs = network["model"](network["processor"](pair, return_tensors="pt")["pixel_values"])
    expected = network["processor"].post_process_cosegmentation(outputs, images=pair)[0]
    for photo, logits, mask in zip(pair, outputs.mask_logits[0], expected, strict=True):
        np.testing.assert_array_equal(hard_mask(logits.sigmoid().numpy(), photo.size[::-1]), mask.numpy())


@pytest.mark.parametrize("size", [(4000, 3000), (9000, 40), (20_000, 400)])
def test_large_images_get_the_same_mask_in_their_own_size(size):
    rows, columns = np.mgrid[0:60, 0:60]
    probability = (1 / (1 + np.exp((np.hypot((rows - 30) / 1.3, columns - 26) - 16) / 2))).astype(np.float32)
    mask = hard_mask(probability, size[::-1])
    assert mask.shape == size[::-1]
    # The plain way: the soft mask at full size, then the threshold.
    soft = torch.nn.functional.interpolate(
        torch.from_numpy(probability)[None, None], size=size[::-1], mode="bilinear", align_corners=False
    )[0, 0]
    np.testing.assert_array_equal(mask, soft.numpy() >= 0.5)


def test_arguments_of_version_0_1_are_taken(network, photos):
    collection = Collection(**network)
    collection.add(photos[:2])
    for old, new in (("common", "propagate"), ("closer", "second_pass")):
        expected = collection.segment(refine="otsu", **{new: False}).probabilities
        with pytest.warns(DeprecationWarning, match=f"{old} is now {new}"):
            found = collection.segment(refine="otsu", **{old: False}).probabilities
        np.testing.assert_array_equal(found, expected)
    with pytest.warns(DeprecationWarning, match="closer is now second_pass"):
        segment_collection(photos[:2], **network, closer=False)
    with pytest.raises(TypeError, match="near"):
        collection.segment(near=True)
