"""Transforms (affine, thin-plate spline), points, sampling grids and warps. The only file that knows coordinates.

Conventions (fixed: converted weights depend on them)
-----------------------------------------------------
* A point is `(x, y)`, x to the right, y down, in the last dimension.
* *Pixel* coordinates run from 0 to W-1 and 0 to H-1, whole numbers at the **centres** of pixels.
* *Relative* coordinates run from 0 to 1 between the **outer edges** of the image: `(x + 0.5) / W`. A resize to any size
  leaves them alone, for PIL, OpenCV and torch (`align_corners=False`) resize with half-pixel centres.
* *Normalised* coordinates are those of the network, which sees every image at S x S: -1 and +1 are the **centres of the
  corner pixels of that input** (`align_corners=True` within the network). Hence, for an image of any width W,
  `u = ((2 x + 1) / W - 1) * S / (S - 1)`: [`normalize_points`]. Functions that take `side` mean S.
* A transform `T_AB` of an ordered pair (A, B) maps **points of B into A**. Hence `warp(A, T_AB.grid(size_of_B))`
  samples A and looks like B (the paper's "T_AB warps A onto B"), a keypoint of B goes to A through `T_AB`, and a
  keypoint of A goes to B through `T_BA`. [`Transform`] holds its parameters.
* An affine transform is 6 numbers, a row-major 2x3 matrix; the identity is `[1, 0, 0, 0, 1, 0]`.
* A thin-plate spline (TPS) is 18 numbers: the 9 x and then the 9 y of the moved control points of a 3x3 grid on
  [-1, 1]^2. Control point k = 3 i + j starts at `(x, y) = (a[i], a[j])` with `a = (-1, 0, 1)`: x varies slowest, as in
  all published checkpoints of this line of work.
* The cascade is affine after TPS: a point of B goes through the TPS, then through the affine, to reach A.

Half-precision parameters are raised to float32: a bf16 coordinate is wrong by several pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import GetAttrKey, register_pytree_node
from transformers.utils.generic import maybe_autocast

from .errors import InputError

AFFINE_PARAMETERS = 6
TPS_GRID_SIZE = 3
TPS_PARAMETERS = 2 * TPS_GRID_SIZE**2


def _as_float(tensor: Tensor) -> Tensor:
    """Raises integers and half precision to float32; float32 and float64 stay as they are."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def on_device(values: Any, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers, an array or a tensor as a tensor on a device, without waiting for the device.

    A plain copy from main memory to a GPU waits until the GPU has done all that it was asked to do before: a forward
    pass that makes its constants that way stands still a dozen times.
    """
    there = isinstance(values, Tensor) and values.device.type != "cpu"
    if there or device is None or torch.device(device).type != "cuda":
        return torch.as_tensor(values, dtype=dtype, device=device)
    return torch.as_tensor(values, dtype=dtype, device="cpu").to(device, non_blocking=True)


# ---------------------------------------------------------------------------------------------------------------------
# Pixels and normalised coordinates
# ---------------------------------------------------------------------------------------------------------------------


def _extent(size: Tensor | Sequence[int], points: Tensor) -> Tensor:
    """`(height, width)` as `(W, H)`, broadcast against the points."""
    size = on_device(size, points.device, points.dtype)
    if size.shape[-1] != 2:
        raise InputError(f"An image size must be (height, width); got a tensor of shape {tuple(size.shape)}.")
    extent = size.flip(-1)
    while extent.dim() > 1 and extent.dim() < points.dim():
        extent = extent.unsqueeze(-2)
    return extent


def check_sizes(image_sizes: Any, batch: int, views: int) -> Tensor:
    """Sizes (height, width) of the images of a batch as a tensor `(batch, views, 2)`.

    Raises:
        InputError: if they have another shape.
    """
    sizes = torch.as_tensor(image_sizes)
    if tuple(sizes.shape) != (batch, views, 2):
        raise InputError(f"image_sizes must be ({batch}, {views}, 2) as (height, width); got {tuple(sizes.shape)}.")
    return sizes


def normalize_points(points: Tensor, size: Tensor | Sequence[int], side: int) -> Tensor:
    """Pixels of an image to normalised coordinates: `u = ((2 x + 1) / W - 1) * S / (S - 1)`.

    Args:
        points: `(..., 2)` as (x, y) in pixels, 0 is the centre of the first pixel.
        size: `(height, width)`, or a tensor `(B, 2)` of them for points `(B, ..., 2)`.
        side: S of the network.

    Returns:
        `(..., 2)`; the outer half of the border's pixels may lie a little beyond [-1, 1].
    """
    points = _as_float(points)
    return normalize_relative((points + 0.5) / _extent(size, points), side)


def denormalize_points(points: Tensor, size: Tensor | Sequence[int], side: int) -> Tensor:
    """Normalised coordinates to pixels; the inverse of [`normalize_points`], with the same shapes."""
    return relative_to_pixels(relative_points(points, side), size)


def relative_points(points: Tensor, side: int) -> Tensor:
    """Normalised coordinates `(..., 2)` to relative ones: 0 and 1 are the outer edges of the image."""
    return (_as_float(points) * ((side - 1) / side) + 1) / 2


def normalize_relative(points: Tensor, side: int) -> Tensor:
    """Relative coordinates `(..., 2)` to normalised ones; the inverse of [`relative_points`]."""
    return (2 * _as_float(points) - 1) * (side / (side - 1))


def relative_to_pixels(points: Tensor, size: Tensor | Sequence[int]) -> Tensor:
    """Relative coordinates to pixels, `x = W r - 0.5`; shapes as in [`normalize_points`]."""
    points = _as_float(points)
    return points * _extent(size, points) - 0.5


def cell_centres(side: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Centres `(side**2, 2)` of the cells of a square grid over the network's input, row by row, normalised.

    They stay clear of the image's corners, where no object's point is worth a match.
    """
    axis = (2 * torch.arange(side, device=device, dtype=dtype) + 1) / side - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack((x, y), dim=-1).reshape(-1, 2)


