"""Settings of the training scripts: the command line on top of a YAML file, and what is said of a mistake."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
from training_runs import ROOT

for package in ("accelerate", "yaml"):
    pytest.importorskip(package, reason=f"{package} is not installed (extra `train`)")

from macosnet_hf.errors import InputError  # noqa: E402
from macosnet_hf.training.checkpoints import refuse_other_settings  # noqa: E402
from macosnet_hf.training.settings import DecoderSettings, JointSettings, SyntheticSettings, parse_settings  # noqa: E402

REQUIRED = ["--dataset_name", "d", "e", "--model_name_or_path", "m", "--output_dir", "o"]
KINDS = [SyntheticSettings, DecoderSettings, JointSettings]

# What a user of accelerate's examples expects.
USUAL = (
    "model_name_or_path dataset_name output_dir per_device_train_batch_size gradient_accumulation_steps learning_rate "
    "lr_scheduler_type num_warmup_steps max_train_steps num_train_epochs seed checkpointing_steps "
    "resume_from_checkpoint with_tracking report_to push_to_hub hub_model_id dataloader_num_workers mixed_precision"
)

# `settings` in the run.json of a joint training of version 0.1 with the configuration of lite.yaml.
OF_VERSION_0_1 = """
{"exclude_classes": [], "photo_size": 256, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
"learning_rate": 0.0002, "weight_decay": 0.0001, "max_grad_norm": 1.0, "lr_scheduler_type": "cosine",
"num_warmup_steps": 20, "max_train_steps": 500, "num_train_epochs": null, "ema_decay": 0.99, "seed": 0,
"mixed_precision": null, "model_name_or_path": "m", "group_size": 3, "photos_per_class": 50, "smallest_crop": 0.8,
"flip_probability": 0.5, "photometric": true, "benchmark_weights": "pf-pascal", "lambda_matching": 0.2,
"lambda_cycle": 0.05, "lambda_trans": 0.05, "lambda_contrast": 5.0, "lambda_task": 5.0, "margin": 2.0,
"contrastive_form": "features", "perceptual_network": "resnet50", "cycle_unit": "pixel", "squared_norms": false,
"separate_streams": false, "detach_masks": true, "synthetic_weight": 50.0, "prior_weight": 20.0, "local_weight": 50.0,
"paste_share": 0.4, "pseudo_masks": null, "mask_teacher": null, "train_encoder": false, "train_predictor": true,
"train_decoder": true, "encoder_learning_rate": null, "decoder_learning_rate": 0.001,
"freeze_predictor_statistics": true, "freeze_decoder_statistics": false, "cascade": "features",
"gradient_checkpointing": false, "channels_last": true, "torch_compile": false, "validation_groups": 32}
"""


def joint(*words, config=None):
    return parse_settings(JointSettings, [*(["--config", str(config)] if config else []), *REQUIRED, *words])


@pytest.mark.parametrize("kind", KINDS)
def test_the_usual_names_work(kind):
    names = {field.name for field in dataclasses.fields(kind)}
    assert set(USUAL.split()) <= names
    words = [
        *("--per_device_train_batch_size", "3", "--gradient_accumulation_steps", "2", "--learning_rate", "1e-4"),
        *("--lr_scheduler_type", "linear", "--num_warmup_steps", "7", "--max_train_steps", "9"),
        *("--num_train_epochs", "1.5", "--seed", "4", "--checkpointing_steps", "5", "--with_tracking", "--report_to"),
        *("all", "--resume_from_checkpoint", "latest", "--push_to_hub", "--hub_model_id", "me/model"),
        *("--dataloader_num_workers", "2", "--mixed_precision", "bf16"),
    ]
    found = vars(parse_settings(kind, [*REQUIRED, *words]))
    expected = {"dataset_name": ["d", "e"], "model_name_or_path": "m", "output_dir": "o", "num_train_epochs": 1.5}
    expected |= {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "learning_rate": 1e-4, "seed": 4}
    expected |= {"lr_scheduler_type": "linear", "num_warmup_steps": 7, "max_train_steps": 9, "checkpointing_steps": 5}
    expected |= {"with_tracking": True, "report_to": "all", "resume_from_checkpoint": "latest", "push_to_hub": True}
    expected |= {"hub_model_id": "me/model", "dataloader_num_workers": 2, "mixed_precision": "bf16"}
    assert {name: found[name] for name in expected} == expected


def test_checkpoints_of_version_0_1_resume(tmp_path):
    before = json.loads(OF_VERSION_0_1) | {"mixed_precision": "no", "num_processes": 1}
    (tmp_path / "run.json").write_text(json.dumps({"step": 1, "settings": before}))
    accelerator = SimpleNamespace(mixed_precision="no", num_processes=1)
    config = ROOT / "training" / "configs" / "lite.yaml"
    refuse_other_settings(tmp_path, accelerator, joint(config=config))
    assert set(before) <= {*joint(config=config).of_result(), "num_processes"}
    with pytest.raises(InputError, match=r"other settings: margin 2.0 \(now 3.0\)"):
        refuse_other_settings(tmp_path, accelerator, joint("--margin", "3", config=config))


def test_a_setting_that_a_checkpoint_does_not_know_had_its_default(tmp_path):
    accelerator = SimpleNamespace(mixed_precision="no", num_processes=1)
    settings = parse_settings(SyntheticSettings, REQUIRED)
    before = settings.of_result() | vars(accelerator)
    del before["on_device"]
    (tmp_path / "run.json").write_text(json.dumps({"step": 1, "settings": before}))
    refuse_other_settings(tmp_path, accelerator, settings)
    with pytest.raises(InputError, match=r"other settings: on_device False \(now True\)"):
        refuse_other_settings(tmp_path, accelerator, parse_settings(SyntheticSettings, [*REQUIRED, "--on_device"]))
    with pytest.raises(InputError, match=r"other settings: num_processes 1 \(now 2\); resume with the same ones"):
        refuse_other_settings(tmp_path, SimpleNamespace(mixed_precision="no", num_processes=2), settings)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], (False, True)),
        (["--keep_in_memory", "--no-train_decoder"], (True, False)),
        (["--keep-in-memory", "--no-train-decoder"], (True, False)),
        (["--keep_in_memory", "--no-keep_in_memory", "--no_train_decoder", "--train_decoder"], (False, True)),
        (["--keep_in_memory", "true", "--train_decoder", "false"], (True, False)),
    ],
)
def test_flags_are_turned_on_and_off(words, expected):
    found = joint(*words)
    assert (found.keep_in_memory, found.train_decoder) == expected


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        "dataset_name: [a, b]\noutput_dir: 7\nmodel_name_or_path: m\nlearning_rate: 1e-3\nseed: '3'\n"
        "keep_in_memory: true\ntrain_decoder: false\nexclude_classes: clutter\nmixed_precision: no\nmax_train_steps:\n"
    )
    found = parse_settings(JointSettings, ["--config", str(config)])
    assert (found.dataset_name, found.output_dir, found.exclude_classes) == (["a", "b"], "7", ["clutter"])
    assert (found.learning_rate, found.seed, found.mixed_precision) == (1e-3, 3, "no")
    assert (found.keep_in_memory, found.train_decoder, found.max_train_steps) == (True, False, None)
    assert found.per_device_train_batch_size == 8
    words = ["--no-keep_in_memory", "--seed", "5", "--dataset_name", "c", "--exclude_classes"]
    found = parse_settings(JointSettings, [*words, "--config", str(config)])
    assert (found.keep_in_memory, found.seed, found.dataset_name, found.exclude_classes) == (False, 5, ["c"], [])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("learning_rat: 1", r"has an unknown key 'learning_rat'\. Is learning_rate meant \(a number\)\?"),
        ("keep-in-memory: true", r"Is keep_in_memory meant \(true or false\)\?"),
        ("nothing_like_it: 1", r"has an unknown key 'nothing_like_it'\.$"),
        ("1: 2", "has an unknown key 1"),
        ("config: other.yaml", "has an unknown key 'config'"),
        ("learning_rate: fast", "'learning_rate' of the configuration .* takes a number, not 'fast'"),
        ("seed: 1.5", "takes a whole number, not 1.5"),
        ("seed: true", "takes a whole number, not True"),
        ("seed: [1]", r"takes a whole number, not \[1\]"),
        ("keep_in_memory: 3", "takes true or false, not 3"),
        ("group_size: 4", "takes one of 2, 3, not 4"),
        ("mixed_precision: fp8", "takes one of no, bf16, fp16, not 'fp8'"),
        ("output_dir: {a: 1}", "takes text, not {'a': 1}"),
        ("dataset_name: {a: 1}", "takes one or several names, not {'a': 1}"),
        ("[1, 2]", "holds no lines of the form"),
        ("", "holds no lines of the form"),
        ("a: [1", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_sentence(tmp_path, text, sentence):
    config = tmp_path / "config.yaml"
    config.write_text(text)
    with pytest.raises(InputError, match=sentence):
        joint(config=config)
    with pytest.raises(InputError, match="No such file"):
        joint(config=tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--learning_rat=3"], r"no argument --learning_rat=3\. Is learning_rate meant \(a number\)\?"),
        (["--seed", "x"], "argument --seed: invalid int value: 'x'"),
        (["--group_size", "5"], "argument --group_size: invalid choice"),
        (["--config"], "argument --config: expected one argument"),
        (["--max_train_steps", "0"], "--max_train_steps must be at least 1"),
        (["--learning_rate", "nan"], "--learning_rate must be a positive number"),
        (["--encoder_learning_rate", "0"], "--encoder_learning_rate must be a positive number"),
        (["--prior_weight", "-1"], "--prior_weight must be a number, zero or more"),
        (["--num_warmup_steps", "-1"], "--num_warmup_steps must be a number, zero or more"),
        (["--ema_decay", "1"], "--ema_decay must be at least 0 and less than 1"),
        (["--photos_per_class", "2"], "--photos_per_class must be at least 3"),
        (["--flip_probability", "2"], "--flip_probability must be a number from 0 to 1"),
        (["--smallest_crop", "0"], r"--smallest_crop must lie in \(0, 1\]"),
        (["--pseudo_masks", "m.npz"], "of no use without --prior_weight"),
        (["--pseudo_masks", "m.npz", "--prior_weight", "1"], "There is no file m.npz"),
        (["--margin", "-1"], "margin must be a finite number"),
    ],
)
def test_a_command_line_that_cannot_be_used_is_refused_in_one_sentence(words, sentence):
    with pytest.raises(InputError, match=sentence):
        joint(*words)


def test_features_are_held_only_where_the_encoder_learns():
    words = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o", "--feature_weight", "3"]
    with pytest.raises(InputError, match="--feature_weight is of no use without --train_encoder"):
        parse_settings(DecoderSettings, words)
    assert parse_settings(DecoderSettings, [*words, "--train_encoder"]).feature_weight == 3


@pytest.mark.parametrize("kind", KINDS)
def test_help_is_grouped_and_names_every_setting_once(kind, capsys):
    with pytest.raises(SystemExit) as done:
        parse_settings(kind, ["--help"], "What the script does.")
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert "What the script does." in text
    assert "SUPPRESS" not in text
    for group in ("data:", "optimisation:", "checkpoints and results:", "log:"):
        assert f"\n{group}\n" in text
    listed = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    assert sorted(listed) == sorted(["--config", *(f"--{field.name}" for field in dataclasses.fields(kind))])
