"""`pipeline("keypoint-matching")` and `pipeline("image-co-segmentation")`, with the package and without it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from real_photos import PHOTOS
from transformers import SuperGlueConfig, SuperGlueForKeypointMatching, SuperGlueImageProcessor, pipeline
from transformers.pipelines.keypoint_matching import KeypointMatchingPipeline

from macosnet_hf import DEFAULT_CHECKPOINT, ImageError, InputError, MaCoSNetForKeypointMatching, match_pair
from macosnet_hf.collection import hard_mask, segment_collection
from macosnet_hf.pipeline_macosnet import CUSTOM_PIPELINES, MaCoSNetCosegmentationPipeline


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[str]:
    """A wide and a tall view of one image, which lie on each other by stretching alone, and two others."""
    folder = tmp_path_factory.mktemp("photos")
    cheetah = Image.open(PHOTOS / "cheetah1.jpg").convert("RGB")
    cheetah.resize((400, 160), Image.Resampling.BICUBIC).save(folder / "wide.png")
    cheetah.resize((150, 380), Image.Resampling.BICUBIC).save(folder / "tall.png")
    Image.open(PHOTOS / "lion.jpg").convert("RGB").crop((0, 20, 256, 200)).save(folder / "lion.png")
    Image.open(PHOTOS / "cheetah.jpg").convert("RGB").resize((300, 200)).save(folder / "meadow.png")
    return [str(folder / f"{name}.png") for name in ("wide", "tall", "lion", "meadow")]


def points_of(matches):
    return np.array([[list(match[f"keypoint_image_{side}"].values()) for side in (0, 1)] for match in matches])


def assert_stretched(matches):
    """Points of the wide view (400x160) lie at the same fraction of the tall view (150x380)."""
    points = points_of(matches)
    assert len(points) >= 10
    assert points[:, 0, 0].max() > 160  # beyond the height: width and height are not mistaken for each other
    assert points[:, 1, 1].max() > 150
    expected = points[:, 0] * [149 / 399, 379 / 159]
    error = np.abs(points[:, 1] - expected) / [149, 379]
    assert np.median(error) < 0.02
    assert error.max() < 0.08


# ---- with the package ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def matcher():
    return pipeline("keypoint-matching", model=DEFAULT_CHECKPOINT)


@pytest.fixture(scope="module")
def segmenter():
    return pipeline("image-co-segmentation", model=DEFAULT_CHECKPOINT)


def test_points_of_images_that_are_not_square(matcher, photos):
    assert_stretched(matcher(photos[:2]))


def test_the_library_s_own_pipeline_would_put_them_elsewhere(matcher, photos):
    """The trap is real: with the library's class, the same model gives points beyond the image."""
    stock = KeypointMatchingPipeline(model=matcher.model, image_processor=matcher.image_processor)
    with pytest.raises(AssertionError):
        assert_stretched(stock(photos[:2]))


def test_matches_are_those_of_match_pair(matcher, photos):
    """Only that `match_pair` also asks the hard masks, which decides about a few points on their edges."""
    found = matcher([photos[2], Image.open(photos[3])], threshold=0.1)
    scores = [match["score"] for match in found]
    assert scores == sorted(scores, reverse=True)
    assert min(scores) > 0.1
    expected = match_pair(photos[2], photos[3], refine="none", threshold=0.1).matches
    assert 0 < len(expected) <= len(found) <= 1.15 * len(expected)
    by_source = {
        tuple(np.round(points[0], 1)): (*points[1], score)
        for points, score in zip(points_of(found), scores, strict=True)
    }
    for match in expected:
        assert np.allclose(
            by_source[tuple(np.round(match["source"], 1))], (*match["target"], match["score"]), atol=0.05
        )


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_list_of_pairs_gives_a_list_of_results(matcher, photos, batch_size):
    pairs = [photos[:2], photos[2:], [photos[3], photos[0]]]
    several = matcher(pairs, batch_size=batch_size)
    assert len(several) == 3
    for pair, found in zip(pairs, several, strict=True):
        alone = matcher(pair)
        assert len(alone) == len(found)
        if found:
            assert np.allclose(points_of(alone), points_of(found), atol=0.05)


