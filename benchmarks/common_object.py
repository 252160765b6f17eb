"""Do masks follow the partners? Composites of two objects, asked for either one; and partners that share nothing.

    python benchmarks/common_object.py DATA [--model common] [--composites 50] [--per_class 8]

DATA holds `images/<class>` and `masks/<class>`, as msrc-coseg. A composite is two images of different classes, each cut
to two thirds of its width around its object and resized to 160x240, side by side. It is asked for either object by
partners of that object's class. Soft masks of the decoder at 0.5, at the network's resolution, without refinement. The
true masks are only used to compose and to score.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from macosnet_hf import DEFAULT_CHECKPOINT
from macosnet_hf.collection import Collection
from macosnet_hf.datasets import iter_records, mask_from_image, open_image
from macosnet_hf.evaluation.metrics import jaccard
from macosnet_hf.io.checkpoints import load_model_and_processor

HALF = (160, 240)  # width and height of one of the two images of a composite
SMALLEST = 0.007  # share of a composite that its smaller object must cover

Sample = tuple[Image.Image, np.ndarray]


def read_classes(folder: Path) -> dict[str, list[Sample]]:
    """Images with their true masks, by class."""
    classes: dict[str, list[Sample]] = {}
    for record in iter_records("coseg", folder):
        if record["source_mask"] is not None:
            image = open_image(record["source_image"], record["id"])
            mask = mask_from_image(record["source_mask"], record["id"])
            classes.setdefault(record["class_name"], []).append((image, np.asarray(mask, bool)))
    return {name: found for name, found in classes.items() if len(found) > 4}


def half(sample: Sample) -> Sample:
    """Two thirds of an image's width around its object."""
    image, mask = sample
    width = image.width * 2 // 3
    centre = int(np.nonzero(mask.any(axis=0))[0].mean()) if mask.any() else image.width // 2
    left = min(max(centre - width // 2, 0), image.width - width)
    box = (left, 0, left + width, image.height)
    cut = Image.fromarray(mask.astype(np.uint8) * 255).crop(box).resize(HALF, Image.Resampling.BILINEAR)
    return image.crop(box).resize(HALF, Image.Resampling.BICUBIC), np.asarray(cut) >= 128


def composite(first: Sample, second: Sample) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """Two images side by side, and the masks of both objects."""
    (left, left_mask), (right, right_mask) = half(first), half(second)
    whole = Image.new("RGB", (2 * HALF[0], HALF[1]))
    whole.paste(left, (0, 0))
    whole.paste(right, (HALF[0], 0))
    empty = np.zeros_like(left_mask)
    return whole, np.concatenate((left_mask, empty), 1), np.concatenate((empty, right_mask), 1)


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    """J of two masks; not a number, and left out, where both are empty."""
    found = jaccard(first, second)
    return float("nan") if found is None else found


class Asker:
    """Masks of one image given partners."""

    def __init__(self, model: str):
        self.model, self.processor = load_model_and_processor(model)

    @torch.inference_mode()
    def mask(self, image: Image.Image, partners: list[Image.Image], size: tuple[int, int]) -> np.ndarray:
        """Soft mask `(height, width)` of an image at a size (width, height)."""
        collection = Collection(self.model, self.processor)
        numbers = collection.add([image, *partners])
        masks = collection.decoder_masks([[other for other in numbers if other != number] for number in numbers])
        return np.asarray(Image.fromarray(masks[0].cpu().numpy()).resize(size, Image.Resampling.BILINEAR))


def ask_composites(asker: Asker, classes: dict[str, list[Sample]], count: int, partners: int) -> list[float]:
    """Share of right choices, J with the asked object and with the other, and IoU between the two answers."""
    draw, rows = random.Random(0), []
    with tqdm(total=count, desc=f"composites, {partners} partners", disable=not sys.stderr.isatty()) as bar:
        while len(rows) < count:
            names = draw.sample(sorted(classes), 2)
            shown = [draw.randrange(len(classes[name])) for name in names]
            image, *masks = composite(*(classes[name][index] for name, index in zip(names, shown, strict=True)))
            if min(mask.mean() for mask in masks) < SMALLEST:
                continue
            answers, found = [], []
            for side, (name, index) in enumerate(zip(names, shown, strict=True)):
                others = draw.sample([k for k in range(len(classes[name])) if k != index], 3)[:partners]
                soft = asker.mask(image, [classes[name][k][0] for k in others], image.size)
                own, other = masks[side], masks[1 - side]
                answers.append(soft >= 0.5)
                found.append(
                    (soft[own].mean() > soft[other].mean(), jaccard(soft >= 0.5, own), jaccard(soft >= 0.5, other))
                )
            rows.append([*np.mean(found, axis=0), overlap(*answers)])
            bar.update()
    return np.nanmean(rows, axis=0).tolist()


def ask_with_company(asker: Asker, classes: dict[str, list[Sample]], per_class: int) -> list[float]:
    """J of masks with three partners of the same class, with three of other classes, and with the image itself."""
    draw, rows = random.Random(1), []
    for name, members in tqdm(classes.items(), desc="company", disable=not sys.stderr.isatty()):
        for index, (image, mask) in enumerate(members[:per_class]):
            same = draw.sample([k for k in range(len(members)) if k != index], 3)
            strangers = [draw.choice(classes[k])[0] for k in draw.sample(sorted(set(classes) - {name}), 3)]
            company = [members[k][0] for k in same], strangers, [image]
            rows.append([overlap(asker.mask(image, others, image.size) >= 0.5, mask) for others in company])
    return np.nanmean(rows, axis=0).tolist()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--model", default=DEFAULT_CHECKPOINT, help="default: the embedded one")
    parser.add_argument("--composites", type=int, default=50, help="each is asked twice (default: 50)")
    parser.add_argument("--per_class", type=int, default=8, help="images asked with other company (default: 8)")
    args = parser.parse_args()
    classes = read_classes(args.data)
    if len(classes) < 4:
        parser.error(f"{args.data} has {len(classes)} classes of five or more images with masks; four are needed.")
    asker = Asker(args.model)
    print("| composites | right | J asked | J other | IoU of answers |\n|---|---:|---:|---:|---:|")
    for count in (3, 1):
        print(row(f"{count} partners", ask_composites(asker, classes, args.composites, count)), flush=True)
    print("\n| three partners | same class | other classes | itself |\n|---|---:|---:|---:|")
    print(row("J of soft masks", ask_with_company(asker, classes, args.per_class)))
    return 0


def row(name: str, figures: list[float]) -> str:
    """A line of a table."""
    return " | ".join([f"| {name}", *(f"{figure:.3f}" for figure in figures)]) + " |"


if __name__ == "__main__":
    sys.exit(main())
