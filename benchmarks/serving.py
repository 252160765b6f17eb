"""The same model with its encoder computed by torch, by onnxruntime, and by onnxruntime in 8-bit integers.

    macosnet export fast --encoder
    macosnet export int8 --encoder --int8 PHOTOS
    python benchmarks/serving.py lite fast int8 [--threads 2] [--data DATA]

Takes checkpoints of one model. In one process, in turn: an encoder pass over an image, a pair (both directions, masks),
and the masks of a collection of twelve images without refinement. Medians over the rounds; ratios to the first
checkpoint are taken round by round. With --data (which holds leordeanu-cars and msrc-coseg) also PCK `image` 0.1 and
J of soft masks, as the validation of training measures them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from macosnet_hf.collection import Collection
from macosnet_hf.io.checkpoints import load_model_and_processor
from macosnet_hf.training.validation import keypoint_validation, mask_validation

_COLLECTION = 12


def works(model: Any, processor: Any) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    pixels = torch.rand(1, 2, 3, *(model.config.image_size,) * 2, generator=torch.Generator().manual_seed(0))
    draw = np.random.default_rng(0)
    coarse = [Image.fromarray(draw.integers(0, 255, (9, 9, 3), np.uint8)) for _ in range(_COLLECTION)]
    images = [image.resize((320, 240), Image.Resampling.BICUBIC) for image in coarse]

    def collection() -> None:
        together = Collection(model, processor)
        together.add(images)
        together.segment()

    return {
        "encoder pass": lambda: model.macosnet.encoder(pixels[:, 0]),
        "pair": lambda: model(pixels),
        f"collection of {_COLLECTION}": collection,
    }


def accuracy(model: Any, processor: Any, data: Path, per_class: int) -> dict[str, float]:
    """PCK on leordeanu-cars and J on msrc-coseg."""
    objective: Any = SimpleNamespace(model=model.macosnet)
    points = keypoint_validation(str(data / "leordeanu-cars" / "pairs.csv"), processor, ("local",))(objective, 0)
    masks = mask_validation(str(data / "msrc-coseg"), processor, per_class)(objective, 0)
    return {"PCK 0.1": points["pck_local@0.1"], "J": masks["jaccard"]}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="ID_OR_DIR")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=None, help="default: torch's own choice")
    parser.add_argument("--data", type=Path, default=None, help="also measure accuracy; the folder of the data sets")
    parser.add_argument("--per_class", type=int, default=4, help="images of a class of msrc-coseg")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    loaded = {name: load_model_and_processor(name, "cpu") for name in args.checkpoints}
    timed = {name: works(*both) for name, both in loaded.items()}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.rounds} rounds\n")
    print("| | " + " | ".join(args.checkpoints) + " |\n|---|" + "---:|" * len(args.checkpoints))
    for work in timed[args.checkpoints[0]]:
        seconds: dict[str, list[float]] = {name: [] for name in timed}
        for number in range(args.rounds + 2):
            for name, all_works in timed.items():
                start = time.perf_counter()
                all_works[work]()
                if number >= 2:
                    seconds[name].append(time.perf_counter() - start)
        first = seconds[args.checkpoints[0]]
        cells = []
        for found in seconds.values():
            ratio = statistics.median(a / b for a, b in zip(first, found, strict=True))
            cells.append(f"{statistics.median(found) * 1e3:.1f} ms ({ratio:.2f} times)")
        print(f"| {work} | " + " | ".join(cells) + " |", flush=True)
    if args.data is not None:
        figures = [accuracy(*both, args.data, args.per_class) for both in loaded.values()]
        for measure in figures[0]:
            print(f"| {measure} | " + " | ".join(f"{each[measure]:.4f}" for each in figures) + " |", flush=True)


if __name__ == "__main__":
    main()
