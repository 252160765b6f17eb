"""A run's validation figures are those of `macosnet evaluate`: the same readers, metrics and means."""

import json

import pytest
from archives import coseg, pf_willow
from training_runs import Runs, image_folder, log

from macosnet_hf.commands.main import main

for package in ("accelerate", "datasets", "yaml"):
    pytest.importorskip(package, reason=f"{package} is not installed (extra `train`)")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, start_model) -> Runs:
    root = tmp_path_factory.mktemp("runs")
    photos = image_folder(root / "photos", 8)
    pairs, masks = pf_willow(root / "willow") / "test_pairs.csv", coseg(root / "coseg", images=5)
    runs = Runs(root)
    base = ("--dataset_name", photos, "--model_name_or_path", start_model, "--photo_size", 96, "--num_warmup_steps", 0)
    base += ("--per_device_train_batch_size", 2, "--max_train_steps", 2, "--ema_decay", 0.5, "--learning_rate", 1e-2)
    with_pairs, with_masks = ("--validation_pairs", pairs), ("--validation_masks", masks)
    runs.add("pretrain", "pretrain", *base, *with_pairs, "--output_dir", root / "pretrain")
    runs.add("decoder", "decoder", *base, *with_masks, "--partners", 1, "--output_dir", root / "decoder")
    runs.add("train", "train", *base, *with_pairs, *with_masks, "--output_dir", root / "train")
    few = ("--validation_per_class", 1, "--output_dir", root / "refused")
    runs.add("one-per-class", "decoder", *base, *with_masks, *few)
    bare = coseg(root / "bare", masks=False)
    runs.add("no-masks", "decoder", *base, "--validation_masks", bare, "--output_dir", root / "refused")
    runs.start()
    return runs


def evaluated(runs: Runs, *words: object) -> dict:
    report = runs.folder / "report.json"
    assert main(["evaluate", *map(str, words), "--json", str(report), "--device", "cpu"]) == 0
    return json.loads(report.read_text())


def last(runs: Runs, name: str, key: str) -> dict[str, float]:
    runs.succeeded(name)
    return log(runs.folder / name, key)[-1]


@pytest.mark.parametrize(
    ("name", "figure", "variant"),
    [("pretrain", "cascade", "transform"), ("train", "transform", "transform"), ("train", "local", "local")],
)
def test_pck_of_a_run_is_that_of_evaluate(runs, name, figure, variant):
    seen = last(runs, name, f"pck_{figure}@0.1")
    pairs = runs.folder / "willow" / "test_pairs.csv"
    report = evaluated(runs, "pairs", "--pairs", pairs, "--model", runs.folder / name, "--matching", variant)
    expected = report["metrics"]["pck"]["image"]
    assert {alpha: seen[f"pck_{figure}@{alpha}"] for alpha in ("0.05", "0.1", "0.15")} == expected
    assert len(set(expected.values())) > 1


@pytest.mark.parametrize("name", ["decoder", "train"])
def test_p_and_j_of_a_run_are_those_of_evaluate(runs, name):
    seen = last(runs, name, "jaccard")
    report = evaluated(
        runs, "coseg", "--data", runs.folder / "coseg", "--model", runs.folder / name, "--refine", "none"
    )
    assert seen["jaccard"] == report["metrics"]["jaccard"] > 0
    assert seen["precision"] == report["metrics"]["precision"]
    assert 0 <= seen["area"] <= 1


def test_what_cannot_be_validated_is_refused_before_the_first_step(runs):
    runs.refused("one-per-class", "--validation_masks", "two images of the class")
    runs.refused("no-masks", "--validation_masks", "no folder masks")
