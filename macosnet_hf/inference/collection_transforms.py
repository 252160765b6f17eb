"""Transforms of all pairs of a collection: matching, trust, and repair by routes through other images.

The pairs cost no encoder pass: the fast cascade warps feature maps, and pairs go through the network in batches. T_ij
of a pair (i, j) takes normalised points of image j to image i.

Where images face different ways (`Collection.orientations`), all work is done on the collection with all of them facing
one way, and brought back to the images as they are, which is exact: `T_ij = R_i T'_ij R_j^-1`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..collection import Collection, Progress
from ..encoder import MaCoSNetFeatures
from ..errors import InputError
from ..geometry import (
    SYMMETRIES,
    Transform,
    denormalize_points,
    identity_affine,
    identity_tps,
    inside,
    make_grid,
    normalize_points,
    warp,
)
from ..matching import cell_products, cell_similarity, fit_mutually, match_locally, normalize_similarity
from ..neighbours import choose_partners
from .pair import check_points

GRAPHS = ("all", "neighbours", "star")

# Forward-backward error, in normalised coordinates, at which trust falls to exp(-1/2).
_ERROR_SIGMA = 0.2
_PAIRS_AT_ONCE = 16
_FITS_AT_ONCE = 2
_HELD_PRODUCTS = 64  # images whose inner products of all cells are held: 13 MB with the lite model
_POINTS_A_SIDE = 7  # of the grid on which transforms are compared and composed
_ROUTES = 8  # of each pair, through a third image
_DIRECT_WEIGHT = 2.0  # of the direct transform, as many routes of the same trust


@dataclass
class CollectionMatches:
    """Transforms between the images of a collection.

    Attributes:
        affine: `(N, N, 6)` and tps `(N, N, 18)`: `[i, j]` maps points of j into i; the identity where i = j, NaN where
            the pair was not matched.
        similarity: `(N, N)` mean cosine similarity of the features that `[i, j]` brings together, in [-1, 1].
        error: `(N, N)` mean distance of points of j from themselves after T_ji T_ij, in normalised coordinates.
        trust: `(N, N)` in [0, 1]: `similarity * exp(-error^2 / (2 * 0.2^2))`, 0 where the pair was not matched.
        collection: the images.
    """

    affine: Tensor
    tps: Tensor
    similarity: Tensor
    error: Tensor
    trust: Tensor
    collection: Collection

    @property
    def transforms(self) -> Transform:
        """`(N, N)` on the CPU, with the parameters `affine` and `tps`."""
        return self.collection.model.make_transform(self.affine, self.tps)

    def __len__(self) -> int:
        return len(self.trust)

    def most_central(self) -> int:
        """The number of the image with the largest sum of trust."""
        return int((self.trust + self.trust.t()).sum(0).argmax())

    def transfer_points(
        self, points: Sequence[Sequence[float]] | np.ndarray, image: int, *, local_matching: bool | None = None
    ) -> np.ndarray:
        """Where points of one image lie in all of them.

        Args:
            points: `(M, 2)` as (x, y) in pixels of that image, as it was added.
            image: its number.
            local_matching: whether a point goes to the best feature match near its transformed place; default is the
                configuration's.

        Returns:
            `(N, M, 2)` as (x, y) in pixels of each image; NaN where the pair was not matched.

        Raises:
            InputError: if there is no such image, or the points are not M pairs of finite numbers.
        """
        check_number(self.collection, image)
        transforms = self._oriented().transforms[:, image]
        return move_points(self.collection, transforms, points, image, local_matching)

    def transfer_mask(self, mask: np.ndarray | Tensor, image: int) -> np.ndarray:
        """A mask of one image, warped onto all of them.

        Args:
            mask: `(H, W)` in [0, 1] over the whole image, at any resolution.
            image: its number.

        Returns:
            `(N, H, W)` float32, each over its whole image; NaN where the pair was not matched.

        Raises:
            InputError: if there is no such image, or the mask has no two dimensions.
        """
        check_number(self.collection, image)
        field = torch.as_tensor(mask, dtype=torch.float32)
        if field.dim() != 2:
            raise InputError(f"A mask has the shape (H, W), not {tuple(field.shape)}.")
        into = self.transforms[image]  # of every image's points into this one
        known, side = torch.isfinite(into.affine).all(-1), self.collection.model.config.image_size
        warped = torch.full((len(self), *field.shape), float("nan"))
        for number in torch.nonzero(known).flatten().tolist():
            grid = into[number : number + 1].grid(field.shape, side)
            warped[number] = warp(field[None, None], grid, side=side)[0, 0]
        return warped.numpy()

    def repaired(self) -> CollectionMatches:
        """The same with each transform replaced by a consensus of routes through other images.

        For a pair (i, j) the direct transform T_ij and the compositions T_ik T_kj through the eight most trusted k give
        places for each point. Their weighted geometric median is the consensus, to which a thin-plate spline is fitted.
        So a wrong direct transform is outvoted, and a pair that was not matched gets a transform if there is a route.
        """
        return self._oriented()._repaired()._turned(self.collection, self.collection)

    # -----------------------------------------------------------------------------------------------------------------

    def _oriented(self) -> CollectionMatches:
        """The same between the images that all face one way; [`CollectionMatches._turned`] brings it back."""
        return self._turned(self.collection, self.collection.oriented())

    def _turned(self, by: Collection, images: Collection) -> CollectionMatches:
        """Transforms between the images of a collection and between those that all face one way, the one from the
        other: every symmetry in question is its own inverse."""
        turns = _symmetries(by)
        turned = self.transforms.compose_symmetry(turns.unsqueeze(1), "source").compose_symmetry(turns, "target")
        assert turned.tps is not None
        return replace(self, affine=turned.affine, tps=turned.tps, collection=images)

    def _repaired(self) -> CollectionMatches:
        count = len(self)
        grid = make_grid(_POINTS_A_SIDE, _POINTS_A_SIDE).reshape(-1, 2)
        affine, tps = identity_affine(count, count), identity_tps(count, count)
        fit = torch.linalg.pinv(self.transforms.basis(grid))  # (9, points)
        for j in range(count):
            places = self._consensus(grid, j)
            tps[:, j] = (fit @ places).transpose(-1, -2).flatten(-2)
        diagonal = torch.arange(count)
        tps[diagonal, diagonal] = identity_tps()
        affine[torch.isnan(tps).any(-1)] = float("nan")
        return _with_trust(self.collection, affine, tps)

    def _consensus(self, points: Tensor, j: int) -> Tensor:
        """Places `(N, M, 2)` in every image of points `(M, 2)` of image j, agreed on by all routes."""
        count, transforms = len(self), self.transforms
        direct = transforms[:, j].apply(points.expand(count, -1, -1))
        trust = self.trust * self.trust[:, j]  # [i, k]: of the route j -> k -> i
        trust.fill_diagonal_(0)
        trust[:, j] = 0
        best = trust.topk(min(_ROUTES, count), dim=1)
        into, through = torch.arange(count).repeat_interleave(best.indices.shape[1]), best.indices.flatten()
        composed = transforms[into, through].apply(direct[through]).unflatten(0, (count, -1))  # (N, K, M, 2)
        places = torch.cat((direct.unsqueeze(1), composed), dim=1)
        weights = torch.cat((_DIRECT_WEIGHT * self.trust[:, j : j + 1].square(), best.values), dim=1)
        weights = torch.where(torch.isfinite(places).all(-1).all(-1), weights, 0.0)
        return geometric_median(places.nan_to_num(), weights)


def check_number(collection: Collection, image: int) -> None:
    """Raises `InputError` unless an image has that number."""
    if not 0 <= image < len(collection):
        raise InputError(f"There is no image number {image}; there are {len(collection)}, counted from 0.")


@torch.inference_mode()
def move_points(
    collection: Collection,
    transforms: Transform,
    points: Sequence[Sequence[float]] | np.ndarray,
    image: int,
    local_matching: bool | None = None,
) -> np.ndarray:
    """Where points of one image lie in all of them, in pixels; see [`CollectionMatches.transfer_points`].

    Args:
        collection: of the N images.
        transforms: `(N)`, of points of that image into each, all of them facing one way; NaN where there is none.
        points, image, local_matching: as there.
    """
    count, config = len(collection), collection.model.config
    sizes = torch.tensor([size[::-1] for size in collection.images.sizes])  # (height, width)
    start = torch.from_numpy(check_points(points, None))
    turns = _symmetries(collection)
    placed = normalize_points(start, sizes[image].tolist(), config.image_size) @ turns[image]
    repeated = placed.expand(count, -1, -1)
    if config.local_matching if local_matching is None else local_matching:
        facing, device = collection.oriented(), collection.model.device
        found = torch.full((count, *placed.shape), float("nan"))
        own = facing.features([image]).normalized
        for some in torch.nonzero(torch.isfinite(transforms.affine).all(-1)).flatten().split(_PAIRS_AT_ONCE):
            moved = match_locally(
                own.expand(len(some), -1, -1, -1),
                facing.features(some.tolist()).normalized,
                repeated[: len(some)].to(device),
                transforms[some].to(device),
                **config.local_matching_options,
            )
            found[some] = moved.float().cpu()
    else:
        found = transforms.apply(repeated)
    pixels = denormalize_points(found @ turns.transpose(1, 2), sizes, config.image_size)
    pixels[image] = start
    return pixels.numpy().astype(np.float64)


@torch.inference_mode()
def match_collection(
    collection: Collection,
    *,
    graph: str = "all",
    degree: int = 8,
    cascade: str = "features",
    progress: Progress | None = None,
) -> CollectionMatches:
    """Transforms of the ordered pairs of a collection.

    Args:
        collection: N images.
        graph: which pairs, in both directions: `"all"`, `"neighbours"` (each image with the `degree` most similar ones)
            or `"star"` (each with the one that is most similar to all others).
        degree: see `graph`.
        cascade: `"features"` costs no encoder pass; `"exact"`, the paper's, encodes each warped image again. With
            the configuration's `mutual_fit` both transforms of a pair are then fitted to each other.
        progress: called with (done, total) pairs.

    Raises:
        InputError: for fewer than two images, or an option that is not known.
    """
    if len(collection) < 2:
        raise InputError("Matching needs two or more images.")
    if cascade not in ("features", "exact"):
        raise InputError(f"cascade must be 'features' or 'exact', not {cascade!r}.")
    facing_one_way = collection.oriented()
    pairs = pair_graph(collection, graph, degree)
    return _match(facing_one_way, pairs, cascade, progress)._turned(collection, collection)


def _match(collection: Collection, pairs: Tensor, cascade: str, progress: Progress | None) -> CollectionMatches:
    """[`match_collection`] of images that face one way."""
    count = len(collection)
    affine, tps = identity_affine(count, count), identity_tps(count, count)
    off_diagonal = ~torch.eye(count, dtype=torch.bool)
    affine[off_diagonal], tps[off_diagonal] = float("nan"), float("nan")
    similarity = torch.full((count, count), float("nan"))
    for (i, j), found, similar in match_pairs(collection, pairs, cascade, progress):
        assert found.tps is not None  # the cascade predicts both
        affine[i, j], tps[i, j], similarity[i, j] = found.affine, found.tps, similar
    return _with_trust(collection, affine, tps, similarity)


def match_pairs(
    collection: Collection, pairs: Tensor, cascade: str = "features", progress: Progress | None = None
) -> Iterator[tuple[tuple[Tensor, Tensor], Transform, Tensor]]:
    """Transforms of pairs of images that face one way, a few pairs at a time.

    Args:
        collection: of the images.
        pairs: `(P, 2)`, each beside its reverse.
        cascade, progress: as in [`match_collection`].

    Yields:
        numbers i and j `(n,)`, transforms `(n,)` of points of j into i in single precision on the CPU, and the mean
        similarities `(n,)` of what they bring together.
    """
    model, products, done = collection.model.macosnet, _Products(collection), 0
    for some in pairs.split(_PAIRS_AT_ONCE):
        i, j = some.t()
        cells = _cell_similarity(collection, some)
        if cascade == "exact":
            first, second = collection.features(i.tolist()), collection.features(j.tolist())
            found = model.predict_transforms(
                first, second, collection.pixel_values(i.tolist()), normalize_similarity(cells)
            )
        else:
            lengths, gram, rows = products.of(i.tolist())
            found = model.predict_transforms_from_similarity(cells, lengths, gram, rows)
        if collection.model.config.mutual_fit:
            found = _fitted(collection, some, found)
        found = found.to("cpu", torch.float32)
        yield (i, j), found, _mean_similarity(cells, found)
        done += len(some)
        if progress is not None:
            progress(done, len(pairs))


class _Products:
    """[`cell_products`] of images, of which the last ones are held."""

    def __init__(self, collection: Collection):
        self._of = lru_cache(_HELD_PRODUCTS)(lambda number: cell_products(_compared(collection, [number]).last))

    def of(self, numbers: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Of M different images `(M, h*w)` and `(M, h*w, h*w)`, and which of them each of the numbers is."""
        distinct = list(dict.fromkeys(numbers))
        lengths, gram = (torch.cat(parts) for parts in zip(*map(self._of, distinct), strict=True))
        return lengths, gram, torch.tensor([distinct.index(number) for number in numbers], device=gram.device)


