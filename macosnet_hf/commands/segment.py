"""`macosnet segment`: the object that two or more images have in common."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..directions import COLLECTION_ORIENTATIONS
from ..errors import ImageError, InputError
from ..inference import COLLECTION_SIDE
from ..inference.result_files import COLLECTION_ARCHIVE, collection_file_names, write_collection, zip_folder
from ..io.image_files import is_image_file
from ..io.memory import give_memory_back
from ..io.package import checkpoint_name
from ..io.system_files import is_of_system
from ..io.working_copy import WorkingCopy, distinct_names, open_working_copy
from .arguments import (
    add_cutout_arguments,
    add_model_arguments,
    cutout_style,
    load_network,
    one_line,
    progress_bar,
)
from .hint_options import add_hint_arguments, read_hints
from .segment_dataset import add_dataset_arguments, check_combination, run_dataset

if TYPE_CHECKING:
    from ..inference.files import Progress

_READERS = min(8, os.cpu_count() or 1)  # images that are decoded at the same time
_WRITERS = 2  # images that are in memory in full size at the same time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `macosnet segment`."""
    parser.description = (
        "Segment the object that two or more images have in common, or what stands out in one image alone.\n\n"
        "Writes NAME_mask.png and NAME_cutout.png for each image, overview.png and summary.json; with --dataset, masks "
        "of any number of images as Parquet shards."
    )
    parser.add_argument("photos", nargs="*", metavar="PHOTO", help="images, or one folder of them")
    add_model_arguments(parser, COLLECTION_ARCHIVE)
    add_cutout_arguments(parser)
    add_hint_arguments(parser, "its file's name, its path, or its number in the order of the images, from 1")
    parser.add_argument(
        "--instances",
        action="store_true",
        help="also tell several objects of an image apart: NAME_instances.png holds their labels, 1 the largest, and "
        "NAME_cutout_1.png ... the cutout of each",
    )
    parser.add_argument(
        "--average", action="store_true", help="also warp the images onto one of them and write their mean, average.png"
    )
    parser.add_argument(
        "--partners",
        type=int,
        default=2,
        metavar="N",
        help="how many others each image is compared with (default: 2)",
    )
    parser.add_argument(
        "--orientations",
        choices=COLLECTION_ORIENTATIONS,
        default="none",
        help="mirror: find out which images face the other way; the contact sheet and the average show all facing one "
        "way (default: none, all as they are)",
    )
    add_dataset_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """`macosnet segment`; returns 0, or 130 after Ctrl+C with results of some images.

    Raises:
        MaCoSNetError: for anything that cannot be done, in one sentence.
    """
    from ..io.checkpoints import check_checkpoint
    from ..io.output_folder import output_folder, refuse_to_overwrite

    if args.partners < 1:
        raise InputError(f"--partners must be at least 1; got {args.partners}.")
    style = cutout_style(args)
    check_combination(args)
    if args.dataset is not None:
        return run_dataset(args)
    check_checkpoint(args.model)
    paths, from_folder = _image_paths(args.photos)
    if args.average and len(paths) == 1:
        raise InputError("--average needs two or more images.")
    if from_folder and os.path.realpath(args.output_dir) == os.path.realpath(args.photos[0]):
        raise InputError("The output folder is the folder of the images; a second run would take masks for them.")
    give_memory_back()
    with progress_bar() as progress:
        copies, skipped = _read_copies(paths, skip_damaged=from_folder, progress=progress)
    if from_folder and len(copies) < 2:
        raise InputError(
            f"Co-segmentation needs two or more images; of the {len(paths)} in {args.photos[0]} {len(copies)} can "
            f"be read ({skipped[0][1].rstrip('.')})."
        )
    hints = read_hints(args, copies)
    names = _result_names(copies)
    results = collection_file_names(
        names, average=args.average, archive=args.zip, instances=args.instances, style=style
    )
    refuse_to_overwrite(args.output_dir, results, [copy.path for copy in copies])
    for _, reason in skipped:
        print(f"macosnet: left out: {reason}", file=sys.stderr)

    with output_folder(args.output_dir) as folder, progress_bar() as progress:
        progress(0.0, "Loading the network")
        network = load_network(args)
        from ..inference.files import segment_copies

        collection = segment_copies(
            copies,
            names,
            refine=args.refine,
            partners=args.partners,
            average=args.average,
            orientations=args.orientations,
            hints=hints,
            instances=args.instances,
            progress=lambda share, text: progress(0.7 * share, text),
            **network,
        )
        document = write_collection(
            collection,
            folder,
            model=checkpoint_name(args.model),
            skipped=skipped,
            workers=_WRITERS,
            style=style,
            progress=lambda share, text: progress(0.7 + 0.3 * share, text),
        )
        if args.zip:
            zip_folder(folder, COLLECTION_ARCHIVE)
    print_remarks(document)
    count = len(document["photos"])
    print(f"{count} image{'s' if count > 1 else ''}; see {Path(args.output_dir) / 'overview.png'}")
    if document["not_done"]:
        print(f"macosnet: interrupted; {count} of {len(copies)} images were segmented and written.", file=sys.stderr)
        return 130
    return 0


