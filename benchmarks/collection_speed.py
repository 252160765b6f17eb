"""Pairs and collections: the published flow, ours exact and ours fast, side by side in one run with the same weights.

    python benchmarks/collection_speed.py [--preset paper] [--sizes 2 5 10 20 50] [--json FILE] [--svg FILE]

* plain: every ordered pair by itself, as published: encode both, affine, warp the pixels, encode, TPS; then encode both
  again for the mask.
* exact: every image encoded once, the warped source of every ordered pair encoded again (the paper's cascade).
* fast: every image encoded once, feature maps warped instead of pixels.
* oriented: fast, and finds out which images face the other way (`orientations="mirror"`), which encodes mirror images.

All give transforms of all N (N - 1) ordered pairs and N masks. (plain decodes a mask for every ordered pair, for that
is how it finds masks; ours decodes each image with two partners.) The limit is the encoder alone, once a
image.
Beyond `--whole` ordered pairs, plain and exact are timed on a sample of pairs and scaled, which the table marks with ~.
Weights are random, which does not change the time, and so are the images.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from macosnet_hf import MaCoSNetConfig, MaCoSNetImageProcessor
from macosnet_hf.collection import Collection
from macosnet_hf.geometry import Transform, warp
from macosnet_hf.inference.collection_transforms import match_collection
from macosnet_hf.io.image_files import load_image
from macosnet_hf.matching import correlate
from macosnet_hf.modeling_macosnet import MaCoSNetForKeypointMatching, MaCoSNetModel

SAMPLE = 10  # ordered pairs that are timed where all of them would take too long


def plain_pair(model: MaCoSNetModel, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The published flow for one ordered pair of images `(1, 3, S, S)`: affine, TPS, and the source's mask."""
    first, second = model.encoder(source), model.encoder(target)
    affine = model.affine_head(correlate(first.normalized, second.normalized))
    warped = model.encoder(warp(source, Transform(affine).grid(source.shape[-2:])))
    tps = model.tps_head(correlate(warped.normalized, second.normalized))
    first, second = model.encoder(source), model.encoder(target)
    return affine, tps, model.predict_masks(first, correlate(second.normalized, first.normalized))


def images(count: int) -> list[Image.Image]:
    """Images of noise, all different."""
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 255, (240, 240, 3), dtype=np.uint8)) for _ in range(count)]


