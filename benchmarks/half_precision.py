"""What half precision costs in accuracy: PCK of the same pairs in float32, bfloat16 and float16.

    python benchmarks/half_precision.py --data path/to/pf-willow

On a CPU, which computes slowly in float16, `--pairs 20` measures the first pairs only.
"""

import argparse
import copy
import itertools
import sys

import torch

from macosnet_hf import DEFAULT_CHECKPOINT, MaCoSNetForKeypointMatching
from macosnet_hf.datasets import open_records
from macosnet_hf.evaluation.predictors import ModelPredictor
from macosnet_hf.evaluation.protocols import PROTOCOLS, Options
from macosnet_hf.evaluation.runner import evaluate
from macosnet_hf.io.checkpoints import load_model_and_processor, pick_device

ALLOWED = 0.01  # difference from float32, relative
KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def figures(model: MaCoSNetForKeypointMatching, processor: object, arguments: argparse.Namespace) -> dict[str, float]:
    """PCK `image` by alpha, over the first pairs."""
    protocol = PROTOCOLS[arguments.benchmark]
    records, _ = open_records(arguments.benchmark, arguments.data)
    predictor = ModelPredictor(model, processor, masks=False)
    result = evaluate(itertools.islice(records, arguments.pairs), protocol, predictor, Options())
    overall = next(iter(result.variants.values())).overall()
    return {name: value for name, value in overall.items() if name.startswith("pck.")}


def main() -> int:
    """Prints a table; returns 1 where half precision differs by more than 1 % of float32's figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="the benchmark's folder; without it there is nothing to measure")
    parser.add_argument("--benchmark", default="pf-willow", choices=("pf-willow", "pf-pascal"))
    parser.add_argument("--pairs", type=int, help="only so many (default: all)")
    parser.add_argument("--model", default=DEFAULT_CHECKPOINT)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    arguments = parser.parse_args()
    if arguments.data is None:
        print("half_precision.py needs --data; nothing was measured.")
        return 0
    model, processor = load_model_and_processor(arguments.model, pick_device(arguments.device))
    found = {kind: figures(copy.deepcopy(model).to(dtype), processor, arguments) for kind, dtype in KINDS.items()}
    worst = 0.0
    for name, reference in found["float32"].items():
        cells = [f"{kind} {found[kind][name]:.4f}" for kind in KINDS]
        differences = [abs(found[kind][name] - reference) / reference for kind in ("bfloat16", "float16")]
        worst = max(worst, *differences)
        print(f"{name:16} " + "  ".join(cells) + "  differences " + ", ".join(f"{100 * d:.2f} %" for d in differences))
    return int(worst > ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
