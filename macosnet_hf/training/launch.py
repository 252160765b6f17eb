"""Start and end of a training script: processes, accelerator, output folder, upload."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    GradientAccumulationPlugin,
    ProjectConfiguration,
    get_cpu_distributed_information,
    set_seed,
)
from transformers.utils import logging

from ..errors import InputError, MaCoSNetError, OutputError
from ..io.checkpoints import check_model_folder
from ..io.hub import create_repository, push
from ..io.memory import keep_memory
from ..io.output_folder import held_by_this_process, hold_folder
from .checkpoints import find_checkpoint, refuse_other_settings, write_model
from .settings import TrainingSettings

_PATIENCE = 15  # seconds; the workers of a run that was killed live on for some five


def run_script(main: Callable[[], int]) -> None:
    """Runs a script's `main` and exits; bad input gives one sentence and exit code 2."""
    try:
        _refuse_missing_processes()
        keep_memory()
        status = main()
    except MaCoSNetError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except (RuntimeError, MemoryError) as error:
        # torch's error when a worker was killed or failed.
        if "DataLoader" not in str(error):
            raise
        print(
            "error: A process that reads images died, ran out of memory or fell silent; take fewer "
            "--dataloader_num_workers, and go on with --resume_from_checkpoint latest.",
            file=sys.stderr,
        )
        status = 2
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.exit(status)


def _refuse_missing_processes() -> None:
    """`accelerate launch --num_processes N` starts a single process on CPUs, without a word; with `--multi_gpu` it
    starts N, on CPUs too. Where several were asked for, it sets a port.

    Raises:
        InputError: with the command that works.
    """
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ
    if by_accelerate and "WORLD_SIZE" not in os.environ and get_cpu_distributed_information().world_size == 1:
        raise InputError(
            "accelerate started one process although several were asked for: use accelerate launch --multi_gpu "
            f"--num_processes N {sys.argv[0]} ..., which on a machine without GPUs takes its CPUs."
        )


def make_accelerator(settings: TrainingSettings) -> Accelerator:
    """Accelerator, seeds and output folder; what cannot work is refused before any time is spent.

    Raises:
        InputError: if a setting cannot work, or the checkpoint to resume from was made with other ones.
        OutputError: if the output folder cannot be made.
    """
    if settings.with_tracking and settings.report_to not in ("all", *map(str, get_available_trackers())):
        raise InputError(f"--report_to {settings.report_to} is not installed here, or not known to accelerate.")
    logging.disable_progress_bar()  # one for every small model that is saved would break that of the training
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # without it several processes on CPUs would not find each other
            mixed_precision=settings.mixed_precision,
            # Epochs do not end a step early: the number of batches in a step is the same for all steps, so that the
            # place in the data follows from the number of the step.
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=settings.gradient_accumulation_steps, sync_with_dataloader=False
            ),
            log_with=settings.report_to if settings.with_tracking else None,
            # No `total_limit`: accelerate removes the oldest checkpoint before the new one is whole, and counts saves
            # where a resumed run needs the number of steps.
            project_config=ProjectConfiguration(project_dir=settings.output_dir),
            step_scheduler_with_optimizer=False,
        )
    except ValueError as error:  # such as fp16 on a CPU
        raise InputError(" ".join(str(error).split())) from error
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", "1")):
        raise InputError("Several processes were started but do not find each other; see training/README.md.")
    set_seed(settings.seed)
    # Images have one size in a run, so that cuDNN looks for the fastest convolutions once.
    torch.backends.cudnn.benchmark = accelerator.device.type == "cuda"
    if accelerator.is_main_process:
        check_model_folder(settings.output_dir)
        _take_folder(Path(settings.output_dir))
    accelerator.wait_for_everyone()
    checkpoint = find_checkpoint(settings)
    if checkpoint is not None and not settings.allow_changes:
        refuse_other_settings(checkpoint, accelerator, settings)
    if settings.push_to_hub and accelerator.is_main_process:
        try:
            create_repository("model", _repository(settings))
        except MaCoSNetError as error:
            raise InputError(f"--push_to_hub cannot work: {error}") from error
    if settings.with_tracking:
        values = {name: value for name, value in vars(settings).items() if isinstance(value, (int, float, str))}
        accelerator.init_trackers("macosnet", config=values)
    return accelerator


def _take_folder(folder: Path) -> None:
    """Makes the output folder and lets no other run into it as long as this process lives: two would remove each
    other's checkpoints. What a killed run left half-written is removed.

    The folder itself is locked; filelock would leave a file among the results.

    Raises:
        OutputError: if the folder cannot be used, or another run is in it.
    """
    limit = time.monotonic() + _PATIENCE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while not held_by_this_process(folder):  # as by an earlier run, or by `macosnet adapt`
            try:
                if hold_folder(folder) is None:
                    break  # there are no locks here
            except BlockingIOError as error:
                if time.monotonic() > limit:
                    raise OutputError(
                        f"Another run is training in {folder} just now; choose another folder."
                    ) from error
                time.sleep(0.5)
        for partial in folder.glob("partial-*"):
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
    except OSError as error:
        raise OutputError(f"The output folder {folder} cannot be used ({error.strerror}).") from error


def _repository(settings: TrainingSettings) -> str:
    return settings.hub_model_id or Path(settings.output_dir).resolve().name


def save_model(accelerator: Accelerator, settings: TrainingSettings, model: Any, processor: Any) -> None:
    """Writes model and processor into the output folder, and uploads them (never a checkpoint) if asked.

    Raises:
        InputError, OutputError: if the upload fails; the model is in the output folder all the same.
    """
    if accelerator.is_main_process:
        write_model(settings.output_dir, model, processor)
        if settings.push_to_hub:
            push("model", settings.output_dir, _repository(settings))
    accelerator.wait_for_everyone()
    if settings.with_tracking:
        accelerator.end_training()
