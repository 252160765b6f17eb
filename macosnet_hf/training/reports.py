"""What a run reports: one JSON line a report in `log.jsonl`, the terminal, and the trackers."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from .checkpoints import BestModel, writing
from .settings import TrainingSettings

Validation = Callable[[nn.Module, int], dict[str, float]]
Sample = Callable[[nn.Module, int], np.ndarray]


class Reports:
    """Losses, validations and sample images of a run.

    Args:
        validate: `(objective in evaluation mode, step) -> figures`; called on the first process alone.
        best: keeps the best model by the figure `criterion` of `validate`, which is then called before the first step
            too.
        sample: `(objective in evaluation mode, step) -> image (H, W, 3) uint8`; called on the first process alone.
        sample_steps: how often; the images go to the trackers.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        settings: TrainingSettings,
        validate: Validation | None = None,
        best: BestModel | None = None,
        sample: Sample | None = None,
        sample_steps: int | None = None,
    ):
        self.accelerator, self.settings = accelerator, settings
        self._validate, self._best, self._sample, self._sample_steps = validate, best, sample, sample_steps
        self._path = Path(settings.output_dir) / "log.jsonl"
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self._count = 0

    def begin(self, step: int, objective: nn.Module) -> None:
        """At the start of a run or, after `step` steps, of its continuation. Lines of steps that are about to be made
        again go."""
        if self.accelerator.is_main_process:
            lines = self._path.read_text(encoding="utf-8").splitlines() if step and self._path.exists() else []
            lines = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
            self._path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        if self._best is not None and step == 0:
            self._best.forget(self.accelerator)
            self._report_validation(step, objective)

    def add(self, losses: dict[str, Tensor]) -> None:
        """Takes in the scalars of one batch."""
        self._count += 1
        # They stay on the device: to look at each of them would hold up a GPU a dozen times a step.
        values = torch.stack([value.detach().float() for value in losses.values()])
        self._names = list(losses)
        self._sums = values if self._sums is None else self._sums + values

    def after_step(self, step: int, last: bool, objective: nn.Module, rates: dict[str, float]) -> None:
        """Reports what is due after a step; the last one is always validated and drawn."""
        if step % self.settings.logging_steps == 0 and self._sums is not None:
            # Means over all batches of all processes since the last report.
            means = self.accelerator.reduce(self._sums / self._count, "mean").tolist()
            self._write(step, {**dict(zip(self._names, means, strict=True)), **rates})
            self._sums, self._count = None, 0
        if step % self.settings.validation_steps == 0 or last:
            self._report_validation(step, objective)
        if self._sample_steps and (step % self._sample_steps == 0 or last):
            self._report_sample(step, objective)

    def _report_validation(self, step: int, objective: nn.Module) -> None:
        if self.accelerator.is_main_process and self._validate is not None:
            with _evaluation_mode(objective):
                figures = self._validate(objective, step)
                self._write(step, figures)
                if self._best is not None:
                    self._best.consider(objective, step, figures["criterion"])

    def _report_sample(self, step: int, objective: nn.Module) -> None:
        if self.accelerator.is_main_process and self._sample is not None:
            with _evaluation_mode(objective):
                image = self._sample(objective, step)
            for tracker in self.accelerator.trackers if self.settings.with_tracking else ():
                if tracker.name == "tensorboard":
                    tracker.log_images({"samples": image[None]}, step=step, dataformats="NHWC")
                elif hasattr(tracker, "log_images"):
                    tracker.log_images({"samples": [image]}, step=step)

    def _write(self, step: int, values: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(f"step {step}: " + "  ".join(f"{name} {value:.4g}" for name, value in values.items()))
            with writing(self._path), open(self._path, "a", encoding="utf-8") as log:
                log.write(json.dumps({"step": step, **values}) + "\n")
            if self.settings.with_tracking:
                self.accelerator.log(values, step=step)


@contextlib.contextmanager
def _evaluation_mode(objective: nn.Module) -> Iterator[None]:
    was_training = objective.training
    objective.eval()
    try:
        yield
    finally:
        objective.train(was_training)
