"""Protocols, predictions and the command, on small archives and a small real network."""

import argparse
import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from archives import coseg, disc, internet, mask, pf_pascal, pf_willow, spair, tss
from PIL import Image
from small_models import save_small_checkpoint, small_model, small_processor

from macosnet_hf.collection import Collection, hard_mask
from macosnet_hf.commands import evaluate as command
from macosnet_hf.commands.main import main as macosnet
from macosnet_hf.datasets.benchmarks import Problems, iter_records
from macosnet_hf.datasets.images import image_size, open_image
from macosnet_hf.datasets.masks import mask_from_image
from macosnet_hf.datasets.prepare import open_records, prepare
from macosnet_hf.datasets.schema import flow_array, keypoint_array
from macosnet_hf.errors import DataError, InputError, OutputError
from macosnet_hf.evaluation import BASELINES, metrics
from macosnet_hf.evaluation.baselines import centre_ellipse, make_baseline
from macosnet_hf.evaluation.predictors import EncodedImage, ImageCache, ModelPredictor, Predictor, field_to_places
from macosnet_hf.evaluation.protocols import PROTOCOLS, Options
from macosnet_hf.evaluation.runner import choose_partners, class_groups, evaluate, finish
from macosnet_hf.evaluation.scoring import Tally, mask_scores
from macosnet_hf.evaluation.tables import PAPER, markdown_table, nested
from macosnet_hf.geometry import denormalize_points
from macosnet_hf.modeling_macosnet import MaCoSNetForKeypointMatching

