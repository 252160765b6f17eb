"""Images of visitors are read in processes of their own: the same pixels, and no file that holds or ends the server."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the demo needs gradio")
from demo_server import CHEETAH, LION, save_large

import app
from macosnet_hf import ImageError, InputError
from macosnet_hf.demo import downloads, limits
from macosnet_hf.demo.reading import PhotoReader
from macosnet_hf.io.image_files import load_image
from macosnet_hf.io.working_copy import open_working_copy

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "reliability"))
import bombs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limits of a process are tried on Linux")


@pytest.fixture(scope="module")
def reader():
    made = PhotoReader()
    yield made
    made.close()


def small_reader(monkeypatch, **lanes):
    """A reader with other limits."""
    for name, value in lanes.items():
        monkeypatch.setattr(limits, name, value)
    return PhotoReader()


def processes() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "reading_worker" in " ".join(child.cmdline())]


@pytest.mark.parametrize("size", [(256, 256), (1500, 1003)])
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_a_photo_is_the_one_that_the_library_reads(reader, tmp_path, size, suffix):
    path = tmp_path / f"photo.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(LION) as lion:
        lion.convert("RGB").resize(size).save(path, exif=exif)
    here, there = open_working_copy(path), reader.working_copy(str(path))
    assert (there.size, there.name, there.is_whole) == (here.size, here.name, here.is_whole)
    np.testing.assert_array_equal(np.asarray(there.image), np.asarray(here.image))
    np.testing.assert_array_equal(np.asarray(there.open_original()), np.asarray(load_image(path)))


def test_what_the_library_says_of_a_file_is_said(reader, tmp_path):
    (tmp_path / "letter.jpg").write_text("This is a letter. " * 20)
    with pytest.raises(ImageError, match=r"^'letter\.jpg' is not an image"):
        reader.working_copy(str(tmp_path / "letter.jpg"))
    with pytest.raises(ImageError, match=r"^'gone\.jpg' does not exist"):
        reader.working_copy(str(tmp_path / "gone.jpg"))


def test_a_file_that_browsers_do_not_show_becomes_a_png(reader, tmp_path):
    path = tmp_path / "scan.tif"
    with Image.open(LION) as lion:
        lion.save(path)
    made = reader.for_browser(str(path), str(tmp_path))
    assert made.suffix == ".png"
    np.testing.assert_array_equal(np.asarray(load_image(made)), np.asarray(load_image(path)))
    assert reader.for_browser(LION, str(tmp_path)) is None


def test_a_process_that_was_killed_is_replaced(reader):
    reader.working_copy(LION)
    for process in processes():
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert reader.working_copy(LION).size == (256, 256)


def test_a_file_that_takes_too_long_is_refused_once_and_for_all(monkeypatch, tmp_path):
    """Segments without end: PIL takes 7 s to reach the image."""
    reader = small_reader(monkeypatch, QUICK_READING=(0.2, 10**8, 1, 4, 0), SLOW_READING=(0.6, 10**9, 1, 4, 0))
    path = tmp_path / "segments.jpg"
    path.write_bytes(bombs.jpeg_segments(7_000_000))
    try:
        reader.start()
        with pytest.raises(ImageError, match=r"'segments\.jpg' takes too much time or memory"):
            reader.working_copy(str(path))
        began = time.monotonic()
        with pytest.raises(ImageError, match="takes too much time"):
            reader.working_copy(str(path))
        assert time.monotonic() - began < 0.1, "it is not read again"
        assert reader.working_copy(LION).size == (256, 256)
    finally:
        reader.close()


def test_memory_beyond_the_limit_of_a_process_is_not_given(monkeypatch, tmp_path):
    """Also where the estimate is wrong; here the limit is that of a process which may take what it likes."""
    reader = small_reader(monkeypatch, QUICK_READING=(5, 10**8, 1, 4, 0), SLOW_READING=(5, 10**8, 1, 4, 0))
    monkeypatch.setattr("macosnet_hf.demo.reading.Lane.settings", lambda _: LAVISH)
    path = tmp_path / "flat.png"
    path.write_bytes(bombs.flat("PNG", "RGB", 7000, compress_level=1))
    try:
        with pytest.raises(ImageError, match="memory"):
            reader.working_copy(str(path))
    finally:
        reader.close()


LAVISH = '{"seconds": 9, "memory": 250000000, "nice": 0, "limits": {"max_pixels": 100000000, "max_bytes": 2000000000}}'


def test_a_large_image_goes_to_the_slow_lane_and_a_small_one_passes_it(monkeypatch, tmp_path):
    reader = small_reader(monkeypatch, QUICK_READING=(5, 10**7, 1, 4, 0), SLOW_READING=(9, 10**9, 1, 0, 0))
    large = tmp_path / "large.png"
    large.write_bytes(bombs.flat("PNG", "RGBA", 3000, compress_level=1))
    try:
        assert reader.working_copy(str(large)).size == (3000, 3000)
        with reader._slow._process():  # somebody's image is being read there
            busy = threading.Event()

            def wait() -> None:
                reader._slow._places.acquire()
                busy.set()

            threading.Thread(target=wait).start()
            assert busy.wait(10)
            with pytest.raises(InputError, match="busy with large photos"):
                reader.working_copy(str(large))
            assert reader.working_copy(LION).size == (256, 256)
        reader._slow._places.release()
        assert reader.working_copy(str(large)).size == (3000, 3000)
    finally:
        reader.close()


def test_closing_ends_what_is_being_read(monkeypatch, tmp_path):
    """Else the server would not end before its slowest file."""
    reader = small_reader(monkeypatch, QUICK_READING=(60, 10**8, 1, 4, 0), SLOW_READING=(60, 10**9, 1, 4, 0))
    path = tmp_path / "segments.jpg"
    path.write_bytes(bombs.jpeg_segments(7_000_000))
    others = {process.pid for process in processes()}  # of a demo that another test of this process serves
    reader.start()
    ended = []

    def read() -> None:
        with pytest.raises((ImageError, InputError)):
            reader.working_copy(str(path))
        ended.append(time.monotonic())

    threads = [threading.Thread(target=read) for _ in range(3)]  # one reads, two wait
    for thread in threads:
        thread.start()
    time.sleep(1)
    began = time.monotonic()
    reader.close()
    for thread in threads:
        thread.join(20)
    assert len(ended) == 3
    assert max(ended) - began < 15  # the file alone takes longer, but the machine may be busy
    left = [process for process in processes() if process.pid not in others]
    assert not [process for process in left if process.is_running() and process.status() != "zombie"]


def test_no_token_reaches_a_process_that_reads(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf" + "_" + "s3cr3T" * 6)
    reader = PhotoReader()
    try:
        reader.working_copy(LION)
        (names,) = {frozenset(process.environ()) for process in processes() if process.ppid() == os.getpid()}
        assert "HF_TOKEN" not in names
    finally:
        reader.close()


def test_the_model_of_the_demo_decodes_nothing_itself(monkeypatch, tmp_path):
    def decode(*_, **__):
        raise AssertionError("decoded in the server")

    matcher = app.Matcher()
    matcher.load()
    large = str(save_large(LION, (1300, 900), tmp_path / "large.jpg"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    try:
        pair = matcher.pair(large, CHEETAH, "none")
        assert pair.copies[0].open_original().size == (1300, 900)
        assert len(matcher.collection([large, CHEETAH], "none", None).copies) == 2
    finally:
        matcher.reader.close()


def test_results_as_large_as_the_originals_wait_for_one_another(monkeypatch):
    monkeypatch.setattr(limits, "WHOLE_PIXELS", 100)
    entered, most = [], 0
    lock, now = threading.Lock(), [0]

    def make(side: int) -> None:
        nonlocal most
        with downloads.whole_images([(side, side), (1, 1)]):
            with lock:
                now[0] += min(side * side, 100)
                most = max(most, now[0])
            time.sleep(0.02)
            with lock:
                now[0] -= min(side * side, 100)
                entered.append(side)

    threads = [threading.Thread(target=make, args=(side,)) for side in (5, 7, 9, 50, 6, 10, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(entered) == 7
    assert most <= 100
