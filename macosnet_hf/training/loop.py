"""The training loop: order of the data, random numbers, steps. A resumed run ends with the weights of one that was
never interrupted."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Sampler, default_collate
from tqdm.auto import tqdm
from transformers import get_scheduler

from ..errors import InputError, MaCoSNetError
from .checkpoints import Checkpoints
from .images import TrainingData
from .objectives import Objective
from .reports import Reports
from .settings import DEFAULT_STEPS, TrainingSettings

WORKER_SECONDS = 900  # within which a process that reads images must have a batch

_TRIAL_STEPS = 32


class NonFiniteLossError(MaCoSNetError):
    """The loss or its gradient became infinite or not a number; the state before the step has been saved."""


def step_generator(seed: int, step: int, rank: int = 0) -> torch.Generator:
    """Randomness of one batch on one process: the same whether or not the run was interrupted before it."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 4_099 + rank)


class EpochSampler(Sampler[int]):
    """A random order that depends on nothing but the seed and the epoch.

    torch's own draws the order of an epoch from the state that the epoch before left, which a resumed run lacks.
    accelerate's seedable sampler knows no fresh epochs, and its order is not that of runs of version 0.1.

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


@dataclass
class ParameterGroup:
    """Parameters that share a learning rate, and what to call them."""

    name: str
    parameters: Sequence[nn.Parameter]
    learning_rate: float


def parameter_groups(objective: Objective, rates: Mapping[str, float]) -> list[ParameterGroup]:
    """The parts that an objective trains, with a learning rate for each, in the order of `rates`."""
    return [
        ParameterGroup(name, [p for part in objective.parts(name) for p in part.parameters() if p.requires_grad], rate)
        for name, rate in rates.items()
        if name in objective.trained
    ]


def check_enough(count: int, settings: TrainingSettings, accelerator: Accelerator, what: str = "images") -> None:
    """Raises [`InputError`] if `count` samples are fewer than one batch for every process."""
    needed = settings.per_device_train_batch_size * accelerator.num_processes
    if count < needed:
        raise InputError(
            f"Too few {what}: one step takes {needed} and the data set has {count}; "
            "add images or lower --per_device_train_batch_size."
        )


class _Learner:
    """Objective, optimiser, schedule and moving average; one batch at a time.

    Args:
        groups: parameters with rates of their own.
        loader: of the batches, which accelerate shares out among the processes.
        total_steps: of the schedule.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        objective: nn.Module,
        settings: TrainingSettings,
        groups: Sequence[ParameterGroup],
        loader: DataLoader,
        total_steps: int,
    ):
        self.accelerator, self.objective, self.settings = accelerator, objective, settings
        # A model from `from_pretrained` is in evaluation mode, a fresh one is not; what must stay frozen, the objective
        # itself keeps so in its `train`.
        objective.train()
        self.parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        groups = groups or [ParameterGroup("all", self.parameters, settings.learning_rate)]
        self.initial_rates = [group.learning_rate for group in groups]
        self._rate_names = ["learning_rate", *(f"learning_rate_{group.name}" for group in groups[1:])]
        optimizer = torch.optim.AdamW(
            [{"params": list(group.parameters), "lr": group.learning_rate} for group in groups],
            weight_decay=settings.weight_decay,
        )
        scheduler = get_scheduler(settings.lr_scheduler_type, optimizer, settings.num_warmup_steps, total_steps)
        self.average = moving_average(objective, settings.ema_decay) if settings.ema_decay > 0 else None
        prepared: Any = accelerator.prepare(objective, optimizer, loader, scheduler)
        self.wrapped, self.optimizer, self.loader, self.scheduler = prepared
        if self.average is not None:
            self.average.to(accelerator.device)
            accelerator.register_for_checkpointing(self.average)
        self._buffers: list[Tensor] | None = None

    def result(self) -> nn.Module:
        """The moving average, or the objective itself where there is none."""
        return self.average.module if self.average is not None else self.objective

    def rates(self) -> dict[str, float]:
        """The learning rates of now, by name."""
        return dict(zip(self._rate_names, self.scheduler.get_last_lr(), strict=True))

    def learn(self, batch: Any, generator: torch.Generator) -> dict[str, Tensor] | None:
        """Learns from a batch, the last of a step or not (`sync_gradients`).

        Returns:
            The losses; `None` if loss or gradient is not finite: weights and statistics are then those before the step.
        """
        accelerator = self.accelerator
        if self._buffers is None:
            # Batch-norm statistics change in a forward pass already, before it is known whether the loss is finite.
            self._buffers = [buffer.clone() for buffer in self._changing_buffers()]
        with accelerator.accumulate(self.wrapped):
            losses: dict[str, Tensor] = self.wrapped(batch, generator)
            if not self._backward(losses["total"]):
                with torch.no_grad():
                    for buffer, before in zip(self._changing_buffers(), self._buffers, strict=True):
                        buffer.copy_(before)
                return None
            self.optimizer.step()
            if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                self.scheduler.step()
            self.optimizer.zero_grad()
        if accelerator.sync_gradients:
            self._buffers = None
            if self.average is not None:
                self.average.update_parameters(self.objective)
        return losses

    def _backward(self, loss: Tensor) -> bool:
        """Adds the gradients, and clips them at the end of a step; whether loss and gradients are finite."""
        accelerator = self.accelerator
        # Reduced, so that all processes stop together; one that goes on alone would wait for ever.
        if not math.isfinite(accelerator.reduce(loss.detach().float(), "mean").item()):
            return False
        accelerator.backward(loss)
        if not accelerator.sync_gradients:
            return True
        norm = accelerator.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        # With fp16 the scaler meets overflows by itself, and leaves such steps out.
        return accelerator.scaler is not None or math.isfinite(norm)

    def _changing_buffers(self) -> list[Tensor]:
        return [buffer for part in self.objective.modules() if part.training for buffer in part.buffers(recurse=False)]


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


