"""Pairs with a mirrored or turned source, against images that are moved explicitly before and points moved after."""

import functools
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from real_photos import CHEETAH, LION
from small_models import (
    FUSED,
    GRID_SIZE,
    IMAGE_SIZE,
    random_images,
    save_small_checkpoint,
    small_config,
    small_model,
    small_processor,
)

from macosnet_hf import orientation
from macosnet_hf.commands.main import main
from macosnet_hf.errors import InputError
from macosnet_hf.geometry import SYMMETRIES, denormalize_points, inverse_symmetry, make_grid, seen_through
from macosnet_hf.inference.pair import match_pair
from macosnet_hf.inference.verdict import REASONS
from macosnet_hf.modeling_macosnet import MaCoSNetForKeypointMatching, MaCoSNetModel

NAMES = list(SYMMETRIES)
SIZES = torch.tensor([[[IMAGE_SIZE, IMAGE_SIZE], [IMAGE_SIZE, IMAGE_SIZE]]])


@functools.cache
def places_seen(side, name):
    """Row and column that each pixel of the image seen through a symmetry R shows: those of R p."""
    matrix = np.array(SYMMETRIES[name])
    rows, columns = (torch.empty(side, side, dtype=torch.long) for _ in range(2))
    for row, column in itertools.product(range(side), repeat=2):
        x, y = matrix @ (2 * np.array([column, row]) - (side - 1))  # twice the distance from the middle
        rows[row, column], columns[row, column] = (y + side - 1) // 2, (x + side - 1) // 2
    return rows, columns


def moved_by_hand(image, name):
    """The image seen through a symmetry R, pixel by pixel: at p what it shows at R p."""
    rows, columns = places_seen(image.shape[-1], name)
    return image[..., rows, columns]


def along(points, name):
    """R p of points `(N, 2)`."""
    matrix = torch.tensor(SYMMETRIES[name], dtype=points.dtype)
    return torch.stack([matrix @ point for point in points])


@pytest.mark.parametrize("name", NAMES)
def test_an_image_seen_through_a_symmetry(name):
    image = torch.rand(2, 3, 7, 7)
    seen = seen_through(image, name)
    assert torch.equal(seen, moved_by_hand(image, name))
    assert torch.equal(seen_through(seen, inverse_symmetry(name)), image)


def pairs_of_photos():
    """`(3, 2, 3, S, S)`: a real pair, the same with its source mirrored, and a random one."""
    photos = [Image.open(path).convert("RGB") for path in (CHEETAH, LION)]
    pair = small_processor()([photos], return_tensors="pt")["pixel_values"][0]
    mirrored = torch.stack((pair[0].flip(-1), pair[1]))
    return torch.stack((pair, mirrored, random_images(2)))


@pytest.fixture(params=["paper", "common, fused"])
def model(request):
    options = {} if request.param == "paper" else {"decoder_inputs": "common", "decoder_rounds": 2, **FUSED}
    return small_model(MaCoSNetForKeypointMatching, mutual_fit=True, **options)


@pytest.mark.parametrize("cascade", ["exact", "features"])
@pytest.mark.parametrize("orientations", ["mirror", "all"])
def test_any_winner_answers_as_images_that_are_moved_before(model, orientations, cascade, monkeypatch):
    """A batch whose pairs have different winners; every hypothesis wins somewhere."""
    model.config.cascade = cascade
    pixels = pairs_of_photos()
    of_source, of_target = orientation.HYPOTHESES[orientations]
    hypotheses = list(itertools.product(of_source, of_target))
    points = torch.rand(12, 2, generator=torch.Generator().manual_seed(3)) * 1.8 - 0.9
    for first in range(0, len(hypotheses), 2):
        winners = [(first + k) % len(hypotheses) for k in range(3)]
        monkeypatch.setattr(orientation, "choose", lambda scores, mirrored, winners=winners: torch.tensor(winners))
        with torch.no_grad():
            outputs = model(pixels, orientations=orientations)
        for row, winner in enumerate(winners):
            compare(model, outputs, row, pixels[row], hypotheses[winner], points)


