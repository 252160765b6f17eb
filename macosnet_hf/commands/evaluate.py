"""`macosnet evaluate`: arguments and run, shared with `training/evaluate.py`. Importing this module loads nothing
heavy."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from ..datasets import BENCHMARK_NAMES
from ..errors import InputError
from ..io.output_folder import check_writable, write_file

if TYPE_CHECKING:
    from ..evaluation.predictors import Predictor
    from ..evaluation.protocols import Options, Protocol
    from ..evaluation.scoring import Evaluation

BASELINES = ("identity", "nearest-neighbour", "nearest-neighbour-prior", "centre-grabcut")
REFINEMENTS = ("grabcut", "otsu", "crf", "none")


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from error
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


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
    parser.description = "Measure a model, or what one gets without one, on a benchmark of the paper."
    parser.add_argument(
        "benchmark", choices=BENCHMARK_NAMES, help="which protocol; coseg is images/ and masks/ class folders"
    )
    parser.add_argument(
        "--data",
        metavar="FOLDER_OR_HUB_ID",
        help="original archive, folder made by `macosnet prepare`, or Hub data set",
    )
    parser.add_argument(
        "--pairs", metavar="CSV", help="list of pairs in PF's columns (benchmark pairs; others: instead of theirs)"
    )
    parser.add_argument("--split", default="test", choices=("train", "validation", "test"), help="default: test")
    parser.add_argument(
        "--model", metavar="ID_OR_DIR", help="default: the checkpoint that is installed with the package"
    )
    parser.add_argument("--baseline", choices=BASELINES, help="measure this instead of the model")
    parser.add_argument(
        "--matching",
        choices=("transform", "fitted", "local"),
        help="bare transform, the one fitted to what both directions agree on, or the best feature match near it; "
        "default: what the model's configuration says",
    )
    parser.add_argument(
        "--refine", choices=REFINEMENTS, default="grabcut", help="soft to hard masks (default: grabcut)"
    )
    parser.add_argument(
        "--refine-size",
        type=int,
        default=320,
        metavar="PIXELS",
        help="longer side when refining, 0: original (default: 320)",
    )
    parser.add_argument(
        "--partners",
        type=_positive,
        default=3,
        metavar="K",
        help="coseg, internet: partners of each image (default: 3)",
    )
    parser.add_argument(
        "--masks",
        choices=("pairs", "collection"),
        default="pairs",
        help="coseg, internet: masks of pairs, or of each class as one collection (default: pairs)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of partners (default: 0)")
    parser.add_argument(
        "--alphas", type=_alpha_list, metavar="A,B,...", help="thresholds instead of the protocol's own"
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures here")
    parser.add_argument("--markdown", metavar="FILE", help="write the table here")
    parser.add_argument("--predictions", metavar="FOLDER", help="keep predictions here, or score those that are there")
    parser.add_argument("--skip-invalid", action="store_true", help="leave invalid samples out, counted and listed")
    parser.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="pairs at a time (default: 8)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")


def run(args: argparse.Namespace) -> int:
    """Runs the evaluation in one process, prints the table and writes the files. Returns 0.

    Raises:
        MaCoSNetError: for anything that cannot be done, in one sentence.
    """
    start = time.monotonic()
    check_outputs(args)
    protocol, options = choose(args)
    predictor = make_predictor(args, protocol, args.device)
    result = evaluate_share(args, protocol, options, predictor)
    report(args, protocol, options, predictor, result, time.monotonic() - start)
    return 0


def check_outputs(args: argparse.Namespace) -> None:
    """Refuses files that could not be written, before the work is done.

    Raises:
        OutputError: if a folder does not exist or a name is a folder's.
    """
    for name in (args.json, args.markdown):
        if name is not None:
            check_writable(name)


def choose(args: argparse.Namespace) -> tuple[Protocol, Options]:
    """Protocol and options of the arguments.

    Raises:
        InputError: if no data is named.
    """
    from ..evaluation.protocols import PROTOCOLS, Options

    if args.data is None and args.pairs is None:
        raise InputError("Say where the data is with --data (or --pairs, for a pair list).")
    if args.data is None and args.benchmark != "pairs":
        raise InputError(f"{args.benchmark} needs --data.")
    if args.masks != "pairs" and PROTOCOLS[args.benchmark].kind != "images":
        raise InputError(f"--masks collection is for single images in classes; {args.benchmark} is a list of pairs.")
    options = Options(
        refine=args.refine,
        refine_size=args.refine_size,
        partners=args.partners,
        seed=args.seed,
        masks=args.masks,
        alphas=args.alphas,
        batch_size=args.batch_size,
    )
    return PROTOCOLS[args.benchmark], options


def make_predictor(args: argparse.Namespace, protocol: Protocol, device: str = "auto") -> Predictor:
    """The model, or the baseline, of the arguments.

    Args:
        device: `"auto"`, `"cpu"`, `"cuda"` or a `torch.device`.

    Raises:
        CheckpointError: if the model cannot be loaded.
        InputError: if a baseline is asked for something that it has not, or there is no such device.
    """
    from ..evaluation.baselines import make_baseline
    from ..evaluation.predictors import ModelPredictor
    from ..io.checkpoints import load_model_and_processor
    from ..io.package import DEFAULT_CHECKPOINT

    if args.baseline and args.matching:
        raise InputError("--matching is a choice of the model; a baseline has only one way to match.")
    if args.baseline in ("identity", "centre-grabcut"):
        return make_baseline(args.baseline)
    model, processor = load_model_and_processor(args.model or DEFAULT_CHECKPOINT, device)
    if args.baseline:
        return make_baseline(args.baseline, model, processor)
    predictor = ModelPredictor(model, processor, name=args.model or "macosnet-lite", masks=protocol.masks)
    if args.matching and args.matching not in predictor.variants:
        raise InputError(f"This model does not match so: its configuration has no mutual_fit ({args.matching}).")
    if args.matching:
        predictor.variants = tuple(sorted(predictor.variants, key=lambda variant: variant != args.matching))
    return predictor


def evaluate_share(
    args: argparse.Namespace,
    protocol: Protocol,
    options: Options,
    predictor: Predictor,
    *,
    rank: int = 0,
    world_size: int = 1,
    barrier: Any = None,
) -> Evaluation:
    """One process's share of the evaluation, with a progress bar in the first process."""
    from tqdm import tqdm

    from ..datasets.benchmarks import Problems
    from ..datasets.prepare import open_records
    from ..evaluation.runner import evaluate

    reading, treating = Problems(skip=args.skip_invalid), Problems(skip=args.skip_invalid)
    records, total = open_records(args.benchmark, args.data, args.split, pairs=args.pairs, problems=reading)
    with tqdm(total=total, unit="sample", desc=args.benchmark, disable=rank != 0) as bar:
        result = evaluate(
            records,
            protocol,
            predictor,
            options,
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


def report(
    args: argparse.Namespace,
    protocol: Protocol,
    options: Options,
    predictor: Predictor,
    result: Evaluation,
    seconds: float,
) -> dict[str, Any]:
    """Completes the predictions, prints the table, writes the files; returns what `--json` holds.

    Raises:
        DataError: if nothing was scored.
        OutputError: if a file cannot be written.
    """
    from ..evaluation.runner import finish
    from ..evaluation.tables import json_report, markdown_table

    finish(result, protocol, predictor, options, split=args.split, predictions=args.predictions)
    variant = next(iter(result.variants))
    name = predictor.name if variant in ("masks", predictor.name) else f"{predictor.name}, matching {variant}"
    table = markdown_table(protocol, result.variants[variant], options, name)
    data = json_report(
        protocol, result, options, model=predictor.name, variant=variant, split=args.split, seconds=seconds
    )
    print(table)
    print(f"{data['samples']} samples in {seconds:.1f} s")
    if result.problems:
        print(f"{len(result.problems)} left out:", file=sys.stderr)
        for message in result.problems:
            print(f"  {message}", file=sys.stderr)
    if args.json:
        write_file(args.json, json.dumps(data, indent=2) + "\n")
    if args.markdown:
        write_file(args.markdown, table)
    return data


__all__ = ["add_arguments", "run"]
