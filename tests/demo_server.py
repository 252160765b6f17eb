"""What the tests of the demo share: photos, a server of its own process, a matcher that counts."""

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

from gradio.media import get_image
from PIL import Image

import app
from macosnet_hf.demo.sessions import Stopped

ROOT = Path(__file__).resolve().parents[1]
CHEETAH, LION, TOWER = (get_image(name) for name in ("cheetah1.jpg", "lion.jpg", "tower.jpg"))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_app(*arguments: str, program: tuple[str, ...] = ("app.py",), **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *program, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
    )


class CountingMatcher(app.Matcher):
    """The real one; it knows how often photos went through the network, and can be made slow."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = 0
        self.collections = 0
        self.stopped = 0
        self.may_answer = threading.Event()
        self.may_answer.set()

    def pair(self, *arguments, **options):
        self.pairs += 1
        assert self.may_answer.wait(240)
        return super().pair(*arguments, **options)

    def collection(self, *arguments, **options):
        self.collections += 1
        try:
            return super().collection(*arguments, **options)
        except Stopped:
            self.stopped += 1
            raise


def save_large(path: str, size: tuple[int, int], target: Path) -> Path:
    with Image.open(path) as photo:
        photo.convert("RGB").resize(size).save(target, quality=90)
    return target
