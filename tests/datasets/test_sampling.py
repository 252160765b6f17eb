"""Pairs and triplets: balanced, seeded, the same for any number of workers."""

from collections import Counter

import numpy as np
import pytest
from archives import coseg

from macosnet_hf.datasets.benchmarks import iter_records
from macosnet_hf.datasets.sampling import GroupSampler
from macosnet_hf.errors import DataError, InputError

NAMES = ["cat"] * 50 + ["dog"] * 5 + ["owl"] * 3


def test_classes_are_balanced_however_many_images_they_have():
    groups = list(GroupSampler(NAMES, 2, seed=1, length=300))
    assert Counter(group.class_name for group in groups) == {"cat": 100, "dog": 100, "owl": 100}
    for start in range(0, 300, 3):
        assert {group.class_name for group in groups[start : start + 3]} == {"cat", "dog", "owl"}
    orders = {tuple(group.class_name for group in groups[start : start + 3]) for start in range(0, 300, 3)}
    assert len(orders) == 6  # not always the same class first


@pytest.mark.parametrize("size", [2, 3])
def test_members_are_different_images_of_the_class_and_all_get_their_turn(size):
    groups = list(GroupSampler(NAMES, size, seed=1, length=600))
    used = set()
    for group in groups:
        assert len(set(group.members)) == size == len(group.crops)
        assert {NAMES[index] for index in group.members} == {group.class_name}
        used.update(group.members)
    assert used == set(range(len(NAMES)))


def test_a_group_depends_on_seed_and_number_only():
    sampler = GroupSampler(NAMES, 2, seed=7, length=100)
    late = sampler[93]
    assert GroupSampler(NAMES, 2, seed=7, length=1000)[93] == late
    assert [GroupSampler(NAMES, 2, seed=8, length=100)[k] for k in range(20)] != [sampler[k] for k in range(20)]
    np.random.seed(5)
    assert sampler[93] == late


def first_only(batch):
    return batch


def test_the_number_of_workers_changes_nothing():
    from torch.utils.data import DataLoader

    sampler = GroupSampler(NAMES, 2, seed=3, length=40)
    found = [
        [
            group
            for batch in DataLoader(sampler, batch_size=4, num_workers=workers, collate_fn=first_only)
            for group in batch
        ]
        for workers in (0, 2)
    ]
    assert found[0] == found[1] == list(sampler)


def test_flips_are_common_to_a_group_and_crops_are_inside():
    groups = list(GroupSampler(NAMES, 3, seed=2, length=400, smallest_crop=0.7))
    assert 0.4 < np.mean([group.flip for group in groups]) < 0.6
    for group in groups:
        for x0, y0, x1, y1 in group.crops:
            assert 0 <= x0 < x1 <= 1
            assert 0 <= y0 < y1 <= 1
            assert 0.7 - 1e-9 <= x1 - x0 <= 1
            assert abs((x1 - x0) - (y1 - y0)) < 1e-9
    plain = GroupSampler(NAMES, 2, flip_probability=0, smallest_crop=1.0)[0]
    assert not plain.flip
    assert plain.crops == ((0, 0, 1, 1), (0, 0, 1, 1))


def test_what_cannot_be_sampled():
    with pytest.raises(DataError, match="owl"):
        GroupSampler(["cat", "cat", "owl"], 2)
    with pytest.raises(DataError, match="no image"):
        GroupSampler([], 2)
    with pytest.raises(InputError, match="triplet"):
        GroupSampler(NAMES, 4)
    with pytest.raises(InputError, match="smallest_crop"):
        GroupSampler(NAMES, 2, smallest_crop=0)
    with pytest.raises(IndexError):
        GroupSampler(NAMES, 2)[len(NAMES)]


def test_groups_of_a_real_folder(tmp_path):
    found = list(iter_records("coseg", coseg(tmp_path)))
    groups = list(GroupSampler([record["class_name"] for record in found], 2))
    assert len(groups) == len(found) > 0
    for group in groups:
        assert {found[index]["class_name"] for index in group.members} == {group.class_name}
