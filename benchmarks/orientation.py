"""How often the orientation of a source is recognised.

    python benchmarks/orientation.py CSV_OR_FOLDER [--model lite] [--quarters] [--count N]

Takes a list of pairs in the columns of PF whose objects face the same way (leordeanu-cars), or a folder of images
that all face the same way, such as frontal faces: neighbours in the order of names make pairs. Each pair is asked as it
is and with its source mirrored; with --quarters also turned, among all eight symmetries. Prints the shares of right
answers.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from pathlib import Path

import torch

from macosnet_hf.geometry import SYMMETRIES, inverse_symmetry, seen_through
from macosnet_hf.io.checkpoints import load_model_and_processor
from macosnet_hf.io.image_files import load_image
from macosnet_hf.io.package import DEFAULT_CHECKPOINT
from macosnet_hf.orientation import orient


def pairs_of(place: Path, count: int) -> list[tuple[Path, Path]]:
    """Paths of at most `count` pairs: of a list, or neighbours in a folder."""
    if place.is_dir():
        paths = sorted(path for path in place.iterdir() if path.suffix.lower() in (".jpg", ".png"))
        step = max(1, len(paths) // (count + 1))
        paths = paths[::step]
        return list(itertools.pairwise(paths))[:count]
    with place.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [(place.parent / row["source_image"], place.parent / row["target_image"]) for row in rows[:count]]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, metavar="CSV_OR_FOLDER")
    parser.add_argument("--model", default=DEFAULT_CHECKPOINT)
    parser.add_argument("--count", type=int, default=1000, help="pairs, at most")
    parser.add_argument("--quarters", action="store_true", help="also turned, among all eight symmetries")
    args = parser.parse_args()
    model, processor = load_model_and_processor(args.model, "cpu")
    network = model.macosnet.eval()
    asked = {"mirror": ("identity", "mirror")}
    if args.quarters:
        asked["all"] = ("identity", "mirror", "turn_90", "turn_180", "turn_270")
    right = {(mode, name): 0 for mode, names in asked.items() for name in names}
    pairs = pairs_of(args.pairs, args.count)
    for paths in pairs:
        pixels = processor([[load_image(path) for path in paths]], return_tensors="pt")["pixel_values"]
        for mode, name in right:
            # The source is moved by R: it shows at R p what it showed at p.
            moved = torch.stack((seen_through(pixels[:, 0], inverse_symmetry(name)), pixels[:, 1]), dim=1)
            source, target = (torch.tensor(SYMMETRIES[seen]) for seen in orient(network, moved, mode).symmetries[0])
            right[mode, name] += torch.equal(source @ target.t(), torch.tensor(SYMMETRIES[name]))
    print(f"| orientations | source | right, of {len(pairs)} |\n|---|---|---:|")
    for (mode, name), count in right.items():
        print(f"| {mode} | {name} | {count / len(pairs):.3f} |")


if __name__ == "__main__":
    main()