def steps_within(
    minutes: float, objective: nn.Module, dataset: TrainingData, settings: TrainingSettings, accelerator: Accelerator
) -> int:
    """How many training steps fit into a time, from the second half of 32 steps of a copy, which is thrown away.

    The trial ends early where it takes a tenth of the time. A tenth of a step is added for what the loop does besides.

    Args:
        objective, dataset, settings, accelerator: as for `train`.
    """
    trial = copy.deepcopy(objective).to(accelerator.device).train()
    average = moving_average(trial, 0.9)
    optimizer = torch.optim.AdamW([parameter for parameter in trial.parameters() if parameter.requires_grad])
    size = settings.per_device_train_batch_size
    marks = [time.perf_counter()]
    while len(marks) <= _TRIAL_STEPS and marks[-1] - marks[0] < 6 * minutes:
        numbers = range(len(marks) * size, (len(marks) + 1) * size)
        samples = [dataset[number % len(dataset)] for number in numbers]
        batch = send_to_device(default_collate(samples), accelerator.device)
        with accelerator.autocast():
            loss: Tensor = trial(batch, torch.Generator().manual_seed(len(marks)))["total"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(trial)
        loss.item()  # waits for the device
        marks.append(time.perf_counter())
    half = (len(marks) - 1) // 2
    seconds = (marks[-1] - marks[half]) / (len(marks) - 1 - half)
    return max(1, int(60 * minutes / (1.1 * seconds)) // settings.gradient_accumulation_steps)


def _batches(accelerator: Accelerator, loader: Any, first: int, per_epoch: int) -> Iterator[tuple[int, Any]]:
    """Numbers and batches without end, beginning with number `first`."""
    epoch, skip = divmod(first, per_epoch)
    while True:
        loader.set_epoch(epoch)
        batches = accelerator.skip_first_batches(loader, skip) if skip else loader
        yield from enumerate(batches, start=epoch * per_epoch + skip)
        epoch, skip = epoch + 1, 0


def train(
    accelerator: Accelerator,
    objective: nn.Module,
    dataset: TrainingData,
    settings: TrainingSettings,
    reports: Reports,
    *,
    groups: Sequence[ParameterGroup] = (),
) -> nn.Module:
    """Trains `objective(batch, generator) -> dict of scalars with "total"` and returns its moving average.

    Steps are counted on `sync_gradients`. State (weights, moving average, optimiser, schedule) is saved every
    `checkpointing_steps`; a resumed run sees the batches and random numbers of the uninterrupted one.

    Args:
        reports: of losses, validations and sample images.
        groups: parameters with rates of their own; by default all that are trained, at `learning_rate`. The first
            group's rate is reported as `learning_rate`, the others' with their name.

    Raises:
        InputError: if there are too few samples, or other ones than in the run that is resumed.
        NonFiniteLossError: if loss or gradient is not finite; the state before the step is saved first.
    """
    check_enough(len(dataset), settings, accelerator, "samples")
    loader: DataLoader = DataLoader(
        dataset,
        batch_size=settings.per_device_train_batch_size,
        sampler=EpochSampler(len(dataset), settings.seed, dataset.fresh_epochs),
        drop_last=True,
        num_workers=settings.dataloader_num_workers,
        # A worker that lost its sending thread for want of memory lives on in silence, and torch would wait for ever.
        timeout=WORKER_SECONDS if settings.dataloader_num_workers else 0,
    )
    batches_per_epoch, accumulated = len(loader) // accelerator.num_processes, settings.gradient_accumulation_steps
    total_steps = settings.max_train_steps or DEFAULT_STEPS
    if settings.max_minutes is not None:
        total_steps = steps_within(settings.max_minutes, objective, dataset, settings, accelerator)
    elif settings.max_train_steps is None and settings.num_train_epochs is not None:
        total_steps = max(1, int(settings.num_train_epochs * batches_per_epoch) // accumulated)
    learner = _Learner(accelerator, objective, settings, groups, loader, total_steps)
    result = learner.result()
    checkpoints = Checkpoints(
        accelerator, settings, dataset.fingerprint(), learner.optimizer, learner.scheduler, learner.initial_rates
    )
    step = checkpoints.resume()
    reports.begin(step, result)
    progress = tqdm(total=total_steps, initial=step, desc="Training", disable=not accelerator.is_main_process)
    batches = _batches(accelerator, learner.loader, step * accumulated, batches_per_epoch)
    while step < total_steps:
        number, batch = next(batches)
        losses = learner.learn(batch, step_generator(settings.seed, number, accelerator.process_index))
        if losses is None:
            folder = checkpoints.save(step)
            progress.close()
            raise NonFiniteLossError(
                f"The loss is not finite at step {step + 1}; the state before that step is in {folder}."
            )
        reports.add(losses)
        if not accelerator.sync_gradients:
            continue
        step += 1
        progress.update()
        reports.after_step(step, step == total_steps, result, learner.rates())
        # After the reports: a run that is killed before this line makes them again, one that goes on does not.
        if step % settings.checkpointing_steps == 0:
            checkpoints.save(step)
    progress.close()
    accelerator.wait_for_everyone()
    return result
