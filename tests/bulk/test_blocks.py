"""Blocks and shards depend on the rows alone, hold few of them at a time, and lose none."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from macosnet_hf.bulk import blocks as blocks_module
from macosnet_hf.bulk.blocks import LEAST_COMPANY, cut_blocks, gather_shards
from macosnet_hf.bulk.rows import Row


def rows_of(groups, image: bytes | str = "x.png") -> list[Row]:
    return [Row(number, f"{number}.png", group, image) for number, group in enumerate(groups)]


def numbers(rows) -> list[int]:
    return [row.number for row in rows]


@given(st.lists(st.sampled_from(["a", "b", None, "d"])), st.integers(2, 9))
def test_every_row_is_in_one_block_of_its_group(groups, size):
    found = list(cut_blocks(rows_of(groups), size))
    assert sorted(number for block in found for number in numbers(block.rows)) == list(range(len(groups)))
    for block in found:
        assert 1 <= len(block.rows) <= size
        assert len({row.group for row in (*block.rows, *block.company)}) == 1
        assert numbers(block.rows) == sorted(numbers(block.rows))
        assert not {*numbers(block.rows)} & {*numbers(block.company)}


def test_a_small_rest_of_a_group_gets_company_from_the_block_before_it():
    first, rest = cut_blocks(rows_of(["cup"] * 33), 32)
    assert (len(first.rows), first.company) == (32, ())
    assert numbers(rest.rows) == [32]
    assert numbers(rest.company) == list(range(25, 32))
    assert len(rest.rows) + len(rest.company) == LEAST_COMPANY


def test_a_group_of_one_image_has_no_company():
    cup, dog = cut_blocks(rows_of(["cup", *["dog"] * 5]), 32)
    assert (numbers(cup.rows), cup.company) == ([0], ())
    assert (numbers(dog.rows), dog.company) == ([1, 2, 3, 4, 5], ())


def test_few_rows_wait_however_many_groups_are_mixed(monkeypatch):
    monkeypatch.setattr(blocks_module, "_WAITING_ROWS", 20)
    taken = 0

    def stream() -> Iterator[Row]:
        nonlocal taken
        for row in rows_of([f"group {number % 15}" for number in range(600)]):
            taken += 1
            yield row

    done = 0
    for block in cut_blocks(stream(), 8):
        done += len(block.rows)
        assert taken - done <= 21
    assert done == 600


@pytest.mark.parametrize(("limit", "count"), [("_WAITING_BYTES", 3), ("_REMEMBERED_BYTES", 2)])
def test_images_inside_of_rows_are_bounded_in_bytes(monkeypatch, limit, count):
    monkeypatch.setattr(blocks_module, limit, 1000 * count)
    found = list(cut_blocks(rows_of([f"group {number % 10}" for number in range(50)], b"x" * 1000), 8))
    assert sorted(number for block in found for number in numbers(block.rows)) == list(range(50))
    if limit == "_WAITING_BYTES":
        assert max(len(block.rows) for block in found) <= count + 1


def test_shards_have_as_many_rows_as_asked_for_and_one_digest_for_the_same_rows():
    rows = rows_of(["cup"] * 25 + ["dog"] * 13)
    shards = list(gather_shards(cut_blocks(rows, 5), 10))
    assert [shard.number for shard in shards] == [0, 1, 2, 3]
    assert [sum(len(block.rows) for block in shard.blocks) for shard in shards] == [10, 10, 10, 8]
    assert [shard.digest for shard in gather_shards(cut_blocks(rows, 5), 10)] == [shard.digest for shard in shards]
    changed = [*rows[:30], rows[30]._replace(id="other.png"), *rows[31:]]
    same = [a.digest == b.digest for a, b in zip(shards, gather_shards(cut_blocks(changed, 5), 10), strict=True)]
    assert same == [True, True, True, False]
