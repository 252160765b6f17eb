"""What an image has in common with its partners, position by position: the decoder's input beside the features.

A correlation map has one channel per position of the partner, and must be learnt to be read under any layout of the
partner. The cues here do not depend on that layout: they say how well a position is matched, by what (the partner's
object or its background), and whether the match is mutual. Not in the paper.

The module travels with the model to the Hub.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Best similarities of a position that are averaged, and what the similarities to the background count against those to
# the object: on composites of two msrc-coseg objects this rule alone prefers the asked object in 96 of 100 questions.
_BEST = 5
_BACKGROUND_SHARE = 0.5
_MUTUAL_SHARPNESS = 20.0  # per unit of cosine similarity
_MATCH_SHARPNESS = 60.0
_OBJECT_SHARPNESS = 30.0
CENTRE_SIGMA = 0.45  # of the centre prior, normalised coordinates

# Least `feature_structure` of an image of something. Images of nothing (plain, a gradient, a sky, noise) have 0.02 to
# 0.074 with `lite` and 0.01 to 0.04 with `base`; of 42 and 13 images of msrc-coseg the least have 0.107 and 0.128.
LEAST_STRUCTURE = 0.09

CUES = ("best", "best5", "object5", "background5", "margin", "mutual", "on_object", "object_mean", "background_mean")
CONTEXT_CHANNELS = 4 * len(CUES) + 1  # mean and maximum over partners, each raw and standardised; the own weights


def centre_prior(height: int, width: int, *, device: torch.device | str | None = None) -> Tensor:
    """Weights `(height, width)` in (0, 1] of a Gaussian around the middle: where an object is assumed at first."""
    y, x = (torch.linspace(-1, 1, side, device=device) for side in (height, width))
    return torch.exp(-(y[:, None] ** 2 + x[None] ** 2) / (2 * CENTRE_SIGMA**2))


def feature_structure(features: Tensor) -> Tensor:
    """How much there is to see in N images: `(N,)`, float32.

    The variance of the features of an image over its cells, times that of their averages over blocks of 3x3 cells. On a
    plain surface the one is small, on an even one (noise) the other.

    Args:
        features: `(N, C, h, w)` on the grid of the transformation predictor.
    """
    unit = F.normalize(features.float(), dim=1)
    return _variance(unit) * _variance(F.avg_pool2d(unit, 3))


def _variance(maps: Tensor) -> Tensor:
    """Mean squared distance `(N,)` of the cells of maps `(N, C, h, w)` from their mean."""
    cells = maps.flatten(2)
    return (cells - cells.mean(-1, keepdim=True)).square().sum(1).mean(-1)


def partner_cues(own: Tensor, partners: Tensor, weights: Tensor) -> Tensor:
    """Cues of every position of an image about one partner, in the order of `CUES`.

    Args:
        own: unit-length features `(B, C, h, w)` of the image.
        partners: the same of K partners, `(B, K, C, h', w')`.
        weights: how far each position of the partners belongs to their object, `(B, K, h', w')` in [0, 1].

    Returns:
        `(B, K, 9, h, w)` float32.
    """
    height, width = own.shape[-2:]
    mine, theirs = own.float().flatten(2), partners.float().flatten(3)
    weight = weights.float().flatten(2)
    similarity = torch.einsum("bcp,bkcq->bkpq", mine, theirs)  # p: own position, q: the partner's
    on_object = weight.unsqueeze(2)
    count = min(_BEST, similarity.shape[-1])
    best = similarity.topk(count, dim=-1).values
    object5 = (similarity * on_object).topk(count, dim=-1).values.mean(-1)
    background5 = (similarity * (1 - on_object)).topk(count, dim=-1).values.mean(-1)
    # 1 where the best match of a position finds no better match than that position, less where it does.
    mutual = torch.exp(_MUTUAL_SHARPNESS * (similarity - similarity.amax(2, keepdim=True)))
    mutual = (mutual * (_MATCH_SHARPNESS * similarity).softmax(-1)).sum(-1)
    matched = ((_OBJECT_SHARPNESS * similarity).softmax(-1) * on_object).sum(-1)
    means = (F.normalize(torch.einsum("bkcq,bkq->bkc", theirs, share), dim=-1) for share in (weight, 1 - weight))
    object_mean, background_mean = (torch.einsum("bcp,bkc->bkp", mine, mean) for mean in means)
    cues = torch.stack(
        (
            best[..., 0],
            best.mean(-1),
            object5,
            background5,
            object5 - _BACKGROUND_SHARE * background5,
            mutual,
            matched,
            object_mean,
            background_mean,
        ),
        dim=2,
    )
    return cues.unflatten(-1, (height, width))


def common_context(
    own: Tensor,
    partners: Tensor,
    own_weights: Tensor | None = None,
    weights: Tensor | None = None,
    present: Tensor | None = None,
) -> Tensor:
    """The decoder's input beside the features: cues over all partners, and where the image's own object is assumed.

    Args:
        own, partners, weights: as in [`partner_cues`].
        own_weights: `(B, h, w)` in [0, 1]. It and `weights` are [`centre_prior`] if not given.
        present: `(B, K)` bool, which partners count; all if not given. One at least in every row.

    Returns:
        `(B, 37, h, w)` in the features' dtype: mean and maximum over the partners of each cue; the same, standardised
        over the image; the own weights.
    """
    middle = centre_prior(*own.shape[-2:], device=own.device)
    if own_weights is None:
        own_weights = middle.expand(own.shape[0], -1, -1)
    if weights is None:
        weights = middle.expand(*partners.shape[:2], -1, -1)
    cues = partner_cues(own, partners, weights)
    if present is None:
        mean, largest = cues.mean(1), cues.amax(1)
    else:
        shown = present[:, :, None, None, None]
        mean = (cues * shown).sum(1) / present.sum(1).clamp(min=1)[:, None, None, None]
        largest = cues.masked_fill(~shown, torch.finfo(cues.dtype).min).amax(1)
    raw = torch.cat((mean, largest), dim=1)
    centred = raw - raw.mean(dim=(2, 3), keepdim=True)
    spread = centred.square().mean(dim=(2, 3), keepdim=True).sqrt()
    context = torch.cat((raw, centred / (spread + 1e-3), own_weights.float().unsqueeze(1)), dim=1)
    return context.to(own.dtype)


def object_weights(masks: Tensor) -> Tensor:
    """Soft masks `(N, 16 h, 16 w)` as weights `(N, h, w)` of the positions of the stride-16 feature map."""
    return F.avg_pool2d(masks.float().unsqueeze(1), 16).squeeze(1)
