"""Losses, gradients and whole runs of the training on the device."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn

from macosnet_hf.training.images import TrainingData
from macosnet_hf.training.joint import JointObjective
from macosnet_hf.training.launch import make_accelerator
from macosnet_hf.training.loop import train
from macosnet_hf.training.losses import MaCoSNetLossWeights, MaCoSNetObjective, PerceptualNetwork
from macosnet_hf.training.pretraining import SyntheticObjective
from macosnet_hf.training.reports import Reports
from macosnet_hf.training.settings import JointSettings, SyntheticSettings, TrainingSettings
from macosnet_hf.training.synthetic import WarpRange

from .material import Bench, exact_float32
from .report import Figures, Skipped

_GROUPS = 4  # of three images: as few as objects can be pasted among
_STEPS, _SAVED = 6, 3
# Relative errors of gradients. Two memory layouts of a CPU differ by 0.00006, and by 0.013 where the gradient of the
# exact cascade goes through warped pixels, which changes by jumps.
GRADIENT_LIMITS = {"features": 0.01, "exact": 0.06}
PARTS = ("encoder", "affine_head", "tps_head", "decoder")


def joint_objective(
    bench: Bench, device: torch.device | str, cascade: str = "features", *, plain: bool = False, **options: object
) -> JointObjective:
    """The joint training with every loss and every random change; `plain`: the paper's five losses alone.

    With the exact cascade the contrastive loss is that of masked pixels, and images are mirrored to face one way.
    """
    model = bench.network(mutual_fit=True).macosnet
    mean, std = bench.processor.image_mean, bench.processor.image_std
    form = "pixels" if cascade == "exact" and not plain else "features"
    torch.manual_seed(0)
    perceptual = PerceptualNetwork("resnet18", mean, std) if form == "pixels" else None
    weights = MaCoSNetLossWeights.from_benchmark("pf-pascal", contrastive_form=form)
    every = {
        "prior_weight": 1.0,
        "local_weight": 1.0,
        "synthetic_weight": 1.0,
        "synthetic": SyntheticObjective(model, mean, std, WarpRange()),
        "paste_share": 0.5,
        "change_colours": True,
        "mirror_partners": cascade == "exact",
        "trained": ("encoder", "predictor", "decoder"),
    }
    chosen = {**({} if plain else every), "cascade": cascade, **options}
    objective = JointObjective(model, mean, std, MaCoSNetObjective(weights, perceptual), **chosen)
    return objective.to(device).train()


def losses_and_gradients(objective: JointObjective, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The losses of a batch, on the CPU, and their gradients, which stay with the parameters."""
    device = objective.mean.device
    there = {name: values.to(device) for name, values in batch.items()}
    losses = objective(there, torch.Generator().manual_seed(1))
    losses["total"].backward()
    return {name: value.detach().double().cpu() for name, value in losses.items()}


def gradients(bench: Bench, figures: Figures, cascade: str) -> None:
    """Every loss, and for each part of the network the relative error of its gradient."""
    batch = bench.groups(_GROUPS)
    with exact_float32():
        theirs = joint_objective(bench, bench.device, cascade)
        # A CPU is compared with its other memory layout.
        mine = joint_objective(bench, "cpu", cascade, channels_last=bench.cuda)
        found, wanted = (losses_and_gradients(each, batch) for each in (theirs, mine))
    for name, value in wanted.items():
        figures.at_most(name, float((found[name] - value).abs() / value.abs().clamp(min=1e-2)), 1e-3)
    for part in PARTS:
        error, length = 0.0, 0.0
        pairs = zip(getattr(theirs.model, part).parameters(), getattr(mine.model, part).parameters(), strict=True)
        for other, own in pairs:
            if own.grad is None or other.grad is None:
                if (own.grad is None) != (other.grad is None):
                    raise AssertionError(f"a parameter of {part} has a gradient on one device only")
                continue
            error += float((other.grad.double().cpu() - own.grad.double()).square().sum())
            length += float(own.grad.double().square().sum())
        figures.at_least(f"gradient of {part}, length", length**0.5, 1e-9)
        figures.at_most(f"gradient of {part}", (error / max(length, 1e-30)) ** 0.5, GRADIENT_LIMITS[cascade])