def _symmetries(collection: Collection) -> Tensor:
    """Matrices `(N, 2, 2)` of [`Collection.orientations`]."""
    return torch.tensor(list(SYMMETRIES.values()), dtype=torch.float32)[collection.orientations]


def _compared(collection: Collection, numbers: list[int]) -> MaCoSNetFeatures:
    """Features of some images, on the grid on which the model predicts transforms."""
    return collection.features(numbers).on_grid(collection.model.config.predictor_grid)


def _cell_similarity(collection: Collection, pairs: Tensor) -> Tensor:
    """[`cell_similarity`] `(P, h*w, h, w)` of pairs that stand beside their reverse, whose map is the transpose."""
    forth = pairs[0::2]
    products = cell_similarity(*(_compared(collection, forth[:, side].tolist()).normalized for side in (0, 1)))
    height, width = products.shape[-2:]
    back = products.flatten(2).transpose(1, 2).unflatten(-1, (height, width))
    return torch.stack((products, back), dim=1).flatten(0, 1)


def _fitted(collection: Collection, pairs: Tensor, transforms: Transform) -> Transform:
    """[`fit_mutually`] for transforms `(P)` of pairs that stand beside their reverse."""
    first, second = (collection.features(pairs[0::2, side].tolist()).normalized for side in (0, 1))
    both = torch.stack((first, second), dim=1)
    # The samples of many pairs at once do not fit into a processor's cache, which takes twice as long.
    at_once = _FITS_AT_ONCE if both.device.type == "cpu" else len(both)
    both_ways = transforms.unflatten(0, (-1, 2))
    fitted = [
        fit_mutually(both[some], both_ways[some], temperature=collection.model.config.local_matching_temperature)
        for some in torch.arange(len(both)).split(at_once)
    ]
    return Transform.cat(fitted).flatten(0, 1)


