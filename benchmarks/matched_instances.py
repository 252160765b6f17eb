"""Matches of images with two objects of a kind: how often the right one is chosen, and the share of matches on it.

    python benchmarks/matched_instances.py DATA [--pairs 5] [--seed 0] [--model MODEL]

DATA holds `images/<class>`, as msrc-coseg. A source is two random images of a class beside one another, on white; its
target is one of the two, turned by up to 10 degrees, cropped and of another brightness. Counted are the pairs in whose
source two or more objects are told apart (`match_pair(instances=True)`).
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance

from macosnet_hf import DEFAULT_CHECKPOINT, load_image, match_pair
from macosnet_hf.inference.pair import PairResult
from macosnet_hf.io.checkpoints import load_model_and_processor

SIDE, MARGIN = 256, 16


def beside_one_another(images: list[Image.Image]) -> Image.Image:
    """Two images on white, left and right."""
    found = Image.new("RGB", (2 * SIDE + 3 * MARGIN, SIDE + 2 * MARGIN), "white")
    for number, image in enumerate(images):
        found.paste(image.resize((SIDE, SIDE)), (MARGIN + number * (SIDE + MARGIN), MARGIN))
    return found


def seen_again(image: Image.Image, rng: random.Random) -> Image.Image:
    """The same object, seen a little differently."""
    image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.8, 1.2))
    turned = image.rotate(rng.uniform(-10, 10), resample=Image.Resampling.BICUBIC)
    width, height = turned.size
    return turned.crop((round(0.06 * width), round(0.06 * height), round(0.94 * width), round(0.94 * height)))


def on_the_left(result: PairResult) -> np.ndarray:
    """Whether each match lies on the left half of the source: `(N,)` bool."""
    found: np.ndarray = result.keypoints[:, 0, 0] < result.source.width / 2
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with images/<class>")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of each class (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="of the pairs (default: 0)")
    parser.add_argument("--model", default=DEFAULT_CHECKPOINT, help="checkpoint (default: the embedded one)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = load_model_and_processor(arguments.model)
    rng, total = random.Random(arguments.seed), 0
    right, shares = [], []
    for folder in sorted((arguments.data / "images").iterdir()):
        paths = sorted(folder.iterdir())
        for _ in range(arguments.pairs):
            images = [load_image(path) for path in rng.sample(paths, 2)]
            left = rng.random() < 0.5
            source = beside_one_another(images if left else images[::-1])
            options = {"model": model, "processor": processor}
            result = match_pair(source, seen_again(images[0], rng), instances=True, **options)
            total += 1
            found = result.instances
            assert found is not None
            if found.counts[0] < 2 or found.chosen is None:
                continue
            labels = found.of_mask(0, result.source_mask) == found.chosen[0]
            right.append((labels[:, : source.width // 2].sum() > labels.sum() / 2) == left)
            plain = match_pair(source, result.target, **options)
            shares.append([(on_the_left(each) == left).mean() for each in (plain, result)])
    before, after = np.mean(shares, axis=0)
    print(f"{len(right)} of {total} pairs have two or more objects in the source")
    print(f"the right object is chosen in {sum(right)} of {len(right)} ({np.mean(right):.0%})")
    print(f"share of matches on it: {before:.1%} without instances, {after:.1%} with")


if __name__ == "__main__":
    main()
