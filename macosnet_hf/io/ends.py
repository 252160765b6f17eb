"""Standard streams and signals of a whole process: settings for programs of ours, not for a caller's."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType


def open_streams() -> None:
    """Opens what the caller has closed (`2>&-`), and lets no name end a run that the terminal cannot show.

    The first file that a program opens would take the place of the closed stream, and get its messages.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def flush_output() -> None:
    """Writes what was printed while a fault can still be told. After one, what is left vanishes: Python would try once
    more at its end, and complain.

    Raises:
        OSError: if it cannot be written; a `BrokenPipeError` where nobody reads it any more.
    """
    try:
        sys.stdout.flush()
    except OSError:
        close_output()
        raise


def close_output() -> None:
    """Lets everything that is printed from now on vanish."""
    with contextlib.suppress(OSError, ValueError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[list[signal.Signals]]:
    """Turns SIGTERM and SIGHUP into `SystemExit` with 128 + N, so that temporary files vanish; yields what has come.

    A signal that is ignored (`nohup`) stays so, and a process forked from this one ends at once, as it did before:
    what stands in this one's `finally` is not its to remove.
    """
    ended: list[signal.Signals] = []
    owner, before = os.getpid(), {}

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if not ended:  # a second one must not disturb the removal
            ended.append(signal.Signals(number))
            raise SystemExit(128 + number)

    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has one of them
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, end)
    try:
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


__all__ = ["close_output", "ended_by_signals", "flush_output", "open_streams"]
