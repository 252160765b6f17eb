"""What the features of a pair say against the transform, turned into a lesson for the transform.

Local matching (`matching.match_locally`) moves each point from where the transform sends it to where the
features agree best. Where that is confirmed by the way back and lies on both objects, the predictor learns to send the
point there by itself. No label is needed beyond "these images show the same kind of thing".
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..configuration_macosnet import MaCoSNetConfig
from ..geometry import Transform, make_grid, on_device, sample_at
from ..matching import fit_mutually, match_locally
from ..modeling_macosnet import MaCoSNetModelOutput, ordered_pairs
from .pretraining import grid_loss


def local_matching_targets(
    outputs: MaCoSNetModelOutput,
    transforms: Transform,
    config: MaCoSNetConfig,
    points: Tensor,
    *,
    guided: bool = True,
    return_sigma: float = 0.15,
) -> tuple[Tensor, Tensor]:
    """Where points of view j lie in view i by local matching, for every ordered pair (i, j), and how far to trust it.

    With the configuration's `mutual_fit`, local matching starts from the transforms of `fit_mutually`.

    Args:
        outputs: of the model, for pairs or triplets; the masks may be missing.
        transforms: `(B, P)`, those of the outputs (`model.transforms(outputs)`).
        config: of the model.
        points: `(N, 2)` normalised points.
        guided: whether only points on both objects are trusted.
        return_sigma: distance from the start, after the way there and back, at which trust falls to exp(-1/2).

    Returns:
        Points `(B, P, N, 2)`, normalised, and trust `(B, P, N)` in [0, 1]. No graph.
    """
    with torch.no_grad():
        batch, pairs = outputs.affine.shape[:2]
        views = 2 if pairs == 2 else 3
        order = ordered_pairs(views)
        features, transforms = outputs.features.float(), transforms.to(torch.float32)
        # T_ij sends points of j into i: the points are on the second view of the pair.
        ends, starts = (on_device([pair[side] for pair in order], features.device) for side in (0, 1))
        if config.mutual_fit:  # a pair stands beside its reverse
            transforms = fit_mutually(
                torch.stack((features[:, ends[::2]], features[:, starts[::2]]), dim=2).flatten(0, 1),
                transforms.unflatten(1, (-1, 2)).flatten(0, 1),
                temperature=config.local_matching_temperature,
            )
            transforms = transforms.unflatten(0, (batch, -1)).flatten(1, 2)

        def matched(index: Tensor, reverse: bool, given: Tensor) -> Tensor:
            start, end = (ends, starts) if reverse else (starts, ends)
            return match_locally(
                features[:, start].flatten(0, 1),
                features[:, end].flatten(0, 1),
                given,
                transforms[:, index].flatten(0, 1),
                **config.local_matching_options,
            )

        forth = torch.arange(pairs, device=features.device)
        back = forth ^ 1
        given = points.to(features).expand(batch * pairs, -1, -1)
        found = matched(forth, False, given)
        returned = matched(back, True, found)
        trust = torch.exp(-0.5 * ((returned - given).norm(dim=-1) / return_sigma).square())
        trust = trust * (found.abs() <= 1).all(-1)
        if guided and outputs.mask_logits is not None:
            masks = outputs.mask_logits.float().sigmoid()
            # mask_logits[:, p] is the mask of view i; that of view j, given i, stands at the reverse pair.
            on_end = sample_at(masks.flatten(0, 1).unsqueeze(1), found).squeeze(-1)
            on_start = sample_at(masks[:, back].flatten(0, 1).unsqueeze(1), given).squeeze(-1)
            trust = trust * (on_end * on_start).clamp(min=0).sqrt()
        return found.unflatten(0, (batch, pairs)), trust.unflatten(0, (batch, pairs))


def local_matching_loss(
    outputs: MaCoSNetModelOutput,
    transforms: Transform,
    config: MaCoSNetConfig,
    *,
    guided: bool = True,
    side: int = 10,
) -> Tensor:
    """Distance between where the transforms send a grid of points and where local matching finds them.

    The affine alone and the whole cascade (with the affine held fixed, as in the first stage) are both compared, in
    normalised coordinates, weighted by trust.

    Args:
        outputs, transforms, config: as in [`local_matching_targets`].
        guided: whether the masks say which points count.
        side: points a side of the grid.
    """
    device = outputs.affine.device
    axis = make_grid(side, side, device=device).reshape(-1, 2) * (1 - 1 / side)
    transforms = transforms.to(torch.float32)
    found, trust = local_matching_targets(outputs, transforms, config, axis, guided=guided)
    found, trust, flat = found.flatten(0, 1), trust.flatten(0, 1), transforms.flatten(0, 1)
    start = axis.expand(*flat.shape, -1, -1)
    by_affine = grid_loss(flat.without_spline().apply(start), found, trust)
    return by_affine + grid_loss(replace(flat, affine=flat.affine.detach()).apply(start), found, trust)
