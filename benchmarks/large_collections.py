"""Time and memory of a saved collection: encoding and saving, loading, masks in blocks, a point in all images.

    python benchmarks/large_collections.py $DATA/caltech101 --images 1000

Each step is a process of its own, so that its peak memory is its own. The images are evenly spread over the folder.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STEPS = ("save", "load", "masks", "point")
_AT_ONCE = 256  # images that are added before they are saved


def choose(folder: Path, count: int) -> list[Path]:
    """So many images of a folder."""
    paths = sorted(folder.rglob("[!.]*.jpg"))
    return [paths[number * len(paths) // count] for number in range(min(count, len(paths)))]


def work(step: str, store: Path, images: Path, count: int, masks: int, degree: int) -> None:
    """Does a step and prints what it took."""
    from macosnet_hf.collection import Collection
    from macosnet_hf.inference import COLLECTION_SIDE
    from macosnet_hf.inference.linked_matches import link_collection
    from macosnet_hf.inference.saved_collections import load_collection, save_collection
    from macosnet_hf.io.checkpoints import load_model_and_processor
    from macosnet_hf.io.memory import give_memory_back
    from macosnet_hf.io.working_copy import open_working_copy

    give_memory_back()
    model, processor = load_model_and_processor(device="cpu")
    before, start, clock = peak(), time.perf_counter(), time.process_time()

    def report(what: str, each: int) -> None:
        nonlocal start, clock
        spent, busy = time.perf_counter() - start, time.process_time() - clock
        print(
            f"| {what} | {each} | {spent:.2f} | {1000 * busy / each:.1f} | {peak():.2f} ({before:.2f}) |",
            flush=True,
        )
        start, clock = time.perf_counter(), time.process_time()

    if step == "save":
        collection = Collection(model, processor)
        paths = choose(images, count)
        for number in range(0, len(paths), _AT_ONCE):
            some = paths[number : number + _AT_ONCE]
            collection.add([open_working_copy(str(path), side=COLLECTION_SIDE, fine=True).image for path in some])
            save_collection(collection, store, release=True)
        report("encode and save", len(collection))
        size = sum(path.stat().st_size for path in store.iterdir())
        print(f"folder: {size / 1e6:.0f} MB, {size / len(collection) / 1e3:.0f} kB an image")
        return
    collection: Any = load_collection(store, model, processor)
    report("load", len(collection))
    if step == "masks":
        done = 0
        for result in collection.segment_blocks(refine="grabcut"):
            done += len(result.numbers or ())
            if done >= masks:
                break
        report("masks in blocks of 32", done)
    if step == "point":
        matches = link_collection(collection, degree=degree)
        report(f"links, {degree} neighbours and a tree", len(matches.pairs))
        for local in (False, True):
            matches.transfer_points([(50, 60)], 0, local_matching=local)
            report("a point in all images, " + ("with" if local else "without") + " local matching", len(collection))


def peak() -> float:
    """Peak memory of this process in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of JPEG images, searched with its subfolders")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--masks", type=int, default=160, help="images that are segmented, at least")
    parser.add_argument("--degree", type=int, default=4, help="neighbours of each image")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--store", type=Path, help="folder of the saved collection, which stays (default: a new one)")
    parser.add_argument("--inner", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inner:
        work(args.inner, args.store, args.folder, args.images, args.masks, args.degree)
        return 0
    store = args.store or Path(tempfile.mkdtemp(prefix="macosnet-collection-"))
    try:
        print("| step | images or pairs | s | processor ms each | peak memory, GB (with the model alone) |")
        print("|---|---:|---:|---:|---:|", flush=True)
        for step in args.steps:
            options = [*sys.argv[1:], "--store", str(store), "--inner", step]
            subprocess.run([sys.executable, __file__, *options], check=True)
    finally:
        if args.store is None:
            shutil.rmtree(store)
    return 0


if __name__ == "__main__":
    sys.exit(main())
