"""Memory and garbage collection of a whole process: settings for programs of ours, not for a caller's.

What concerns the C library does nothing where that is not glibc.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import gc
from collections.abc import Iterator

_C_LIBRARY = "libc.so.6"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # from malloc.h


def give_memory_back() -> None:
    """Makes the allocator return the memory of large images to the system at once; called when a process starts.

    By default the first such image that is freed raises the size from which memory is asked for piece by piece (and can
    be returned piece by piece) to 32 MB, and each thread may have a heap of its own.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(_C_LIBRARY).mallopt
        mallopt(_M_ARENA_MAX, 2)
        mallopt(_M_MMAP_THRESHOLD, 4 << 20)  # bytes; setting it ends its growth
        mallopt(_M_TRIM_THRESHOLD, 16 << 20)  # and would set this to 128 kB: asking for the same memory again and again


def keep_memory() -> None:
    """Makes the allocator keep the memory of a batch for the next one; called when a training or an evaluation starts.

    By default each large tensor that is freed goes back to the system, and the next of its size is mapped and zeroed
    again, page by page.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(_C_LIBRARY).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # bytes, the most that glibc takes
        mallopt(_M_TRIM_THRESHOLD, 256 << 20)


def trim() -> None:
    """Returns free pages in the middle of the heaps to the system as well: what many small results have left behind."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(_C_LIBRARY).malloc_trim(0)


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Pauses Python's garbage collector for a large import, where it costs a second and finds nothing.

    If it was off before, it stays off. What was made inside counts as old afterwards; otherwise the first two
    collections would walk through all of torch and transformers: half a second of the four that the first result takes.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            if not gc.get_freeze_count():  # a caller's frozen objects stay frozen
                gc.freeze()
                gc.unfreeze()  # into the oldest generation
            gc.enable()


# What the system, the loader of libraries, torch and C++ say of it.
_NO_MEMORY = ("annot allocate memory", "an't allocate memory", "not enough memory", "failed to map", "bad_alloc")


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that memory ran out: under `ulimit -v` it has many kinds."""
    while error is not None:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            return True
        library = isinstance(error, (ImportError, OSError, RuntimeError))
        if library and any(words in str(error) for words in (*_NO_MEMORY, "start new thread")):
            return type(error).__name__ != "OutOfMemoryError"  # that of a CUDA device
        error = error.__cause__ or error.__context__
    return False


def no_collection_at_exit() -> None:
    """Skips the interpreter's last collections, which walk through all of torch and transformers: 1.5 s saved."""
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)


__all__ = ["collector_paused", "give_memory_back", "keep_memory", "no_collection_at_exit", "ran_out_of_memory", "trim"]
