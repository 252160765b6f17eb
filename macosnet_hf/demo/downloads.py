"""Results as files: result files of pairs and collections, and images. All are cached where gradio serves from."""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gradio.components import Component
from PIL import Image

from ..inference.cutouts import make_cutout
from ..inference.result_files import (
    COLLECTION_ARCHIVE,
    PAIR_ARCHIVE,
    VIEWS,
    save_mask,
    write_collection,
    write_pair,
    zip_folder,
)
from ..io.image_files import save_image
from ..io.package import checkpoint_name
from . import limits

if TYPE_CHECKING:
    from ..inference.files import MatchedPair, Progress, SegmentedCollection

_CUTOUT_SIDE = 384  # 0.09 s for each; 512 take 0.17 s
_ENCODERS = 4  # threads; Pillow encodes outside of Python's lock
_whole_pixels, _changed = 0, threading.Condition()


@contextlib.contextmanager
def whole_images(sizes: Sequence[tuple[int, int]]) -> Iterator[None]:
    """Waits until results as large as originals of these sizes, one at a time, may be in memory beside those of others.

    A photo of 51 megapixels takes 0.9 GB until its cutout is written.
    """
    global _whole_pixels
    pixels = min(max(width * height for width, height in sizes), limits.WHOLE_PIXELS)
    with _changed:
        _changed.wait_for(lambda: _whole_pixels + pixels <= limits.WHOLE_PIXELS)
        _whole_pixels += pixels
    try:
        yield
    finally:
        with _changed:
            _whole_pixels -= pixels
            _changed.notify_all()


def cached_images(component: Component, images: Sequence[Image.Image], suffix: str = "jpeg") -> list[str]:
    """Images as cached files, so that gradio has none to write: it would write an image that is in its cache anew, and
    whoever was fetching it for an equal request would get a part of it."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(_ENCODERS) as pool:
        paths = [Path(folder, f"image{number}.{suffix}") for number in range(len(images))]
        list(pool.map(save_image, images, paths))
        return _cached(component, paths)


def small_cutout(collection: SegmentedCollection, number: int) -> Image.Image:
    """The cutout of an image as its file has it, with soft edges, at most `_CUTOUT_SIDE` pixels long."""
    small = collection.copies[number].image.copy()
    small.thumbnail((_CUTOUT_SIDE, _CUTOUT_SIDE), reducing_gap=2.0)
    mask = Image.fromarray(collection.masks[number]).convert("L").resize(small.size, Image.Resampling.BILINEAR)
    return make_cutout(
        small, collection.result.probabilities[number], np.asarray(mask) >= 128, hint=collection.hints.get(number)
    )


def sheet_and_average(component: Component, collection: SegmentedCollection) -> list[str]:
    """Contact sheet and average of a collection as cached files."""
    return cached_images(component, [image for image in (collection.sheet(), collection.average) if image is not None])


def pair_archive(component: Component, pair: MatchedPair, threshold: float) -> str:
    """One zip with all result files of a pair."""
    with tempfile.TemporaryDirectory() as folder, whole_images([copy.size for copy in pair.copies]):
        write_pair(pair, Path(folder), threshold, model=checkpoint_name(pair.checkpoint), flow=True)
        return _cached(component, [zip_folder(Path(folder), PAIR_ARCHIVE, remove=True)])[0]


def pair_masks(component: Component, pair: MatchedPair) -> list[str]:
    """The masks of source and target in the photos' own sizes."""
    with tempfile.TemporaryDirectory() as folder, whole_images([copy.size for copy in pair.copies]):
        paths = [Path(folder, f"{name}_mask.png") for name in VIEWS]
        for view, path in enumerate(paths):
            save_mask(pair.original_mask(view), path)
        return _cached(component, paths)


def collection_archive(
    component: Component, collection: SegmentedCollection, progress: Progress
) -> tuple[str, dict[str, Any]]:
    """One zip with all result files of a collection, and the document in its `summary.json`."""
    with tempfile.TemporaryDirectory() as folder, whole_images([copy.size for copy in collection.copies]):
        model = checkpoint_name(collection.checkpoint)
        document = write_collection(collection, Path(folder), model=model, progress=progress)
        return _cached(component, [zip_folder(Path(folder), COLLECTION_ARCHIVE, remove=True)])[0], document


def _cached(component: Component, paths: Sequence[Path]) -> list[str]:
    """Copies of files where gradio serves from and, later, clears. Only who knows their names can fetch them; these
    hold a hash of the content."""
    return [str(component.move_resource_to_block_cache(path)) for path in paths]
