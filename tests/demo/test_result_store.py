"""The store of results: how many, how long, for whom."""

import pytest

from macosnet_hf import InputError
from macosnet_hf.demo.result_store import ResultStore


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_the_longest_unused_result_goes_first():
    store = ResultStore(limit=3, per_owner=10, seconds=100)
    first, second, third = (store.add(value) for value in "abc")
    assert store.get(first) == "a"
    fourth = store.add("d")
    assert [store.get(key) for key in (first, third, fourth)] == ["a", "c", "d"]
    with pytest.raises(InputError, match="no longer available"):
        store.get(second)
    assert len(store) == 3


def test_a_busy_owner_pushes_out_only_the_own_results():
    store = ResultStore(limit=100, per_owner=2, seconds=100)
    other = store.add("theirs", "other")
    own = [store.add(number, "busy") for number in range(5)]
    assert store.get(other) == "theirs"
    assert [store.get(key) for key in own[3:]] == [3, 4]
    with pytest.raises(InputError):
        store.get(own[2])
    store.drop_all_of("busy")
    assert len(store) == 1


def test_results_expire_after_their_last_use():
    clock = Clock()
    store = ResultStore(limit=10, per_owner=10, seconds=10, clock=clock)
    used, unused = store.add("used"), store.add("unused")
    clock.now = 6
    assert store.get(used) == "used"
    clock.now = 12
    assert store.get(used) == "used"
    with pytest.raises(InputError):
        store.get(unused)
    clock.now = 30
    assert len(store) == 0


def test_a_result_gets_another_owner_and_is_spared():
    store = ResultStore(limit=10, per_owner=2, seconds=10)
    first, second, third = (store.add(name, owner) for name, owner in (("a", "old"), ("b", "old"), ("c", "new")))
    assert store.adopt(first, "new") == "a"
    store.drop_all_of("old", but=second)
    assert [store.get(key) for key in (first, second, third)] == ["a", "b", "c"]
    store.add("d", "new")  # its third
    with pytest.raises(InputError):
        store.get(first)
    store.drop_all_of("new")
    assert [store.get(second), len(store)] == ["b", 1]
    with pytest.raises(InputError, match="no longer available"):
        store.adopt(third, "new")


def test_keys_are_long_and_of_any_type_refused():
    store = ResultStore(limit=100, per_owner=10, seconds=10)
    keys = {store.add(None) for _ in range(50)}
    assert len(keys) == 50
    assert min(map(len, keys)) >= 24
    for key in (None, 3, ["x"], {}):
        with pytest.raises(InputError):
            store.get(key)
