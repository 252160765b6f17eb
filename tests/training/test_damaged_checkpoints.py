"""A checkpoint that is cut off is refused in a sentence that names the one before, from which the run then goes on."""

import os
import shutil

import pytest
from training_runs import Runs, equal, image_folder, weights

for package in ("accelerate", "yaml"):
    pytest.importorskip(package, reason=f"{package} is not installed (extra `train`)")

FILES = (
    "model.safetensors",
    "optimizer.bin",
    "scheduler.bin",
    "random_states_0.pkl",
    "custom_checkpoint_0.pkl",
    "run.json",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, start_model) -> Runs:
    root = tmp_path_factory.mktemp("runs")
    runs = Runs(root)
    words = ("--dataset_name", image_folder(root / "photos", 4), "--model_name_or_path", start_model)
    words += ("--per_device_train_batch_size", 2, "--photo_size", 96, "--num_warmup_steps", 0, "--logging_steps", 1)
    words += ("--checkpointing_steps", 1, "--max_train_steps", 3, "--resume_from_checkpoint", "latest")
    words += ("--checkpoints_total_limit", 9)
    runs.add("whole", "pretrain", *words, "--output_dir", root / "whole", "--ema_decay", 0.5)
    runs.start()
    runs.succeeded("whole")
    resumed = Runs(root)
    for file in FILES:
        folder = root / file
        for step in (1, 2):
            shutil.copytree(root / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        os.truncate(folder / "checkpoint-2" / file, 100 if file != "run.json" else 10)
        resumed.add(file, "pretrain", *words, "--output_dir", folder, "--ema_decay", 0.5)
    only = root / "only"
    shutil.copytree(root / FILES[0] / "checkpoint-2", only / "checkpoint-2")
    resumed.add("only", "pretrain", *words, "--output_dir", only, "--ema_decay", 0.5)
    # The way out that the sentence names.
    shutil.copytree(root / FILES[0] / "checkpoint-1", root / "moved" / "checkpoint-1")
    for file in ("._random_states_0.pkl", ".DS_Store"):  # as on a disk that was at a Mac
        (root / "moved" / "checkpoint-1" / file).write_bytes(b"of the system")
    resumed.add("moved", "pretrain", *words, "--output_dir", root / "moved", "--ema_decay", 0.5)
    resumed.start()
    return resumed


@pytest.mark.parametrize("file", FILES)
def test_a_checkpoint_that_is_cut_off_is_refused_and_the_one_before_is_offered(runs, file):
    runs.refused(file, "checkpoint-2", "move it away, and --resume_from_checkpoint latest goes on from checkpoint-1.")


def test_without_an_earlier_one_the_run_begins_anew(runs):
    runs.refused("only", "checkpoint-2 cannot be resumed", "move it away and start anew.")


def test_the_way_out_ends_with_the_weights_of_the_undisturbed_run(runs):
    runs.succeeded("moved")
    assert equal(weights(runs.folder / "moved"), weights(runs.folder / "whole"))
