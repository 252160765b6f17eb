"""Bulk runs of the tests: their images, their settings, and the rows that they write."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from training_runs import environment

from macosnet_hf.bulk.settings import BulkSettings

OPTIONS = ["--group_column", "label", "--block_size", "3", "--shard_size", "4", "--refine", "none", "--device", "cpu"]
COLUMNS = {"image_column": "photo", "group_column": "kind"}  # of the Parquet files


def make_images(folder: Path) -> Path:
    """Seven cups, five dogs, one ant alone; the third cup is damaged and the last dog cut off."""
    random = np.random.default_rng(0)
    for kind, count in (("cup", 7), ("dog", 5), ("ant", 1)):
        (folder / kind).mkdir(parents=True)
        for number in range(count):
            small = random.integers(0, 255, (6, 8, 3), dtype=np.uint8)
            image = Image.fromarray(small).resize((70 + number, 50 + 3 * number), Image.Resampling.BICUBIC)
            image.save(folder / kind / f"{number}.png")
    (folder / "cup" / "2.png").write_bytes(b"no image")
    os.truncate(folder / "dog" / "4.png", 300)
    return folder


def settings_of(data, **options: Any) -> BulkSettings:
    given = {"group_column": "label", "block_size": 3, "shard_size": 4, "refine": "none", **options}
    return BulkSettings(str(data), **given)


def table(folder: Path) -> list[dict]:
    """All rows of the shards, in the order of the data set."""
    return [row for path in sorted((folder / "data").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def macosnet(*words: object, code: str = "", **more: str) -> subprocess.CompletedProcess:
    """`macosnet segment` in a process of its own, after some code."""
    start = f"import sys\n{code}\nfrom macosnet_hf.commands.main import main\nsys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", start, "segment", *map(str, words)],
        capture_output=True,
        text=True,
        env=environment() | more,
        check=False,
    )
