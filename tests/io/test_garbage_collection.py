"""The garbage collector stays out of the way of large imports, and does its work again afterwards."""

import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from macosnet_hf.io.memory import collector_paused

ROOT = Path(__file__).resolve().parents[2]


class Node:
    """Refers to itself, so that only the collector can remove it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def collections():
    """Generation and objects that were looked at, of every collection while the test runs."""
    seen = []

    def note(phase, info):
        if phase == "start":
            seen.append((info["generation"], len(gc.get_objects(generation=0))))

    gc.callbacks.append(note)
    yield seen
    gc.callbacks.remove(note)


def test_nothing_is_collected_inside_nor_much_at_once_afterwards(collections):
    with collector_paused():
        held = [[number] for number in range(200_000)]
        assert collections == []
    rest = [[number] for number in range(2_000)]
    assert collections, "the collector is on again"
    assert max(young for _, young in collections) < 10_000
    assert len(held) + len(rest) == 202_000


def test_garbage_from_inside_is_collected_later():
    with collector_paused():
        node = weakref.ref(Node())
    assert node() is not None
    gc.collect()
    assert node() is None


def test_where_the_collector_was_off_it_stays_off():
    gc.disable()
    try:
        with collector_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_what_somebody_has_frozen_stays_frozen():
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        with collector_paused():
            held = [[number] for number in range(1000)]
        assert frozen > 0
        assert abs(gc.get_freeze_count() - frozen) < len(held)
    finally:
        gc.unfreeze()


def test_a_command_ends_without_a_last_collection():
    code = (
        "import atexit, gc, sys; atexit.register(lambda: print('frozen', gc.get_freeze_count()));"
        "from macosnet_hf.commands.main import main; main(['match', 'no.jpg', 'no.jpg'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    word, count = done.stdout.split()
    assert (word, int(count) > 1000) == ("frozen", True), done.stderr
