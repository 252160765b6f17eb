"""Checks and times on a GPU what the tests check on a CPU, in one run.

    python benchmarks/gpu_check.py --device cuda --output RESULTS --minutes 8

Each check has a limit for every figure that must keep one, and passes, fails or is skipped with a reason. One that
breaks does not stop the others. `--list` names them; `--only NAME ...` makes some. The most valuable ones come first:
with a short `--minutes` the last ones are skipped. With `--output` the folder gets `gpu_check.json` and `gpu_check.md`,
after every check. Weights are the embedded ones, images those of `examples/`; nothing is downloaded.

With `--device cpu` the CPU is compared with itself: with float64, or with another order of computation. `--small` takes
a network that runs in milliseconds.
"""

# ruff: noqa: E402 (the clock and the environment come before torch)

import argparse
import collections
import os
import platform
import sys
import time
from pathlib import Path

START = time.monotonic()  # importing takes a part of the time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Without it no product of matrices is computed in the same order twice; it must be set before the first one.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import accelerate
import timm
import torch
import transformers
from gpu_checks import learning, numerics, running
from gpu_checks.material import Bench
from gpu_checks.report import Check, Report, run_checks

IN_FLOAT32 = "float32 without TF32; transforms and keypoints 0.001, masks 0.01, features 0.0001"
CHECKS = (
    Check("outputs_exact", numerics.outputs_exact, "outputs of pairs, exact cascade", IN_FLOAT32),
    Check("outputs_fast", numerics.outputs_fast, "outputs of pairs, fast cascade", IN_FLOAT32),
    Check("gradients_fast", learning.gradients_fast, "losses and gradients of a joint step", "0.1 %; gradients 1 %"),
    Check("synchronisation", running.synchronisation, "places that wait for the device", "none"),
    Check("training_speed", running.training_speed, "joint step in bf16, plain step", "3 times on a GPU"),
    Check("memory", running.memory, "peak memory; steps that follow take no more", "1 %"),
    Check("mutual_fit", numerics.mutual_fit, "the fit of both directions, points, flow", "0.001; 0.1 pixels"),
    Check("orientations", numerics.orientations, "mirrored and turned pairs", "equal choices, then as above"),
    Check(
        "half_precision",
        numerics.half_precision,
        "bf16 and fp16 beside float32",
        "keypoints 0.5 % and 0.1 % of the side",
    ),
    Check("pair", numerics.pair_of_files, "`match_pair` from files to verdict", "0.5 % of pixels, 1 pixel"),
    Check("gradients_exact", learning.gradients_exact, "losses and gradients, exact cascade", "0.1 %; gradients 6 %"),
    Check("speed", running.speed, "time of a pair", "none"),
    Check("resume", learning.resume, "a resumed run of the first stage ends equal", "bit-equal"),
    Check("resume_joint", learning.resume_joint, "a resumed run of the joint stage", "as two equal runs"),
    Check("collection", numerics.collection, "`Collection.segment`, all transforms", "masks 0.02, 1 pixel"),
    Check("device_map", running.device_map, "`from_pretrained` with `device_map`", "transforms 0.00001"),
    Check("channels_last", running.channels_last, "the other memory layout", IN_FLOAT32),
    Check("two_processes", running.two_processes, "a step on two devices", "equal weights", 90),
    Check("compile", running.compiled, "`torch.compile` of encoder and heads", IN_FLOAT32, 75),
)


def environment(device: torch.device, small: bool) -> dict[str, str]:
    """What the run is made on, for the head of the table."""
    found = {"device": platform.processor() or platform.machine(), "threads": str(torch.get_num_threads())}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        found = {"device": f"{properties.name} ({memory})", "CUDA": str(torch.version.cuda)}
        found["cuDNN"] = str(torch.backends.cudnn.version())
    versions = {each.__name__: each.__version__ for each in (torch, transformers, accelerate, timm)}
    return {**found, "python": platform.python_version(), **versions, "network": "small" if small else "lite"}


def main() -> int:
    """Makes the checks; returns 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--minutes", type=float, default=8, help="checks that have not begun by then are skipped")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[check.name for check in CHECKS])
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write gpu_check.json and gpu_check.md there")
    parser.add_argument("--small", action="store_true", help="a network that runs in milliseconds")
    parser.add_argument("--list", action="store_true", help="name the checks and end")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # a process of `two_processes`
    arguments = parser.parse_args()
    if arguments.list:
        for check in CHECKS:
            print(f"{check.name:20} {check.about} ({check.tolerance})")
        return 0
    transformers.utils.logging.disable_progress_bar()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("There is no CUDA device here; use --device cpu.")
    if arguments.worker is not None:
        learning.work(Bench(torch.device(arguments.device), arguments.small), arguments.worker)
        return 0
    device = torch.device("cuda:0" if arguments.device == "cuda" else "cpu")
    chosen = [check for check in CHECKS if arguments.only is None or check.name in arguments.only]
    report = Report(environment(device, arguments.small), arguments.output)
    run_checks(chosen, Bench(device, arguments.small), report, 60 * arguments.minutes, START)
    counts = collections.Counter(result.status for result in report.results)
    print(", ".join(f"{counts[status]} {status}" for status in ("passed", "failed", "skipped")) + ".")
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
