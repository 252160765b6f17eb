"""`macosnet prepare`: arguments and run. Importing this module loads nothing heavy."""

from __future__ import annotations

import argparse

from ..datasets.benchmarks import BENCHMARKS
from .arguments import print_left_out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `macosnet prepare`."""
    parser.description = "Turn a benchmark's original archive into Parquet that `datasets.load_dataset` reads."
    parser.add_argument(
        "benchmark", choices=tuple(BENCHMARKS), help="layout of the archive; coseg is class folders of images"
    )
    parser.add_argument("source", help="folder of the original archive")
    parser.add_argument("output", help="folder to make")
    parser.add_argument(
        "--split", action="append", choices=("train", "validation", "test"), help="default: all there are"
    )
    parser.add_argument("--pairs", metavar="CSV", help="list of pairs in PF's columns")
    parser.add_argument("--skip-invalid", action="store_true", help="leave invalid records out, counted and listed")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier output of this command")
    parser.add_argument("--push-to-hub", metavar="ID", help="also upload to this data set repository")
    parser.add_argument("--private", action="store_true", help="make the repository private")


def run(args: argparse.Namespace) -> int:
    """Prepares, prints the counts, uploads if asked. Returns 0.

    Raises:
        MaCoSNetError: for anything that cannot be done, in one sentence.
    """
    from tqdm import tqdm

    from ..datasets.benchmarks import Problems
    from ..datasets.prepare import prepare
    from ..io.hub import push

    problems = Problems(skip=args.skip_invalid)
    with tqdm(unit="record", desc=args.benchmark) as bar:
        counts = prepare(
            args.benchmark,
            args.source,
            args.output,
            splits=args.split,
            pairs=args.pairs,
            problems=problems,
            overwrite=args.overwrite,
            progress=lambda count: bar.update(count) and None,
        )
    for split, count in counts.items():
        print(f"{split}: {count} records")
    print_left_out(problems.messages)
    if args.push_to_hub:
        print(push("dataset", args.output, args.push_to_hub, private=args.private))
    return 0