def compare(model, outputs, row, pair, names, points):
    """One pair of a batch with the answer for images that are moved by hand."""
    by_hand = torch.stack([moved_by_hand(image, name) for image, name in zip(pair, names, strict=True)])
    with torch.no_grad():
        expected = model(by_hand[None], orientations="none")
    own = type(outputs)(**{name: value[row : row + 1] for name, value in outputs.items() if value is not None})
    back = [inverse_symmetry(name) for name in names]
    exact = {"atol": 2e-4, "rtol": 0}
    for view in (0, 1):  # T_ij maps points of j into i
        there = model.transforms(own)[0, view].apply(points)
        reference = model.transforms(expected)[0, view].apply(along(points, back[1 - view]))
        torch.testing.assert_close(there, along(reference, names[view]), **exact)
        mask = moved_by_hand(expected.mask_logits[0, view], back[view])
        torch.testing.assert_close(own.mask_logits[0, view], mask, **exact)
        features = moved_by_hand(expected.features[0, view], back[view])
        torch.testing.assert_close(own.features[0, view], features, **exact)
    for direction, start in (("source_to_target", 0), ("target_to_source", 1)):
        pixels = denormalize_points(points, SIZES[0, 0], IMAGE_SIZE)[None]
        moved = denormalize_points(along(points, back[start]), SIZES[0, 0], IMAGE_SIZE)[None]
        found = model.transfer_points(own, pixels, SIZES, direction)[0]
        reference = model.transfer_points(expected, moved, SIZES, direction)[0] * 2 / (IMAGE_SIZE - 1) - 1
        reference = denormalize_points(along(reference, names[1 - start]), SIZES[0, 0], IMAGE_SIZE)
        torch.testing.assert_close(found, reference, atol=0.02, rtol=0)  # pixels
    # The correlation of each position of one image with each position of the other.
    cells = make_grid(GRID_SIZE, GRID_SIZE).reshape(-1, 2)
    where = [[cell_at(along(cells, name)) for name in back][side] for side in (0, 1)]
    for pair_number, (i, j) in enumerate(((0, 1), (1, 0))):
        found = own.correlation[0, pair_number].flatten(1)
        reference = expected.correlation[0, pair_number].flatten(1)[where[i]][:, where[j]]
        torch.testing.assert_close(found, reference, **exact)
    (a, b), (c, d) = (np.array(SYMMETRIES[names[0]]) @ np.array(SYMMETRIES[names[1]]).T).tolist()
    assert SYMMETRIES[NAMES[int(own.orientation)]] == ((a, b), (c, d))


def cell_at(places):
    """Number, row by row, of the cell of the feature map at normalised places `(N, 2)`."""
    column, row = ((places + 1) * (GRID_SIZE - 1) / 2).round().long().unbind(-1)
    return row * GRID_SIZE + column


def test_without_orientations_nothing_changes_and_blank_images_stay_as_they_are(model):
    pixels = pairs_of_photos()
    with torch.no_grad():
        plain, blank = model(pixels), model(torch.zeros(2, 2, 3, IMAGE_SIZE, IMAGE_SIZE), orientations="all")
        base = model.macosnet(pixels)
    assert model.config.orientations == "none"
    assert plain.orientation.tolist() == base.orientation.tolist() == [0, 0, 0]
    assert blank.orientation.tolist() == [0, 0]
    scores = torch.tensor([[0.5, float("nan"), 0.1], [0.5, float("nan"), 0.9]])
    assert orientation.choose(scores, [False, True]).tolist() == [0, 0, 1]


def test_the_configuration_decides_where_nothing_is_said(monkeypatch):
    model = small_model(MaCoSNetForKeypointMatching, orientations="mirror")
    monkeypatch.setattr(orientation, "choose", lambda scores, mirrored: torch.ones(scores.shape[1], dtype=torch.long))
    pixels = pairs_of_photos()
    with torch.no_grad():
        assert model(pixels).orientation.tolist() == [NAMES.index("mirror")] * 3
        assert model(pixels, orientations="none").orientation.tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_find_the_same_orientation(dtype):
    model = small_model(MaCoSNetForKeypointMatching, orientations="mirror").to(dtype)
    pair = pairs_of_photos()[:1]
    twice = torch.cat((pair, torch.stack((pair[:, 0].flip(-1), pair[:, 1]), dim=1)))
    with torch.no_grad():
        outputs = model(twice)
    assert outputs.features.dtype == dtype
    assert outputs.affine.isfinite().all()


def test_bad_orientations(model):
    pixels = random_images(1, 3)
    with pytest.raises(InputError, match="'none', 'mirror', 'all'; got 'sideways'"):
        model(pixels[:, :2], orientations="sideways")
    with pytest.raises(InputError, match="'none', 'mirror' or 'all'"):
        small_config(orientations="sideways")
    with pytest.raises(InputError, match="triplets"):
        small_model(MaCoSNetModel)(pixels, orientations="mirror")
    older = small_config().to_dict()
    del older["orientations"]
    assert type(small_config())(**older).orientations == "none"


# --- where users meet it ---


@pytest.fixture
def mirror_always(monkeypatch):
    monkeypatch.setattr(orientation, "choose", lambda scores, mirrored: torch.ones(scores.shape[1], dtype=torch.long))


