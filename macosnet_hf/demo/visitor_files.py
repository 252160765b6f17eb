"""Where a server keeps what its visitors gave it and what it made of that, and how nothing of it stays.

Each run has a folder of its own in one base folder, and removes it when it ends. What a run left that was killed, and
whatever gradio does not know of (uploads that were cut off), goes by its age, when a server starts and ever after.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from . import limits

VARIABLE = "GRADIO_TEMP_DIR"  # where gradio puts uploads; it is read when a component is made


@contextlib.contextmanager
def folder_of_a_run() -> Iterator[Path]:
    """Makes the folder of this run and lets gradio and `tempfile` use it; removes it at the end. Gives the base folder.

    The base is in the variable GRADIO_TEMP_DIR, else in the folder for temporary files.
    """
    base = _base()
    sweep(base)
    run = Path(tempfile.mkdtemp(prefix="run-", dir=base))
    served, scratch = run / "served", run / "scratch"
    for folder in (served, scratch):
        folder.mkdir(mode=0o700)
    before, tempfile.tempdir = (os.environ.get(VARIABLE), tempfile.tempdir), str(scratch)
    os.environ[VARIABLE] = str(served)
    try:
        yield base
    finally:
        variable, tempfile.tempdir = before
        if variable is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = variable
        for _ in range(3):  # a request that has not noticed yet may still write
            shutil.rmtree(run, ignore_errors=True)


def _base() -> Path:
    named = os.environ.get(VARIABLE)
    base = Path(named or Path(tempfile.gettempdir()) / f"macosnet-demo-{getattr(os, 'getuid', int)()}")
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not named and (base.is_symlink() or (hasattr(os, "getuid") and base.stat().st_uid != os.getuid())):
        return Path(tempfile.mkdtemp(prefix="macosnet-demo-"))  # the name was taken by somebody else
    return base


def sweep(base: Path, now: float | None = None) -> None:
    """Removes the files of a base folder that nobody touched for `limits.FILE_SECONDS`, and folders that are empty."""
    oldest = (time.time() if now is None else now) - limits.FILE_SECONDS
    for folder, _, names in os.walk(base, topdown=False):
        for path in (os.path.join(folder, name) for name in names):
            with contextlib.suppress(OSError):
                status = os.lstat(path)
                if max(status.st_ctime, status.st_mtime) < oldest:
                    os.unlink(path)
        with contextlib.suppress(OSError):
            if os.lstat(folder).st_mtime < oldest and folder != str(base):
                os.rmdir(folder)  # fails where it is not empty


def sweeping(base: Path) -> Any:
    """A lifespan of the web application that sweeps a base folder again and again."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        async def forever() -> None:
            while True:
                await asyncio.sleep(limits.FILE_SECONDS / 6)
                await asyncio.to_thread(sweep, base)

        task = asyncio.create_task(forever())
        try:
            yield
        finally:
            task.cancel()

    return lifespan
