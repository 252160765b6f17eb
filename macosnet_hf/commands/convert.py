"""`macosnet convert`: a published checkpoint as a folder for `from_pretrained`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import progress_bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `macosnet convert`."""
    parser.description = (
        "Convert a published checkpoint (.pth.tar) of CNNGeometric, weakalign, WeakMatchNet or MaCoSNet to a folder "
        "for from_pretrained."
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="the file; no code in it runs")
    parser.add_argument("output", metavar="OUT", help="folder to write; created if need be")
    parser.add_argument("--second", metavar="FILE", help="the other stage, if affine and TPS are two files")


def run(args: argparse.Namespace) -> int:
    """`macosnet convert`; returns 0.

    Raises:
        MaCoSNetError: for anything that cannot be done, in one sentence.
    """
    from ..conversion.published import convert, save
    from ..io.checkpoints import check_model_folder

    check_model_folder(args.output)

    with progress_bar() as progress:
        progress(0.0, "Reading the checkpoint")
        conversion = convert(args.checkpoint, args.second)
        progress(0.7, "Writing the model")
        save(conversion, args.output)
    for note in conversion.notes:
        print(note)
    print(f"Converted; load it with MaCoSNetForKeypointMatching.from_pretrained({str(Path(args.output))!r})")
    return 0
