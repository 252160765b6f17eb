"""Time and memory of `macosnet segment --dataset` against the number of images.

    python benchmarks/bulk.py $DATA/caltech101 --sizes 500 2000

Each size is a run of its own: the first N images of the folder in the order of their names, without the folder of
backgrounds; further ones are mirrored, and then cropped. It prints the time from the first to the last shard, the peak
memory of each process, and the load of the machine: other work changes the time more than the processor's time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageOps

_START = """
import resource, sys, time
from macosnet_hf.bulk import run
from macosnet_hf.commands import main
started, clocks = [], (time.perf_counter, time.process_time)
work = run.segment_block
def timed(*args, **kwargs):
    started or started.extend(clock() for clock in clocks)
    return work(*args, **kwargs)
run.segment_block = timed
code = main.main(sys.argv[1:])
spent = [clock() - start for clock, start in zip(clocks, started)]
print("measured", *spent, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
sys.exit(code)
"""


def sources(folder: Path) -> list[Path]:
    """All images of a folder of class folders, without that of backgrounds."""
    return [path for path in sorted(folder.glob("*/[!.]*.jpg")) if not path.parent.name.startswith("BACKGROUND")]


def variants(paths: list[Path], count: int) -> Iterator[tuple[str, Image.Image | Path]]:
    """Names and files of so many images; mirrored and then cropped ones where the files do not suffice."""
    for number in range(count):
        path, round_ = paths[number % len(paths)], number // len(paths)
        name = f"{path.parent.name}/{path.stem}-{round_}.jpg"
        if round_ == 0:
            yield name, path
            continue
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        if round_ % 2:
            image = ImageOps.mirror(image)
        margin = 0.03 * (round_ // 2)
        box = (image.width * margin, image.height * margin, image.width * (1 - margin), image.height * (1 - margin))
        yield name, image.crop(tuple(map(round, box)))


def make_folder(data: Path, folder: Path, count: int) -> None:
    """Writes a folder of so many images."""
    for name, image in variants(sources(data), count):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(image, Path):
            shutil.copy(image, folder / name)
        else:
            image.save(folder / name, quality=92)


def measure(images: Path, output: Path, processes: int, options: list[str]) -> dict[str, float]:
    """Seconds of the slowest process, processor seconds of all, and the bytes at most of the largest, of one run."""
    command = ["segment", "--dataset", str(images), "--output_dir", str(output), *options]
    if len(list(images.iterdir())) > 1:  # of a single folder, `datasets` makes no labels
        command += ["--group_column", "label"]
    running = []
    for rank in range(processes):
        place = {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank)}
        arguments = [sys.executable, "-c", _START, *command]
        environment = {**os.environ, **place}
        running.append(subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment))
    found: list[list[float]] = []
    for process in running:
        text, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"A process ended with {process.returncode}.")
        found.append([float(value) for value in text.splitlines()[-1].split()[1:]])
    seconds, processor, size = zip(*found, strict=True)
    return {"seconds": max(seconds), "processor_seconds": sum(processor), "bytes": max(size)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of class folders of JPEG files")
    parser.add_argument("--sizes", type=int, nargs="+", default=[500, 2000], help="images")
    parser.add_argument("--processes", type=int, nargs="+", default=[1], help="processes at the same time")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments, options = parser.parse_known_args()
    results = []
    print("| images | processes | s | ms an image | processor ms an image | peak of a process, GB | load |")
    print("|---:|---:|---:|---:|---:|---:|---|")
    for count in arguments.sizes:
        with tempfile.TemporaryDirectory() as scratch:
            make_folder(arguments.data, Path(scratch) / "images", count)
            for processes in arguments.processes:
                before, start = os.getloadavg()[0], time.strftime("%H:%M")
                found = measure(Path(scratch) / "images", Path(scratch) / f"out-{processes}", processes, options)
                load = f"{before:.1f} to {os.getloadavg()[0]:.1f}"
                results.append({"images": count, "processes": processes, "load": load, "start": start, **found})
                print(
                    f"| {count} | {processes} | {found['seconds']:.0f} | {1e3 * found['seconds'] / count:.0f} | "
                    f"{1e3 * found['processor_seconds'] / count:.0f} | {found['bytes'] / 1e9:.2f} | {load} |",
                    flush=True,
                )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
