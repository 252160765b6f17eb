"""Uploads a model with its processor, a prepared data set, or the Space to the Hub, or lists what would be uploaded.

The token comes from `hf auth login` or the variable HF_TOKEN, never from an argument, and is never printed. Nothing
here imports torch.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, OutputError
from .checkpoints import check_checkpoint
from .system_files import is_of_system, parquet_files

if TYPE_CHECKING:
    from huggingface_hub import HfApi, RepoUrl

KINDS = ("model", "dataset", "space")

# What is not uploaded of a training run's folder.
_LEFT_OUT = ("checkpoint-*", "partial-*", "samples", "best", "macosnet", "runs", "log.jsonl", "*.npz", "__pycache__")
# Of a checkout, the Space needs the app and what it shows, what it installs, and the package with its checkpoint.
_SPACE_FILES = (
    "app.py",
    "README.md",
    "model_card.md",
    "requirements.txt",
    "packages.txt",
    "LICENSE",
    "NOTICE",
    "macosnet_hf",
    "docs/images",
    "examples",
)
_NEEDED_BY_SPACE = ("app.py", "README.md", "model_card.md", "requirements.txt")
_SECRET = re.compile(rb"\bhf_[A-Za-z0-9]{30,}|-----BEGIN [A-Z ]*PRIVATE KEY")
_SCANNED_BYTES = 1_000_000


@dataclass(frozen=True)
class Upload:
    """One file: where it lies here, its name in the repository, its size in bytes."""

    path: Path
    name: str
    size: int


def plan(kind: str, folder: str | os.PathLike[str]) -> list[Upload]:
    """The files that [`push`] would upload, by name. Links are followed; hidden files and caches are left out.

    Args:
        kind: `"model"` (a folder for `from_pretrained`, such as a training run's output), `"dataset"` (made by
            `macosnet prepare` or a bulk run) or `"space"` (a checkout with app.py).
        folder: the folder.

    Raises:
        CheckpointError: if a model's folder is not complete.
        InputError: if another kind of folder is not, or a file holds something like a token.
    """
    root = Path(folder)
    if kind not in KINDS:
        raise InputError(f"There is nothing called {kind!r} to push; choose one of {', '.join(KINDS)}.")
    if not root.is_dir():
        raise InputError(f"There is no folder {root}.")
    if kind == "model":
        check_checkpoint(root)
    elif kind == "dataset":
        if not is_prepared(root):
            raise InputError(f"{root} is not a prepared data set; make one with `macosnet prepare`.")
    else:
        _check_space(root)
    starts = [root / name for name in _SPACE_FILES] if kind == "space" else [root]
    uploads = [
        Upload(path, path.relative_to(root).as_posix(), path.stat().st_size)
        for start in starts
        for path in _files(start, top=start == root)
    ]
    for upload in uploads:
        _refuse_secrets(upload)
    return sorted(uploads, key=lambda upload: upload.name)


def is_prepared(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder was made by `macosnet prepare` and is complete: a card, and Parquet under `data/`."""
    folder = Path(folder)
    return (folder / "README.md").is_file() and bool(parquet_files(folder / "data"))


def _files(start: Path, *, top: bool) -> Iterator[Path]:
    """The files under a folder, or the file itself; `_LEFT_OUT` holds for the top folder only."""
    if start.is_file():
        yield start
    elif start.is_dir():
        for path in sorted(start.iterdir()):
            patterns = _LEFT_OUT if top else ("__pycache__", "*.pyc")
            hidden = path.name.startswith(".") and path.name != ".gitattributes"
            left_out = hidden or is_of_system(path) or any(fnmatch(path.name, pattern) for pattern in patterns)
            if not left_out:
                yield from _files(path, top=False)


def _check_space(root: Path) -> None:
    for name in _NEEDED_BY_SPACE:
        if not (root / name).is_file():
            raise InputError(f"{root} holds no {name}: a Space is made from a checkout of this project.")
    head = (root / "README.md").read_text(encoding="utf-8").split("---")
    if len(head) < 3 or not re.search(r"^sdk: *gradio *$", head[1], re.MULTILINE):
        raise InputError(f"{root / 'README.md'} does not begin with the settings of a Space (sdk: gradio).")