def gradients_fast(bench: Bench, figures: Figures) -> None:
    """With the cascade that warps features."""
    gradients(bench, figures, "features")


def gradients_exact(bench: Bench, figures: Figures) -> None:
    """With the exact cascade, masked pixels and mirrored partners."""
    gradients(bench, figures, "exact")


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


class _Samples(TrainingData):
    """Samples in memory."""

    def __init__(self, samples: list):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> object:
        return self.samples[number]

    def fingerprint(self) -> str:
        return f"{len(self)} examples"


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """The same order of computation every time, where torch has one; where it has none, no warning."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    torch.use_deterministic_algorithms(True, warn_only=True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        cudnn.deterministic, cudnn.benchmark = before


def trained(bench: Bench, folder: Path, joint: bool, resume: str | None = None) -> dict[str, Tensor]:
    """Weights and moving average after a run of `train`, on the CPU."""
    options = {
        "dataset_name": ["examples"],
        "output_dir": str(folder),
        "max_train_steps": _STEPS,
        "checkpointing_steps": _SAVED,
        "per_device_train_batch_size": 2,
        "num_warmup_steps": 1,
        "mixed_precision": "bf16" if bench.cuda else "no",
        "resume_from_checkpoint": resume,
    }
    settings: TrainingSettings
    objective: nn.Module
    if joint:
        settings = JointSettings(model_name_or_path="lite", **options)
        objective = joint_objective(bench, "cpu", plain=True)
        batch = bench.groups(6)
        samples: list = [{name: values[number] for name, values in batch.items()} for number in range(6)]
    else:
        settings = SyntheticSettings(**options)
        model = bench.network().macosnet
        objective = SyntheticObjective(model, bench.processor.image_mean, bench.processor.image_std, WarpRange())
        samples = list(bench.squares(bench.processor.size["height"] + 16))
    accelerator = make_accelerator(settings)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
            averaged = train(accelerator, objective, _Samples(samples), settings, Reports(accelerator, settings))
    finally:
        for state in (AcceleratorState, GradientState):  # the next run may have another precision
            state._reset_state()
        if PartialState().num_processes == 1:
            PartialState._reset_state()
    both = {"last": objective, "average": averaged}
    return {
        f"{kind}.{name}": value.detach().cpu().clone()
        for kind, module in both.items()
        for name, value in module.state_dict().items()
    }


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Of all weights and buffers."""
    if first.keys() != second.keys():
        raise AssertionError("two runs ended with other weights by name")
    return max(float((value.double() - second[name].double()).abs().max()) for name, value in first.items())


def _three_runs(bench: Bench, joint: bool) -> tuple[float, float]:
    """Difference of two equal runs, and of a run and its continuation from a checkpoint in the middle."""
    if not bench.cuda and torch.accelerator.is_available():
        raise Skipped("training takes the GPU of this machine; nothing would run on the CPU")
    with tempfile.TemporaryDirectory() as name, deterministic():
        folders = [Path(name) / each for each in ("one", "two", "resumed")]
        one, two = (trained(bench, folder, joint) for folder in folders[:2])
        shutil.copytree(folders[0] / f"checkpoint-{_SAVED}", folders[2] / f"checkpoint-{_SAVED}")
        resumed = trained(bench, folders[2], joint, "latest")
    return largest_difference(one, two), largest_difference(one, resumed)


def resume(bench: Bench, figures: Figures) -> None:
    """The first stage: a continued run ends bit-equal to the one that was not stopped."""
    again, continued = _three_runs(bench, joint=False)
    figures.add("two equal runs", again)
    figures.at_most("run and continuation", continued, 0)


def resume_joint(bench: Bench, figures: Figures) -> None:
    """The joint stage, where a GPU has no fixed order of computation for the gradient of a warp."""
    again, continued = _three_runs(bench, joint=True)
    figures.add("two equal runs", again)
    figures.at_most("run and continuation", continued, 10 * again)


def work(bench: Bench, folder: Path) -> None:
    """One process of [`two_processes`](running.py): trains, and leaves its weights. Each process has batch-norm
    statistics of its own batches; the first one's are saved."""
    weights = trained(bench, folder, joint=True)
    shared = {name: value for name, value in weights.items() if not name.endswith(("running_mean", "running_var"))}
    torch.save(shared, folder / f"weights-{os.environ['RANK']}.pt")
