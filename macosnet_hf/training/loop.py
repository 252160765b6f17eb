"""What the training scripts share: arguments with the usual names, the loop, exact resume, bounded checkpoints."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import itertools
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, set_seed
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm
from transformers import get_scheduler

from ..errors import InputError, MaCoSNetError, OutputError
from ..io.output_folder import held_by_this_process, hold_folder, release_folder

DEFAULT_STEPS = 1000
WORKER_SECONDS = 900  # within which a process that reads images must have a batch
SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")

# What may change between a run and its continuation, because it does not touch the result. The images are compared
# by themselves (`TrainingData.fingerprint`), so that a folder may move.
FREE_ARGUMENTS = {
    "config",
    "dataset_name",
    "output_dir",
    "resume_from_checkpoint",
    "allow_changes",
    "dataloader_num_workers",
    "keep_in_memory",
    "skip_data_check",
    "streaming",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "logging_steps",
    "validation_steps",
    "validation_pairs",
    "validation_masks",
    "validation_per_class",
    "sample_steps",
    "sample_groups",
    "load_best_model_at_end",
    "with_tracking",
    "report_to",
    "push_to_hub",
    "hub_model_id",
}


class NonFiniteLossError(MaCoSNetError):
    """The loss or its gradient became infinite or not a number; the state before the step has been saved."""


class TrainingData(Protocol):
    """A map-style data set that can say which images it holds."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...

    def fingerprint(self) -> str:
        """Text that is equal for equal contents only."""
        ...


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