def print_remarks(document: dict[str, Any]) -> None:
    """Prints which images of a result do not fit the others."""
    for name in document["odd_ones_out"]:
        print(one_line(f"{name} does not seem to show what the others show"))
    for photo in document["photos"]:
        if document["alone"]:
            print(one_line(f"{photo['file']} was compared with itself: its mask is what stands out in it"))
        elif not photo["common"]:
            what = "has no object in common with its partners: its mask is what stands out in it"
            print(one_line(f"{photo['file']} {what}"))


def _image_paths(arguments: Sequence[str]) -> tuple[list[Path], bool]:
    """The images that were named, each once, and whether they come from a folder."""
    if len(arguments) == 1 and os.path.isdir(arguments[0]):
        folder = Path(arguments[0])
        try:
            paths = sorted(path for path in folder.iterdir() if is_image_file(path))
        except OSError as error:
            raise InputError(f"The folder {folder} cannot be read ({error.strerror or error}).") from error
        if len(paths) < 2:
            raise InputError(
                f"Co-segmentation needs two or more images; the folder {folder} holds {len(paths) or 'none'}."
            )
        return paths, True
    for argument in arguments:
        if not os.path.exists(argument):
            raise ImageError(f"'{argument}' does not exist.")
        if os.path.isdir(argument):
            raise InputError(f"{argument} is a folder; pass one folder alone, or images.")
    named: dict[str, Path] = {}
    chosen = [argument for argument in arguments if not is_of_system(Path(argument))]  # of a pattern such as *.*
    for argument in chosen or arguments:
        named.setdefault(os.path.realpath(argument), Path(argument))
    paths = list(named.values())
    if len(paths) < len(chosen) and len(paths) == 1:
        raise InputError("Co-segmentation needs two or more different images, or a folder of them.")
    return paths, False


def _read_copies(
    paths: Sequence[Path], *, skip_damaged: bool, progress: Progress
) -> tuple[list[WorkingCopy], list[tuple[str, str]]]:
    """Working copies of the images that can be read, and the names of the others with the reason.

    Raises:
        ImageError: for the first one that cannot be read, unless `skip_damaged`.
    """
    from concurrent.futures import ThreadPoolExecutor

    def read(path: Path) -> WorkingCopy | ImageError:
        try:
            return open_working_copy(path, str(path), COLLECTION_SIDE, fine=True)
        except ImageError as error:
            return error

    copies: list[WorkingCopy] = []
    skipped: list[tuple[str, str]] = []
    with ThreadPoolExecutor(_READERS) as pool:
        for number, (path, found) in enumerate(zip(paths, pool.map(read, paths), strict=True), 1):
            progress(number / len(paths), f"Read {number} of {len(paths)}")
            if isinstance(found, WorkingCopy):
                copies.append(found)
            elif skip_damaged:
                skipped.append((str(path), str(found)))
            else:
                raise found
    return copies, skipped


def _result_names(copies: Sequence[WorkingCopy]) -> list[str]:
    """Distinct names for result files, which do not depend on the order of the images."""
    paths = sorted(Path(copy.path) for copy in copies)
    names = dict(zip(paths, distinct_names([path.name for path in paths]), strict=True))
    return [names[Path(copy.path)] for copy in copies]


if __name__ == "__main__":  # accelerate launch -m macosnet_hf.commands.segment
    from .main import main

    sys.exit(main(["segment", *sys.argv[1:]]))
