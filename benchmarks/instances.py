"""Instances: how often the number of objects in an image is right, on images whose objects were counted by eye.

    python benchmarks/instances.py DATA [--counts benchmarks/instance_counts.csv] [--model MODEL]

DATA holds `images/<class>`, as msrc-coseg. Each class is segmented as one collection with `instances=True`; the list
has the columns image (`<class>/<name without suffix>`) and count. Printed are the share of right counts, of images with
several objects and with one, and the images whose count is wrong.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch

from macosnet_hf import DEFAULT_CHECKPOINT, load_image
from macosnet_hf.collection import Collection
from macosnet_hf.io.checkpoints import load_model_and_processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with images/<class>")
    parser.add_argument("--counts", type=Path, default=Path(__file__).with_name("instance_counts.csv"), help="the list")
    parser.add_argument("--model", default=DEFAULT_CHECKPOINT, help="checkpoint (default: the embedded one)")
    arguments = parser.parse_args()
    with open(arguments.counts, encoding="utf-8", newline="") as file:
        counts = {row["image"]: int(row["count"]) for row in csv.DictReader(file)}
    torch.set_num_threads(1)
    model, processor = load_model_and_processor(arguments.model)
    found: dict[str, int] = {}
    for name in sorted({image.split("/")[0] for image in counts}):
        paths = sorted((arguments.data / "images" / name).iterdir())
        collection = Collection(model, processor)
        collection.add([load_image(path) for path in paths])
        labels = collection.segment(refine="grabcut", instances=True).instances
        assert labels is not None
        found |= {f"{name}/{path.stem}": int(each.max()) for path, each in zip(paths, labels, strict=True)}
    for title, chosen in (
        ("with several objects", [image for image, count in counts.items() if count > 1]),
        ("with one object", [image for image, count in counts.items() if count == 1]),
    ):
        right = sum(found[image] == counts[image] for image in chosen)
        print(f"{right} of {len(chosen)} images {title} have the right count ({right / len(chosen):.0%})")
    for image, count in counts.items():
        if found[image] != count:
            print(f"  {image}: {found[image]} found, {count} there")


if __name__ == "__main__":
    main()