def _mean_similarity(cells: Tensor, transforms: Transform) -> Tensor:
    """Mean cosine similarity `(P,)` of the target's cells and of their transformed places in the source.

    Interpolated from the inner products `(P, h*w, h, w)`; a cell that leaves the source counts 0.
    """
    height, width = cells.shape[-2:]
    places = transforms.apply(make_grid(height, width).reshape(1, -1, 2).expand(len(cells), -1, -1))
    # One map over the source for each of the target's cells, sampled at one place.
    maps = cells.float().cpu().flatten(2).transpose(1, 2).reshape(-1, 1, height, width)
    found = warp(maps, places.reshape(-1, 1, 1, 2)).view(len(cells), -1)
    return (found * inside(places)).mean(-1)


def pair_graph(collection: Collection, graph: str, degree: int = 8) -> Tensor:
    """The ordered pairs `(P, 2)` of a graph, each beside its reverse; see [`match_collection`].

    Raises:
        InputError: if the graph is not known, or the degree is not positive.
    """
    if graph not in GRAPHS:
        raise InputError(f"graph must be one of {', '.join(GRAPHS)}; got {graph!r}.")
    if degree < 1:
        raise InputError(f"degree must be at least 1, not {degree}.")
    count = len(collection)
    if graph == "all":
        chosen = torch.ones(count, count, dtype=torch.bool)
    else:
        partners, similarity = choose_partners(collection.maps, degree if graph == "neighbours" else count - 1)
        if graph == "star":
            partners = similarity.mean(1).argmax().expand(count, 1)
        chosen = torch.zeros(count, count, dtype=torch.bool).scatter(1, partners.cpu(), True)
    return _beside_reverse((chosen | chosen.t()).triu(1).nonzero())


