"""The encoder's features of many images: all of them, or their mean and spread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..image_processing_macosnet import MaCoSNetImageProcessor
from ..modeling_macosnet import MaCoSNetFeatures, MaCoSNetModel
from .images import TrainingImages


def _encoded(
    model: MaCoSNetModel, processor: MaCoSNetImageProcessor, images: TrainingImages, indices: Sequence[int]
) -> Iterator[MaCoSNetFeatures]:
    """Features of the images with these numbers, 16 at a time."""
    size = (model.config.image_size, model.config.image_size)
    mean, std = (
        torch.tensor(v, device=model.device).view(1, 3, 1, 1) for v in (processor.image_mean, processor.image_std)
    )
    for start in range(0, len(indices), 16):
        pixels = images.batch(indices[start : start + 16]).to(model.device).float() / 255
        pixels = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)
        yield model.get_image_features((pixels - mean) / std)


@torch.no_grad()
def encode_all(model: MaCoSNetModel, processor: MaCoSNetImageProcessor, images: TrainingImages) -> Tensor:
    """Stride-16 features of all images, `(N, C, h, w)` float32 on the CPU."""
    encoded = _encoded(model, processor, images, range(len(images)))
    return torch.cat([features.last.float().cpu() for features in encoded])


@torch.no_grad()
def feature_statistics(
    model: MaCoSNetModel, processor: MaCoSNetImageProcessor, images: TrainingImages, indices: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation `(C,)` of the encoder's unit-length features over the images with these numbers."""
    total, squares = torch.zeros(2, model.encoder.feature_channels, dtype=torch.float64, device=model.device)
    cells = 0
    for features in _encoded(model, processor, images, indices):
        values = features.normalized.double()
        total = total + values.sum(dim=(0, 2, 3))
        squares = squares + values.square().sum(dim=(0, 2, 3))
        cells += values.numel() // values.shape[1]
    mean = total / cells
    variance = (squares / cells - mean.square()).clamp(min=0)
    return mean.float(), variance.sqrt().float()


@torch.no_grad()
def class_similarity(
    model: MaCoSNetModel, processor: MaCoSNetImageProcessor, images: TrainingImages, masks: Tensor
) -> Tensor:
    """How much the objects of the classes look alike: `(C, C)` in [-1, 1], classes in the order of their first images.

    The cosine between the mean features of the objects of two classes, less those of all classes. Images without a mask
    do not count.

    Args:
        masks: `(N, H, W)`, of all images.
    """
    means: list[Tensor] = []
    for features in _encoded(model, processor, images, range(len(images))):
        maps = features.normalized.float()
        rows = slice(len(means), len(means) + len(maps))
        weights = F.interpolate(masks[rows].to(maps.device).float().unsqueeze(1), size=maps.shape[-2:], mode="area")
        means.extend(F.normalize((maps * weights).sum(dim=(2, 3)), dim=1).cpu())
    of_images, counted = torch.stack(means), masks.flatten(1).any(dim=1).float().cpu()
    classes = torch.stack(
        [of_images[rows].sum(dim=0) / counted[rows].sum().clamp(min=1) for rows in images.classes().values()]
    )
    unit = F.normalize(classes - classes.mean(0), dim=1)
    return unit @ unit.t()
