"""Coordinates, affine and thin-plate-spline transforms, warping: against plain loops in float64."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from macosnet_hf import geometry
from macosnet_hf.errors import InputError
from macosnet_hf.geometry import Transform

SIZES = [(7, 11), (11, 7), (5, 5)]


def random_affine(count: int, seed: int = 0, spread: float = 0.3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    return geometry.identity_affine(count, dtype=torch.float64) + spread * noise


def random_tps(count: int, seed: int = 0, spread: float = 0.15) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 100)
    noise = torch.randn(count, 18, generator=generator, dtype=torch.float64)
    return geometry.identity_tps(count, dtype=torch.float64) + spread * noise


def random_points(*shape: int, seed: int = 0, reach: float = 1.3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 200)
    return (2 * torch.rand(*shape, 2, generator=generator, dtype=torch.float64) - 1) * reach


# --- slow references: numbers and loops only ---


def reference_affine(point, parameters):
    x, y = point
    a, b, c, d, e, f = (float(value) for value in parameters)
    return a * x + b * y + c, d * x + e * y + f


def reference_tps(point, parameters, regularization=0.0):
    """Bookstein's spline, solved for this one transform; U(r) = r^2 log r^2."""
    axis = (-1.0, 0.0, 1.0)
    centres = [(axis[i], axis[j]) for i in range(3) for j in range(3)]

    def kernel(p, q):
        r2 = (p[0] - q[0]) ** 2 + (p[1] - q[1]) ** 2
        return r2 * math.log(r2) if r2 > 0 else 0.0

    system = np.zeros((12, 12))
    for m in range(9):
        for n in range(9):
            system[m, n] = kernel(centres[m], centres[n]) + (regularization if m == n else 0.0)
        for n, value in enumerate((1.0, *centres[m])):
            system[m, 9 + n] = system[9 + n, m] = value
    moved = np.zeros((12, 2))
    for m in range(9):
        moved[m] = float(parameters[m]), float(parameters[9 + m])
    weights = np.linalg.solve(system, moved)
    result = weights[9] + point[0] * weights[10] + point[1] * weights[11]
    for m in range(9):
        result = result + kernel(point, centres[m]) * weights[m]
    return tuple(result)


def reference_bilinear(image, x, y, padding_mode="zeros"):
    """Bilinear value at a normalised place; `image` is a nested list [row][column]."""
    height, width = len(image), len(image[0])
    column, row = (x + 1) / 2 * (width - 1), (y + 1) / 2 * (height - 1)
    if padding_mode == "border":
        column, row = min(max(column, 0), width - 1), min(max(row, 0), height - 1)
    left, top = math.floor(column), math.floor(row)
    value = 0.0
    for r, row_weight in ((top, 1 - (row - top)), (top + 1, row - top)):
        for c, column_weight in ((left, 1 - (column - left)), (left + 1, column - left)):
            if 0 <= r < height and 0 <= c < width:
                value += row_weight * column_weight * image[r][c]
    return value


# --- pixels and normalised coordinates ---


@pytest.mark.parametrize("size", [(30, 70), (1, 4000), (3000, 1), (240, 240), (64, 64)])
def test_points_of_an_image_are_those_of_its_half_pixel_resize(size):
    """The pixel x of an image lies at `(x + 0.5) * S / W - 0.5` of the network's input, whose corners are -1 and 1."""
    side, (height, width) = 64, size
    points = torch.tensor([[0.0, 0.0], [width - 1, 0], [0, height - 1], [width - 1, height - 1], [width / 3, 0.25]])
    expected = [
        [2 * ((x + 0.5) * side / width - 0.5) / (side - 1) - 1, 2 * ((y + 0.5) * side / height - 0.5) / (side - 1) - 1]
        for x, y in points.tolist()
    ]
    normalized = geometry.normalize_points(points, size, side)
    torch.testing.assert_close(normalized, torch.tensor(expected))
    torch.testing.assert_close(geometry.denormalize_points(normalized, size, side), points, atol=2e-3, rtol=0)
    # Relative coordinates: 0 and 1 are the outer edges, whatever the size.
    torch.testing.assert_close(
        geometry.relative_points(normalized, side), (points + 0.5) / torch.tensor([width, height])
    )
    edges = torch.tensor([[0.0, 1.0]])
    torch.testing.assert_close(geometry.relative_to_pixels(edges, size), torch.tensor([[-0.5, height - 0.5]]))
    torch.testing.assert_close(geometry.relative_points(geometry.normalize_relative(edges, side), side), edges)


def test_corner_centres_of_the_network_s_own_input_are_plus_and_minus_one():
    corners = torch.tensor([[0.0, 0.0], [63.0, 0.0], [0.0, 63.0], [31.5, 31.5]])
    expected = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [0.0, 0.0]])
    torch.testing.assert_close(geometry.normalize_points(corners, (64, 64), 64), expected)


