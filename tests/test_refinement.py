"""Soft masks to hard masks: GrabCut, Otsu, DenseCRF, and the baseline without a model."""

import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from macosnet_hf.errors import InputError
from macosnet_hf.refinement import (
    NARROW_LIMITS,
    REFINEMENT_METHODS,
    WIDE_LIMITS,
    colour_overlap,
    otsu_threshold,
    refine_mask,
)

gradio = pytest.importorskip("gradio", reason="the images of these tests come with gradio")
PHOTOS = Path(gradio.__file__).parent / "media_assets" / "images"
HAS_CRF = importlib.util.find_spec("pydensecrf") is not None
needs_crf = pytest.mark.skipif(not HAS_CRF, reason="pydensecrf2 (the extra `crf`) is not installed")
COLOUR_METHODS = ["grabcut", pytest.param("crf", marks=needs_crf)]


def texture(name: str, size: tuple[int, int]) -> np.ndarray:
    with Image.open(PHOTOS / name) as image:
        return np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS))


def scene(width: int = 200, height: int = 130, shift: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A cheetah's fur in the shape of an ellipse before a blue evening sky: image, true mask, and a soft mask that is
    blurred and shifted."""
    fur = texture("cheetah1.jpg", (width * 3, height * 3))[height * 2 :, width : width * 2]
    with Image.open(PHOTOS / "tower.jpg") as image:
        sky = np.asarray(image.convert("RGB").crop((0, 0, 150, 100)).resize((width, height)))
    truth = ellipse(width, height)
    soft = ellipse(width, height, shift=0.08 + shift / width).astype(np.float32)
    soft = np.asarray(Image.fromarray(soft).resize((12, 9), Image.Resampling.BOX).resize((width, height), 2))
    composed = np.where(truth[..., None], fur[:height, :width], sky)
    return np.ascontiguousarray(composed), truth, 0.05 + 0.9 * soft.clip(0, 1)


def ellipse(width: int, height: int, shift: float = 0.0) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return ((x / width - 0.42 - shift) / 0.27) ** 2 + ((y / height - 0.55) / 0.3) ** 2 < 1


def jaccard(mask: np.ndarray, truth: np.ndarray) -> float:
    return float((mask & truth).sum() / (mask | truth).sum())


# ---------------------------------------------------------------------------------------------------------------------
# What it is for
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", COLOUR_METHODS)
def test_the_image_s_colours_correct_the_soft_mask(method):
    image, truth, soft = scene()
    before = jaccard(soft >= 0.5, truth)
    after = refine_mask(image, soft, method)
    assert after.dtype == bool
    assert after.shape == (130, 200)
    assert before < 0.8
    assert jaccard(after, truth) > (0.93 if method == "grabcut" else before + 0.05)


def slow_colour_overlap(rgb: np.ndarray, soft: np.ndarray) -> float:
    """A dictionary of bins and plain loops instead of arrays."""
    lab = cv2.cvtColor(rgb, cv2.COLOR_RGB2LAB)
    kernel = {-2: 1 / 16, -1: 4 / 16, 0: 6 / 16, 1: 4 / 16, 2: 1 / 16}
    shares = []
    for weights in (soft, 1 - soft):
        raw: dict[tuple[int, ...], float] = {}
        for colour, weight in zip(lab.reshape(-1, 3).tolist(), weights.ravel().tolist(), strict=True):
            place = tuple(value * 24 // 256 for value in colour)
            raw[place] = raw.get(place, 0.0) + weight
        smooth: dict[tuple[int, ...], float] = {}
        for (a, b, c), weight in raw.items():
            for (i, x), (j, y), (k, z) in itertools.product(kernel.items(), repeat=3):
                place = (a + i, b + j, c + k)
                if all(0 <= value < 24 for value in place):
                    smooth[place] = smooth.get(place, 0.0) + weight * x * y * z
        total = sum(smooth.values())
        shares.append({place: weight / total for place, weight in smooth.items()})
    return sum((weight * shares[1].get(place, 0.0)) ** 0.5 for place, weight in shares[0].items())


def test_overlap_of_colours_against_plain_loops():
    image, _, soft = scene(60, 40)
    assert colour_overlap(image, soft) == pytest.approx(slow_colour_overlap(image, soft), abs=1e-5)
    noise = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    weights = np.random.default_rng(1).random((9, 13), dtype=np.float32)
    assert colour_overlap(noise, weights) == pytest.approx(slow_colour_overlap(noise, weights), abs=1e-5)


def test_overlap_of_colours_tells_fur_before_the_sky_from_fur_in_grass():
    image, truth, _ = scene()
    assert colour_overlap(image, truth.astype(np.float32)) < 0.2
    fur = texture("cheetah1.jpg", (600, 390))[260:, 200:400]
    assert colour_overlap(fur[:130], truth.astype(np.float32)) > 0.9
    assert colour_overlap(np.zeros((5, 5, 3), np.uint8), np.full((5, 5), 0.5, np.float32)) == pytest.approx(1)


def test_grabcut_may_doubt_a_sure_soft_mask_only_where_colours_are_distinct():
    """In fur before fur the answer stays with the soft mask; before the sky it does not."""
    image, _, soft = scene()
    fur = np.ascontiguousarray(texture("cheetah1.jpg", (600, 390))[260:, 200:400])
    narrow = {"sure_background": NARROW_LIMITS[0], "sure_foreground": NARROW_LIMITS[1]}
    wide = {"sure_background": WIDE_LIMITS[0], "sure_foreground": WIDE_LIMITS[1]}
    np.testing.assert_array_equal(refine_mask(image, soft), refine_mask(image, soft, **wide))
    np.testing.assert_array_equal(refine_mask(fur, soft), refine_mask(fur, soft, **narrow))
    assert (refine_mask(fur, soft, **narrow) != refine_mask(fur, soft, **wide)).any()
    assert refine_mask(fur, soft)[soft > NARROW_LIMITS[1]].all()


def test_grabcut_on_a_large_image_runs_small_and_ends_smooth():
    image, truth, soft = scene(1600, 1040)
    mask = refine_mask(image, soft, "grabcut", working_size=160)
    assert mask.shape == (1040, 1600)
    assert jaccard(mask, truth) > 0.93
    # Enlarged ten times by the nearest pixel, every tenth row or so would jump by a multiple of ten pixels.
    edge = np.array([np.flatnonzero(row)[0] for row in mask if row.any()])
    jumps = np.abs(np.diff(edge[len(edge) // 4 : -len(edge) // 4]))
    assert (jumps >= 8).mean() < 0.02


def test_working_size_bounds_the_cost_and_not_the_answer():
    image, _, soft = scene(400, 260)
    full = refine_mask(image, soft, working_size=400)
    small = refine_mask(image, soft, working_size=130)
    assert not np.array_equal(full, small)
    assert jaccard(full, small) > 0.9


def test_a_full_size_mask_is_aligned_with_its_image():
    """A shift of half a small pixel at the way down or up would show as a biased edge."""
    image, truth, _ = scene(960, 640)
    mask = refine_mask(image, truth.astype(np.float32), "grabcut", working_size=120)
    rows, columns = (np.argwhere(m).mean(0) for m in (mask, truth))
    assert np.abs(rows - columns).max() < 1.5  # one small pixel is eight large ones


def test_grabcut_respects_what_is_sure():
    image, _, soft = scene()
    soft = soft.copy()
    soft[:20, :20] = 1.0
    soft[60:70, 80:90] = 0.0
    mask = refine_mask(image, soft)
    assert mask[:20, :20].all()
    assert not mask[60:70, 80:90].any()
    free = refine_mask(image, soft, sure_foreground=1.1, sure_background=-0.1)
    assert not free[:20, :20].all()
    assert free[60:70, 80:90].any()


@pytest.mark.parametrize("method", COLOUR_METHODS)
def test_the_same_input_gives_the_same_mask(method):
    import cv2

    image, _, soft = scene()
    masks = []
    for seed in (1, 2, 3):
        cv2.setRNGSeed(seed)
        masks.append(refine_mask(image, soft, method))
    assert np.array_equal(masks[0], masks[1])
    assert np.array_equal(masks[0], masks[2])


@pytest.mark.parametrize("method", ["grabcut", "otsu", "none", pytest.param("crf", marks=needs_crf)])
def test_numpy_pil_and_torch_agree_and_nothing_is_changed(method):
    image, _, soft = scene()
    kept_picture, kept_soft = image.copy(), soft.copy()
    expected = refine_mask(image, soft, method)
    assert np.array_equal(refine_mask(Image.fromarray(image), torch.from_numpy(soft), method), expected)
    with_gradient = torch.from_numpy(soft.astype(np.float64)).requires_grad_()
    assert np.array_equal(refine_mask(image, with_gradient, method), expected)
    assert np.array_equal(refine_mask(image[:, ::-1][:, ::-1], soft, method), expected), "a view with negative strides"
    assert np.array_equal(image, kept_picture)
    assert np.array_equal(soft, kept_soft)


def test_half_precision_soft_masks():
    image, _, soft = scene()
    for dtype in (torch.float16, torch.bfloat16):
        mask = refine_mask(image, torch.from_numpy(soft).to(dtype), "none")
        assert (mask != (soft >= 0.5)).mean() < 0.01


# ---------------------------------------------------------------------------------------------------------------------
# Thresholds
# ---------------------------------------------------------------------------------------------------------------------


def test_none_is_the_threshold():
    image, _, soft = scene()
    assert np.array_equal(refine_mask(image, soft, "none"), soft >= 0.5)
    assert np.array_equal(refine_mask(image, soft, "none", threshold=0.2), soft >= np.float32(0.2))


def test_otsu_against_a_slow_search():
    generator = np.random.default_rng(3)
    values = np.concatenate((generator.normal(0.2, 0.05, 700), generator.normal(0.6, 0.1, 300))).clip(0, 1)
    edges = np.linspace(values.min(), values.max(), 257)
    best, best_variance = None, -1.0
    for edge in edges[1:-1]:
        low, high = values[values < edge], values[values >= edge]
        if len(low) and len(high):
            variance = len(low) * len(high) * (low.mean() - high.mean()) ** 2
            if variance > best_variance:
                best, best_variance = edge, variance
    found = otsu_threshold(values)
    assert found == pytest.approx(best, abs=2 * (edges[1] - edges[0]))


def test_otsu_against_scikit_image():
    filters = pytest.importorskip("skimage.filters")
    _, _, soft = scene()
    assert otsu_threshold(soft) == pytest.approx(filters.threshold_otsu(soft), abs=0.01)


def test_otsu_splits_a_soft_mask_of_any_scale():
    image, truth, soft = scene()
    expected = refine_mask(image, soft, "otsu")
    assert jaccard(expected, truth) > 0.5
    faint = 0.1 + 0.05 * soft
    assert (refine_mask(image, faint, "otsu") != expected).mean() < 0.01


# ---------------------------------------------------------------------------------------------------------------------
# Degenerate input
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["grabcut", "otsu", "none", pytest.param("crf", marks=needs_crf)])
@pytest.mark.parametrize("value", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_a_constant_soft_mask_stays_what_it_is(method, value):
    image, _, soft = scene()
    mask = refine_mask(image, np.full_like(soft, value), method)
    assert mask.all() == (value >= 0.5)
    assert mask.any() == (value >= 0.5)


@pytest.mark.parametrize("scale", [0.4, 0.1])
def test_grabcut_without_any_value_above_the_threshold(scale):
    """An undecided decoder: the object is there, but never above one half."""
    image, truth, soft = scene()
    mask = refine_mask(image, soft * scale, "grabcut")
    if scale == 0.4:
        assert jaccard(mask, truth) > 0.9
    else:
        assert not mask.any(), "too faint to mean anything"


def test_grabcut_without_any_value_below_the_threshold():
    image, truth, soft = scene()
    assert jaccard(refine_mask(image, 0.55 + 0.4 * soft, "grabcut"), truth) > 0.9


@pytest.mark.parametrize("pixels", [1, 4])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("doubt", [0.0, 0.3])
def test_grabcut_with_almost_no_object_or_background(pixels, inverse, doubt):
    image, _, soft = scene()
    few = np.full_like(soft, doubt)
    few[64, 80 : 80 + pixels] = 1 - doubt
    few = 1 - few if inverse else few
    if doubt:  # by Otsu's threshold the same few pixels stand out, and they are still too few
        assert np.array_equal(refine_mask(image, few, "otsu"), few >= 0.5)
    assert np.array_equal(refine_mask(image, few), few >= 0.5)


def test_grabcut_never_loses_the_object():
    """Object and background of the same colour: nothing to cut along."""
    generator = np.random.default_rng(0)
    noise = generator.integers(100, 110, (60, 90, 3), dtype=np.uint8)
    _, _, soft = scene(90, 60)
    for image in (noise, np.full_like(noise, 128)):
        mask = refine_mask(image, soft * 0.85 + 0.06, sure_foreground=1.1)
        assert mask.sum() >= 0.1 * (soft * 0.85 + 0.06 >= 0.5).sum() > 0


@pytest.mark.parametrize("method", ["grabcut", "otsu", "none", pytest.param("crf", marks=needs_crf)])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (1, 50), (5, 4), (3, 2000)])
def test_tiny_and_extreme_images(method, size):
    generator = np.random.default_rng(5)
    image = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
    soft = generator.random(size, dtype=np.float32)
    mask = refine_mask(image, soft, method)
    assert mask.shape == size
    assert mask.dtype == bool


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p, s: (p, s.T), "height and width"),
        (lambda p, s: (p, s[None]), "height and width"),
        (lambda p, s: (p, np.where(s > 0.5, np.nan, s)), "not finite"),
        (lambda p, s: (p, np.where(s > 0.5, np.inf, s)), "not finite"),
        (lambda p, s: (p, s * 10 - 5), "sigmoid"),
        (lambda p, s: (p, (s * 255).astype(np.uint8)), "floating-point"),
        (lambda p, s: (p.astype(np.float32), s), "uint8"),
        (lambda p, s: (p[..., 0], s), "uint8"),
        (lambda p, s: (p.transpose(2, 0, 1), s), "uint8"),
        (lambda p, s: (p[:0], s[:0]), "uint8"),
    ],
)
@pytest.mark.parametrize("method", ["grabcut", "otsu", "none"])
def test_bad_input_is_named(change, words, method):
    image, _, soft = scene()
    with pytest.raises(InputError, match=words):
        refine_mask(*change(image, soft), method)


@pytest.mark.parametrize("threshold", [0.0, 0.01, 0.2, 0.8, 0.99, 1.0])
def test_grabcut_with_any_threshold(threshold):
    """Also with one that lies beyond what counts as sure."""
    image, truth, soft = scene()
    mask = refine_mask(image, (soft - 0.05) / 0.9, threshold=threshold)
    assert mask.shape == truth.shape
    if 0.1 < threshold < 0.9:
        assert jaccard(mask, truth) > 0.85
    faint = refine_mask(image, soft * 0.04, threshold=0.02)  # all of it is below what counts as sure background
    assert jaccard(faint, truth) > 0.5


def test_bad_options():
    image, _, soft = scene()
    with pytest.raises(InputError, match="grabcut, otsu, crf, none"):
        refine_mask(image, soft, "magic")
    with pytest.raises(InputError, match="iteration"):
        refine_mask(image, soft, iterations=0)
    with pytest.raises(InputError, match="working_size"):
        refine_mask(image, soft, working_size=0)


def test_a_missing_crf_says_what_to_install():
    """In a process where the package cannot be imported, whether it is installed here or not."""
    code = (
        "import sys; sys.modules['pydensecrf'] = None\n"
        "import numpy as np\n"
        "from macosnet_hf.errors import InputError\n"
        "from macosnet_hf.refinement import refine_mask\n"
        "try:\n"
        "    refine_mask(np.zeros((9, 9, 3), np.uint8), np.zeros((9, 9), np.float32), 'crf')\n"
        "except InputError as error:\n"
        "    print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install macosnet-hf[crf]" in result.stdout


def test_a_remote_checkpoint_demands_neither_opencv_nor_pydensecrf():
    """transformers reads the imports of code that travels with a model and refuses to load it where one is missing."""
    from transformers.dynamic_module_utils import get_imports

    from macosnet_hf import collection, mask_sharing, pipeline_macosnet, refinement

    assert set(get_imports(refinement.__file__)) <= {"__future__", "typing", "numpy", "PIL"}
    for module in (mask_sharing, collection, pipeline_macosnet):
        assert not {"cv2", "pydensecrf"} & set(get_imports(module.__file__)), module.__name__
    assert set(REFINEMENT_METHODS) == {"grabcut", "otsu", "crf", "none"}
