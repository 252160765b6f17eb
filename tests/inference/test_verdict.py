"""What is said of a pair: cases 14 to 17 of the faults of version 0.1, and the numbers behind the words."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from real_photos import CHEETAH, LION, TOWER

from macosnet_hf import load_image, match_pair
from macosnet_hf.collection import segment_collection
from macosnet_hf.geometry import SYMMETRIES, Transform, identity_tps
from macosnet_hf.inference.verdict import REASONS, RULE, Evidence, evidence_of, verdict_of
from macosnet_hf.io.checkpoints import load_model_and_processor

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CAT, TABBY, DOG, CUP = (EXAMPLES / f"{name}.jpg" for name in ("cat", "tabby", "dog", "cup"))
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def data(*names: str) -> list[Path]:
    paths = [DATA / name for name in names]
    if not all(path.exists() for path in paths):
        pytest.skip(f"needs {names[0]} in shared/data")
    return paths


def mirrored(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB").transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def turned(path: Path, turn: Image.Transpose) -> Image.Image:
    return Image.open(path).convert("RGB").transpose(turn)


def noise(seed: int, grain: int = 1) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 255, (200 // grain, 300 // grain, 3), np.uint8)
    return Image.fromarray(small.repeat(grain, axis=0).repeat(grain, axis=1))


def sky(seed: int) -> Image.Image:
    """Without a cloud: paler downwards, with the noise of a camera."""
    random = np.random.default_rng(seed)
    values = np.array([70, 130, 210]) + np.linspace(0, 1, 220)[:, None, None] * random.uniform(20, 70, 3)
    values = values + random.normal(0, 2, (220, 320, 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def gradient() -> Image.Image:
    return Image.fromarray(np.tile(np.linspace(0, 255, 240).astype(np.uint8), (200, 1))).convert("RGB")


GREY, BLACK = Image.new("RGB", (300, 200), (128, 128, 128)), Image.new("RGB", (300, 200))
NOTHING = {
    "grey, grey": (GREY, GREY.copy()),
    "black, grey": (BLACK, GREY),
    "white, white": (Image.new("RGB", (200, 200), "white"),) * 2,
    "noise, noise": (noise(1), noise(2)),
    "coarse noise, itself": (noise(3, 8), noise(3, 8)),
    "sky, sky": (sky(1), sky(2)),
    "gradient, itself": (gradient(), gradient()),
}


@pytest.mark.parametrize("name", NOTHING)
def test_images_of_nothing(network, name):
    """Case 14, and its kind."""
    result = match_pair(*NOTHING[name], **network, refine="none")
    assert (result.quality, result.reason) == ("poor", REASONS["blank"])
    assert result.agreement == 0


@pytest.mark.parametrize("place", [0, 1])
def test_an_image_of_nothing_with_one_of_something(network, place):
    images = [LION, LION]
    images[place] = GREY
    result = match_pair(*images, **network, refine="none")
    assert (result.quality, result.reason) == ("poor", REASONS["blank"])


@pytest.mark.parametrize("model", ["lite", "base"])
def test_images_of_nothing_have_nothing_in_common(model):
    """What a pair says of them, a collection says too; real images have."""
    nothing = [GREY, BLACK, noise(1), noise(3, 8), sky(1), gradient()]
    loaded, processor = load_model_and_processor(model, "cpu")
    assert not segment_collection(nothing, model=loaded, processor=processor).common.any()
    real = [load_image(path) for path in (CAT, TABBY)]
    assert segment_collection(real, model=loaded, processor=processor).common.all()


def test_a_pair_of_nothing_has_nothing_in_common(network):
    assert not match_pair(GREY, GREY.copy(), **network, refine="none").common


def lies_on_its_mirror_image(result) -> bool:
    """Whether most matches of an image with its own mirror image are the right ones."""
    width = result.source.width
    right = result.keypoints[:, 0] * [-1, 1] + [width - 1, 0]
    return bool(np.median(np.linalg.norm(result.keypoints[:, 1] - right, axis=1)) < 0.05 * width)


@pytest.mark.parametrize("photo", [CAT, TABBY, CHEETAH, LION, "caltech101/elephant/image_0008.jpg"], ids=str)
def test_its_own_mirror_image(network, photo):
    """Case 15: the right points, or not "good"."""
    path = Path(photo) if Path(photo).exists() else data(photo)[0]
    result = match_pair(path, mirrored(path), **network, refine="none")
    assert result.quality != "good" or lies_on_its_mirror_image(result)


@pytest.mark.parametrize("turn", [Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180], ids=str)
@pytest.mark.parametrize("photo", [CAT, TABBY, LION, "caltech101/elephant/image_0008.jpg"], ids=str)
def test_itself_turned(network, photo, turn):
    path = Path(photo) if Path(photo).exists() else data(photo)[0]
    assert match_pair(path, turned(path, turn), **network, refine="none").quality != "good"


def test_another_cat_upside_down(network):
    assert match_pair(CAT, turned(TABBY, Image.Transpose.ROTATE_180), **network, refine="none").quality != "good"


def test_cows_that_face_opposite_ways(network):
    """Case 16: the transform mirrors, or the pair is not "good"."""
    paths = data("msrc-coseg/images/cow/5_21_s.jpg", "msrc-coseg/images/cow/5_29_s.jpg")
    result = match_pair(*paths, **network, refine="none", orientations="mirror")
    assert result.quality != "good" or result.transforms.determinant()[0] < 0


def test_a_car_from_the_side_and_one_from_behind(network):
    """Case 16."""
    paths = data("msrc-coseg/images/car/7_1_s.jpg", "msrc-coseg/images/car/7_14_s.jpg")
    assert match_pair(*paths, **network).quality != "good"


@pytest.mark.parametrize("pair", [(CHEETAH, LION), (CAT, TABBY), (CAT, CAT), (CUP, CUP)], ids=str)
def test_related_objects(network, pair):
    assert match_pair(*pair, **network, refine="none").quality in ("good", "fair")


@pytest.mark.parametrize("pair", [(CHEETAH, TOWER), (LION, TOWER), (CAT, CUP), (DOG, TOWER), (CUP, TOWER)], ids=str)
def test_unrelated_objects(network, pair):
    result = match_pair(*pair, **network, refine="none")
    assert result.quality == "poor"
    assert result.reason in (REASONS["poor"], REASONS["turned"])


# ---------------------------------------------------------------------------------------------------------------------
# The numbers
# ---------------------------------------------------------------------------------------------------------------------


def test_the_number_and_the_word(network):
    """The number is given whatever the threshold, and the words are thresholds of it."""
    results = [match_pair(CHEETAH, other, **network, refine="none") for other in (CHEETAH, LION, TOWER)]
    numbers = [result.agreement for result in results]
    assert all(0 <= number <= 1 for number in numbers)
    assert numbers == sorted(numbers, reverse=True)
    for result in results:
        again = result.with_options(refine="none", threshold=0.9)
        assert (again.agreement, again.quality, again.reason) == (result.agreement, result.quality, result.reason)
        number, rule = result.agreement, RULE
        assert result.quality == ("good" if number >= rule.good else "fair" if number >= rule.fair else "poor")


def random_pair(seed: int = 3):
    """Features of 5x6 cells, masks and transforms that are not symmetric in anything."""
    random = np.random.default_rng(seed)
    features, masks = random.normal(0.4, size=(2, 4, 5, 6)), random.random((2, 5, 6))
    affine = np.array([[0.9, 0.1, 0.05, -0.1, 1.1, -0.02], [1.0, -0.2, 0.1, 0.1, 0.8, 0.0]])
    tps = np.stack([identity_tps().numpy().ravel()] * 2) + random.normal(scale=0.03, size=(2, 18))
    return features, masks, Transform(torch.from_numpy(affine), torch.from_numpy(tps), 0.1)


def test_evidence_against_plain_loops():
    """Cell by cell in float64: where windows go, what lies there, whether both masks have it."""
    features, masks, transforms = random_pair()
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    step = np.array([2 / 5, 2 / 4])
    cells = [(np.array([x * step[0] - 1, y * step[1] - 1]), y, x) for y in range(5) for x in range(6)]

    def look(values, place):
        """Bilinear sample of `(5, 6)` values; outside the border goes on."""
        x, y = ((place + 1) / step).clip(0, [5, 4])
        weights = [[max(0, 1 - abs(y - i)) * max(0, 1 - abs(x - j)) for j in range(6)] for i in range(5)]
        return float((np.array(weights) * values).sum())

    def within(place):
        return bool((np.abs(place) <= 1 + 1e-9).all())

    def one_way(way):
        mine, theirs, mask, other = unit[way], unit[1 - way], masks[way], masks[1 - way]
        points = np.stack([point for point, _, _ in cells])
        places = transforms.apply(torch.from_numpy(points)[None].expand(2, -1, -1))[1 - way].numpy()
        weights = np.sqrt(mask.ravel() + 1e-3)[:, None]
        here, there = (each - np.average(each, axis=0, weights=weights[:, 0] ** 2) for each in (points, places))
        linear = np.linalg.lstsq(weights * here, weights * there, rcond=None)[0].T

        def window(matrix, row, column, place):
            values = []
            for down in (-1, 0, 1):
                for right in (-1, 0, 1):
                    at = place + matrix @ (np.array([right, down]) * step)
                    if within(at) and 0 <= row + down < 5 and 0 <= column + right < 6:
                        values.append(look(np.tensordot(mine[:, row + down, column + right], theirs, 1), at))
            return sum(values) / max(len(values), 4.5)

        def windows(matrix):
            return np.array([[window(matrix, row, column, place) for place, _, _ in cells] for _, row, column in cells])

        straight = windows(linear)
        near = total = 0.0
        for number, place in enumerate(places):
            both = mask.ravel()[number] * (look(other, place) if within(place) else 0.0)
            assert within(place) or both == 0
            nearest = cells[straight[number].argmax()][0]
            near += both * (np.linalg.norm((nearest - place) / step) <= 2)
            total += both
        best = {
            name: np.average(windows(linear @ np.array(matrix)).max(1), weights=mask.ravel())
            for name, matrix in SYMMETRIES.items()
        }
        return near / total, best.pop("identity") - max(best.values())

    near, upright = np.mean([one_way(0), one_way(1)], axis=0)
    pooled = [(unit[k] * masks[k]).sum((1, 2)) for k in (0, 1)]
    similarity = pooled[0] @ pooled[1] / np.linalg.norm(pooled[0]) / np.linalg.norm(pooled[1])
    blocks_of = unit[:, :, :3].reshape(2, 4, 3, 2, 3).mean((2, 4))  # one row of two blocks

    def variance(maps):
        maps = maps.reshape(4, -1)
        return ((maps - maps.mean(1, keepdims=True)) ** 2).sum(0).mean()

    structure = min(variance(whole) * variance(blocks) for whole, blocks in zip(unit, blocks_of, strict=True))
    found = evidence_of(torch.from_numpy(features), torch.from_numpy(masks), transforms)
    assert 0 < near < 1
    expected = similarity, near, upright, structure
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_more_evidence_is_never_a_worse_verdict():
    words = []
    for share in np.linspace(0, 1, 101):
        found = verdict_of(Evidence(similarity=share, near=share, upright=0.1 * share, structure=0.3), RULE)
        words.append(found.quality)
        assert found.reason == REASONS[found.quality]
    assert sorted(set(words), key=words.index) == ["poor", "fair", "good"]
    assert [("poor", "fair", "good").index(word) for word in words] == sorted(
        map(("poor", "fair", "good").index, words)
    )


@pytest.mark.parametrize("structure", [0.0, 0.1, float("nan")])
def test_an_image_without_structure_is_poor_whatever_else_agrees(structure):
    found = verdict_of(Evidence(similarity=1.0, near=1.0, upright=0.3, structure=structure), RULE)
    assert found == (0.0, "poor", REASONS["blank"])


def test_objects_that_face_otherwise_than_the_transform_has_it():
    """The image itself, but the transform mirrors it: everything is similar, and nothing lies where it should."""
    features = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 8, 9, 9))).expand(2, -1, -1, -1)
    masks = torch.ones(2, 9, 9)
    straight, mirror = (
        evidence_of(features, masks, Transform(torch.tensor([[sign, 0.0, 0, 0, 1, 0]] * 2), identity_tps(2), 0.0))
        for sign in (1.0, -1.0)
    )
    assert straight.similarity == pytest.approx(1, abs=1e-5)
    assert straight.near == pytest.approx(1, abs=1e-5)
    assert straight.upright > 0.3
    assert mirror.upright < -0.3
    assert mirror.near < 0.5
    found = verdict_of(mirror._replace(structure=0.3), RULE)
    assert (found.quality, found.reason) == ("poor", REASONS["turned"])


def test_no_match_on_the_objects(network, monkeypatch):
    """A pair without a match is not called good, whatever its features say."""
    result = match_pair(LION, LION, **network, refine="none")
    nowhere = np.zeros(len(result._found.points), dtype=bool)
    monkeypatch.setattr("macosnet_hf.inference.pair._on_masks", lambda points, masks: nowhere)
    again = result.with_options(refine="none")
    assert (again.agreement, again.quality, again.reason) == (0.0, "poor", REASONS["empty"])
