"""How the network runs on the device: waiting, time, memory, loading, layouts, compiling, several processes."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from training_speed import WANTED, step_seconds

from macosnet_hf import MaCoSNetForKeypointMatching
from macosnet_hf.training.joint import checkpoint_activations

from .learning import joint_objective, largest_difference
from .material import Bench, exact_float32
from .numerics import compare, run
from .report import Figures, Skipped

SCRIPT = Path(__file__).resolve().parents[1] / "gpu_check.py"
CHILD = "GPU_CHECK_CHILD"


@contextlib.contextmanager
def _noted_waits() -> Iterator[collections.Counter[str]]:
    """Counts the calls in the block that wait for the GPU, by the line of the package that made them."""
    found: collections.Counter[str] = collections.Counter()

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "called a synchronizing" in str(message):
            frames = [frame for frame in traceback.extract_stack() if "macosnet_hf" in frame.filename]
            place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "elsewhere"
            found[place] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


def synchronisation(bench: Bench, figures: Figures) -> None:
    """Forward passes and joint steps on a batch that is on the device already."""
    bench.need_cuda("only a GPU works behind the program's back")
    pixels, batch = bench.many_pairs(2), {name: values.to(bench.device) for name, values in bench.groups(4).items()}
    calls: dict[str, Callable[[], Any]] = {}
    for cascade in ("exact", "features"):
        model = bench.network(bench.device, cascade=cascade, mutual_fit=True)
        calls[f"pair, {cascade}"] = lambda model=model: run(model, pixels)
    for name, objective in (
        ("step, five losses", joint_objective(bench, bench.device, plain=True)),
        ("step, exact", joint_objective(bench, bench.device, "exact", plain=True)),
        ("step, all losses", joint_objective(bench, bench.device)),
    ):

        def step(objective: Any = objective) -> None:
            objective(batch, torch.Generator().manual_seed(0))["total"].backward()

        calls[name] = step
    for name, call in calls.items():
        call()  # the first one loads kernels
        bench.wait()
        with _noted_waits() as found:
            call()
        figures.at_most(f"{name}: waits", sum(found.values()), 0)
        if found:
            figures.add(f"{name}: at", ", ".join(f"{place} x{count}" for place, count in found.most_common(6)))


def training_speed(bench: Bench, figures: Figures) -> None:
    """Our joint step beside the plain one, as `benchmarks/training_speed.py`; float32 as torch computes it."""
    if bench.small:
        raise Skipped("says nothing of a small network")
    presets = (("lite", 8), ("paper", 4)) if bench.cuda else (("lite", 1),)
    for preset, size in presets:
        medians = step_seconds(preset, bench.device, "bf16", size, rounds=5 if bench.cuda else 1)
        for name, seconds in medians.items():
            figures.add(f"{preset} {name}", size / seconds, " triplets/s")
        name, ratio = f"{preset} ratio", medians["plain"] / medians["ours"]
        if bench.cuda:
            figures.at_least(name, ratio, WANTED["cuda"])
        else:
            figures.add(name, ratio)


def memory(bench: Bench, figures: Figures) -> None:
    """Peaks; and the memory that is held after ten steps is that after five."""
    bench.need_cuda("torch counts the memory of GPUs")
    batch = {name: values.to(bench.device) for name, values in bench.groups(8).items()}

    def peak(call: Callable[[], Any]) -> float:
        bench.wait()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        bench.wait()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    for cascade in ("exact", "features"):
        model, pixels = bench.network(bench.device, cascade=cascade), bench.many_pairs(16)
        figures.add(f"16 pairs, {cascade}", peak(lambda model=model, pixels=pixels: run(model, pixels)), " MiB")
    peaks = {}
    for name, bf16, checkpointed in (("float32", False, False), ("bf16", True, False), ("bf16, less", True, True)):
        objective = joint_objective(bench, bench.device, plain=True, trained=("encoder", "predictor", "decoder"))
        if checkpointed:
            checkpoint_activations(objective)

        def step(objective: Any = objective, bf16: bool = bf16) -> None:
            with torch.autocast(bench.device.type, torch.bfloat16, enabled=bf16):
                total = objective(batch, torch.Generator().manual_seed(0))["total"]
            total.backward()
            objective.zero_grad()

        step()
        peaks[name] = peak(step)
        figures.add(f"step of 8 triplets, {name}", peaks[name], " MiB")
        held = []
        for _ in range(2):
            for _ in range(4):
                step()
            bench.wait()
            held.append(torch.cuda.memory_allocated())
        figures.at_most(f"growth, {name}", held[1] / held[0] - 1, 0.01)
    figures.at_most("with gradient checkpointing over without", peaks["bf16, less"] / peaks["bf16"], 1.0)


def speed(bench: Bench, figures: Figures) -> None:
    """Milliseconds of a pair: one by one and sixteen at once; torch's own float32, and bf16."""
    rounds = 10 if bench.cuda else 2
    sizes = (1, 16) if bench.cuda else (1,)
    for cascade in ("exact", "features"):
        for dtype in (torch.float32, torch.bfloat16):
            model = bench.network(bench.device, cascade=cascade).to(dtype)
            for size in sizes:
                pixels = bench.many_pairs(size)
                taken = bench.milliseconds(lambda model=model, pixels=pixels: run(model, pixels), rounds)
                name = f"{cascade}, {str(dtype).removeprefix('torch.')}, batch of {size}"
                figures.add(name, taken / size, " ms")


