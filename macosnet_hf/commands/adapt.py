"""`macosnet adapt`: a short fine-tuning on a user's own collection of images, without any label.

The command is a joint training (`training/joint_run.py`) with settings that suit a few images and a laptop. The
better of the models before and after is kept.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError, OutputError
from ..io.checkpoints import check_checkpoint
from ..io.output_folder import output_folder
from ..io.package import DEFAULT_CHECKPOINT

# What `training/configs/my-images.yaml` holds too, for those who want to change more than the command offers.
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "group_size": 2,
    "max_train_steps": 100,
    "num_warmup_steps": 10,
    "learning_rate": 1e-5,
    "decoder_learning_rate": 2e-4,
    "weight_decay": 1e-4,
    "ema_decay": 0.95,
    "benchmark_weights": "pf-pascal",
    "lambda_matching": 0.2,
    "lambda_cycle": 0.05,
    "lambda_contrast": 5.0,
    "lambda_task": 5.0,
    "prior_weight": 20.0,
    "local_weight": 50.0,
    "synthetic_weight": 50.0,
    "detach_masks": True,
    "freeze_decoder_statistics": True,
    "photometric": True,
    "keep_in_memory": True,
    "photos_per_class": 200,
    "logging_steps": 10,
    "validation_steps": 25,
    "validation_groups": 16,
    "load_best_model_at_end": True,
}

# Files that a training leaves and that a user of the command has no use for.
_LEFT_OVERS = ("best", "samples", "log.jsonl", "pseudo_masks.npz")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "folder", metavar="FOLDER", help="images of one kind of thing, or a folder for each kind of thing"
    )
    parser.add_argument(
        "--output-dir", "--output_dir", required=True, metavar="DIR", help="where the adapted model goes"
    )
    parser.add_argument(
        "--model", default=DEFAULT_CHECKPOINT, metavar="ID_OR_DIR", help="model to start from (default: the embedded)"
    )
    parser.add_argument(
        "--max-train-steps",
        "--max_train_steps",
        type=int,
        default=SETTINGS["max_train_steps"],
        metavar="N",
        help=f"steps of {SETTINGS['per_device_train_batch_size']} pairs (default {SETTINGS['max_train_steps']})",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random (default 0)")


def words(args: argparse.Namespace, output: Path, left_out: Sequence[str] = ()) -> list[str]:
    """The command line of `training/train.py` that the command stands for."""
    settings = {
        **SETTINGS,
        "max_train_steps": args.max_train_steps,
        "seed": args.seed,
        "checkpointing_steps": args.max_train_steps + 1,  # a run of minutes is not resumed
        "validation_steps": min(SETTINGS["validation_steps"], max(1, args.max_train_steps)),
    }
    found = ["--dataset_name", args.folder, "--model_name_or_path", args.model, "--output_dir", str(output)]
    if left_out:
        found += ["--exclude_classes", *left_out]
    for name, value in settings.items():
        if isinstance(value, bool):
            found.append(f"--{name}" if value else f"--no-{name}")
        else:
            found.append(f"--{name}={value}")
    return found


def _too_small(folder: Path) -> list[str]:
    """Class folders with a single image.

    Raises:
        InputError: if no folder has two.
    """
    from ..training.images import find_images

    counts = Counter(find_images(folder)[1])
    small = sorted(name for name, count in counts.items() if count < 2)
    if len(small) == len(counts):
        raise InputError(f"{folder} holds no two images of the same kind of thing (in one folder); a pair takes two.")
    return small


def run(args: argparse.Namespace) -> int:
    """`macosnet adapt`; returns 0.

    Raises:
        MaCoSNetError: for anything that cannot be done, in one sentence.
    """
    folder, output = Path(args.folder), Path(args.output_dir)
    if args.max_train_steps < 1:
        raise InputError(f"--max-train-steps must be at least 1; got {args.max_train_steps}.")
    if not folder.is_dir():
        raise InputError(f"{args.folder} is not a folder.")
    resolved, images = output.resolve(), folder.resolve()
    if resolved == images or images in resolved.parents:
        raise InputError("The output folder lies in the folder of the images; choose another one.")
    if output.is_dir() and any(output.iterdir()):
        raise OutputError(f"The output folder {args.output_dir} is not empty; choose a new one.")
    check_checkpoint(args.model)
    small = _too_small(folder)
    try:
        from ..training.joint_run import parse_arguments
        from ..training.joint_run import run as train
        from ..training.loop import NonFiniteLossError
    except ModuleNotFoundError as error:
        raise InputError(
            f'`macosnet adapt` needs the package {error.name}: install the extra with pip install "macosnet-hf[train]".'
        ) from error
    for name in small:
        print(f"macosnet: left out: {name} holds a single image.", file=sys.stderr)
    with output_folder(output) as partial:
        try:
            result = train(parse_arguments(words(args, partial, small)))
        except NonFiniteLossError as error:
            raise InputError("The training diverged, and nothing was written; try another --seed.") from error
        for name in _LEFT_OVERS:
            path = partial / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    before, best = result["before"]["criterion"], result["best"]
    if best["step"] == 0:
        print(f"No step was better than the model before (criterion {before:.3f}), so it was kept as it was.")
    else:
        print(f"Criterion without labels: {before:.3f} before, {best['criterion']:.3f} after {best['step']} steps.")
    print(f'Use it with: macosnet match PHOTO PHOTO --model "{args.output_dir}" --output-dir RESULT')
    return 0
