"""Converts published checkpoints (`.pth.tar`) of CNNGeometric, weakalign, WeakMatchNet and MaCoSNet, and back.

docs/converting.md lists the names.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, InputError
from ..io.checkpoints import PICKLE_STARTS, fault_of_values

if TYPE_CHECKING:
    from torch import Tensor

    from ..modeling_macosnet import MaCoSNetForKeypointMatching, MaCoSNetModel

# Beginnings of names in the published networks and in `MaCoSNetModel`. Theirs number the children of torchvision's
# ResNet-101; 2 and 3 are the ReLU and the pooling.
_ENCODER, _OUR_ENCODER = "FeatureExtraction.model.", "encoder.backbone._backbone."
_AFFINE, _TPS = "FeatureRegression.", "FeatureRegression2."
_HEADS = {_AFFINE: "affine_head.", _TPS: "tps_head."}
_CHILDREN = {"0.": "conv1.", "1.": "bn1.", "4.": "layer1.", "5.": "layer2.", "6.": "layer3."}
_OUR_PREFIXES = {**{_ENCODER + old: _OUR_ENCODER + new for old, new in _CHILDREN.items()}, **_HEADS}
_THEIR_PREFIXES = {ours: theirs for theirs, ours in _OUR_PREFIXES.items()}
# An untrained decoder says "object" everywhere, with this logit, so that matches depend on the transform alone.
_OBJECT_EVERYWHERE = 6.0


@dataclass
class Conversion:
    """A converted model.

    Attributes:
        model: in evaluation mode, on the CPU. Its decoder is untrained and says "object" everywhere.
        left_out: names of the file's weights that the model does not have.
        notes: what a user should know, one sentence each.
    """

    model: MaCoSNetForKeypointMatching
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def convert(checkpoint: str | os.PathLike[str], second: str | os.PathLike[str] | None = None) -> Conversion:
    """Converts a published checkpoint.

    Args:
        checkpoint: a file with both stages, or with one of them.
        second: a file with the other stage.

    Raises:
        CheckpointError: if a file cannot be read safely, or does not hold one of these networks. The text names the
            weights that are missing, unknown or of another shape.
    """
    for path in (checkpoint, second):  # before torch is imported, which takes long
        if path is not None:
            _check_kind(os.fspath(path))
    ours: dict[str, Tensor] = {}
    left_out: list[str] = []
    for path in (checkpoint, second):
        if path is not None:
            found, unused = _translate(read_state_dict(path), str(path))
            left_out += unused
            _merge(ours, found, str(path))
    conversion = Conversion(_build(ours, str(checkpoint)), left_out)
    for prefix, stage in (("affine_head.", "affine"), ("tps_head.", "thin-plate-spline")):
        if not any(name.startswith(prefix) for name in ours):
            conversion.notes.append(f"The file holds no {stage} stage; the identity stands in its place.")
    if left_out:
        conversion.notes.append(
            f"Left out, because the decoder here has another shape: {', '.join(left_out)}. Train a decoder with "
            "training/warm_start_decoder.py."
        )
    else:
        conversion.notes.append("The decoder is untrained: train one with training/warm_start_decoder.py.")
    return conversion


def save(conversion: Conversion, folder: str | os.PathLike[str]) -> None:
    """Writes the model and its processor, for `from_pretrained(folder)`.

    Raises:
        OutputError: if the folder cannot be written; nothing is left then.
    """
    from ..image_processing_macosnet import MaCoSNetImageProcessor
    from ..io.output_folder import output_folder

    size = conversion.model.config.image_size
    processor = MaCoSNetImageProcessor.from_preset("paper")
    processor.size = {"height": size, "width": size}
    with output_folder(folder) as partial:
        conversion.model.save_pretrained(partial)
        processor.save_pretrained(partial)


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a `.pth.tar` file; no code in the file runs.

    A leading `module.` (from `DataParallel`) is removed from the names, and `vgg`, an old name of any encoder, becomes
    `model`.

    Raises:
        CheckpointError: if the file is missing or damaged, holds other things than tensors, or no state dict.
    """
    name = os.fspath(path)
    _check_kind(name)
    _check_members(name)
    import torch

    try:
        # The training scripts put their arguments into the file; a namespace only holds values.
        safe = torch.serialization.safe_globals([argparse.Namespace, *_numpy_scalars()])
        with safe, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old pickles; what cannot be read is an error anyway
            content = torch.load(name, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted is None:
            raise CheckpointError(
                f"{name} is refused: it is a pickle of something else than tensors and plain settings."
            ) from error
        raise CheckpointError(
            f"{name} is refused: to load it, code would have to run (it asks for {wanted[1]}). Where you trust it, "
            "load it yourself and save its tensors alone: torch.save({'state_dict': state_dict}, file)."
        ) from error
    except Exception as error:  # torch raises many kinds for files that are no checkpoints
        raise CheckpointError(
            f"{name} is damaged or cut off: it begins like a PyTorch checkpoint, but cannot be read as one."
        ) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content or not all(isinstance(key, str) for key in content):
        raise CheckpointError(f"{name} holds no state dict.")
    tensors = {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}
    if len(tensors) < len(content):
        odd = next(key for key in content if key not in tensors)
        raise CheckpointError(f"{name} holds no state dict: {odd} is no tensor.")
    for key, tensor in tensors.items():
        if fault := _fault(key, tensor):
            raise CheckpointError(f"{name} is refused: {key} {fault}.")
    return {re.sub(r"^(?:module\.)+", "", key).replace(".vgg.", ".model."): value for key, value in tensors.items()}


def _check_kind(name: str) -> None:
    """Refuses by its first bytes what torch.save has not written; torch's own messages about such files do not help.

    Raises:
        CheckpointError: saying what the file is.
    """
    if os.path.isdir(name):
        raise CheckpointError(f"{name} is a folder; give the .pth.tar file itself.")
    if not os.path.isfile(name):
        raise CheckpointError(f"There is no checkpoint file {name}.")
    try:
        with open(name, "rb") as file:
            start = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read ({error.strerror or error}).") from error
    if not start:
        raise CheckpointError(f"{name} is empty.")
    if start[257:262] == b"ustar":
        raise CheckpointError(
            f"{name} is a tar archive: a checkpoint in it must be taken out first, and one of PyTorch's first "
            "versions, which were such archives, cannot be read safely."
        )
    if start[8:9] == b"{":
        raise CheckpointError(f"{name} holds safetensors, not a published .pth.tar checkpoint.")
    if not start.startswith(PICKLE_STARTS):
        raise CheckpointError(f"{name} is no PyTorch checkpoint: torch.save writes no file that begins like this one.")


def _check_members(name: str) -> None:
    """Refuses an archive that is larger unpacked: torch.save compresses nothing, and 2.7 MB can stand for 2.7 GB.

    Raises:
        CheckpointError: with both sizes.
    """
    if not zipfile.is_zipfile(name):  # PyTorch's older format, or damaged
        return
    try:
        with zipfile.ZipFile(name) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        raise CheckpointError(f"{name} is damaged or cut off: its list of members cannot be read.") from error
    if unpacked > os.path.getsize(name):
        raise CheckpointError(
            f"{name} is refused: its members would take {unpacked} bytes, more than the file's "
            f"{os.path.getsize(name)}, but torch.save compresses none."
        )


def _fault(name: str, tensor: Tensor) -> str:
    """What keeps a tensor of a file from being a weight, after its name in a sentence; empty if nothing does.

    Nothing is copied: a tensor with strides of 0 has any number of elements in a file of any size.
    """
    import torch

    if tensor.is_nested or tensor.layout != torch.strided or tensor.is_quantized:
        kind = "nested" if tensor.is_nested else "quantised" if tensor.is_quantized else "sparse"
        return f"is a {kind} tensor, not a plain one"
    if tensor.device.type != "cpu":
        return f"has no values (it is on the device {tensor.device.type})"
    counter = name.endswith("num_batches_tracked")
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if tensor.dtype not in ((torch.int64,) if counter else floats):
        return (
            f"holds {str(tensor.dtype).removeprefix('torch.')}, not {'int64' if counter else 'floating-point numbers'}"
        )
    held = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() > held:
        return f"has the shape {tuple(tensor.shape)}, but the file holds {held} bytes for it"
    return ""


def _numpy_scalars() -> list[Any]:
    """Classes of a pickled numpy number, under the names of old and new versions; none of them runs code."""
    import numpy as np

    current = np.lib.NumpyVersion(np.__version__) >= "2.0.0"
    scalar = importlib.import_module(f"numpy.{'_core' if current else 'core'}.multiarray").scalar
    named = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [*named, (_number_type, "numpy.dtype"), type(np.dtype("float64")), np.float64]


def _number_type(name: Any, *_: Any) -> Any:
    """NumPy's type of one number; one of its other types lets a scalar of a hundred bytes ask for gigabytes."""
    import numpy as np

    if not isinstance(name, str) or not re.fullmatch("[fiu][1248]", name):
        raise pickle.UnpicklingError(f"{name!r} is no type of a number")
    return np.dtype(name)


# ---------------------------------------------------------------------------------------------------------------------
# Translating
# ---------------------------------------------------------------------------------------------------------------------


def _renamed(name: str, prefixes: dict[str, str]) -> str | None:
    """A name with another beginning; None if it has none of these."""
    old = next(filter(name.startswith, prefixes), None)
    return None if old is None else prefixes[old] + name.removeprefix(old)


def _their_name(name: str) -> str:
    """The name of a weight of ours in their two-stage networks."""
    return _renamed(name, _THEIR_PREFIXES) or name


def _translate(theirs: dict[str, Tensor], where: str) -> tuple[dict[str, Tensor], list[str]]:
    """Their weights under the names of `MaCoSNetModel`, and the names of those that are left out: their decoder's."""
    if not any(name.startswith(_ENCODER) for name in theirs):
        raise CheckpointError(
            f"{where} is no CNNGeometric, weakalign or MaCoSNet checkpoint: none of its weights is called {_ENCODER}*; "
            f"the first is {next(iter(theirs))}."
        )
    left_out = [name for name in theirs if name.startswith("Decoder.")]
    bias = theirs.get(_AFFINE + "linear.bias")
    if not any(name.startswith(_TPS) for name in theirs) and bias is not None and bias.shape == (18,):
        # A file of the second stage alone calls its head as the first stage's.
        theirs = {name.replace(_AFFINE, _TPS): tensor for name, tensor in theirs.items()}
    ours: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in theirs.items():
        if new := _renamed(name, _OUR_PREFIXES):
            ours[new] = tensor
        elif not name.startswith("Decoder."):
            unknown.append(name)
    if unknown:
        raise CheckpointError(
            f"{where} holds weights that have no place in a ResNet-101 with transformation heads: {_names(unknown)}."
        )
    for name in ours.keys() & {f"{prefix}conv.0.weight" for prefix in _HEADS.values()}:
        shape = tuple(ours[name].shape)
        if len(shape) != 4 or math.isqrt(shape[1]) ** 2 != shape[1]:
            raise CheckpointError(
                f"{where}: {_their_name(name)} has the shape {shape}, which fits no square feature map."
            )
        ours[name] = _transpose_channels(ours[name], math.isqrt(shape[1]))
    return ours, left_out


def _transpose_channels(weight: Tensor, side: int) -> Tensor:
    """First convolution of a head, `(out, side * side, k, k)`, from column-major correlation channels to row-major.

    Their channel of the source's row i and column j is `j * side + i`, ours `i * side + j`. The same permutation leads
    back.
    """
    return weight.unflatten(1, (side, side)).transpose(1, 2).flatten(1, 2).contiguous()


def _merge(into: dict[str, Tensor], found: dict[str, Tensor], where: str) -> None:
    """Adds the weights of a second file, which may hold the same encoder."""
    import torch

    for name, tensor in found.items():
        known = into.setdefault(name, tensor)
        if known is tensor:
            continue
        if not name.startswith(_OUR_ENCODER):
            raise CheckpointError(f"{where} holds the same stage as the first file ({_their_name(name)}).")
        if "num_batches_tracked" not in name and not (known.shape == tensor.shape and torch.equal(known, tensor)):
            raise CheckpointError(
                f"The two files have different encoders ({_their_name(name)} differs); they are no pair."
            )


# ---------------------------------------------------------------------------------------------------------------------
# Building
# ---------------------------------------------------------------------------------------------------------------------


def _build(ours: dict[str, Tensor], where: str) -> MaCoSNetForKeypointMatching:
    """The model with these weights, all of which must fit.

    Raises:
        CheckpointError: naming the weights that do not fit as the file does.
    """
    import torch

    from ..configuration_macosnet import MaCoSNetConfig
    from ..modeling_macosnet import MaCoSNetForKeypointMatching

    settings = _head_settings(ours, where)
    # The published figures are those of the transform alone.
    try:
        config = MaCoSNetConfig.from_preset("paper", local_matching=False, **settings)
    except InputError as error:
        raise CheckpointError(f"{where} has heads of a size that none has: {error}") from error
    model = MaCoSNetForKeypointMatching(config)
    wanted = model.macosnet.state_dict()
    stages = {prefix for prefix in _HEADS.values() if any(name.startswith(prefix) for name in ours)}
    needed = {name for name in wanted if name.startswith((_OUR_ENCODER, *stages))}
    # PyTorch before 0.4 did not count batches.
    missing = [name for name in needed - ours.keys() if not name.endswith("num_batches_tracked")]
    faults = []
    if missing:
        faults.append(f"lacks {_names(_their_name(name) for name in missing)}")
    if extra := ours.keys() - needed:
        faults.append(f"has {_names(_their_name(name) for name in extra)} too many")
    if wrong := [name for name in needed & ours.keys() if ours[name].shape != wanted[name].shape]:
        name = sorted(wrong)[0]
        faults.append(
            f"has {_names(_their_name(name) for name in wrong)} in another shape "
            f"({tuple(ours[name].shape)}, not {tuple(wanted[name].shape)})"
        )
    if faults:
        raise CheckpointError(f"{where} is no ResNet-101 with CNNGeometric's heads: it {'; it '.join(faults)}.")
    model.macosnet.load_state_dict(ours, strict=False)
    for name in sorted(ours):  # as they are now: 1e300 of a file in float64 is infinite here
        if fault := fault_of_values(name, wanted[name]):
            raise CheckpointError(f"{where} is damaged: {_their_name(name)} {fault}.")
    with torch.no_grad():
        for prefix in set(_HEADS.values()) - stages:  # the fresh bias is the identity
            getattr(model.macosnet, prefix.rstrip(".")).linear.weight.zero_()
        weight, bias = model.macosnet.decoder.classifier.parameters()
        weight.zero_()
        bias.fill_(_OBJECT_EVERYWHERE)
    return model.eval()


def _head_settings(ours: dict[str, Tensor], where: str) -> dict[str, Any]:
    """The configuration's image size and heads, from the shapes of the weights."""
    prefixes = [prefix for prefix in _HEADS.values() if f"{prefix}conv.0.weight" in ours]
    if not prefixes:
        raise CheckpointError(f"{where} lacks FeatureRegression.conv.0.weight: it holds no transformation head.")
    found = []
    for prefix in prefixes:
        names = [f"{prefix}{name}.weight" for name in ("conv.0", "conv.3", "linear")]
        if any(name not in ours or ours[name].dim() != dim for name, dim in zip(names, (4, 4, 2), strict=True)):
            raise CheckpointError(f"{where} lacks a fitting {' or '.join(_their_name(name) for name in names[1:])}.")
        *weights, linear = (ours[name] for name in names)
        grid = math.isqrt(weights[0].shape[1])
        kernels = [weight.shape[-1] for weight in weights]
        side = grid - sum(kernel - 1 for kernel in kernels)
        expected = len(weights[1]) * side**2 if side > 0 else 0
        if linear.shape[1] != expected:
            raise CheckpointError(
                f"{where}: {_their_name(prefix + 'conv.0.weight')} belongs to images of {16 * grid}x{16 * grid} "
                f"pixels, with which {_their_name(prefix + 'linear.weight')} would have {expected} inputs, not "
                f"{linear.shape[1]}; the two do not fit together."
            )
        found.append(
            {
                "image_size": 16 * grid,
                "predictor_channels": [len(weight) for weight in weights],
                "predictor_kernel_sizes": kernels,
            }
        )
    if found[0] != found[-1]:
        raise CheckpointError(
            f"{where}: FeatureRegression and FeatureRegression2 have different shapes ({found[0]['image_size']} and "
            f"{found[-1]['image_size']} pixels)."
        )
    return found[0]


def _names(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")


# ---------------------------------------------------------------------------------------------------------------------
# The way back
# ---------------------------------------------------------------------------------------------------------------------


def original_state_dict(model: MaCoSNetForKeypointMatching | MaCoSNetModel) -> dict[str, Tensor]:
    """The weights of a model with the `paper` encoder, with names and order of the published networks.

    `torch.save({"state_dict": original_state_dict(model)}, "model.pth.tar")` writes a checkpoint for weakalign's
    `TwoStageCNNGeometric` and MaCoSNet's `WeakMatchNet`, without a decoder.

    Raises:
        InputError: if the encoder is no ResNet-101 of timm, or its features are not those of stride 16 alone.
    """
    base: Any = getattr(model, "macosnet", model)
    if getattr(model.config.backbone_config, "backbone", None) != "resnet101" or model.config.fused_strides != [16]:
        raise InputError("Only a model with the paper's encoder, timm's resnet101 to stride 16, has original names.")
    theirs = {}
    for name, tensor in base.state_dict().items():
        if name.startswith("decoder."):
            continue
        if name.endswith("head.conv.0.weight"):
            tensor = _transpose_channels(tensor, model.config.predictor_grid)
        theirs[_their_name(name)] = tensor.detach().clone()
    return theirs


__all__ = ["Conversion", "convert", "original_state_dict", "read_state_dict", "save"]
