"""Hints: what one automatic click in each collection brings to the masks of all its images.

    python benchmarks/hints.py DATA [--size 8] [--photos_per_class 20] [--click worst] [--model MODEL]

DATA holds `images/<class>` and `masks/<class>`, as msrc-coseg. The images of each class are dealt out by chance into
collections of about `--size` images (0: each class is one collection) and segmented with GrabCut, as `macosnet segment`
does. Then one point of each collection is included in a hint, and the collection is segmented again. The click is
simulated with the true mask, as in the literature on interactive segmentation: it is the interior point of the object
farthest from the mask's border. It lies in the image with the largest error before (`--click worst`), or in one drawn
by chance (`--click random`). Printed are mean J before and after, of groups of images and collections.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from macosnet_hf import DEFAULT_CHECKPOINT
from macosnet_hf.collection import Collection, CollectionResult, hard_mask
from macosnet_hf.datasets import iter_records, mask_from_image, open_image
from macosnet_hf.evaluation.metrics import jaccard
from macosnet_hf.hints import Hint
from macosnet_hf.io.checkpoints import load_model_and_processor
from macosnet_hf.refinement import opencv

Sample = tuple[Image.Image, np.ndarray]

_GOOD = 0.8  # J of an image that needs no hint
_LOSS = 0.05
_WORST = 10


def read_collections(folder: Path, size: int, limit: int | None, seed: int) -> list[tuple[str, list[Sample]]]:
    """Images with their true masks, dealt out into collections of about `size` of one class."""
    classes: dict[str, list[Sample]] = {}
    for record in iter_records("coseg", folder):
        found = classes.setdefault(record["class_name"], [])
        if record["source_mask"] is not None and len(found) != limit:
            image = open_image(record["source_image"], record["id"])
            found.append((image, mask_from_image(record["source_mask"], record["id"])))
    random = np.random.default_rng(seed)
    collections = []
    for name, samples in sorted(classes.items()):
        order = random.permutation(len(samples))
        count = max(1, round(len(samples) / size)) if size else 1
        parts = [part for part in np.array_split(order, count) if len(part) > 1]
        collections += [(name, [samples[number] for number in part]) for part in parts]
    return collections


def innermost_point(mask: np.ndarray) -> tuple[int, int]:
    """The point (x, y) of a mask `(H, W)` bool that lies farthest from its border and the image's."""
    distance = opencv().distanceTransform(np.pad(mask.astype(np.uint8), 1), opencv().DIST_L2, 5)[1:-1, 1:-1]
    row, column = np.unravel_index(int(distance.argmax()), distance.shape)
    return int(column), int(row)


def scores(result: CollectionResult, samples: list[Sample]) -> np.ndarray:
    """`(N,)` J of the masks."""
    found = [
        jaccard(hard_mask(soft, truth.shape), truth)
        for soft, (_, truth) in zip(result.probabilities, samples, strict=True)
    ]
    return np.array([1.0 if value is None else value for value in found])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with images/<class> and masks/<class>")
    parser.add_argument("--model", default=DEFAULT_CHECKPOINT, help="checkpoint (default: the embedded one)")
    parser.add_argument("--size", type=int, default=8, help="images in a collection; 0: the whole class (default: 8)")
    parser.add_argument("--photos_per_class", type=int, default=None, help="read no more than so many of each class")
    parser.add_argument("--click", choices=("worst", "random"), default="worst", help="the image that is clicked on")
    parser.add_argument("--seed", type=int, default=0, help="of the collections and of --click random (default: 0)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = load_model_and_processor(arguments.model)
    collections = read_collections(arguments.data, arguments.size, arguments.photos_per_class, arguments.seed)
    random = np.random.default_rng(arguments.seed)
    before, after, clicked = [], [], []
    for _, samples in tqdm(collections, desc="collections", disable=not sys.stderr.isatty()):
        collection = Collection(model, processor)
        collection.add([image for image, _ in samples])
        first = scores(collection.segment(refine="grabcut"), samples)
        number = int(first.argmin()) if arguments.click == "worst" else int(random.integers(len(samples)))
        hint = Hint(include=[innermost_point(samples[number][1])])
        before.append(first)
        after.append(scores(collection.segment(refine="grabcut", hints={number: hint}), samples))
        clicked.append(np.arange(len(samples)) == number)
    print_table([name for name, _ in collections], before, after, clicked)


def print_table(names: list[str], before: list[np.ndarray], after: list[np.ndarray], clicked: list[np.ndarray]) -> None:
    """Prints J before and after of all images and of some groups of them, as Markdown."""
    first, second, hinted = np.concatenate(before), np.concatenate(after), np.concatenate(clicked)
    good = (first >= _GOOD) & ~hinted
    of_class = np.repeat(names, [len(values) for values in before])
    classes = sorted(set(names))
    class_means = np.array([[values[of_class == name].mean() for name in classes] for values in (first, second)])
    means = np.array([[values.mean() for values in rows] for rows in (before, after)])
    others = first[~hinted], second[~hinted]
    print(f"{len(first)} images in {len(before)} collections, {hinted.sum()} clicks\n")
    print("| J of | number | before | with one click |\n|---|---:|---:|---:|")
    rows = [
        ("all images", first, second),
        ("images that are clicked on", first[hinted], second[hinted]),
        ("the other images", *others),
        (f"the {_WORST} worst images", *_worst(first, second)),
        (f"the {_WORST} worst of the other images", *_worst(*others)),
        (f"the {_WORST} worst collections", *_worst(*means)),
        (f"the {_WORST} worst classes", *_worst(*class_means)),
        (f"other images with {_GOOD} or more before", first[good], second[good]),
    ]
    for name, one, other in rows:
        print(f"| {name} | {len(one)} | {one.mean():.3f} | {other.mean():.3f} |")
    lost = int((second[good] < first[good] - _LOSS).sum())
    print(f"\n{lost} of {good.sum()} other images with {_GOOD} or more lose more than {_LOSS}.")


def _worst(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(first, kind="stable")[:_WORST]
    return first[order], second[order]


if __name__ == "__main__":
    main()
