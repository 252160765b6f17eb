"""Blocks of similar images: each row once, whatever the order of the sums; very small ones get company."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small_models import small_model, small_processor

from macosnet_hf.bulk.blocks import LEAST_COMPANY, Block
from macosnet_hf.bulk.neighbours import divide, pooled_features
from macosnet_hf.bulk.rows import Row
from macosnet_hf.modeling_macosnet import MaCoSNetForKeypointMatching


def block_of(count: int) -> Block:
    return Block([Row(number, f"{number}.png", None, "x.png") for number in range(count)], ())


def kinds_of(count: int, kinds: int, noise: float = 0.1) -> np.ndarray:
    """Features of images of several kinds in turn."""
    random = np.random.default_rng(0)
    centres = np.eye(kinds, 16)
    found = centres[np.arange(count) % kinds] + noise * random.normal(size=(count, 16))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float16)


def numbers(rows) -> list[int]:
    return [row.number for row in rows]


@given(st.integers(1, 60), st.integers(2, 12), st.sets(st.integers(0, 59)))
def test_every_row_is_in_one_block(count, size, unreadable):
    features = kinds_of(count, 3)
    features[[number for number in unreadable if number < count]] = 0
    found = list(divide(block_of(count), features, size))
    assert sorted(number for block in found for number in numbers(block.rows)) == list(range(count))
    assert all(1 <= len(block.rows) <= size for block in found)
    assert all(not {*numbers(block.rows)} & {*numbers(block.company)} for block in found)


def test_images_of_one_kind_meet():
    found = list(divide(block_of(48), kinds_of(48, 6), 8))
    assert [len({number % 6 for number in numbers(block.rows)}) for block in found] == [1] * 6


def test_the_last_few_get_the_most_similar_ones_for_company():
    found = list(divide(block_of(34), kinds_of(34, 2), 16))
    assert [len(block.rows) for block in found] == [16, 16, 2]
    assert len(found[-1].company) == LEAST_COMPANY - 2
    kinds = {number % 2 for number in numbers(found[-1].rows)}
    assert {number % 2 for number in numbers(found[-1].company)} <= kinds


@pytest.mark.parametrize("count", [1, 5])
def test_few_images_stay_one_block_with_its_company(count):
    company = [Row(99, "99.png", None, "x.png")]
    (only,) = divide(block_of(count)._replace(company=company), kinds_of(count, 2), 5)
    assert (numbers(only.rows), only.company) == (list(range(count)), company)


def test_features_are_those_by_which_a_collection_chooses_partners():
    from macosnet_hf.collection import Collection, choose_partners

    random = np.random.default_rng(1)
    images = [
        Image.fromarray(random.integers(0, 255, (5, 7, 3), dtype=np.uint8)).resize((90, 70), Image.Resampling.BICUBIC)
        for _ in range(6)
    ]
    network = {"model": small_model(MaCoSNetForKeypointMatching), "processor": small_processor()}
    found = pooled_features([*images, None], **network).astype(np.float64)
    assert found.shape[0] == 7
    assert (found[-1] == 0).all()
    collection = Collection(**network)
    collection.add(images)
    others, similarity = choose_partners(collection.features(range(6)).last, 5)
    for number in range(6):
        expected = similarity[number].numpy()
        assert found[number] @ found[others[number].numpy()].T == pytest.approx(expected, abs=2e-3)