def _beside_reverse(pairs: Tensor) -> Tensor:
    """Pairs `(P, 2)`, each followed by its reverse: `(2 * P, 2)`."""
    return torch.stack((pairs, pairs.flip(1)), dim=1).flatten(0, 1)


def _with_trust(
    collection: Collection, affine: Tensor, tps: Tensor, similarity: Tensor | None = None
) -> CollectionMatches:
    """Matches by transforms `(N, N, 6)` and `(N, N, 18)`: error, trust, and similarity where it is not known."""
    count, transforms = len(collection), collection.model.make_transform(affine, tps)
    error = torch.full((count, count), float("nan"))
    for some in torch.isfinite(affine).all(-1).nonzero().split(4096):
        i, j = some.t()
        error[i, j] = return_error(transforms[i, j], transforms[j, i])
    if similarity is None:
        similarity = torch.full((count, count), float("nan"))
        with torch.inference_mode():
            for some in pair_graph(collection, "all").split(_PAIRS_AT_ONCE):
                i, j = some.t()
                similarity[i, j] = _mean_similarity(_cell_similarity(collection, some), transforms[i, j])
    similarity = similarity.clone().fill_diagonal_(1.0)
    trust = trust_of(similarity, error)
    return CollectionMatches(affine, tps, similarity, error, trust.nan_to_num(0).fill_diagonal_(1.0), collection)


