"""The ablation: a real run on a tiny model, a kill and its resume, the tables, and bad input in one sentence."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from archives import coseg, pf_willow
from small_models import save_small_checkpoint

from macosnet_hf.errors import DataError, InputError

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "ablation.py"


@pytest.fixture(scope="module")
def ablation():
    spec = importlib.util.spec_from_file_location("ablation", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["ablation"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Data, model and configuration; returns the words that every call takes."""
    root = tmp_path_factory.mktemp("ablation")
    coseg(root / "data" / "voc2010-coseg", images=4, classes=("Car", "Cat"))
    pf_willow(root / "data" / "pf-willow", images=3)
    save_small_checkpoint(root / "model")
    settings = ["per_device_train_batch_size: 2", "photo_size: 96", "prior_weight: 20.0", "lambda_task: 10.0"]
    # Rates that move the figures of a single step.
    settings += ["learning_rate: 0.01", "decoder_learning_rate: 0.05", "ema_decay: 0.0", "detach_masks: true"]
    (root / "small.yaml").write_text("\n".join(settings) + "\n")
    words = ["--data", root / "data", "--model", root / "model", "--config", root / "small.yaml"]
    words += ["--photographs", "voc2010-coseg", "--steps", 1, "--evaluation_photos", 3, "--evaluation_pairs", 5]
    return [*map(str, words), "--refine_size", "64"]


@pytest.fixture(scope="module")
def whole(ablation, setting, tmp_path_factory):
    """An uninterrupted run of three variants and one that needs no training of its own."""
    out = tmp_path_factory.mktemp("whole")
    only = ["--only", "matching-alone", "start", "full", "margin-2"]
    assert ablation.main([*setting, "--output_dir", str(out), *only]) == 0
    return out


def results(out):
    return json.loads((out / "ablation.json").read_text())["variants"]


def figures(variant):
    return {key: variant[key] for key in ("masks", "matching")}


def test_variants_are_trained_and_measured(whole):
    found = results(whole)
    assert list(found) == ["start", "full", "matching-alone", "margin-2"]
    start, full, alone = (found[name] for name in ("start", "full", "matching-alone"))
    assert "trained" not in start
    assert full["trained"]
    assert full["masks"]["soft"] != start["masks"]["soft"]
    assert full["matching"] != start["matching"]
    # Only one of the two tasks was trained.
    assert alone["masks"] == start["masks"]
    assert alone["matching"] != start["matching"]
    # m = 2 is what the full model has.
    assert found["margin-2"]["same_as"] == "full"
    assert figures(found["margin-2"])["matching"] == full["matching"]
    for variant in found.values():
        assert set(variant["masks"]["grabcut"]["classes"]) == {"Car", "Cat"}
        assert list(variant["matching"]["local"]["all"]) == ["0.05", "0.1", "0.15"]
    assert set(full["masks"]) >= {"soft", "grabcut", "otsu"}
    # What only served the runs is gone.
    assert sorted(path.name for path in whole.iterdir()) == [
        "ablation.json",
        "ablation.md",
        "pseudo_masks.npz",
        "runs",
    ]
    assert not list((whole / "runs").iterdir())


def test_the_figures_are_those_of_macosnet_evaluate(whole, setting, tmp_path):
    from macosnet_hf.commands import main as cli

    data, model = Path(setting[1]), setting[3]
    words = ["evaluate", "pf-willow", "--data", str(data / "pf-willow"), "--model", model, "--matching", "transform"]
    assert cli.main([*words, "--json", str(tmp_path / "all.json")]) == 0
    everything = json.loads((tmp_path / "all.json").read_text())
    # Five of the six pairs were asked for; the first class has all three of its pairs.
    ours = results(whole)["start"]["matching"]["transform"]["classes"]
    first = sorted(ours)[0]
    expected = everything["per_class"][first]["pck"]["image"]
    assert ours[first] == pytest.approx({alpha: expected[alpha] for alpha in ours[first]})


def rows(text, heading):
    """Cells of the table below a heading, as lists."""
    part = text.split(heading, 1)[1].split("\n## ", 1)[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1, heading
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("|:")]


def test_tables_have_the_paper_s_layout(whole):
    text, found = (whole / "ablation.md").read_text(), results(whole)
    seven = rows(text, "## Table 7")
    assert seven[0][1:9] == [f"{name} {m}" for name in ("Airplane", "Car", "Horse", "mean") for m in "PJ"]
    full = next(row for row in seven if row[0] == "full model")
    car = found["full"]["masks"]["grabcut"]["classes"]["Car"]
    assert full[1:5] == ["–", "–", f"{car['P']:.3f}", f"{car['J']:.3f}"]  # no class Aero here
    mean = found["full"]["masks"]["grabcut"]["all"]
    assert full[7:9] == [f"{mean['P']:.3f}", f"{mean['J']:.3f}"]
    paper = [row for row in seven if row[0].startswith("*paper, Internet, ResNet-101:*")]
    assert paper[-1][1:9] == ["0.444", "0.390", "0.302", "0.260", "0.475", "0.430", "0.425", "0.380"]
    eight = rows(text, "## Table 8")
    local = found["full"]["matching"]["local"]["all"]
    assert next(row for row in eight if row[0] == "full model")[4:] == [f"{value:.3f}" for value in local.values()]
    assert [row[0] for row in rows(text, "## Figure 9")[1:]] == ["2"]
    assert [row[0].split()[0] for row in rows(text, "## Table 9")[1:]] == ["none", "DenseCRF", "Otsu", "GrabCut"]
    assert len(rows(text, "## At test time")) == 5
    streams = rows(text, "## Joint training")
    assert re.fullmatch(r"\(\d\.\d{3}\)", next(row for row in streams if row[0] == "matching stream alone")[3])
    assert "is open: segmentation-alone not run." in text
    assert "margin m = 2: the settings are those of “full model”, trained once." in text


