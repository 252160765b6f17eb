"""Which images of a collection are most similar to which, by their pooled features; exact for any number of images.

The module travels with the model to the Hub; [`~.collection.Collection`] uses it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .encoded_images import FeatureMaps

# Similarities in memory at a time: all of up to 2,000 images, and a few rows of more.
_SIMILARITIES_AT_ONCE = 4_000_000
# Of images that are segmented without the rest of their collection: how many of the most similar ones to each are in
# their company, and how many others all of them have at least.
_COMPANY_RANKS = 4
LEAST_COMPANY = 8


def unit_pooled(maps: Tensor | FeatureMaps) -> Tensor:
    """`(N, C)` float64: the mean of each of N maps, of unit length.

    In double precision a similarity hardly depends on the position of the two images among the others. A few at
    once: all features in double precision take as much memory as all else that a collection holds.
    """
    if isinstance(maps, FeatureMaps):
        return F.normalize(maps.pooled, dim=1)
    return F.normalize(torch.cat([part.double().mean(dim=(2, 3)) for part in maps.split(16)]), dim=1)


def similarity_rows(unit: Tensor, numbers: Sequence[int] | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Cosine similarities of images to all N, a few rows at a time; that of an image to itself is -2.

    Args:
        unit: `(N, C)` of unit length.
        numbers: of the images whose rows are wanted; all by default.

    Yields:
        which of the rows, and their similarities `(n, N)`.
    """
    wanted = torch.arange(len(unit)) if numbers is None else torch.tensor(numbers, dtype=torch.long)
    at_once = max(1, _SIMILARITIES_AT_ONCE // len(unit))
    for start in range(0, len(wanted), at_once):
        some = wanted[start : start + at_once].to(unit.device)
        similarity = unit[some] @ unit.t()
        similarity[torch.arange(len(some), device=unit.device), some] = -2
        yield slice(start, start + len(some)), similarity


def rank_others(unit: Tensor, ranks: Sequence[int], numbers: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """The others that have these ranks in an image's order of similarity, where 0 is the most similar one.

    Args:
        unit: `(N, C)` of unit length.
        ranks: each less than N - 1.
        numbers: of the images that are asked; all by default.

    Returns:
        their numbers `(n, len(ranks))` and cosine similarities.
    """
    found = []
    for _, similarity in similarity_rows(unit, numbers):
        best = similarity.topk(max(ranks, default=-1) + 1, dim=1)
        found.append((best.indices[:, list(ranks)], best.values[:, list(ranks)]))
    indices, values = zip(*found, strict=True)
    return torch.cat(indices), torch.cat(values)


def choose_partners(features: Tensor | FeatureMaps, count: int) -> tuple[Tensor, Tensor]:
    """For each of N images the `count` others with the most similar pooled features.

    Args:
        features: `(N, C, h, w)`.
        count: partners of each, at least 1; with fewer others than that, all of them.

    Returns:
        indices `(N, min(count, N - 1))`, most similar first, and cosine similarities of the same shape.
    """
    return rank_others(unit_pooled(features), range(min(count, len(features) - 1)))


def spread_ranks(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` ranks, evenly spread from the first on; all if there are fewer.

    The most similar images often share the background too and confirm it: on msrc-coseg the first and the middle one
    give better masks than the first two, the last two, or two in between.
    """
    wanted = min(wanted, count)
    return [number * count // wanted for number in range(wanted)]


def choose_company(unit: Tensor, numbers: Sequence[int], most: int | None = None) -> list[int]:
    """The four other images that are most similar to each of some images, and further ones up to eight in all.

    Args:
        unit: `(N, C)` of unit length.
        numbers: of the images that need company.
        most: the number of others, at most.
    """
    several = min(LEAST_COMPANY + len(numbers), len(unit) - 1)
    if not several or not numbers:
        return []
    indices, values = rank_others(unit, range(several), numbers)
    wanted = set(numbers)
    company: dict[int, None] = {}
    for rank in range(several):
        if rank >= _COMPANY_RANKS and len(company) >= LEAST_COMPANY:
            break
        by_similarity = values[:, rank].argsort(descending=True, stable=True)
        company |= dict.fromkeys(other for other in indices[by_similarity, rank].tolist() if other not in wanted)
    return list(company)[:most]


def similar_blocks(unit: Tensor, numbers: Iterable[int], size: int) -> Iterator[list[int]]:
    """Blocks of at most `size` images: the first one that is left, and those that are left and most similar to it.

    Args:
        unit: `(N, C)` of unit length.
        numbers: of the images, each in one block.
        size: of a block.
    """
    left = torch.zeros(len(unit), dtype=torch.bool, device=unit.device)
    wanted = list(dict.fromkeys(numbers))
    left[wanted] = True
    for first in wanted:
        if not left[first]:
            continue
        left[first] = False
        others = left.nonzero().flatten()
        similarity = unit[others] @ unit[first]
        block = [first, *others[similarity.topk(min(size - 1, len(others))).indices].tolist()]
        left[block] = False
        yield block


def spanning_pairs(unit: Tensor) -> Tensor:
    """`(N - 1, 2)` pairs of N images that connect all of them, the most similar ones: a maximum spanning tree (Prim).

    Args:
        unit: `(N, C)` of unit length.
    """
    count = len(unit)
    best = torch.full((count,), -3.0, dtype=unit.dtype, device=unit.device)
    nearest = torch.zeros(count, dtype=torch.long, device=unit.device)
    outside = torch.ones(count, dtype=torch.bool, device=unit.device)
    number, pairs = 0, []
    for _ in range(count - 1):
        outside[number] = False
        similarity = unit @ unit[number]
        closer = outside & (similarity > best)
        best = torch.where(closer, similarity, best)
        nearest[closer] = number
        number = int(torch.where(outside, best, -4.0).argmax())
        pairs.append((int(nearest[number]), number))
    return torch.tensor(pairs, dtype=torch.long).view(-1, 2)
