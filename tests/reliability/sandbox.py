"""Work in child processes with a limit on time and memory, so that a crash or a hang is counted and not suffered."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECONDS = 5
MEGABYTES = 1024
_HANG_SECONDS = 600  # of the clock: a child that sleeps for ever uses no processor time
OUTCOMES = ("handled", "typed error", "other error", "crash", "too slow", "left files")


@dataclass
class Tally:
    """What became of the inputs of one kind.

    Attributes:
        counts: number by outcome.
        slowest: processor seconds of the slowest input.
        memory: megabytes by which a child grew at most.
        faults: the inputs that ended in neither of the two good outcomes.
    """

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    slowest: float = 0.0
    memory: float = 0.0
    faults: list[dict[str, Any]] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def add(self, number: int, outcome: str, seconds: float = 0.0, memory: float = 0.0, detail: str = "") -> None:
        self.counts[outcome] += 1
        self.slowest = max(self.slowest, seconds)
        self.memory = max(self.memory, memory)
        if outcome not in ("handled", "typed error"):
            self.faults.append({"number": number, "outcome": outcome, "detail": detail})


# `place(number, folder)` puts an input into an empty folder; what it returns does the reading.
Place = Callable[[int, Path], Callable[[], Any]]


def run_numbers(
    place: Place, numbers: Sequence[int], scratch: Path, good_errors: tuple[type[BaseException], ...]
) -> Tally:
    """Treats all numbers, each in a child; a child that dies is replaced and the next number goes on.

    Args:
        place: see above; called in the child.
        numbers: of the inputs.
        scratch: an empty folder for the children.
        good_errors: the library's own kinds.
    """
    tally, waiting = Tally(), list(numbers)
    while waiting:
        done = _one_child(place, waiting, scratch, good_errors, tally)
        waiting = waiting[done:]
    return tally


def _one_child(
    place: Place,
    numbers: Sequence[int],
    scratch: Path,
    good_errors: tuple[type[BaseException], ...],
    tally: Tally,
) -> int:
    """Runs one child until it is through or dies; returns how many numbers are settled."""
    folder = scratch / "child"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            _child(place, numbers, folder, good_errors, writing)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(3)
    os.close(writing)
    settled, killed, text = 0, False, b""
    with os.fdopen(reading, "rb", buffering=0) as stream:
        while True:
            if not select.select([stream], [], [], _HANG_SECONDS)[0]:
                os.kill(child, signal.SIGKILL)
                killed = True
                break
            block = stream.read(65536)
            if not block:
                break
            text += block
            *lines, text = text.split(b"\n")
            for line in lines:
                tally.add(*json.loads(line))
                settled += 1
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 3:
        raise RuntimeError("The harness itself failed; see above.")
    if settled < len(numbers):
        number = numbers[settled]
        slow = killed or status == -signal.SIGXCPU
        tally.add(number, "too slow" if slow else "crash", detail=f"child ended with {status}")
        settled += 1
    return settled


def _child(
    place: Place, numbers: Sequence[int], folder: Path, good_errors: tuple[type[BaseException], ...], pipe: int
) -> None:
    """Writes a line `[number, outcome, seconds, megabytes, detail]` for each input."""
    silence = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):  # libtiff and others complain to the descriptor itself
        os.dup2(silence, descriptor)
    for name in ("tmp", "cwd"):
        (folder / name).mkdir()
    os.environ["TMPDIR"] = str(folder / "tmp")
    import tempfile

    tempfile.tempdir = None
    os.chdir(folder / "cwd")
    limit_memory(MEGABYTES)
    start = _resident()
    for number in numbers:
        inside = folder / "input"
        if not inside.exists():
            inside.mkdir()
        limit_seconds(SECONDS)
        read = place(number, inside)
        before = _everything(folder)
        began = time.process_time()
        outcome, detail = "handled", ""
        try:
            read()
        except good_errors:
            outcome = "typed error"
        except BaseException as error:
            outcome = "other error"
            lines = traceback.format_exception(error, limit=-3)
            detail = "".join(lines)[-1500:]
        seconds = time.process_time() - began
        if seconds > SECONDS:
            outcome = "too slow"
        left = _everything(folder) ^ before
        if left:
            outcome, detail = "left files", str(sorted(left)[:5])
            for name in left:
                with contextlib.suppress(OSError):
                    os.remove(folder / name)
        report = [number, outcome, round(seconds, 4), round(_resident() - start, 1), detail]
        os.write(pipe, json.dumps(report).encode("ascii") + b"\n")


def limit_memory(megabytes: int) -> None:
    """This process may take so much more than it has now."""
    with open("/proc/self/status", encoding="ascii") as status:
        now = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
    limit = now + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def limit_seconds(seconds: int) -> None:
    """This process dies of SIGXCPU when it has used so much more processor time than now (and up to a second more)."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    used = int(usage.ru_utime + usage.ru_stime)
    resource.setrlimit(resource.RLIMIT_CPU, (used + seconds + 1, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _resident() -> float:
    """Megabytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _everything(folder: Path) -> set[str]:
    found = set()
    for root, folders, files in os.walk(folder):
        found |= {os.path.relpath(os.path.join(root, name), folder) for name in (*folders, *files)}
    return found
