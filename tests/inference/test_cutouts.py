"""Cutouts: the matte against dense references, its size and colours, and what the style may be."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from macosnet_hf import InputError
from macosnet_hf.inference.cutouts import (
    CutoutStyle,
    MattingLaplacian,
    alpha_matte,
    cutout_by_alpha,
    make_cutout,
    solve_matte,
)

EPSILON = 1e-4


def dense_laplacian(rgb: np.ndarray) -> np.ndarray:
    """Levin's matrix, window by window: the quadratic form of what a linear function of the colours leaves over."""
    height, width = rgb.shape[:2]
    matrix = np.zeros((height * width,) * 2)
    for y in range(height):
        for x in range(width):
            rows, columns = range(max(0, y - 1), min(height, y + 2)), range(max(0, x - 1), min(width, x + 2))
            places = [v * width + u for v in rows for u in columns]
            colors = rgb.reshape(-1, 3)[places].astype(np.float64)
            design = np.hstack((colors, np.ones((len(places), 1))))
            ridge = np.diag([EPSILON * len(places)] * 3 + [0])
            left_over = np.eye(len(places)) - design @ np.linalg.solve(design.T @ design + ridge, design.T)
            matrix[np.ix_(places, places)] += left_over
    return matrix


@pytest.fixture
def colors() -> np.ndarray:
    noise = np.random.default_rng(0).random((9, 11, 3)).astype(np.float32)
    noise[3:6, 3:6] = noise[3, 3]  # where the covariance is singular
    return noise


def test_the_laplacian_against_the_dense_matrix(colors):
    values = np.random.default_rng(1).random(colors.shape[:2]).astype(np.float32)
    expected = (dense_laplacian(colors) @ values.ravel()).reshape(values.shape)
    np.testing.assert_allclose(MattingLaplacian(colors, epsilon=EPSILON)(values), expected, atol=2e-3)


def test_the_matte_against_a_dense_solution(colors):
    generator = np.random.default_rng(2)
    known = (generator.random(colors.shape[:2]) > 0.5).astype(np.float32)
    unknown = generator.random(known.shape) > 0.5
    weight = generator.uniform(0.05, 0.2, known.shape).astype(np.float32)
    system = dense_laplacian(colors) + np.diag(weight.ravel())
    free = unknown.ravel()
    right = weight.ravel() * known.ravel() - dense_laplacian(colors)[:, ~free] @ known.ravel()[~free]
    expected = known.ravel().astype(np.float64)
    expected[free] = np.linalg.solve(system[np.ix_(free, free)], right[free])
    found = solve_matte(MattingLaplacian(colors, epsilon=EPSILON), known, unknown, weight)
    np.testing.assert_allclose(found.ravel(), expected.clip(0, 1), atol=1e-2)
    np.testing.assert_array_equal(found[~unknown], known[~unknown])


def blended(side: int) -> tuple[Image.Image, np.ndarray, np.ndarray, np.ndarray]:
    """A disc with a wide soft edge before another colour: image, true alpha, soft mask, the disc's own colours."""
    rows, columns = (np.mgrid[:side, :side] + 0.5) / side - 0.5
    alpha = ((0.3 - np.hypot(rows, columns)) * 40 + 0.5).clip(0, 1)
    front = np.stack((200 + 40 * rows, 80 + 60 * columns, 40 + 0 * rows), axis=-1)
    back = np.stack((30 + 0 * rows, 60 + 40 * rows, 160 + 60 * columns), axis=-1)
    image = front * alpha[..., None] + back * (1 - alpha[..., None])
    rough = Image.fromarray(((alpha > 0.5) * 255).astype(np.uint8)).resize((60, 60), Image.Resampling.BOX)
    soft = np.asarray(rough.filter(ImageFilter.GaussianBlur(1)), np.float32) / 255
    return Image.fromarray(image.round().astype(np.uint8)), alpha, soft, front


def test_what_a_cubic_filter_overshoots_is_clipped():
    """An alpha of 1.1 in eight bits was almost 0: holes along the inside of the object's edge."""
    image, truth, *_ = blended(240)
    small = Image.fromarray((truth > 0.5).astype(np.float32)).resize((60, 60), Image.Resampling.BOX)
    alpha = np.asarray(small.resize(image.size, Image.Resampling.BICUBIC))
    assert alpha.max() > 1.02
    assert alpha.min() < -0.02
    for made in (lambda values: np.asarray(cutout_by_alpha(image, values)), lambda values: alpha_matte(image, values)):
        np.testing.assert_array_equal(made(alpha), made(alpha.clip(0, 1)))
        for wrong in (alpha * 255, alpha - 1, np.where(alpha > 0.5, np.nan, alpha)):
            with pytest.raises(InputError, match=r"in \[0, 1\]"):
                made(wrong.astype(np.float32))