def script_parser(description: str | None = None) -> argparse.ArgumentParser:
    """A parser with the arguments that every script takes, under the names that Accelerate's users know."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    flag = argparse.BooleanOptionalAction
    parser.add_argument("--config", default=None, help="YAML file of these arguments; the command line wins over it")
    parser.add_argument("--dataset_name", nargs="+", required=True, help="folders of images, or Hub data-set ids")
    parser.add_argument("--exclude_classes", nargs="*", default=[], help="class folders to leave out")
    parser.add_argument("--photo_size", type=int, default=256, help="side to which images are resized at first")
    parser.add_argument("--output_dir", required=True, help="where checkpoints and the final model go")
    parser.add_argument("--per_device_train_batch_size", type=int, default=16)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--weight_decay", type=float, default=0.0)
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--lr_scheduler_type", choices=SCHEDULES, default="cosine")
    parser.add_argument("--num_warmup_steps", type=int, default=100)
    parser.add_argument(
        "--max_train_steps",
        type=int,
        default=None,
        help=f"optimiser steps; wins over --num_train_epochs ({DEFAULT_STEPS} where neither is given)",
    )
    parser.add_argument("--num_train_epochs", type=float, default=None)
    parser.add_argument("--ema_decay", type=float, default=0.999, help="0 turns the moving average of the weights off")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mixed_precision", choices=["no", "bf16", "fp16"], default=None)
    parser.add_argument("--dataloader_num_workers", type=int, default=0)
    parser.add_argument("--keep_in_memory", action=flag, default=False, help="decode all images once, at the start")
    parser.add_argument(
        "--streaming",
        action=flag,
        default=False,
        help="read data sets as streams: nothing is stored on the disk, the resized images stay in memory",
    )
    parser.add_argument(
        "--skip_data_check", action=flag, default=False, help="do not try to read every image before training"
    )
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--checkpoints_total_limit", type=int, default=2)
    parser.add_argument("--resume_from_checkpoint", default=None, help="a checkpoint folder, or 'latest'")
    parser.add_argument(
        "--allow_changes", action=flag, default=False, help="resume although settings or images are other ones"
    )
    parser.add_argument("--logging_steps", type=int, default=50)
    parser.add_argument("--validation_steps", type=int, default=500)
    parser.add_argument("--with_tracking", action=flag, default=False)
    parser.add_argument("--report_to", default="tensorboard", help="tensorboard, trackio, wandb, ..., or all")
    parser.add_argument("--push_to_hub", action=flag, default=False, help="upload the final model (no checkpoints)")
    parser.add_argument("--hub_model_id", default=None, help="defaults to the name of the output folder")
    return parser


def parse_with_config(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line on top of the YAML file that `--config` names.

    Raises:
        InputError: if the file cannot be read, or has a key that is no argument of the script.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", default=None)
    path = finder.parse_known_args(given)[0].config
    # The file's settings become words of a command line, so that types and choices are checked in one place.
    return parser.parse_args((_config_words(parser, path) if path else []) + given)


def _config_words(parser: argparse.ArgumentParser, path: str) -> list[str]:
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"The configuration {path} cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(settings, dict):
        raise InputError(f"The configuration {path} is not a list of `argument: value` lines.")
    known = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    words: list[str] = []
    for key, value in settings.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Is {close[0]} meant?" if close else ""
            raise InputError(f"The configuration {path} has an unknown key {key!r}.{hint}")
        many = known[key].nargs in ("+", "*")
        if isinstance(value, dict) or (isinstance(value, list) and not many):
            raise InputError(f"The key {key!r} of the configuration {path} takes a single value.")
        is_flag = isinstance(known[key], argparse.BooleanOptionalAction)
        if is_flag != isinstance(value, bool) and value is not None:
            raise InputError(
                f"The key {key!r} of the configuration {path} takes {'true or false' if is_flag else 'a value'}."
            )
        if value is None:
            continue
        if is_flag:
            words.append(f"--{key}" if value else f"--no-{key}")
        elif many:
            words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
        else:
            words.append(f"--{key}={value}")
    return words


def _check(args: argparse.Namespace) -> None:
    for name in (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "max_train_steps",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "logging_steps",
        "validation_steps",
        "sample_steps",
    ):
        if getattr(args, name, None) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name} must be at least 1.")
    for name in ("num_warmup_steps", "dataloader_num_workers", "weight_decay", "seed"):
        if not getattr(args, name) >= 0:
            raise InputError(f"--{name} must not be negative.")
    for name in (
        "learning_rate",
        "encoder_learning_rate",
        "decoder_learning_rate",
        "max_grad_norm",
        "num_train_epochs",
    ):
        value = getattr(args, name, None)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise InputError(f"--{name} must be a positive number.")
    if not 0 <= args.ema_decay < 1:
        raise InputError("--ema_decay must be at least 0 and less than 1.")
    if args.with_tracking and args.report_to != "all" and args.report_to not in map(str, get_available_trackers()):
        raise InputError(f"--report_to {args.report_to} is not installed here, or not known to accelerate.")


# ---------------------------------------------------------------------------------------------------------------------
# Start and end of a run
# ---------------------------------------------------------------------------------------------------------------------


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """Accelerator, seeds and output folder; finds out what cannot work before any time is spent.

    Raises:
        InputError: if an option cannot work, or the checkpoint to resume from was made with other settings.
        OutputError: if the output folder cannot be made.
    """
    _check(args)
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # without it several processes on CPUs would not find each other
            mixed_precision=args.mixed_precision,
            # Epochs do not end a step early: the number of batches in a step is the same for all steps, so that the
            # place in the data follows from the number of the step.
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=args.gradient_accumulation_steps, sync_with_dataloader=False
            ),
            log_with=args.report_to if args.with_tracking else None,
            project_config=ProjectConfiguration(project_dir=args.output_dir),
            step_scheduler_with_optimizer=False,
        )
    except ValueError as error:  # such as fp16 on a CPU
        raise InputError(" ".join(str(error).split())) from error
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", "1")):
        raise InputError("Several processes were started but do not find each other; see training/README.md.")
    set_seed(args.seed)
    if accelerator.is_main_process:
        try:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            _hold(Path(args.output_dir))
            for partial in Path(args.output_dir).glob("partial-*"):
                # What a killed run left behind while it saved or removed something.
                shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
        except OSError as error:
            raise OutputError(f"The output folder {args.output_dir} cannot be used ({error.strerror}).") from error
    accelerator.wait_for_everyone()
    checkpoint = find_checkpoint(args)
    if checkpoint is not None and not args.allow_changes:
        _refuse_other_settings(checkpoint, _settings(accelerator, args))
    if args.push_to_hub and accelerator.is_main_process:
        args.hub_model_id = _make_repository(args)
    if args.with_tracking:
        values = {key: value for key, value in vars(args).items() if isinstance(value, (int, float, str))}
        accelerator.init_trackers("macosnet", config=values)
    return accelerator


_held: dict[str, int | None] = {}  # output folders that this process trains in
_PATIENCE = 15  # seconds; the workers of a run that was killed live on for some five


def _hold(folder: Path) -> None:
    """Lets no other run into the folder as long as this process lives: two would remove each other's checkpoints.

    Raises:
        OutputError: if another run is in it.
    """
    name = os.path.abspath(folder)
    release_folder(_held.pop(name, None))  # of an earlier run in this process
    if held_by_this_process(folder):  # `macosnet adapt` trains in a folder of its own making
        return
    limit = time.monotonic() + _PATIENCE
    while name not in _held:
        try:
            _held[name] = hold_folder(folder)
        except BlockingIOError as error:
            if time.monotonic() > limit:
                raise OutputError(f"Another run is training in {folder} just now; choose another folder.") from error
            time.sleep(0.5)


def save_model(accelerator: Accelerator, args: argparse.Namespace, model: Any, processor: Any) -> None:
    """Writes model and processor into the output folder, and uploads them (never a checkpoint) if asked.

    Raises:
        OutputError: if the upload fails; the model is in the output folder all the same.
    """
    if accelerator.is_main_process:
        write_model(args.output_dir, model, processor)
        if args.push_to_hub:
            from huggingface_hub import upload_folder

            kept_here = ["checkpoint-*", "partial-*", "log.jsonl", "*.npz", "macosnet/*", "samples/*", "best/*"]
            try:
                upload_folder(repo_id=args.hub_model_id, folder_path=args.output_dir, ignore_patterns=kept_here)
            except Exception as error:  # the client raises many kinds; all mean that the upload failed.
                raise OutputError(f"The upload to {args.hub_model_id} failed: {_first_line(error)}.") from error
    accelerator.wait_for_everyone()
    if args.with_tracking:
        accelerator.end_training()


def write_model(folder: str | Path, model: Any, processor: Any, state_dict: dict[str, Tensor] | None = None) -> None:
    """Writes a model and its processor; no file appears in the folder before all of them are written.

    Args:
        state_dict: weights to write instead of the model's own.

    Raises:
        OutputError: if the folder cannot be written, such as on a full disk.
    """
    folder = Path(folder)
    partial = folder / "partial-model"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with writing(folder), _no_progress_bars():
            model.save_pretrained(partial, state_dict=state_dict)
            processor.save_pretrained(partial)
            for path in sorted(partial.iterdir()):
                path.replace(folder / path.name)
    except OSError as error:
        raise OutputError(f"The folder {folder} cannot be made ({error.strerror or error}).") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """A model of a few megabytes is written in no time; a bar a time would only break that of the training."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def writing(what: Path) -> Iterator[None]:
    """Turns what torch, safetensors and the system say of a disk that is full or closed into one sentence.

    Raises:
        OutputError: if writing fails.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else _first_line(error)
        raise OutputError(f"{what} could not be written ({reason}); is the disk full?") from error


def _make_repository(args: argparse.Namespace) -> str:
    """Before training, so that a missing log-in is found at once."""
    from huggingface_hub import create_repo

    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        return create_repo(name, exist_ok=True).repo_id
    except Exception as error:  # the client raises many kinds; all mean that nothing can be uploaded.
        raise InputError(f"--push_to_hub cannot work: {_first_line(error)}.") from error


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__).rstrip(".:")


def _start_missing_processes() -> None:
    """Makes `accelerate launch --cpu --num_processes N` start N processes: by itself it starts one, without a word.

    Its launcher for CPUs sets a port where several were asked for, but tells their number to nobody, so it is read from
    the launcher's own command line or configuration.

    Raises:
        InputError: if their number cannot be found out.
    """
    from accelerate.utils import get_cpu_distributed_information

    asked = "MASTER_PORT" in os.environ and os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes")
    if not asked or "WORLD_SIZE" in os.environ or get_cpu_distributed_information().world_size > 1:
        return
    count = _asked_processes()
    if count is None:
        raise InputError(
            "accelerate started one process although several were asked for: use accelerate launch --multi_gpu "
            "--num_processes N, which on a machine without GPUs takes its CPUs."
        )
    if count > 1:
        place = ["--master_addr", os.environ.get("MASTER_ADDR", "127.0.0.1")]
        place += ["--master_port", os.environ["MASTER_PORT"]]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count), *place]
        os.execv(sys.executable, [*launcher, *sys.argv])


def _asked_processes() -> int | None:
    """`--num_processes` of the `accelerate launch` that started this process, or of its configuration file."""
    import psutil
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return None
    if not any("accelerate" in word for word in words[:4]):
        return None
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    values = {
        name.replace("-", "_").lstrip("_"): value for name, value in itertools.pairwise(words) if name[:2] == "--"
    }
    if values.get("num_processes", "").isdigit():
        return int(values["num_processes"])
    try:
        configured: int = load_config_from_file(values.get("config_file")).num_processes
    except Exception:  # no file, or one of another kind: many sorts
        return None
    return configured


def run_script(main: Callable[[], int]) -> None:
    """Runs a script's `main`; bad input ends with one sentence and exit code 2."""
    try:
        _start_missing_processes()
        status = main()
    except MaCoSNetError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except (RuntimeError, MemoryError) as error:
        # A worker that the system killed, or that met with an error itself: torch says so in its own words.
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