def test_sizes_may_differ_within_a_batch_and_integers_are_accepted():
    sizes = torch.tensor([[11, 21], [101, 5]])
    points = torch.tensor([[[20, 10], [0, 5]], [[4, 100], [2, 25]]])
    normalized = geometry.normalize_points(points, sizes, 48)
    for row, size in enumerate(sizes.tolist()):
        torch.testing.assert_close(normalized[row], geometry.normalize_points(points[row], size, 48))
    torch.testing.assert_close(geometry.denormalize_points(normalized, sizes, 48), points.float(), atol=1e-4, rtol=0)
    # One point an image, no point dimension.
    torch.testing.assert_close(geometry.normalize_points(points[:, 0], sizes, 48), normalized[:, 0])


def test_one_pixel_side_stays_finite():
    points = torch.tensor([[0.0, 0.0]])
    there = geometry.normalize_points(points, (1, 1), 48)
    assert there.tolist() == [[0.0, 0.0]]
    torch.testing.assert_close(geometry.denormalize_points(there, (1, 1), 48), points)
    assert geometry.make_grid(1, 1).tolist() == [[[0.0, 0.0]]]


def test_size_must_have_two_entries():
    with pytest.raises(InputError, match="height, width"):
        geometry.normalize_points(torch.zeros(1, 2), (3, 4, 5), 48)


def test_grids_and_warps_of_images_of_any_size():
    """An image of another size than the network's input is sampled at the pixels where its content is."""
    generator = torch.Generator().manual_seed(6)
    image = torch.rand(1, 2, 9, 14, generator=generator)
    grid = geometry.Transform(geometry.identity_affine(1)).grid((9, 14), 32)
    pixels = torch.tensor([[float(x), float(y)] for y in range(9) for x in range(14)])
    expected = geometry.normalize_points(pixels, (9, 14), 32).view(1, 9, 14, 2)
    torch.testing.assert_close(grid, expected)
    torch.testing.assert_close(geometry.warp(image, grid, side=32), image, atol=1e-5, rtol=0)
    place = geometry.normalize_points(torch.tensor([[[[6.0, 2.5]]]]), (9, 14), 32)
    found = geometry.warp(image, place, side=32)
    torch.testing.assert_close(found[0, :, 0, 0], image[0, :, 2:4, 6].mean(-1))


@pytest.mark.parametrize("size", SIZES)
def test_grid_runs_row_by_row_with_x_first(size):
    height, width = size
    grid = geometry.make_grid(height, width, dtype=torch.float64)
    assert grid.shape == (height, width, 2)
    for row in range(height):
        for column in range(width):
            expected = [-1 + 2 * column / (width - 1), -1 + 2 * row / (height - 1)]
            assert grid[row, column].tolist() == pytest.approx(expected, abs=1e-12)


# --- affine ---


def test_affine_matches_the_loop_reference():
    points, affine = random_points(3, 5), random_affine(3)
    mapped = geometry.apply_affine(points, affine)
    for b in range(3):
        for n in range(5):
            assert mapped[b, n].tolist() == pytest.approx(reference_affine(points[b, n].tolist(), affine[b]), abs=1e-12)


def test_identity_affine_leaves_points_alone():
    points = random_points(2, 4)
    torch.testing.assert_close(geometry.apply_affine(points, geometry.identity_affine(2, dtype=torch.float64)), points)
    assert geometry.identity_affine(2, 3).shape == (2, 3, 6)


def test_composition_applies_the_inner_map_first():
    points, outer, inner = random_points(4, 6), random_affine(4, seed=1), random_affine(4, seed=2)
    composed = geometry.apply_affine(points, geometry.compose_affine(outer, inner))
    torch.testing.assert_close(composed, geometry.apply_affine(geometry.apply_affine(points, inner), outer))
    other = geometry.apply_affine(points, geometry.compose_affine(inner, outer))
    assert (composed - other).abs().max() > 0.01  # the order matters for these, so the test can tell


def test_inverse_undoes_the_map_on_both_sides():
    points, affine = random_points(4, 6), random_affine(4, seed=3)
    inverse = geometry.invert_affine(affine)
    for first, second in ((affine, inverse), (inverse, affine)):
        torch.testing.assert_close(geometry.apply_affine(geometry.apply_affine(points, first), second), points)
    assert geometry.invert_affine(random_affine(6).unflatten(0, (2, 3))).shape == (2, 3, 6)


@pytest.mark.parametrize("parameters", [[1, 2, 0, 2, 4, 0], [0, 0, 0, 0, 0, 0], [float("nan"), 0, 0, 0, 1, 0]])
def test_a_flat_affine_map_has_no_inverse(parameters):
    with pytest.raises(InputError, match="cannot be inverted"):
        geometry.invert_affine(torch.tensor([parameters], dtype=torch.float32))