MAKERS = {
    "pf-willow": pf_willow,
    "pf-pascal": pf_pascal,
    "spair-71k": spair,
    "tss": tss,
    "internet": internet,
    "coseg": coseg,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    return save_small_checkpoint(folder)


@pytest.fixture(scope="module")
def processor():
    return small_processor()


def run(*arguments, json_file=None):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    extra = ["--json", str(json_file)] if json_file else []
    assert command.run(parser.parse_args([*map(str, arguments), "--device", "cpu", *extra])) == 0
    return json.loads(json_file.read_text()) if json_file else None


class Oracle(Predictor):
    """Answers with the annotations themselves."""

    name = "oracle"
    variants = ("oracle",)
    gives_points = gives_masks = True

    def describe(self):
        return {"oracle": True}

    def predict_pairs(self, records, *, direction, dense, masks, moved="identity", flips=True):
        predictions = []
        for record in records:
            sizes = [image_size(record[f"{side}_image"], "here") for side in ("source", "target")]
            prediction = {"sizes": np.asarray(sizes)}
            if direction:
                arrives = "source" if direction == "target_to_source" else "target"
                prediction["points/oracle"] = keypoint_array(record, arrives)
            if dense:
                flow = flow_array(record).astype(np.float64)
                y, x = np.mgrid[: flow.shape[0], : flow.shape[1]]
                places = np.where(np.abs(flow) < 1e9, np.stack((x, y), -1) + flow, -1e4)
                height, width = flow.shape[:2]
                field = np.zeros((2 * height + 1, 2 * width + 1, 2))  # from edge to edge: pixel centres and borders
                field[1::2, 1::2] = (places + 0.5) / sizes[0][::-1]
                prediction["field/oracle"] = field
            if masks:
                truth = mask_from_image(record["target_mask"], "here")
                prediction["mask/target"] = truth.astype(np.float32)
            predictions.append(prediction)
        return predictions

    def predict_images(self, records, partners, *, batch_size, dense, collection=None):
        predictions = []
        for record, others in zip(records, partners, strict=True):
            truth = mask_from_image(record["source_mask"], "here")
            sizes = [image_size(records[others[0]]["source_image"], "here"), truth.shape]
            predictions.append(
                {
                    "sizes": np.asarray(sizes),
                    "partner": np.asarray(records[others[0]]["id"]),
                    "mask/target": truth.astype(np.float32),
                }
            )
        return predictions


def leaves(tree):
    for value in tree.values():
        if isinstance(value, dict):
            yield from leaves(value)
        else:
            yield value


@pytest.mark.parametrize("benchmark", MAKERS)
def test_the_annotations_fed_back_score_exactly_one(tmp_path, benchmark):
    root = MAKERS[benchmark](tmp_path)
    result = evaluate(iter_records(benchmark, root), PROTOCOLS[benchmark], Oracle(), Options(refine="none"))
    figures = nested(result.variants["oracle"].overall())
    transfer = figures.pop("label_transfer", None)
    assert set(leaves(figures)) == {1.0}
    if transfer is not None and benchmark == "tss":
        # The truth rounds to pixels when a mask is warped, so the border of the object is off by some.
        assert transfer["iou"] > 0.9
    expected = {
        "pf-willow": {"pck", "pck_per_point"},
        "pf-pascal": {"pck", "pck_per_point"},
        "spair-71k": {"pck", "pck_per_point"},
        "tss": {"flow_pck", "precision", "jaccard", "boundary_f", "before_refinement"},
    }.get(benchmark, {"precision", "jaccard", "boundary_f", "before_refinement"})
    assert set(figures) == expected


def test_mirrored_pairs_are_mirrored_and_mirrored_back(tmp_path):
    """The images of the small TSS are the same up to size and, in PASCAL, a mirroring: the identity is the answer."""
    root = tss(tmp_path)
    records = list(iter_records("tss", root))
    result = evaluate(records, PROTOCOLS["tss"], make_baseline("identity"))
    means = result.variants["identity"].class_means()
    for group in ("FG3DCar", "JODS", "PASCAL"):
        assert means[group]["flow_pck.0.05"] == 1.0
        assert means[group]["label_transfer.iou"] > 0.9
    options = Options(flip_annotation=False)
    result = evaluate(records, PROTOCOLS["tss"], make_baseline("identity"), options)
    assert "annotation of mirrored pairs is ignored" in markdown_table(
        PROTOCOLS["tss"], result.variants["identity"], options, "identity"
    )
    assert result.variants["identity"].class_means()["PASCAL"]["flow_pck.0.05"] < 0.5


def test_a_mirrored_source_with_keypoints(tmp_path):
    """Both directions of transfer, against coordinates mirrored by hand."""
    record = list(iter_records("tss", tss(tmp_path)))[-1]
    assert record["mirror_source"]
    size_s, size_t = (image_size(record[f"{side}_image"], "x") for side in ("source", "target"))
    source = np.array([[3.0, 5.0], [40.0, 20.0]])
    record["source_keypoints"] = source.tolist()
    scale = np.array([size_t[1] / size_s[1], size_t[0] / size_s[0]])
    expected = (np.stack((size_s[1] - 1 - source[:, 0], source[:, 1]), -1) + 0.5) * scale - 0.5
    record["target_keypoints"] = expected.tolist()
    for direction, answer in (("source_to_target", expected), ("target_to_source", source)):
        prediction = make_baseline("identity").predict_pairs([record], direction=direction, dense=False, masks=False)[0]
        np.testing.assert_allclose(prediction["points/identity"], answer, atol=1e-4)


# -- the model's predictions are those of the model -------------------------------------------------------------------


@pytest.mark.parametrize("moved", ["mirror", "turn_90", "turn_180", "turn_270"])
@pytest.mark.parametrize("orientations", ["none", "mirror", "all"])
def test_sources_that_are_moved_before_matching(tmp_path, processor, moved, orientations):
    """Against records of sources that are moved by hand; the model chooses among orientations as its forward does."""
    model = small_model(MaCoSNetForKeypointMatching, mutual_fit=True, orientations=orientations)
    predictor = ModelPredictor(model, processor)
    records = list(iter_records("pf-willow", pf_willow(tmp_path)))[:3]

    def by_hand(points, size, back=False):
        """Points of an image of (height, width) on the image that is moved, or the other way round."""
        (x, y), (height, width) = np.asarray(points, dtype=float).T, size
        turned = {
            "mirror": ((width - 1 - x, y),) * 2,
            "turn_180": ((width - 1 - x, height - 1 - y),) * 2,
            "turn_90": ((height - 1 - y, x), (y, height - 1 - x)),
            "turn_270": ((y, width - 1 - x), (width - 1 - y, x)),
        }[moved][back]
        return np.stack(turned, axis=-1)

    for direction, start in (("target_to_source", 1), ("source_to_target", 0)):
        predictions = predictor.predict_pairs(records, direction=direction, dense=False, masks=True, moved=moved)
        for record, prediction in zip(records, predictions, strict=True):
            source, target = (np.asarray(open_image(record[f"{side}_image"], "x")) for side in ("source", "target"))
            quarters = {"turn_90": 3, "turn_180": 2, "turn_270": 1}.get(moved, 0)  # NumPy's turn counter-clockwise
            seen = source[:, ::-1] if moved == "mirror" else np.rot90(source, quarters)
            pair = [Image.fromarray(np.ascontiguousarray(pixels)) for pixels in (seen, target)]
            sizes = torch.tensor([[(image.height, image.width) for image in pair]])
            points = keypoint_array(record, ("source", "target")[start])
            if start == 0:
                points = by_hand(points, source.shape[:2])
            with torch.no_grad():
                outputs = model(**processor([pair], return_tensors="pt"))
                found = model.transfer_points(outputs, torch.tensor(points)[None].float(), sizes, direction)[0].numpy()
            if start == 1:
                found = by_hand(found, source.shape[:2], back=True)
            np.testing.assert_allclose(prediction["points/local"], found, atol=0.2)  # Pillow rounds rows first
            expected = outputs.mask_logits[0, 1].sigmoid().numpy()
            np.testing.assert_allclose(prediction["mask/target"], expected, atol=1e-3)


def test_images_that_are_reduced_before_matching(tmp_path, processor):
    """Against records of images that are reduced by hand; points are those of the stored images all the same."""
    predictor = ModelPredictor(small_model(MaCoSNetForKeypointMatching), processor)
    record = next(iter_records("pf-willow", pf_willow(tmp_path)))
    by_hand = dict(record)
    for side in ("source", "target"):
        image = open_image(record[f"{side}_image"], "x")
        small = image.resize([max(1, round(length * 20 / max(image.size))) for length in image.size])
        by_hand |= {f"{side}_image": small, f"{side}_id": f"small {side}"}
        scale = np.array(small.size) / image.size
        by_hand[f"{side}_keypoints"] = ((keypoint_array(record, side) + 0.5) * scale - 0.5).tolist()
    (small_record,) = predictor.predict_pairs([by_hand], direction="target_to_source", dense=False, masks=True)
    (whole,) = predictor.predict_pairs([record], direction="target_to_source", dense=False, masks=True)
    predictor.max_side = 20
    (found,) = predictor.predict_pairs([record], direction="target_to_source", dense=False, masks=True)
    assert found["sizes"].tolist() == whole["sizes"].tolist()
    scale = np.array(by_hand["source_image"].size) / open_image(record["source_image"], "x").size
    expected = (small_record["points/local"] + 0.5) / scale - 0.5
    np.testing.assert_allclose(found["points/local"], expected, atol=0.3)  # `thumbnail` draws in two steps
    assert np.abs(found["mask/target"] - small_record["mask/target"]).max() < 0.02
    assert np.abs(found["mask/target"] - whole["mask/target"]).max() > 0.02


def test_predictions_of_moved_sources_are_not_taken_for_others(tmp_path, processor):
    root, protocol, stored = tss(tmp_path / "data"), PROTOCOLS["tss"], tmp_path / "stored"
    records = list(iter_records("tss", root))
    turned = Options(source_symmetry="turn_90", refine="none")
    first = evaluate(records, protocol, make_baseline("identity"), turned, predictions=stored)
    finish(first, protocol, make_baseline("identity"), turned, predictions=stored)
    evaluate(records, protocol, make_baseline("identity"), turned, predictions=stored)
    for other in (Options(refine="none"), replace(turned, flip_annotation=False), replace(turned, max_side=100)):
        with pytest.raises(
            InputError, match=r"made with another (symmetry of the sources|flip annotation|longer side)"
        ):
            evaluate(records, protocol, make_baseline("identity"), other, predictions=stored)
    model = small_model(MaCoSNetForKeypointMatching)
    prints = {ModelPredictor(model, processor, orientations=name).fingerprint() for name in (None, "none", "mirror")}
    assert len(prints) == 2


@pytest.mark.parametrize("cascade", ["exact", "features"])
@pytest.mark.parametrize("fit", [False, True])
def test_predictions_are_those_of_a_plain_forward_pass(tmp_path, processor, cascade, fit):
    model = small_model(MaCoSNetForKeypointMatching, cascade=cascade, mutual_fit=fit)
    predictor = ModelPredictor(model, processor)
    assert predictor.variants == (("local", "fitted", "transform") if fit else ("local", "transform"))
    records = list(iter_records("pf-willow", pf_willow(tmp_path)))[:4]
    for direction, start in (("target_to_source", 1), ("source_to_target", 0)):
        predictions = predictor.predict_pairs(records, direction=direction, dense=True, masks=True)
        for record, prediction in zip(records, predictions, strict=True):
            pair = [open_image(record[f"{side}_image"], "x") for side in ("source", "target")]
            sizes = torch.tensor([[(image.height, image.width) for image in pair]])
            with torch.no_grad():
                inputs = processor([pair], return_tensors="pt")
                outputs = model(**inputs)
                points = torch.tensor(keypoint_array(record, ("source", "target")[start]))[None].float()
                for variant in predictor.variants:
                    # Without `mutual_fit` the model answers with the bare transform, with it only the network does.
                    bare = model.macosnet(**inputs) if variant == "transform" else outputs
                    expected = model.transfer_points(bare, points, sizes, direction, local_matching=variant == "local")
                    np.testing.assert_allclose(prediction[f"points/{variant}"], expected[0], atol=2e-2)
                bare = model.macosnet(**inputs)
                side = model.config.image_size
                grid = model.transforms(bare)[:, 0].grid(sizes[0, 1].tolist(), side)
                places = denormalize_points(grid.reshape(1, -1, 2), sizes[:, 0], side).reshape(*grid.shape[1:])
                stored = field_to_places(prediction["field/transform"], sizes[0, 0].tolist(), sizes[0, 1].tolist())
                np.testing.assert_allclose(stored, places, atol=0.1)
            expected = outputs.mask_logits[0, 1].sigmoid().numpy()
            np.testing.assert_allclose(prediction["mask/target"], expected, atol=1e-4)


def test_a_mask_of_single_images_is_the_mean_over_partners(tmp_path, processor):
    model = small_model(MaCoSNetForKeypointMatching)
    records = [record for record in iter_records("coseg", coseg(tmp_path)) if record["class_name"] == "Cat"]
    prediction = ModelPredictor(model, processor).predict_images(
        records, [[2, 1], [0, 2], [1, 0]], batch_size=2, dense=True
    )[0]
    images = [open_image(record["source_image"], "x") for record in records]
    with torch.no_grad():
        masks = [
            model(**processor([[images[0], images[other]]], return_tensors="pt")).mask_logits[0, 0].sigmoid()
            for other in (1, 2)
        ]
    np.testing.assert_allclose(prediction["mask/target"], torch.stack(masks).mean(0), atol=1e-4)
    assert str(prediction["partner"]) == "Cat/p2.jpg"


def test_masks_of_a_class_as_one_collection(tmp_path, processor):
    """What `segment` gives for the same images, scored; other predictors and pair lists are refused."""
    model = small_model(MaCoSNetForKeypointMatching)
    root = coseg(tmp_path)
    records = [record for record in iter_records("coseg", root) if record["class_name"] == "Cat"]
    predictor = ModelPredictor(model, processor)
    predictions = predictor.predict_images(
        records, [[1, 2], [0, 2], [0, 1]], batch_size=2, dense=True, collection="grabcut"
    )
    collection = Collection(model, processor)
    collection.add([open_image(record["source_image"], "x") for record in records])
    for key, refine in (("mask/target", "none"), ("refined/target", "grabcut")):
        expected = collection.segment(refine=refine).probabilities
        for prediction, probability in zip(predictions, expected, strict=True):
            np.testing.assert_array_equal(prediction[key], probability)
    assert "field/local" in predictions[0]

    options = Options(masks="collection")
    scores = mask_scores(records[0], "source", predictions[0], options)
    truth = mask_from_image(records[0]["source_mask"], "here")
    for name, key in (("before_refinement.", "mask/target"), ("", "refined/target")):
        hard = hard_mask(predictions[0][key], truth.shape)
        assert scores[f"{name}precision"] == (metrics.precision(hard, truth), 1)
    result = evaluate(iter_records("coseg", root), PROTOCOLS["coseg"], predictor, options)
    assert "each class as one collection" in markdown_table(PROTOCOLS["coseg"], result.variants["local"], options, "m")
    with pytest.raises(InputError, match="single pairs only"):
        make_baseline("centre-grabcut").predict_images(
            records, [[1], [0], [0]], batch_size=2, dense=False, collection="grabcut"
        )
    with pytest.raises(InputError, match="masks must be one of"):
        Options(masks="magic")


def test_each_image_is_encoded_once(tmp_path, processor, monkeypatch):
    model = small_model(MaCoSNetForKeypointMatching, cascade="features")
    predictor = ModelPredictor(model, processor, masks=False)
    calls = []
    encode = model.macosnet.get_image_features
    monkeypatch.setattr(
        model.macosnet, "get_image_features", lambda pixels: (calls.append(len(pixels)), encode(pixels))[1]
    )
    root = pf_willow(tmp_path, images=5)
    records, total = open_records("pf-willow", root)
    assert total == 20
    result = evaluate(records, PROTOCOLS["pf-willow"], predictor, Options(batch_size=3))
    assert result.variants["local"].count() == 20
    assert calls == [1] * 10
    assert predictor.cache.encoded == 10


def test_the_cache_forgets_what_was_used_longest_ago():
    cache = ImageCache(limit=3 * 1024)
    entry = lambda: EncodedImage((1, 1), pixel_values=torch.zeros(192))  # noqa: E731  (768 + 256 bytes)
    for key in ("a", "b", "c", "a", "d", "a", "b"):
        cache.get(key, entry)
    assert cache.encoded == 5  # b was forgotten when d came, and made again
    assert cache._bytes <= 3 * 1024


def test_memory_stays_bounded_over_a_long_stream(tmp_path, processor):
    """Two thousand records of ever new images: neither the cache nor the sums grow with them."""
    record = next(iter(iter_records("pf-willow", pf_willow(tmp_path, images=2))))
    predictor = make_baseline("identity")
    predictor.cache.limit = 20 * 256

    def stream():
        for number in range(2000):
            yield {**record, "id": str(number), "source_id": f"s{number}", "target_id": f"t{number}"}

    result = evaluate(stream(), PROTOCOLS["pf-willow"], predictor)
    assert result.variants["identity"].count() == 2000
    assert len(predictor.cache._entries) <= 20
    assert len(result.variants["identity"].sums) == 1


# -- single images ---


def test_partners_are_seeded_different_and_never_oneself():
    names = [f"p{index}" for index in range(9)]
    partners = choose_partners(names, 3, seed=0)
    for index, others in enumerate(partners):
        assert len(set(others)) == 3
        assert index not in others
    assert choose_partners(names, 3, seed=0) == partners
    assert choose_partners(names, 3, seed=1) != partners
    assert choose_partners(["a", "b"], 3, seed=0) == [[1], [0]]


@pytest.mark.parametrize("order", ["sorted", "mixed"])
def test_groups_hold_one_class_are_bounded_and_never_single(order):
    names = ["a"] * 9 + ["b"] * 5 + ["c"] * 4
    if order == "mixed":
        names = [str(name) for name in np.random.default_rng(0).permutation(names)]
    groups = list(class_groups(({"id": str(i), "class_name": name} for i, name in enumerate(names)), size=4))
    assert sorted(record["id"] for group in groups for record in group) == sorted(map(str, range(18)))
    for group in groups:
        assert len({record["class_name"] for record in group}) == 1
        assert 2 <= len(group) <= 5


def test_a_class_of_one_image_cannot_be_co_segmented(tmp_path):
    root = coseg(tmp_path, images=3)
    for index in (1, 2):
        (root / "images" / "Cat" / f"p{index}.jpg").unlink()
        (root / "masks" / "Cat" / f"p{index}.png").unlink()
    with pytest.raises(DataError, match=r"Cat/p0.*two images"):
        evaluate(iter_records("coseg", root), PROTOCOLS["coseg"], Oracle())
    problems = Problems(skip=True)
    result = evaluate(iter_records("coseg", root), PROTOCOLS["coseg"], Oracle(), problems=problems)
    assert result.variants["oracle"].count() == 3
    assert len(result.problems) == 1


def test_internet_leaves_images_without_object_out_of_j_only(tmp_path):
    result = evaluate(iter_records("internet", internet(tmp_path)), PROTOCOLS["internet"], Oracle())
    tally = result.variants["oracle"]
    assert tally.count("precision") == 9
    assert tally.count("jaccard") == 6


def test_masks_are_scored_at_the_original_size(tmp_path):
    """Half of a 41x57 image: at the network's square size the share would be another."""
    root = coseg(tmp_path, images=2, classes=("Cat",))
    for path in sorted((root / "images" / "Cat").iterdir()):
        size = image_size({"path": str(path), "bytes": None}, "x")
        truth = np.zeros(size, bool)
        truth[: size[0] // 2] = True
        mask(root / "masks" / "Cat" / f"{path.stem}.png", truth)

    class Everything(Predictor):
        name = "everything"
        gives_masks = True

        def describe(self):
            return {}

        def predict_masks(self, images, partners):
            return np.ones((len(images), 10, 10), np.float32)

    result = evaluate(iter_records("coseg", root), PROTOCOLS["coseg"], Everything(), Options(refine="none"))
    assert result.variants["masks"].overall()["jaccard"] == pytest.approx(0.5)


def test_grabcut_from_a_centred_ellipse_finds_a_plain_object(tmp_path):
    from PIL import Image

    root = coseg(tmp_path, images=2, classes=("Cat",))
    for index in range(2):
        truth = disc((90, 120), (45, 60), 25)
        noise = np.random.default_rng(index).integers(0, 40, (90, 120, 3))
        pixels = (np.where(truth[..., None], 190, 30) + noise).astype(np.uint8)
        Image.fromarray(pixels).save(root / "images" / "Cat" / f"p{index}.jpg", quality=95)
        mask(root / "masks" / "Cat" / f"p{index}.png", truth)
    result = evaluate(iter_records("coseg", root), PROTOCOLS["coseg"], make_baseline("centre-grabcut"))
    figures = result.variants["masks"].overall()
    assert figures["jaccard"] > 0.9
    assert figures["before_refinement.jaccard"] < 0.7


def test_the_ellipse_is_centred_and_falls_outwards():
    ellipse = centre_ellipse(31, 51)
    np.testing.assert_allclose(ellipse, ellipse[::-1, ::-1])
    assert ellipse.max() == ellipse[15, 25]
    assert ellipse[15, 25] > 0.5 > ellipse[0, 0]
    assert (np.diff(ellipse[15, 25:]) <= 0).all()


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("benchmark", MAKERS)
def test_every_benchmark_from_the_archive_and_from_parquet(tmp_path, checkpoint, benchmark, capsys):
    root = MAKERS[benchmark](tmp_path / "in")
    options = ["--model", checkpoint, "--refine", "otsu", "--batch-size", 2]
    report = run(benchmark, "--data", root, *options, json_file=tmp_path / "a.json")
    table = capsys.readouterr().out
    assert PROTOCOLS[benchmark].text in table
    assert {"benchmark", "model", "samples", "metrics", "per_class", "seconds"} <= report.keys()
    assert report["benchmark"] == benchmark
    assert report["samples"] == sum(entry["samples"] for entry in report["per_class"].values()) > 0
    assert report["left_out"] == {"count": 0, "messages": []}
    values = list(leaves(report["metrics"]))
    assert values
    assert all(0 <= value <= 1 for value in values)
    prepare(benchmark, root, tmp_path / "out")
    streamed = run(benchmark, "--data", tmp_path / "out", *options, json_file=tmp_path / "b.json")
    assert streamed["metrics"] == report["metrics"]
    assert streamed["per_class"] == report["per_class"]


@pytest.mark.parametrize("baseline", BASELINES)
def test_every_baseline_answers_what_it_can(tmp_path, checkpoint, baseline):
    report = run(
        "tss", "--data", tss(tmp_path), "--model", checkpoint, "--baseline", baseline, json_file=tmp_path / "r.json"
    )
    assert report["model"] == baseline
    assert ("flow_pck" in report["metrics"]) == (baseline != "centre-grabcut")
    assert ("jaccard" in report["metrics"]) == (baseline == "centre-grabcut")


def test_a_baseline_that_has_no_answer_says_so(tmp_path):
    with pytest.raises(InputError, match="centre-grabcut answers nothing"):
        run("pf-willow", "--data", pf_willow(tmp_path), "--baseline", "centre-grabcut")


def test_both_ways_of_matching_are_reported(tmp_path, checkpoint):
    root = pf_willow(tmp_path)
    local = run(
        "pf-willow", "--data", root, "--model", checkpoint, "--matching", "local", json_file=tmp_path / "a.json"
    )
    bare = run(
        "pf-willow", "--data", root, "--model", checkpoint, "--matching", "transform", json_file=tmp_path / "b.json"
    )
    default = run("pf-willow", "--data", root, "--model", checkpoint, json_file=tmp_path / "c.json")
    assert local["matching"] == "local"
    assert bare["matching"] == "transform"
    assert local["variants"]["transform"]["metrics"] == bare["metrics"]
    assert bare["variants"]["local"]["metrics"] == local["metrics"]
    assert default["metrics"] == local["metrics"]  # the configuration's own choice


def test_spair_reports_by_difficulty(tmp_path):
    report = run("spair-71k", "--data", spair(tmp_path), "--baseline", "identity", json_file=tmp_path / "r.json")
    assert report["by_difficulty"]["viewpoint 0"]["samples"] == 1
    assert report["by_difficulty"]["scale 1"]["samples"] == 2
    assert report["points"] == 8


def test_the_pair_lists_folder_is_the_data(tmp_path):
    root = pf_willow(tmp_path)
    report = run("pairs", "--pairs", root / "test_pairs.csv", "--baseline", "identity", json_file=tmp_path / "r.json")
    same = run("pf-willow", "--data", root, "--baseline", "identity", json_file=tmp_path / "s.json")
    assert report["metrics"] == same["metrics"]
    assert set(report["per_class"]) == {"1", "4"}


def test_the_markdown_table_has_the_papers_figures(tmp_path):
    path = tmp_path / "t.md"
    run("tss", "--data", tss(tmp_path), "--baseline", "identity", "--markdown", path)
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in path.read_text().split("\n") if "|" in line
    ]
    assert rows[0][:4] == ["class", "samples", "flow PCK @0.05", "paper"]
    by_class = {row[0]: row for row in rows[2:]}
    assert by_class["JODS"][2:4] == ["1.000", "0.783"]
    assert by_class["all"][:4] == ["all", "6", "1.000", "0.769"]


def test_the_papers_means_are_consistent_with_its_classes():
    """Tables 1 to 3 average over groups; a typing error in a figure would show here."""
    for benchmark in ("tss", "internet"):
        for metric, figures in PAPER[benchmark].items():
            classes = [value for name, value in figures.items() if name != "all"]
            assert figures["all"] == pytest.approx(np.mean(classes), abs=0.0051), (benchmark, metric)
    assert len(PAPER["pf-pascal"]["pck.image.0.1"]) == 21


def test_means_over_pairs_and_over_classes():
    tally = Tally()
    for value in (1.0, 1.0, 1.0):
        tally.add("a", {"pck.image.0.1": (value, 1), "jaccard": (value, 1)})
    tally.add("b", {"pck.image.0.1": (0.0, 1), "jaccard": (0.0, 1)})
    tally.add("b", {"jaccard": (0.0, 0)})
    assert tally.overall() == {"pck.image.0.1": 0.75, "jaccard": 0.5}
    table = markdown_table(PROTOCOLS["coseg"], _with_samples(tally), Options(), "x")
    assert re.search(r"\| all +\|", table)


def _with_samples(tally):
    for row in tally.sums.values():
        row["samples"] = [2.0, 2.0]
    return tally


# -- bad data and bad wishes ---


def test_a_damaged_image_is_named_or_counted_never_ignored(tmp_path):
    root = pf_willow(tmp_path)
    path = root / "PF-dataset" / "car(G)" / "photo_001.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"photo_001\.png"):
        run("pf-willow", "--data", root, "--baseline", "identity")
    report = run("pf-willow", "--data", root, "--baseline", "identity", "--skip-invalid", json_file=tmp_path / "r.json")
    assert report["samples"] == 4
    assert report["left_out"]["count"] == 2  # the two pairs that the image is in
    assert all("photo_001.png" in message for message in report["left_out"]["messages"])


@pytest.mark.parametrize("benchmark", ["tss", "coseg"])
def test_a_mask_of_another_size_is_named_or_counted(tmp_path, benchmark):
    root = MAKERS[benchmark](tmp_path)
    if benchmark == "tss":
        path = root / "TSS_CVPR2016" / "JODS" / "car_01_02" / "mask1.png"
    else:
        path = root / "masks" / "Cat" / "p1.png"
    mask(path, disc((33, 44)))
    with pytest.raises(DataError, match=rf"{path.name} is 44x33 pixels"):
        evaluate(iter_records(benchmark, root), PROTOCOLS[benchmark], Oracle())
    problems = Problems(skip=True)
    result = evaluate(iter_records(benchmark, root), PROTOCOLS[benchmark], Oracle(), problems=problems)
    assert result.problems
    assert result.variants["oracle"].count() + len(result.problems) == 6


def test_nothing_left_is_an_error(tmp_path):
    root = pf_willow(tmp_path, images=2, classes=("car(G)",))
    for path in root.rglob("*.png"):
        path.write_bytes(b"x")
    with pytest.raises(DataError, match="No sample"):
        run("pf-willow", "--data", root, "--baseline", "identity", "--skip-invalid")


def test_wishes_that_cannot_be_met(tmp_path, checkpoint):
    root = pf_willow(tmp_path)
    with pytest.raises(InputError, match="--data"):
        run("pf-willow", "--baseline", "identity")
    with pytest.raises(InputError, match="--matching"):
        run("pf-willow", "--data", root, "--baseline", "identity", "--matching", "local")
    with pytest.raises(InputError, match="--masks collection"):
        run("pf-willow", "--data", root, "--baseline", "identity", "--masks", "collection")
    with pytest.raises(OutputError, match="does not exist"):
        run("pf-willow", "--data", root, "--baseline", "identity", "--json", tmp_path / "no" / "r.json")
    with pytest.raises(OutputError, match="is a folder"):
        run("pf-willow", "--data", root, "--baseline", "identity", "--markdown", tmp_path)
    with pytest.raises(InputError, match="needs a model"):
        make_baseline("nearest-neighbour")
    for wrong in ({"refine": "magic"}, {"partners": 0}, {"alphas": (0.1, -1)}):
        with pytest.raises(InputError):
            Options(**wrong)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    for wrong in (["--alphas", "a"], ["--alphas", "nan"], ["--batch-size", "0"]):
        with pytest.raises(SystemExit):
            parser.parse_args(["tss", "--data", "x", *wrong])


# -- two steps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("benchmark", ["tss", "coseg", "pf-pascal"])
def test_stored_predictions_give_the_same_figures_without_inference(tmp_path, checkpoint, benchmark, monkeypatch):
    root = MAKERS[benchmark](tmp_path / "in")
    arguments = [benchmark, "--data", root, "--model", checkpoint, "--refine", "otsu", "--predictions", tmp_path / "p"]
    first = run(*arguments, json_file=tmp_path / "a.json")
    assert not (tmp_path / "p.partial").exists()

    def forbidden(self, *_, **__):
        raise AssertionError("inference ran again")

    monkeypatch.setattr(ModelPredictor, "predict_pairs", forbidden)
    monkeypatch.setattr(ModelPredictor, "predict_images", forbidden)
    monkeypatch.setattr(ModelPredictor, "encode", forbidden)
    again = run(*arguments, json_file=tmp_path / "b.json")
    assert again["metrics"] == first["metrics"]
    assert again["variants"] == first["variants"]
    # Another metric of the same predictions.
    other = run(*arguments, "--alphas", "0.2,0.4", json_file=tmp_path / "c.json")
    if benchmark != "coseg":
        name = "flow_pck" if benchmark == "tss" else "pck"
        assert other["metrics"][name] != first["metrics"][name]


def test_predictions_of_another_model_configuration_benchmark_or_data_are_refused(tmp_path, checkpoint):
    root = pf_willow(tmp_path / "in")
    predictions = tmp_path / "p"
    arguments = ["pf-willow", "--data", root, "--predictions", predictions]
    run(*arguments, "--model", checkpoint)
    with pytest.raises(InputError, match="another model or configuration"):
        run(*arguments, "--baseline", "identity")

    weights = tmp_path / "weights"
    small_model(MaCoSNetForKeypointMatching, seed=1).save_pretrained(weights)
    config = tmp_path / "config"
    small_model(MaCoSNetForKeypointMatching, local_matching_temperature=30.0).save_pretrained(config)
    for folder in (weights, config):
        small_processor().save_pretrained(folder)
        with pytest.raises(InputError, match="another model or configuration"):
            run(*arguments, "--model", folder)
    copy = tmp_path / "copy"
    save_small_checkpoint(copy)
    run(*arguments, "--model", copy)  # the same model in another folder is the same model

    with pytest.raises(InputError, match="another benchmark"):
        run("pairs", "--pairs", root / "test_pairs.csv", "--predictions", predictions, "--model", checkpoint)
    lines = (root / "test_pairs.csv").read_text().split("\n")
    (root / "test_pairs.csv").write_text(
        "\n".join([lines[0], lines[1].replace("car(G)/photo_001", "car(G)/photo_002")])
    )
    with pytest.raises(InputError, match="other images or keypoints"):
        run(*arguments, "--model", checkpoint)


def test_half_written_predictions_are_never_taken_for_whole(tmp_path, checkpoint, monkeypatch):
    root = pf_willow(tmp_path / "in")
    arguments = ["pf-willow", "--data", root, "--predictions", tmp_path / "p", "--model", checkpoint, "--batch-size", 2]
    predict, calls = ModelPredictor.predict_pairs, []

    def interrupted(self, records, **kwargs):
        calls.append(len(records))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return predict(self, records, **kwargs)

    monkeypatch.setattr(ModelPredictor, "predict_pairs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(*arguments)
    assert not (tmp_path / "p").exists()
    monkeypatch.setattr(ModelPredictor, "predict_pairs", predict)
    assert run(*arguments, json_file=tmp_path / "r.json")["samples"] == 6
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("p")) == ["p"]
    shard = next((tmp_path / "p").glob("*.npz"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(InputError, match="damaged"):
        run(*arguments)


def test_a_folder_of_something_else_is_not_touched(tmp_path, checkpoint):
    root = pf_willow(tmp_path / "in")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match="not a complete set"):
        run("pf-willow", "--data", root, "--baseline", "identity", "--predictions", tmp_path / "p")
    assert (tmp_path / "p" / "mine.txt").exists()


def test_samples_left_out_are_left_out_of_stored_predictions_too(tmp_path):
    root = pf_willow(tmp_path / "in")
    path = root / "PF-dataset" / "car(G)" / "photo_001.png"
    path.write_bytes(b"x")
    arguments = [
        "pf-willow",
        "--data",
        root,
        "--baseline",
        "identity",
        "--predictions",
        tmp_path / "p",
        "--skip-invalid",
    ]
    first = run(*arguments, json_file=tmp_path / "a.json")
    again = run(*arguments, json_file=tmp_path / "b.json")
    assert first["left_out"]["count"] == 2
    for key in ("left_out", "metrics", "samples"):
        assert again[key] == first[key]


def test_shares_of_several_processes_merge_to_the_whole(tmp_path, processor):
    predictor = ModelPredictor(small_model(MaCoSNetForKeypointMatching), processor)
    options = Options(batch_size=1, refine="otsu")
    records = list(iter_records("tss", tss(tmp_path)))
    protocol = PROTOCOLS["tss"]
    whole = evaluate(records, protocol, predictor, options, predictions=tmp_path / "one")
    finish(whole, protocol, predictor, options, predictions=tmp_path / "one")
    shares = [evaluate(records, protocol, predictor, options, rank=rank, world_size=4) for rank in range(4)]
    total = shares[0]
    for share in shares[1:]:
        total.merge(share)
    assert total.variants.keys() == whole.variants.keys() > set()
    for variant, tally in whole.variants.items():
        assert total.variants[variant].count() == 6
        assert tally.overall()
        for name, value in tally.overall().items():
            assert total.variants[variant].overall()[name] == pytest.approx(value, abs=1e-9)


def test_names_of_version_0_1_import_from_where_they_stood():
    from macosnet_hf.evaluation import protocols, runner

    assert protocols.evaluate is runner.evaluate
    assert protocols.finish is runner.finish
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = protocols.nothing_such


def test_a_folder_that_does_not_exist_is_named_before_torch_is_imported(tmp_path):
    program = (
        "import sys; from macosnet_hf.commands.main import main; code = main(sys.argv[1:]); "
        "print('torch' in sys.modules); sys.exit(code)"
    )
    for words in (["coseg", "--data", tmp_path / "nowhere"], ["pairs", "--pairs", tmp_path / "nowhere.csv"]):
        run = subprocess.run(
            [sys.executable, "-c", program, "evaluate", *map(str, words)], capture_output=True, text=True, check=False
        )
        assert run.returncode == 2
        assert run.stdout == "False\n"
        assert "nowhere" in run.stderr
        assert len(run.stderr.splitlines()) == 1


@pytest.mark.parametrize("copies", [1, 3])
def test_a_pair_of_keypoints_at_one_place_is_left_out_of_bbox_only(tmp_path, capsys, copies):
    root = pf_willow(tmp_path)
    listing = root / "test_pairs.csv"
    before = list_figures(root, tmp_path / "before.json")
    lines = listing.read_text().splitlines()
    single = lines[1].split(",")
    single[3:] = [";".join([column.split(";")[0]] * copies) for column in single[3:]]
    listing.write_text("\n".join([*lines, ",".join(single)]) + "\n")
    capsys.readouterr()
    after = list_figures(root, tmp_path / "after.json")
    assert after["samples"] == before["samples"] + 1
    assert after["points"] == before["points"] + copies
    assert after["metrics"]["pck"]["bbox"] == before["metrics"]["pck"]["bbox"]
    assert after["left_out"]["count"] == 0
    assert after["left_out_of_bbox"] == 1
    assert "left_out_of_bbox" not in before
    assert "1 of 7 pairs are left out of PCK `bbox`" in capsys.readouterr().out
    image = before["metrics"]["pck"]["image"]["0.1"]
    assert after["metrics"]["pck"]["image"]["0.1"] in ((6 * image) / 7, (6 * image + 1) / 7)


def list_figures(root, report):
    words = ["pairs", "--data", root, "--pairs", root / "test_pairs.csv", "--baseline", "identity", "--json", report]
    assert macosnet(["evaluate", *map(str, words)]) == 0
    return json.loads(report.read_text())
