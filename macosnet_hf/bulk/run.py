"""A bulk run: its share of the shards of a data set, and the index and the card once all shards are there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..errors import DataError, InputError
from ..io.memory import trim
from .blocks import cut_blocks, gather_shards
from .rows import RowSource
from .segmentation import segment_block
from .settings import BulkSettings
from .shards import ShardFolder

if TYPE_CHECKING:
    from ..image_processing_macosnet import MaCoSNetImageProcessor
    from ..modeling_macosnet import MaCoSNetForKeypointMatching

Progress = Callable[[int], None]
"""Called with the number of further images that are done; may raise to stop the work."""


class BulkReport(NamedTuple):
    """What a process has done.

    Attributes:
        written: images whose shards it has written.
        found: images whose shards were there already, of its own share.
        complete: rows and errors of the whole folder, if all shards are there; else None.
    """

    written: int
    found: int
    complete: tuple[int, int] | None


def segment_dataset(
    settings: BulkSettings,
    folder: str | Path,
    *,
    model: MaCoSNetForKeypointMatching,
    processor: MaCoSNetImageProcessor,
    rank: int = 0,
    processes: int = 1,
    progress: Progress | None = None,
) -> BulkReport:
    """Writes the masks of a data set as Parquet shards, or what is missing of them after a run that ended early.

    The results are the same for any number of processes and interruptions. (`split_dataset_by_node` deals out rows by
    the number of processes, and the images of a block would depend on it; here shards of blocks are dealt out.)
    Processes do not wait for one another: the last one to end writes index and card.

    Args:
        settings: the data set, and what decides the results.
        folder: see [`ShardFolder`].
        model, processor: the network.
        rank, processes: which process of how many this is.
        progress: see [`Progress`].

    Raises:
        DataError: for a data set that cannot be read.
        InputError: for a folder with shards of other settings, or a rank that is not below the number of processes.
        OutputError: if the folder cannot be written, or the data set has changed.
    """
    if not 0 <= rank < processes:
        raise InputError(f"rank must be at least 0 and less than processes ({processes}); got {rank}.")
    source = RowSource(settings)
    shards = ShardFolder(folder, settings)
    whole_parts = settings.parts % processes == 0
    written = found = 0
    for part in range(settings.parts):
        if whole_parts and part % processes != rank:
            continue
        number = -1
        blocks = cut_blocks(source.rows(part), settings.block_size)
        for shard in gather_shards(blocks, settings.shard_size):
            number = shard.number
            if not whole_parts and number % processes != rank:
                continue
            count = sum(len(block.rows) for block in shard.blocks)
            if shards.has(part, shard):
                found += count
                continue
            rows = []
            for block in shard.blocks:
                rows += segment_block(block, part, settings, model=model, processor=processor)
                if progress is not None:
                    progress(len(block.rows))
            shards.write(part, shard, rows)
            trim()
            written += count
        if number < 0 and settings.parts == 1:
            raise DataError(f"{settings.dataset}: the split {settings.split!r} is empty.")
        shards.end_part(part, number + 1)
    paths = shards.shards()
    if paths is not None and not shards.is_complete:
        shards.merge(paths)
    return BulkReport(written, found, None if paths is None else shards.counts())