# --- thin-plate spline ---


@pytest.mark.parametrize("regularization", [0.0, 0.2])
def test_tps_matches_an_independent_solve(regularization):
    points, tps = random_points(3, 7), random_tps(3)
    mapped = geometry.apply_tps(points, tps, regularization=regularization)
    for b in range(3):
        for n in range(7):
            expected = reference_tps(points[b, n].tolist(), tps[b], regularization)
            assert mapped[b, n].tolist() == pytest.approx(expected, abs=1e-10)


def test_tps_is_exact_beside_its_control_points():
    centres, tps = geometry.control_points(dtype=torch.float64), random_tps(1)
    for offset in (1e-1, 1e-2, 1e-3, 1e-6, 0.0):
        points = centres + torch.tensor([offset, -offset / 3], dtype=torch.float64)
        mapped = geometry.apply_tps(points[None], tps)[0]
        for n in range(9):
            assert mapped[n].tolist() == pytest.approx(reference_tps(points[n].tolist(), tps[0]), abs=1e-10)


def test_tps_in_float32_is_close_to_float64():
    points, tps = random_points(3, 50), random_tps(3)
    exact = geometry.apply_tps(points, tps)
    torch.testing.assert_close(geometry.apply_tps(points.float(), tps.float()).double(), exact, atol=2e-5, rtol=1e-5)


def test_control_points_run_with_x_slowest_and_parameters_hold_x_then_y():
    expected = [[-1, -1], [-1, 0], [-1, 1], [0, -1], [0, 0], [0, 1], [1, -1], [1, 0], [1, 1]]
    assert geometry.control_points().tolist() == expected
    assert geometry.identity_tps(1)[0].tolist() == [x for x, _ in expected] + [y for _, y in expected]


@pytest.mark.parametrize("k", range(9))
def test_each_parameter_moves_its_own_control_point(k):
    centres = geometry.control_points(dtype=torch.float64)
    for axis in (0, 1):
        tps = geometry.identity_tps(1, dtype=torch.float64)
        tps[0, 9 * axis + k] += 0.3
        expected = centres.clone()
        expected[k, axis] += 0.3
        torch.testing.assert_close(geometry.apply_tps(centres[None], tps)[0], expected)


def test_control_points_land_where_they_are_told_only_without_regularisation():
    centres, tps = geometry.control_points(dtype=torch.float64)[None].expand(3, -1, -1), random_tps(3)
    wanted = tps.unflatten(-1, (2, 9)).transpose(1, 2)
    torch.testing.assert_close(geometry.apply_tps(centres, tps), wanted)
    error = [
        (geometry.apply_tps(centres, tps, regularization=factor) - wanted).norm().item()
        for factor in (0.0, 0.2, 1, 1e6)
    ]
    assert error == sorted(error)
    assert error[1] > 1e-3


def test_infinite_regularisation_leaves_the_least_squares_affine_map():
    centres, tps = geometry.control_points(dtype=torch.float64), random_tps(1)
    wanted = tps[0].unflatten(-1, (2, 9)).T.numpy()
    design = np.concatenate((centres.numpy(), np.ones((9, 1))), axis=1)
    solution = np.linalg.lstsq(design, wanted, rcond=None)[0]
    mapped = geometry.apply_tps(centres[None], tps, regularization=1e9)[0]
    np.testing.assert_allclose(mapped.numpy(), design @ solution, atol=1e-6)


@pytest.mark.parametrize("regularization", [0.0, 0.2])
def test_identity_tps_is_the_identity_everywhere(regularization):
    points = random_points(2, 40, reach=3)
    identity = geometry.identity_tps(2, dtype=torch.float64)
    torch.testing.assert_close(geometry.apply_tps(points, identity, regularization=regularization), points)


def test_tps_contains_the_affine_maps():
    points, affine = random_points(3, 9), random_affine(3)
    centres = geometry.control_points(dtype=torch.float64)[None].expand(3, -1, -1)
    tps = geometry.apply_affine(centres, affine).transpose(1, 2).flatten(1)
    torch.testing.assert_close(geometry.apply_tps(points, tps), geometry.apply_affine(points, affine))


def test_tps_gradients_are_right_at_and_near_control_points():
    centres = geometry.control_points(dtype=torch.float64)[None]
    tps = random_tps(1).requires_grad_()
    near = (centres[:, :4] + 0.01).requires_grad_()
    assert torch.autograd.gradcheck(lambda p, t: geometry.apply_tps(p, t), (near, tps))
    at = centres.clone().float().requires_grad_()
    geometry.apply_tps(at, tps.detach().float()).square().sum().backward()
    assert torch.isfinite(at.grad).all()
    # The radial function is flat at its own centre, so the gradient there is the limit of the gradients nearby.
    beside = (centres.float() + 1e-4).requires_grad_()
    geometry.apply_tps(beside, tps.detach().float()).square().sum().backward()
    torch.testing.assert_close(at.grad, beside.grad, atol=2e-2, rtol=2e-2)


