"""Writes results all together or not at all, and single files whole or not at all.

Running processes mark their temporary folders and files with `flock`, which the system ends with the process. (The
package `filelock` would need a lock file beside each, which a kill leaves behind.)
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType

from ..errors import OutputError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_PREFIX = ".macosnet-"


@contextlib.contextmanager
def output_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder whose files move into `folder` when the block ends without an error, and vanish otherwise.

    The folder is created before the block runs, so that a long run does not fail at its end. Files of the same name are
    replaced, others stay. JSON files, which describe the other files, move last, and older ones are removed first: even
    after a kill between two files, what lies beside a JSON file belongs to it. What killed runs left in the folder is
    removed. Two runs at a time do not mix their files.

    Raises:
        OutputError: if the folder cannot be created or written.
    """
    if not os.fspath(folder):
        raise OutputError("The name of the output folder is empty.")
    target = Path(folder)
    created = _create(target)
    done = False
    try:
        try:
            with _alone_in(target):
                clear_left_overs(target)
                partial = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=target))
                held = hold_folder(partial)
        except OSError as error:
            raise OutputError(f"Nothing can be written in the folder {target} ({_reason(error)}).") from error
        try:
            yield partial
            with _alone_in(target):
                _move_all(partial, target)
            done = True
        except OSError as error:
            raise OutputError(f"The results could not be written in {target} ({_reason(error)}).") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            release_folder(held)
    finally:
        if not done:
            _remove_empty(created)


def _move_all(partial: Path, target: Path) -> None:
    results = sorted(partial.iterdir(), key=lambda path: (path.suffix == ".json", path.name))
    for path in results:  # all of them before the first one moves
        if (target / path.name).is_dir():
            raise OutputError(f"{target / path.name} is a folder; it stands where a result should go.")
    for path in results:
        if path.suffix == ".json":
            (target / path.name).unlink(missing_ok=True)
    for path in results:
        os.replace(path, target / path.name)


def clear_left_overs(folder: Path) -> None:
    """Removes what killed runs left directly in a folder."""
    for path in folder.glob(f"{_PREFIX}????????"):  # as `tempfile` names them
        if not path.is_symlink():
            _remove_left_over(path)


def _remove_left_over(path: Path) -> None:
    """Removes a temporary folder or file of a run that was killed; a living run holds its own."""
    with contextlib.suppress(OSError):  # held, or gone
        held = hold_folder(path)
        if held is not None:
            try:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            finally:
                release_folder(held)


_held_here: dict[int, str] = {}  # what this process has marked, by descriptor


def hold_folder(folder: Path) -> int | None:
    """Marks a folder or file as written by this process; the mark ends with the process at the latest.

    Returns:
        what [`release_folder`] takes, or `None` where there are no such marks: on Windows and some network drives.

    Raises:
        BlockingIOError: if the folder is held already.
    """
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        os.close(descriptor)
        return None
    _held_here[descriptor] = os.path.realpath(folder)
    return descriptor


def held_by_this_process(folder: Path) -> bool:
    """Whether this process has marked a folder with [`hold_folder`]."""
    return os.path.realpath(folder) in _held_here.values()


def release_folder(held: int | None) -> None:
    """Ends what [`hold_folder`] began."""
    if held is not None:
        _held_here.pop(held, None)
        os.close(held)


def start_folder(folder: Path, ours: Callable[[Path], bool], what: str) -> int | None:
    """Makes an empty temporary folder, after removing an older one of a killed run, and marks it with [`hold_folder`].

    Args:
        folder: its temporary name, the same in every run.
        ours: whether an older folder of that name is the rest of a run, and nothing else.
        what: the results, for the error's text.

    Returns:
        what [`release_folder`] takes.

    Raises:
        OutputError: if another process is writing it, something else has its name, or it cannot be made.
    """
    try:
        if folder.is_dir():
            if not ours(folder):
                raise OutputError(f"{folder} is in the way, with files of another kind; remove it.")
            held = hold_folder(folder)
            shutil.rmtree(folder)
            release_folder(held)
        folder.mkdir(parents=True)
        return hold_folder(folder)
    except (BlockingIOError, FileExistsError) as error:
        raise OutputError(f"Another run is writing {what} just now; choose another name.") from error
    except OSError as error:
        raise OutputError(f"The folder {folder} cannot be made ({_reason(error)}).") from error


@contextlib.contextmanager
def _alone_in(target: Path) -> Iterator[None]:
    """Excludes other processes that are inside such a block for the same folder; each lasts a moment only."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(target, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network drives have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_file(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file whole or not at all, text as UTF-8; an older one stays until then.

    Removes what killed runs left in the folder.

    Raises:
        OutputError: if it cannot be written.
    """
    path = Path(path)
    try:
        # A name of its own for each writer: several processes may write the same file.
        with _alone_in(path.parent):
            clear_left_overs(path.parent)
            handle, name = tempfile.mkstemp(prefix=_PREFIX, dir=path.parent)
            held = hold_folder(Path(name))
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content.encode("utf-8") if isinstance(content, str) else content)
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        finally:
            release_folder(held)
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be written ({_reason(error)}).") from error


def check_writable(path: str | os.PathLike[str]) -> None:
    """Checks, by trying, whether [`write_file`] can write there later; leaves nothing behind.

    Raises:
        OutputError: if the folder does not exist or takes no files, or the name is a folder's.
    """
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"{path} is a folder; a file name is needed.")
    if not path.parent.is_dir():
        raise OutputError(f"The folder {path.parent} does not exist.")
    try:  # permissions are not enough: to root everything seems writable, read-only file systems included
        with contextlib.suppress(FileNotFoundError):
            os.lstat(path)  # a name that no file can have
        with (
            _alone_in(path.parent),
            tempfile.NamedTemporaryFile(prefix=_PREFIX, dir=path.parent),
        ):
            pass
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be written ({_reason(error)}).") from error


def refuse_to_overwrite(
    folder: str | os.PathLike[str], names: Iterable[str], inputs: Iterable[str | os.PathLike[str]]
) -> None:
    """Checks that no result replaces an input.

    Args:
        folder: of the results.
        names: file names of the results.
        inputs: paths of the images.

    Raises:
        OutputError: if one does.
    """
    originals = {os.path.realpath(path) for path in inputs}
    for name in names:
        path = os.path.join(folder, name)
        if os.path.realpath(path) in originals:
            raise OutputError(f"The result {path} would replace the image of that name; choose another folder.")


def _umask() -> int:
    """The process's mask of permissions, which temporary files do not follow."""
    current = os.umask(0o022)
    os.umask(current)
    return current


def make_folder(folder: str | os.PathLike[str]) -> None:
    """Creates a folder, and those above it, unless it is there.

    Raises:
        OutputError: if it cannot be created.
    """
    if not os.fspath(folder):
        raise OutputError("The name of the output folder is empty.")
    _create(Path(folder))


def _create(target: Path) -> list[Path]:
    """Creates the folder; returns all folders that were created, innermost first."""
    missing = [path for path in (target, *target.parents) if not os.path.lexists(path)]
    try:
        target.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise OutputError(f"{target} is a file, not a folder.") from error
    except (OSError, ValueError) as error:  # a name with a null byte is a ValueError
        _remove_empty(missing)
        raise OutputError(f"The folder {target} cannot be created ({_reason(error)}).") from error
    return missing


def _remove_empty(folders: Iterable[Path]) -> None:
    """Removes folders, innermost first, as far as they exist and are empty."""
    for path in folders:
        with contextlib.suppress(OSError, ValueError):
            path.rmdir()


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