def device_map(bench: Bench, figures: Figures) -> None:
    """A checkpoint loaded straight onto the device, by its name and by `"auto"`, gives what `.to` gives."""
    pixels = bench.pairs((0, 1))
    with tempfile.TemporaryDirectory() as folder, exact_float32():
        wanted = run(bench.network(bench.device), pixels)
        bench.network().save_pretrained(folder)
        for kind in ({"": str(bench.device)}, "auto"):
            model = MaCoSNetForKeypointMatching.from_pretrained(folder, device_map=kind).eval()
            name = "auto" if kind == "auto" else "named"
            elsewhere = [
                tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type != bench.device.type
            ]
            figures.at_most(f"{name}: tensors elsewhere", len(elsewhere), 0)
            found = run(model, pixels)
            figures.at_most(f"{name}: affine", float((found.affine - wanted.affine).abs().max()), 1e-5)
            logits = (found.mask_logits - wanted.mask_logits).abs().max()
            figures.at_most(f"{name}: mask logits", float(logits), 1e-4)
        half = MaCoSNetForKeypointMatching.from_pretrained(
            folder, device_map={"": str(bench.device)}, dtype=torch.bfloat16
        )
        other = sum(parameter.dtype != torch.bfloat16 for parameter in half.parameters())
        figures.at_most("bf16: weights of another precision", other, 0)


def channels_last(bench: Bench, figures: Figures) -> None:
    """Weights in the other layout: equal outputs, and the time of sixteen pairs in bf16."""
    pixels = bench.pairs((0, 1), (2, 3))
    models = [bench.network(bench.device) for _ in range(2)]
    models[1] = models[1].to(memory_format=torch.channels_last)
    with exact_float32():
        found, wanted = (run(model, pixels) for model in reversed(models))
    compare(figures, found, wanted)
    if bench.cuda:
        many = bench.many_pairs(16)
        for name, model in zip(("before", "channels_last"), models, strict=True):
            model = model.to(torch.bfloat16)
            taken = bench.milliseconds(lambda model=model: run(model, many)) / 16
            figures.add(f"{name}, bf16", taken, " ms a pair")


# ---------------------------------------------------------------------------------------------------------------------
# Other processes
# ---------------------------------------------------------------------------------------------------------------------


def _call(command: list[str], seconds: float, **environment: str) -> str:
    """Runs a program, and ends it and all that it started when the time is over; returns what it said."""
    process = subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=seconds)
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise TimeoutError(f"the process did not end within {seconds:.0f} s") from None
        raise
    return said


def two_processes(bench: Bench, figures: Figures) -> None:
    """A run of the joint stage on two devices: both end with the same weights."""
    bench.need_cuda("processes on CPUs are in tests/training")
    if torch.cuda.device_count() < 2:
        raise Skipped(f"needs two CUDA devices; here is {torch.cuda.device_count()}")
    figures.at_most("difference of the processes", run_two(bench, "cuda"), 0)


def run_two(bench: Bench, device: str) -> float:
    """Largest difference between the weights that two processes end with."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command = [*launcher, str(SCRIPT), "--device", device, "--worker", folder, *["--small"] * bench.small]
        said = _call(command, 80)
        both = [Path(folder) / f"weights-{rank}.pt" for rank in range(2)]
        if not all(path.is_file() for path in both):
            raise RuntimeError(said[-250:])
        return largest_difference(*(torch.load(path, weights_only=True) for path in both))


def compiled(bench: Bench, figures: Figures) -> None:
    """Encoder and heads compiled; on a GPU in a process of its own, which can be ended."""
    if bench.cuda and CHILD not in os.environ:
        return _compiled_elsewhere(bench, figures)
    if not bench.cuda and not bench.small:
        raise Skipped("inductor takes minutes on a CPU; tests/conversion compiles there")
    backend = "inductor" if bench.cuda else "eager"
    model, pixels = bench.network(bench.device), bench.many_pairs(16 if bench.cuda else 2)
    with exact_float32():
        wanted = run(model, pixels)
        before = bench.milliseconds(lambda: run(model, pixels), 5)
        for part in (model.macosnet.encoder, model.macosnet.affine_head, model.macosnet.tps_head):
            part.compile(backend=backend)
        found = run(model, pixels)
        compare(figures, found, wanted)
        after = bench.milliseconds(lambda: run(model, pixels), 5)
    figures.add("eager", before, " ms")
    figures.add("compiled", after, " ms")
    return None


def _compiled_elsewhere(bench: Bench, figures: Figures) -> None:
    limit = min(70.0, bench.seconds_left)
    if limit < 20:
        raise Skipped("the time that is left is too short to compile in")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(SCRIPT), "--device", "cuda", "--only", "compile", "--output", folder]
        said = _call([*command, *["--small"] * bench.small], limit, **{CHILD: "1"})
        path = Path(folder) / "gpu_check.json"
        if not path.is_file():
            raise RuntimeError(said[-250:])
        result = json.loads(path.read_text(encoding="utf-8"))["checks"][0]
    figures.values.update(result["figures"])
    if result["status"] != "passed":
        figures.faults.append(result["reason"])