# ---------------------------------------------------------------------------------------------------------------------
# Randomness
# ---------------------------------------------------------------------------------------------------------------------


def step_generator(seed: int, step: int, rank: int = 0) -> torch.Generator:
    """Randomness of one batch on one process: the same whether or not the run was interrupted before it."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 4_099 + rank)


class EpochSampler(Sampler[int]):
    """A random order that depends on nothing but the seed and the epoch.

    torch's own draws the order of an epoch from the state that the epoch before left, which a resumed run lacks.

    Args:
        count: samples in an epoch.
        seed: another seed gives another order.
        fresh: the numbers of an epoch go on where those of the epoch before ended, for a data set without end.
    """

    def __init__(self, count: int, seed: int, fresh: bool = False):
        self.count, self.seed, self.epoch, self.fresh = count, seed, 0, fresh

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        first = self.epoch * self.count if self.fresh else 0
        return iter((torch.randperm(self.count, generator=generator) + first).tolist())


# ---------------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class ParameterGroup:
    """Parameters that share a learning rate, and what to call them."""

    name: str
    parameters: Sequence[nn.Parameter]
    learning_rate: float


def check_enough(count: int, args: argparse.Namespace, accelerator: Accelerator, what: str = "images") -> None:
    """Raises [`InputError`] if `count` samples are fewer than one batch for every process."""
    needed = args.per_device_train_batch_size * accelerator.num_processes
    if count < needed:
        raise InputError(
            f"Too few {what}: one step takes {needed} and the data set has {count}; "
            "add images or lower --per_device_train_batch_size."
        )


def moving_average(objective: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of parameters and buffers.

    Its decay rises as (1 + n) / (10 + n) to the given one, so that a short run does not end with its first weights.
    """

    @torch.no_grad()
    def update(averaged: Sequence[Tensor], current: Sequence[Tensor], count: Tensor | int) -> None:
        share = 1 - min(decay, (1 + int(count)) / (10 + int(count)))
        for mean, value in zip(averaged, current, strict=True):
            if mean.is_floating_point():
                mean.lerp_(value, share)
            else:  # counters
                mean.copy_(value)

    return AveragedModel(objective, multi_avg_fn=update, use_buffers=True)