@pytest.mark.parametrize("side", [240, 1600])  # as it is, and reduced: the matte is enlarged along the colours
def test_alpha_and_colors_of_a_soft_edge(side):
    image, truth, soft, front = blended(side)
    alpha = alpha_matte(image, soft)
    assert alpha.shape == truth.shape
    assert alpha.dtype == np.float32
    edge = (truth > 0) & (truth < 1)
    hard = np.abs((truth > 0.5) - truth)[edge].mean()
    assert np.abs(alpha - truth)[edge].mean() < 0.4 * hard
    assert np.abs(alpha - truth)[~edge].mean() < 0.005
    cut = np.asarray(cutout_by_alpha(image, alpha)).astype(float)
    np.testing.assert_array_equal(cut[alpha == 0], np.broadcast_to([255, 255, 255, 0], cut[alpha == 0].shape))
    half = (truth > 0.3) & (truth < 0.9) & (alpha > 0.1)
    kept = np.abs(np.asarray(image).astype(float) - front)[half].mean()  # without an estimate of the colours
    assert np.abs(cut[..., :3] - front)[half].mean() < 0.35 * kept


def test_masks_without_an_edge():
    image = blended(60)[0]
    empty, full = np.zeros((20, 20), np.float32), np.ones((20, 20), np.float32)
    assert not alpha_matte(image, empty).any()
    assert (alpha_matte(image, full) == 1).all()
    nothing = make_cutout(image, empty, np.zeros((60, 60), bool), CutoutStyle(trim=True))
    assert nothing.size == image.size
    assert nothing.getchannel("A").getextrema() == (0, 0)
    np.testing.assert_array_equal(np.asarray(cutout_by_alpha(image, alpha_matte(image, full)))[..., :3], image)


def test_one_pixel():
    image = Image.new("RGB", (1, 1), "red")
    assert make_cutout(image, np.ones((240, 240), np.float32), np.ones((1, 1), bool)).getpixel((0, 0)) == (
        255,
        0,
        0,
        255,
    )


@pytest.mark.parametrize("edges", ["matting", "hard"])
def test_trim_and_backgrounds(edges, tmp_path):
    image, _, soft, _ = blended(200)
    mask = np.asarray(Image.fromarray(soft).resize((200, 200))) >= 0.5
    whole = make_cutout(image, soft, mask, CutoutStyle(edges))
    trimmed = make_cutout(image, soft, mask, CutoutStyle(edges, trim=True))
    assert trimmed.size == whole.crop(whole.getchannel("A").getbbox()).size < (150, 150)
    on_color = make_cutout(image, soft, mask, CutoutStyle(edges, background="#ff8800"))
    assert on_color.mode == "RGB"
    assert on_color.getpixel((0, 0)) == (255, 136, 0)
    on_blur = make_cutout(image, soft, mask, CutoutStyle(edges, trim=True, background="blur"))
    assert on_blur.size == trimmed.size
    for kind in ("png", "webp"):
        CutoutStyle(format=kind).save(whole, tmp_path / f"cut.{kind}")
        stored = Image.open(tmp_path / f"cut.{kind}")
        assert stored.format == kind.upper()
        assert stored.info["icc_profile"]
        np.testing.assert_array_equal(np.asarray(stored)[..., 3], np.asarray(whole)[..., 3])
        seen = np.asarray(whole)[..., 3] > 0
        np.testing.assert_array_equal(np.asarray(stored)[seen], np.asarray(whole)[seen])


def test_styles_that_are_none(tmp_path):
    for wrong in ({"edges": "ragged"}, {"format": "jpeg"}, {"background": "no colour"}, {"background": ""}):
        with pytest.raises(InputError, match=repr(*wrong.values())):
            CutoutStyle(**wrong)
    with pytest.raises(InputError, match="16383 pixels"):
        CutoutStyle(format="webp").save(Image.new("RGBA", (16_384, 1)), tmp_path / "wide.webp")
    assert not list(tmp_path.iterdir())