def return_error(there: Transform, back: Transform) -> Tensor:
    """`(P,)` mean distance of points from themselves after two transforms `(P,)`, in normalised coordinates."""
    start = (make_grid(_POINTS_A_SIDE, _POINTS_A_SIDE).reshape(1, -1, 2) * 0.9).expand(there.shape[0], -1, -1)
    return (back.apply(there.apply(start)) - start).norm(dim=-1).mean(-1)


def trust_of(similarity: Tensor, error: Tensor) -> Tensor:
    """How far to trust transforms, in [0, 1]; see [`CollectionMatches`]."""
    return similarity.clamp(0, 1) * torch.exp(-0.5 * (error / _ERROR_SIGMA) ** 2)


def geometric_median(places: Tensor, weights: Tensor, steps: int = 10) -> Tensor:
    """Weighted geometric median `(N, M, 2)` of K places for each of M points, by Weiszfeld's iteration from the mean.

    Args:
        places: `(N, K, M, 2)`.
        weights: `(N, K)`; without any the median is NaN.
    """
    share = weights[:, :, None, None]
    total = share.sum(1)
    median = (share * places).sum(1) / total
    for _ in range(steps):
        distance = (places - median.unsqueeze(1)).norm(dim=-1, keepdim=True).clamp(min=1e-4)
        pull = share / distance
        median = (pull * places).sum(1) / pull.sum(1)
    return median


__all__ = ["GRAPHS", "CollectionMatches", "match_collection", "pair_graph"]
