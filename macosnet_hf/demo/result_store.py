"""Results in the memory of a server: a bounded number, for a bounded time, under keys that nobody can guess."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from cachetools import TTLCache

from ..errors import InputError

T = TypeVar("T")


class ResultStore(Generic[T]):
    """A store for many threads.

    Args:
        limit: number of results; the least recently used goes first.
        per_owner: number of results of one owner, so that a busy visitor does not push out those of everybody else.
        seconds: time without use after which a result is dropped.
        clock: seconds that only grow.
    """

    def __init__(self, limit: int, per_owner: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_owner = per_owner
        self._lock = threading.Lock()
        # Time counts since an entry was set, so `get` sets it anew; the cache is then in the order of last use as well.
        self._entries: TTLCache[str, tuple[T, str | None]] = TTLCache(limit, seconds, timer=clock)

    def add(self, value: T, owner: str | None = None) -> str:
        """Stores a result and returns its key. Results of the owner `None` are bounded by the limit alone."""
        key = secrets.token_urlsafe(18)
        with self._lock:
            own = self._keys_of(owner) if owner is not None else []
            for old in own[: max(0, len(own) - self._per_owner + 1)]:
                self._entries.pop(old, None)
            self._entries[key] = (value, owner)
        return key

    def get(self, key: object) -> T:
        """The result of a key, whose time starts anew.

        Raises:
            InputError: if there is no such result, or it was dropped.
        """
        with self._lock:
            entry = self._entries.pop(key, None) if isinstance(key, str) else None
            if entry is None:
                raise InputError("This result is no longer available; run it again.")
            self._entries[str(key)] = entry
            return entry[0]

    def adopt(self, key: object, owner: str | None) -> T:
        """The result of a key, which has another owner from now on.

        Raises:
            InputError: as [`get`].
        """
        value = self.get(key)
        with self._lock:
            if key in self._entries:
                self._entries[str(key)] = (value, owner)
        return value

    def drop_all_of(self, owner: str, but: str | None = None) -> None:
        """Drops every result of an owner, but that of one key."""
        with self._lock:
            for key in self._keys_of(owner):
                if key != but:
                    self._entries.pop(key, None)

    def __len__(self) -> int:
        with self._lock:
            return len(self._entries)

    def _keys_of(self, owner: str) -> list[str]:
        """Keys of an owner's results, least recently used first."""
        return [key for key in self._entries if self._entries.get(key, (None, None))[1] == owner]
