"""The demo in a process of its own, as a person starts it, and what its clients need: for the load and the timings."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from gradio.media import get_image
from gradio_client import Client, handle_file
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
_WITH_QUEUE = "import sys, app; from macosnet_hf.demo import limits; limits.MAX_WAITING = {}; sys.exit(app.main())"
PHOTOS = [get_image(name) for name in ("cheetah1.jpg", "lion.jpg", "cheetah.jpg", "tower.jpg")]


def enlarge(source: str, size: tuple[int, int], target: Path) -> Path:
    """A copy of an image in another size (width, height)."""
    with Image.open(source) as photo:
        photo.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(target, quality=90)
    return target


def match(client: Client, source: Path | None, target: Path | None, **options: object) -> tuple:
    """What `/match` answers."""
    files = [None if photo is None else handle_file(str(photo)) for photo in (source, target)]
    return client.predict(*files, **options, api_name="/match")


@dataclass(frozen=True)
class ServedDemo:
    """A running demo.

    Attributes:
        address: where it listens.
        process: of the server.
        uploads: the base folder of what was uploaded, and its results; each run has a folder in it.
        log: what it has printed so far, line by line.
    """

    address: str
    process: subprocess.Popen
    uploads: Path
    log: list[str]

    @property
    def scratch(self) -> Path:
        """Its folder for temporary files, which should be empty whenever nothing is computed."""
        (folder,) = self.uploads.glob("run-*/scratch")
        return folder

    def memory(self) -> float:
        """Resident memory of all its processes, in GB."""
        server = psutil.Process(self.process.pid)
        total = 0
        for one in (server, *server.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended since it was listed
                total += one.memory_info().rss
        return total / 1e9

    def files(self) -> tuple[int, float]:
        """How many files it keeps, and their size in MB."""
        sizes = []
        for path in self.uploads.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                if path.is_file():
                    sizes.append(path.stat().st_size)
        return len(sizes), sum(sizes) / 1e6


@contextlib.contextmanager
def served_demo(folder: Path, *, max_waiting: int | None = None) -> Iterator[ServedDemo]:
    """Starts the demo, and stops it as a person does.

    Args:
        folder: an empty folder of its own.
        max_waiting: how many requests may wait, instead of what the app allows.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    uploads = folder / "served"
    program = ["app.py"]
    if max_waiting is not None:
        program = ["-c", _WITH_QUEUE.format(max_waiting)]
    process = subprocess.Popen(
        [sys.executable, *program, "--port", port],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            **os.environ,
            **{"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"},
            **{"GRADIO_TEMP_DIR": str(uploads)},
        },
    )
    try:
        first = process.stdout.readline()
        found = re.match(r"Open (http://127\.0\.0\.1:\d+)/ ", first)
        if not found:
            process.kill()
            raise RuntimeError(f"The demo did not start: {first + process.communicate()[0]}")
        log: list[str] = []
        # Nobody else reads what it prints, and a full pipe would stop it.
        threading.Thread(target=lambda: log.extend(process.stdout), daemon=True).start()
        yield ServedDemo(found[1], process, uploads, log)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
