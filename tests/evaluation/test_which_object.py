"""The protocol `which-object`: composites of coloured rectangles, asked of predictors whose answers are known."""

import json

import numpy as np
import pytest
import torch
from archives import coseg
from PIL import Image
from small_models import small_model, small_processor

from macosnet_hf.collection import Collection
from macosnet_hf.commands.main import main as macosnet
from macosnet_hf.datasets.benchmarks import Problems, iter_records
from macosnet_hf.errors import DataError, InputError
from macosnet_hf.evaluation.baselines import make_baseline
from macosnet_hf.evaluation.predictors import ModelPredictor, Predictor
from macosnet_hf.evaluation.protocols import PROTOCOLS, Options
from macosnet_hf.evaluation.runner import evaluate
from macosnet_hf.modeling_macosnet import MaCoSNetForKeypointMatching

PROTOCOL = PROTOCOLS["which-object"]
COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0), "yellow": (255, 255, 0)}


def write_classes(root, names=tuple(COLOURS), images=4, *, masks=True, empty=False):
    """Dark grey images of various sizes with a rectangle in the colour of their class."""
    draw = np.random.default_rng(5)
    for name in names:
        for number in range(images):
            height, width = draw.integers(60, 120, 2)
            top, left = draw.integers(8, 20, 2)
            pixels = draw.integers(0, 50, (height, width, 3), dtype=np.uint8)
            inside = np.zeros((height, width), dtype=bool)
            inside[top : top + 30, left : left + 25] = True
            pixels[inside] = COLOURS[name]
            for kind, array in (("images", pixels), ("masks", (inside & (not empty)).astype(np.uint8) * 255)):
                if kind == "images" or masks:
                    path = root / kind / name / f"{number}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(array).save(path)
    return root


class ByColour(Predictor):
    """Answers with what is bright in the image and has the colour of most bright pixels of the partners, or with all
    that is bright."""

    name = "by colour"

    def __init__(self, *, listens):
        super().__init__()
        self.listens, self.sizes, self.companies = listens, set(), []

    def answer(self, image, companies, refine=None):
        self.sizes.add(image.size)
        self.companies.append([len(company) for company in companies])
        pixels = np.asarray(image, dtype=int)
        bright = pixels.max(axis=2) > 150
        masks = []
        for company in companies:
            shown = np.concatenate([np.asarray(partner, dtype=int).reshape(-1, 3) for partner in company])
            colour = np.median(shown[shown.max(axis=1) > 150], axis=0)
            similar = np.abs(pixels - colour).max(axis=2) < 100
            masks.append((bright & similar if self.listens else bright).astype(np.float32))
        return masks


def ask(root, predictor, problems=None, **options):
    return evaluate(
        iter_records("coseg", root), PROTOCOL, predictor, Options(**{"composites": 8, **options}), problems=problems
    )


def test_a_predictor_that_listens_is_told_from_one_that_does_not(tmp_path):
    root = write_classes(tmp_path)
    listening = ByColour(listens=True)
    result = ask(root, listening)
    composites, company = (result.variants[name] for name in ("composites", "company"))
    kinds = {"two side by side", "two, pasted", "three side by side", "three, pasted"}
    assert set(composites.sums) == kinds
    assert set(company.sums) == set(COLOURS)
    figures = composites.overall()
    assert figures["right"] == 1
    assert figures["jaccard.asked"] > 0.85  # a border of the mask's last pixels is transparent
    assert figures["jaccard.others"] < 0.02
    assert figures["answers_iou"] < 0.02
    figures = company.overall()
    assert figures["jaccard.same"] > 0.95
    assert figures["jaccard.itself"] > 0.95
    assert figures["jaccard.strangers"] < 0.1
    assert (480, 480) in listening.sizes
    # Two or three questions about a composite with three partners each; three, three and one about a whole image.
    assert {tuple(counts) for counts in listening.companies} == {(3, 3), (3, 3, 3), (3, 3, 1)}

    figures = ask(root, ByColour(listens=False)).variants["composites"].overall()
    assert figures["right"] < 0.5  # one question of two, or of three, has the answer that all of them have
    assert figures["answers_iou"] == 1
    assert 0.2 < figures["jaccard.asked"] < 0.7
    assert 0.2 < figures["jaccard.others"] < 0.7


def test_two_processes_ask_what_one_asks_and_the_seed_decides(tmp_path):
    root = write_classes(tmp_path)
    alone = ask(root, ByColour(listens=False), composites=6)
    options = Options(composites=6)
    parts = [
        evaluate(iter_records("coseg", root), PROTOCOL, ByColour(listens=False), options, rank=rank, world_size=2)
        for rank in (0, 1)
    ]
    assert all(part.variants["company"].count() == 8 for part in parts)
    parts[0].merge(parts[1])
    for name, tally in alone.variants.items():
        assert parts[0].variants[name].overall() == pytest.approx(tally.overall())
    assert ask(root, ByColour(listens=False), composites=6).variants == alone.variants
    assert ask(root, ByColour(listens=False), composites=6, seed=1).variants != alone.variants


