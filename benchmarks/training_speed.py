"""Triplets a second of the joint training step, beside a plain step, in one run.

    python benchmarks/training_speed.py [--preset lite|paper] [--device cuda] [--mixed_precision bf16]

The plain step is what the paper's description gives when it is written down directly: for each of the six ordered pairs
of a triplet both images are encoded anew, in float32, and the affinely warped source once more. Ours encodes each
image once, warps feature maps, and keeps no graph where nothing is trained. Both have the same weights, the same five
losses and the same trained parts; rounds alternate, and medians are compared. Weights are random: speed does not
depend on them.
"""

import argparse
import copy
import statistics
import sys
import time

import torch

from macosnet_hf import MaCoSNetConfig, MaCoSNetModel
from macosnet_hf.geometry import Transform
from macosnet_hf.matching import correlate
from macosnet_hf.modeling_macosnet import MaCoSNetModelOutput, ordered_pairs
from macosnet_hf.training.joint import JointObjective
from macosnet_hf.training.losses import MaCoSNetLossWeights, MaCoSNetObjective

WANTED = {"cpu": 2.0, "cuda": 3.0}  # what the project asks of itself


def plain_outputs(model: MaCoSNetModel, pixels: torch.Tensor) -> MaCoSNetModelOutput:
    """Every ordered pair by itself: `(B, 3, 3, H, W)` to the outputs of six pairs."""
    transforms, maps, masks = [], [], []
    for i, j in ordered_pairs(pixels.shape[1]):
        source, target = model.get_image_features(pixels[:, i]), model.get_image_features(pixels[:, j])
        correlation = correlate(source.normalized, target.normalized)
        transforms.append(model.predict_transforms(source, target, pixels[:, i], correlation))
        maps.append(correlation)
        masks.append(model.predict_masks(source, correlate(target.normalized, source.normalized)))
    features = torch.stack([model.get_image_features(pixels[:, i]).normalized for i in range(pixels.shape[1])], dim=1)
    together = Transform.stack(transforms, dim=1)
    return MaCoSNetModelOutput(
        affine=together.affine,
        tps=together.tps,
        correlation=torch.stack(maps, dim=1),
        mask_logits=torch.stack(masks, dim=1),
        features=features,
    )


def step_seconds(
    preset: str,
    device: torch.device,
    mixed_precision: str = "bf16",
    batch_size: int = 2,
    rounds: int = 5,
    train_encoder: bool = False,
) -> dict[str, float]:
    """Median seconds of a step: `plain` and `ours`, whose precision is `mixed_precision`."""
    torch.manual_seed(0)
    first = MaCoSNetModel(MaCoSNetConfig.from_preset(preset, cascade="exact"))
    weights = MaCoSNetLossWeights.from_benchmark("pf-pascal")
    trained = (*(["encoder"] if train_encoder else []), "predictor", "decoder")
    second = copy.deepcopy(first)
    size = first.config.image_size
    plain, ours = (
        JointObjective(model, [0.5] * 3, [0.25] * 3, MaCoSNetObjective(weights), trained=trained).to(device).train()
        for model in (first, second)
    )
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, 3, 3, size, size)
    whole = torch.tensor([1.0, 0, 0, 0, 1, 0], device=device).expand(batch_size, 3, 6).clone()
    batch = {"images": torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device)}
    batch["views"] = whole

    def plain_step() -> None:
        pixels, _ = plain.prepare_images(batch)
        outputs = plain_outputs(plain.model, pixels)
        plain.losses.module(outputs, plain.model.transforms(outputs), pixels)["total"].backward()

    def our_step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed_precision == "bf16"):
            total = ours(batch, generator)["total"]
        total.backward()

    steps = {"plain": (plain, plain_step), "ours": (ours, our_step)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(rounds + 1):
        for name, (objective, step) in steps.items():
            objective.zero_grad()
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_number:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> int:
    """Prints both speeds and their ratio; returns 1 where the ratio is below what is wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="lite")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--mixed_precision", default="bf16", choices=("no", "bf16"), help="of our step")
    parser.add_argument("--batch_size", type=int, default=2, help="triplets a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--train_encoder", action=argparse.BooleanOptionalAction, default=False)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    medians = step_seconds(
        arguments.preset,
        device,
        arguments.mixed_precision,
        arguments.batch_size,
        arguments.rounds,
        arguments.train_encoder,
    )
    for name, value in medians.items():
        print(f"{name:6} {arguments.batch_size / value:8.3f} triplets/s  (median of {arguments.rounds}: {value:.3f} s)")
    ratio = medians["plain"] / medians["ours"]
    wanted = WANTED[device.type]
    print(
        f"ratio  {ratio:8.2f}  ({arguments.preset}, {device.type}, ours with --mixed_precision "
        f"{arguments.mixed_precision}; at least {wanted:g} is wanted)"
    )
    return int(ratio < wanted)


if __name__ == "__main__":
    sys.exit(main())