def test_the_verdict_follows_the_figures(ablation):
    def measured(pck, jaccard):
        ways = {"all": {"0.1": pck}, "classes": {"a": {"0.1": pck - 0.1}, "b": {"0.1": pck + 0.1}}}
        masks = {"all": {"J": jaccard}, "classes": {"a": {"J": jaccard}, "b": {"J": None}}}
        return {"matching": {"transform": ways, "local": ways}, "masks": {"soft": masks, "grabcut": masks}}

    names = ("full", "matching-alone", "segmentation-alone")
    both = dict(zip(names, (measured(0.6, 0.5), measured(0.5, 0), measured(0, 0.4)), strict=True))
    assert "in this run: yes.** matching: yes (PCK@0.1 bare transform +0.100 ± 0.000," in ablation.verdict(both)
    assert "J soft +0.100, J grabcut +0.100)" in ablation.verdict(both)  # one class has no error
    one = {**both, "segmentation-alone": measured(0, 0.5)}
    assert "in this run: in part.**" in ablation.verdict(one)
    assert "segmentation: no" in ablation.verdict(one)
    assert "in this run: no.**" in ablation.verdict({**one, "matching-alone": measured(0.7, 0)})


def test_a_killed_run_goes_on_and_ends_with_the_same_figures(ablation, setting, whole, tmp_path):
    words = [*setting, "--output_dir", str(tmp_path / "out"), "--only", "start", "full"]
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *words],
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    path = tmp_path / "out" / "ablation.json"
    while not (path.exists() and "start" in results(path.parent)):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = results(path.parent)
    assert list(before) == ["start"]
    with pytest.raises(InputError, match="is there already: go on with --resume"):
        ablation.main(words)
    with pytest.raises(InputError, match=r"other settings: .*training.max_train_steps 1 \(now 2\)"):
        ablation.main([*words, "--resume", "--steps", "2"])
    assert ablation.main([*words, "--resume"]) == 0
    after = results(path.parent)
    assert after["start"] == before["start"]  # not measured again
    assert figures(after["full"]) == figures(results(whole)["full"])
    # A file that is damaged is named, and stays.
    path.write_text(path.read_text()[:-50])
    with pytest.raises(DataError, match=r"ablation.json is damaged"):
        ablation.main([*words, "--resume"])
    path.write_text('{"settings": {}, "variants": {"full": {"masks": {}}}}')
    with pytest.raises(DataError, match=r"ablation.json is damaged"):
        ablation.main([*words, "--resume"])
    assert not list(path.parent.glob("partial-*"))


def test_every_variant_has_arguments_that_training_takes(ablation, setting):
    from macosnet_hf.training.settings import JointSettings, parse_settings

    args = ablation.make_parser().parse_args([*setting, "--output_dir", "out"])
    base = ablation.effective(parse_settings(JointSettings, ablation.training_words(args, ["photos"], Path("out"))))
    for variant in ablation.VARIANTS[1:]:
        words = ablation.training_words(args, ["photos"], Path("out")) + list(variant.words)
        parsed = parse_settings(JointSettings, words)
        changed = {name for name, value in ablation.effective(parsed).items() if value != base[name]}
        # Off already in this small configuration, or equal to the full model.
        same = variant.name in ("full", "margin-2", "no-local", "no-synthetic")
        assert bool(changed) != same, variant.name


def test_bad_input_is_refused_in_one_sentence(ablation, setting, tmp_path):
    words = [*setting, "--output_dir", str(tmp_path / "out")]
    with pytest.raises(InputError, match=r"no variant 'no-mask'.* Choose among start, full"):
        ablation.main([*words, "--only", "full", "no-mask"])
    with pytest.raises(InputError, match="Is no-cycle meant"):
        ablation.main([*words, "--only", "no-cycles"])
    with pytest.raises(DataError, match="holds no folder voc2010-coseg"):
        ablation.main([*words, "--data", str(tmp_path)])
    with pytest.raises(DataError, match="holds no folder caltech101"):
        ablation.main([*words, "--photographs", "caltech101"])
    with pytest.raises(InputError, match="evaluation_photos must be at least 2"):
        ablation.main([*words, "--evaluation_photos", "1"])
    with pytest.raises(InputError, match="--output_dir"):
        ablation.main(setting)
    (tmp_path / "wrong.yaml").write_text("lambda_tusk: 1\n")
    with pytest.raises(InputError, match=r"unknown key 'lambda_tusk'\. Is lambda_task meant"):
        ablation.main([*words, "--config", str(tmp_path / "wrong.yaml")])
    assert not (tmp_path / "out").exists()


def test_without_data_it_says_what_it_needs(ablation, capsys):
    assert ablation.main([]) == 0
    assert capsys.readouterr().out.startswith("Needs --data")


def test_a_choice_is_spread_evenly(ablation):
    assert ablation.spread(list(range(10)), 2) == [2, 7]
    assert ablation.spread(list(range(10)), 3) == [1, 5, 8]
    assert ablation.spread(list(range(3)), 5) == [0, 1, 2]
