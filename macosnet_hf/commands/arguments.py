"""What commands share: options, the network, the progress bar."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ..errors import DataError, InputError, printable
from ..inference.cutouts import EDGES, FORMATS, CutoutStyle
from ..io.hub import create_repository, push
from ..io.memory import collector_paused
from ..io.package import DEFAULT_CHECKPOINT
from ..refinement import REFINEMENT_METHODS

if TYPE_CHECKING:
    from ..bulk.run import BulkReport
    from ..inference.files import Progress

ORIENTATIONS_HELP = (
    "how the source may face, compared with the target: as it does, perhaps mirrored, or perhaps mirrored and turned "
    "by quarters (default: what the checkpoint's configuration says)"
)


def add_model_arguments(parser: argparse.ArgumentParser, archive: str) -> None:
    """Adds `--output-dir`, `--model`, `--refine`, `--device` and `--zip`, whose archive has the given name."""
    folder = "folder of the results; created if need be"
    parser.add_argument("--output-dir", "--output_dir", required=True, metavar="DIR", help=folder)
    parser.add_argument(
        "--model", default=DEFAULT_CHECKPOINT, metavar="ID_OR_DIR", help="checkpoint (default: the embedded one)"
    )
    parser.add_argument(
        "--refine", choices=REFINEMENT_METHODS, default="grabcut", help="how masks are refined (default: grabcut)"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: CUDA if there is one"
    )
    parser.add_argument("--zip", action="store_true", help=f"also write all results into one file, {archive}")


def add_cutout_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--edges`, `--trim`, `--background` and `--format`, which [`cutout_style`] reads."""
    add = parser.add_argument_group("cutouts").add_argument
    add("--edges", choices=EDGES, default=EDGES[0], help="soft alpha by matting, or the mask's edge (default: matting)")
    add("--trim", action="store_true", help="crop cutouts to the object")
    background = "what lies behind the object: a colour such as white or #ff8800, or blur (default: nothing)"
    add("--background", metavar="COLOUR|blur", help=background)
    add("--format", choices=FORMATS, default=FORMATS[0], help="of cutouts (default: png)")


def cutout_style(args: argparse.Namespace) -> CutoutStyle:
    """How cutouts look.

    Raises:
        InputError: for a background that is none.
    """
    return CutoutStyle(edges=args.edges, trim=args.trim, background=args.background, format=args.format)


def load_network(args: argparse.Namespace) -> dict[str, Any]:
    """Loads `--model` on `--device`; returns the arguments `model` and `processor` of functions that use them."""
    with collector_paused():
        from ..inference import files  # noqa: F401  # imports what every command needs next
        from ..io.checkpoints import load_model_and_processor

        model, processor = load_model_and_processor(args.model, args.device)
    return {"model": model, "processor": processor}


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """Yields a progress callback that shows share and step on a terminal, and nothing elsewhere."""
    from tqdm import tqdm

    form = "{desc:<32}{percentage:3.0f}%|{bar}| {elapsed}"
    with tqdm(total=1.0, bar_format=form, leave=False, disable=not sys.stderr.isatty()) as bar:

        def show(share: float, text: str) -> None:
            bar.n = share
            bar.set_description_str(text)

        yield show


def one_line(text: str) -> str:
    """Returns a text for the terminal in one line, without what would steer it."""
    return " ".join(printable(text).split())


def print_left_out(messages: list[str]) -> None:
    """Prints what `--skip-invalid` left out, on standard error."""
    if messages:
        print("\n  ".join([f"{len(messages)} left out:", *messages]), file=sys.stderr)


def place_among_processes() -> tuple[int, int]:
    """The number of this process, and of all, as `accelerate launch`, `torchrun` or a cluster says it.

    accelerate's `PartialState` would connect the processes. They never wait for one another here, so that one that
    dies takes no other with it.

    Raises:
        InputError: for numbers that are none.
    """
    try:
        rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        device = int(os.environ.get("LOCAL_RANK", "0"))
    except ValueError as error:
        raise InputError("RANK, LOCAL_RANK and WORLD_SIZE must be whole numbers where they are set.") from error
    if processes > 1:
        import torch

        if torch.cuda.is_available():
            torch.cuda.set_device(device % torch.cuda.device_count())
    return rank, processes


def add_push_argument(add: Callable[..., Any]) -> None:
    """Adds `--push_to_hub` by the method of a parser or of one of its groups."""
    add("--push_to_hub", metavar="ID", help="upload the folder to this data set repository once all of it is there")


def prepare_push(args: argparse.Namespace, rank: int) -> None:
    """Makes the repository of `--push_to_hub`, on the first process: a missing log-in is found before a long run.

    Raises:
        InputError, OutputError: as [`~macosnet_hf.io.hub.create_repository`].
    """
    if args.push_to_hub is not None and rank == 0:
        create_repository("dataset", args.push_to_hub)


def push_report(args: argparse.Namespace, report: BulkReport) -> None:
    """Uploads the folder of a bulk run, if asked for, from the process that found all of it there.

    Raises:
        InputError, OutputError: as [`~macosnet_hf.io.hub.push`].
    """
    if args.push_to_hub is not None and report.complete is not None:
        print(push("dataset", args.output_dir, args.push_to_hub))


def need_datasets(option: str) -> None:
    """Raises `InputError` where the package `datasets` is missing, which an option needs."""
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise InputError(f"{option} needs the package datasets; install macosnet-hf[train].") from error


def print_report(
    report: BulkReport, things: str, done: str, able: str, output_dir: str, rank: int = 0, processes: int = 1
) -> None:
    """Says what a process of a bulk run has done, and what the folder holds when all is there.

    Args:
        things, done, able: as in "12 images segmented" and "None of the 12 images could be read".

    Raises:
        DataError: if all rows of the folder are errors.
    """
    name = f"process {rank + 1} of {processes}: " if processes > 1 else ""
    were = f", {report.found} were there already" if report.found else ""
    print(one_line(f"{name}{report.written} {things} {done}{were}"))
    if report.complete is not None:
        rows, errors = report.complete
        if rows == errors:
            raise DataError(f"None of the {rows} {things} could be {able}: see the column error of {output_dir}.")
        wrong = f", {errors} of them with an error" if errors else ""
        print(one_line(f"{rows} rows{wrong}; see {os.path.join(output_dir, 'README.md')}"))