def test_other_control_grids_work_and_wrong_counts_are_refused():
    identity = geometry.identity_tps(1, grid_size=4, dtype=torch.float64)
    assert identity.shape == (1, 32)
    points = random_points(1, 5)
    torch.testing.assert_close(geometry.apply_tps(points, identity), points)
    for wrong in (torch.zeros(1, 17), torch.zeros(1, 2), torch.zeros(1, 0)):
        with pytest.raises(InputError, match="18 parameters"):
            geometry.apply_tps(points, wrong)
        with pytest.raises(InputError, match="18 parameters"):
            geometry.sampling_grid(geometry.identity_affine(1), wrong, size=(3, 3))
    with pytest.raises(InputError, match="6 parameters"):
        geometry.apply_affine(points, torch.zeros(1, 5))


def test_a_basis_from_inference_mode_serves_training():
    with torch.inference_mode():
        geometry.tps_basis(torch.zeros(1, 2), regularization=0.125)
    points = torch.full((1, 1, 2), 0.3, requires_grad=True)
    geometry.apply_tps(points, geometry.identity_tps(1), regularization=0.125).sum().backward()
    assert torch.isfinite(points.grad).all()


# --- transforms ---

SYMMETRY_NAMES = sorted(geometry.SYMMETRIES)


def random_transform(*shape: int, seed: int = 0, spline: bool = True, regularization: float = 0.1) -> Transform:
    count = math.prod(shape)
    affine = random_affine(count, seed)
    if not spline:
        return Transform(affine).unflatten(0, shape)
    return Transform(affine, random_tps(count, seed), regularization).unflatten(0, shape)


def reference_transform(point, transform: Transform) -> tuple[float, float]:
    """One transform at one point, in loops."""
    if transform.tps is not None:
        point = reference_tps(point, transform.tps, transform.regularization)
    return reference_affine(point, transform.affine)


def moved_by(name: str, point) -> tuple[float, float]:
    (a, b), (c, d) = geometry.SYMMETRIES[name]
    return a * point[0] + b * point[1], c * point[0] + d * point[1]


def inverse_of(name: str, point) -> tuple[float, float]:
    """The only one of the eight images of a point under the symmetries that R brings back to it."""
    found = [moved_by(other, point) for other in SYMMETRY_NAMES]
    return next(each for each in found if moved_by(name, each) == tuple(point))


@pytest.mark.parametrize("spline", [True, False])
def test_transform_applies_the_spline_and_then_the_affine_map_for_any_batch(spline):
    transform, points = random_transform(2, 3, spline=spline), random_points(2, 3, 4)
    mapped = transform.apply(points)
    assert transform.shape == (2, 3)
    for b, p, n in itertools.product(range(2), range(3), range(4)):
        expected = reference_transform(points[b, p, n].tolist(), transform[b, p])
        assert mapped[b, p, n].tolist() == pytest.approx(expected, abs=1e-10)
    # the same points for all, and one transform alone
    torch.testing.assert_close(transform.apply(points[0, 0])[1, 2], transform[1, 2].apply(points[0, 0]))
    grid = transform.grid((3, 5))
    assert grid.shape == (2, 3, 3, 5, 2)
    assert grid[1, 0, 2, 1].tolist() == pytest.approx(reference_transform((-0.5, 1.0), transform[1, 0]), abs=1e-10)
    torch.testing.assert_close(transform[1, 0].grid((3, 5)), grid[1, 0])


def test_autocast_does_not_round_coordinates():
    """A bfloat16 number near 1 is one of 128 steps: half a pixel at 240 pixels."""
    transform, points = random_transform(2).to(torch.float32), random_points(2, 50).float()
    expected = transform.apply(points)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (points @ points.transpose(1, 2)).dtype == torch.bfloat16  # autocast is at work
        assert torch.equal(transform.apply(points), expected)
        assert transform.grid((4, 5)).dtype == torch.float32
        moved = transform.compose_symmetry("turn_90", "source").affine
    assert torch.equal(moved, transform.compose_symmetry("turn_90", "source").affine)


def test_a_spline_without_its_regularisation_is_refused():
    affine, tps = random_affine(1), random_tps(1)
    with pytest.raises(InputError, match="regularisation"):
        Transform(affine, tps)
    with pytest.raises(AttributeError):
        Transform(affine).affine = affine
    assert Transform(affine, tps, 0.5).without_spline().tps is None


