"""Reads visitors' photos in processes of their own, so that no file can hold or end the server.

A quick lane reads what its header says to be small; a file that is large, or takes longer than that, goes to the slow
lane: one process of low priority, for which few may wait. So a good photo does not wait for a large one, and at most
one large image is decoded at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachetools import TTLCache
from PIL import Image

from ..errors import ImageError, InputError
from ..io.working_copy import WORKING_SIDE, WorkingCopy
from . import limits

_BUSY = "The server is busy with large photos; try again in a minute."
_MEMORY_OF_PYTHON = 200_000_000  # bytes that a process has before it reads anything, with room


@dataclass(frozen=True)
class Lane:
    """What a process of one kind may take for a file."""

    seconds: float
    max_bytes: int
    processes: int
    waiting: int
    nice: int = 0

    def settings(self) -> str:
        most = {"max_pixels": limits.MAX_PIXELS, "max_bytes": self.max_bytes}
        memory = int(1.2 * self.max_bytes) + _MEMORY_OF_PYTHON
        return json.dumps({"seconds": self.seconds, "memory": memory, "nice": self.nice, "limits": most})


class PhotoReader:
    """Reads image files for many threads; the processes start with the first file."""

    def __init__(self) -> None:
        self._quick = _Pool(Lane(*limits.QUICK_READING))
        self._slow = _Pool(Lane(*limits.SLOW_READING))
        self._refused: TTLCache[str, str] = TTLCache(1024, limits.RESULT_SECONDS)
        self._lock = threading.Lock()

    def working_copy(self, path: str, name: str | None = None, side: int = WORKING_SIDE) -> WorkingCopy:
        """[`~macosnet_hf.io.working_copy.open_working_copy`], which never decodes in this process again.

        Raises:
            ImageError: if the file cannot be read, or costs more than a limit.
            InputError: if too many others wait.
        """
        name = name or os.path.basename(path)
        answer, pixels = self._read(name, do="working_copy", path=path, name=name, side=side)
        return WorkingCopy(path, name, _image(answer, pixels), tuple(answer["size"]), self.whole)

    def whole(self, path: str | os.PathLike[str]) -> Image.Image:
        """[`~macosnet_hf.io.image_files.load_image`]."""
        return _image(*self._read(os.path.basename(path), do="whole", path=os.fspath(path)))

    def for_browser(self, path: str, folder: str) -> Path | None:
        """[`~macosnet_hf.io.working_copy.for_browser`]."""
        made = self._read(os.path.basename(path), do="for_browser", path=path, folder=folder)[0]["file"]
        return made and Path(made)

    def start(self) -> None:
        """Starts the processes, so that the first file does not wait for them."""
        self._quick.start()
        self._slow.start()

    def close(self) -> None:
        """Ends the processes."""
        self._quick.close()
        self._slow.close()

    def _read(self, label: str, **request: Any) -> tuple[dict[str, Any], bytes]:
        path = request["path"]
        with self._lock:
            refusal = self._refused.get(path)
        if refusal is not None:  # a file that took a limit's time once does not take it again
            raise ImageError(refusal)
        line = json.dumps(request).encode() + b"\n"
        for pool in (self._quick, self._slow):
            try:
                answer, pixels = pool.ask(line)
            except EOFError:
                continue
            if "error" not in answer:
                return answer, pixels
            if pool is self._slow or not answer.get("large"):
                raise ImageError(answer["error"])
        refusal = f"'{label}' takes too much time or memory to read; save it as a JPEG, smaller, and try again."
        with self._lock:
            self._refused[path] = refusal
        raise ImageError(refusal)


def _image(answer: dict[str, Any], pixels: bytes) -> Image.Image:
    return Image.frombytes("RGB", tuple(answer["pixels"]), pixels)


class _Pool:
    """Processes of one lane. One that ended is started anew for the next file."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._free: queue.SimpleQueue[subprocess.Popen[bytes] | None] = queue.SimpleQueue()
        for _ in range(lane.processes):
            self._free.put(None)
        self._places = threading.Semaphore(lane.processes + lane.waiting)
        self._running: set[subprocess.Popen[bytes]] = set()
        self._closed = False

    def ask(self, line: bytes) -> tuple[dict[str, Any], bytes]:
        """The answer to a request, and its pixels.

        Raises:
            EOFError: if the process exceeded a limit.
            InputError: if too many others wait, or this took too long on a busy machine.
        """
        if self._closed or not self._places.acquire(blocking=False):
            raise InputError(_BUSY)
        try:
            with self._process() as process:
                return self._exchange(process, line)
        finally:
            self._places.release()

    @contextlib.contextmanager
    def _process(self) -> Iterator[subprocess.Popen[bytes]]:
        try:
            process = self._free.get(timeout=limits.READING_PATIENCE)
        except queue.Empty:
            raise InputError(_BUSY) from None
        try:
            if self._closed:
                raise InputError(_BUSY)
            if process is not None and process.poll() is not None:
                self._running.remove(process)
                process = None
            if process is None:
                process = _started(self._lane)
                self._running.add(process)
            yield process
        finally:
            self._free.put(process)

    def _exchange(self, process: subprocess.Popen[bytes], line: bytes) -> tuple[dict[str, Any], bytes]:
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        # Wall time as well: a process may wait for something, or for its turn on a busy machine.
        alarm = threading.Timer(limits.READING_PATIENCE, end)
        alarm.daemon = True
        alarm.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            head = process.stdout.readline()
            if not head.endswith(b"\n"):
                raise EOFError
            answer = json.loads(head)
            width, height = answer.get("pixels", (0, 0))
            pixels = process.stdout.read(3 * width * height)
            if len(pixels) < 3 * width * height:
                raise EOFError
            return answer, pixels
        except (EOFError, OSError, ValueError) as error:
            process.kill()
            process.communicate()
            if late.is_set():
                raise InputError(_BUSY) from error
            raise EOFError from error
        finally:
            alarm.cancel()

    def start(self) -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(self._lane.processes):
                stack.enter_context(self._process())

    def close(self) -> None:
        """Ends the processes, also those that read; whoever waits for one is told so at once."""
        self._closed = True
        for process in list(self._running):
            process.kill()
            process.wait()


def _started(lane: Lane) -> subprocess.Popen[bytes]:
    """A new process, without the tokens that may be in this one's environment."""
    passed = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT") if name in os.environ}
    one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "macosnet_hf.demo.reading_worker", lane.settings()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**passed, **one, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
