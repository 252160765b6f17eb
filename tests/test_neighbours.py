"""Neighbours in a collection: exact whatever the memory, blocks of similar images, a tree that connects all."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from macosnet_hf import neighbours
from macosnet_hf.neighbours import (
    choose_company,
    rank_others,
    similar_blocks,
    similarity_rows,
    spanning_pairs,
    unit_pooled,
)


@pytest.fixture
def unit():
    values = torch.randn(23, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return F.normalize(values, dim=1)


@pytest.mark.parametrize("at_once", [1, 60, 1_000_000])
def test_ranks_do_not_depend_on_the_rows_at_once(unit, monkeypatch, at_once):
    monkeypatch.setattr(neighbours, "_SIMILARITIES_AT_ONCE", at_once)
    ranks = [0, 1, 5, 0, 21]
    indices, values = rank_others(unit, ranks)
    for number in range(len(unit)):
        cosines = {other: float(unit[number] @ unit[other]) for other in range(len(unit)) if other != number}
        order = sorted(cosines, key=lambda other: -cosines[other])
        assert indices[number].tolist() == [order[rank] for rank in ranks]
        np.testing.assert_allclose(values[number], [cosines[order[rank]] for rank in ranks], atol=1e-12)
    some, _ = rank_others(unit, ranks, [7, 3])
    assert torch.equal(some, indices[[7, 3]])


def test_few_rows_are_in_memory_at_once(unit, monkeypatch):
    monkeypatch.setattr(neighbours, "_SIMILARITIES_AT_ONCE", 60)
    assert [tuple(rows.shape) for _, rows in similarity_rows(unit)] == [(2, 23)] * 11 + [(1, 23)]


def test_blocks_hold_each_image_once_and_similar_ones():
    kinds = torch.arange(30) % 3
    noise = 0.05 * torch.randn(30, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    unit = F.normalize(torch.eye(8, dtype=torch.float64)[kinds] + noise, dim=1)
    blocks = list(similar_blocks(unit, range(30), 5))
    assert sorted(itertools.chain(*blocks)) == list(range(30))
    assert [len(block) for block in blocks] == [5] * 6
    assert all(len(set(kinds[block].tolist())) == 1 for block in blocks)
    assert blocks[0][0] == 0
    assert sorted(itertools.chain(*similar_blocks(unit, [4, 9, 4, 11], 2))) == [4, 9, 11]


def test_company_are_the_four_nearest_of_each_and_eight_in_all(unit):
    order = {number: rank_others(unit, range(22), [number])[0][0].tolist() for number in range(23)}
    assert choose_company(unit, [2]) == order[2][:8]
    company = choose_company(unit, [2, 5, 7, 9])
    nearest = {other for number in (2, 5, 7, 9) for other in order[number][:4]} - {2, 5, 7, 9}
    assert nearest <= set(company)
    assert len(company) == len(set(company)) == max(8, len(nearest))
    assert not {2, 5, 7, 9} & set(company)
    assert choose_company(unit, [2, 5, 7, 9], 3) == company[:3]
    assert sorted(choose_company(unit[:5], [0, 3])) == [1, 2, 4]
    assert choose_company(unit[:1], [0]) == []


def test_the_tree_is_the_best_of_all_trees():
    """Of six images, by trying all 1,296 trees."""
    unit = F.normalize(torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), dim=1)
    similarity = unit @ unit.t()
    edges = list(itertools.combinations(range(6), 2))

    def connects(tree):
        seen, waiting = {0}, [0]
        while waiting:
            here = waiting.pop()
            for edge in tree:
                if here in edge:
                    (there,) = set(edge) - {here}
                    if there not in seen:
                        seen.add(there)
                        waiting.append(there)
        return len(seen) == 6

    best = max(
        sum(float(similarity[edge]) for edge in tree) for tree in itertools.combinations(edges, 5) if connects(tree)
    )
    found = spanning_pairs(unit)
    assert connects([tuple(pair) for pair in found.tolist()])
    assert float(similarity[found[:, 0], found[:, 1]].sum()) == pytest.approx(best)
    assert spanning_pairs(unit[:1]).shape == (0, 2)


def test_pooled_features_have_unit_length():
    maps = torch.randn(40, 5, 3, 4)
    expected = F.normalize(maps.double().mean((2, 3)), dim=1)
    torch.testing.assert_close(unit_pooled(maps), expected, rtol=0, atol=1e-12)
