"""`macosnet segment --dataset`: masks of a data set of any size, as Parquet shards."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from ..bulk.settings import BLOCK_SIZE, SHARD_SIZE, BulkSettings
from ..errors import InputError, OutputError
from ..io.memory import give_memory_back
from ..io.package import checkpoint_name
from ..io.weights import weights_digest
from .arguments import (
    add_push_argument,
    load_network,
    need_datasets,
    place_among_processes,
    prepare_push,
    print_report,
    progress_bar,
    push_report,
)

_DEFAULTS: dict[str, Any] = {
    "split": "train",
    "image_column": "image",
    "group_column": None,
    "id_column": None,
    "block_size": BLOCK_SIZE,
    "shard_size": SHARD_SIZE,
    "parts": 1,
    "alpha": False,
}


def add_dataset_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--dataset` and the options that go with it, spelled as accelerate's users write them."""
    add = parser.add_argument_group(
        "data sets of any size",
        "masks as Parquet shards and an index instead of files; `accelerate launch -m macosnet_hf.commands.segment` "
        "runs several processes, and a run that ended early goes on where it was",
    ).add_argument
    add("--dataset", metavar="ID_OR_DIR", help="data set on the Hub, or a folder of images or Parquet files")
    add("--split", default=_DEFAULTS["split"], metavar="NAME", help="default: train")
    add("--image_column", default=_DEFAULTS["image_column"], metavar="NAME", help="column of images (default: image)")
    group = "column of what an image shows; images are compared within their group only (default: all are one group)"
    add("--group_column", metavar="NAME", help=group)
    add(
        "--id_column", metavar="NAME", help="names of the rows (default: the path in the data set, or the row's number)"
    )
    block = f"images that are compared with one another, at most (default: {BLOCK_SIZE})"
    add("--block_size", type=int, default=BLOCK_SIZE, metavar="N", help=block)
    shard = f"images of a shard, at least (default: {SHARD_SIZE})"
    add("--shard_size", type=int, default=SHARD_SIZE, metavar="N", help=shard)
    parts = "parts of the data set's files that processes read on their own; each reads all of them with 1 (default: 1)"
    add("--parts", type=int, default=_DEFAULTS["parts"], metavar="N", help=parts)
    add("--alpha", action="store_true", help="also the soft alpha of each object")
    add_push_argument(add)


def check_combination(args: argparse.Namespace) -> None:
    """Checks that the options of files and of data sets are not mixed.

    Raises:
        InputError: if they are, or neither images nor a data set are named.
    """
    if args.dataset is None:
        if not args.photos:
            raise InputError("Name images, one folder of them, or a data set with --dataset.")
        mixed = [name for name, value in _DEFAULTS.items() if getattr(args, name) != value]
        if mixed:
            raise InputError(f"--{mixed[0]} needs --dataset.")
        if args.push_to_hub is not None:
            raise InputError("--push_to_hub needs --dataset.")
        return
    if args.photos:
        raise InputError("Name either images or --dataset, not both.")
    of_files = {"average": False, "zip": False, "trim": False, "background": None, "format": "png", "edges": "matting"}
    for name, value in of_files.items():
        if getattr(args, name) != value:
            raise InputError(f"--{name} is for images in files; with --dataset, --alpha adds the objects' soft alpha.")
    for name in ("include", "exclude", "box", "instances"):
        if getattr(args, name):
            raise InputError(f"--{name} is for images in files, not for --dataset.")


def run_dataset(args: argparse.Namespace) -> int:
    """`macosnet segment --dataset`; returns 0.

    Raises:
        MaCoSNetError: for anything that cannot be done, in one sentence.
    """
    from ..bulk.rows import check_dataset
    from ..io.checkpoints import check_checkpoint

    def settings(weights: str) -> BulkSettings:
        values = {name: getattr(args, name) for name in _DEFAULTS}
        of_model = {"partners": args.partners, "refine": args.refine, "orientations": args.orientations}
        return BulkSettings(args.dataset, **values, **of_model, model=checkpoint_name(args.model), weights=weights)

    if not args.output_dir:
        raise OutputError("--output_dir needs the name of a folder.")
    settings("")  # before anything heavy is imported
    check_dataset(args.dataset)
    check_checkpoint(args.model)
    need_datasets("--dataset")
    if os.path.isdir(args.dataset) and Path(os.path.realpath(args.output_dir)).is_relative_to(
        os.path.realpath(args.dataset)
    ):
        raise InputError("The output folder lies in that of the data set; a second run would take masks for images.")
    rank, processes = place_among_processes()
    prepare_push(args, rank)
    give_memory_back()
    with progress_bar() as progress:
        progress(0.0, "Loading the network")
        network = load_network(args)

    from tqdm import tqdm

    from ..bulk.run import segment_dataset

    with tqdm(unit=" images", disable=not sys.stderr.isatty() or rank > 0, leave=False) as bar:
        report = segment_dataset(
            settings(weights_digest(network["model"])),
            args.output_dir,
            **network,
            rank=rank,
            processes=processes,
            progress=bar.update,
        )
    print_report(report, "images", "segmented", "read", args.output_dir, rank, processes)
    push_report(args, report)
    return 0
