"""What the training scripts share: arguments with the usual names, the loop, exact resume, bounded checkpoints."""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import get_scheduler

from macosnet_hf.errors import InputError, MaCoSNetError


class NonFiniteLossError(MaCoSNetError):
    """The loss became infinite or not a number; the state before the step has been saved."""


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that every script takes, under the names that Accelerate's users know."""
    parser.add_argument("--dataset_name", nargs="+", required=True, help="folders of photographs, or Hub data-set ids")
    parser.add_argument("--exclude_classes", nargs="*", default=[], help="class folders to leave out")
    parser.add_argument("--output_dir", required=True, help="where checkpoints and the final model go")
    parser.add_argument("--per_device_train_batch_size", type=int, default=16)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--weight_decay", type=float, default=0.0)
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--lr_scheduler_type", default="cosine")
    parser.add_argument("--num_warmup_steps", type=int, default=100)
    parser.add_argument("--max_train_steps", type=int, default=1000, help="optimiser steps")
    parser.add_argument("--ema_decay", type=float, default=0.999, help="0 turns the moving average of the weights off")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mixed_precision", choices=["no", "bf16", "fp16"], default=None)
    parser.add_argument("--dataloader_num_workers", type=int, default=0)
    parser.add_argument("--keep_in_memory", action="store_true", help="decode all photographs once, before training")
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--checkpoints_total_limit", type=int, default=2)
    parser.add_argument("--resume_from_checkpoint", default=None, help="a checkpoint folder, or 'latest'")
    parser.add_argument("--logging_steps", type=int, default=50)
    parser.add_argument("--validation_steps", type=int, default=500)
    parser.add_argument("--with_tracking", action="store_true")
    parser.add_argument("--report_to", default="tensorboard")


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """Accelerator, seeds and output folder.

    Raises:
        InputError: if an option cannot work, before any time is spent.
    """
    for name in (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "max_train_steps",
        "checkpointing_steps",
    ):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} must be at least 1.")
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=args.report_to if args.with_tracking else None,
        project_config=ProjectConfiguration(project_dir=args.output_dir),
        step_scheduler_with_optimizer=False,
    )
    set_seed(args.seed)
    if accelerator.is_main_process:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    if args.with_tracking:
        settings = {key: value for key, value in vars(args).items() if isinstance(value, (int, float, str))}
        accelerator.init_trackers("macosnet", config=settings)
    return accelerator


