"""Files of a run: its state, its best model and its result. Each is complete or absent."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils.other import load as read_pickle
from safetensors import SafetensorError
from torch import Tensor, nn

from ..errors import InputError, OutputError
from ..io.system_files import is_of_system
from .settings import FREE, TrainingSettings

_WAYS_OUT = "resume with the same ones, start anew, or pass --allow_changes"


@contextlib.contextmanager
def writing(what: str | Path) -> Iterator[None]:
    """Turns the errors of torch, safetensors and the system at a full or read-only disk into one sentence.

    Raises:
        OutputError: if writing fails.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else _first_line(error)
        raise OutputError(f"{what} could not be written ({reason}); is the disk full?") from error


def write_model(folder: str | Path, model: Any, processor: Any, state_dict: dict[str, Tensor] | None = None) -> None:
    """Writes a model and its processor. The weights come last, so that a folder with weights is complete.

    Args:
        state_dict: weights to write instead of the model's own.

    Raises:
        OutputError: if the folder cannot be written, such as on a full disk.
    """
    with writing(folder):
        processor.save_pretrained(folder)
        model.save_pretrained(folder, state_dict=state_dict)


class BestModel:
    """Keeps the best model of a run in `OUTPUT_DIR/best`.

    Args:
        output_dir: of the run.
        save: `(objective, folder)` writes model and processor.
    """

    def __init__(self, output_dir: str, save: Callable[[nn.Module, Path], None]):
        self.folder = Path(output_dir) / "best"
        self.save = save

    def forget(self, accelerator: Accelerator) -> None:
        """Removes the best model that an earlier run left in the folder."""
        if accelerator.is_main_process and self.folder.exists():
            shutil.rmtree(self.folder)
        accelerator.wait_for_everyone()

    def record(self) -> dict[str, float] | None:
        """Step and criterion of the best model so far; `None` if there is none."""
        path = self.folder / "best.json"
        try:
            found: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
        except OSError:
            return None
        return found

    def consider(self, objective: nn.Module, step: int, criterion: float) -> None:
        """Saves the model if its criterion is higher than that of the one before.

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
                # A kill here leaves no best model; the run that continues from the last checkpoint saves it again.
                partial.rename(self.folder)
                if before.exists():
                    shutil.rmtree(before)
        except OutputError:
            shutil.rmtree(partial, ignore_errors=True)
            raise


class Checkpoints:
    """Saves and resumes `checkpoint-<step>` folders.

    Args:
        data: fingerprint of the images.
        optimizer, scheduler: as `accelerator.prepare` gave them.
        rates: learning rates of the optimiser's groups.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        settings: TrainingSettings,
        data: str,
        optimizer: Any,
        scheduler: Any,
        rates: list[float],
    ):
        self.accelerator, self.settings, self.data = accelerator, settings, data
        self.optimizer, self.scheduler, self.rates = optimizer, scheduler, rates

    def save(self, step: int) -> Path:
        """Saves under a temporary name, moves into place, and removes the oldest beyond the limit.

        Raises:
            OutputError: if it cannot be written; nothing half-written is left.
        """
        final = Path(self.settings.output_dir) / f"checkpoint-{step}"
        if final.exists():  # the state before a failed step may have been saved already
            return final
        partial = final.with_name(f"partial-{step}")
        try:
            with writing(final):
                self.accelerator.save_state(str(partial))
                self.accelerator.wait_for_everyone()
                if self.accelerator.is_main_process:
                    settings = _compared_settings(self.accelerator, self.settings)
                    description = {"step": step, "data": self.data, "settings": settings}
                    (partial / "run.json").write_text(json.dumps(description, indent=1), encoding="utf-8")
                    partial.rename(final)
        except OutputError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if self.accelerator.is_main_process:
            for old in _checkpoints(self.settings.output_dir)[: -self.settings.checkpoints_total_limit]:
                gone = old.with_name(f"partial-{old.name}")
                old.rename(gone)  # a kill during the removal must not leave half a checkpoint under its name
                shutil.rmtree(gone)
        self.accelerator.wait_for_everyone()
        return final

    def resume(self) -> int:
        """Loads the checkpoint that was asked for; returns the number of steps made so far.

        Raises:
            InputError: if it cannot be loaded, or was made with other images.
        """
        path = find_checkpoint(self.settings)
        if path is None:
            return 0
        description = _description(path)
        if description["data"] != self.data and not self.settings.allow_changes:
            raise InputError(f"{path} was made with other images; {_WAYS_OUT}.")
        _refuse_code(path)
        try:
            self.accelerator.load_state(str(path))
        except Exception as error:  # accelerate, torch and safetensors raise many kinds for damaged files
            raise InputError(f"{path} cannot be resumed ({_first_line(error)}); {_before(path)}.") from error
        # With `--allow_changes` the rates are the new ones; else this changes nothing.
        schedule = self.scheduler.scheduler
        schedule.base_lrs = list(self.rates)
        for group, rate, factor in zip(self.optimizer.param_groups, self.rates, schedule.lr_lambdas, strict=True):
            group["weight_decay"] = self.settings.weight_decay
            group["lr"] = rate * factor(schedule.last_epoch)
        self.accelerator.step = 0  # a step begins with its first batch, also after a failure in the middle of one
        return int(description["step"])


