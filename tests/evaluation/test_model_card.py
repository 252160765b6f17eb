"""The model card: metadata that the Hub understands, figures that were measured, links that lead somewhere."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from macosnet_hf import DEFAULT_CHECKPOINT
from macosnet_hf.evaluation.model_card import eval_results, main, read_report

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
CARDS = [ROOT / "model_card.md", Path(DEFAULT_CHECKPOINT) / "README.md"]


@pytest.fixture(params=CARDS, ids=["project", "embedded"])
def path(request):
    return request.param


def test_the_hub_understands_the_metadata(path):
    data = ModelCard.load(path, ignore_metadata_errors=False).data
    assert data.license == "apache-2.0"
    assert data.library_name == "transformers"
    # The Hub has no task for matching; cards of other matchers (LightGlue) name this one, and matching as a tag.
    assert data.pipeline_tag == "keypoint-detection"
    assert {"keypoint-matching", "semantic-matching", "co-segmentation"} <= set(data.tags)


def test_what_a_reader_looks_for_is_there():
    text = ModelCard.load(CARDS[0]).text
    headings = set(re.findall(r"^## (.+)$", text, re.MULTILINE))
    assert {"Use", "Training", "Evaluation", "Citation"} <= headings
    assert "Not for:" in text
    assert "@article{" in text


def test_the_model_index_can_be_read_and_holds_shares():
    results = ModelCard.load(CARDS[0]).data.eval_results
    assert {result.dataset_type for result in results} >= {"pf-willow", "voc2010-coseg"}
    for result in results:
        assert result.task_type in ("keypoint-detection", "image-segmentation")
        assert 0 < result.metric_value < 1
        assert result.metric_name


def test_the_figures_of_the_model_index_stand_in_the_text():
    card = ModelCard.load(CARDS[0])
    for result in card.data.eval_results:
        assert f"{result.metric_value:.3f}" in card.text, result.metric_name


def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), target


@pytest.mark.skipif(not list(RESULTS.glob("*.json")), reason="no evaluation is stored in benchmarks/results")
def test_the_figures_are_those_of_the_last_evaluation():
    reports = {file.stem: read_report(file) for file in sorted(RESULTS.glob("*.json"))}
    in_card = {(r.dataset_type, r.metric_name): r.metric_value for r in ModelCard.load(CARDS[0]).data.eval_results}
    measured = {(r.dataset_type, r.metric_name): r.metric_value for r in eval_results(reports)}
    assert in_card == measured


# ---- filling it in ---------------------------------------------------------------------------------------------------


def report(**more):
    metrics = {"pck": {"image": {"0.05": 0.41249, "0.1": 0.7451}, "bbox": {"0.1": 0.6}}, **more}
    return {
        "benchmark": "pf-willow", "protocol": "text", "split": "test", "model": "somewhere/far/away/my-model",
        "samples": 450, "metrics": metrics, "seconds": 3.0, "left_out": {"count": 1, "messages": ["somewhere/x.jpg"]},
    }  # fmt: skip


def test_reports_become_the_model_index(tmp_path):
    card = tmp_path / "card.md"
    text = CARDS[0].read_text(encoding="utf-8")
    card.write_text(text, encoding="utf-8")
    willow, voc = tmp_path / "pf-willow.json", tmp_path / "voc2010-coseg.json"
    willow.write_text(json.dumps(report()))
    voc.write_text(json.dumps({**report(), "metrics": {"precision": 0.8123, "jaccard": 0.5}}))
    assert main([str(card), "--keep", str(tmp_path / "stored"), str(willow), str(voc)]) == 0

    filled = ModelCard.load(card)
    assert filled.text.strip() == ModelCard.load(CARDS[0]).text.strip()
    assert filled.data.license == "apache-2.0"
    found = {(r.dataset_type, r.metric_name): r.metric_value for r in filled.data.eval_results}
    assert found == {
        ("pf-willow", "PCK image @0.05"): 0.412,
        ("pf-willow", "PCK image @0.1"): 0.745,
        ("pf-willow", "PCK bbox @0.1"): 0.6,
        ("voc2010-coseg", "Jaccard index"): 0.5,
        ("voc2010-coseg", "Precision"): 0.812,
    }
    stored = (tmp_path / "stored" / "pf-willow.json").read_text()
    assert "somewhere" not in stored
    assert read_report(tmp_path / "stored" / "pf-willow.json")["model"] == "my-model"


@pytest.mark.parametrize("content", ["", "[1]", '{"metrics": {}}', '{"model": "a", "samples": 0, "metrics": {}}'])
def test_what_is_no_report_is_refused(content, tmp_path, capsys):
    card = tmp_path / "card.md"
    card.write_text(CARDS[0].read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "x.json").write_text(content)
    assert main([str(card), str(tmp_path / "x.json")]) == 2
    assert "x.json is no report" in capsys.readouterr().err
    assert card.read_text(encoding="utf-8") == CARDS[0].read_text(encoding="utf-8")


def test_a_card_without_settings_is_refused(tmp_path, capsys):
    (tmp_path / "card.md").write_text("# Nothing\n")
    (tmp_path / "pf-willow.json").write_text(json.dumps(report()))
    assert main([str(tmp_path / "card.md"), str(tmp_path / "pf-willow.json")]) == 2
    assert "does not begin with settings" in capsys.readouterr().err
