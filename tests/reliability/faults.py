"""Killed, told to end, out of disk, out of memory, in each other's way: is anything half-written ever taken for whole?

    python tests/reliability/faults.py [--moments 30] [--seed 0] [--only kill-prepare,disk] [--report figures.json]

The commands are real and run in processes of their own, forked from this one after the imports, on tiny models and
images. A kill is SIGKILL at a random moment of the time that the command takes. After it, what stands under the
final names must be whole: nothing, the output from before, or the new one; and the same command started again must end
as if it had never been interrupted, without leaving anything of the killed run. A full disk is a tmpfs of a size at
which some writing fails (where mounting is not allowed: a limit on the size of files).

Exit code 1 if anything was half-written, mixed, lost, left behind, or ended in anything but one sentence.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "training"), str(HERE.parents[1])]

# They lie beside this file, wherever that is started from.
from faults_bench import Bench  # noqa: E402
from faults_commands import COMMANDS  # noqa: E402
from faults_conditions import backward_clock, dead_worker, together  # noqa: E402
from faults_disks import full_disk, read_only  # noqa: E402
from faults_kills import kills  # noqa: E402
from faults_processes import aside  # noqa: E402

SCENARIOS: dict[str, Callable[[Bench], None]] = {
    **{
        f"end-{name}": lambda bench, name=name: kills(bench, name, orderly=True)  # type: ignore[misc]
        for name in ("segment", "prepare", "evaluate")
    },
    **{f"kill-{name}": lambda bench, name=name: kills(bench, name) for name in COMMANDS},  # type: ignore[misc]
    "disk": full_disk,
    "read-only": read_only,
    "worker": dead_worker,
    "clock": backward_clock,
    # Not `save`: transformers writes into the folder itself and knows of nobody else.
    **{
        f"together-{name}": lambda bench, name=name: together(bench, (name,))  # type: ignore[misc]
        for name in COMMANDS
        if name != "save"
    },
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--moments", type=int, default=30, help="kills of each command (default 30)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help=f"of {', '.join(SCENARIOS)}; separated by commas")
    parser.add_argument("--commands", default=",".join(COMMANDS), help="for disk, read-only and clock (default: all)")
    parser.add_argument("--report", metavar="FILE", help="write the figures here as JSON")
    args = parser.parse_args(arguments)

    import pretrain_synthetic  # noqa: F401 (imported once, for all the runs that are forked)
    import torch

    import macosnet_hf.collection
    import macosnet_hf.datasets.prepare
    import macosnet_hf.evaluation.runner
    import macosnet_hf.io.checkpoints
    import macosnet_hf.training.loop  # noqa: F401

    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), random.Random(args.seed), args.moments, tuple(args.commands.split(",")))
        os.environ["HF_DATASETS_CACHE"] = str(bench.folder / "cache")
        aside(bench.make, bench.folder)
        for name in args.only.split(",") if args.only else SCENARIOS:
            SCENARIOS[name](bench)
            figures = ", ".join(f"{what} {number}" for what, number in bench.counts.get(name, {}).items())
            print(f"{name:<14} {figures}", flush=True)
    print(f"{len(bench.faults)} faults, {time.monotonic() - began:.0f} s")
    if args.report:
        figures_of = {key: value for key, value in asdict(bench).items() if key in ("counts", "faults")}
        Path(args.report).write_text(json.dumps(figures_of, indent=1) + "\n")
    return 1 if bench.faults else 0


if __name__ == "__main__":
    sys.exit(main())