def find_checkpoint(settings: TrainingSettings) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means; `None` for a new run.

    "latest" in a folder without a checkpoint is a new run: a job that restarts itself may have been killed before it
    saved anything.

    Raises:
        InputError: if there is no such checkpoint, or if a new one could be mixed up with those of another run.
    """
    output_dir, wanted, found = settings.output_dir, settings.resume_from_checkpoint, _checkpoints(settings.output_dir)
    if wanted is None:
        if found:
            raise InputError(
                f"{output_dir} already holds {found[-1].name}: "
                "go on with --resume_from_checkpoint latest, or choose another --output_dir."
            )
        return None
    if wanted == "latest":
        return found[-1] if found else None
    path = next((p for p in (Path(wanted), Path(output_dir) / wanted) if (p / "run.json").is_file()), None)
    if path is None:
        raise InputError(f"{wanted} is not a checkpoint folder of this script.")
    later = [other.name for other in found if other.resolve() != path.resolve() and _step(other) > _step(path)]
    if later:
        raise InputError(
            f"{output_dir} holds {later[-1]}, which is later than {path.name}: move it away, or choose another "
            "--output_dir."
        )
    return path


def refuse_other_settings(path: Path, accelerator: Accelerator, settings: TrainingSettings) -> None:
    """Checks that a checkpoint was made with the settings of this run.

    Raises:
        InputError: if not, with the settings that differ.
    """
    # A setting that an older version did not have stood at what is its default now.
    defaults = {field.name: field.default for field in fields(settings) if field.name not in FREE}
    before, now = defaults | _description(path)["settings"], _compared_settings(accelerator, settings)
    changed = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    if changed:
        shown = ", ".join(f"{name} {before.get(name)} (now {now.get(name)})" for name in changed)
        raise InputError(f"{path} was made with other settings: {shown}; {_WAYS_OUT}.")


def _compared_settings(accelerator: Accelerator, settings: TrainingSettings) -> dict[str, Any]:
    """What must be the same for a run and its continuation."""
    # `accelerate launch` may have set the precision.
    more = {"mixed_precision": accelerator.mixed_precision, "num_processes": accelerator.num_processes}
    return settings.of_result() | more


def _checkpoints(output_dir: str) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    return sorted(found, key=_step)


def _before(path: Path) -> str:
    """The way out of a damaged checkpoint: the one before it, where there is one."""
    earlier = [other for other in _checkpoints(str(path.parent)) if _step(other) < _step(path)]
    if not earlier:
        return "there is no earlier one: move it away and start anew"
    return f"move it away, and --resume_from_checkpoint latest goes on from {earlier[-1].name}"


def _step(path: Path) -> int:
    digits = path.name.rpartition("-")[2]
    return int(digits) if digits.isdigit() else 0


def _description(path: Path) -> dict[str, Any]:
    try:
        return json.loads((path / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a checkpoint of this version of the script; {_before(path)}.") from error


def _refuse_code(path: Path) -> None:
    """accelerate reads its custom checkpoints, here the moving average, with all that a pickle can do; and where the
    states of the random numbers cannot be read, it goes on with others without a word.

    Raises:
        InputError: if there is more in one than tensors and plain values, or less than there was.
    """
    for file in sorted(path.glob("*.pkl")):
        if is_of_system(file):  # nor does accelerate read it
            continue
        try:
            read_pickle(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds
            raise InputError(
                f"{file} is damaged, or holds more than numbers, and is not loaded; {_before(path)}."
            ) from error


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__).rstrip(".:")
