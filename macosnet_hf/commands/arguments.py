"""Options and small writers that `macosnet match` and `macosnet segment` share."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..io.package import DEFAULT_CHECKPOINT

if TYPE_CHECKING:
    import numpy as np

REFINEMENTS = ("grabcut", "otsu", "crf", "none")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--output-dir`, `--model`, `--refine` and `--device`."""
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="where the results go; created if need be")
    parser.add_argument(
        "--model", default=DEFAULT_CHECKPOINT, metavar="ID_OR_DIR", help="checkpoint (default: the embedded one)"
    )
    parser.add_argument(
        "--refine", choices=REFINEMENTS, default="grabcut", help="how soft masks become hard ones (default grabcut)"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: CUDA if there is one"
    )


def model_name(model: str) -> str:
    return "macosnet-lite" if model == DEFAULT_CHECKPOINT else str(model)


def write_json(document: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def save_mask(mask: np.ndarray, path: Path) -> None:
    from PIL import Image

    Image.fromarray(mask.astype("uint8") * 255).save(path, compress_level=4)
