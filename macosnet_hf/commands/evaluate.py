"""`macosnet evaluate`: arguments and run, shared with `training/evaluate.py`. Importing this module loads nothing
heavy."""

from __future__ import annotations

import argparse
import json
import time
from typing import TYPE_CHECKING, Any

from ..directions import ORIENTATIONS
from ..errors import InputError
from ..evaluation import BASELINES
from ..evaluation.protocols import PROTOCOLS
from ..io.memory import keep_memory
from ..io.output_folder import check_writable, write_file
from ..io.package import DEFAULT_CHECKPOINT
from ..refinement import REFINEMENT_METHODS
from .arguments import ORIENTATIONS_HELP, print_left_out, progress_bar

if TYPE_CHECKING:
    from ..evaluation.predictors import Predictor
    from ..evaluation.scoring import Evaluation


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _alpha_list(text: str) -> tuple[float, ...]:
    try:
        alphas = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0.05,0.1") from error
    if not all(0 < alpha < float("inf") for alpha in alphas):
        raise argparse.ArgumentTypeError("thresholds must be positive numbers")
    return alphas


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `macosnet evaluate`."""
    parser.description = "Measure a model, or a baseline that needs no training, on a benchmark of the paper."
    add = parser.add_argument
    benchmark = "which protocol; coseg and which-object take images/ and masks/ class folders"
    add("benchmark", choices=tuple(PROTOCOLS), help=benchmark)
    data = "original archive, folder made by `macosnet prepare`, or Hub data set"
    add("--data", metavar="FOLDER_OR_HUB_ID", help=data)
    add("--pairs", metavar="CSV", help="list of pairs in PF's columns (benchmark pairs; others: instead of theirs)")
    add("--split", default="test", choices=("train", "validation", "test"), help="default: test")
    add("--model", metavar="ID_OR_DIR", help="default: the checkpoint that is installed with the package")
    add("--baseline", choices=BASELINES, help="measure this instead of the model")
    matching = (
        "bare transform, the one fitted to what both directions agree on, or the best feature match near it; "
        "default: what the model's configuration says"
    )
    add("--matching", choices=("transform", "fitted", "local"), help=matching)
    add("--orientations", choices=ORIENTATIONS, help=ORIENTATIONS_HELP)
    add_move = parser.add_mutually_exclusive_group().add_argument
    add_move("--mirror-source", action="store_true", help="pairs: mirror every source before matching")
    add_move(
        "--rotate-source",
        type=int,
        choices=(90, 180, 270),
        metavar="DEGREES",
        help="pairs: turn it, clockwise: 90, 180, 270",
    )
    flips = "tss: do not mirror the sources that are annotated as mirrored"
    add("--ignore-flip-annotation", action="store_true", help=flips)
    small = "pairs: reduce images to this longer side first; the paper's small-image setting of TSS is 100"
    add("--max-side", type=_positive, metavar="PIXELS", help=small)
    add("--refine", choices=REFINEMENT_METHODS, default="grabcut", help="soft to hard masks (default: grabcut)")
    size = "longer side when refining, 0: original (default: 320)"
    add("--refine-size", type=int, default=320, metavar="PIXELS", help=size)
    partners = "coseg, internet, which-object: partners of each image (default: 3)"
    add("--partners", type=_positive, default=3, metavar="K", help=partners)
    masks = (
        "single images: masks of pairs, or of each class (which-object: question) as one collection (default: pairs)"
    )
    add("--masks", choices=("pairs", "collection"), default="pairs", help=masks)
    add("--composites", type=_positive, default=100, metavar="N", help="which-object: how many (default: 100)")
    add("--seed", type=int, default=0, help="of the choice of partners and composites (default: 0)")
    add("--alphas", type=_alpha_list, metavar="A,B,...", help="thresholds instead of the protocol's own")
    add("--json", metavar="FILE", help="write all figures here")
    add("--markdown", metavar="FILE", help="write the table here")
    add("--predictions", metavar="FOLDER", help="store predictions here, or score those that are there")
    add("--skip-invalid", action="store_true", help="leave invalid samples out, counted and listed")
    add("--batch-size", type=_positive, default=8, metavar="N", help="pairs at a time (default: 8)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")


def run(args: argparse.Namespace) -> int:
    """Runs the evaluation in one process, prints the table and writes the files. Returns 0.

    Raises:
        MaCoSNetError: for anything that cannot be done, in one sentence.
    """
    start = time.monotonic()
    keep_memory()
    job = EvaluationJob(args)
    with progress_bar() as progress:
        progress(0.0, "Loading the network")
        job.load(args.device)
    job.report(job.evaluate(), time.monotonic() - start)
    return 0


class EvaluationJob:
    """An evaluation as the command line asks for it, in one or several processes.

    Args:
        args: of [`add_arguments`].

    Raises:
        DataError, InputError, OutputError: for what can be known to fail before a model is loaded.
    """

    predictor: Predictor

    def __init__(self, args: argparse.Namespace):
        from ..datasets.prepare import locate
        from ..evaluation.protocols import Options
        from ..io.checkpoints import check_checkpoint

        for name in (args.json, args.markdown):
            if name is not None:
                check_writable(name)
        if args.data is None and args.pairs is None:
            raise InputError("Say where the data is with --data (or --pairs, for a pair list).")
        if args.data is None and args.benchmark != "pairs":
            raise InputError(f"{args.benchmark} needs --data.")
        if args.baseline and (args.matching or args.orientations):
            name = "--matching" if args.matching else "--orientations"
            raise InputError(f"{name} is a choice of the model; a baseline has only one way to match.")
        self.args, self.protocol = args, PROTOCOLS[args.benchmark]
        if args.masks != "pairs" and self.protocol.kind != "images":
            raise InputError(f"--masks collection is for single images in classes; {args.benchmark} is of pairs.")
        if self.protocol.composites and (args.predictions or args.baseline):
            raise InputError(f"{args.benchmark} asks a model for its masks: no --predictions, no --baseline.")
        names = ("refine", "refine_size", "partners", "seed", "masks", "alphas", "batch_size", "composites")
        moved = "mirror" if args.mirror_source else f"turn_{args.rotate_source}" if args.rotate_source else "identity"
        if self.protocol.kind != "pairs" and (moved != "identity" or args.orientations or args.ignore_flip_annotation):
            raise InputError(f"{args.benchmark} is of single images: only the sources of pairs face somehow.")
        if self.protocol.kind != "pairs" and args.max_side:
            raise InputError(f"{args.benchmark} is of single images: --max-side is for pairs.")
        self.options = Options(
            **{name: getattr(args, name) for name in names},
            source_symmetry=moved,
            flip_annotation=not args.ignore_flip_annotation,
            max_side=args.max_side,
        )
        locate(self.protocol.data, args.data, args.pairs)
        if args.model:
            check_checkpoint(args.model)

    def load(self, device: str = "auto") -> None:
        """Loads the model, or the baseline.

        Args:
            device: `"auto"`, `"cpu"`, `"cuda"` or a `torch.device`.

        Raises:
            CheckpointError: if the model cannot be loaded.
            InputError: if it has no such way to match, or there is no such device.
        """
        from ..evaluation.baselines import make_baseline
        from ..evaluation.predictors import ModelPredictor
        from ..io.checkpoints import load_model_and_processor

        args = self.args
        if args.baseline in ("identity", "centre-grabcut"):
            self.predictor = make_baseline(args.baseline)
            return
        model, processor = load_model_and_processor(args.model or DEFAULT_CHECKPOINT, device)
        if args.baseline:
            self.predictor = make_baseline(args.baseline, model, processor)
            return
        options = {"masks": self.protocol.masks, "orientations": args.orientations}
        predictor = ModelPredictor(model, processor, name=args.model or "macosnet-lite", **options)
        if args.matching and args.matching not in predictor.variants:
            raise InputError(f"This model does not match so: its configuration has no mutual_fit ({args.matching}).")
        if args.matching:
            predictor.variants = tuple(sorted(predictor.variants, key=lambda variant: variant != args.matching))
        self.predictor = predictor

    def evaluate(self, *, rank: int = 0, world_size: int = 1, barrier: Any = None) -> Evaluation:
        """One process's share of the evaluation, with a progress bar in the first process."""
        from tqdm import tqdm

        from ..datasets.benchmarks import Problems
        from ..datasets.prepare import open_records
        from ..evaluation.runner import evaluate

        args = self.args
        reading, treating = Problems(skip=args.skip_invalid), Problems(skip=args.skip_invalid)
        records, total = open_records(self.protocol.data, args.data, args.split, pairs=args.pairs, problems=reading)
        if self.protocol.composites:
            total = None
        with tqdm(total=total, unit="sample", desc=args.benchmark, disable=rank != 0) as bar:
            result = evaluate(
                records,
                self.protocol,
                self.predictor,
                self.options,
                split=args.split,
                problems=treating,
                predictions=args.predictions,
                rank=rank,
                world_size=world_size,
                barrier=barrier,
                # The first process stands for all of them.
                progress=lambda count: bar.update(min(count * world_size, (total or float("inf")) - bar.n)) and None,
            )
        # Every process reads all records, so each of them sees the same complaints of the reader.
        result.problems = reading.messages + result.problems
        return result

    def report(self, result: Evaluation, seconds: float) -> None:
        """Completes the predictions, writes the files and prints the table.

        Raises:
            DataError: if nothing was scored.
            OutputError: if a file cannot be written.
        """
        from ..evaluation.runner import finish
        from ..evaluation.tables import json_report, markdown_table

        args, protocol, options = self.args, self.protocol, self.options
        finish(result, protocol, self.predictor, options, split=args.split, predictions=args.predictions)
        model, variant = self.predictor.name, next(iter(result.variants))
        orientations = getattr(self.predictor, "orientations", None) if protocol.kind == "pairs" else None
        if protocol.composites:
            title = f"{model}, {options.partners} partner{'s' if options.partners > 1 else ''}"
            table = markdown_table(protocol, result.variants[variant], options, title, text="") + "\n"
            table += markdown_table(protocol, result.variants["company"], options, title)
        else:
            title = model if variant in ("masks", model) else f"{model}, matching {variant}"
            if orientations not in (None, "none"):
                title += f", orientations {orientations}"
            table = markdown_table(protocol, result.variants[variant], options, title)
        table += "".join(f"\n{note}\n" for note in result.notes)
        of_run = {"model": model, "variant": variant, "split": args.split, "orientations": orientations}
        data = json_report(protocol, result, options, **of_run, seconds=seconds)
        if args.json:  # before anything is printed: nobody may be reading any more
            write_file(args.json, json.dumps(data, indent=2) + "\n")
        if args.markdown:
            write_file(args.markdown, table)
        print(table)
        print(f"{data['samples']} samples in {seconds:.1f} s")
        print_left_out(result.problems)
