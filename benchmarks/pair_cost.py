"""What the joint result of a pair costs beyond the encoder passes that it cannot do without.

    python benchmarks/pair_cost.py [--preset paper] [--rounds 15] [--threads 2]

In one process, in turn: the four encoder passes over single images that a pair needs (source, target, and both once
more after the affine warp), and the whole forward (both directions, transforms, correlations, both masks). Weights are
random, which does not change the time; `lite` and `base` have the settings of the embedded checkpoints. Medians over
the rounds; the ratio is taken round by round. The last two columns are the whole forward with orientations="mirror" and
"all", as multiples of that without.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from macosnet_hf import MaCoSNetConfig, MaCoSNetModel
from macosnet_hf.io.package import EMBEDDED


def measure(preset: str, rounds: int, device: torch.device) -> dict[str, float]:
    """Seconds of the bare encoder passes and of the whole forward, their ratio, and the passes counted."""
    torch.manual_seed(0)
    checkpoint = EMBEDDED.get(preset)
    config = MaCoSNetConfig.from_preset(preset) if checkpoint is None else MaCoSNetConfig.from_pretrained(checkpoint)
    model = MaCoSNetModel(config).eval().to(device)
    # Random convolutions shrink the signal layer by layer to denormal numbers, which are slow; real weights do not.
    torch.set_flush_denormal(True)
    pixels = torch.randn(1, 2, 3, config.image_size, config.image_size, device=device)
    passes = 0

    def count(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        nonlocal passes
        passes += arguments[0].shape[0]

    def synchronise() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def encoder_alone() -> None:
        # As the forward batches them: both images, then both warped images.
        model.encoder(pixels[0])
        model.encoder(pixels[0])

    def timed(work: object) -> float:
        synchronise()
        start = time.perf_counter()
        work()
        synchronise()
        return time.perf_counter() - start

    with torch.inference_mode():
        handle = model.encoder.register_forward_pre_hook(count)
        model(pixels)
        handle.remove()
        encoder_alone()
        alone, whole = [], []
        oriented: dict[str, list[float]] = {"mirror": [], "all": []}
        for _ in range(rounds):
            alone.append(timed(encoder_alone))
            whole.append(timed(lambda: model(pixels)))
            for name, ratios_of in oriented.items():
                ratios_of.append(timed(lambda name=name: model(pixels, orientations=name)) / whole[-1])
    ratios = [b / a for a, b in zip(alone, whole, strict=True)]
    return {
        "passes": passes,
        "encoder_seconds": statistics.median(alone),
        "pair_seconds": statistics.median(whole),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        **{name: statistics.median(found) for name, found in oriented.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=["paper", *EMBEDDED], help="or embedded checkpoints")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=None, help="default: torch's own choice")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {args.rounds} rounds\n")
    print("| preset | encoder passes | passes alone | whole pair | ratio (min-max) | mirror | all |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for preset in args.preset:
        result = measure(preset, args.rounds, device)
        print(
            f"| {preset} | {result['passes']} | {result['encoder_seconds'] * 1e3:.0f} ms | "
            f"{result['pair_seconds'] * 1e3:.0f} ms | {result['ratio']:.2f} "
            f"({result['ratio_min']:.2f}-{result['ratio_max']:.2f}) | {result['mirror']:.2f} | {result['all']:.2f} |"
        )


if __name__ == "__main__":
    main()
