"""What images with nothing in common get: the object that stands out in each, and a mark that says so."""

from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import small_model, small_processor

from macosnet_hf import MaCoSNetForKeypointMatching, load_image
from macosnet_hf.collection import COMMON_SIMILARITY, Collection
from macosnet_hf.demo.texts import collection_verdict, pair_verdict
from macosnet_hf.inference.files import match_files, segment_files
from macosnet_hf.inference.pair import match_images
from macosnet_hf.inference.result_files import pair_document, write_collection
from macosnet_hf.inference.verdict import REASONS
from macosnet_hf.io.checkpoints import load_model_and_processor
from macosnet_hf.mask_sharing import object_similarity, propagate_masks, similar_cells

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CAT, TABBY, DOG, CUP = (str(EXAMPLES / f"{name}.jpg") for name in ("cat", "tabby", "dog", "cup"))
CAR = str(EXAMPLES / "company" / "car.jpg")


@pytest.fixture(scope="module")
def common():
    model, processor = load_model_and_processor(device="cpu")
    return {"model": model, "processor": processor}


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_similarity_of_objects_against_plain_loops():
    features, masks = random(3, 4, 2, 3) - 0.4, random(3, 8, 12, seed=1)
    means = []
    for number in range(3):
        total = np.zeros(4)
        for row in range(2):
            for column in range(3):
                cell = features[number, :, row, column].double().numpy()
                x, y = column - 1, 2 * row - 1
                centre = np.exp(-(x**2 + y**2) / (2 * 0.45**2))
                share = float(masks[number, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].mean())
                total += (share + 0.3 * centre) * cell / np.linalg.norm(cell)
        means.append(total / np.linalg.norm(total))
    expected = np.array([[first @ second for second in means] for first in means])
    np.testing.assert_allclose(object_similarity(features, masks), expected, atol=1e-6)


def test_no_mask_reaches_an_image_that_stands_alone():
    features, masks = random(3, 5, 4, 4), random(3, 16, 16, seed=1)
    others = torch.tensor([[1, 2], [0, 2], [0, 1]])
    alone = similar_cells(features, others).without(torch.tensor([False, True, False]))
    before = propagate_masks(masks, similar_cells(features, others))
    found = propagate_masks(masks, alone)
    torch.testing.assert_close(found[[0, 2]], before[[0, 2]])
    changed = masks.clone()
    changed[[0, 2]] = 1
    torch.testing.assert_close(propagate_masks(changed, alone)[1], found[1])
    assert not torch.allclose(propagate_masks(changed, similar_cells(features, others))[1], before[1])
    own = torch.nn.functional.interpolate(masks[1:2, None], size=(4, 4), mode="area")
    again = torch.nn.functional.interpolate(found[1:2, None], size=(4, 4), mode="area")
    assert torch.corrcoef(torch.stack((own.flatten(), again.flatten())))[0, 1] > 0.8


def test_cells_that_resemble_nothing_are_no_object():
    features, masks = random(3, 12, 4, 4) - 0.5, torch.ones(3, 16, 16)
    others = torch.tensor([[1, 2], [0, 2], [0, 1]])
    found = propagate_masks(masks, similar_cells(features, others, 0.35))
    unit = torch.nn.functional.normalize(features, dim=1).flatten(2).double()
    for number in range(3):
        for cell, corner in ((0, 0), (15, 15)):  # which enlargement leaves as they are
            best = sorted((unit[number, :, cell] @ unit[other]).tolist() for other in others[number].tolist())
            values = sorted((value for row in best for value in row), reverse=True)[:20]
            weights = [np.exp(value / 0.1) for value in values]
            expected = sum(weights) / (sum(weights) + 0.25 * 20 * np.exp(3.5))
            assert float(found[number, corner, corner]) == pytest.approx(expected, abs=1e-4)
    assert found.min() < 0.99
    assert (propagate_masks(masks, similar_cells(features, others)) > 0.999).all()


