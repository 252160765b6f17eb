"""Results appear in the output folder all together or not at all, and single files whole or not at all."""

from __future__ import annotations

import contextlib
import glob
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
    """A temporary folder to write results into; when the block ends well its files move into `folder`, else they
    vanish.

    The folder is created if need be, before the block runs, so that a long run does not end at a closed door. Files
    of the same name are replaced, others stay. JSON files, which say what the other files are, come last, and older
    ones of their names go first: also after a kill between two files, what is there beside such a file belongs to it.
    What killed runs left in the folder is removed; two runs at a time do not mix their files.

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
                _remove_left_over(target)
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


def _remove_left_over(target: Path) -> None:
    """Removes the temporary folders of runs that were killed; those of living runs are held."""
    for path in target.glob(f"{_PREFIX}*"):
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(BlockingIOError):
                held = hold_folder(path)
                if held is not None:
                    shutil.rmtree(path, ignore_errors=True)
                    release_folder(held)


def _remove_left_over_file(path: Path) -> None:
    """The same for a file under its temporary name."""
    with contextlib.suppress(OSError):  # held by a living writer, or gone
        held = hold_folder(path)
        if held is not None:
            path.unlink()
            release_folder(held)


_held_here: dict[int, str] = {}  # what this process has marked, by descriptor


def hold_folder(folder: Path) -> int | None:
    """Marks a folder, or a file, as one that a living process writes; the system takes the mark away when that ends.

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
    """Whether [`hold_folder`] marked a folder here, so that marking it again would only meet ourselves."""
    return os.path.realpath(folder) in _held_here.values()


def release_folder(held: int | None) -> None:
    """Ends what [`hold_folder`] began."""
    if held is not None:
        _held_here.pop(held, None)
        os.close(held)


def start_folder(folder: Path, ours: Callable[[Path], bool], what: str) -> int | None:
    """Makes an empty folder for results that get their name when they are complete, and marks it as [`hold_folder`]
    does. What a killed run left under its name is removed.

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
    """Waits until no other process is inside such a block for the same folder; each lasts a moment only."""
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
    """Writes a file whole or not at all; text as UTF-8. An older file of the name stays until the new one is whole, and
    what killed runs left of it is removed.

    Raises:
        OutputError: if it cannot be written.
    """
    path = Path(path)
    try:
        # A name of its own for each writer: several processes may write the same file.
        with _alone_in(path.parent):
            for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
                _remove_left_over_file(left)
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
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
    """Finds out now whether [`write_file`] could write there later, by trying; leaves nothing behind.

    Raises:
        OutputError: if the folder does not exist or takes no files, or the name is a folder's.
    """
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"{path} is a folder; a file name is needed.")
    if not path.parent.is_dir():
        raise OutputError(f"The folder {path.parent} does not exist.")
    try:  # permissions do not tell everything: to root all seems writable, read-only file systems included
        with (
            _alone_in(path.parent),
            tempfile.NamedTemporaryFile(prefix=f".{path.name}.", suffix=".partial", dir=path.parent),
        ):
            pass
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be written ({_reason(error)}).") from error


def refuse_to_overwrite(
    folder: str | os.PathLike[str], names: Iterable[str], inputs: Iterable[str | os.PathLike[str]]
) -> None:
    """Checks that no result would replace one of the images that it is made from.

    Args:
        folder: where the results will go.
        names: file names of the results.
        inputs: the images.

    Raises:
        OutputError: if one would.
    """
    kept = {os.path.realpath(path) for path in inputs}
    for name in names:
        path = os.path.join(folder, name)
        if os.path.realpath(path) in kept:
            raise OutputError(f"The result {path} would replace the image of that name; choose another folder.")


def _umask() -> int:
    """What `open` would take from a new file's permissions (a temporary file is its owner's alone)."""
    current = os.umask(0o022)
    os.umask(current)
    return current


def _create(target: Path) -> list[Path]:
    """Makes the folder; returns the folders that were made, innermost first."""
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
    """Removes folders of our own making, innermost first, as far as they are there and nobody put anything in."""
    for path in folders:
        with contextlib.suppress(OSError, ValueError):
            path.rmdir()


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
