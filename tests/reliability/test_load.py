"""The quick form of tests/reliability/load.py; its long form and the figures are in docs/reliability.md."""

import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the demo needs gradio")
pytest.importorskip("psutil", reason="memory is measured with psutil")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "reliability"))
import load  # noqa: E402
from served_demo import served_demo  # noqa: E402

from macosnet_hf.demo.limits import STARTED  # noqa: E402


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    with served_demo(tmp_path_factory.mktemp("server"), max_waiting=8) as running:
        yield running


def test_clients_with_good_and_bad_requests_get_their_own_answers_and_leave_nothing_behind(demo, tmp_path):
    figures = load.hammer(demo, tmp_path, clients=3, seconds=8)
    assert figures.answered
    assert figures.refused + figures.abandoned > 0
    assert figures.wrong == []
    assert figures.failed == []
    assert max(gigabytes for _, gigabytes in figures.memory) < 2.5
    assert not load.left_behind(demo)
    assert load.tracebacks(demo) == []
    assert demo.process.poll() is None


def test_requests_over_the_limit_are_refused_and_the_others_answered(demo, tmp_path):
    ends = load.crowd(demo, tmp_path, 8 + STARTED["pair"] + 8)
    assert set(ends) == {"answered", "refused"}
    assert ends["answered"] >= 8
    assert load.crowd(demo, tmp_path, 1) == {"answered": 1}  # the queue is open again


def test_who_asks_for_the_same_again_takes_no_more_of_the_disk(demo, tmp_path):
    """Files are named after their content, so none may hold the time of day."""
    visitor = load.Visitor(demo.address, 9, tmp_path, {})
    assert visitor.collects
    files = demo.files()
    time.sleep(2.1)  # the clock of a zip goes in steps of two seconds
    visitor.good()
    assert demo.files() == files


def test_the_load_notices_an_answer_to_somebody_else(demo, tmp_path):
    """Else everything above would pass whatever the server answers."""
    damaged = load.damaged_files(tmp_path)
    one, other = (load.Visitor(demo.address, number, tmp_path, damaged) for number in (0, 1))
    for turn in range(9):
        one.bad(turn)  # each kind of bad request has its own refusal
    assert one.expected != other.expected
    one.own, one.size = other.own, other.size
    with pytest.raises(load.WrongAnswerError, match=r"not the one that came while it was quiet|an answer about"):
        one.good()
    other.damaged = {"good": (other.own, "is damaged")}
    with pytest.raises(load.WrongAnswerError, match="was answered"):
        other.bad(0)
