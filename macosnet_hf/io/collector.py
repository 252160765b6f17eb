"""Python's cyclic garbage collector around large imports: it costs a second there and finds nothing."""

from __future__ import annotations

import atexit
import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """No garbage collection inside, nor at once afterwards; where it was off, it stays off.

    What was made inside counts as old from then on. Otherwise the first two collections afterwards would walk through
    all of torch and transformers: half a second of the four that the first result takes.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            if not gc.get_freeze_count():  # who has frozen objects wants to keep them frozen
                gc.freeze()
                gc.unfreeze()  # into the oldest generation
            gc.enable()


def no_collection_at_exit() -> None:
    """For a process of ours: the interpreter's last collections would walk through all of torch and transformers,
    a second and a half after the work is done."""
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)


__all__ = ["collector_paused", "no_collection_at_exit"]
