"""Disks that are full or read-only."""

from __future__ import annotations

import contextlib
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from faults_bench import Bench, listing, names_left, whole_outputs
from faults_commands import COMMANDS
from faults_processes import Work, refused_in_a_sentence


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int, read_only: bool = False) -> Iterator[bool]:
    """Mounts a tmpfs at a folder; whether that was possible."""
    options = f"size={kilobytes}k"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False)
    if done.returncode:
        yield False
        return
    try:
        if read_only:
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        yield True
    finally:
        subprocess.run(["umount", "-l", folder], check=False)


def _with_small_files(work: Work, kilobytes: int) -> Work:
    """No file may grow beyond this: as on a full disk, a write fails in the middle."""

    def limited() -> Any:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024,) * 2)
        return work()

    return limited


def full_disk(bench: Bench) -> None:
    """Every command on disks that are too small; then on the same one made larger."""
    scenario = "disk"
    for name in bench.commands:
        command = COMMANDS[name]
        whole, _ = whole_outputs(bench, name, ("new", "old"))  # `save` writes both in turn
        clean = names_left(bench, name)
        for kilobytes in (8, 40, 120, 400) if bench.moments > 5 else (40,):
            out = bench.fresh()
            with small_disk(out, kilobytes) as mounted:
                work = command.work(bench, out, "new")
                run = bench.run(work if mounted else _with_small_files(work, kilobytes // 2), out)
                code = run.end()
                if code == 0:
                    bench.count(scenario, "fitted")
                elif name == "save":  # transformers' own function, whose errors are the system's
                    bench.count(scenario, "failed with an error" if code == 1 else "ended")
                else:
                    bench.check(
                        scenario, refused_in_a_sentence(run, code) and f"{name}, {kilobytes} kB: {run.text()[-600:]}"
                    )
                    bench.count(scenario, "refused in one sentence")
                bench.check(scenario, bench.problem(name, out, whole))
                if not command.keeps and code and name != "save" and listing(out):
                    bench.fault(scenario, f"{name}, {kilobytes} kB: left behind {sorted(listing(out))[:5]}")
                if mounted:
                    subprocess.run(["mount", "-o", "remount,size=64m", out], check=True)
                again = bench.run(work, out)
                if again.end() or bench.content(name, out) != whole["new"] or listing(out) - clean:
                    bench.fault(scenario, f"{name}: not made good with room: {again.text()[-600:]}")
                else:
                    bench.count(scenario, "made good with room")
            shutil.rmtree(out)


def read_only(bench: Bench) -> None:
    """Every command with an output folder on a read-only disk."""
    scenario = "read-only"
    for name in bench.commands:
        command = COMMANDS[name]
        out = bench.fresh()
        with small_disk(out, 100, read_only=True) as mounted:
            if not mounted:
                bench.count(scenario, "skipped, no mounting here")
                continue
            run = bench.run(command.work(bench, out, "new"), out)
            code = run.end()
            if name != "save":
                bench.check(scenario, refused_in_a_sentence(run, code))
            bench.count(scenario, "refused")
            if code == 0 or listing(out):
                bench.fault(scenario, f"{name} claims to have written")
