"""First stage: the transformation predictor learns from synthetic warps of single images.

The encoder stays as ImageNet made it. Both heads of G (affine, then TPS) learn to undo random warps, in both
directions of every pair; the loss is the distance between where the predicted and the true transform send a grid of
points.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..geometry import apply_affine, apply_cascade, make_grid, sampling_grid, warp
from ..matching import correlate, l2_normalize
from ..modeling_macosnet import MaCoSNetModel
from .synthetic import WarpRange, make_pairs


def grid_loss(predicted: Tensor, expected: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean of sqrt(d^2 + e^2) over points `(B, N, 2)`, weighted by `(B, N)`; d in normalised coordinates, e = 0.01.

    A distance that hard cases cannot dominate, smooth at zero.
    """
    distance = ((predicted - expected).square().sum(-1) + 1e-4).sqrt()
    if weight is None:
        return distance.mean()
    return (distance * weight).sum() / weight.sum().clamp(min=1)


class SyntheticObjective(nn.Module):
    """Grid loss of both heads over synthetic pairs.

    Args:
        model: its encoder and decoder are not trained here.
        feature_noise: largest noise added to features, relative to their own size. Two images of different
            objects of a kind resemble each other less than two warps of one image; noise closes part of that gap.
        exact_share: share of steps in which the TPS stage sees re-encoded pixels (as at test with `cascade="exact"`)
            instead of warped features.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: MaCoSNetModel,
        mean: list[float],
        std: list[float],
        limits: WarpRange,
        *,
        background_swap: float = 0.5,
        feature_noise: float = 0.7,
        exact_share: float = 0.5,
        points: int = 12,
    ):
        super().__init__()
        self.model = model
        self.limits = limits
        self.background_swap, self.feature_noise, self.exact_share = background_swap, feature_noise, exact_share
        self.points = points
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        model.requires_grad_(False)
        model.affine_head.requires_grad_(True)
        model.tps_head.requires_grad_(True)

    def train(self, mode: bool = True) -> SyntheticObjective:
        """The encoder and the decoder keep their statistics."""
        super().train(mode)
        self.model.encoder.eval()
        self.model.decoder.eval()
        return self

    @torch.no_grad()
    def _encode(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(memory_format=torch.channels_last)
        return self.model.encoder(pixels).last.float()

    def _noisy(self, features: Tensor, generator: torch.Generator) -> Tensor:
        if not self.feature_noise:
            return l2_normalize(features)
        level = torch.rand(len(features), 1, 1, 1, generator=generator).to(features.device) * self.feature_noise
        noise = torch.randn(features.shape, generator=generator).to(features.device)
        return l2_normalize(features + level * noise * features.std(dim=(1, 2, 3), keepdim=True))

    def forward(self, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """`(B, 3, S, S)` uint8 images to the losses of the affine head and of the whole cascade."""
        model, size = self.model, self.model.config.image_size
        with torch.no_grad():
            pairs = make_pairs(images.float() / 255, size, self.limits, generator, background_swap=self.background_swap)
            # Both directions at once: row b is (A, B), row B + b is (B, A).
            pixels = (torch.cat((pairs.source, pairs.target)) - self.mean) / self.std
            raw = self._encode(pixels)
            normalized = self._noisy(raw, generator)
            batch = len(pairs.source)
            target = torch.cat((normalized[batch:], normalized[:batch]))

            grid = make_grid(self.points, self.points, device=raw.device).reshape(1, -1, 2).expand(batch, -1, -1)
            in_source = apply_cascade(grid, pairs.affine, pairs.tps)
            # Points of B and where they lie in A; for the way back, points of A that lie inside of it, and where
            # they came from.
            start = torch.cat((grid, in_source))
            goal = torch.cat((in_source, grid))
            visible = (in_source.abs() <= 1).all(-1).float()
            weight = torch.cat((0.3 + 0.7 * visible, visible))

        affine = model.affine_head(correlate(normalized, target))
        affine_loss = grid_loss(apply_affine(start, affine), goal, weight)

        with torch.no_grad():
            fixed = affine.detach()
            exact = torch.rand(1, generator=generator).item() < self.exact_share
            if exact:
                places = sampling_grid(fixed, size=(size, size))
                warped = self._encode(warp(pixels, places, padding_mode=model.config.padding_mode))
            else:
                places = sampling_grid(fixed, size=raw.shape[-2:])
                warped = warp(raw, places, padding_mode=model.config.padding_mode)
            warped = self._noisy(warped, generator)
        tps = model.tps_head(correlate(warped, target))
        tps_loss = grid_loss(apply_cascade(start, fixed, tps), goal, weight)
        return {"total": affine_loss + tps_loss, "affine": affine_loss, "tps": tps_loss}
