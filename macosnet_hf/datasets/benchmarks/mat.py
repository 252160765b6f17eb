"""Matrices of MATLAB 5 files, such as PF-WILLOW's keypoints.

SciPy reads these files too, but a damaged one can crash its process. Here every length is checked, and only matrices of
plain numbers are read. The format: MathWorks, "MAT-File Format", Level 5.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import numpy as np

_HEADER_BYTES = 128
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_MATRIX, _COMPRESSED = 14, 15
_NUMERIC_CLASSES = range(6, 16)  # double, single, and integers of 8 to 64 bits
_COMPLEX = 0x800
_MOST_BYTES = 1 << 24  # of a matrix once inflated; ten keypoints take some 300


def read_matrix(data: bytes, name: str) -> np.ndarray:
    """The matrix of that name as float64 `(rows, columns)`.

    Args:
        data: the bytes of the file.
        name: of the variable.

    Raises:
        ValueError: if the file is damaged or of another kind, or holds no matrix of real numbers of that name.
    """
    orders = {b"IM": "<", b"MI": ">"}
    order = orders.get(data[_HEADER_BYTES - 2 : _HEADER_BYTES])
    if order is None:
        raise ValueError("this is no MATLAB 5 file")
    for kind, body in _elements(data[_HEADER_BYTES:], order):
        if kind == _COMPRESSED:
            kind, body = next(_elements(_inflated(body), order), (0, b""))
        if kind == _MATRIX:
            found = _matrix(body, order, name)
            if found is not None:
                return found
    raise ValueError(f"there is no {name}")


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """Type and content of the elements that follow each other in `data`."""
    place = 0
    while place + 8 <= len(data):
        kind, size = struct.unpack_from(f"{order}II", data, place)
        if kind >> 16:  # up to four bytes stand where their number would
            kind, size = kind & 0xFFFF, kind >> 16
            body = data[place + 4 : place + 4 + size] if size <= 4 else b""
            place += 8
        else:
            body = data[place + 8 : place + 8 + size]
            place += 8 + size + (-size % 8 if kind != _COMPRESSED else 0)
        if len(body) < size:
            raise ValueError("it is cut off")
        yield kind, body


def _inflated(data: bytes) -> bytes:
    stream = zlib.decompressobj()
    try:
        inflated = stream.decompress(data, _MOST_BYTES)
    except zlib.error as error:
        raise ValueError("it is damaged") from error
    if not stream.eof:
        raise ValueError("it is cut off, or too large")
    return inflated


def _matrix(body: bytes, order: str, name: str) -> np.ndarray | None:
    """The matrix in an element's content; `None` if it has another name."""
    parts = list(_elements(body, order))
    if len(parts) < 3 or parts[2][1] != name.encode("ascii"):
        return None
    (_, flags), (_, sizes), _, *values = parts
    if len(flags) != 8 or len(sizes) != 8 or len(values) != 1 or values[0][0] not in _NUMBERS:
        raise ValueError(f"{name} is no matrix of real numbers")
    shape = struct.unpack(f"{order}ii", sizes)
    (flag,) = struct.unpack_from(f"{order}I", flags)
    kind, content = values[0]
    number = np.dtype(f"{order}{_NUMBERS[kind]}")
    if flag & 0xFF not in _NUMERIC_CLASSES or flag & _COMPLEX or min(shape) < 0:
        raise ValueError(f"{name} is no matrix of real numbers")
    if len(content) != number.itemsize * shape[0] * shape[1]:
        raise ValueError(f"{name} does not hold as many numbers as it says")
    return np.frombuffer(content, number).astype(np.float64).reshape(shape, order="F")
