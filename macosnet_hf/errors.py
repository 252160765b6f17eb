"""Typed errors of the library. Every error that bad input can cause derives from [`MaCoSNetError`]."""

import re

# Control characters but tab and line feed, what turns the direction of writing, and halves of characters.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Returns a text that a terminal can show: names of a stranger's files must not steer it."""
    return _UNPRINTABLE.sub("\ufffd", text)


class MaCoSNetError(Exception):
    """Base of every error that this library raises on purpose. Its text is one plain sentence for a person."""

    def __str__(self) -> str:
        return printable(super().__str__())


class InputError(MaCoSNetError, ValueError):
    """An argument, a point list or an option that cannot be used."""


class ImageError(MaCoSNetError, ValueError):
    """An image that cannot be read or is refused (damaged, not an image, too large, too small)."""


class DataError(MaCoSNetError, ValueError):
    """A data set, an annotation or a row that cannot be used. The text names the file and the row."""


class CheckpointError(MaCoSNetError):
    """A checkpoint folder that is incomplete, damaged, unsafe, or of another architecture."""


class OutputError(MaCoSNetError):
    """An output folder or file that cannot be written."""
