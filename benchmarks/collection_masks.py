"""Masks of whole classes: what agreement over a collection brings beside single pairs, on images with true masks.

    python benchmarks/collection_masks.py DATA [--photos_per_class 20] [--model MODEL]

DATA holds `images/<class>` and `masks/<class>`, as voc2010-coseg and msrc-coseg. Every class is a collection. J is the
mean over images, then over classes, without refinement and with GrabCut at `--refine_size` pixels; P is the share
of right pixels. The masks are only used to score.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from macosnet_hf import DEFAULT_CHECKPOINT
from macosnet_hf.collection import Collection
from macosnet_hf.datasets import iter_records, mask_from_image, open_image
from macosnet_hf.evaluation.metrics import jaccard, precision
from macosnet_hf.geometry import resize_masks
from macosnet_hf.io.checkpoints import load_model_and_processor
from macosnet_hf.refinement import refine_mask


def read_classes(folder: Path, limit: int | None) -> dict[str, list[tuple[Image.Image, np.ndarray]]]:
    """Images with their true masks, by class; of those without a mask nothing is read."""
    classes: dict[str, list[tuple[Image.Image, np.ndarray]]] = {}
    for record in iter_records("coseg", folder):
        found = classes.setdefault(record["class_name"], [])
        if record["source_mask"] is not None and len(found) != limit:
            image = open_image(record["source_image"], record["id"])
            found.append((image, mask_from_image(record["source_mask"], record["id"])))
    return {name: found for name, found in classes.items() if len(found) > 1}


@torch.inference_mode()
def random_partners(collection: Collection, count: int) -> np.ndarray:
    """Each image with `count` others chosen by chance: single pairs, for `count = 1`."""
    random = np.random.default_rng(0)
    masks = []
    for number in range(len(collection)):
        others = np.delete(np.arange(len(collection)), number)
        chosen = random.choice(others, min(count, len(others)), replace=False)
        masks.append(collection.mean_mask(number, chosen.tolist()))
    return torch.stack(masks).cpu().numpy()


REFINED = "the same, refined on the way"  # by GrabCut: not refined again
CLOSER = "and a second pass on crops at small objects"

WAYS: dict[str, Callable[[Collection], np.ndarray]] = {
    "single pairs": lambda collection: random_partners(collection, 1),
    "three partners by chance": lambda collection: random_partners(collection, 3),
    "two of the collection": lambda collection: collection.segment(common=False).probabilities,
    "four of the collection": lambda collection: collection.segment(partners=4, common=False).probabilities,
    "two, and masks that travel": lambda collection: collection.segment().probabilities,
    REFINED: lambda collection: collection.segment(refine="grabcut", second_pass=False).probabilities,
    CLOSER: lambda collection: collection.segment(refine="grabcut").probabilities,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default=DEFAULT_CHECKPOINT)
    parser.add_argument("--photos_per_class", type=int, default=None)
    parser.add_argument("--refine_size", type=int, default=320)
    arguments = parser.parse_args()
    model, processor = load_model_and_processor(arguments.model)
    classes = read_classes(arguments.data, arguments.photos_per_class)
    scores: dict[str, dict[str, list[list[float]]]] = {name: {} for name in WAYS}
    seconds = dict.fromkeys(WAYS, 0.0)
    quiet = not sys.stderr.isatty()
    for class_name, found in tqdm(classes.items(), desc="classes", disable=quiet):
        collection = Collection(model, processor)
        collection.add([photo for photo, _ in found])
        for name, way in WAYS.items():
            start = time.perf_counter()
            masks = way(collection)
            seconds[name] += time.perf_counter() - start
            for (photo, truth), probability in zip(found, masks, strict=True):
                values = resize_masks(torch.from_numpy(probability)[None], truth.shape)[0].clamp(0, 1).numpy()
                soft_mask = values >= 0.5
                hard = (
                    soft_mask
                    if name in (REFINED, CLOSER)
                    else refine_mask(photo, values, working_size=arguments.refine_size)
                )
                row = [jaccard(soft_mask, truth), jaccard(hard, truth), precision(hard, truth)]
                scores[name].setdefault(class_name, []).append(row)
    count = sum(len(found) for found in classes.values())
    print(f"{count} images in {len(classes)} classes\n")
    print("| masks by | J soft | J GrabCut | P GrabCut | ms an image |\n|---|---:|---:|---:|---:|")
    for name, by_class in scores.items():
        means = np.mean([np.mean(rows, axis=0) for rows in by_class.values()], axis=0)
        figures = " | ".join(f"{mean:.3f}" for mean in means)
        print(f"| {name} | {figures} | {1000 * seconds[name] / count:.0f} |")


if __name__ == "__main__":
    main()