def test_the_regularisation_belongs_to_the_map():
    points, affine, tps = random_points(1, 5), random_affine(1), random_tps(1)
    plain, smooth = (Transform(affine, tps, factor).apply(points) for factor in (0.0, 0.5))
    assert (plain - smooth).abs().max() > 0.01
    torch.testing.assert_close(smooth, geometry.apply_cascade(points, affine, tps, regularization=0.5))
    basis = Transform(affine, tps, 0.5).basis(points)
    torch.testing.assert_close(basis, geometry.tps_basis(points, regularization=0.5))


def test_symmetries_are_the_eight_of_the_square_and_are_named_for_what_one_sees():
    matrices = {name: geometry.symmetry_matrix(name) for name in SYMMETRY_NAMES}
    assert len({tuple(matrix.flatten().tolist()) for matrix in matrices.values()}) == 8
    square = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    for matrix in matrices.values():
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(2))
        assert sorted((square @ matrix.T).tolist()) == sorted(square.tolist())
    # y points down: the right edge is brought to the bottom by a quarter turn clockwise
    assert (matrices["turn_90"] @ torch.tensor([1.0, 0.0])).tolist() == [0.0, 1.0]
    assert torch.equal(matrices["turn_90"] @ matrices["turn_90"], matrices["turn_180"])
    assert torch.equal(matrices["turn_180"] @ matrices["turn_90"], matrices["turn_270"])
    assert (matrices["mirror"] @ torch.tensor([1.0, 1.0])).tolist() == [-1.0, 1.0]
    assert (matrices["flip"] @ torch.tensor([1.0, 1.0])).tolist() == [1.0, -1.0]
    assert (matrices["transpose"] @ torch.tensor([1.0, 0.5])).tolist() == [0.5, 1.0]
    assert (matrices["anti_transpose"] @ torch.tensor([1.0, 0.5])).tolist() == [-0.5, -1.0]
    with pytest.raises(InputError, match="turn_90"):
        geometry.symmetry_matrix("twist")


@pytest.mark.parametrize("name", SYMMETRY_NAMES)
@pytest.mark.parametrize("spline", [True, False])
def test_composing_a_symmetry_is_moving_the_points(name, spline):
    transform, points = random_transform(3, spline=spline), random_points(3, 5)
    of_source = transform.compose_symmetry(name, "source")
    of_target = transform.compose_symmetry(name, "target")
    for b, n in itertools.product(range(3), range(5)):
        point = points[b, n].tolist()
        expected = moved_by(name, reference_transform(point, transform[b]))
        assert of_source.apply(points)[b, n].tolist() == pytest.approx(expected, abs=1e-10)
        expected = reference_transform(inverse_of(name, point), transform[b])
        assert of_target.apply(points)[b, n].tolist() == pytest.approx(expected, abs=1e-10)
    if spline:
        assert torch.equal(of_source.tps, transform.tps)
        assert torch.equal(of_target.tps.abs().sort().values, transform.tps.abs().sort().values)  # moved, not computed
        for side, composed in (("source", of_source), ("target", of_target)):
            alone = transform.without_spline().compose_symmetry(name, side)
            assert torch.equal(alone.affine, composed.without_spline().affine)
        assert of_source.regularization == of_target.regularization == transform.regularization


@pytest.mark.parametrize("name", SYMMETRY_NAMES)
def test_reflections_have_a_negative_determinant_and_pairs_stay_inverse(name):
    affine = random_affine(4, spread=0.1)
    there, back = Transform(affine), Transform(geometry.invert_affine(affine))
    (a, b), (c, d) = geometry.SYMMETRIES[name]
    sign = a * d - b * c
    assert (sign < 0) == (name in ("mirror", "flip", "transpose", "anti_transpose"))
    assert (there.determinant() > 0).all()
    for i in range(4):
        row = affine[i].tolist()
        assert there.determinant()[i].item() == pytest.approx(row[0] * row[4] - row[1] * row[3], abs=1e-12)
    seen_there, seen_back = there.compose_symmetry(name, "source"), back.compose_symmetry(name, "target")
    torch.testing.assert_close(seen_there.determinant(), sign * there.determinant())
    points = random_points(4, 6)
    torch.testing.assert_close(seen_back.apply(seen_there.apply(points)), points)


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("spline", [True, False])
def test_each_transform_of_a_batch_may_have_its_own_symmetry(side, spline):
    transform = random_transform(2, 8, spline=spline)
    matrices = torch.stack([geometry.symmetry_matrix(name) for name in SYMMETRY_NAMES])
    together = transform.compose_symmetry(matrices, side)
    across = transform[:, :1].compose_symmetry(matrices, side)  # one transform under each of the eight
    for b, (k, name) in itertools.product(range(2), enumerate(SYMMETRY_NAMES)):
        for found, of in ((together[b, k], transform[b, k]), (across[b, k], transform[b, 0])):
            alone = of.compose_symmetry(name, side)
            torch.testing.assert_close(found.apply(random_points(3)), alone.apply(random_points(3)))


