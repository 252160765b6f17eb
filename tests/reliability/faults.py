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
import contextlib
import faulthandler
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "training"), str(HERE.parents[1])]

import seeds  # noqa: E402 (it lies beside this file, wherever that is started from)

Work = Callable[[], Any]
PATIENCE = 900  # seconds after which a run counts as hanging


# ---------------------------------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------------------------------


class Run:
    """A piece of work in a process of its own, with what it says in a file."""

    def __init__(self, work: Work, says: Path) -> None:
        self.says = says
        ready, tell = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a bench that runs under nohup ignores it
            os.close(ready)
            with open(says, "w") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            os.write(tell, b"r")
            os.close(tell)
            faulthandler.dump_traceback_later(PATIENCE - 30, file=sys.__stderr__)
            # Whatever happens in it ends here: an exception of a signal handler (that of torch for a dead worker
            # comes at any line) would otherwise unwind this fork through `main`, which deletes the scratch folder.
            code = 1
            try:
                code = _exit_code(work)
            finally:
                os._exit(code)
        os.close(tell)
        os.read(ready, 1)
        os.close(ready)
        self.began = time.monotonic()

    def kill(self, seconds: float, how: signal.Signals = signal.SIGKILL) -> bool:
        """Kills it, or tells it to end, so long after its start; whether it was still running."""
        time.sleep(max(0.0, self.began + seconds - time.monotonic()))
        os.kill(self.pid, how)
        return self.end() in (-how, 128 + how)

    def end(self) -> int:
        """Waits for it; its exit code, the negative signal, or 1000 if it hangs. Nothing of it goes on."""
        limit, code = time.monotonic() + PATIENCE, 1000
        while time.monotonic() < limit:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                break
            time.sleep(0.005)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        if code == 1000:
            os.waitpid(self.pid, 0)
        return code

    def text(self) -> str:
        return self.says.read_text(errors="replace")


def _exit_code(work: Work) -> int:
    code: Any = 1
    try:
        code = work()
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)


def aside(work: Callable[[], Any], scratch: Path) -> Any:
    """What some work returns, done in a process of its own: this one must never have a thread, or a lock that the
    thread holds at the moment of a fork would stay locked in the child for ever."""
    answer = scratch / "answer"

    def answering() -> int:
        answer.write_bytes(pickle.dumps(work()))
        return 0

    run = Run(answering, scratch / "said-aside.txt")
    if run.end():
        raise RuntimeError(run.text()[-3000:])
    return pickle.loads(answer.read_bytes())