def step_generator(seed: int, step: int, rank: int = 0) -> torch.Generator:
    """Randomness of one step on one process: the same whether or not the run was interrupted before it."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 4_099 + rank)


def train(
    accelerator: Accelerator,
    objective: nn.Module,
    dataset: Dataset,
    args: argparse.Namespace,
    *,
    collate_fn: Callable | None = None,
    validate: Callable[[nn.Module, int], dict[str, float]] | None = None,
) -> nn.Module:
    """Runs `args.max_train_steps` optimiser steps of `objective(batch, generator) -> dict with "total"` and returns it.

    Steps are counted on `sync_gradients`. State (weights, moving average, optimiser, scheduler, position in the
    data) is saved every `checkpointing_steps`; a resumed run sees the batches and random numbers of the
    uninterrupted one.

    Raises:
        NonFiniteLossError: if the loss is not finite; the last good state is saved first.
    """
    loader = DataLoader(
        dataset,
        batch_size=args.per_device_train_batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=args.dataloader_num_workers,
        collate_fn=collate_fn,
        generator=torch.Generator().manual_seed(args.seed),
    )
    if not len(loader):
        raise InputError(
            f"The data set has {len(dataset)} photographs, fewer than one batch of {args.per_device_train_batch_size}."
        )
    parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=args.weight_decay)
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.num_warmup_steps,
        num_training_steps=args.max_train_steps,
    )
    average = None
    if args.ema_decay > 0:
        average = AveragedModel(objective, multi_avg_fn=get_ema_multi_avg_fn(args.ema_decay), use_buffers=True)
    wrapped, optimizer, loader, scheduler = accelerator.prepare(objective, optimizer, loader, scheduler)
    if average is not None:
        average.to(accelerator.device)
        accelerator.register_for_checkpointing(average)

    step, epoch, skip = 0, 0, 0
    if args.resume_from_checkpoint:
        step = _resume(accelerator, args)
        micro_steps = step * args.gradient_accumulation_steps
        epoch, skip = micro_steps // len(loader), micro_steps % len(loader)

    progress = tqdm(total=args.max_train_steps, initial=step, desc="Training", disable=not accelerator.is_main_process)
    sums: dict[str, float] = {}
    while step < args.max_train_steps:
        loader.set_epoch(epoch)
        batches = accelerator.skip_first_batches(loader, skip) if skip else loader
        for position, batch in enumerate(batches, start=skip):
            with accelerator.accumulate(wrapped):
                micro = epoch * len(loader) + position
                generator = step_generator(args.seed, micro, accelerator.process_index)
                losses: dict[str, Tensor] = wrapped(batch, generator)
                if not math.isfinite(losses["total"].item()):
                    _save(accelerator, args, step)
                    raise NonFiniteLossError(
                        f"The loss is not finite at step {step + 1}; the state before it is in {args.output_dir}."
                    )
                accelerator.backward(losses["total"])
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
                optimizer.step()
                if accelerator.sync_gradients:
                    scheduler.step()
                optimizer.zero_grad()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach())
            if not accelerator.sync_gradients:
                continue
            step += 1
            progress.update()
            if average is not None:
                average.update_parameters(accelerator.unwrap_model(wrapped))
            if step % args.logging_steps == 0:
                count = args.logging_steps * args.gradient_accumulation_steps
                means = {name: value / count for name, value in sums.items()}
                means["learning_rate"] = scheduler.get_last_lr()[0]
                sums = {}
                _report(accelerator, args, step, means)
            if step % args.checkpointing_steps == 0:
                _save(accelerator, args, step)
            if validate is not None and (step % args.validation_steps == 0 or step == args.max_train_steps):
                current = average.module if average is not None else accelerator.unwrap_model(wrapped)
                was_training = current.training
                current.eval()
                _report(accelerator, args, step, validate(current, step))
                current.train(was_training)
            if step >= args.max_train_steps:
                break
        epoch, skip = epoch + 1, 0
    progress.close()
    accelerator.wait_for_everyone()
    if args.with_tracking:
        accelerator.end_training()
    return average.module if average is not None else accelerator.unwrap_model(wrapped)


def _report(accelerator: Accelerator, args: argparse.Namespace, step: int, values: dict[str, float]) -> None:
    """One JSON line a report in `log.jsonl`, the terminal, and the trackers."""
    if accelerator.is_main_process:
        tqdm.write(f"step {step}: " + "  ".join(f"{name} {value:.4g}" for name, value in values.items()))
        with open(Path(args.output_dir) / "log.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps({"step": step, **values}) + "\n")
    if args.with_tracking:
        accelerator.log(values, step=step)


def _checkpoints(output_dir: str) -> list[Path]:
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def _save(accelerator: Accelerator, args: argparse.Namespace, step: int) -> None:
    """Saves the state under a temporary name, moves it into place, and removes the oldest beyond the limit."""
    final = Path(args.output_dir) / f"checkpoint-{step}"
    partial = final.with_name(f"partial-{step}")
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in _checkpoints(args.output_dir)[: -args.checkpoints_total_limit]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def _resume(accelerator: Accelerator, args: argparse.Namespace) -> int:
    if args.resume_from_checkpoint == "latest":
        found = _checkpoints(args.output_dir)
        if not found:
            raise InputError(f"There is no checkpoint to resume from in {args.output_dir}.")
        path = found[-1]
    else:
        path = Path(args.resume_from_checkpoint)
        if not path.is_dir() or not path.name.startswith("checkpoint-"):
            raise InputError(f"{path} is not a checkpoint folder of this script.")
    accelerator.load_state(str(path))
    return int(path.name.split("-")[1])
