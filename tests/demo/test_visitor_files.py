"""Nothing of a visitor outlives its time: not a run that is told to end, and not one that is killed."""

import os
import re
import signal
import socket
import stat
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the demo needs gradio")
import httpx
from demo_server import LION, free_port, start_app

from macosnet_hf.demo import limits
from macosnet_hf.demo.visitor_files import VARIABLE, folder_of_a_run, sweep

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals")


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


# A server that starts when everything that is there has reached its limit.
LATER = """
import sys, time
from macosnet_hf.demo import limits, visitor_files
sweep, later = visitor_files.sweep, time.time() + limits.FILE_SECONDS + 1
visitor_files.sweep = lambda base: sweep(base, later)
import app
sys.exit(app.main(sys.argv[1:]))
"""


def started(folder: Path, *program: str):
    process = start_app("--port", str(free_port()), program=program or ("app.py",), **{VARIABLE: str(folder)})
    line = process.stdout.readline()
    found = re.match(r"Open http://127\.0\.0\.1:(\d+)/ ", line)
    if not found:
        process.kill()
        pytest.fail(line + process.communicate()[0])
    threading.Thread(target=process.stdout.read, daemon=True).start()
    return process, int(found[1])


def upload(port: int, content: bytes) -> Path:
    files = {"files": ("photo.jpg", content)}
    return Path(httpx.post(f"http://127.0.0.1:{port}/gradio_api/upload", files=files, timeout=60).json()[0])


def cut_off(port: int, folder: Path) -> None:
    """An upload of which only a part arrives in a base folder."""
    before = set(files_of(folder))
    with socket.create_connection(("127.0.0.1", port)) as connection:
        head = '--b\r\nContent-Disposition: form-data; name="files"; filename="cut.jpg"\r\n\r\n'
        connection.sendall(
            b"POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9000000\r\n"
            b"Content-Type: multipart/form-data; boundary=b\r\n\r\n" + head.encode() + bytes(200_000)
        )
        while set(files_of(folder)) <= before:
            time.sleep(0.01)


def test_files_are_gone_after_sigterm_and_after_sigkill_and_a_restart(tmp_path):
    process, port = started(tmp_path)
    left = upload(port, Path(LION).read_bytes())
    assert left.is_relative_to(tmp_path)
    cut_off(port, tmp_path)
    process.kill()
    process.wait()
    assert left in files_of(tmp_path)
    (killed,) = tmp_path.glob("run-*")

    process, port = started(tmp_path, "-c", LATER)
    assert not files_of(killed)
    assert upload(port, Path(LION).read_bytes()).is_relative_to(tmp_path)
    cut_off(port, tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert not files_of(tmp_path)
    assert set(tmp_path.glob("run-*")) <= {killed}  # without files


def test_age_decides_what_is_swept(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "FILE_SECONDS", 1)
    for name in ("a/old.jpg", "a/b/old.png", "tmpcutoff"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (outside / "mine.txt").write_text("mine")
    (tmp_path / "link").symlink_to(outside)
    time.sleep(1.2)
    (tmp_path / "a" / "new.jpg").write_bytes(b"x")
    sweep(tmp_path)
    assert [path.name for path in files_of(tmp_path)] == ["new.jpg"]
    assert (outside / "mine.txt").read_text() == "mine"
    sweep(tmp_path, time.time() + 5)
    assert not files_of(tmp_path)


def test_a_run_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    before = tempfile.gettempdir()
    with folder_of_a_run() as base:
        assert base == tmp_path
        served, scratch = Path(os.environ[VARIABLE]), Path(tempfile.gettempdir())
        assert served.is_relative_to(tmp_path)
        assert scratch.is_relative_to(tmp_path)
        assert not scratch.is_relative_to(served), "what is served must not include what is being made"
        for folder in (served, scratch, served.parent):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        Image.new("RGB", (9, 9)).save(served / "a.png")
        with folder_of_a_run():  # another server on the same machine
            assert os.environ[VARIABLE] != str(served)
        assert (served / "a.png").exists()
    assert not list(tmp_path.iterdir())
    assert (os.environ[VARIABLE], tempfile.gettempdir()) == (str(tmp_path), before)


def test_a_folder_that_somebody_else_made_is_not_used(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (tmp_path / f"macosnet-demo-{os.getuid()}").symlink_to(theirs)
    with folder_of_a_run():
        assert not Path(os.environ[VARIABLE]).resolve().is_relative_to(theirs)
    assert not list(theirs.iterdir())
