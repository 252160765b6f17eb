"""E: the features of images, from any backbone with a stage of stride 16.

The paper takes ResNet-101 up to conv4-23, or VGG-16. The module travels with the model to the Hub.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .configuration_macosnet import MaCoSNetConfig
from .errors import InputError
from .geometry import on_device
from .matching import l2_normalize

# A field that is never None in an output: `ModelOutput` wants None for a default all the same.
FILLED: Any = None


@dataclass
class MaCoSNetFeatures(ModelOutput):
    """What the encoder E says about N images; made once and used for every pair and both tasks.

    Args:
        last (`(N, C, h, w)`): stride-16 feature map, as the encoder gives it. Of several fused stages: their
            concatenation, each as long at every position as its weight times the stage of stride 16 is there.
        normalized (`(N, C, h, w)`): the same with unit length over channels: f in the paper.
        skips (tuple of `(N, c, H/s, W/s)`): maps of the finer stages, coarsest last.
    """

    last: Tensor = FILLED
    normalized: Tensor = FILLED
    skips: tuple[Tensor, ...] = FILLED

    @classmethod
    def from_map(cls, last: Tensor, skips: Sequence[Tensor] = ()) -> MaCoSNetFeatures:
        """The features of stride-16 maps `(N, C, h, w)`, and of finer ones where the decoder needs them."""
        return cls(last=last, normalized=l2_normalize(last), skips=tuple(skips))

    def without_skips(self) -> MaCoSNetFeatures:
        """The same without the maps that only the decoder needs: what a matcher may copy at little cost."""
        return MaCoSNetFeatures(last=self.last, normalized=self.normalized, skips=())

    def on_grid(self, side: int) -> MaCoSNetFeatures:
        """The same without finer maps, on a grid of `side` by `side` cells whose corners are the corners of this one;
        nothing is done where it is that grid."""
        if self.last.shape[-2:] == (side, side):
            return self
        return self.from_map(F.interpolate(self.last, size=(side, side), mode="bilinear", align_corners=True))

    def select(self, index: Tensor | list[int] | slice) -> MaCoSNetFeatures:
        """The features of some of the images, in the given order."""
        if isinstance(index, list):
            index = on_device(index, self.last.device)
        return MaCoSNetFeatures(
            last=self.last[index], normalized=self.normalized[index], skips=tuple(skip[index] for skip in self.skips)
        )


class MaCoSNetEncoder(nn.Module):
    """E: any backbone with a stride-16 stage. Stages behind the last one that is used are cut off, not just ignored.

    Attributes:
        strides, channels: of each chosen stage.
        skip_channels: of the maps for the decoder's skip connections, by stride.
        feature_channels: C of the features, over all fused stages.
        patch_size: of a vision transformer. One whose patches are not of 16 pixels sees resized images: a patch a cell.
    """

    def __init__(self, config: MaCoSNetConfig):
        # At the top it would import the table of auto models, into which the package registers its models: in a circle.
        from transformers import AutoBackbone

        super().__init__()
        self.strides = tuple(config.feature_strides)
        self.fused_weights = dict(zip(config.fused_strides, config.fused_weights, strict=True))
        _check_architecture(config.backbone_config)
        self.backbone = AutoBackbone.from_config(config.backbone_config)
        self.channels = tuple(self.backbone.channels)
        if config.feature_blocks is not None:
            self.channels = _choose_blocks(self.backbone, config.feature_blocks)
        if len(self.channels) != len(self.strides):
            raise InputError(
                f"The backbone gives {len(self.channels)} stages, but feature_strides names {len(self.strides)}."
            )
        _cut_unused_stages(self.backbone)
        channels = dict(zip(self.strides, self.channels, strict=True))
        self.skip_channels = {stride: count for stride, count in channels.items() if stride < 16}
        self.feature_channels = sum(channels[stride] for stride in self.fused_weights)
        self.patch_size = _patch_size(config)

    def forward(self, pixel_values: Tensor) -> MaCoSNetFeatures:
        """`(N, 3, H, W)` normalised images to [`MaCoSNetFeatures`]."""
        seen = pixel_values
        if self.patch_size != 16:
            size = [side // 16 * self.patch_size for side in pixel_values.shape[-2:]]
            seen = F.interpolate(pixel_values.float(), size=size, mode="bicubic", antialias=True)
            seen = seen.to(pixel_values.dtype)  # not every device resizes in half precision
        maps = dict(zip(self.strides, self.backbone(seen).feature_maps, strict=True))
        for stride, feature_map in maps.items():
            expected = tuple(side // stride for side in pixel_values.shape[-2:])
            above = tuple(-(-side // stride) for side in pixel_values.shape[-2:])  # 240 pixels at stride 32: 7 or 8
            if tuple(feature_map.shape[-2:]) not in (expected, above):
                raise InputError(
                    f"The backbone's stage for stride {stride} gives a map of {tuple(feature_map.shape[-2:])}, not "
                    f"{expected}: choose other stages (out_indices) or other feature_strides."
                )
        return MaCoSNetFeatures.from_map(self._fuse(maps), [maps[stride] for stride in self.strides if stride < 16])

    def _fuse(self, maps: dict[int, Tensor]) -> Tensor:
        """`last` of [`MaCoSNetFeatures`] from the maps of the stages, by stride.

        Each stage takes over the length of stride 16. So one map serves everything: its L2 normalisation is that of the
        weighted concatenation, it may be warped and pooled as the map of a single stage is, and the decoder sees
        how strong a position is, which is a cue for objects.
        """
        middle = maps[16]
        if tuple(self.fused_weights) == (16,):
            return middle
        length = (middle.float().square().sum(dim=1, keepdim=True) + 1e-6).sqrt().to(middle.dtype)
        parts = [
            weight * length * resample_map(l2_normalize(maps[stride]), stride, middle.shape[-2:])
            for stride, weight in self.fused_weights.items()
        ]
        return torch.cat(parts, dim=1)


def _check_architecture(backbone: Any) -> None:
    """Refuses what the installed timm does not know; timm itself looks elsewhere for some names.

    Raises:
        InputError: with the name.
    """
    if backbone.model_type == "timm_backbone":
        import timm

        if not timm.is_model(backbone.backbone):
            raise InputError(f"The installed timm knows no architecture {backbone.backbone!r}.")


def _patch_size(config: MaCoSNetConfig) -> int:
    """Pixels a side of the patches of a vision transformer whose only map is that of its patches; else 16."""
    size = getattr(config.backbone_config, "patch_size", None)
    plain = config.feature_strides == [16] and not hasattr(config.backbone_config, "depths")
    return size if plain and isinstance(size, int) else 16


def _choose_blocks(backbone: Any, numbers: Sequence[int]) -> tuple[int, ...]:
    """Lets a timm EfficientNet give the maps of these blocks; returns their channels.

    timm itself offers the last block of each stride only. That of stride 32 is wide and a poor descriptor: fused with
    stride 16 (EfficientNet-Lite0, nearest neighbours on leordeanu-cars, PCK at 0.1) `blocks.6` gives 0.614, `blocks.5`
    0.657, stride 16 alone 0.623.

    Raises:
        InputError: if the backbone is of another family, or has no such blocks.
    """
    timm_model: Any = getattr(backbone, "_backbone", None)
    if not (hasattr(timm_model, "_stage_out_idx") and hasattr(timm_model, "blocks")):
        raise InputError("feature_blocks needs a backbone of timm's EfficientNet family.")
    if sorted(set(numbers)) != list(numbers) or not 0 <= numbers[0] <= numbers[-1] < len(timm_model.blocks):
        raise InputError(f"feature_blocks must rise within 0 to {len(timm_model.blocks) - 1}; got {list(numbers)}.")
    timm_model._stage_out_idx = {number + 1: index for index, number in enumerate(numbers)}
    # A block ends with the normalisation of its last convolution.
    norms = [[m for m in timm_model.blocks[k].modules() if isinstance(m, nn.BatchNorm2d)][-1] for k in numbers]
    return tuple(norm.num_features for norm in norms)


def _cut_unused_stages(backbone: Any) -> None:
    """Removes the stages that no chosen output needs, where the kind of backbone is known; else leaves it alone."""
    timm_model: Any = getattr(backbone, "_backbone", None)
    if hasattr(timm_model, "_stage_out_idx") and hasattr(timm_model, "blocks"):  # timm's EfficientNet family
        timm_model.blocks = timm_model.blocks[: max(timm_model._stage_out_idx)]
    encoder: Any = getattr(backbone, "encoder", None)
    if timm_model is None and isinstance(getattr(encoder, "stages", None), nn.ModuleList):  # transformers' ResNets
        names = list(backbone.stage_names)
        last = max(names.index(name) for name in backbone.out_features)
        if last >= 1:
            encoder.stages = encoder.stages[:last]


def resample_map(maps: Tensor, stride: int, size: Sequence[int]) -> Tensor:
    """Maps `(N, C, h', w')` of a stage on the grid `(h, w)` of the stage of stride 16: means of finer cells, bilinear
    interpolation of coarser ones.

    Cells stand where the strided convolutions put them. Over an odd number of cells (15 to 8) a stride of 2 centres
    every output on an even cell, the last one included: corner lies on corner. Over an even number (20 to 10) it may
    centre it on either cell of two, as the padding decides; half-pixel centres are half a cell from both, and on
    leordeanu-cars (EfficientNet-Lite2, 320 pixels) none of the three is better by more than half a point of PCK.
    """
    height, width = size
    if stride <= 16:
        return F.avg_pool2d(maps, 16 // stride)
    corners = (maps.shape[-1] - 1) * stride == (width - 1) * 16 and (maps.shape[-2] - 1) * stride == (height - 1) * 16
    return F.interpolate(maps, size=(height, width), mode="bilinear", align_corners=corners)
