"""Images for people: geometry, colours and sizes of what is drawn, on real images."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw
from real_photos import PHOTOS

from macosnet_hf.drawing import (
    OBJECT_COLOR,
    cutout,
    draw_matches,
    on_checkerboard,
    overlay_mask,
    overlay_parts,
    overlay_similarity,
    overview,
    position_colors,
)
from macosnet_hf.errors import InputError
from macosnet_hf.images import as_upright_rgb, upright_rgb


@pytest.fixture(scope="module")
def cheetah() -> Image.Image:
    """502 x 343."""
    with Image.open(PHOTOS / "cheetah.jpg") as image:
        return image.convert("RGB")


@pytest.fixture(scope="module")
def tower() -> Image.Image:
    """377 x 600."""
    with Image.open(PHOTOS / "tower.jpg") as image:
        return image.convert("RGB")


def ellipse(image: Image.Image) -> np.ndarray:
    y, x = np.mgrid[: image.height, : image.width]
    return ((x - image.width * 0.4) / (image.width * 0.3)) ** 2 + (
        (y - image.height * 0.6) / (image.height * 0.2)
    ) ** 2 < 1


def plain(width: int, height: int, color=(90, 90, 90)) -> Image.Image:
    return Image.new("RGB", (width, height), color)


def changed(drawn: Image.Image, blank: Image.Image) -> np.ndarray:
    """`(H, W)` where two images differ."""
    return np.abs(np.asarray(drawn, dtype=int) - np.asarray(blank, dtype=int)).sum(-1) > 0


# ---------------------------------------------------------------------------------------------------------------------
# Matches
# ---------------------------------------------------------------------------------------------------------------------


def test_matches_that_are_not_to_be_relied_on_are_faint(cheetah, tower):
    """Everything that is drawn, lines as dots, changes the images by a quarter of what it otherwise does."""
    ends = [[100, 50], [400, 300]], [[50, 100], [300, 550]]
    nothing = np.asarray(draw_matches(cheetah, tower, [], []), dtype=float)
    bright, faint = (np.asarray(draw_matches(cheetah, tower, *ends, faint=each), dtype=float) for each in (False, True))
    drawn = np.abs(bright - nothing) > 60
    assert drawn.sum() > 500
    np.testing.assert_allclose((faint - nothing)[drawn], 0.25 * (bright - nothing)[drawn], atol=2)


def test_matches_on_images(cheetah, tower):
    canvas = draw_matches(cheetah, tower, [[100, 50], [400, 300]], [[50, 100], [300, 550]])
    assert canvas.mode == "RGB"
    assert canvas.height == 600, "both are shown at the greater height"
    assert canvas.width == pytest.approx(600 * (502 / 343 + 377 / 600) + 16, abs=2)


@pytest.mark.parametrize("side", [0, 1])
def test_dots_stand_on_their_points(side):
    """Images of different, non-square sizes, each with a marked pixel: the dot's middle must be the mark's."""
    sizes = [(400, 200), (150, 320)]
    marks = [(350, 20), (12, 290)]
    blanks = [plain(*size) for size in sizes]
    marked = [image.copy() for image in blanks]
    marked[side].paste((255, 0, 0), (marks[side][0] - 3, marks[side][1] - 3, marks[side][0] + 4, marks[side][1] + 4))
    where_mark = changed(draw_matches(*marked, [], []), draw_matches(*blanks, [], []))
    mark = np.argwhere(where_mark).mean(0)

    drawn = draw_matches(*blanks, [marks[0]], [marks[1]])
    where = changed(drawn, draw_matches(*blanks, [], []))
    columns = np.flatnonzero(where.any(0))
    # The dots are the ends of what was drawn: the outer edge is one radius away from the middle.
    radius = 1.55 * max(2.6, drawn.height / 130)
    middle = columns[0] + radius if side == 0 else columns[-1] + 1 - radius
    assert middle - 0.5 == pytest.approx(mark[1], abs=1.0)
    end = where[:, columns[0] : columns[0] + 4] if side == 0 else where[:, columns[-1] - 3 : columns[-1] + 1]
    assert np.argwhere(end)[:, 0].mean() == pytest.approx(mark[0], abs=1.0)


def test_lines_run_across_both_images():
    source, target = plain(300, 300), plain(300, 300)
    where = changed(draw_matches(source, target, [[50, 150]], [[250, 150]]), draw_matches(source, target, [], []))
    height, width = where.shape
    assert where[height // 2 - 3 : height // 2 + 4, width // 2].any(), "the line crosses the gap"
    assert not where[: height // 2 - 20].any(), "and is horizontal"


def test_points_outside_and_nan_are_left_out():
    source, target = plain(300, 200), plain(200, 300)
    blank = draw_matches(source, target, [], [])
    outside = [[-0.6, 10], [299.6, 10], [10, 199.6], [10, 10], [np.nan, 10]]
    partners = [[10, 10], [10, 10], [10, 10], [199.6, 10], [10, 10]]
    assert not changed(draw_matches(source, target, outside, partners), blank).any()
    corners = [[0, 0], [299, 199]], [[199, 299], [0, 0]]
    assert changed(draw_matches(source, target, *corners), blank).any()


def test_no_points_draw_the_images_alone(cheetah, tower):
    canvas = draw_matches(cheetah, tower, np.zeros((0, 2)), np.zeros((0, 2)), scores=[])
    left = cheetah.resize((round(600 * 502 / 343), 600), Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(canvas, dtype=int)[:, : left.width] - np.asarray(left, dtype=int)).mean() < 2


def test_at_most_max_matches_spread_over_the_object():
    y, x = np.mgrid[20:280:14j, 20:280:14j]
    points = np.stack((x.ravel(), y.ravel()), axis=-1)
    source, target = plain(300, 300), plain(300, 300)
    few = draw_matches(source, target, points, points, max_matches=4)
    all_ = draw_matches(source, target, points, points, max_matches=None)
    blank = draw_matches(source, target, [], [])
    assert 0 < changed(few, blank).sum() < 0.2 * changed(all_, blank).sum()
    left = np.argwhere(changed(few, blank)[:, :480])
    assert np.ptp(left, axis=0).min() > 0.75 * 480, "four of 196 points reach over the whole square"


def test_good_scores_are_preferred():
    points = np.array([[50.0, 50.0], [52.0, 50.0], [250.0, 250.0], [252.0, 250.0]])
    scores = np.array([0.9, 0.1, 0.1, 0.9])
    source, target = plain(300, 300), plain(300, 300)
    chosen = draw_matches(source, target, points, points, scores, max_matches=2)
    expected = draw_matches(source, target, points[[0, 3]], points[[0, 3]], scores[[0, 3]])
    assert not changed(chosen, expected).any()


def test_drawing_is_deterministic_and_leaves_its_input(cheetah, tower):
    before = np.asarray(cheetah).copy()
    points = np.random.default_rng(0).uniform(0, 340, (80, 2))
    first, second = (draw_matches(cheetah, tower, points, points, max_matches=20) for _ in range(2))
    assert not changed(first, second).any()
    assert np.array_equal(np.asarray(cheetah), before)


def test_colours_follow_the_direction_from_the_middle():
    points = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [-10.0, 0.0], [0.0, -10.0]])
    colors = position_colors(points)
    assert len(set(colors)) == 5
    assert min(colors[0]) > min(colors[1]), "the middle is paler"
    assert colors[1] == (255, 0, 0)
    near, far = position_colors(np.array([[0.0, 0], [10, 0], [10, 0.5], [-10, 0]]))[1:3], colors[3]
    assert np.abs(np.subtract(*near)).sum() < np.abs(np.subtract(near[0], far)).sum()
    assert position_colors(np.zeros((0, 2)) + 1) == []
    assert len(position_colors(np.ones((3, 2)))) == 3


@pytest.mark.parametrize(("size", "other"), [((5000, 3), (300, 400)), ((3, 5000), (5000, 3)), ((2, 2), (2, 2))])
def test_extreme_aspects(size, other):
    canvas = draw_matches(plain(*size), plain(*other), [[1, 1]], [[1, 1]])
    assert 1 <= canvas.height <= 720
    assert canvas.width <= 1600


@pytest.mark.parametrize("max_width", [200, 800, 1600])
def test_wide_images_keep_the_maximal_width(max_width):
    assert draw_matches(plain(4000, 2000), plain(4000, 2000), [], [], max_width=max_width).width <= max_width


@pytest.mark.parametrize(
    "arguments",
    [
        ([[1, 2]], [[1, 2], [3, 4]], None),
        ([[1, 2, 3]], [[1, 2, 3]], None),
        ([1, 2], [1, 2], None),
        ([[1, 2]], [[1, 2]], [1.0, 2.0]),
        ([[1, 2]], [[1, 2]], [-1.0]),
        ([[1, 2]], [[1, 2]], [np.nan]),
    ],
)
def test_matches_of_the_wrong_shape(arguments):
    with pytest.raises(InputError):
        draw_matches(plain(20, 20), plain(20, 20), *arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------------------------------------------------


def test_overlay_tints_the_object_and_nothing_else(cheetah):
    mask = ellipse(cheetah)
    before = np.asarray(cheetah, dtype=int)
    after = np.asarray(overlay_mask(cheetah, mask, alpha=0.5, contour=False), dtype=int)
    assert np.array_equal(after[~mask], before[~mask])
    assert np.abs(after[mask] - (before[mask] + np.array(OBJECT_COLOR)) / 2).max() <= 1


def test_overlay_outlines_the_edge(cheetah):
    mask = ellipse(cheetah)
    without = np.asarray(overlay_mask(cheetah, mask, contour=False), dtype=int)
    with_contour = np.asarray(overlay_mask(cheetah, mask), dtype=int)
    line = np.abs(with_contour - without).sum(-1) > 30
    edge = np.zeros_like(mask)
    edge[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    edge[1:] |= mask[1:] != mask[:-1]
    assert line[edge].mean() > 0.95
    near = np.asarray(Image.fromarray(edge).convert("L").resize(cheetah.size)) > 0
    for _ in range(6):  # every changed pixel is within six steps of the edge
        grown = near.copy()
        grown[1:] |= near[:-1]
        grown[:-1] |= near[1:]
        grown[:, 1:] |= near[:, :-1]
        grown[:, :-1] |= near[:, 1:]
        near = grown
    assert not line[~near].any()


def test_fading_takes_the_colour_out_of_the_background(cheetah):
    mask = ellipse(cheetah)
    faded = np.asarray(overlay_mask(cheetah, mask, alpha=0, fade=1.0, contour=False), dtype=int)
    assert np.array_equal(faded[mask], np.asarray(cheetah)[mask])
    assert np.ptp(faded[~mask], axis=-1).max() == 0


@pytest.mark.parametrize("value", [False, True])
def test_overlay_of_an_empty_and_a_full_mask(cheetah, value):
    mask = np.full((cheetah.height, cheetah.width), value)
    result = overlay_mask(cheetah, mask, alpha=0.3)
    assert changed(result, cheetah).any() == value


def test_cutout_has_alpha_and_hides_the_background(cheetah):
    mask = ellipse(cheetah)
    cut = np.asarray(cutout(cheetah, mask))
    assert cut.shape == (343, 502, 4)
    assert (cut[~mask] == (255, 255, 255, 0)).all(), "nothing of the background stays in the file"
    inner = mask.copy()
    for _ in range(3):
        inner[1:-1, 1:-1] &= inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:]
    assert (cut[inner, 3] == 255).all()
    assert np.array_equal(cut[inner][:, :3], np.asarray(cheetah)[inner])
    assert (cut[mask, 3] > 100).all(), "the soft edge takes nothing away"
    assert len(np.unique(cut[mask, 3])) > 3
    hard = np.asarray(cutout(cheetah, mask, feather=0))
    assert np.array_equal(hard[..., 3] == 255, mask)
    assert set(np.unique(hard[..., 3])) == {0, 255}


def test_cutout_keeps_thin_parts():
    mask = np.zeros((40, 60), bool)
    mask[20] = True
    assert (np.asarray(cutout(plain(60, 40), mask))[20, :, 3] > 80).all()


def test_checkerboard_shows_through_where_the_cutout_is_transparent(cheetah):
    mask = ellipse(cheetah)
    board = np.asarray(on_checkerboard(cutout(cheetah, mask, feather=0)))
    assert np.array_equal(board[mask], np.asarray(cheetah)[mask])
    assert set(np.unique(board[~mask])) == {226, 255}


@pytest.mark.parametrize("function", [overlay_mask, cutout, lambda image, mask: overview([image], [mask])])
def test_masks_that_do_not_fit(cheetah, function):
    with pytest.raises(InputError, match="height and width"):
        function(cheetah, np.zeros((cheetah.width, cheetah.height), bool))  # transposed
    with pytest.raises(InputError, match="must be bool"):
        function(cheetah, np.zeros((cheetah.height, cheetah.width)))


@pytest.mark.parametrize("options", [{"alpha": 1.5}, {"alpha": -0.1}, {"fade": 2}])
def test_overlay_options_out_of_range(cheetah, options):
    with pytest.raises(InputError):
        overlay_mask(cheetah, ellipse(cheetah), **options)


# ---------------------------------------------------------------------------------------------------------------------
# Contact sheet
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5, 23])
def test_overview_of_any_number(cheetah, tower, count):
    images = [(cheetah, tower)[k % 2] for k in range(count)]
    sheet = overview(images, [ellipse(image) for image in images], [f"image {k}.jpg" for k in range(count)])
    assert sheet.mode == "RGB"
    assert sheet.width <= 1600
    assert sheet.width > 150


def test_overview_shows_photo_cutout_and_label(cheetah):
    mask = ellipse(cheetah)
    photo_only = overview([cheetah])
    with_mask = overview([cheetah], [mask])
    with_label = overview([cheetah], [mask], ["cheetah.jpg"])
    assert photo_only.height < with_mask.height < with_label.height
    label = np.asarray(with_label)[with_mask.height - 10 :]
    assert (label < 120).any(), "there is dark text below the images"
    lower = np.asarray(with_mask)[with_mask.height // 2 + 10 : -20, 20:-20].reshape(-1, 3)
    assert (lower == 226).all(-1).any(), "and a checkerboard behind the cutout"


def test_overview_labels_may_be_anything(cheetah):
    labels = ["", "x" * 500, "two\nlines", "猫と犬.jpg"]
    sheet = overview([cheetah] * 4, [ellipse(cheetah)] * 4, labels)
    assert sheet.width <= 1600


def test_overview_marks_odd_ones(cheetah):
    def red(sheet):
        values = np.asarray(sheet, int)
        return (values == (185, 28, 28)).all(-1)

    masks, labels = [ellipse(cheetah)] * 2, ["a.jpg", "b.jpg"]
    assert not red(overview([cheetah] * 2, masks, labels)).any()
    marked = red(overview([cheetah] * 2, masks, labels, odd=[1]))
    half = marked.shape[1] // 2
    assert not marked[:, : half - 8].any()
    assert marked[:, half:].sum() > 1000


def test_heat_is_bright_where_something_is_similar(cheetah):
    similarity = np.zeros((4, 8))
    similarity[1, 6] = 0.5
    shown = overlay_similarity(cheetah, similarity, alpha=1)
    assert shown.size == cheetah.size
    grey = np.asarray(shown.convert("L"), float)
    row, column = np.unravel_index(grey.argmax(), grey.shape)
    assert abs((column + 0.5) / grey.shape[1] - 6.5 / 8) < 0.07
    assert abs((row + 0.5) / grey.shape[0] - 1.5 / 4) < 0.13
    assert grey[:, : grey.shape[1] // 2].max() < 10
    assert overlay_similarity(cheetah, np.ones((3, 3))).size == cheetah.size  # nothing differs
    for wrong in (np.zeros(3), np.full((2, 2), np.nan), np.zeros((0, 2))):
        with pytest.raises(InputError, match="similarity map"):
            overlay_similarity(cheetah, wrong)


def test_parts_are_coloured_on_the_object_alone(cheetah):
    mask = np.zeros(cheetah.size[::-1], bool)
    mask[:, : cheetah.width // 2] = True
    colors = np.zeros((2, 2, 3))
    colors[..., 0] = 1
    shown = np.asarray(overlay_parts(cheetah, colors, mask, alpha=1), int)
    assert (shown[mask] == (255, 0, 0)).all()
    outside = shown[~mask]
    assert np.ptp(outside, axis=1).mean() < np.ptp(np.asarray(cheetah, int)[~mask], axis=1).mean()  # faded
    with pytest.raises(InputError):
        overlay_parts(cheetah, colors, mask[:-1])
    # Beyond 1, as of a cubic filter, they are no other colours.
    over = overlay_parts(cheetah, np.where(colors > 0, 1.05, -0.05), mask, alpha=1)
    np.testing.assert_array_equal(np.asarray(over), shown)
    with pytest.raises(InputError, match="Colours must be"):
        overlay_parts(cheetah, 255 * colors, mask)


def test_overview_of_extreme_images():
    images = [plain(5000, 3), plain(3, 5000), plain(2, 2)]
    masks = [np.ones((3, 5000), bool), np.zeros((5000, 3), bool), np.eye(2, dtype=bool)]
    assert overview(images, masks).width <= 1600


@pytest.mark.parametrize(
    "arguments", [([],), ([plain(9, 9)], []), ([plain(9, 9)], None, ["a", "b"]), ([np.zeros((9, 9))],)]
)
def test_overview_of_lists_that_do_not_fit(arguments):
    with pytest.raises(InputError):
        overview(*arguments)


# ---------------------------------------------------------------------------------------------------------------------
# The module
# ---------------------------------------------------------------------------------------------------------------------


def test_upright_rgb_does_not_change_its_input():
    image = Image.new("RGB", (30, 20))
    ImageDraw.Draw(image).rectangle((0, 0, 5, 5), fill="red")
    image.getexif()[0x0112] = 6
    turned = upright_rgb(image)
    assert turned.size == (20, 30)
    assert turned.getpixel((19, 0)) == (255, 0, 0), "orientation 6 turns clockwise"
    assert image.size == (30, 20)
    assert image.getexif()[0x0112] == 6
    assert upright_rgb(turned).size == (20, 30), "and it happens once"


def test_an_upright_rgb_image_is_looked_at_without_a_copy(tmp_path):
    plain_one = Image.new("RGB", (30, 20), "red")
    assert as_upright_rgb(plain_one) is plain_one
    with Image.open(PHOTOS / "lion.jpg") as file:
        assert as_upright_rgb(file) is file
        np.testing.assert_array_equal(np.asarray(as_upright_rgb(file)), np.asarray(upright_rgb(file)))
    turned = plain_one.copy()
    turned.getexif()[0x0112] = 6
    with_transparency = plain_one.copy()
    with_transparency.info["transparency"] = (255, 0, 0)
    for image in (turned, with_transparency, plain_one.convert("L"), plain_one.convert("RGBA")):
        seen = as_upright_rgb(image)
        assert seen is not image
        np.testing.assert_array_equal(np.asarray(seen), np.asarray(upright_rgb(image)))


def test_nothing_that_draws_changes_its_images(cheetah):
    """They are looked at without a copy; an image of the very size that is drawn is the hard case."""
    before, mask = np.array(cheetah), ellipse(cheetah)
    fitting = cheetah.resize((300, 300))
    fitting_before = np.array(fitting)
    draw_matches(cheetah, fitting, [[5, 5]], [[6, 6]])
    sheet = overview([cheetah, fitting], [mask, np.ones((300, 300), bool)], ["a", "b"])
    overview([fitting])
    for alpha in (0, 0.35, 1):
        overlaid = overlay_mask(cheetah, mask, alpha=alpha, fade=0.5)
        assert overlaid is not cheetah
    cutout(cheetah, mask)
    np.testing.assert_array_equal(np.asarray(cheetah), before)
    np.testing.assert_array_equal(np.asarray(fitting), fitting_before)
    assert sheet.width > 300


def test_drawing_is_light_to_import():
    code = (
        "import sys, macosnet_hf.drawing, macosnet_hf.io.image_files; "
        "print({'torch', 'cv2', 'transformers'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
