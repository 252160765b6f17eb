"""Joint training: exact resume after a real SIGKILL, each loss off, frozen parts, the best model, `macosnet adapt`."""

import math
import signal

import pytest
import torch
from training_runs import ROOT, Runs, equal, image_folder, log, part, weights

for package in ("accelerate", "yaml"):
    pytest.importorskip(package, reason=f"{package} is not installed (extra `train`)")

TERMS = ("matching", "cycle", "transitivity", "contrast", "consistency")
OPTIONS = {"matching": "matching", "cycle": "cycle", "transitivity": "trans", "contrast": "contrast"}
OPTIONS["consistency"] = "task"
PRESETS = sorted((ROOT / "training" / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, start_model) -> Runs:
    root = tmp_path_factory.mktemp("runs")
    photos = image_folder(root / "photos", 12)
    runs = Runs(root)
    base = ("--dataset_name", photos, "--model_name_or_path", start_model, "--photo_size", 96, "--num_warmup_steps", 0)
    base += ("--per_device_train_batch_size", 2, "--logging_steps", 1, "--validation_groups", 2, "--ema_decay", 0)
    base += ("--learning_rate", 1e-3, "--decoder_learning_rate", 2e-3)
    full = (*base, "--prior_weight", 5, "--local_weight", 1, "--synthetic_weight", 1, "--paste_share", 0.5)
    exact = (*full, "--max_train_steps", 4, "--checkpointing_steps", 2, "--train_encoder")
    exact += ("--encoder_learning_rate", 1e-4, "--photometric")

    runs.add("whole", "train", *exact, "--output_dir", root / "whole")
    killed = (*exact, "--output_dir", root / "killed", "--resume_from_checkpoint", "latest")
    runs.add("killed", "train", *killed, kill=("batch", 3))
    runs.add("killed-saving", "train", *killed, kill=("save", 4))
    runs.copy(root / "killed", root / "other")
    other = (*exact, "--output_dir", root / "other", "--resume_from_checkpoint", "latest")
    runs.add("other-weights", "train", *other, "--lambda_cycle", 3)
    runs.add("resumed", "train", *killed)

    short = (*base, "--max_train_steps", 1)
    runs.add("five", "train", *short, "--output_dir", root / "five")
    for term, option in OPTIONS.items():
        runs.add(f"no-{term}", "train", *short, f"--lambda_{option}", 0, "--output_dir", root / f"no-{term}")
    runs.add("separate", "train", *short, "--separate_streams", "--output_dir", root / "separate")
    runs.add("pairs", "train", *short, "--group_size", 2, "--output_dir", root / "pairs")
    runs.add("predictor", "train", *short, "--no-train_decoder", "--output_dir", root / "predictor")
    runs.add("decoder", "train", *short, "--no-train_predictor", "--output_dir", root / "decoder")

    taught = (*short, "--prior_weight", 5, "--mask_teacher", start_model)
    runs.add("taught", "train", *taught, "--output_dir", root / "taught")

    few = ("--model", start_model, "--max-train-steps", 4)
    runs.add("adapt", "adapt", photos / "cats", "--output-dir", root / "adapted", *few)
    one = image_folder(root / "one", 1)
    runs.add("adapt-one", "adapt", one, "--output-dir", root / "adapted-one", "--model", start_model)

    out = ("--output_dir", root / "refused")
    runs.add("one-photo", "train", *base, *out, "--dataset_name", one)
    runs.add("no-trans-of-pairs", "train", *base, *out, "--group_size", 2, "--lambda_trans", 1)
    runs.add("negative", "train", *base, *out, "--local_weight", -1)
    runs.add("teacher-of-nothing", "train", *base, *out, "--mask_teacher", start_model)
    runs.add("all-frozen", "train", *base, *out, "--no-train_predictor", "--no-train_decoder")
    (root / "unknown.yaml").write_text("lambda_circle: 2\n")
    runs.add("unknown-key", "train", *base, *out, "--config", root / "unknown.yaml")
    runs.start()
    return runs


def test_a_killed_run_ends_with_the_weights_of_the_uninterrupted_one(runs, start_model):
    for name in ("killed", "killed-saving"):
        assert runs.statuses[name] == -signal.SIGKILL, runs.text(name)[-3000:]
    for name in ("whole", "resumed"):
        runs.succeeded(name)
    whole = weights(runs.folder / "whole")
    assert equal(whole, weights(runs.folder / "killed"))
    for name in ("encoder", "affine_head", "tps_head", "decoder"):
        assert not equal(part(whole, name), part(weights(start_model), name)), name
    runs.refused("other-weights", "lambda_cycle", "--allow_changes")


def test_every_term_is_reported(runs):
    runs.succeeded("five")
    line = log(runs.folder / "five")[0]
    for name in (*TERMS, "mask_area", "polarity", "folded", "degenerate"):
        assert math.isfinite(line[name]), name
    line = log(runs.folder / "whole")[0]
    for name in (*TERMS, "prior", "local", "synthetic"):
        assert math.isfinite(line[name]), name
        assert line[name] != 0, name


@pytest.mark.parametrize("term", TERMS)
def test_a_weight_of_zero_turns_a_term_off(runs, term):
    runs.succeeded(f"no-{term}")
    line = log(runs.folder / f"no-{term}")[0]
    assert term not in line
    assert set(TERMS) - {term} <= set(line)


def test_a_teacher_s_masks_are_stored_beside_the_run(runs, start_model):
    from macosnet_hf.io.checkpoints import load_model_and_processor
    from macosnet_hf.training.images import TrainingImages
    from macosnet_hf.training.pseudo_masks import load_masks, teacher_masks

    runs.succeeded("taught")
    assert math.isfinite(log(runs.folder / "taught")[0]["prior"])
    squares = TrainingImages([str(runs.folder / "photos")], 96)
    found = load_masks(runs.folder / "taught" / "pseudo_masks.npz", squares.fingerprint())
    assert found is not None
    teacher = load_model_and_processor(str(start_model), "cpu")
    members = squares.class_names
    expected = teacher_masks(
        [teacher], lambda numbers: torch.stack([squares[number] for number in numbers]), members, quiet=True
    )
    assert found.shape == expected.shape == (12, 96, 96)
    assert (found == expected).float().mean() > 0.98  # a run computes on other threads


def test_separate_streams_have_no_consistency_and_pairs_no_transitivity(runs):
    runs.succeeded("separate")
    runs.succeeded("pairs")
    assert "consistency" not in log(runs.folder / "separate")[0]
    assert "transitivity" not in log(runs.folder / "pairs")[0]


def test_frozen_parts_stay(runs, start_model):
    start = weights(start_model)
    frozen = {"predictor": ("encoder", "decoder"), "decoder": ("encoder", "affine_head", "tps_head")}
    for name, parts in frozen.items():
        runs.succeeded(name)
        trained = weights(runs.folder / name)
        assert equal(part(trained, *parts), part(start, *parts)), name
        assert not equal(trained, start), name


def test_the_best_model_by_the_label_free_criterion_is_stored(runs):
    lines = log(runs.folder / "whole", "criterion")
    assert lines
    assert all(0 <= line["criterion"] <= 1 for line in lines)
    assert (runs.folder / "whole" / "best" / "model.safetensors").is_file()


def test_adapt_reports_before_and_after_and_leaves_a_model(runs):
    runs.succeeded("adapt")
    assert (runs.folder / "adapted" / "model.safetensors").is_file()
    assert "before" in runs.text("adapt").lower()
    assert runs.statuses["adapt-one"] == 2
    text = runs.text("adapt-one")
    assert "a pair takes two" in text
    assert "Traceback" not in text
    assert not (runs.folder / "adapted-one" / "model.safetensors").exists()


def test_what_cannot_work_is_refused_in_one_sentence(runs):
    runs.refused("one-photo", "There is one image to train on")
    runs.refused("no-trans-of-pairs", "--group_size 3")
    runs.refused("negative", "--local_weight")
    runs.refused("all-frozen", "frozen")
    runs.refused("teacher-of-nothing", "--mask_teacher makes the masks of --prior_weight")
    runs.refused("unknown-key", "lambda_circle", "lambda_cycle")


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_presets_are_read_by_the_scripts_own_parser(preset):
    from macosnet_hf.training.settings import JointSettings, parse_settings

    required = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o"]
    settings = parse_settings(JointSettings, ["--config", str(preset), *required])
    papers = {"tss": (5, 5, 10, 10), "internet": (5, 5, 20, 10), "pf-pascal": (20, 10, 2.5, 2.5)}
    papers["spair-71k"] = (20, 20, 1, 1)
    if preset.stem in papers:
        found = settings.loss_weights()
        assert (found.cycle, found.trans, found.contrast, found.task) == papers[preset.stem]
        assert found.matching == 1
        assert settings.learning_rate == 5e-8


def test_there_are_presets_for_every_benchmark():
    assert {"tss", "internet", "pf-pascal", "spair-71k", "lite", "my-photos"} <= {path.stem for path in PRESETS}


def test_adapt_trains_with_the_settings_of_its_preset(tmp_path):
    """Images, model, folder and what follows from a short run apart."""
    import argparse

    from macosnet_hf.commands.adapt import add_arguments, settings_of
    from macosnet_hf.training.settings import JointSettings, parse_settings

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = ["d", "--output-dir", "out", "--model", "m"]
    found = vars(settings_of(parser.parse_args(words), tmp_path, ["small"]))
    preset = str(ROOT / "training" / "configs" / "my-photos.yaml")
    required = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", str(tmp_path)]
    expected = vars(parse_settings(JointSettings, ["--config", preset, *required, "--exclude_classes", "small"]))
    assert found == expected | {"checkpointing_steps": 101}
    shorter = settings_of(parser.parse_args([*words, "--max-train-steps", "3", "--seed", "5"]), tmp_path, [])
    assert (shorter.max_train_steps, shorter.validation_steps, shorter.seed) == (3, 3, 5)
