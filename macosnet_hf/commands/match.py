"""`macosnet match`: matches of two images, and masks of the object in both."""

from __future__ import annotations

import argparse
import csv
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..directions import ORIENTATIONS, orientation_in_words
from ..errors import InputError
from ..inference import VIEWS
from ..inference.result_files import PAIR_ARCHIVE, pair_file_names, write_pair, zip_folder
from ..io.memory import give_memory_back
from ..io.package import checkpoint_name
from .arguments import (
    ORIENTATIONS_HELP,
    add_cutout_arguments,
    add_model_arguments,
    cutout_style,
    load_network,
    progress_bar,
)
from .hint_options import add_hint_arguments, read_hints
from .match_pairs import add_pairs_arguments, check_pairs_combination, run_pairs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `macosnet match`."""
    parser.description = (
        "Match two images of the same kind of object and segment the object in both.\n\n"
        "Writes matches.json and matches.csv (points in pixels), matches.png (a drawing), mask and cutout of source "
        "and target, and source_warped.png (the source warped onto the target); with --pairs, matches and masks of "
        "many pairs as Parquet shards."
    )
    parser.add_argument("source", metavar="SOURCE", nargs="?", help="an image")
    parser.add_argument("target", metavar="TARGET", nargs="?", help="another image of the same kind of object")
    parser.add_argument("more", nargs="*", help=argparse.SUPPRESS)  # to name the mistake
    add_model_arguments(parser, PAIR_ARCHIVE)
    add_cutout_arguments(parser)
    add_hint_arguments(parser, "source or target, or the file's name")
    parser.add_argument(
        "--instances",
        action="store_true",
        help="also tell several objects of an image apart, give the matches of the two that match best, and say which; "
        "source_instances.png and target_instances.png hold their labels, 1 the largest",
    )
    parser.add_argument("--flow", action="store_true", help="also write the dense flow of both directions, flow.npz")
    parser.add_argument("--orientations", choices=ORIENTATIONS, help=ORIENTATIONS_HELP)
    points = parser.add_mutually_exclusive_group()
    points.add_argument("--points", metavar='"x,y;x,y"', help="points of the source, in pixels, to find in the target")
    points.add_argument(
        "--points-file", metavar="CSV", help="the same from a file, one x,y per line (a header may stand first)"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.0,
        metavar="T",
        help="drop matches with a score of T or less, 0 to 1 (default: 0)",
    )
    add_pairs_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """`macosnet match`; returns 0.

    Raises:
        MaCoSNetError: for anything that cannot be done, in one sentence.
    """
    from ..io.checkpoints import check_checkpoint
    from ..io.output_folder import output_folder, refuse_to_overwrite
    from ..io.working_copy import open_working_copy

    check_pairs_combination(args)
    if not 0 <= args.threshold <= 1:
        raise InputError(f"--threshold must lie between 0 and 1; got {args.threshold:g}.")
    if args.pairs is not None:
        return run_pairs(args)
    if args.more:
        count = 2 + len(args.more)
        raise InputError(f"`macosnet match` takes two images, not {count}; `macosnet segment` takes any number.")
    for path in (args.source, args.target):
        if os.path.isdir(path):
            raise InputError(f"'{path}' is a folder; name two images, or give the folder to `macosnet segment`.")
    points, style = _read_points(args), cutout_style(args)
    check_checkpoint(args.model)
    give_memory_back()
    source, target = (open_working_copy(path, path, side=None) for path in (args.source, args.target))
    if points is not None:
        _check_inside(points, source.size)
    hints = {VIEWS[view]: hint for view, hint in read_hints(args, (source, target), VIEWS).items()}
    names = pair_file_names(flow=args.flow, archive=args.zip, style=style, instances=args.instances)
    refuse_to_overwrite(args.output_dir, names, (args.source, args.target))
    with output_folder(args.output_dir) as folder, progress_bar() as progress:
        progress(0.0, "Loading the network")
        network = load_network(args)
        from ..inference.files import match_copies

        progress(0.4, "Matching and segmenting")
        pair = match_copies(
            (source, target),
            refine=args.refine,
            orientations=args.orientations,
            hints=hints,
            instances=args.instances,
            **network,
        )
        progress(0.8, "Writing the results")
        document = write_pair(
            pair,
            folder,
            args.threshold,
            model=checkpoint_name(args.model),
            points=None if points is None else [point for _, point in points],
            flow=args.flow,
            style=style,
        )
        if args.zip:
            zip_folder(folder, PAIR_ARCHIVE)
    if pair.same_image:
        print("macosnet: both images are the same, so each point finds itself; name two images.", file=sys.stderr)
    count = len(document["matches"])
    words = f"{count} {'match' if count == 1 else 'matches'}, quality {document['quality']}"
    if turned := orientation_in_words(document["orientation"]):
        words += f", {turned}"
    print(f"{words}; see {Path(args.output_dir) / 'matches.png'}")
    print(document["reason"])
    if pair.result.instances is not None and (which := pair.result.instances.in_words()):
        print(which[0].upper() + which[1:] + ".")
    for point in document.get("points", []):
        print("source {:g},{:g} lies at target {:g},{:g}".format(*point["source"], *point["target"]))
    return 0


# A point and what to call it in an error: `("point 2", (x, y))`.
_NamedPoint = tuple[str, tuple[float, float]]


def _read_points(args: argparse.Namespace) -> list[_NamedPoint] | None:
    """The points of `--points` or `--points-file`; `None` if neither is given.

    Raises:
        InputError: naming the point or the line of the file that is wrong.
    """
    if args.points is not None:
        source = "--points"
        rows = [(f"point {number}", text) for number, text in enumerate(args.points.split(";"), 1) if text.strip()]
    elif args.points_file is not None:
        source = args.points_file
        rows = _points_file_rows(source)
    else:
        return None
    points = []
    for where, text in rows:
        try:
            x, y = (float(cell) for cell in text.split(","))
        except ValueError:
            raise InputError(f"{source}, {where}: expected two numbers x,y; got {text.strip()!r}.") from None
        if not (math.isfinite(x) and math.isfinite(y)):
            raise InputError(f"{source}, {where}: the numbers must be finite; got {text.strip()!r}.")
        points.append((f"{source}, {where}", (x, y)))
    if not points:
        raise InputError(f"{source} holds no points.")
    return points


def _points_file_rows(path: str) -> list[tuple[str, str]]:
    """The rows of a CSV file that are not empty, each with its line in the file; a header `x,y` is left out."""
    rows: list[tuple[str, str]] = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            for cells in reader:
                header = not rows and [cell.strip().lower() for cell in cells] == ["x", "y"]
                if any(cell.strip() for cell in cells) and not header:
                    rows.append((f"line {reader.line_num}", ",".join(cells)))
    except OSError as error:
        raise InputError(f"The points file {path} cannot be read ({error.strerror or error}).") from error
    except (ValueError, csv.Error) as error:  # a wrong encoding is a ValueError
        raise InputError(f"The points file {path} cannot be read (it is no text in UTF-8).") from error
    return rows


def _check_inside(points: Sequence[_NamedPoint], size: tuple[int, int]) -> None:
    for where, (x, y) in points:
        if not (0 <= x <= size[0] - 1 and 0 <= y <= size[1] - 1):
            raise InputError(f"{where}: {x:g},{y:g} lies outside of the source, which is {size[0]}x{size[1]} pixels.")


if __name__ == "__main__":  # accelerate launch -m macosnet_hf.commands.match
    from .main import main

    sys.exit(main(["match", *sys.argv[1:]]))