def make_grid(
    height: int,
    width: int,
    *,
    side: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Normalised coordinates of every pixel centre: `(height, width, 2)`, row by row.

    Args:
        height, width: of one of the network's own maps, whose corner centres are -1 and +1; or, with `side`, of an
            image.
        side: S of the network that sees the image.
    """

    def axis(count: int) -> Tensor:
        if side is not None:
            centres = torch.arange(count, device=device, dtype=dtype or torch.get_default_dtype()) + 0.5
            return normalize_relative(centres / count, side)
        return torch.linspace(-1, 1, count, device=device, dtype=dtype) if count > 1 else torch.zeros(1, device=device)

    ys, xs = axis(height), axis(width)
    y, x = torch.meshgrid(ys.to(dtype or ys.dtype), xs.to(dtype or xs.dtype), indexing="ij")
    return torch.stack((x, y), dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Affine
# ---------------------------------------------------------------------------------------------------------------------


def identity_affine(
    *batch_shape: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """`(*batch_shape, 6)` identity affine parameters."""
    identity = on_device([1.0, 0.0, 0.0, 0.0, 1.0, 0.0], device, dtype)
    return identity.expand(*batch_shape, AFFINE_PARAMETERS).clone()


def _affine_matrix(affine: Tensor) -> Tensor:
    if affine.shape[-1] != AFFINE_PARAMETERS:
        raise InputError(f"An affine transform has 6 parameters; got a tensor of shape {tuple(affine.shape)}.")
    return _as_float(affine).unflatten(-1, (2, 3))


def apply_affine(points: Tensor, affine: Tensor) -> Tensor:
    """Maps points `(B, N, 2)` through affine parameters `(B, 6)`; normalised coordinates in and out."""
    matrix = _affine_matrix(affine)
    points = points.to(matrix.dtype)
    return points @ matrix[..., :2].transpose(-1, -2) + matrix[..., 2].unsqueeze(-2)


def compose_affine(outer: Tensor, inner: Tensor) -> Tensor:
    """Parameters `(..., 6)` of `outer(inner(p))`."""
    a, b = _affine_matrix(outer), _affine_matrix(inner)
    linear = a[..., :2] @ b[..., :2]
    shift = a[..., :2] @ b[..., 2:] + a[..., 2:]
    return torch.cat((linear, shift), dim=-1).flatten(-2)


def invert_affine(affine: Tensor) -> Tensor:
    """Parameters `(..., 6)` of the inverse map.

    Raises:
        InputError: if a transform is singular (its determinant is zero or not finite).
    """
    matrix = _affine_matrix(affine)
    a, b, tx = matrix[..., 0, 0], matrix[..., 0, 1], matrix[..., 0, 2]
    c, d, ty = matrix[..., 1, 0], matrix[..., 1, 1], matrix[..., 1, 2]
    determinant = a * d - b * c
    if not bool((determinant.abs() > torch.finfo(matrix.dtype).tiny).all()):
        raise InputError("An affine transform that flattens the image (determinant 0) cannot be inverted.")
    rows = (d, -b, b * ty - d * tx, -c, a, c * tx - a * ty)
    return torch.stack(rows, dim=-1) / determinant.unsqueeze(-1)


# ---------------------------------------------------------------------------------------------------------------------
# Thin-plate spline
# ---------------------------------------------------------------------------------------------------------------------


def control_points(
    grid_size: int = TPS_GRID_SIZE, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Resting positions `(grid_size**2, 2)` of the TPS control points, x varying slowest (see the module's text)."""
    axis = torch.linspace(-1, 1, grid_size, device=device, dtype=dtype)
    x, y = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack((x.flatten(), y.flatten()), dim=-1)


def identity_tps(
    *batch_shape: int,
    grid_size: int = TPS_GRID_SIZE,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`(*batch_shape, 18)` parameters that leave every control point where it is."""
    identity = control_points(grid_size, device=device, dtype=dtype).t().flatten()
    return identity.expand(*batch_shape, identity.numel()).clone()


@functools.lru_cache(maxsize=16)
def _tps_system(grid_size: int, regularization: float) -> tuple[tuple[float, ...], ...]:
    """First n columns of the inverse of the TPS system `[[K + reg I, P], [P^T, 0]]`, n = grid_size**2, as plain
    numbers.

    Bookstein, "Principal warps" (1989), with `U(r) = r^2 log r^2`. Row k < n gives the weight of the radial function
    at control point k, the last three rows the affine part (constant, x, y), both as a linear function of the moved
    control points. Stored as Python floats: a tensor made in one inference mode, device or dtype must not leak into
    another.
    """
    axis = np.linspace(-1.0, 1.0, grid_size)
    x, y = (grid.reshape(-1) for grid in np.meshgrid(axis, axis, indexing="ij"))
    count = grid_size**2
    distance2 = (x[:, None] - x[None]) ** 2 + (y[:, None] - y[None]) ** 2
    kernel = distance2 * np.log(np.where(distance2 == 0, 1.0, distance2)) + regularization * np.eye(count)
    polynomial = np.stack((np.ones(count), x, y), axis=1)
    system = np.block([[kernel, polynomial], [polynomial.T, np.zeros((3, 3))]])
    return tuple(map(tuple, np.linalg.inv(system)[:, :count].tolist()))


@torch.compiler.assume_constant_result  # torch.compile cannot look into numpy, and need not
def _constant_tps_system(grid_size: int, regularization: float) -> tuple[tuple[float, ...], ...]:
    return _tps_system(grid_size, regularization)


def tps_basis(points: Tensor, *, grid_size: int = TPS_GRID_SIZE, regularization: float = 0.0) -> Tensor:
    """How much each control point moves each point: `(..., 2)` normalised points to `(..., grid_size**2)` weights.

    A TPS is linear in its control points: the mapped point is `basis @ moved_control_points`.
    """
    points = _as_float(points)
    system = on_device(_constant_tps_system(grid_size, float(regularization)), points.device, points.dtype)
    centres = control_points(grid_size, device=points.device, dtype=points.dtype)
    distance2 = (points.unsqueeze(-2) - centres).square().sum(-1)
    # The limit of r^2 log r^2 at 0 is 0, and so is its gradient; the floor keeps autograd from 0 * inf.
    radial = distance2 * distance2.clamp(min=torch.finfo(points.dtype).tiny).log()
    affine_part = torch.cat((torch.ones_like(points[..., :1]), points), dim=-1)
    return torch.cat((radial, affine_part), dim=-1) @ system


def _grid_size(tps: Tensor) -> int:
    """Side of the control grid that parameters `(..., 2 n)` are of."""
    grid_size = round((tps.shape[-1] / 2) ** 0.5)
    if 2 * grid_size**2 != tps.shape[-1] or grid_size < 2:
        raise InputError(f"A 3x3 thin-plate spline has 18 parameters; got a tensor of shape {tuple(tps.shape)}.")
    return grid_size


def apply_tps(points: Tensor, tps: Tensor, *, regularization: float = 0.0) -> Tensor:
    """Maps points `(B, N, 2)` through TPS parameters `(B, 2 n)`; normalised coordinates in and out."""
    tps = _as_float(tps)
    grid_size = _grid_size(tps)
    basis = tps_basis(points.to(tps.dtype), grid_size=grid_size, regularization=regularization)
    return basis @ tps.unflatten(-1, (2, grid_size**2)).transpose(-1, -2)


# ---------------------------------------------------------------------------------------------------------------------
# Transforms
# ---------------------------------------------------------------------------------------------------------------------

# The eight symmetries of the square: the matrices R that map the square [-1, 1]^2 to itself, acting on (x, y) with y
# down. An image moved by R shows at R p what it showed at p; turns are clockwise as one sees them.
SYMMETRIES: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "identity": ((1, 0), (0, 1)),
    "turn_90": ((0, -1), (1, 0)),
    "turn_180": ((-1, 0), (0, -1)),
    "turn_270": ((0, 1), (-1, 0)),
    "mirror": ((-1, 0), (0, 1)),
    "flip": ((1, 0), (0, -1)),
    "transpose": ((0, 1), (1, 0)),
    "anti_transpose": ((0, -1), (-1, 0)),
}


@dataclass(frozen=True, eq=False)
class Transform:
    """Transforms `T_AB` of a batch of ordered pairs: normalised points of B into A, by a spline, then an affine map.

    A pytree whose leaves are `affine` and, where there is one, `tps`.

    Args:
        affine (`(..., 6)`): row-major 2x3 matrices.
        tps (`(..., 18)`, *optional*): thin-plate splines; `None` for affine maps alone.
        regularization (`float`): regularisation factor that the splines' parameters are meant with. A transform with a
            spline must say it: the same parameters are another map under another factor.

    Raises:
        InputError: for splines without their regularisation factor.
    """

    affine: Tensor
    tps: Tensor | None = None
    regularization: float | None = None

    def __post_init__(self) -> None:
        if self.tps is not None and self.regularization is None:
            raise InputError("A transform with a thin-plate spline needs the spline's regularisation factor.")

    @property
    def shape(self) -> torch.Size:
        """Batch dimensions."""
        return self.affine.shape[:-1]

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.affine.device

    @property
    def dtype(self) -> torch.dtype:
        """In which points are computed: float32, or float64 where the parameters have it."""
        return self.affine.dtype if self.affine.dtype == torch.float64 else torch.float32

    def apply(self, points: Tensor) -> Tensor:
        """Points `(..., N, 2)` of B in A, normalised; batch dimensions broadcast. Autocast does not reach in here."""
        with maybe_autocast(self.device.type, enabled=False):
            if self.tps is not None:
                points = apply_tps(points, self.tps, regularization=self.regularization or 0.0)
            return apply_affine(points, self.affine)

    def grid(self, size: Sequence[int], side: int | None = None) -> Tensor:
        """Where each pixel of B lies in A: `(..., height, width, 2)` for `size = (height, width)` of B, normalised.

        `side` as in [`make_grid`]: given where B is an image, not one of the network's maps.
        """
        height, width = int(size[0]), int(size[1])
        pixels = make_grid(height, width, side=side, device=self.device, dtype=self.dtype)
        # Batch dimensions of one, so that the spline's basis is computed once for all transforms.
        pixels = pixels.reshape(*[1] * len(self.shape), height * width, 2)
        return self.apply(pixels).unflatten(-2, (height, width))

    def basis(self, points: Tensor) -> Tensor:
        """Weights of the splines' control points at points `(..., 2)`, see [`tps_basis`]."""
        return tps_basis(points, regularization=self.regularization or 0.0)

    def determinant(self) -> Tensor:
        """Determinants `(...)` of the affine parts: ratios of areas, negative where a transform mirrors."""
        matrix = _affine_matrix(self.affine)
        return matrix[..., 0, 0] * matrix[..., 1, 1] - matrix[..., 0, 1] * matrix[..., 1, 0]

    def compose_symmetry(self, symmetry: str | Tensor, side: str) -> Transform:
        """The transform of a pair, from that of the pair with one image moved by a symmetry R of the square. Exact.

        * `side="source"`: this is T_A'B with `x_A = R x_A'`; gives `T_AB = R T_A'B`.
        * `side="target"`: this is T_BA' with `x_A = R x_A'`; gives `T_BA = T_BA' R^-1`. The affine part takes R^-1 in,
          so that it says by itself which way a pair faces: `A S R^-1 = (A R^-1) (R S R^-1)`, and a spline S between a
          symmetry of its square control grid and the inverse is such a spline again.

        Args:
            symmetry: one of [`SYMMETRIES`] by name, or matrices `(..., 2, 2)` of it, one for each transform.
            side: which of both images was moved: `"source"` or `"target"`.

        Raises:
            InputError: for an unknown name or side.
        """
        turn = symmetry_matrix(symmetry) if isinstance(symmetry, str) else symmetry
        turn = on_device(turn, self.device, self.dtype)
        shape = torch.broadcast_shapes(self.shape, turn.shape[:-2])
        whole = self._each(lambda values: values.expand(*shape, values.shape[-1]))
        matrix = _affine_matrix(whole.affine)
        if side not in ("source", "target"):
            raise InputError(f"side must be 'source' or 'target'; got {side!r}.")
        with maybe_autocast(self.device.type, enabled=False):
            if side == "source":
                return replace(whole, affine=(turn @ matrix).flatten(-2))
            # R is orthogonal: its inverse is its transpose.
            linear = matrix[..., :2] @ turn.transpose(-1, -2)
            affine = torch.cat((linear, matrix[..., 2:]), dim=-1).flatten(-2)
        if whole.tps is None:
            return Transform(affine)
        grid_size = _grid_size(whole.tps)
        # Control point k takes the value of the one that rests at R^-1 c_k, moved by R; with points as rows, R^-1 c is
        # c R.
        origins = control_points(grid_size, device=self.device, dtype=self.dtype) @ turn
        column, row = ((origins + 1) * (grid_size - 1) / 2).round().long().unbind(-1)
        values = whole.tps.unflatten(-1, (2, -1))
        index = (column * grid_size + row).unsqueeze(-2).expand(values.shape)
        with maybe_autocast(self.device.type, enabled=False):
            values = turn.to(values.dtype) @ values.gather(-1, index)
        return replace(whole, affine=affine, tps=values.flatten(-2))

    # Batches. Dimensions are those of the batch; the parameters come last and are never touched.

    def __getitem__(self, index: Any) -> Transform:
        return self._each(lambda values: values[index])

    def flatten(self, first: int, last: int) -> Transform:
        """Batch dimensions `first` to `last` as one."""
        return self._each(lambda values: values.flatten(first, last))

    def unflatten(self, dim: int, sizes: Sequence[int]) -> Transform:
        """Batch dimension `dim` as several."""
        return self._each(lambda values: values.unflatten(dim, tuple(sizes)))

    def flip(self, dim: int) -> Transform:
        """Batch dimension `dim` in reverse order."""
        return self._each(lambda values: values.flip(dim))

    @staticmethod
    def stack(transforms: Iterable[Transform], dim: int = 0) -> Transform:
        """Transforms of one regularisation along a new batch dimension."""
        return _joined(list(transforms), lambda values: torch.stack(values, dim))

    @staticmethod
    def cat(transforms: Iterable[Transform], dim: int = 0) -> Transform:
        """Transforms of one regularisation along a batch dimension."""
        return _joined(list(transforms), lambda values: torch.cat(values, dim))

    def without_spline(self) -> Transform:
        """The affine part alone."""
        return Transform(self.affine)

    def detach(self) -> Transform:
        """The same without a graph."""
        return self._each(Tensor.detach)

    def to(self, *args: Any, **kwargs: Any) -> Transform:
        """On another device or in another dtype, as `Tensor.to`."""
        return self._each(lambda values: values.to(*args, **kwargs))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Transform:
        return replace(self, affine=change(self.affine), tps=None if self.tps is None else change(self.tps))


def _joined(transforms: list[Transform], join: Callable[[list[Tensor]], Tensor]) -> Transform:
    if len({(each.tps is None, each.regularization) for each in transforms}) != 1:
        raise InputError("Only transforms of one kind and one regularisation make a batch.")
    splines = [each.tps for each in transforms if each.tps is not None]
    return Transform(
        join([each.affine for each in transforms]), join(splines) if splines else None, transforms[0].regularization
    )


def _leaves(transform: Transform) -> tuple[list[Tensor], float | None]:
    leaves = [transform.affine] if transform.tps is None else [transform.affine, transform.tps]
    return leaves, transform.regularization


def _keyed_leaves(transform: Transform) -> tuple[list[tuple[Any, Tensor]], float | None]:
    leaves, regularization = _leaves(transform)
    return list(zip((GetAttrKey("affine"), GetAttrKey("tps")), leaves, strict=False)), regularization


register_pytree_node(
    Transform,
    _leaves,
    lambda leaves, regularization: Transform(*leaves, regularization=regularization),  # type: ignore[misc]
    serialized_type_name=f"{__name__}.Transform",
    flatten_with_keys_fn=_keyed_leaves,
)


def symmetry_matrix(name: str) -> Tensor:
    """`(2, 2)` float32 matrix R of one of [`SYMMETRIES`].

    Raises:
        InputError: if there is none of that name.
    """
    return torch.tensor(_symmetry(name), dtype=torch.float32)


def _symmetry(name: str) -> tuple[tuple[int, int], tuple[int, int]]:
    if name not in SYMMETRIES:
        raise InputError(f"The symmetries of the square are {', '.join(SYMMETRIES)}; got {name!r}.")
    return SYMMETRIES[name]


def inverse_symmetry(name: str) -> str:
    """Name of the inverse of one of [`SYMMETRIES`]."""
    return next(other for other in SYMMETRIES if compose_symmetries(other, name) == "identity")


def is_mirror(name: str) -> bool:
    """Whether one of [`SYMMETRIES`] mirrors: whether its determinant is negative."""
    (a, b), (c, d) = SYMMETRIES[name]
    return a * d - b * c < 0


def compose_symmetries(outer: str, inner: str) -> str:
    """Name of the symmetry `outer(inner(p))` of two of [`SYMMETRIES`]."""
    product = (np.array(_symmetry(outer)) @ np.array(_symmetry(inner))).tolist()
    return next(name for name, matrix in SYMMETRIES.items() if [list(row) for row in matrix] == product)


def seen_through(maps: Tensor, symmetry: str) -> Tensor:
    """Maps `(..., S, S)` of an image seen through a symmetry R of the square: they show at p what these show at R p.

    Of an image A it is A' of [`Transform.compose_symmetry`], `x_A = R x_A'`. No value changes, they only move.

    Raises:
        InputError: if there is no such symmetry.
    """
    (a, b), (c, d) = _symmetry(symmetry)
    maps = maps.transpose(-1, -2) if b else maps
    # A row or column of R has one entry, and x runs along the last dimension.
    moved = [dim for dim, sign in ((-1, a + c), (-2, b + d)) if sign < 0]
    return maps.flip(moved) if moved else maps


def folded(transform: Transform, *, samples: int = 12) -> Tensor:
    """Share of the grid's cells that transforms flatten or turn inside out: `(...)` in [0, 1]; 0 is sane.

    Inside out is what the affine part as a whole does not do: a mirrored pair's transform mirrors every cell.
    """
    grid = transform.grid((samples, samples))
    right = grid[..., :-1, 1:, :] - grid[..., :-1, :-1, :]
    down = grid[..., 1:, :-1, :] - grid[..., :-1, :-1, :]
    area = right[..., 0] * down[..., 1] - right[..., 1] * down[..., 0]
    # Not `area <= 0`: a transform that is not a number is no sane one either.
    return (~(area * transform.determinant().sign()[..., None, None] > 0)).float().mean(dim=(-2, -1))


def apply_cascade(points: Tensor, affine: Tensor, tps: Tensor | None = None, *, regularization: float = 0.0) -> Tensor:
    """[`Transform.apply`] under its name of version 0.1."""
    return Transform(affine, tps, regularization).apply(points)


def sampling_grid(
    affine: Tensor, tps: Tensor | None = None, *, size: Sequence[int], regularization: float = 0.0
) -> Tensor:
    """[`Transform.grid`] under its name of version 0.1."""
    return Transform(affine, tps, regularization).grid(size)


# ---------------------------------------------------------------------------------------------------------------------
# Warping and sampling
# ---------------------------------------------------------------------------------------------------------------------


def warp(
    image: Tensor, grid: Tensor, *, side: int | None = None, mode: str = "bilinear", padding_mode: str = "zeros"
) -> Tensor:
    """Samples A at the places where B's pixels lie: `warp(A, T_AB.grid(size))` looks like B.

    Args:
        image: `(B, C, H, W)` image, feature map or mask of A.
        grid: `(B, h, w, 2)` normalised places in A.
        side: as in [`make_grid`]: given where A is an image of any size, not one of the network's maps.
        mode: `"bilinear"` or `"nearest"`.
        padding_mode: what lies outside A: `"zeros"`, `"border"` or `"reflection"`.

    Returns:
        `(B, C, h, w)` in the image's dtype.
    """
    places = grid if side is None else 2 * relative_points(grid, side) - 1
    sampled = F.grid_sample(
        _as_float(image),
        places.to(_as_float(image).dtype),
        mode=mode,
        padding_mode=padding_mode,
        align_corners=side is None,
    )
    return sampled.to(image.dtype)


def resize_masks(masks: Tensor, size: Sequence[int]) -> Tensor:
    """Masks `(N, H, W)` of images at another resolution (height, width): bilinear, half-pixel centres as of images."""
    return F.interpolate(masks.unsqueeze(1), size=tuple(size), mode="bilinear", align_corners=False).squeeze(1)


def dense_flow(transform: Transform, size: Sequence[int], source_size: Any, target_size: Any, side: int) -> Tensor:
    """Where the pixels of a copy of B lie in A minus where they lie in B, in pixels: `(..., height, width, 2)`.

    Args:
        transform: `(...)`, T_AB.
        size: (height, width) of the copy, which is B resized.
        source_size, target_size: (height, width) of A and B, or tensors `(..., 2)` of them: the unit of the flow.
        side: S of the network.
    """
    there = transform.grid(size, side)
    here = make_grid(*there.shape[-3:-1], side=side, device=there.device, dtype=there.dtype).expand_as(there)
    return denormalize_points(there, source_size, side) - denormalize_points(here, target_size, side)


def inside(points: Tensor, *, margin: float = 0.0) -> Tensor:
    """Which normalised points `(..., 2)` lie between the centres of the corner pixels (plus a margin): bool `(...)`."""
    return (points.abs() <= 1 + margin).all(dim=-1)


def sample_at(features: Tensor, points: Tensor, *, padding_mode: str = "border") -> Tensor:
    """Bilinear samples of a map `(B, C, h, w)` at normalised points `(B, N, 2)`: `(B, N, C)`."""
    return warp(features, points.unsqueeze(1), padding_mode=padding_mode).squeeze(2).transpose(1, 2)


def corner_weights(points: Tensor, size: Sequence[int], *, padding_mode: str = "border") -> tuple[Tensor, Tensor]:
    """Bilinear interpolation as a weighted sum of four cells.

    Args:
        points: `(B, N, 2)` normalised points; one that is not a number counts as far outside.
        size: (height, width) of the map, at least 2 each.
        padding_mode: what lies outside of the map, as in [`warp`].

    Returns:
        flat indices of the cells, row by row, `(B, N, 4)` int64, and their weights `(B, N, 4)`, which sum to 1 (to less
        outside of the map, with `"zeros"`).
    """
    height, width = int(size[0]), int(size[1])
    cells = (_extent((height, width), points) - 1) / 2  # the network's own map: its corner centres are -1 and +1
    pixels = ((_as_float(points) + 1) * cells).nan_to_num(nan=-2.0)
    x, y = pixels[..., 0], pixels[..., 1]
    if padding_mode == "zeros":
        left, top = x.floor(), y.floor()
    else:
        if padding_mode == "reflection":
            x, y = (end - (end - place.abs() % (2 * end)).abs() for place, end in ((x, width - 1), (y, height - 1)))
        x, y = x.clamp(0, width - 1), y.clamp(0, height - 1)
        left, top = x.floor().clamp(max=width - 2), y.floor().clamp(max=height - 2)
    columns, rows = torch.stack((left, left + 1), dim=-1), torch.stack((top, top + 1), dim=-1)
    right_share, lower_share = x - left, y - top
    across = torch.stack((1 - right_share, right_share), dim=-1)
    down = torch.stack((1 - lower_share, lower_share), dim=-1)
    if padding_mode == "zeros":
        across = across * ((columns >= 0) & (columns <= width - 1))
        down = down * ((rows >= 0) & (rows <= height - 1))
        columns, rows = columns.clamp(0, width - 1), rows.clamp(0, height - 1)
    index = rows.unsqueeze(-1) * width + columns.unsqueeze(-2)
    return index.flatten(-2).long(), (down.unsqueeze(-1) * across.unsqueeze(-2)).flatten(-2)
