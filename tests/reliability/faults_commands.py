"""The commands that tests/reliability/faults.py disturbs, and what the output of each must be."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from faults_bench import Bench
    from faults_processes import Work


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
