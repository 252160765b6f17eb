"""What operating systems leave in folders that people look into."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

_NAMES = (
    *("._*", ".DS_Store", ".localized", "Icon\r", "__MACOSX"),  # macOS
    *("Thumbs.db", "ehthumbs.db", "desktop.ini", "$RECYCLE.BIN", "System Volume Information"),  # Windows
    *("@eaDir", "#recycle", "lost+found"),  # network storage, Linux
)


def is_of_system(path: Path) -> bool:
    """Whether a file or folder is of an operating system, by its name: `.DS_Store`, `._name.jpg`, `Thumbs.db`."""
    return any(fnmatchcase(path.name, pattern) for pattern in _NAMES)


def parquet_files(folder: Path) -> list[Path]:
    """The Parquet files of a folder, sorted; none where there is no folder."""
    return sorted(path for path in folder.glob("*.parquet") if not is_of_system(path))


__all__ = ["is_of_system", "parquet_files"]
