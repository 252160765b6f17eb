"""Runs of the training scripts, each a process of its own, and what the tests compare of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

data = pytest.importorskip("skimage.data", reason="scikit-image is not installed (extra `dev`)")

ROOT = Path(__file__).resolve().parents[1]
TRAINING = ROOT / "training"

# Importing takes longer than most of these runs, so one process imports and each run is a fork of it.
DRIVER = """
import json, os, resource, shutil, signal, sys, time
sys.path.insert(0, sys.argv[1])
import pretrain_synthetic, train, warm_start_decoder
from macosnet_hf.commands import main as cli
from macosnet_hf.training import launch, loop
scripts = {"pretrain": pretrain_synthetic.main, "decoder": warm_start_decoder.main, "train": train.main}
scripts["adapt"] = lambda arguments: cli.main(["adapt", *arguments])

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def place_kill(where, number):
    # Only chooses the moment: at a batch, or within a save with part of the files written.
    if where == "batch":
        original = loop.step_generator
        def generator(seed, step, rank=0):
            return die() if step == number else original(seed, step, rank)
        loop.step_generator = generator
    else:
        original = loop.Accelerator.save_state
        def save(self, folder):
            original(self, folder)
            if folder.endswith(f"-{number}"):
                os.remove(os.path.join(folder, "optimizer.bin"))
                die()
        loop.Accelerator.save_state = save

statuses = []
for job in json.loads(sys.stdin.read()):
    if "copy" in job:
        shutil.copytree(*job["copy"])
        continue
    child = os.fork()
    if child == 0:
        with open(job["output"], "w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        if "kill" in job:
            place_kill(*job["kill"])
        if "largest_file" in job:
            # No file may grow beyond this: as on a full disk, a write fails in the middle.
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"],) * 2)
        code = 1
        try:
            launch.run_script(lambda: scripts[job["script"]](job["arguments"]))
        except SystemExit as error:
            code = error.code
        except BaseException:
            import traceback
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(statuses))
"""


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


class Runs:
    """Collects runs and starts them one after the other, each a process of its own."""

    def __init__(self, folder: Path):
        self.folder, self.jobs, self.names = folder, [], []
        self.statuses: dict[str, int] = {}

    def add(self, name: str, script: str, *arguments: object, **options: object) -> None:
        """`kill=("batch" | "save", number)` kills the run there; `largest_file=bytes` fills the disk."""
        job = {"script": script, "arguments": [str(word) for word in arguments], "output": str(self.text_file(name))}
        self.jobs.append(job | options)
        self.names.append(name)

    def copy(self, source: Path, target: Path) -> None:
        self.jobs.append({"copy": [str(source), str(target)]})

    def start(self) -> None:
        driver = self.folder / "driver.py"
        driver.write_text(DRIVER)
        done = subprocess.run(
            [sys.executable, str(driver), str(TRAINING)],
            input=json.dumps(self.jobs),
            capture_output=True,
            text=True,
            env=environment(),
            cwd=self.folder,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        self.statuses = dict(zip(self.names, json.loads(done.stdout), strict=True))

    def text_file(self, name: str) -> Path:
        return self.folder / f"{name}.txt"

    def text(self, name: str) -> str:
        return self.text_file(name).read_text()

    def succeeded(self, name: str) -> None:
        assert self.statuses[name] == 0, self.text(name)[-3000:]

    def refused(self, name: str, *parts: str) -> None:
        """Exit code 2 and one sentence for a person, the last thing said, without a traceback."""
        text = self.text(name)
        assert self.statuses[name] == 2, text[-3000:]
        assert "Traceback" not in text
        errors = [line for line in text.splitlines() if "error: " in line]
        assert len(errors) == 1, text
        assert text.rstrip().endswith(errors[0])
        for part in parts:
            assert part in errors[0]


def image_folder(folder: Path, count: int) -> Path:
    """Different crops of real images, in two class folders."""
    photos = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]
    for index in range(count):
        image = photos[index % 4]
        corner = 40 * (index // 4)
        path = folder / ("cats" if index % 2 else "things") / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[corner : corner + 240, corner : corner + 260]).resize((130, 120)).save(path)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def log(folder: Path, key: str = "total") -> list[dict]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if key in line]


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def part(state: dict[str, torch.Tensor], *prefixes: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if name.removeprefix("macosnet.").startswith(prefixes)}


def state_of(path: Path):
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=False)


def same(first, second) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second