def test_match_pair_answers_in_pixels_of_the_image_as_it_is(mirror_always):
    # Without its masks a small network matches nothing.
    model = small_model(MaCoSNetForKeypointMatching, mutual_fit=True, match_mask_threshold=0.0)
    torch.nn.init.constant_(model.macosnet.decoder.classifier.bias, 3.0)
    network = {"model": model, "processor": small_processor()}
    source, target = (Image.open(path).convert("RGB") for path in (CHEETAH, LION))
    found = match_pair(source, target, refine="none", orientations="mirror", **network)
    expected = match_pair(ImageOps.mirror(source), target, refine="none", **network)
    assert (found.orientation, expected.orientation) == ("mirror", "identity")
    assert len(found.matches) == len(expected.matches) > 0

    def rows(result, mirrored):
        """Matches in one order: of the source's points, which are those of the mirrored image."""
        keypoints = result.keypoints.copy()
        if mirrored:
            keypoints[:, 0, 0] = source.width - 1 - keypoints[:, 0, 0]
        return keypoints[np.lexsort(keypoints[:, 0].round().T)]

    np.testing.assert_allclose(rows(found, True), rows(expected, False), atol=0.1)
    assert (found.source_mask == expected.source_mask[:, ::-1]).mean() > 0.999
    difference = np.abs(np.float32(found.warped_source()) - np.float32(expected.warped_source()))
    assert difference.mean() < 1
    points = np.array([[30.0, 40.0], [200.0, 100.0]])
    mirrored = np.array([source.width - 1, 0]) + points * [-1, 1]
    np.testing.assert_allclose(found.transfer(points), expected.transfer(mirrored), atol=0.1)


def test_the_command_says_how_the_source_was_matched(mirror_always, tmp_path, capsys):
    checkpoint = save_small_checkpoint(tmp_path / "checkpoint")
    command = ["match", CHEETAH, LION, "--refine", "none", "--model", str(checkpoint), "--output-dir"]
    assert main([*command, str(tmp_path / "mirrored"), "--orientations", "mirror"]) == 0
    assert "matched as a mirror image" in capsys.readouterr().out
    assert main([*command, str(tmp_path / "plain")]) == 0
    assert "mirror" not in capsys.readouterr().out
    said = [json.loads((tmp_path / name / "matches.json").read_text()) for name in ("mirrored", "plain")]
    assert [document["orientation"] for document in said] == ["mirror", "identity"]


def test_the_demo_and_the_pipeline_say_it_too(mirror_always, tmp_path):
    from transformers import pipeline

    from macosnet_hf.demo.texts import pair_verdict

    result = SimpleNamespace(quality="good", reason="Good.", common=True, matches=[1, 2], orientation="mirror")
    pair = SimpleNamespace(same_image=False, result=result, orientations="all")
    assert pair_verdict(pair).endswith("2 matching points on the object, matched as a mirror image.")
    result.orientation = "turn_90"
    assert pair_verdict(pair).endswith("2 matching points on the object, matched turned by 90 degrees.")
    result.orientation = "identity"
    assert pair_verdict(pair).endswith("2 matching points on the object.")
    # Where nobody has looked for a mirror image, a result that is not good says that one may.
    hint = "If they face opposite ways, say so under Options."
    for quality, reason in REASONS.items():
        result.reason, result.quality = reason, quality if quality in ("good", "fair") else "poor"
        for pair.orientations in ("none", None, "mirror", "all"):
            said = hint in pair_verdict(pair)
            assert said == (quality in ("fair", "poor", "turned") and pair.orientations in ("none", None))
    small_model(MaCoSNetForKeypointMatching, match_mask_threshold=0.0).save_pretrained(tmp_path)
    small_processor().save_pretrained(tmp_path)
    matcher = pipeline("keypoint-matching", model=str(tmp_path))
    plain, mirrored = (matcher([CHEETAH, LION], orientations=name) for name in ("none", "mirror"))
    assert plain != mirrored
    assert matcher([CHEETAH, LION]) == plain
    with pytest.raises(InputError, match="'none', 'mirror', 'all'"):
        matcher([CHEETAH, LION], orientations="sideways")


@pytest.mark.parametrize("size", [(1, 1), (1, 40)])
def test_images_of_one_pixel_keep_their_orientation(size):
    model, dot = small_model(MaCoSNetForKeypointMatching), Image.new("RGB", size, (200, 10, 10))
    with torch.no_grad():
        outputs = model(**small_processor()([[dot, dot]], return_tensors="pt"), orientations="all")
    assert outputs.orientation.tolist() == [0]