def refused_in_a_sentence(run: Run, code: int) -> str:
    """Empty, or what is wrong with the way in which a run that cannot succeed has ended."""
    text = run.text()
    sentences = len(re.findall(r"macosnet: |(?<!I/O )\berror: ", text))  # they may follow a progress bar
    if code != 2 or sentences != 1 or "Traceback" in text:
        return f"exit code {code}, said {run.text()[-600:]!r}"
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """A tiny model, images and archives, which every command reads and none changes.

    Attributes:
        folder: for everything.
        commands: that the scenarios go through which are not about a single one.
        faults: what went wrong, one text each.
        counts: figures by name.
    """

    folder: Path
    rng: random.Random
    moments: int
    commands: tuple[str, ...] = ()
    faults: list[str] = field(default_factory=list)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    number: int = 0
    known: dict[Any, Any] = field(default_factory=dict)

    def make(self) -> None:
        seeds.tiny_checkpoint(self.model)
        for number in range(8):
            path = self.images / ("cats" if number % 2 else "things") / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            seeds.image(130, 120, number).save(path)
        (self.folder / "flat").mkdir()
        for number in range(5):
            seeds.image(60, 48, number).save(self.folder / "flat" / f"{number}.png")
        for name, count in (("archive", 12), ("older", 5)):
            for kind in ("Bird", "Cat"):
                for number in range(count):
                    for part in ("images", "masks"):
                        path = self.folder / name / part / kind / f"{number}.png"
                        path.parent.mkdir(parents=True, exist_ok=True)
                        content = seeds.image(60, 48, number)
                        (content if part == "images" else content.convert("1")).save(path)

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def images(self) -> Path:
        return self.folder / "photos"

    def fresh(self) -> Path:
        """A new empty folder."""
        self.number += 1
        path = self.folder / f"run-{self.number}"
        path.mkdir()
        return path

    def problem(self, name: str, out: Path, whole: dict[str, Any]) -> str:
        """Empty, or what is half-written or mixed in an output folder."""
        return aside(lambda: COMMANDS[name].problem(out, whole), self.folder)

    def content(self, name: str, out: Path) -> Any:
        """What is in an output folder, to compare."""
        return aside(lambda: COMMANDS[name].content(out), self.folder)

    def run(self, work: Work, folder: Path) -> Run:
        self.number += 1
        return Run(work, self.folder / f"said-{self.number}.txt")

    def count(self, scenario: str, what: str, number: int = 1) -> None:
        figures = self.counts.setdefault(scenario, {})
        figures[what] = figures.get(what, 0) + number

    def fault(self, scenario: str, text: str) -> None:
        self.count(scenario, "faults")
        self.faults.append(f"{scenario}: {text}")
        print(f"FAULT {self.faults[-1]}", flush=True)

    def check(self, scenario: str, text: str) -> None:
        if text:
            self.fault(scenario, text)


@dataclass(frozen=True)
class Command:
    """A command and what its output must be.

    Attributes:
        work: `(bench, output folder, kind) -> the work`; the kind is "new", or "old" for another output of the same.
        problem: `(output folder, whole outputs by kind) -> empty, or what is half-written or mixed`.
        content: `output folder -> something to compare`; only called where nothing is half-written.
        keeps: whether a killed run's leftovers are needed to go on (checkpoints), and are not to vanish.
    """

    work: Callable[[Bench, Path, str], Work]
    problem: Callable[[Path, dict[str, Any]], str]
    content: Callable[[Path], Any]
    keeps: bool = False


def _cli(*words: object) -> Work:
    def work() -> int:
        from macosnet_hf.commands.main import main

        return main([str(word) for word in words])

    return work


def _files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def _is_one_of(content: Any, whole: dict[str, Any], what: str) -> str:
    return "" if content is None or content in whole.values() else f"{what} is neither the older nor the newer output"


# -- segment


def _segment(bench: Bench, out: Path, kind: str) -> Work:
    options = ("--refine", "otsu" if kind == "new" else "none", "--device", "cpu", "--model", bench.model)
    return _cli("segment", bench.folder / "flat", "--output-dir", out / "result", *options)


def _segment_content(out: Path) -> Any:
    """The files that the summary names, and the summary; `None` without one."""
    folder = out / "result"
    if not (folder / "summary.json").is_file():
        return None
    summary = json.loads((folder / "summary.json").read_text())
    names = [photo[part] for photo in summary["photos"] for part in ("mask", "cutout")]
    return {name: (folder / name).read_bytes() for name in [*names, "overview.png", "summary.json"]}


def _segment_problem(out: Path, whole: dict[str, Any]) -> str:
    try:
        content = _segment_content(out)
    except (OSError, ValueError, KeyError) as error:
        return f"there is a summary, but {error!r}"
    return _is_one_of(content, whole, "the result folder")


# -- prepare


def _prepare(bench: Bench, out: Path, kind: str) -> Work:
    archive = bench.folder / ("archive" if kind == "new" else "older")
    return _cli("prepare", "coseg", archive, out / "prepared", "--overwrite")


def _prepare_content(out: Path) -> Any:
    """All records as a reader sees them."""
    from macosnet_hf.datasets.prepare import is_prepared, open_records

    if not is_prepared(out / "prepared"):
        return None
    return [(row["id"], row["source_image"]["bytes"]) for row in open_records("coseg", out / "prepared")[0]]


