"""Typed errors of the library. Every error that bad input can cause derives from [`MaCoSNetError`]."""


class MaCoSNetError(Exception):
    """Base of every error that this library raises on purpose. Its text is one plain sentence for a person."""


class InputError(MaCoSNetError, ValueError):
    """An argument, a point list or an option that cannot be used."""


class ImageError(MaCoSNetError, ValueError):
    """A picture that cannot be read or is refused (damaged, not a picture, too large, too small)."""


class DataError(MaCoSNetError, ValueError):
    """A data set, an annotation or a row that cannot be used. The text names the file and the row."""


class CheckpointError(MaCoSNetError):
    """A checkpoint folder that is incomplete, damaged, unsafe, or of another architecture."""


class OutputError(MaCoSNetError):
    """An output folder or file that cannot be written."""