def test_a_moved_source_looks_the_same_when_it_is_warped():
    """Warping A' by T_A'B is warping A by R T_A'B, where A shows at R p what A' shows at p."""
    generator = torch.Generator().manual_seed(8)
    seen = torch.rand(1, 2, 9, 9, generator=generator, dtype=torch.float64)  # A'
    transform = random_transform(1)
    expected = geometry.warp(seen, transform.grid((7, 5)))
    moved = {
        "turn_90": torch.rot90(seen, -1, (2, 3)),
        "turn_270": torch.rot90(seen, 1, (2, 3)),
        "turn_180": seen.flip(2, 3),
        "mirror": seen.flip(3),
        "flip": seen.flip(2),
        "transpose": seen.transpose(2, 3),
    }
    for name, source in moved.items():
        composed = transform.compose_symmetry(name, "source")
        torch.testing.assert_close(geometry.warp(source, composed.grid((7, 5))), expected)


def test_a_symmetry_on_no_known_side_is_refused():
    for wrong in ("left", ""):
        with pytest.raises(InputError, match="side"):
            random_transform(1).compose_symmetry("mirror", wrong)
    with pytest.raises(InputError, match="mirror"):
        random_transform(1).compose_symmetry("mirrored", "source")


def test_batches_of_transforms_are_cut_and_joined_like_tensors():
    transform = random_transform(2, 6)
    flat = transform.flatten(0, 1)
    assert flat.shape == (12,)
    assert torch.equal(flat.tps[7], transform.tps[1, 1])
    assert torch.equal(flat.unflatten(0, (2, 6)).affine, transform.affine)
    assert torch.equal(transform.flip(1)[:, 0].tps, transform.tps[:, 5])
    assert transform[:, [1, 0]].shape == (2, 2)
    assert torch.equal(Transform.stack([flat[0], flat[1]]).affine, flat.affine[:2])
    assert torch.equal(Transform.cat([flat[:3], flat[3:]]).tps, flat.tps)
    assert Transform.cat([flat[:3].without_spline(), flat[3:].without_spline()]).tps is None
    assert transform.to(torch.float32).tps.dtype == transform.to(torch.float32).affine.dtype == torch.float32
    learnt = Transform(flat.affine.clone().requires_grad_(), flat.tps.clone().requires_grad_(), 0.1)
    assert not learnt.detach().affine.requires_grad
    assert not learnt.detach().tps.requires_grad
    for result in (flat, transform.flip(0), transform[0], learnt.detach(), Transform.cat([flat, flat])):
        assert result.regularization == transform.regularization
    for wrong in (Transform(flat.affine, flat.tps, 0.2), flat.without_spline()):
        with pytest.raises(InputError, match="regularisation"):
            Transform.cat([flat, wrong])


def test_a_transform_is_a_pytree():
    transform = random_transform(2)
    leaves, spec = tree_flatten({"of": transform, "alone": transform.without_spline()})
    assert len(leaves) == 3
    again = tree_unflatten(leaves, spec)["of"]
    assert again.regularization == 0.1
    assert torch.equal(again.tps, transform.tps)
    doubled = tree_map(lambda leaf: 2 * leaf, transform)
    assert torch.equal(doubled.affine, 2 * transform.affine)
    assert torch.equal(doubled.tps, 2 * transform.tps)
    assert spec == tree_flatten({"of": doubled, "alone": doubled.without_spline()})[1]
    assert spec != tree_flatten({"of": Transform(doubled.affine, doubled.tps, 0.2), "alone": doubled})[1]


class _Carries(torch.nn.Module):
    def forward(self, transform: Transform, points: torch.Tensor) -> Transform:
        moved = transform.compose_symmetry("turn_90", "target").apply(points)
        return Transform(moved.new_zeros(len(moved), 6) + moved.mean(), transform.tps, transform.regularization)


def test_a_transform_goes_through_export_and_compile():
    transform, points, module = random_transform(2), random_points(2, 3), _Carries()
    expected = module(transform, points)
    exported = torch.export.export(module, (transform, points)).module()(transform, points)
    compiled = torch.compile(module, fullgraph=True, backend="eager")(transform, points)
    for found in (exported, compiled):
        assert found.regularization == 0.1
        torch.testing.assert_close(found.affine, expected.affine)
        torch.testing.assert_close(found.tps, expected.tps)


# --- cascade and warping ---


def test_cascade_is_tps_first_then_affine():
    points, affine, tps = random_points(2, 6), random_affine(2), random_tps(2)
    mapped = geometry.apply_cascade(points, affine, tps)
    for b in range(2):
        for n in range(6):
            expected = reference_affine(reference_tps(points[b, n].tolist(), tps[b]), affine[b])
            assert mapped[b, n].tolist() == pytest.approx(expected, abs=1e-10)
    torch.testing.assert_close(geometry.apply_cascade(points, affine), geometry.apply_affine(points, affine))


