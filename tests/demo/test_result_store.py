"""Results that visitors come back to: bounded in number and time, found by unguessable keys."""

import pytest

from macosnet_hf import InputError
from macosnet_hf.demo.result_store import KeptResults


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_the_longest_unused_result_goes_first():
    kept = KeptResults(limit=3, per_owner=10, seconds=100)
    first, second, third = (kept.keep(value) for value in "abc")
    assert kept.get(first) == "a"
    fourth = kept.keep("d")
    assert [kept.get(key) for key in (first, third, fourth)] == ["a", "c", "d"]
    with pytest.raises(InputError, match="no longer kept"):
        kept.get(second)
    assert len(kept) == 3


def test_a_busy_owner_pushes_out_only_the_own_results():
    kept = KeptResults(limit=100, per_owner=2, seconds=100)
    other = kept.keep("theirs", "other")
    own = [kept.keep(number, "busy") for number in range(5)]
    assert kept.get(other) == "theirs"
    assert [kept.get(key) for key in own[3:]] == [3, 4]
    with pytest.raises(InputError):
        kept.get(own[2])
    kept.forget("busy")
    assert len(kept) == 1


def test_results_expire_after_their_last_use():
    clock = Clock()
    kept = KeptResults(limit=10, per_owner=10, seconds=10, clock=clock)
    used, unused = kept.keep("used"), kept.keep("unused")
    clock.now = 6
    assert kept.get(used) == "used"
    clock.now = 12
    assert kept.get(used) == "used"
    with pytest.raises(InputError):
        kept.get(unused)
    clock.now = 30
    assert len(kept) == 0


def test_keys_are_long_and_of_any_type_refused():
    kept = KeptResults(limit=100, per_owner=10, seconds=10)
    keys = {kept.keep(None) for _ in range(50)}
    assert len(keys) == 50
    assert min(map(len, keys)) >= 24
    for key in (None, 3, ["x"], {}):
        with pytest.raises(InputError):
            kept.get(key)
