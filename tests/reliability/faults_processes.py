"""Pieces of work in processes of their own, killed or told to end: what tests/reliability/faults.py starts."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Work = Callable[[], Any]
PATIENCE = 900  # seconds after which a run counts as hanging


class Run:
    """A piece of work in a process of its own, with what it says in a file."""

    def __init__(self, work: Work, says: Path) -> None:
        self.says = says
        ready, tell = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a bench that runs under nohup ignores it
            os.close(ready)
            with open(says, "w") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            os.write(tell, b"r")
            os.close(tell)
            faulthandler.dump_traceback_later(PATIENCE - 30, file=sys.__stderr__)
            # Whatever happens in it ends here: an exception of a signal handler (that of torch for a dead worker
            # comes at any line) would otherwise unwind this fork through `main`, which deletes the scratch folder.
            code = 1
            try:
                code = _exit_code(work)
            finally:
                os._exit(code)
        os.close(tell)
        os.read(ready, 1)
        os.close(ready)
        self.began = time.monotonic()

    def kill(self, seconds: float, how: signal.Signals = signal.SIGKILL) -> bool:
        """Kills it, or tells it to end, so long after its start; whether it was still running."""
        time.sleep(max(0.0, self.began + seconds - time.monotonic()))
        os.kill(self.pid, how)
        return self.end() in (-how, 128 + how)

    def end(self) -> int:
        """Waits for it; its exit code, the negative signal, or 1000 if it hangs. Nothing of it goes on."""
        limit, code = time.monotonic() + PATIENCE, 1000
        while time.monotonic() < limit:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                break
            time.sleep(0.005)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        if code == 1000:
            os.waitpid(self.pid, 0)
        return code

    def text(self) -> str:
        return self.says.read_text(errors="replace")


def _exit_code(work: Work) -> int:
    code: Any = 1
    try:
        code = work()
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)


def aside(work: Callable[[], Any], scratch: Path) -> Any:
    """What some work returns, done in a process of its own: this one must never have a thread, or a lock that the
    thread holds at the moment of a fork would stay locked in the child for ever."""
    answer = scratch / "answer"

    def answering() -> int:
        answer.write_bytes(pickle.dumps(work()))
        return 0

    run = Run(answering, scratch / "said-aside.txt")
    if run.end():
        raise RuntimeError(run.text()[-3000:])
    return pickle.loads(answer.read_bytes())


def refused_in_a_sentence(run: Run, code: int) -> str:
    """Empty, or what is wrong with the way in which a run that cannot succeed has ended."""
    text = run.text()
    sentences = len(re.findall(r"macosnet: |(?<!I/O )\berror: ", text))  # they may follow a progress bar
    if code != 2 or sentences != 1 or "Traceback" in text:
        return f"exit code {code}, said {run.text()[-600:]!r}"
    return ""
