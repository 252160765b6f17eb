"""J of masks of a collection that is segmented in blocks of similar images, and of images that come later.

    python benchmarks/similar_blocks.py $DATA/msrc-coseg

DATA holds `images/<class>` and `masks/<class>`. All images of all classes are one collection, shuffled. J is the mean
over images, then over classes. The masks are only used to score. "Later": four of five images are saved, and every
fifth one is added to the loaded collection and segmented with the saved ones as partners, so many at a time.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from macosnet_hf import DEFAULT_CHECKPOINT
from macosnet_hf.collection import Collection, CollectionResult, hard_mask
from macosnet_hf.datasets import iter_records, mask_from_image
from macosnet_hf.evaluation.metrics import jaccard
from macosnet_hf.inference import COLLECTION_SIDE
from macosnet_hf.inference.saved_collections import load_collection, save_collection
from macosnet_hf.io.checkpoints import load_model_and_processor
from macosnet_hf.io.working_copy import open_working_copy

LATER = 5  # every fifth image


def score(results: Iterable[CollectionResult], truths: list[tuple[str, np.ndarray]]) -> dict[int, float]:
    """J of each image, by its number."""
    found = {}
    for result in results:
        numbers = range(len(truths)) if result.numbers is None else result.numbers
        for number, soft in zip(numbers, result.probabilities, strict=True):
            truth = truths[number][1]
            found[number] = jaccard(hard_mask(soft, truth.shape), truth)
    return found


def mean_of_classes(found: dict[int, float], truths: list[tuple[str, np.ndarray]]) -> float:
    """The mean over images, then over classes."""
    by_class: dict[str, list[float]] = {}
    for number, value in found.items():
        by_class.setdefault(truths[number][0], []).append(value)
    return float(np.mean([np.mean(values) for values in by_class.values()]))


def later(loaded: Collection, images: list[Image.Image], at_once: int) -> Iterator[CollectionResult]:
    """Masks of every fifth image, added to a collection of the others."""
    numbers = [number for number in range(len(images)) if number % LATER == 0]
    for start in range(0, len(numbers), at_once):
        some = numbers[start : start + at_once]
        result = loaded.segment_some(loaded.add([images[number] for number in some]), refine="grabcut")
        result.numbers = some
        yield result


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default=DEFAULT_CHECKPOINT)
    parser.add_argument("--block_sizes", type=int, nargs="*", default=[32])
    parser.add_argument("--at_once", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--whole", action="store_true", help="also all images together")
    arguments = parser.parse_args()
    records = [record for record in iter_records("coseg", arguments.data) if record["source_mask"] is not None]
    random.Random(0).shuffle(records)
    truths = [(record["class_name"], mask_from_image(record["source_mask"], record["id"])) for record in records]
    images = [open_working_copy(record["source_image"]["path"], side=COLLECTION_SIDE, fine=True).image
              for record in records]  # fmt: skip
    model, processor = load_model_and_processor(arguments.model)
    network = {"model": model, "processor": processor}
    collection = Collection(**network)
    collection.add(images)
    print("| segmented | images | J | J of every fifth | processor ms an image |\n|---|---:|---:|---:|---:|")

    def report(name: str, results: Iterable[CollectionResult]) -> None:
        start = time.process_time()
        found = score(results, truths)
        each = 1000 * (time.process_time() - start) / len(found)
        fifth = {number: value for number, value in found.items() if number % LATER == 0}
        figures = f"{mean_of_classes(found, truths):.3f} | {mean_of_classes(fifth, truths):.3f}"
        print(f"| {name} | {len(found)} | {figures} | {each:.0f} |", flush=True)

    if arguments.whole:
        report("all together", (part.segment(refine="grabcut") for part in [collection]))
    for size in arguments.block_sizes:
        report(f"{size} similar ones", collection.segment_blocks(refine="grabcut", block_size=size))
    for at_once in arguments.at_once:
        with tempfile.TemporaryDirectory() as folder:
            saved = collection.subset([number for number in range(len(images)) if number % LATER])
            save_collection(saved, folder)
            loaded = load_collection(folder, **network)
            report(f"later, {at_once} at once", later(loaded, images, at_once))


if __name__ == "__main__":
    main()