def _prepare_problem(out: Path, whole: dict[str, Any]) -> str:
    from macosnet_hf import MaCoSNetError

    try:
        content = _prepare_content(out)
    except MaCoSNetError as error:
        return f"it looks whole, but {error}"
    return _is_one_of(content, whole, "the prepared folder")


# -- evaluate


def _evaluate(bench: Bench, out: Path, kind: str) -> Work:
    options = ["--model", bench.model, "--device", "cpu", "--refine", "none", "--predictions", out / "predictions"]
    options += ["--json", out / "figures.json", "--markdown", out / "table.md", "--partners", 1]
    return _cli("evaluate", "coseg", "--data", bench.folder / ("archive" if kind == "new" else "older"), *options)


def _evaluate_content(out: Path) -> Any:
    path = out / "figures.json"
    if not path.is_file():
        return None
    figures = json.loads(path.read_text())
    figures.pop("seconds", None)
    return figures


def _evaluate_problem(out: Path, whole: dict[str, Any]) -> str:
    try:
        content = _evaluate_content(out)
        if (out / "predictions").exists():
            manifest = json.loads((out / "predictions" / "manifest.json").read_text())
            import numpy as np

            for name in {name for name, _ in manifest["samples"].values()}:
                with np.load(out / "predictions" / name) as shard:
                    [shard[key] for key in shard.files]
    except (OSError, ValueError) as error:
        return f"half-written: {error!r}"
    return _is_one_of(content, whole, "the file of figures")


# -- save_pretrained


def _save(bench: Bench, out: Path, kind: str) -> Work:
    """A single save takes milliseconds, so a dozen follow each other, of two models in turn; the last one is `kind`."""

    def save(kind: str) -> None:
        import torch

        from macosnet_hf.io.checkpoints import load_model_and_processor

        model, processor = load_model_and_processor(bench.model, "cpu")
        if kind == "old":
            model.config.local_matching = False
            with torch.no_grad():
                for weight in model.parameters():
                    weight.mul_(0.5)
        model.save_pretrained(out / "saved")
        processor.save_pretrained(out / "saved")

    def work() -> int:
        for _ in range(6):
            save("old" if kind == "new" else "new")
            save(kind)
        return 0

    return work


def _save_content(out: Path) -> Any:
    from macosnet_hf import CheckpointError
    from macosnet_hf.io.checkpoints import load_model_and_processor

    if not (out / "saved").is_dir():
        return None
    try:
        model, processor = load_model_and_processor(out / "saved", "cpu")
    except CheckpointError:
        return None
    weights = {name: value.numpy().tobytes() for name, value in model.state_dict().items()}
    return weights, model.config.local_matching, processor.size["height"]


def _save_problem(out: Path, whole: dict[str, Any]) -> str:
    return _is_one_of(_save_content(out), whole, "the checkpoint that loads")


# -- training


def _train(bench: Bench, out: Path, kind: str) -> Work:
    words = ["--dataset_name", bench.images, "--model_name_or_path", bench.model, "--output_dir", out / "trained"]
    words += ["--per_device_train_batch_size", 2, "--photo_size", 96, "--num_warmup_steps", 0, "--logging_steps", 1]
    words += ["--max_train_steps", 6, "--checkpointing_steps", 1, "--resume_from_checkpoint", "latest"]
    if kind == "old":
        words += ["--learning_rate", 1e-4]
    if kind == "worker":
        words += ["--dataloader_num_workers", 1]

    def work() -> int:
        import pretrain_synthetic

        from macosnet_hf.training.launch import run_script

        run_script(lambda: pretrain_synthetic.main([str(word) for word in words]))
        return 0

    return work


def _train_content(out: Path) -> Any:
    path = out / "trained" / "model.safetensors"
    return path.read_bytes() if path.is_file() else None


