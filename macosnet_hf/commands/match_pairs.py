"""`macosnet match --pairs`: matches and masks of many pairs, as Parquet shards."""

from __future__ import annotations

import argparse
import os
import sys

from ..errors import DataError, InputError, OutputError
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

_OF_ONE_PAIR = {
    "points": None,
    "points_file": None,
    "flow": False,
    "zip": False,
    "trim": False,
    "background": None,
    "format": "png",
    "edges": "matting",
    "include": None,
    "exclude": None,
    "box": None,
}


def add_pairs_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--pairs` and the option that goes with it."""
    add = parser.add_argument_group(
        "many pairs",
        "matches and masks as Parquet shards and an index; `accelerate launch -m macosnet_hf.commands.match` runs "
        "several processes, and a run that ended early goes on where it was",
    ).add_argument
    columns = (
        "table with a header: the columns source and target name images, from the folder of the table; points "
        '("x,y;x,y" of the source, to be found in the target) and id may stand beside them'
    )
    add("--pairs", metavar="CSV", help=columns)
    add("--shard_size", type=int, metavar="N", help="pairs of a shard (default: 256)")
    add_push_argument(add)


def check_pairs_combination(args: argparse.Namespace) -> None:
    """Checks that the options of one pair and of a list are not mixed.

    Raises:
        InputError: if they are, or neither two images nor a list are named.
    """
    if args.pairs is None:
        if args.target is None:
            raise InputError("Name two images, or a list of pairs with --pairs.")
        if args.shard_size is not None:
            raise InputError("--shard_size needs --pairs.")
        if args.push_to_hub is not None:
            raise InputError("--push_to_hub needs --pairs.")
        return
    if args.source is not None:
        raise InputError("Name either two images or --pairs, not both.")
    for name, value in _OF_ONE_PAIR.items():
        if (getattr(args, name) or None) != (value or None):
            raise InputError(f"--{name.replace('_', '-')} is for one pair, not for --pairs.")


def run_pairs(args: argparse.Namespace) -> int:
    """`macosnet match --pairs`; returns 0.

    Raises:
        MaCoSNetError: for anything that cannot be done, in one sentence.
    """
    from ..io.checkpoints import check_checkpoint

    if not args.output_dir:
        raise OutputError("--output_dir needs the name of a folder.")
    if not os.path.isfile(args.pairs):
        raise DataError(f"There is no list {args.pairs}; a CSV file is needed.")
    check_checkpoint(args.model)
    need_datasets("--pairs")
    rank, processes = place_among_processes()
    prepare_push(args, rank)
    give_memory_back()

    from tqdm import tqdm

    from ..bulk.pairs import PairSettings, match_list, read_pairs
    from ..bulk.settings import SHARD_SIZE

    next(read_pairs(args.pairs), None)  # a wrong header is reported at once

    def settings(weights: str) -> PairSettings:
        return PairSettings(
            args.pairs,
            threshold=args.threshold,
            refine=args.refine,
            orientations=args.orientations,
            shard_size=SHARD_SIZE if args.shard_size is None else args.shard_size,
            model=checkpoint_name(args.model),
            weights=weights,
        )

    settings("")  # a wrong value is reported at once
    with progress_bar() as progress:
        progress(0.0, "Loading the network")
        network = load_network(args)
    with tqdm(unit=" pairs", disable=not sys.stderr.isatty() or rank > 0, leave=False) as bar:
        report = match_list(
            settings(weights_digest(network["model"])),
            args.output_dir,
            **network,
            rank=rank,
            processes=processes,
            progress=bar.update,
        )
    print_report(report, "pairs", "done", "matched", args.output_dir, rank, processes)
    push_report(args, report)
    return 0
