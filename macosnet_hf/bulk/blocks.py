"""Cuts a stream of rows into blocks of images of one group, with memory that does not grow with the stream.

Blocks depend on the rows and their order alone, not on the process that works on them nor on where a run began.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .rows import Row

# A block with fewer images than this gets company: the last images of its group's block before it.
LEAST_COMPANY = 8
# Rows that wait for others of their group, and what their images may take where they are part of the row.
_WAITING_ROWS = 2048
_WAITING_BYTES = 256 << 20
# Groups whose last images are remembered, and what these may take.
_REMEMBERED_GROUPS = 1024
_REMEMBERED_BYTES = 64 << 20


class Block(NamedTuple):
    """Images that are compared with one another.

    Attributes:
        rows: of one group, in the order of the stream; each row of the stream is in one block.
        company: further images of the group, which are partners and nothing else.
    """

    rows: Sequence[Row]
    company: Sequence[Row]


class Shard(NamedTuple):
    """Blocks whose rows are written into one file.

    Attributes:
        number: from 0 on, in the order of the stream.
        blocks: the blocks.
        digest: of the ids and groups of all rows.
        rows: how many there are.
    """

    number: int
    blocks: Sequence[Block]
    digest: str
    rows: int


@dataclass
class _Company:
    """The last images of groups, the most recent groups only."""

    rows: OrderedDict[str | None, Sequence[Row]] = field(default_factory=OrderedDict)
    size: int = 0

    def remember(self, group: str | None, rows: Sequence[Row]) -> None:
        """Replaces what is known of a group, and forgets the groups that were not seen for the longest time."""
        self.size -= sum(row.size for row in self.rows.pop(group, ()))
        self.rows[group] = rows[-(LEAST_COMPANY - 1) :]
        self.size += sum(row.size for row in self.rows[group])
        while len(self.rows) > 1 and (len(self.rows) > _REMEMBERED_GROUPS or self.size > _REMEMBERED_BYTES):
            _, forgotten = self.rows.popitem(last=False)
            self.size -= sum(row.size for row in forgotten)


def cut_blocks(rows: Iterable[Row], size: int) -> Iterator[Block]:
    """Blocks of at most `size` rows of one group.

    A group's rows wait until there are `size` of them. Where too many rows wait, or the stream ends, the group that
    has waited for the longest time is a smaller block, with company if it is very small.
    """
    waiting: OrderedDict[str | None, list[Row]] = OrderedDict()
    company = _Company()
    count = held = 0

    def cut(group: str | None) -> Block:
        nonlocal count, held
        found = waiting.pop(group)
        count, held = count - len(found), held - sum(row.size for row in found)
        missing = min(LEAST_COMPANY, size) - len(found)
        others = company.rows.get(group, ())[-missing:] if missing > 0 else ()
        company.remember(group, [*others, *found])
        return Block(found, others)

    for row in rows:
        waiting.setdefault(row.group, []).append(row)
        count, held = count + 1, held + row.size
        if len(waiting[row.group]) == size:
            yield cut(row.group)
        while count > max(_WAITING_ROWS, size) or (held > _WAITING_BYTES and count > 1):
            yield cut(next(iter(waiting)))
    while waiting:
        yield cut(next(iter(waiting)))


def gather_shards(blocks: Iterable[Block], size: int) -> Iterator[Shard]:
    """Shards of as many blocks as have `size` rows together; the last one may have fewer."""
    held: list[Block] = []
    number = rows = 0
    for block in blocks:
        held.append(block)
        rows += len(block.rows)
        if rows >= size:
            yield Shard(number, held, _digest(held), rows)
            held, rows, number = [], 0, number + 1
    if held:
        yield Shard(number, held, _digest(held), rows)


def _digest(blocks: Sequence[Block]) -> str:
    digest = hashlib.sha256()
    for block in blocks:
        for row in (*block.rows, *block.company):
            digest.update(f"{row.number}\0{row.id}\0{row.group}\0".encode("utf-8", "surrogatepass"))
        digest.update(b"\1")
    return digest.hexdigest()[:16]
