"""A network that is built and run in milliseconds, with every part of the real one, for the tests."""

from pathlib import Path

import torch
from transformers import ResNetConfig
from transformers.utils import ModelOutput

from macosnet_hf.configuration_macosnet import MaCoSNetConfig
from macosnet_hf.geometry import Transform
from macosnet_hf.image_processing_macosnet import MaCoSNetImageProcessor
from macosnet_hf.modeling_macosnet import MaCoSNetForKeypointMatching, MaCoSNetPreTrainedModel

IMAGE_SIZE = 96
GRID_SIZE = IMAGE_SIZE // 16


def _small_backbone(last_stage: int) -> ResNetConfig:
    return ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 12, 16, 24],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=[f"stage{number}" for number in range(1, last_stage + 1)],
    )


# Settings of a small network whose features are those of strides 16 and 32.
FUSED = {"backbone_config": _small_backbone(4), "fused_strides": [16, 32]}


def small_config(**kwargs) -> MaCoSNetConfig:
    """ResNet with strides 4, 8, 16 and 96x96 pixels: a feature grid of 6x6."""
    arguments = {
        "backbone_config": _small_backbone(3),
        "image_size": IMAGE_SIZE,
        "predictor_channels": [16, 12],
        "predictor_kernel_sizes": [3, 3],
        "decoder_widths": [12, 10, 8, 8],
    }
    return MaCoSNetConfig(**{**arguments, **kwargs})


def small_model(model_class: type[MaCoSNetPreTrainedModel], seed: int = 0, **kwargs) -> MaCoSNetPreTrainedModel:
    """In eval mode; heads and running statistics are far from their start, so that nothing is symmetric."""
    torch.manual_seed(seed)
    model = model_class(small_config(**kwargs))
    base = getattr(model, "macosnet", model)
    with torch.no_grad():
        # A fresh head hardly departs from the identity, where a wrong direction or order would go unseen.
        for head in (base.affine_head, base.tps_head):
            head.linear.weight.normal_(std=0.15)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def transforms_of(outputs: ModelOutput, regularization: float = 0.0) -> Transform:
    """T_ij of outputs that no model gave."""
    return Transform(outputs.affine, outputs.tps, regularization)


def small_processor() -> MaCoSNetImageProcessor:
    return MaCoSNetImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})


def save_small_checkpoint(folder: Path) -> Path:
    """Writes the small network and its processor as users do, and returns the folder."""
    small_model(MaCoSNetForKeypointMatching).save_pretrained(folder)
    small_processor().save_pretrained(folder)
    return folder


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(*shape: int, seed: int = 1) -> torch.Tensor:
    """`(*shape, 3, 96, 96)` images with structure at several scales (noise alone looks the same everywhere)."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(1)
    for size in (3, 6, 12, 48):
        noise = torch.randn(int(torch.tensor(shape).prod()), 3, size, size, generator=generator)
        total = total + torch.nn.functional.interpolate(noise, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear")
    return total.unflatten(0, shape)
