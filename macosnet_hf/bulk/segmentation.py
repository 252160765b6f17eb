"""Rows of results: the masks of a block of images, each of its image's own size."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..datasets.schema import as_text
from ..errors import ImageError
from ..inference import COLLECTION_SIDE
from ..inference.cutouts import alpha_matte
from ..inference.files import SegmentedCollection, segment_copies
from ..io.working_copy import WorkingCopy, open_working_copy
from .blocks import Block
from .rows import Row
from .settings import BulkSettings

if TYPE_CHECKING:
    from ..image_processing_macosnet import MaCoSNetImageProcessor
    from ..modeling_macosnet import MaCoSNetForKeypointMatching

_READERS = min(8, os.cpu_count() or 1)  # images that are decoded at the same time
_WRITERS = 2  # images that are in memory in full size at the same time


def segment_block(
    block: Block,
    part: int,
    settings: BulkSettings,
    *,
    model: MaCoSNetForKeypointMatching,
    processor: MaCoSNetImageProcessor,
) -> list[dict[str, Any]]:
    """One row of results for each row of a block, in its order; an image that cannot be read is a row with its error.

    One image alone gets its mirror image and crops for partners, as in
    [`~macosnet_hf.inference.files.segment_copies`].

    Args:
        block: the images.
        part: of the data set.
        settings: how masks are made.
        model, processor: the network.
    """
    rows = [*block.rows, *block.company]
    with ThreadPoolExecutor(_READERS) as pool:
        found = list(pool.map(lambda row: _open(row, settings), rows))
    copies = [copy for copy in found if isinstance(copy, WorkingCopy)]
    ids = [row.id for row, copy in zip(rows, found, strict=True) if isinstance(copy, WorkingCopy)]
    numbers = iter(range(len(copies)))
    places = [next(numbers) if isinstance(copy, WorkingCopy) else None for copy in found[: len(block.rows)]]
    results: dict[int, dict[str, Any]] = {}
    wanted = [place for place in places if place is not None]
    if wanted:
        collection = segment_copies(
            copies,
            [str(number) for number in range(len(copies))],
            model=model,
            processor=processor,
            refine=settings.refine,
            partners=settings.partners,
            average=False,
            orientations=settings.orientations,
        )
        with ThreadPoolExecutor(_WRITERS) as pool:
            made = pool.map(lambda place: _result(collection, place, ids, settings), wanted)
            results = dict(zip(wanted, made, strict=True))
    return [
        {"id": row.id, "part": part, "row": row.number, "group": row.group}
        | ({"error": as_text(str(copy)), "partners": []} if place is None else results[place])
        for row, copy, place in zip(block.rows, found, places, strict=False)
    ]


def _open(row: Row, settings: BulkSettings) -> WorkingCopy | ImageError:
    """A working copy, or why there is none."""
    try:
        source = row.source(settings)
        content, path = (source, row.id) if isinstance(source, bytes) else (None, source)
        return open_working_copy(path, row.id, COLLECTION_SIDE, fine=True, content=content)
    except ImageError as error:  # which has the row's name already, and is the same wherever the image is
        return ImageError(str(error).replace(f"'{row.id}'", "the image"))


def _result(collection: SegmentedCollection, number: int, ids: Sequence[str], settings: BulkSettings) -> dict[str, Any]:
    """The columns of an image that was segmented."""
    mask = collection.original_mask(number)
    columns: dict[str, Any] = {
        "height": mask.shape[0],
        "width": mask.shape[1],
        "mask": {"bytes": _png(mask.astype(np.uint8) * 255), "path": None},
        "object_share": float(mask.mean()),
        "agreement": float(collection.result.agreement[number]),
        "common": collection.has_common_object(number),
        "orientation": None if settings.orientations == "none" else collection.orientations[number],
        "partners": [ids[other] for other in collection.result.partners[number]],
    }
    if settings.alpha:
        whole = collection.copies[number].open_original()
        alpha = alpha_matte(whole, collection.result.probabilities[number])
        columns["alpha"] = {"bytes": _png((alpha * 255 + 0.5).astype(np.uint8)), "path": None}
    return columns


def _png(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG", compress_level=4)
    return file.getvalue()