@pytest.mark.parametrize("regularization", [0.0, 0.2])
@pytest.mark.parametrize("size", SIZES)
def test_sampling_grid_is_the_cascade_of_every_pixel(size, regularization):
    affine, tps = random_affine(3), random_tps(3)
    grid = geometry.sampling_grid(affine, tps, size=size, regularization=regularization)
    assert grid.shape == (3, *size, 2)
    pixels = geometry.make_grid(*size, dtype=torch.float64).reshape(1, -1, 2).expand(3, -1, -1)
    expected = geometry.apply_cascade(pixels, affine, tps, regularization=regularization)
    torch.testing.assert_close(grid.flatten(1, 2), expected)
    alone = geometry.sampling_grid(affine, size=size)
    torch.testing.assert_close(alone.flatten(1, 2), geometry.apply_affine(pixels, affine))


@pytest.mark.parametrize("padding_mode", ["zeros", "border"])
@pytest.mark.parametrize(("source_size", "target_size"), [((5, 9), (7, 4)), ((8, 3), (3, 8))])
def test_warp_matches_the_loop_reference(source_size, target_size, padding_mode):
    generator = torch.Generator().manual_seed(5)
    source = torch.rand(2, 2, *source_size, generator=generator, dtype=torch.float64)
    affine, tps = random_affine(2), random_tps(2)
    warped = geometry.warp(source, geometry.sampling_grid(affine, tps, size=target_size), padding_mode=padding_mode)
    assert warped.shape == (2, 2, *target_size)
    height, width = target_size
    for b in range(2):
        for row in range(height):
            for column in range(width):
                target = (-1 + 2 * column / (width - 1), -1 + 2 * row / (height - 1))
                x, y = reference_affine(reference_tps(target, tps[b]), affine[b])
                for c in range(2):
                    expected = reference_bilinear(source[b, c].tolist(), x, y, padding_mode)
                    assert warped[b, c, row, column].item() == pytest.approx(expected, abs=1e-10)


def test_direction_a_dot_in_the_source_appears_where_the_transform_brings_it_from():
    """T_AB maps points of B into A: warp(A, T_AB) looks like B, and a keypoint of B goes to A through T_AB."""
    source = torch.zeros(1, 1, 41, 81)
    source[0, 0, 10, 60] = 1.0  # x = 60, y = 10
    dot = geometry.normalize_points(torch.tensor([[[60.0, 10.0]]]), (41, 81), 240)
    # B shows A's content moved by (-0.5, +0.25): a point of B lies in A at its own place plus (0.5, -0.25).
    transform = torch.tensor([[1, 0, 0.5, 0, 1, -0.25]])
    target = geometry.warp(source, geometry.Transform(transform).grid((41, 81), 240), side=240)
    row, column = divmod(int(target.argmax()), 81)
    assert (column, row) == (60 - 20, 10 + 5)
    in_target = geometry.normalize_points(torch.tensor([[[float(column), float(row)]]]), (41, 81), 240)
    # A quarter of A's width is 20.25 pixels.
    torch.testing.assert_close(geometry.apply_affine(in_target, transform), dot, atol=0.02, rtol=0)
    torch.testing.assert_close(
        geometry.apply_affine(dot, geometry.invert_affine(transform)), in_target, atol=0.02, rtol=0
    )


def test_the_identity_warp_returns_the_image():
    generator = torch.Generator().manual_seed(6)
    image = torch.rand(2, 3, 9, 14, generator=generator)
    grid = geometry.sampling_grid(geometry.identity_affine(2), geometry.identity_tps(2), size=(9, 14))
    torch.testing.assert_close(geometry.warp(image, grid, padding_mode="border"), image, atol=1e-5, rtol=0)


def test_warp_nearest_keeps_labels_and_the_dtype():
    image = torch.arange(12.0).reshape(1, 1, 3, 4).to(torch.bfloat16)
    grid = geometry.sampling_grid(torch.tensor([[1, 0, 0.05, 0, 1, 0.05]]), size=(3, 4))
    nearest = geometry.warp(image, grid, mode="nearest", padding_mode="border")
    assert nearest.dtype == torch.bfloat16
    assert torch.equal(nearest, image)


def test_half_precision_parameters_are_raised_and_float64_stays():
    points = torch.rand(1, 3, 2)
    half = geometry.identity_affine(1).half()
    assert geometry.apply_affine(points, half).dtype == torch.float32
    assert geometry.apply_tps(points, geometry.identity_tps(1).bfloat16()).dtype == torch.float32
    assert geometry.normalize_points(points.half(), (5, 5), 48).dtype == torch.float32
    assert geometry.sampling_grid(half, geometry.identity_tps(1).half(), size=(2, 2)).dtype == torch.float32
    assert geometry.apply_affine(points.double(), half.double()).dtype == torch.float64


