"""J of the masks of `macosnet segment --dataset`, by what blocks hold, on images with true masks.

    python benchmarks/bulk_masks.py $DATA/msrc-coseg

DATA holds `images/<class>` and `masks/<class>`. The images are shuffled, as rows of a data set are that nobody has
sorted; with and without the class as group. J is the mean over images, then over classes. The masks are only used to
score. With `--whole` each class is one block, as `macosnet evaluate coseg --masks collection` has it.
"""

from __future__ import annotations

import argparse
import io
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from macosnet_hf import DEFAULT_CHECKPOINT
from macosnet_hf.bulk.run import segment_dataset
from macosnet_hf.bulk.settings import BLOCK_SIZE, BulkSettings
from macosnet_hf.datasets import iter_records, mask_from_image
from macosnet_hf.evaluation.metrics import jaccard
from macosnet_hf.io.checkpoints import load_model_and_processor

WAYS: dict[str, dict[str, Any]] = {"within classes": {"group_column": "class"}, "of all classes": {}}


def write_rows(records: list[dict[str, Any]], folder: Path) -> None:
    """The images of the records in one Parquet file."""
    folder.mkdir()
    rows = [
        {
            "image": {"bytes": Path(record["source_image"]["path"]).read_bytes(), "path": None},
            "class": record["class_name"],
            "id": record["id"],
        }
        for record in records
    ]
    kinds = Features({"image": ImageFeature(), "class": Value("string"), "id": Value("string")})
    Dataset.from_list(rows, features=kinds).to_parquet(folder / "train.parquet")


def score(folder: Path, truths: dict[str, tuple[str, np.ndarray]]) -> float:
    """J of the shards of a folder."""
    by_class: dict[str, list[float]] = {}
    for path in (folder / "data").glob("*.parquet"):
        for row in pq.read_table(path, columns=["id", "mask"]).to_pylist():
            if row["id"] in truths:
                name, truth = truths[row["id"]]
                mask = np.asarray(Image.open(io.BytesIO(row["mask"]["bytes"]))) > 0
                by_class.setdefault(name, []).append(jaccard(mask, truth))
    return float(np.mean([np.mean(values) for values in by_class.values()]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default=DEFAULT_CHECKPOINT)
    parser.add_argument("--block_sizes", type=int, nargs="+", default=[BLOCK_SIZE])
    parser.add_argument("--whole", action="store_true", help="also each class as one block")
    arguments = parser.parse_args()
    records = list(iter_records("coseg", arguments.data))
    random.Random(0).shuffle(records)
    truths = {
        record["id"]: (record["class_name"], mask_from_image(record["source_mask"], record["id"]))
        for record in records
        if record["source_mask"] is not None
    }
    model, processor = load_model_and_processor(arguments.model)
    ways = {
        f"{size} {name}": {**options, "block_size": size}
        for size in arguments.block_sizes
        for name, options in WAYS.items()
    }
    if arguments.whole:
        ways["each class as a whole"] = {"group_column": "class", "block_size": len(records)}
    print("| blocks | J | ms an image |\n|---|---:|---:|")
    with tempfile.TemporaryDirectory() as scratch:
        write_rows(records, Path(scratch) / "rows")
        for number, (name, options) in enumerate(ways.items()):
            out, start = Path(scratch) / str(number), time.perf_counter()
            settings = BulkSettings(str(Path(scratch) / "rows"), id_column="id", **options)
            segment_dataset(settings, out, model=model, processor=processor)
            seconds = (time.perf_counter() - start) / len(records)
            print(f"| {name} | {score(out, truths):.3f} | {1e3 * seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