def _train_problem(out: Path, whole: dict[str, Any]) -> str:
    from safetensors import SafetensorError, safe_open

    for folder in (out / "trained").glob("checkpoint-*"):
        names = {path.name for path in folder.iterdir()}
        wanted = {"run.json", "model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl"}
        if not wanted <= names:
            return f"{folder.name} lacks {sorted(wanted - names)}"
        try:
            with safe_open(folder / "model.safetensors", "numpy") as weights:
                for name in weights.keys():  # noqa: SIM118 (it is no dict)
                    weights.get_tensor(name)
        except SafetensorError as error:
            return f"{folder.name} is half-written: {error}"
    return _is_one_of(_train_content(out), whole, "the trained model")


COMMANDS = {
    "segment": Command(_segment, _segment_problem, _segment_content),
    "prepare": Command(_prepare, _prepare_problem, _prepare_content),
    "evaluate": Command(_evaluate, _evaluate_problem, _evaluate_content),
    "save": Command(_save, _save_problem, _save_content),
    "train": Command(_train, _train_problem, _train_content, keeps=True),
}


def whole_outputs(bench: Bench, name: str, kinds: tuple[str, ...]) -> tuple[dict[str, Any], float]:
    """What undisturbed runs give, by kind, and the seconds that one takes."""
    return {kind: _undisturbed(bench, name, kind)[0] for kind in kinds}, _undisturbed(bench, name, "new")[1]


def names_left(bench: Bench, name: str) -> set[str]:
    """The names of the files that an undisturbed run leaves."""
    return _undisturbed(bench, name, "new")[2]


def _undisturbed(bench: Bench, name: str, kind: str) -> tuple[Any, float, set[str]]:
    """Content, seconds and names of the files of a run; the first run of each sort is remembered."""
    if (name, kind) not in bench.known:
        out = bench.fresh()
        run = bench.run(COMMANDS[name].work(bench, out, kind), out)
        code = run.end()
        seconds = time.monotonic() - run.began
        content = None if code else bench.content(name, out)
        if content is None:
            raise RuntimeError(f"{name} does not work at all: {run.text()[-2000:]}")
        bench.known[name, kind] = content, seconds, _listing(out)
        shutil.rmtree(out)
    return bench.known[name, kind]


# ---------------------------------------------------------------------------------------------------------------------
# Scenarios
# ---------------------------------------------------------------------------------------------------------------------


def kills(bench: Bench, name: str, orderly: bool = False) -> None:
    """SIGKILL at random moments, half of them over an older output; then the same once more, to the end.

    Args:
        orderly: SIGTERM and SIGHUP in turn instead, after which nothing temporary is there.
    """
    scenario, command = f"{'end' if orderly else 'kill'}-{name}", COMMANDS[name]
    over_older = name in ("segment", "prepare", "save")
    whole, seconds = whole_outputs(bench, name, ("new", "old") if over_older else ("new",))
    clean = names_left(bench, name)
    killed = tries = 0
    while killed < bench.moments and tries < 5 * bench.moments:
        out, tries = bench.fresh(), tries + 1
        if over_older and tries % 2 == 0:
            code = bench.run(command.work(bench, out, "old"), out).end()
            assert code == 0
        run = bench.run(command.work(bench, out, "new"), out)
        # The last part, in which files get their names, is short; a third of the kills go there.
        share = bench.rng.random() if tries % 3 else bench.rng.uniform(0.75, 1.05)
        how = (signal.SIGTERM, signal.SIGHUP)[killed % 2] if orderly else signal.SIGKILL
        if run.kill(share * seconds, how):
            killed += 1
            left = [path for path in _listing(out) if re.search(r"\.macosnet-|partial|replaced", path)]
            if orderly and (left or "Traceback" in run.text()):
                bench.fault(scenario, f"{how.name} left {sorted(left)[:5]}, said {run.text()[-800:]!r}")
            bench.count(scenario, "killed over an older output" if over_older and tries % 2 == 0 else "killed")
        else:
            bench.count(scenario, "was through already")
            seconds *= 0.9  # the run that was measured met with more of other people's work
        bench.check(scenario, bench.problem(name, out, whole))
        again = bench.run(command.work(bench, out, "new"), out)
        code = again.end()
        if code:
            bench.fault(scenario, f"the run after the kill ended with {code}: {again.text()[-800:]}")
        elif bench.content(name, out) != whole["new"]:
            bench.fault(scenario, "the run after the kill gave another result")
        else:
            bench.count(scenario, "restarted and ended as if undisturbed")
        left = _listing(out) - clean
        if left:
            bench.fault(scenario, f"left behind: {sorted(left)[:5]}")
        shutil.rmtree(out)


