"""`macosnet adapt`: a short fine-tuning on a user's own collection of images, without any label.

The command is a joint training (`training/joint_run.py`) with the settings of `training/adapt.yaml`, which suit a few
images and a laptop. The better of the models before and after is the result.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, OutputError
from ..io.checkpoints import check_checkpoint, check_model_folder
from ..io.output_folder import clear_left_overs, output_folder
from ..io.package import DEFAULT_CHECKPOINT
from ..io.system_files import is_of_system
from .arguments import one_line

if TYPE_CHECKING:
    from ..training.settings import JointSettings

PRESET = Path(__file__).resolve().parents[1] / "training" / "adapt.yaml"

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
        metavar="N",
        help="optimiser steps (default: as many as take a laptop some minutes)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random (default 0)")


def settings_of(args: argparse.Namespace, output: Path, left_out: list[str]) -> JointSettings:
    """The settings of the training that the command stands for."""
    from ..training.settings import JointSettings, read_settings

    settings = read_settings(
        JointSettings,
        PRESET,
        dataset_name=[args.folder],
        exclude_classes=left_out,
        model_name_or_path=args.model,
        output_dir=str(output),
        seed=args.seed,
    )
    steps = args.max_train_steps or settings.max_train_steps
    assert steps is not None  # the preset has them
    return replace(
        settings,
        max_train_steps=steps,
        checkpointing_steps=steps + 1,  # a run of minutes is not resumed
        validation_steps=min(settings.validation_steps, steps),
    )


def _too_small(folder: Path) -> list[str]:
    """Class folders with a single image.

    Raises:
        InputError: if no folder has two.
    """
    from ..datasets.images import find_images

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
    if args.max_train_steps is not None and args.max_train_steps < 1:
        raise InputError(f"--max-train-steps must be at least 1; got {args.max_train_steps}.")
    if not folder.is_dir():
        raise InputError(f"{args.folder} is not a folder.")
    resolved, images = output.resolve(), folder.resolve()
    if resolved == images or images in resolved.parents:
        raise InputError("The output folder lies in the folder of the images; choose another one.")
    if output.is_dir():
        clear_left_overs(output)
    if output.is_dir() and not all(map(is_of_system, output.iterdir())):
        raise OutputError(f"The output folder {args.output_dir} is not empty; choose a new one.")
    check_model_folder(output)
    check_checkpoint(args.model)
    small = _too_small(folder)
    try:
        from ..training.joint_run import run as train
        from ..training.loop import NonFiniteLossError
    except ModuleNotFoundError as error:
        raise InputError(
            f'`macosnet adapt` needs the package {error.name}: install the extra with pip install "macosnet-hf[train]".'
        ) from error
    for name in small:
        print(one_line(f"macosnet: left out: {name} holds a single image."), file=sys.stderr)
    with output_folder(output) as partial:
        try:
            result = train(settings_of(args, partial, small))
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
        print(f"No step was better than the model before (criterion {before:.3f}), so it is unchanged.")
    else:
        print(f"Criterion without labels: {before:.3f} before, {best['criterion']:.3f} after {best['step']} steps.")
    print(f'Use it with: macosnet match PHOTO PHOTO --model "{args.output_dir}" --output-dir RESULT')
    return 0
