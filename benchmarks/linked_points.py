"""PCK of points that reach other images by chains of transforms, beside transforms of all pairs.

    python benchmarks/linked_points.py $DATA/pf-willow

All images are one collection; the keypoints of a pair's target are sent to its source (protocol `bbox`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from macosnet_hf import DEFAULT_CHECKPOINT, load_image
from macosnet_hf.collection import Collection
from macosnet_hf.datasets import iter_records
from macosnet_hf.evaluation.metrics import keypoint_errors
from macosnet_hf.inference.collection_transforms import match_collection
from macosnet_hf.inference.linked_matches import link_collection
from macosnet_hf.io.checkpoints import load_model_and_processor

Transfer = Callable[..., np.ndarray]


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default=DEFAULT_CHECKPOINT)
    parser.add_argument("--degrees", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--all", action="store_true", help="also all pairs, which takes minutes")
    arguments = parser.parse_args()
    records = list(iter_records("pf-willow", arguments.data))
    paths = sorted({record[side]["path"] for record in records for side in ("source_image", "target_image")})
    number = {path: place for place, path in enumerate(paths)}
    model, processor = load_model_and_processor(arguments.model)
    collection = Collection(model, processor)
    collection.add([load_image(path) for path in paths])
    print(f"{len(paths)} images, {len(records)} pairs\n")
    print("| transforms | pairs matched | s | PCK 0.1 | without local matching |\n|---|---:|---:|---:|---:|")

    def report(name: str, pairs: int, start: float, transfer: Transfer) -> None:
        spent, figures = time.perf_counter() - start, []
        for local in (True, False):
            right = []
            for record in records:
                source, target = (number[record[side]["path"]] for side in ("source_image", "target_image"))
                moved = transfer(np.array(record["target_keypoints"]), target, local_matching=local)[source]
                truth = np.array(record["source_keypoints"])
                right.append(keypoint_errors(moved, truth, "bbox").pck(0.1))
            figures.append(f"{np.mean(right):.3f}")
        print(f"| {name} | {pairs} | {spent:.1f} | {' | '.join(figures)} |", flush=True)

    with torch.inference_mode():
        for degree in arguments.degrees:
            start = time.perf_counter()
            linked = link_collection(collection, degree=degree)
            report(f"{degree} neighbours and a tree", len(linked.pairs), start, linked.transfer_points)
        if not arguments.all:
            return
        start = time.perf_counter()
        every = match_collection(collection)
        report("all", len(paths) * (len(paths) - 1), start, every.transfer_points)
        report("all, repaired", len(paths) * (len(paths) - 1), start, every.repaired().transfer_points)


if __name__ == "__main__":
    main()