def test_masks_are_those_of_segment(segmenter, photos):
    found = segmenter([photos[2], photos[3], photos[0]], partners=2, refine="none")
    images = [Image.open(path).convert("RGB") for path in (photos[2], photos[3], photos[0])]
    expected = segment_collection(images, model=segmenter.model, processor=segmenter.image_processor, partners=2)
    for number, (result, image) in enumerate(zip(found, images, strict=True)):
        assert set(result) == {"label", "score", "agreement", "mask"}
        assert (result["mask"].mode, result["mask"].size) == ("L", image.size)
        hard = hard_mask(expected.probabilities[number], image.size[::-1])
        assert np.array_equal(np.asarray(result["mask"]), hard * np.uint8(255))
        assert result["agreement"] == pytest.approx(expected.agreement[number], abs=1e-5)
        assert 0.5 <= result["score"] <= 1  # the mean of what lies above one half
    refined = segmenter([photos[2], photos[3], photos[0]], partners=2)
    assert any(np.any(np.asarray(a["mask"]) != np.asarray(b["mask"])) for a, b in zip(refined, found, strict=True))


def test_several_collections_at_once(segmenter, photos):
    collections = [photos[:2], photos[2:]]
    results = segmenter(collections, refine="none", batch_size=2)
    assert [[result["mask"].size for result in row] for row in results] == [
        [(400, 160), (150, 380)],
        [(256, 180), (300, 200)],
    ]


def test_a_list_of_one_pair_is_a_list_of_one_result(matcher, photos):
    alone = matcher(photos[:2])
    assert matcher([photos[:2]]) == matcher(((Path(photos[0]), Path(photos[1])),)) == [alone]


PAIR = ["a.png", "b.png"]


@pytest.mark.parametrize(
    "inputs",
    [
        "ab",
        None,
        3,
        [],
        [[]],
        ["a.png"],
        [*PAIR, "c.png"],
        [PAIR, "c.png"],
        [PAIR, ["c.png"]],
        [[PAIR]],
        [1, 2],
        {"a": 1},
    ],
)
def test_what_is_no_pair_is_said(matcher, inputs):
    with pytest.raises(InputError, match="takes a pair of images"):
        matcher(inputs)


@pytest.mark.parametrize("threshold", ["high", -0.1, 2.0, float("nan")])
def test_a_threshold_that_is_none_is_said(matcher, photos, threshold):
    with pytest.raises(InputError, match="threshold must be a number between 0 and 1"):
        matcher(photos[:2], threshold=threshold)


def test_a_threshold_for_all_calls(matcher, photos):
    strict = pipeline("keypoint-matching", model=matcher.model, image_processor=matcher.image_processor, threshold=0.7)
    assert strict(photos[:2]) == matcher(photos[:2], threshold=0.7) != matcher(photos[:2])


@pytest.mark.parametrize("task", ["matcher", "segmenter"])
def test_an_image_that_is_not_there_is_said(task, photos, request):
    with pytest.raises(ImageError, match=r"'nowhere\.jpg' does not exist") as caught:
        request.getfixturevalue(task)([photos[0], "nowhere.jpg"])
    assert "padding" not in str(caught.value)  # the library takes it for base64


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"partners": 0}, "partners must be a whole number"),
        ({"partners": "two"}, "partners must be a whole number"),
        ({"refine": "sharp"}, "Unknown refinement 'sharp'"),
    ],
)
def test_options_of_co_segmentation(segmenter, photos, option, words):
    with pytest.raises(InputError, match=words):
        segmenter(photos[:2], **option)


@pytest.mark.parametrize("inputs", ["photo.png", [], [1, 2], None, [[PAIR]], [PAIR, "c.png"], {"a": 1}])
def test_what_is_no_list_of_images_is_said(segmenter, inputs):
    with pytest.raises(InputError, match="Co-segmentation"):
        segmenter(inputs)


def test_one_image_is_too_few(segmenter, photos):
    with pytest.raises(InputError, match="two or more"):
        segmenter(photos[:1])


def test_other_models_keep_the_library_s_pipeline():
    config = SuperGlueConfig(
        keypoint_detector_config={"model_type": "superpoint", "encoder_hidden_sizes": [8, 8], "decoder_hidden_size": 8,
                                  "keypoint_decoder_dim": 65, "descriptor_decoder_dim": 16},
        hidden_size=16, keypoint_encoder_sizes=[8, 16], gnn_layers_types=["self", "cross"], num_attention_heads=2,
    )  # fmt: skip
    model = SuperGlueForKeypointMatching(config)
    made = pipeline("keypoint-matching", model=model, image_processor=SuperGlueImageProcessor())
    assert type(made) is KeypointMatchingPipeline
    assert made.model is model


