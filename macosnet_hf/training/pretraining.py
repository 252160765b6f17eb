"""First stage: the transformation predictor learns from synthetic warps of single images.

The encoder stays as ImageNet made it. Both heads of G (affine, then TPS) learn to undo random warps, in both
directions of every pair; the loss is the distance between where the predicted and the true transform send a grid of
points.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.utils.generic import maybe_autocast

from ..geometry import Transform, make_grid, on_device, warp
from ..matching import correlate, l2_normalize
from ..modeling_macosnet import MaCoSNetModel
from .objectives import Objective
from .synthetic import WarpRange, make_pairs


def grid_loss(predicted: Tensor, expected: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean of sqrt(d^2 + e^2) over points `(B, N, 2)`, weighted by `(B, N)`; d in normalised coordinates, e = 0.01.

    A distance that hard cases cannot dominate, smooth at zero.
    """
    distance = ((predicted - expected).square().sum(-1) + 1e-4).sqrt()
    if weight is None:
        return distance.mean()
    return (distance * weight).sum() / weight.sum().clamp(min=1)


class SyntheticObjective(Objective):
    """Grid loss of both heads over synthetic pairs.

    Args:
        model: its encoder and decoder are not trained here.
        feature_noise: largest noise added to features, relative to their own size. Two images of different
            objects of a kind resemble each other less than two warps of one image; noise closes part of that gap.
        exact_share: share of steps in which the TPS stage sees re-encoded pixels (as at test with `cascade="exact"`)
            instead of warped features.
        draw_on_device: whether random numbers are drawn where the images are, from a generator of the same seed: many
            times faster on a GPU, and other numbers than a CPU's.
    """

    def __init__(
        self,
        model: MaCoSNetModel,
        mean: Sequence[float],
        std: Sequence[float],
        limits: WarpRange,
        *,
        background_swap: float = 0.5,
        feature_noise: float = 0.7,
        exact_share: float = 0.5,
        points: int = 12,
        draw_on_device: bool = False,
    ):
        super().__init__(model, mean, std, ("predictor",))
        self.limits = limits
        self.background_swap, self.feature_noise, self.exact_share = background_swap, feature_noise, exact_share
        self.points, self.draw_on_device = points, draw_on_device

    @torch.no_grad()
    def _encode(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(memory_format=torch.channels_last)
        return self.model.encoder(pixels).on_grid(self.model.config.predictor_grid).last.float()

    def _noisy(self, features: Tensor, generator: torch.Generator) -> Tensor:
        if not self.feature_noise:
            return l2_normalize(features)
        where = generator.device
        level = on_device(torch.rand(len(features), 1, 1, 1, generator=generator, device=where), features.device)
        level = level * self.feature_noise
        noise = on_device(torch.randn(features.shape, generator=generator, device=where), features.device)
        return l2_normalize(features + level * noise * features.std(dim=(1, 2, 3), keepdim=True))

    def forward(self, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """`(B, 3, S, S)` uint8 images to the losses of the affine head and of the whole cascade."""
        model, size = self.model, self.model.config.image_size
        if self.draw_on_device:
            generator = torch.Generator(images.device).manual_seed(generator.initial_seed())
        # Coordinates are computed in float32 also where the network is autocast: bf16 resolves half a pixel.
        exactly = functools.partial(maybe_autocast, images.device.type, enabled=False)
        with torch.no_grad(), exactly():
            pairs = make_pairs(images.float() / 255, size, self.limits, generator, background_swap=self.background_swap)
            # Both directions at once: row b is (A, B), row B + b is (B, A).
            pixels = self.normalize(torch.cat((pairs.source, pairs.target)))
            batch = len(pairs.source)
            grid = make_grid(self.points, self.points, device=pixels.device).reshape(1, -1, 2).expand(batch, -1, -1)
            in_source = pairs.transform.apply(grid)
            # Points of B and where they lie in A; for the way back, points of A that lie inside of it, and where
            # they came from.
            start = torch.cat((grid, in_source))
            goal = torch.cat((in_source, grid))
            visible = (in_source.abs() <= 1).all(-1).float()
            weight = torch.cat((0.3 + 0.7 * visible, visible))
        with torch.no_grad():
            raw = self._encode(pixels)
            normalized = self._noisy(raw, generator)
            target = torch.cat((normalized[batch:], normalized[:batch]))

        affine = model.affine_head(correlate(normalized, target))
        with exactly():
            affine_loss = grid_loss(Transform(affine).apply(start), goal, weight)

        with torch.no_grad():
            fixed = Transform(affine.detach())
            reencode = torch.rand(1, generator=generator, device=generator.device).item() < self.exact_share
            with exactly():
                places = fixed.grid((size, size) if reencode else raw.shape[-2:])
                warped = warp(pixels if reencode else raw, places, padding_mode=model.config.padding_mode)
            if reencode:
                warped = self._encode(warped)
            warped = self._noisy(warped, generator)
        cascade = model.make_transform(fixed.affine, model.tps_head(correlate(warped, target)))
        with exactly():
            tps_loss = grid_loss(cascade.apply(start), goal, weight)
        return {"total": affine_loss + tps_loss, "affine": affine_loss, "tps": tps_loss}