def check_name(repository: str) -> None:
    """Raises `InputError` for a name that no repository can have."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not marked so

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(
            f"{repository!r} cannot be the name of a repository: it is NAME or OWNER/NAME, of letters, digits, '-', "
            "'_' and '.'."
        ) from error


def _refuse_secrets(upload: Upload) -> None:
    if upload.size > _SCANNED_BYTES:
        return
    try:
        content = upload.path.read_bytes()
    except OSError as error:
        raise InputError(f"{upload.path} cannot be read ({error.strerror}).") from error
    if _SECRET.search(content):
        raise InputError(f"{upload.path} holds something that looks like a token or a private key; nothing is pushed.")


def create_repository(kind: str, repository: str, *, private: bool = False) -> str:
    """Creates a repository unless it exists; returns its full id, `owner/name`.

    A long run calls this first, so that a missing log-in is found before and not after it.

    Args:
        kind: as in [`plan`].
        repository: its id, `name` or `owner/name`.
        private: for a repository that is made now.

    Raises:
        InputError: for a name that no repository can have, or if nobody is logged in.
        OutputError: if the Hub cannot be reached or refuses.
    """
    with _client(kind, repository) as api:
        return _create(api, kind, repository, private).repo_id


def push(
    kind: str,
    folder: str | os.PathLike[str],
    repository: str,
    *,
    private: bool = False,
    message: str | None = None,
) -> str:
    """Uploads a folder in one commit, so that it is never half there; returns the repository's address.

    The repository is created if need be.

    Args:
        kind, folder: as in [`plan`].
        repository: its id, `name` or `owner/name`.
        private: for a repository that is made now.
        message: of the commit.

    Raises:
        CheckpointError, InputError: as [`plan`] and [`create_repository`].
        OutputError: if the Hub cannot be reached or refuses.
    """
    check_name(repository)
    uploads = plan(kind, folder)
    with _client(kind, repository) as api:
        from huggingface_hub import CommitOperationAdd

        address = _create(api, kind, repository, private)
        # Not `upload_folder`: its patterns cannot say "these files and no other", and only these were scanned.
        api.create_commit(
            repo_id=address.repo_id,
            repo_type=kind,
            operations=[CommitOperationAdd(upload.name, upload.path) for upload in uploads],
            commit_message=message or f"Upload {kind}",
        )
    return str(address)


@contextlib.contextmanager
def _client(kind: str, repository: str) -> Iterator[HfApi]:
    """The Hub's client, logged in and silent; whatever it raises becomes one sentence without the token."""
    check_name(repository)
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils.tqdm import disable_progress_bars

    token = get_token()
    if token is None:
        raise InputError("Nobody is logged in to the Hub: run `hf auth login`, or set HF_TOKEN.")
    disable_progress_bars()
    hub_logging.set_verbosity_error()
    try:
        yield HfApi(token=token, library_name="macosnet-hf")
    except Exception as error:
        # The client and its transport raise many kinds, also for a card that the Hub does not take.
        reason = " ".join(str(error).replace(token, "***").split()) or type(error).__name__
        raise OutputError(f"The {kind} cannot be pushed to {repository}: {reason.rstrip('.')}.") from error


def _create(api: HfApi, kind: str, repository: str, private: bool) -> RepoUrl:
    sdk = "gradio" if kind == "space" else None
    return api.create_repo(repository, repo_type=kind, private=private or None, exist_ok=True, space_sdk=sdk)


def table(uploads: list[Upload]) -> str:
    """Sizes and names as text, one file a line, and the total."""
    lines = [f"{_size(upload.size):>10}  {upload.name}" for upload in uploads]
    total = _size(sum(upload.size for upload in uploads))
    return "\n".join([*lines, f"{total:>10}  in {len(uploads)} files"])


def _size(count: int) -> str:
    number, units = float(count), ["B", "kB", "MB", "GB"]
    while number >= 1000 and len(units) > 1:
        number /= 1000
        units.pop(0)
    return f"{number:.0f} {units[0]}" if units[0] == "B" else f"{number:.1f} {units[0]}"


__all__ = ["Upload", "create_repository", "is_prepared", "plan", "push", "table"]
