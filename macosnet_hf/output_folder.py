"""Results appear in the output folder all together or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import OutputError


@contextlib.contextmanager
def output_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder to write results into; when the block ends well its files move into `folder`, else they
    vanish.

    The folder is created if need be, before the block runs, so that a long run does not end at a closed door. Files
    of the same name are replaced, others stay.

    Raises:
        OutputError: if the folder cannot be created or written.
    """
    target = Path(folder)
    created = _create(target)
    done = False
    try:
        try:
            partial = Path(tempfile.mkdtemp(prefix=".macosnet-", dir=target))
        except OSError as error:
            raise OutputError(f"Nothing can be written in the folder {target}: {error.strerror}.") from error
        try:
            yield partial
            for path in sorted(partial.iterdir()):
                os.replace(path, target / path.name)
            done = True
        except OSError as error:
            raise OutputError(f"The results could not be written in {target}: {error.strerror or error}.") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        if not done:
            for path in created:  # innermost first; only folders of our own making, and only while they are empty
                with contextlib.suppress(OSError):
                    path.rmdir()


def _create(target: Path) -> list[Path]:
    missing = [path for path in (target, *target.parents) if not path.exists()]
    try:
        target.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise OutputError(f"{target} is a file, not a folder.") from error
    except OSError as error:
        raise OutputError(f"The folder {target} cannot be created: {error.strerror}.") from error
    return missing