class Bench:
    """A model in its two clothes, and a clock."""

    def __init__(self, preset: str, device: torch.device, bf16: bool):
        torch.manual_seed(0)
        self.device, self.bf16 = device, bf16
        config = MaCoSNetConfig.from_preset(preset, cascade="exact")
        self.model = MaCoSNetForKeypointMatching(config).eval().to(device)
        self.processor = MaCoSNetImageProcessor()
        self.passes = 0
        self.model.macosnet.encoder.register_forward_pre_hook(self._count)

    def _count(self, module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self.passes += arguments[0].shape[0]

    def seconds(self, work: Callable[[], Any]) -> tuple[float, int]:
        """Of one call, and the encoder passes in it."""
        self.passes = 0
        self._wait()
        start = time.perf_counter()
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            work()
        self._wait()
        return time.perf_counter() - start, self.passes

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure_pair(bench: Bench, rounds: int) -> dict[str, Any]:
    """A pair with everything, both directions; the four are timed in turn, and medians taken."""
    network = bench.model.macosnet
    pixels = torch.randn(2, 3, 240, 240, device=bench.device)

    def plain() -> None:
        plain_pair(network, pixels[:1], pixels[1:])
        plain_pair(network, pixels[1:], pixels[:1])

    def ours(cascade: str) -> Callable[[], Any]:
        def work() -> None:
            network.config.cascade = cascade
            network(pixels[None])

        return work

    def with_points() -> None:
        network.config.cascade = "features"
        bench.model(pixels[None])

    works = {
        "encoder, 2 passes": lambda: network.encoder(pixels),
        "plain": plain,
        "exact": ours("exact"),
        "fast": ours("features"),
        "fast, with keypoints": with_points,
    }
    return _in_turn(bench, works, rounds)


def _in_turn(bench: Bench, works: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {name: [] for name in works}
    passes = {}
    for number in range(rounds + 1):
        for name, work in works.items():
            seconds, passes[name] = bench.seconds(work)
            if number:  # the first round warms up
                times[name].append(seconds)
    return {name: {"seconds": statistics.median(values), "passes": passes[name]} for name, values in times.items()}


def measure_collection(bench: Bench, count: int, whole: int) -> dict[str, Any]:
    """N images, all ordered pairs and all masks."""
    network, photos = bench.model.macosnet, images(count)
    pixels = bench.processor.preprocess_views(photos, return_tensors="pt")["pixel_values"].to(bench.device)
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    random = np.random.default_rng(0)
    sampled = len(pairs) > whole
    timed = [pairs[k] for k in random.permutation(len(pairs))[:SAMPLE]] if sampled else pairs
    scale = len(pairs) / len(timed)

    def bare() -> None:
        for number in range(count):
            network.encoder(pixels[number : number + 1])

    def plain() -> None:
        for i, j in timed:
            plain_pair(network, pixels[i : i + 1], pixels[j : j + 1])

    parts: dict[str, float] = {}

    def ours(cascade: str, orientations: str = "none") -> None:
        start = time.perf_counter()
        collection = Collection(bench.model, bench.processor, orientations=orientations)
        collection.add(photos)
        encoded = time.perf_counter()
        if cascade == "exact" and sampled:
            features = collection.features(range(count))
            for i, j in timed:
                network.predict_transforms(features.select([i]), features.select([j]), pixels[i : i + 1])
        else:
            match_collection(collection, cascade=cascade)
        matched = time.perf_counter()
        collection.segment()
        parts.update(
            encode=encoded - start,
            match=(matched - encoded) * (scale if cascade == "exact" else 1),
            segment=time.perf_counter() - matched,
        )

    result: dict[str, Any] = {"pairs": len(pairs), "sampled": sampled}
    result["encoder alone"], _ = bench.seconds(bare)
    seconds, passes = bench.seconds(plain)
    result["plain"], result["plain passes"] = seconds * scale, round(passes * scale)
    for name, cascade in (("exact", "exact"), ("fast", "features")):
        _, passes = bench.seconds(lambda cascade=cascade: ours(cascade))
        result[name] = sum(parts.values())
        result[f"{name} passes"] = count + len(pairs) if name == "exact" else passes
        result[f"{name} parts"] = dict(parts)
    result["milliseconds a pair"] = 1000 * parts["match"] / len(pairs)
    _, result["oriented passes"] = bench.seconds(lambda: ours("features", "mirror"))
    result["oriented"], result["oriented parts"] = sum(parts.values()), dict(parts)
    return result


def measure_reading(rounds: int = 5) -> dict[str, float]:
    """From the file of a 12-megapixel JPEG to the network's tensor: Pillow's plain way, and ours."""
    random = np.random.default_rng(0)
    small = Image.fromarray(random.integers(0, 255, (300, 400, 3), dtype=np.uint8))
    file = io.BytesIO()
    small.resize((4000, 3000), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    data, processor = file.getvalue(), MaCoSNetImageProcessor()

    def plain() -> None:
        image = Image.open(io.BytesIO(data)).convert("RGB").resize((240, 240), Image.Resampling.BILINEAR)
        torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1) / 255

    def ours() -> None:
        processor.preprocess_views([load_image(data, reduced_to=240)], return_tensors="pt")

    times: dict[str, list[float]] = {"plain": [], "ours": []}
    for _ in range(rounds):
        for name, work in (("plain", plain), ("ours", ours)):
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(preset: str, count: int) -> int:
    """Bytes at most that a process of its own takes for all pairs and masks of so many images, the fast way."""
    command = [sys.executable, os.path.abspath(__file__), "--preset", preset, "--only_memory", str(count)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(found.stdout.strip().splitlines()[-1])


def only_memory(preset: str, count: int) -> None:
    """Prints the peak memory of this process after a collection of so many images."""
    bench = Bench(preset, torch.device("cpu"), False)
    collection = Collection(bench.model, bench.processor)
    collection.add(images(count))
    match_collection(collection)
    collection.segment()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def report(result: dict[str, Any]) -> str:
    """The tables, as Markdown."""
    pair, lines = result["pair"], []
    bare, plain = pair["encoder, 2 passes"]["seconds"], pair["plain"]["seconds"]
    lines += [f"A pair with everything, both directions ({result['about']}):", ""]
    lines += [
        "| | seconds | encoder passes | times faster than plain | over its bare passes |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, found in pair.items():
        over = found["seconds"] / (bare * found["passes"] / 2)
        lines.append(
            f"| {name} | {found['seconds']:.3f} | {found['passes']} | {plain / found['seconds']:.2f} | {over:.2f} |"
        )
    lines += ["", "Collections, all ordered pairs and all masks:", ""]
    lines += [
        "| images | pairs | encoder alone | plain (passes) | exact (passes) | fast (passes) | fast over plain | "
        "fast over encoder | ms a pair | oriented (passes) | over fast |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for count, found in result["collections"].items():
        about = "~" if found["sampled"] else ""
        lines.append(
            f"| {count} | {found['pairs']} | {found['encoder alone']:.2f} s | "
            f"{about}{found['plain']:.1f} s ({found['plain passes']}) | "
            f"{about}{found['exact']:.1f} s ({found['exact passes']}) | "
            f"{found['fast']:.2f} s ({found['fast passes']}) | "
            f"{found['plain'] / found['fast']:.0f}x | {found['fast'] / found['encoder alone']:.2f}x | "
            f"{found['milliseconds a pair']:.2f} | "
            f"{found['oriented']:.2f} s ({found['oriented passes']}) | {found['oriented'] / found['fast']:.2f}x |"
        )
    reading = result["reading"]
    lines += [
        "",
        f"12-megapixel JPEG to the network's tensor: Pillow {reading['plain'] * 1e3:.0f} ms, ours "
        f"{reading['ours'] * 1e3:.0f} ms ({reading['plain'] / reading['ours']:.1f}x).",
    ]
    for count, size in result.get("memory", {}).items():
        lines.append(f"Peak memory with {count} images: {size / 1e9:.2f} GB.")
    return "\n".join(lines)


def chart(result: dict[str, Any]) -> str:
    """Seconds against the number of images, both logarithmic, as SVG."""
    width, height, left, top = 640, 360, 60, 40
    counts = [int(count) for count in result["collections"]]
    names = {"plain": "#c0392b", "exact": "#e67e22", "fast": "#1f77b4", "encoder alone": "#7f8c8d"}
    values = [found[name] for found in result["collections"].values() for name in names]
    low, high = np.floor(np.log10(min(values))), np.ceil(np.log10(max(values)))
    start, end = np.log10(min(counts)), np.log10(max(counts)) + 1e-9

    def place(count: float, seconds: float) -> tuple[float, float]:
        x = left + (np.log10(count) - start) / (end - start) * (width - left - 130)
        return round(x, 1), round(top + (high - np.log10(seconds)) / (high - low) * (height - top - 50), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif"',
        ' font-size="13">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="22">Seconds for all pairs and masks of N images ({result["about"]})</text>',
    ]
    for power in range(int(low), int(high) + 1):
        y = place(counts[0], 10.0**power)[1]
        parts.append(f'<path d="M{left} {y}H{width - 130}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{10.0**power:g} s</text>')
    for count in counts:
        parts.append(f'<text x="{place(count, 1)[0]}" y="{height - 25}" text-anchor="middle">{count}</text>')
    for name, colour in names.items():
        points = [place(count, result["collections"][str(count)][name]) for count in counts]
        line = " ".join(f"{x},{y}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in points]
        parts.append(f'<text x="{points[-1][0] + 8}" y="{points[-1][1] + 4}" fill="{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="paper", help="paper, lite or vgg16")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 5, 10, 20, 50], help="images of the collections")
    parser.add_argument("--rounds", type=int, default=5, help="of the pair")
    parser.add_argument(
        "--whole", type=int, default=20, help="ordered pairs up to which plain and exact are timed whole"
    )
    parser.add_argument("--memory", type=int, nargs="*", default=[200], help="collections whose peak memory is taken")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--bf16", action="store_true", help="everything under autocast")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--svg", type=Path, help="draw the collections here")
    parser.add_argument("--only_memory", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    # Random convolutions shrink the signal layer by layer to denormal numbers, which are slow; real weights do not.
    torch.set_flush_denormal(True)
    if arguments.only_memory:
        only_memory(arguments.preset, arguments.only_memory)
        return
    bench = Bench(arguments.preset, torch.device(arguments.device), arguments.bf16)
    result: dict[str, Any] = {
        "about": f"{arguments.preset}, {arguments.device}, {'bf16' if arguments.bf16 else 'float32'}, torch "
        f"{torch.__version__.split('+')[0]}, {torch.get_num_threads()} threads",
        "pair": measure_pair(bench, arguments.rounds),
        "collections": {},
    }
    for count in tqdm(arguments.sizes, desc="collections", disable=not sys.stderr.isatty()):
        result["collections"][str(count)] = measure_collection(bench, count, arguments.whole)
    result["reading"] = measure_reading()
    if arguments.device == "cpu":
        result["memory"] = {str(count): peak_memory(arguments.preset, count) for count in arguments.memory}
    print(report(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.svg:
        arguments.svg.write_text(chart(result))


if __name__ == "__main__":
    main()
