"""Results that a server keeps for its visitors: not too many, not too long, and under keys that nobody can guess."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from ..errors import InputError

T = TypeVar("T")


class KeptResults(Generic[T]):
    """A bounded store of results.

    Args:
        limit: results altogether; the one that was not asked for the longest goes first.
        per_owner: results of one owner, so that one busy visitor does not push out those of everybody else.
        seconds: after so long without being asked for, a result is gone.
        clock: seconds that only grow.
    """

    def __init__(self, limit: int, per_owner: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._per_owner = per_owner
        self._seconds = seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, tuple[T, str | None, float]] = OrderedDict()  # the latest used stands last

    def keep(self, value: T, owner: str | None = None) -> str:
        """Keeps a result and returns its key. Those of the owner `None` are bounded by the limit alone."""
        key = secrets.token_urlsafe(18)
        with self._lock:
            self._drop_old()
            if owner is not None:
                own = [other for other, (_, whose, _) in self._entries.items() if whose == owner]
                for other in own[: max(0, len(own) - self._per_owner + 1)]:
                    del self._entries[other]
            self._entries[key] = (value, owner, self._clock())
            while len(self._entries) > self._limit:
                self._entries.popitem(last=False)
        return key

    def get(self, key: object) -> T:
        """The result of a key.

        Raises:
            InputError: if there is none, or none any more.
        """
        with self._lock:
            self._drop_old()
            if not isinstance(key, str) or key not in self._entries:
                raise InputError("This result is no longer kept; run it again.")
            value, owner, _ = self._entries[key]
            self._entries[key] = (value, owner, self._clock())
            self._entries.move_to_end(key)
            return value

    def forget(self, owner: str) -> None:
        """Drops everything of an owner."""
        with self._lock:
            for key in [key for key, (_, whose, _) in self._entries.items() if whose == owner]:
                del self._entries[key]

    def __len__(self) -> int:
        with self._lock:
            self._drop_old()
            return len(self._entries)

    def _drop_old(self) -> None:
        oldest = self._clock() - self._seconds
        while self._entries:
            key, (_, _, used) = next(iter(self._entries.items()))
            if used > oldest:
                return
            del self._entries[key]