def test_a_saved_configuration_names_both_pipelines(tmp_path):
    model = MaCoSNetForKeypointMatching.from_pretrained(DEFAULT_CHECKPOINT)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["custom_pipelines"] == CUSTOM_PIPELINES
    embedded = json.loads(Path(DEFAULT_CHECKPOINT, "config.json").read_text())
    assert embedded["custom_pipelines"] == CUSTOM_PIPELINES
    # In memory there are none, so the model that was saved can still be given to `pipeline`.
    assert not getattr(model.config, "custom_pipelines", None)
    assert isinstance(
        pipeline("image-co-segmentation", model=model, image_processor=DEFAULT_CHECKPOINT),
        MaCoSNetCosegmentationPipeline,
    )
    for name in ("pipeline_macosnet.py", "collection.py", "image_processing_macosnet.py"):
        assert (tmp_path / name).is_file()


def test_the_embedded_folder_holds_the_code_that_a_saved_one_would(tmp_path):
    MaCoSNetForKeypointMatching.from_pretrained(DEFAULT_CHECKPOINT).save_pretrained(tmp_path)
    saved = {path.name: path.read_bytes() for path in tmp_path.glob("*.py")}
    embedded = {path.name: path.read_bytes() for path in Path(DEFAULT_CHECKPOINT).glob("*.py")}
    assert embedded == saved


def test_a_saved_pipeline_is_a_whole_checkpoint(matcher, tmp_path, photos):
    matcher.save_pretrained(tmp_path)
    again = pipeline("keypoint-matching", model=str(tmp_path))
    assert again(photos[2:]) == matcher(photos[2:])


# ---- in other processes ----------------------------------------------------------------------------------------------

PROGRAM = """
import json, sys

package, folder, again, trust, *images = sys.argv[1:]
if package == "blocked":
    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name == "macosnet_hf" or name.startswith("macosnet_hf."):
                raise ModuleNotFoundError(f"No module named {name!r} (blocked by the test)")
    sys.meta_path.insert(0, Blocked())
else:
    import macosnet_hf
    macosnet_hf.MaCoSNetConfig

import torch
from transformers import pipeline
torch.set_num_threads(1)
options = {"trust_remote_code": True} if trust == "yes" else {}

matcher = pipeline("keypoint-matching", model=folder, **options)
segmenter = pipeline("image-co-segmentation", model=folder, **options)
found = {
    "modules": [type(matcher).__module__, type(segmenter).__module__],
    "matches": matcher(images[:2]),
    "pairs": matcher([images[2:], images[:2]], batch_size=2),
    "masks": [[found["mask"].size, found["mask"].histogram()[255]] for found in segmenter(images[2:], refine="none")],
}
matcher.save_pretrained(again)  # what was loaded can be saved and served again
found["again"] = pipeline("keypoint-matching", model=again, **options)(images[:2])
assert (package == "blocked") == ("macosnet_hf" not in sys.modules)
print(json.dumps(found))
"""


def run_elsewhere(tmp_path: Path, package: str, folder: str, trust: str, photos: list[str]) -> dict:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]) if package == "installed" else "",
    }
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    finished = subprocess.run(
        [sys.executable, str(program), package, folder, str(tmp_path / "again"), trust, *photos],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,  # a question about remote code would end the process
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.mark.parametrize(("package", "trust"), [("blocked", "yes"), ("installed", "no"), ("installed", "yes")])
def test_pipelines_in_a_fresh_process(package, trust, photos, matcher, segmenter, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(DEFAULT_CHECKPOINT, folder)  # links become files, as on the Hub
    found = run_elsewhere(tmp_path, package, str(folder), trust, photos)

    # Classes that are registered win over those in the folder, also where the latter would be trusted.
    place = "transformers_modules." if package == "blocked" else "macosnet_hf."
    assert all(module.startswith(place) for module in found["modules"])
    assert_stretched(found["matches"])
    assert found["again"] == found["matches"]
    assert np.allclose(points_of(found["pairs"][1]), points_of(found["matches"]), atol=0.05)
    here = matcher(photos[2:])
    assert np.allclose(points_of(found["pairs"][0]), points_of(here), atol=0.05)
    for (size, pixels), result in zip(found["masks"], segmenter(photos[2:], refine="none"), strict=True):
        assert tuple(size) == result["mask"].size
        assert abs(pixels - result["mask"].histogram()[255]) <= 5  # pixels at one half may fall either way
