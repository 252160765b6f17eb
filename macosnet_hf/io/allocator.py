"""The C library's allocator: left alone, a program of many threads and large images hoards what it has freed.

Both functions do nothing where the C library is not glibc.
"""

from __future__ import annotations

import contextlib
import ctypes

_C_LIBRARY = "libc.so.6"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # from malloc.h


def give_memory_back() -> None:
    """For a process of ours, at its start: the memory of large images goes back to the system at once.

    By default the first such image that is freed raises the size from which memory is asked for piece by piece
    (and so can be given back piece by piece) to 32 MB, and each thread may have a heap of its own.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(_C_LIBRARY).mallopt
        mallopt(_M_ARENA_MAX, 2)
        mallopt(_M_MMAP_THRESHOLD, 4 << 20)  # bytes; setting it ends its growth
        mallopt(_M_TRIM_THRESHOLD, 16 << 20)  # and would set this to 128 kB: asking for the same memory again and again


def trim() -> None:
    """Gives the free pages in the middle of the heaps back as well: what many small results have left behind."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(_C_LIBRARY).malloc_trim(0)


__all__ = ["give_memory_back", "trim"]