def test_two_classes_allow_one_kind_of_composite_and_fewer_partners_are_no_fault(tmp_path):
    predictor = ByColour(listens=True)
    result = ask(write_classes(tmp_path, ("red", "blue"), images=2), predictor, composites=3)
    assert set(result.variants["composites"].sums) == {"two side by side"}
    assert {tuple(counts) for counts in predictor.companies} == {(1, 1), (1, 3, 1)}


def test_data_that_cannot_be_asked_about_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(DataError, match="two or more classes of two or more images"):
        ask(write_classes(tmp_path / "one", ("red",)), ByColour(listens=True))
    with pytest.raises(DataError, match="the masks are empty or tiny"):
        ask(write_classes(tmp_path / "empty", empty=True), ByColour(listens=True), composites=1)
    root = write_classes(tmp_path / "single", ("red", "blue"))
    write_classes(root, ("green",), images=1)
    with pytest.raises(DataError, match=r"green/0\.png: the class 'green' has one image"):
        ask(root, ByColour(listens=True))
    problems = Problems(skip=True)
    result = ask(root, ByColour(listens=True), problems)
    assert len(result.problems) == 1
    assert set(result.variants["company"].sums) == {"red", "blue"}
    (root / "images" / "blue" / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"blue/0\.png"):
        ask(root, ByColour(listens=True))
    with pytest.raises(InputError, match="looks at no partner"):
        ask(write_classes(tmp_path / "good", ("red", "blue")), make_baseline("centre-grabcut"))
    with pytest.raises(InputError, match="stores no predictions"):
        evaluate([], PROTOCOL, ByColour(listens=True), predictions=tmp_path / "predictions")


def test_without_masks_pseudo_masks_are_made_and_the_table_says_so(tmp_path, capsys):
    root = write_classes(tmp_path, ("red", "blue"), masks=False)
    result = ask(root, ByColour(listens=True), composites=2)
    assert len(result.notes) == 1
    assert result.variants["composites"].overall()["jaccard.asked"] > 0.3  # the pseudo-masks lie on the rectangles
    other = ask(root, ByColour(listens=True), composites=2)
    other.merge(result)
    assert other.notes == result.notes
    report = tmp_path / "report.json"
    arguments = ["--data", str(root), "--split", "train", "--composites", "1", "--partners", "1", "--json", str(report)]
    assert macosnet(["evaluate", "which-object", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "2 of 2 classes have no masks: theirs are pseudo-masks" in printed
    found = json.loads(report.read_text())
    assert found["notes"] == result.notes
    assert set(found["metrics"]) == {"right", "jaccard", "answers_iou"}
    assert set(found["variants"]["company"]["per_class"]) == {"red", "blue"}


def test_the_command_prints_both_tables_and_refuses_what_does_not_go_with_it(tmp_path, capsys):
    root = coseg(tmp_path)
    arguments = ["evaluate", "which-object", "--data", str(root), "--device", "cpu"]
    assert macosnet([*arguments, "--composites", "1", "--masks", "collection", "--refine", "none"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("### which-object: macosnet-lite, 3 partners, each image and its partners as one coll") == 2
    assert printed.count(PROTOCOL.text) == 1
    assert "| two side by side |" in printed
    assert "| Bird " in printed
    for extra in (["--baseline", "identity"], ["--predictions", str(tmp_path / "p")]):
        assert macosnet([*arguments, *extra]) == 2
        assert "no --predictions, no --baseline" in capsys.readouterr().err


@pytest.mark.parametrize("decoder", ["paper", "common"])
def test_the_model_answers_as_a_collection_of_the_image_and_its_partners(decoder):
    model = small_model(MaCoSNetForKeypointMatching, decoder_inputs=decoder)
    draw = np.random.default_rng(2)
    images = [Image.fromarray(draw.integers(0, 255, (70, 90, 3), dtype=np.uint8)) for _ in range(5)]
    predictor = ModelPredictor(model, small_processor())
    first, second = predictor.answer(images[0], [images[1:4], images[4:]])
    collection = Collection(model, small_processor())
    collection.add(images)
    part = collection.subset([0, 1, 2, 3])
    expected = part.decoder_masks([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]])[0]
    np.testing.assert_allclose(first, expected.numpy(), atol=1e-5)
    expected = collection.subset([0, 4]).segment(refine="otsu").probabilities[0]
    np.testing.assert_allclose(predictor.answer(images[0], [images[1:4], images[4:]], "otsu")[1], expected, atol=1e-5)
    assert not torch.equal(torch.from_numpy(first), torch.from_numpy(second))