def test_a_pair_with_nothing_in_common_has_what_stands_out_and_says_so(common):
    found = match_files(TABBY, CAR, **common, refine="none")
    assert not found.result.common
    assert pair_document(found, model="m")["common"] is False
    assert "stands out in its photo" in pair_verdict(found)
    collection = Collection(**common)
    collection.add([load_image(TABBY), load_image(CAR)])
    for number, mask in enumerate(found.result.probabilities):
        alone = collection.salient_mask(number).numpy()
        np.testing.assert_allclose(mask, alone, atol=1e-4)
        assert 0.05 < (mask >= 0.5).mean() < 0.7  # with the other one as a partner it would be empty
    both = match_files(CAT, TABBY, **common, refine="none")
    assert both.result.common
    assert pair_document(both, model="m")["common"] is True
    assert "stands out" not in pair_verdict(both)


def test_refinement_of_a_pair_with_nothing_in_common_keeps_what_stands_out(common):
    found = match_files(TABBY, CAR, **common)
    for soft, mask in zip(found.result.probabilities, found.result.soft_masks, strict=True):
        inside, refined = soft >= 0.5, mask >= 0.5
        assert (inside & refined).sum() > 0.6 * (inside | refined).sum()


@pytest.mark.parametrize("refine", ["none", "otsu"])
def test_a_collection_marks_the_image_that_shares_nothing_and_keeps_its_object(common, tmp_path, refine):
    paths = [CAT, TABBY, DOG, CAR]
    names = ["cat.jpg", "tabby.jpg", "dog.jpg", "car.jpg"]
    result = segment_files(paths, names, **common, refine=refine)
    assert result.result.common.tolist() == [True, True, True, False]
    assert result.odd == [3]
    assert int(result.result.agreement.argmin()) == 3
    assert 0.1 < result.masks[3].mean() < 0.7
    document = write_collection(result, tmp_path, model="m")
    assert [photo["common"] for photo in document["photos"]] == [True, True, True, False]
    assert "car.jpg does not seem to belong" in collection_verdict(result)


def test_images_with_nothing_in_common_at_all_are_called_so(common):
    result = segment_files([CUP, CAR, CAT], ["a.jpg", "b.jpg", "c.jpg"], **common, refine="none")
    assert not result.result.common.any()
    assert "nothing in common" in collection_verdict(result)
    assert all(mask.any() for mask in result.masks)


def test_too_few_images_for_an_odd_one_still_say_which_shares_nothing(common):
    result = segment_files([CAT, TABBY, CAR], ["a.jpg", "b.jpg", "c.jpg"], **common, refine="none")
    assert result.result.common.tolist() == [True, True, False]
    assert result.odd == []
    assert "c.jpg shares no object with the others" in collection_verdict(result)


@pytest.mark.parametrize("decoder", ["paper", "common"])
def test_only_a_decoder_of_common_objects_changes_the_masks(decoder):
    """A decoder of the paper segments what stands out in any company; its masks stay as they are."""
    model, processor = small_model(MaCoSNetForKeypointMatching, decoder_inputs=decoder), small_processor()
    images = (load_image(CAT), load_image(CUP))
    collection = Collection(model, processor)
    collection.add(images)
    shared, alone = (
        collection.first_pass(common=torch.tensor([flag, flag])).masks.propagated for flag in (True, False)
    )
    assert torch.equal(shared, alone) == (decoder == "paper")
    found = match_images(images, model=model, processor=processor, refine="none")
    with torch.inference_mode():
        raw = model(processor([list(images)], return_tensors="pt")["pixel_values"])
        features, soft = raw.features[0], raw.mask_logits[0].sigmoid()
    alike = bool(object_similarity(features, soft)[0, 1] >= COMMON_SIMILARITY)
    assert found.common == (alike and found.reason != REASONS["blank"])  # an untrained network sees nothing
