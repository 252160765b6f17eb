"""Collections that are larger than memory: maps a few at a time, masks of some images, blocks."""

import gc

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import random_images, small_model, small_processor

from macosnet_hf import InputError, load_image
from macosnet_hf.collection import Collection
from macosnet_hf.encoded_images import EncodedImages, ImageList, UnitCells
from macosnet_hf.hints import Hint
from macosnet_hf.io.checkpoints import load_model_and_processor
from macosnet_hf.modeling_macosnet import MaCoSNetForKeypointMatching


@pytest.fixture(scope="module")
def network():
    model = small_model(MaCoSNetForKeypointMatching, decoder_inputs="common")
    return {"model": model, "processor": small_processor()}


def photos(count, seed=1):
    values = random_images(count, seed=seed)
    values = (values - values.amin()) / (values.amax() - values.amin()) * 255
    return [Image.fromarray(value.permute(1, 2, 0).to(torch.uint8).numpy()) for value in values]


@pytest.fixture(scope="module")
def collection(network):
    collection = Collection(**network)
    collection.add(photos(14))
    return collection


def test_maps_are_those_of_the_features(collection):
    expected, maps = collection.features(range(14)).last, collection.maps
    assert maps.shape == tuple(expected.shape)
    assert len(maps) == 14
    assert torch.equal(torch.cat(list(maps.split(4))), expected)
    assert torch.equal(maps[5], expected[5])
    assert [len(part) for part in maps.split(4)] == [4, 4, 4, 2]


def test_some_images_are_segmented_with_the_most_similar_others(collection, monkeypatch):
    seen = []
    segment = Collection.segment
    monkeypatch.setattr(
        Collection, "segment", lambda self, **options: seen.append(list(self.keys)) or segment(self, **options)
    )
    result = collection.segment_some([9, 2], refine="otsu")
    assert result.numbers == [9, 2]
    assert result.probabilities.shape == (2, 96, 96)
    assert len(result.partners) == len(result.agreement) == len(result.common) == 2
    (keys,) = seen
    assert keys[:2] == [collection.keys[9], collection.keys[2]]
    assert len(keys) == 2 + 8
    numbers = [collection.keys.index(key) for key in keys]
    alone = collection.subset(numbers).segment(refine="otsu")
    np.testing.assert_array_equal(result.probabilities, alone.probabilities[:2])
    assert result.partners == [[numbers[place] for place in several] for several in alone.partners[:2]]


def test_all_of_a_small_collection_are_segmented_as_ever(network):
    collection = Collection(**network)
    collection.add(photos(5))
    whole, some = collection.segment(), collection.segment_some(range(5))
    np.testing.assert_array_equal(some.probabilities, whole.probabilities)
    assert some.partners == whole.partners


def test_a_hint_counts_for_images_that_are_segmented_without_its_own(collection):
    hint = Hint(box=(10, 10, 50, 60))
    numbers = [9, 2]
    plain, asked = (collection.segment_some(numbers, hints=hints) for hints in (None, {13: hint}))
    assert not np.array_equal(plain.probabilities, asked.probabilities)
    own = collection.segment_some([13], hints={13: hint})
    assert (own.probabilities[0][:, 70:] == 0).all()


def test_single_objects_of_some_images():
    """With the embedded network: on masks of noise the search for parts takes minutes."""
    model, processor = load_model_and_processor(device="cpu")
    collection = Collection(model, processor)
    collection.add([load_image(f"examples/{name}.jpg") for name in ("cat", "tabby", "dog")])
    result = collection.segment_some([1], instances=True)
    assert result.instances.shape == result.probabilities.shape == (1, 240, 240)
    assert np.array_equal(result.instances > 0, result.probabilities >= 0.5)


def test_blocks_give_each_image_once(collection):
    results = list(collection.segment_blocks(block_size=4))
    assert sorted(number for result in results for number in result.numbers) == list(range(14))
    assert max(len(result.numbers) for result in results) == 4
    for result in results:
        np.testing.assert_array_equal(
            result.probabilities, collection.segment_some(result.numbers, company=8).probabilities
        )
    some = list(collection.segment_blocks([3, 1, 3, 12], block_size=2))
    assert sorted(number for result in some for number in result.numbers) == [1, 3, 12]


@pytest.mark.parametrize("numbers", [[], [14], [-1, 2]])
def test_numbers_that_are_none(collection, numbers):
    with pytest.raises(InputError, match="some of 0 to 13"):
        collection.segment_some(numbers)
    if numbers:
        with pytest.raises(InputError, match="some of 0 to 13"):
            list(collection.segment_blocks(numbers))


def test_other_options_that_cannot_be_used(collection, network):
    with pytest.raises(InputError, match="block_size must be at least 1"):
        list(collection.segment_blocks(block_size=0))
    with pytest.raises(InputError, match="partners"):
        collection.segment_some([1], partners=0)
    with pytest.raises(InputError, match="two or more"):
        Collection(**network).segment_some([0])


def test_maps_of_crops_do_not_stay(collection):
    """Without a garbage collection, which may come much later than the peak of memory."""

    def held():
        return sum(type(each) in (UnitCells, EncodedImages) for each in gc.get_objects())

    before = set(collection.encoded.keys())
    gc.collect()
    gc.disable()
    try:
        collection.segment(refine="otsu")
        alive = held()
        collection.segment(refine="otsu")
        assert held() == alive
    finally:
        gc.enable()
    assert set(collection.encoded.keys()) == before


def test_memory_for_skips_is_bounded():
    encoded = EncodedImages(skip_memory=200)
    small = torch.full((1, 5, 4), 0.1)  # 80 bytes
    for name in "abc":
        encoded.add(name, torch.ones(2, 3, 3), (small,))
    assert [encoded[name].skips is None for name in "abc"] == [False, False, True]
    assert torch.equal(encoded["a"].skips[0], small)
    more = encoded.more()
    more.add("d", torch.ones(2, 3, 3), (small,))
    assert "a" in more
    assert more["d"].skips is not None
    assert "d" not in encoded


def test_images_of_a_list_are_read_when_asked_for():
    class Stored:
        size, reads = (7, 5), 0

        def read(self):
            self.reads += 1
            return Image.new("RGB", self.size)

    stored, image = Stored(), Image.new("RGB", (3, 4))
    images = ImageList([image, stored])
    images.extend([image])
    assert images.sizes == [(3, 4), (7, 5), (3, 4)]
    part = images.select([1, 0])
    assert (len(part), len(images[1:]), stored.reads) == (2, 2, 0)
    assert part[0].size == (7, 5)
    assert stored.reads == 1
    images[1] = image
    assert all(each is image for each in images)