def test_gradients_reach_both_stages_and_the_image():
    image = torch.rand(1, 2, 6, 5, dtype=torch.float64, requires_grad=True)
    affine, tps = random_affine(1, spread=0.1).requires_grad_(), random_tps(1, spread=0.05).requires_grad_()
    geometry.warp(image, geometry.sampling_grid(affine, tps, size=(7, 4))).square().sum().backward()
    for tensor in (image, affine, tps):
        assert torch.isfinite(tensor.grad).all()
        assert tensor.grad.abs().max() > 0


def test_samples_at_points_match_the_loop_reference():
    generator = torch.Generator().manual_seed(7)
    features = torch.rand(2, 3, 4, 6, generator=generator, dtype=torch.float64)
    points = random_points(2, 5)
    for padding_mode in ("border", "zeros"):
        sampled = geometry.sample_at(features, points, padding_mode=padding_mode)
        assert sampled.shape == (2, 5, 3)
        for b in range(2):
            for n in range(5):
                for c in range(3):
                    expected = reference_bilinear(features[b, c].tolist(), *points[b, n].tolist(), padding_mode)
                    assert sampled[b, n, c].item() == pytest.approx(expected, abs=1e-10)


def test_inside_counts_the_border_and_a_margin():
    points = torch.tensor([[0.0, 0.0], [1.0, -1.0], [1.01, 0.0], [0.0, -1.2]])
    assert geometry.inside(points).tolist() == [True, True, False, False]
    assert geometry.inside(points, margin=0.1).tolist() == [True, True, True, False]


def test_folded_tells_sane_transforms_from_torn_ones():
    affine, tps = geometry.identity_affine(6), geometry.identity_tps(6)
    affine[1, 0] = -1  # mirrored as a whole
    tps[5, :9] *= -1  # inside out, compared with its affine part
    affine[2, 3:5] = 0  # flattened on to a line
    tps[3, [0, 1, 2]], tps[3, [3, 4, 5]] = tps[3, [3, 4, 5]], tps[3, [0, 1, 2]]  # left and middle columns swapped
    affine[4] = torch.tensor([0.0, -1, 0, 1, 0, 0])  # a quarter turn
    share = geometry.folded(Transform(affine, tps, 0.0))
    assert share[0] == 0
    assert share[1] == 0
    assert share[2] == 1
    assert 0.1 < share[3] < 0.9
    assert share[4] == 0
    assert share[5] == 1
    torn = Transform(affine, tps, 0.0)[3:4].compose_symmetry("mirror", "source")
    assert geometry.folded(torn) == share[3]
    assert geometry.folded(Transform(affine * float("nan"))).tolist() == [1.0] * 6
    gentle = Transform(random_affine(5, spread=0.05), random_tps(5, spread=0.03), 0.0)
    assert geometry.folded(gentle).tolist() == [0.0] * 5
    assert geometry.folded(gentle.unflatten(0, (5, 1))).shape == (5, 1)


@pytest.mark.parametrize("padding_mode", ["border", "zeros", "reflection"])
def test_corner_weights_sample_as_warp_does(padding_mode):
    generator = torch.Generator().manual_seed(5)
    image = torch.randn(2, 3, 5, 7, generator=generator, dtype=torch.float64)
    inner = torch.rand(2, 60, 2, generator=generator, dtype=torch.float64) * 2 - 1
    outer = torch.randn(2, 60, 2, generator=generator, dtype=torch.float64) * 3
    corners = torch.tensor([[-1.0, -1], [1, 1], [0, 1], [1.0001, 0], [-1.2, 1.2]], dtype=torch.float64).expand(
        2, -1, -1
    )
    points = torch.cat((inner, outer, corners), dim=1)
    index, weights = geometry.corner_weights(points, (5, 7), padding_mode=padding_mode)
    assert index.min() >= 0
    assert index.max() < 35
    values = image.flatten(2).transpose(1, 2)
    found = torch.stack([(values[b][index[b]] * weights[b].unsqueeze(-1)).sum(1) for b in range(2)])
    torch.testing.assert_close(found, geometry.sample_at(image, points, padding_mode=padding_mode))
    if padding_mode != "zeros":
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_corner_weights_of_senseless_points_stay_within_the_map():
    points = torch.tensor([[[float("nan"), 0.0], [float("inf"), 0.0], [1e30, -1e30], [0.0, float("-inf")]]])
    for padding_mode in ("border", "zeros"):
        index, weights = geometry.corner_weights(points, (4, 6), padding_mode=padding_mode)
        assert index.min() >= 0
        assert index.max() < 24
        assert torch.isfinite(weights).all()