def _listing(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int, read_only: bool = False) -> Iterator[bool]:
    """Mounts a tmpfs at a folder; whether that was possible."""
    options = f"size={kilobytes}k"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False)
    if done.returncode:
        yield False
        return
    try:
        if read_only:
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        yield True
    finally:
        subprocess.run(["umount", "-l", folder], check=False)


def _with_small_files(work: Work, kilobytes: int) -> Work:
    """No file may grow beyond this: as on a full disk, a write fails in the middle."""

    def limited() -> Any:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024,) * 2)
        return work()

    return limited


def full_disk(bench: Bench) -> None:
    """Every command on disks that are too small; then on the same one made larger."""
    scenario = "disk"
    for name in bench.commands:
        command = COMMANDS[name]
        whole, _ = whole_outputs(bench, name, ("new", "old"))  # `save` writes both in turn
        clean = names_left(bench, name)
        for kilobytes in (8, 40, 120, 400) if bench.moments > 5 else (40,):
            out = bench.fresh()
            with small_disk(out, kilobytes) as mounted:
                work = command.work(bench, out, "new")
                run = bench.run(work if mounted else _with_small_files(work, kilobytes // 2), out)
                code = run.end()
                if code == 0:
                    bench.count(scenario, "fitted")
                elif name == "save":  # transformers' own function, whose errors are the system's
                    bench.count(scenario, "failed with an error" if code == 1 else "ended")
                else:
                    bench.check(
                        scenario, refused_in_a_sentence(run, code) and f"{name}, {kilobytes} kB: {run.text()[-600:]}"
                    )
                    bench.count(scenario, "refused in one sentence")
                bench.check(scenario, bench.problem(name, out, whole))
                if not command.keeps and code and name != "save" and _listing(out):
                    bench.fault(scenario, f"{name}, {kilobytes} kB: left behind {sorted(_listing(out))[:5]}")
                if mounted:
                    subprocess.run(["mount", "-o", "remount,size=64m", out], check=True)
                again = bench.run(work, out)
                if again.end() or bench.content(name, out) != whole["new"] or _listing(out) - clean:
                    bench.fault(scenario, f"{name}: not made good with room: {again.text()[-600:]}")
                else:
                    bench.count(scenario, "made good with room")
            shutil.rmtree(out)


def read_only(bench: Bench) -> None:
    """Every command with an output folder on a read-only disk."""
    scenario = "read-only"
    for name in bench.commands:
        command = COMMANDS[name]
        out = bench.fresh()
        with small_disk(out, 100, read_only=True) as mounted:
            if not mounted:
                bench.count(scenario, "skipped, no mounting here")
                continue
            run = bench.run(command.work(bench, out, "new"), out)
            code = run.end()
            if name != "save":
                bench.check(scenario, refused_in_a_sentence(run, code))
            bench.count(scenario, "refused")
            if code == 0 or _listing(out):
                bench.fault(scenario, f"{name} claims to have written")


def dead_worker(bench: Bench) -> None:
    """A worker of the data loader is killed or starved: the run ends, and one more ends as if undisturbed."""
    scenario = "worker"
    whole, seconds = whole_outputs(bench, "train", ("new",))
    for moment in range(max(1, bench.moments // 5)):
        out = bench.fresh()
        starved = moment % 2 == 1
        work = _train(bench, out, "worker")
        run = bench.run(_starving_workers(work) if starved else work, out)
        if not starved:
            workers = _children_of(run.pid)
            limit = time.monotonic() + 20 * seconds
            while not workers and time.monotonic() < limit and _alive(run.pid):
                time.sleep(0.005)
                workers = _children_of(run.pid)
            time.sleep(bench.rng.uniform(0, 0.2))
            for worker in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
        code = run.end()
        bench.count(scenario, "out of memory" if starved else "killed")
        if code == 1000:
            bench.fault(scenario, "the run hangs without its worker")
        elif code == 0:
            bench.count(scenario, "was through already")
        elif "Traceback" in run.text():
            bench.count(scenario, "ended with a traceback")
        else:
            bench.count(scenario, "ended in one sentence")
        bench.check(scenario, bench.problem("train", out, whole))
        again = bench.run(_train(bench, out, "new"), out)
        if again.end() or bench.content("train", out) != whole["new"]:
            bench.fault(scenario, f"not made good: {again.text()[-600:]}")
        else:
            bench.count(scenario, "restarted and ended as if undisturbed")
        shutil.rmtree(out)


def _starving_workers(work: Work) -> Work:
    """Every worker may take one more megabyte than it has at its start."""

    def starving() -> Any:
        import sandbox
        from torch.utils.data import _utils

        from macosnet_hf.training import loop as training

        training.WORKER_SECONDS = 60  # instead of the many that a slow disk may need
        original = _utils.worker._worker_loop

        def loop(*arguments: Any, **options: Any) -> Any:
            sandbox.limit_memory(1)
            return original(*arguments, **options)

        _utils.worker._worker_loop = loop
        return work()

    return starving


def _children_of(pid: int) -> list[int]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as children:
            return [int(number) for number in children.read().split()]
    except OSError:
        return []


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as status:
            return status.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def backward_clock(bench: Bench) -> None:
    """The time of day goes back an hour at every look; the results are the same."""
    scenario = "clock"
    for name in bench.commands:
        command = COMMANDS[name]
        whole, _ = whole_outputs(bench, name, ("new",))
        out = bench.fresh()
        run = bench.run(_backwards(command.work(bench, out, "new")), out)
        code = run.end()
        if code or bench.content(name, out) != whole["new"]:
            bench.fault(scenario, f"{name}: {code} {run.text()[-600:]}")
        bench.count(scenario, "same result")
        shutil.rmtree(out)


def _backwards(work: Work) -> Work:
    def backwards() -> Any:
        now = [time.time()]

        def earlier() -> float:
            now[0] -= 3600
            return now[0]

        time.time = earlier
        time.time_ns = lambda: int(earlier() * 1e9)
        return work()

    return backwards


def together(bench: Bench, names: tuple[str, ...]) -> None:
    """Two different runs at a time into one folder: each ends well or is refused, and what stands there is of one."""
    for name in names:
        scenario, command = f"together-{name}", COMMANDS[name]
        whole, seconds = whole_outputs(bench, name, ("new", "old"))
        for _ in range(max(1, bench.moments // 3)):
            out = bench.fresh()
            first = bench.run(command.work(bench, out, "old"), out)
            time.sleep(bench.rng.uniform(0, 0.5 * seconds))
            second = bench.run(command.work(bench, out, "new"), out)
            codes = [first.end(), second.end()]
            for run, code in zip((first, second), codes, strict=True):
                if code == 0:
                    bench.count(scenario, "ended well")
                else:
                    bench.check(scenario, refused_in_a_sentence(run, code) and f"{code} {run.text()[-800:]}")
                    bench.count(scenario, "refused in one sentence")
            bench.check(scenario, bench.problem(name, out, whole))
            if 0 in codes and bench.content(name, out) is None:
                bench.fault(scenario, "one run ended well, but nothing is there")
            shutil.rmtree(out)


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
