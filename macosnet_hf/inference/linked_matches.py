"""Transforms along a graph that connects all images of a large collection: each image with a few others, not with all.

A point of one image reaches all others by chains of transforms. Memory and time grow with the number of images;
[`~.collection_transforms.match_collection`] holds transforms of all pairs.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..collection import Collection, Progress
from ..errors import InputError
from ..geometry import Transform, identity_affine, identity_tps, make_grid
from ..neighbours import rank_others, spanning_pairs, unit_pooled
from .collection_transforms import check_number, geometric_median, match_pairs, move_points, return_error, trust_of

_POINTS_A_SIDE = 7  # of the grid on which transforms are chained
_ROUTES = 8  # into each image, through its neighbours
_LEAST_TRUST = 1e-3  # of a transform that nothing speaks for: it may be the only one that leads to an image


@dataclass(frozen=True)
class LinkedMatches:
    """Transforms between neighbours in a collection.

    Attributes:
        pairs: `(P, 2)` numbers (i, j) of images, each beside its reverse; they connect all images.
        transforms: `(P)` of points of j into i, with all images facing one way.
        trust: `(P,)` in [0, 1], as of [`~.collection_transforms.CollectionMatches`].
        collection: the images.
    """

    pairs: Tensor
    transforms: Transform
    trust: Tensor
    collection: Collection

    def __len__(self) -> int:
        return len(self.collection)

    def transfer_points(
        self, points: Sequence[Sequence[float]] | np.ndarray, image: int, *, local_matching: bool | None = None
    ) -> np.ndarray:
        """Where points of one image lie in all of them: `(N, M, 2)` in pixels.

        Args:
            points, image, local_matching: as in
                [`~.collection_transforms.CollectionMatches.transfer_points`].

        Raises:
            InputError: if there is no such image, or the points are not M pairs of finite numbers.
        """
        return move_points(self.collection, self.transforms_from(image), points, image, local_matching)

    def transforms_from(self, image: int) -> Transform:
        """Transforms `(N)` of points of one image into each, with all images facing one way.

        A grid of points is moved along the chain of transforms with the largest product of trust. Then each image takes
        the weighted geometric median of what its neighbours say, and a thin-plate spline is fitted to that, as
        [`~.collection_transforms.CollectionMatches.repaired`] does with routes through one other image.

        Raises:
            InputError: if there is no such image.
        """
        check_number(self.collection, image)
        count = len(self)
        grid = make_grid(_POINTS_A_SIDE, _POINTS_A_SIDE).reshape(-1, 2)
        links = self._links()
        trust, order = self._best_chains(image)
        places = grid.expand(count, -1, -1).clone()
        for level in order:  # of images that are as many transforms away
            link = torch.tensor(level)
            into, through = self.pairs[link].t()
            places[into] = self.transforms[link].apply(places[through])
        into, through = self.pairs[links.clamp(min=0)].unbind(-1)  # (N, K)
        moved = self.transforms[links.clamp(min=0).flatten()].apply(places[through.flatten()])
        weights = trust[through] * self.trust[links.clamp(min=0)].clamp(min=_LEAST_TRUST)
        weights = torch.where(links < 0, 0.0, weights)
        agreed = geometric_median(moved.unflatten(0, links.shape), weights)
        agreed[image] = grid
        fit = torch.linalg.pinv(self.transforms.basis(grid))  # (9, points)
        tps = (fit @ agreed).transpose(-1, -2).flatten(-2)
        tps[image] = identity_tps()
        return self.collection.model.make_transform(identity_affine(count), tps)

    def _links(self) -> Tensor:
        """`(N, K)` numbers of the most trusted pairs that lead into each image; -1 where there are fewer."""
        order = torch.argsort(self.trust, descending=True, stable=True)
        into = self.pairs[order, 0]
        order, into = order[by_image := torch.argsort(into, stable=True)], into[by_image]
        counts = torch.bincount(into, minlength=len(self))
        place = torch.arange(len(into)) - (counts.cumsum(0) - counts)[into]
        links = torch.full((len(self), _ROUTES), -1, dtype=torch.long)
        near = place < _ROUTES
        links[into[near], place[near]] = order[near]
        return links

    def _best_chains(self, image: int) -> tuple[Tensor, list[list[int]]]:
        """The trust `(N,)` of the best chain from an image to each, a product; and the pairs that end these chains, by
        their number of transforms."""
        leaving: list[list[tuple[int, float, int]]] = [[] for _ in range(len(self))]
        costs = -self.trust.clamp(min=_LEAST_TRUST).log()
        for link, ((into, start), cost) in enumerate(zip(self.pairs.tolist(), costs.tolist(), strict=True)):
            leaving[start].append((into, cost, link))
        best = [float("inf")] * len(self)
        best[image] = 0.0
        order: list[list[int]] = []
        done = [False] * len(self)
        waiting: list[tuple[float, int, int, int]] = [(0.0, 0, image, -1)]  # cost, transforms, image, last pair
        while waiting:
            cost, steps, here, link = heapq.heappop(waiting)
            if done[here]:
                continue
            done[here] = True
            if steps:
                order += [[] for _ in range(steps - len(order))]
                order[steps - 1].append(link)
            for there, more, next_link in leaving[here]:
                if cost + more < best[there]:
                    best[there] = cost + more
                    heapq.heappush(waiting, (best[there], steps + 1, there, next_link))
        return torch.exp(-torch.tensor(best)), order


@torch.inference_mode()
def link_collection(collection: Collection, *, degree: int = 8, progress: Progress | None = None) -> LinkedMatches:
    """Transforms of each image to and from its neighbours, and along a spanning tree, so that all are connected.

    Args:
        collection: N images.
        degree: how many of the most similar images are an image's neighbours. PCK 0.1 of the pairs of PF-WILLOW, sent
            along chains through all 100 images: 0.732 with eight, 0.715 with four, 0.735 for the pairs by themselves.
        progress: called with (done, total) pairs.

    Raises:
        InputError: for fewer than two images, or a degree that is not positive.
    """
    if len(collection) < 2:
        raise InputError("Matching needs two or more images.")
    if degree < 1:
        raise InputError(f"degree must be at least 1, not {degree}.")
    facing_one_way = collection.oriented()
    pairs = linked_pairs(facing_one_way, degree)
    found = list(match_pairs(facing_one_way, pairs, progress=progress))
    transforms = Transform.cat([some for _, some, _ in found])
    similarity = torch.cat([some for *_, some in found])
    reverse = torch.arange(len(pairs)).view(-1, 2).flip(1).flatten()
    error = torch.cat(
        [return_error(transforms[some], transforms[reverse[some]]) for some in torch.arange(len(pairs)).split(4096)]
    )
    return LinkedMatches(pairs, transforms, trust_of(similarity, error).nan_to_num(0), collection)


def linked_pairs(collection: Collection, degree: int) -> Tensor:
    """`(P, 2)` pairs of each image with the `degree` most similar ones, and of a spanning tree, each beside its
    reverse."""
    unit = unit_pooled(collection.maps)
    count = len(unit)
    others, _ = rank_others(unit, range(min(degree, count - 1)))
    near = torch.stack((torch.arange(count).repeat_interleave(others.shape[1]), others.flatten().cpu()), dim=1)
    pairs = torch.cat((near, spanning_pairs(unit.float()))).sort(dim=1).values
    pairs = torch.unique(pairs, dim=0)
    return torch.stack((pairs, pairs.flip(1)), dim=1).flatten(0, 1)