def train(
    accelerator: Accelerator,
    objective: nn.Module,
    dataset: TrainingData,
    args: argparse.Namespace,
    *,
    validate: Callable[[nn.Module, int], dict[str, float]] | None = None,
    groups: Sequence[ParameterGroup] | None = None,
    best: BestModel | None = None,
    sample: Callable[[nn.Module, int], Any] | None = None,
) -> nn.Module:
    """Trains `objective(batch, generator) -> dict of scalars with "total"` and returns its moving average.

    Steps are counted on `sync_gradients`. State (weights, moving average, optimiser, schedule) is saved every
    `checkpointing_steps`; a resumed run sees the batches and random numbers of the uninterrupted one.

    Args:
        validate: `(objective in evaluation mode, step) -> figures`; called on the first process alone.
        groups: parameters with rates of their own; by default all that are trained, at `learning_rate`. The first
            group's rate is reported as `learning_rate`, the others' with their name.
        best: keeps the best model by the figure `criterion` of `validate`, which is then called before the first step
            too.
        sample: `(objective in evaluation mode, step) -> image or None`, every `sample_steps` on the first process;
            the image goes to the trackers.

    Raises:
        InputError: if there are too few samples, or other ones than in the run that is resumed.
        NonFiniteLossError: if loss or gradient is not finite; the state before the step is saved first.
    """
    check_enough(len(dataset), args, accelerator, "samples")
    loader: Any = DataLoader(
        cast("Dataset[Any]", dataset),
        batch_size=args.per_device_train_batch_size,
        sampler=EpochSampler(len(dataset), args.seed, fresh=getattr(dataset, "fresh_epochs", False)),
        drop_last=True,
        num_workers=args.dataloader_num_workers,
        # A worker that lost its sending thread for want of memory lives on in silence, and torch would wait for ever.
        timeout=WORKER_SECONDS if args.dataloader_num_workers else 0,
    )
    batches_per_epoch = len(loader) // accelerator.num_processes
    total_steps = args.max_train_steps or DEFAULT_STEPS
    if args.max_train_steps is None and args.num_train_epochs is not None:
        total_steps = max(1, int(args.num_train_epochs * batches_per_epoch) // args.gradient_accumulation_steps)
    # A model from `from_pretrained` is in evaluation mode, a fresh one is not; what must stay frozen, the objective
    # itself keeps so in its `train`.
    objective.train()
    parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    if groups is None:
        groups = [ParameterGroup("all", parameters, args.learning_rate)]
    optimizer: Any = torch.optim.AdamW(
        [{"params": list(group.parameters), "lr": group.learning_rate} for group in groups],
        weight_decay=args.weight_decay,
    )
    scheduler = get_scheduler(
        args.lr_scheduler_type, optimizer, num_warmup_steps=args.num_warmup_steps, num_training_steps=total_steps
    )
    average = moving_average(objective, args.ema_decay) if args.ema_decay > 0 else None
    wrapped, optimizer, loader, scheduler = accelerator.prepare(objective, optimizer, loader, scheduler)
    if average is not None:
        average.to(accelerator.device)
        accelerator.register_for_checkpointing(average)
    rates = [group.learning_rate for group in groups]
    checkpoints = Checkpoints(accelerator, args, dataset.fingerprint(), optimizer, scheduler, rates)

    step = checkpoints.resume()
    epoch, skip = divmod(step * args.gradient_accumulation_steps, batches_per_epoch)
    report = Reports(accelerator, args, step, sample)
    sample_steps = getattr(args, "sample_steps", None) if sample is not None else None
    judged = average.module if average is not None else objective
    if best is not None and step == 0:
        best.forget(accelerator)
        if validate is not None:
            report.validation(step, validate, judged, best)
    progress = tqdm(total=total_steps, initial=step, desc="Training", disable=not accelerator.is_main_process)
    buffers = _snapshot(objective)
    names = ["learning_rate", *(f"learning_rate_{group.name}" for group in groups[1:])]
    while step < total_steps:
        loader.set_epoch(epoch)
        batches = accelerator.skip_first_batches(loader, skip) if skip else loader
        for position, batch in enumerate(batches, start=skip):
            with accelerator.accumulate(wrapped):
                batch_number = epoch * batches_per_epoch + position
                losses: dict[str, Tensor] = wrapped(
                    batch, step_generator(args.seed, batch_number, accelerator.process_index)
                )
                # Reduced, so that all processes stop together; one that goes on alone would wait for ever.
                finite = math.isfinite(accelerator.reduce(losses["total"].detach().float(), "mean").item())
                if finite:
                    accelerator.backward(losses["total"])
                    if accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
                        # With fp16 the scaler meets overflows by itself, and leaves such steps out.
                        finite = accelerator.scaler is not None or math.isfinite(norm)
                if not finite:
                    _restore(objective, buffers)
                    folder = checkpoints.save(step)
                    progress.close()
                    raise NonFiniteLossError(
                        f"The loss is not finite at step {step + 1}; the state before that step is in {folder}."
                    )
                optimizer.step()
                if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                    scheduler.step()
                optimizer.zero_grad()
            report.add(losses)
            if not accelerator.sync_gradients:
                continue
            step += 1
            progress.update()
            buffers = _snapshot(objective)
            if average is not None:
                average.update_parameters(objective)
            if step % args.logging_steps == 0:
                report.losses(step, dict(zip(names, scheduler.get_last_lr(), strict=True)))
            if validate is not None and (step % args.validation_steps == 0 or step == total_steps):
                report.validation(step, validate, judged, best)
            if sample_steps and (step % sample_steps == 0 or step == total_steps):
                report.samples(step, judged)
            # After the reports: a run that is killed before this line makes them again, one that goes on does not.
            if step % args.checkpointing_steps == 0:
                checkpoints.save(step)
            if step >= total_steps:
                break
        epoch, skip = epoch + 1, 0
    progress.close()
    accelerator.wait_for_everyone()
    return judged


def _changing_buffers(objective: nn.Module) -> list[Tensor]:
    return [buffer for part in objective.modules() if part.training for buffer in part.buffers(recurse=False)]


def _snapshot(objective: nn.Module) -> list[Tensor]:
    """Batch-norm statistics change in a forward pass already, before it is known whether the loss is finite."""
    return [buffer.clone() for buffer in _changing_buffers(objective)]


def _restore(objective: nn.Module, buffers: list[Tensor]) -> None:
    with torch.no_grad():
        for buffer, before in zip(_changing_buffers(objective), buffers, strict=True):
            buffer.copy_(before)


@contextlib.contextmanager
def _evaluation_mode(objective: nn.Module) -> Iterator[None]:
    was_training = objective.training
    objective.eval()
    try:
        yield
    finally:
        objective.train(was_training)


def log_image(accelerator: Accelerator, image: Any, step: int) -> None:
    """Gives an image `(H, W, 3)` uint8 to the trackers that take images."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"samples": image[None]}, step=step, dataformats="NHWC")
        elif hasattr(tracker, "log_images"):
            tracker.log_images({"samples": [image]}, step=step)


class Reports:
    """One JSON line a report in `log.jsonl`, the terminal, and the trackers."""

    def __init__(
        self,
        accelerator: Accelerator,
        args: argparse.Namespace,
        step: int,
        sample: Callable[[nn.Module, int], Any] | None = None,
    ):
        self.accelerator, self.with_tracking, self.sample = accelerator, args.with_tracking, sample
        self.path = Path(args.output_dir) / "log.jsonl"
        self.names: list[str] = []
        self.sums: Tensor | None = None
        self.count = 0
        if accelerator.is_main_process:
            # Lines of steps that are about to be made again go.
            lines = self.path.read_text(encoding="utf-8").splitlines() if step and self.path.exists() else []
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
            self.path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def add(self, losses: dict[str, Tensor]) -> None:
        """Takes in the scalars of one batch."""
        self.count += 1
        # They stay on the device: to look at each of them would hold up a GPU a dozen times a step.
        values = torch.stack([value.detach().float() for value in losses.values()])
        self.names = list(losses)
        self.sums = values if self.sums is None else self.sums + values

    def losses(self, step: int, learning_rates: dict[str, float]) -> None:
        """Means over all batches of all processes since the last report."""
        if self.sums is None:
            return
        means = self.accelerator.reduce(self.sums / self.count, "mean").tolist()
        self._write(step, {**dict(zip(self.names, means, strict=True)), **learning_rates})
        self.sums, self.count = None, 0

    def validation(
        self,
        step: int,
        validate: Callable[[nn.Module, int], dict[str, float]],
        objective: nn.Module,
        best: BestModel | None = None,
    ) -> None:
        """Runs the validation on the first process, in evaluation mode; keeps the model if it is the best so far."""
        if self.accelerator.is_main_process:
            with _evaluation_mode(objective):
                figures = validate(objective, step)
                self._write(step, figures)
                if best is not None:
                    best.consider(objective, step, figures["criterion"])

    def samples(self, step: int, objective: nn.Module) -> None:
        """Draws sample images on the first process, in evaluation mode."""
        if self.accelerator.is_main_process and self.sample is not None:
            with _evaluation_mode(objective):
                image = self.sample(objective, step)
            if image is not None and self.with_tracking:
                log_image(self.accelerator, image, step)

    def _write(self, step: int, values: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(f"step {step}: " + "  ".join(f"{name} {value:.4g}" for name, value in values.items()))
            with writing(self.path), open(self.path, "a", encoding="utf-8") as log:
                log.write(json.dumps({"step": step, **values}) + "\n")
            if self.with_tracking:
                self.accelerator.log(values, step=step)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


class BestModel:
    """Keeps the best model of a run in `OUTPUT_DIR/best`: there as a whole or not at all.

    Args:
        output_dir: of the run.
        save: `(objective, folder)` writes model and processor.
    """

    def __init__(self, output_dir: str, save: Callable[[nn.Module, Path], None]):
        self.folder = Path(output_dir) / "best"
        self.save = save

    def forget(self, accelerator: Accelerator) -> None:
        """At the start of a run: what another one left in the same folder does not count."""
        if accelerator.is_main_process and self.folder.exists():
            shutil.rmtree(self.folder)
        accelerator.wait_for_everyone()

    def record(self) -> dict[str, float] | None:
        """Step and criterion of the model that is kept; `None` if there is none."""
        path = self.folder / "best.json"
        try:
            found: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
        except OSError:
            return None
        return found

    def consider(self, objective: nn.Module, step: int, criterion: float) -> None:
        """Keeps the model if its criterion is higher than that of the one before.

        Raises:
            OutputError: if it cannot be written; the one before stays.
        """
        record = self.record()
        if not math.isfinite(criterion) or (record is not None and criterion <= record["criterion"]):
            return
        partial = self.folder.with_name("partial-best")
        try:
            with writing(self.folder):
                self.save(objective, partial)
                text = json.dumps({"step": step, "criterion": criterion})
                (partial / "best.json").write_text(text + "\n", encoding="utf-8")
                before = self.folder.with_name("partial-best-before")
                if self.folder.exists():
                    self.folder.rename(before)
                # A kill here leaves no best model; the run that goes on from the last checkpoint comes by again.
                partial.rename(self.folder)
                if before.exists():
                    shutil.rmtree(before)
        except OutputError:
            shutil.rmtree(partial, ignore_errors=True)
            raise


_WAYS_OUT = "resume with the same ones, start anew, or pass --allow_changes"


class Checkpoints:
    """Saves and resumes `checkpoint-<step>` folders: each is there as a whole or not at all."""

    def __init__(
        self,
        accelerator: Accelerator,
        args: argparse.Namespace,
        data: str,
        optimizer: Any,
        scheduler: Any,
        rates: list[float],
    ):
        self.accelerator, self.args, self.data = accelerator, args, data
        self.optimizer, self.scheduler, self.rates = optimizer, scheduler, rates

    def save(self, step: int) -> Path:
        """Saves under a temporary name, moves into place, and removes the oldest beyond the limit.

        Raises:
            OutputError: if it cannot be written; nothing half-written is left.
        """
        final = Path(self.args.output_dir) / f"checkpoint-{step}"
        if final.exists():  # the state before a failed step may have been saved already
            return final
        partial = final.with_name(f"partial-{step}")
        try:
            with writing(final):
                self.accelerator.save_state(str(partial))
                self.accelerator.wait_for_everyone()
                if self.accelerator.is_main_process:
                    description = {"step": step, "data": self.data, "settings": _settings(self.accelerator, self.args)}
                    (partial / "run.json").write_text(json.dumps(description, indent=1), encoding="utf-8")
                    partial.rename(final)
        except OutputError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if self.accelerator.is_main_process:
            for old in _checkpoints(self.args.output_dir)[: -self.args.checkpoints_total_limit]:
                gone = old.with_name(f"partial-{old.name}")
                old.rename(gone)  # a kill during the removal must not leave half a checkpoint under its name
                shutil.rmtree(gone)
        self.accelerator.wait_for_everyone()
        return final

    def resume(self) -> int:
        """Loads the checkpoint that was asked for; returns the number of steps made so far."""
        path = find_checkpoint(self.args)
        if path is None:
            return 0
        description = _description(path)
        if description["data"] != self.data and not self.args.allow_changes:
            raise InputError(f"{path} was made with other images; {_WAYS_OUT}.")
        _refuse_code(path)
        try:
            self.accelerator.load_state(str(path))
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise InputError(f"{path} cannot be resumed: {_first_line(error)}.") from error
        # With `--allow_changes` the rates are the new ones; else this changes nothing.
        schedule = self.scheduler.scheduler
        schedule.base_lrs = list(self.rates)
        for group, rate, factor in zip(self.optimizer.param_groups, self.rates, schedule.lr_lambdas, strict=True):
            group["weight_decay"] = self.args.weight_decay
            group["lr"] = rate * factor(schedule.last_epoch)
        self.accelerator.step = 0  # a step begins with its first batch, also after a failure in the middle of one
        return int(description["step"])


def _refuse_code(path: Path) -> None:
    """accelerate reads its custom checkpoints, here the moving average, with all that a pickle can do.

    Raises:
        InputError: if there is more in one than tensors and plain values.
    """
    for file in sorted(path.glob("custom_checkpoint_*.pkl")):
        try:
            torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds
            raise InputError(f"{file} is damaged, or holds more than numbers; it is not loaded.") from error


def find_checkpoint(args: argparse.Namespace) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means; `None` for a new run.

    "latest" in a folder without a checkpoint is a new run: a job that restarts itself may have been killed before it
    saved anything.

    Raises:
        InputError: if there is no such checkpoint, or if a new one could be mixed up with those of another run.
    """
    wanted, found = args.resume_from_checkpoint, _checkpoints(args.output_dir)
    if wanted is None:
        if found:
            raise InputError(
                f"{args.output_dir} already holds {found[-1].name}: "
                "go on with --resume_from_checkpoint latest, or choose another --output_dir."
            )
        return None
    if wanted == "latest":
        return found[-1] if found else None
    path = next((p for p in (Path(wanted), Path(args.output_dir) / wanted) if (p / "run.json").is_file()), None)
    if path is None:
        raise InputError(f"{wanted} is not a checkpoint folder of this script.")
    later = [other.name for other in found if other.resolve() != path.resolve() and _step(other) > _step(path)]
    if later:
        raise InputError(
            f"{args.output_dir} holds {later[-1]}, which is later than {path.name}: move it away, or choose another "
            "--output_dir."
        )
    return path


def _checkpoints(output_dir: str) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    digits = path.name.rpartition("-")[2]
    return int(digits) if digits.isdigit() else 0


def _settings(accelerator: Accelerator, args: argparse.Namespace) -> dict[str, Any]:
    """What must be the same for a run and its continuation."""
    settings = {name: value for name, value in vars(args).items() if name not in FREE_ARGUMENTS}
    settings["mixed_precision"] = accelerator.mixed_precision  # `accelerate launch` may have set it
    return {**settings, "num_processes": accelerator.num_processes}


def _description(path: Path) -> dict[str, Any]:
    try:
        return json.loads((path / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a checkpoint of this version of the script.") from error


def _refuse_other_settings(path: Path, settings: dict[str, Any]) -> None:
    before = _description(path)["settings"]
    changed = [name for name in sorted({*before, *settings}) if before.get(name) != settings.get(name)]
    if changed:
        shown = ", ".join(f"{name} {before.get(name)} (now {settings.get(name)})" for name in changed)
        raise InputError(f"{path} was made with other settings: {shown}; {_WAYS_OUT}.")
