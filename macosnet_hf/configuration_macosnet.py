"""Configuration of MaCoSNet."""

from __future__ import annotations

import copy
import re
import reprlib
from typing import TYPE_CHECKING, Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from .directions import ORIENTATIONS
from .errors import InputError

if TYPE_CHECKING:
    # transformers copies what a module imports relatively, here too. Hence every module that travels is written by
    # whatever is saved, also by a processor or a configuration alone: beside modules of an older version, which stay
    # in the folder otherwise, those of this version would not load.
    from .modeling_macosnet import MaCoSNetModel  # noqa: F401

# Raised when a setting changes its meaning, or a new one changes what a model answers.
_CONFIG_VERSION = 3

# Encoders by name, timm's, or the settings of one of transformers': an explicit backbone configuration each, since a
# bare backbone name would call the network.
_PRESETS: dict[str, dict[str, Any]] = {
    # The paper: ResNet-101 through conv4-23 (stride 16, 1024 channels).
    "paper": {"backbone": "resnet101", "out_indices": [0, 1, 2, 3], "decoder_widths": [64, 48, 24, 16]},
    # The embedded checkpoint of this name: the stages of EfficientNet-Lite0 at strides 16 (112 channels) and 32 (192),
    # about a tenth of the parameters.
    "lite": {
        "backbone": "tf_efficientnet_lite0",
        "out_indices": [0, 1, 2, 3, 4],
        "decoder_widths": [64, 32, 24, 16],
        "fused_strides": [16, 32],
        "feature_blocks": [0, 1, 2, 4, 5],
    },
    # The encoder of version 0.1, and what a configuration without an encoder has: EfficientNet-Lite0 to stride 16.
    "lite-stride16": {
        "backbone": "tf_efficientnet_lite0",
        "out_indices": [0, 1, 2, 3],
        "decoder_widths": [64, 32, 24, 16],
    },
    # EfficientNet-Lite2 likewise (120 and 208 channels), and more pixels. With 240, 288, 320, 336, 384 pixels nearest
    # neighbours on leordeanu-cars reach PCK 0.662, 0.675, 0.671, 0.675, 0.648 at 0.1, and a linear probe for the object
    # on msrc-coseg reaches J 0.758, 0.774, 0.781, 0.784, 0.792. The heads see the grid that those of lite see.
    "base": {
        "backbone": "tf_efficientnet_lite2",
        "out_indices": [0, 1, 2, 3, 4],
        "decoder_widths": [64, 32, 24, 16],
        "fused_strides": [16, 32],
        "feature_blocks": [0, 1, 2, 4, 5],
        "image_size": 336,
        "predictor_grid": 15,
    },
    # Vision transformers of transformers, for whoever has a network to fetch their weights: one map, no finer stages.
    "dinov2-small": {
        "backbone": {"model_type": "dinov2", "hidden_size": 384, "num_attention_heads": 6, "patch_size": 14},
        "out_indices": [12],
        "decoder_widths": [64, 32, 24, 16],
        "image_size": 336,
        "predictor_grid": 15,
    },
    "dinov3-small": {
        "backbone": {"model_type": "dinov3_vit", "num_register_tokens": 4},
        "out_indices": [12],
        "decoder_widths": [64, 32, 24, 16],
        "image_size": 336,
        "predictor_grid": 15,
    },
    # The paper's second encoder (Table 3): VGG-16 to its last stride-16 convolution (512 channels).
    "vgg16": {"backbone": "vgg16", "out_indices": [1, 2, 3, 4], "decoder_widths": [64, 48, 24, 16]},
}
_STRIDES = [2, 4, 8, 16, 32]

# What a setting takes: whole numbers (`int`) or any (`float`), the least and the most. A file of settings comes from a
# stranger: each range holds what was ever found useful with room to spare, and bounds what a match can cost.
# (transformers' strict dataclasses know types only, refuse 1 for 1.0, and take NaN.)
_NUMBERS: dict[str, tuple[type[int] | type[float], float, float]] = {
    "image_size": (int, 32, 1024),
    "predictor_grid": (int, 1, 64),
    "tps_regularization": (float, 0, 1e4),
    "decoder_input_width": (int, 1, 4096),
    "decoder_rounds": (int, 1, 2),
    "local_matching_temperature": (float, 1e-3, 1e4),
    "match_consistency_sigma": (float, 1e-3, 1e3),
    "match_mask_threshold": (float, 0, 1),
    "config_version": (int, 1, _CONFIG_VERSION),
}
# The same for lists, and the fewest and most numbers in one.
_LISTS: dict[str, tuple[type[int] | type[float], float, float, int, int]] = {
    "feature_strides": (int, 2, 32, 1, 5),
    "fused_strides": (int, 2, 32, 1, 5),
    "fused_weights": (float, 1e-3, 1e3, 1, 5),
    "feature_blocks": (int, 0, 1000, 1, 5),
    "predictor_channels": (int, 1, 4096, 1, 8),
    "predictor_kernel_sizes": (int, 1, 63, 1, 8),
    "decoder_widths": (int, 1, 4096, 4, 4),
    "local_matching_sigmas": (float, 1e-3, 1e3, 0, 8),
    "local_matching_windows": (float, 1e-3, 1e3, 0, 8),
}
_CHOICES: dict[str, tuple[str | bool, ...]] = {
    "cascade": ("exact", "features"),
    "padding_mode": ("zeros", "border", "reflection"),
    "decoder_inputs": ("paper", "common"),
    "local_matching": (False, True),
    "mutual_fit": (False, True),
    "orientations": ORIENTATIONS,
}
# The numbers of a backbone's own settings: widths up to the one, stages and layers up to the other.
_MOST_IN_BACKBONE, _MOST_LAYERS = 65_536, 512
_MOST_LABELS = 100_000  # transformers makes a name for each


class MaCoSNetConfig(PretrainedConfig):
    r"""Configuration of [`MaCoSNetModel`] and [`MaCoSNetForKeypointMatching`].

    Args:
        backbone_config (`PretrainedConfig` or `dict`, *optional*):
            Encoder E: any timm (`TimmBackboneConfig`) or transformers backbone with a stage of stride 16, or a vision
            transformer with patches of any size, which sees images resized to as many patches as there are cells.
            Defaults to the `lite` preset. Weights are never downloaded from here; training loads ImageNet weights
            itself.
        feature_strides (`list[int]`, *optional*):
            Strides of the chosen stages, coarsest last: 16, or 32 where `fused_strides` names it. Defaults to the last
            of 2, 4, 8, 16 (and 32). Those finer than 16 are the decoder's skip connections.
        fused_strides (`list[int]`, defaults to `[16]`):
            strides, out of `feature_strides`, of the stages that make up the features. Each stage's map has unit length
            at every position and is resampled to the grid of stride 16; their concatenation has unit length again.
        fused_weights (`list[float]`, *optional*):
            factor on each of these stages before they are concatenated; all 1 by default.
        feature_blocks (`list[int]`, *optional*):
            for timm's EfficientNet family, the number of the block that gives the map of each of `feature_strides`.
            Defaults to the last block of each stride.
        image_size (`int`, defaults to 240): both sides of the network's input, a multiple of 16.
        predictor_grid (`int`, *optional*):
            cells a side of the feature maps that the transformation predictor G compares; they are resampled to it
            where the encoder's are others. Defaults to `image_size / 16`, no resampling.
        predictor_channels (`list[int]`, defaults to `[128, 64]`) and predictor_kernel_sizes (`[7, 5]`):
            the two convolutions of each head of the transformation predictor G.
        tps_regularization (`float`, defaults to 0.0): regularisation factor of the thin-plate spline.
        cascade (`str`, defaults to `"exact"`):
            how the TPS stage sees the affinely warped source: `"exact"` warps its pixels and encodes them again (the
            paper), `"features"` warps its feature map (no further encoder pass).
        padding_mode (`str`, defaults to `"zeros"`): what the warped source shows outside its frame.
        decoder_widths (`list[int]`): channels of the four blocks of the decoder D.
        decoder_inputs (`str`, defaults to `"paper"`):
            what the decoder sees beside the features: `"paper"`, the correlation map; `"common"`, cues that do not
            depend on the partner's layout, over all partners together (see `common_object.py`).
        decoder_input_width (`int`, defaults to 96): channels to which `"common"` reduces the features.
        decoder_rounds (`int`, defaults to 1):
            with `"common"`: 1, the partner's object is assumed in its middle; 2, the masks found so are looked up once
            more, as the place of the partner's object.
        local_matching (`bool`, defaults to `True`):
            let a transferred point land on the best feature match near the place where the transform sends it.
        local_matching_sigmas (`list[float]`):
            width of that neighbourhood in each pass, normalised coordinates (the image is 2 wide).
        local_matching_windows (`list[float]`):
            half the side of the window around a point whose features are compared, for each pass.
        local_matching_temperature (`float`): factor on the cosine similarity before the soft-argmax.
        mutual_fit (`bool`, defaults to `False`):
            fit both transforms of a pair to the local matches on which its two directions agree; see `fit_mutually`.
            [`MaCoSNetForKeypointMatching`] does so, [`MaCoSNetModel`] always answers with the paper's transforms.
        orientations (`str`, defaults to `"none"`):
            in which orientations [`MaCoSNetForKeypointMatching`] looks for the source's object in the target: `"none"`,
            as it is (the paper); `"mirror"`, also as its mirror image; `"all"`, in all eight symmetries of the square.
        match_consistency_sigma (`float`):
            forward-backward error, in normalised coordinates, at which a match's score falls to exp(-1/2).
        match_mask_threshold (`float`, defaults to 0.5): a match counts where both masks exceed it.
        config_version (`int`, defaults to 3): of this list of settings; a later one is refused rather than misread.

    Example:

    ```python
    >>> from macosnet_hf import MaCoSNetConfig, MaCoSNetModel

    >>> config = MaCoSNetConfig.from_preset("paper")
    >>> model = MaCoSNetModel(config)  # random weights
    ```
    """

    model_type = "macosnet"
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012 (transformers' own attribute)

    def __init__(
        self,
        backbone_config: PretrainedConfig | dict[str, Any] | None = None,
        feature_strides: list[int] | None = None,
        fused_strides: list[int] | None = None,
        fused_weights: list[float] | None = None,
        feature_blocks: list[int] | None = None,
        image_size: int = 240,
        predictor_grid: int | None = None,
        predictor_channels: list[int] | None = None,
        predictor_kernel_sizes: list[int] | None = None,
        tps_regularization: float = 0.0,
        cascade: str = "exact",
        padding_mode: str = "zeros",
        decoder_widths: list[int] | None = None,
        decoder_inputs: str = "paper",
        decoder_input_width: int = 96,
        decoder_rounds: int = 1,
        local_matching: bool = True,
        local_matching_sigmas: list[float] | None = None,
        local_matching_windows: list[float] | None = None,
        local_matching_temperature: float = 60.0,
        mutual_fit: bool = False,
        orientations: str = "none",
        match_consistency_sigma: float = 0.2,
        match_mask_threshold: float = 0.5,
        config_version: int = _CONFIG_VERSION,
        **kwargs: Any,
    ):
        _check_version(config_version)
        self.config_version = _CONFIG_VERSION  # what is saved has the settings of this version
        self.backbone_config = backbone_config = _backbone(backbone_config)
        self.fused_strides = _checked("fused_strides", fused_strides, [16])
        self.fused_weights = _checked("fused_weights", fused_weights, [1.0] * len(self.fused_strides))
        known = [stride for stride in _STRIDES if stride <= 16 or stride in self.fused_strides]
        stages = len(getattr(backbone_config, "out_indices", None) or [0])
        self.feature_strides = _checked("feature_strides", feature_strides, known[-max(1, min(len(known), stages)) :])
        self.feature_blocks = None if feature_blocks is None else _checked("feature_blocks", feature_blocks)
        self.image_size = _checked("image_size", image_size)
        self.predictor_grid = self.grid_size if predictor_grid is None else _checked("predictor_grid", predictor_grid)
        self.predictor_channels = _checked("predictor_channels", predictor_channels, [128, 64])
        self.predictor_kernel_sizes = _checked("predictor_kernel_sizes", predictor_kernel_sizes, [7, 5])
        self.tps_regularization = _checked("tps_regularization", tps_regularization)
        self.cascade = _checked("cascade", cascade)
        self.padding_mode = _checked("padding_mode", padding_mode)
        self.decoder_widths = _checked("decoder_widths", decoder_widths, [64, 32, 24, 16])
        self.decoder_inputs = _checked("decoder_inputs", decoder_inputs)
        self.decoder_input_width = _checked("decoder_input_width", decoder_input_width)
        self.decoder_rounds = _checked("decoder_rounds", decoder_rounds)
        self.local_matching = _checked("local_matching", local_matching)
        self.local_matching_sigmas = _checked("local_matching_sigmas", local_matching_sigmas, [0.3, 0.15])
        self.local_matching_windows = _checked("local_matching_windows", local_matching_windows, [0.4, 0.25])
        self.local_matching_temperature = _checked("local_matching_temperature", local_matching_temperature)
        self.mutual_fit = _checked("mutual_fit", mutual_fit)
        self.orientations = _checked("orientations", orientations)
        self.match_consistency_sigma = _checked("match_consistency_sigma", match_consistency_sigma)
        self.match_mask_threshold = _checked("match_mask_threshold", match_mask_threshold)
        if not __name__.startswith("transformers_modules."):
            # The installed package registers its pipelines. A list of those in the model's folder would make
            # `pipeline` ask for `trust_remote_code`.
            kwargs.pop("custom_pipelines", None)
        _check_of_transformers(kwargs)
        try:
            super().__init__(**kwargs)
        except Exception as error:  # transformers and its strict dataclasses raise many kinds for their own settings
            reason = " ".join(str(error).split())
            raise InputError(f"One of the settings {', '.join(sorted(kwargs))} cannot be used ({reason}).") from error
        self._check()

    @property
    def grid_size(self) -> int:
        """Side of the stride-16 feature grid: 15 for 240 pixels."""
        return self.image_size // 16

    @property
    def local_matching_options(self) -> dict[str, Any]:
        """Keyword arguments of [`match_locally`](matching.py)."""
        return {
            "sigmas": self.local_matching_sigmas,
            "windows": self.local_matching_windows,
            "temperature": self.local_matching_temperature,
        }

    @classmethod
    def from_preset(cls, name: str, **kwargs: Any) -> MaCoSNetConfig:
        """Configuration by name: `"paper"` (ResNet-101), `"vgg16"`, `"lite"` (EfficientNet-Lite0, strides 16 and 32),
        `"base"` (EfficientNet-Lite2, likewise, 336 pixels), `"lite-stride16"` (version 0.1: stride 16 only),
        `"dinov2-small"` or `"dinov3-small"` (ViT-S/14 and ViT-S/16, 336 pixels).

        Raises:
            InputError: if there is no such preset.
        """
        return cls(**{**_preset_arguments(name), **kwargs})

    def _check(self) -> None:
        """Refuses settings that do not fit together; each alone is checked before."""
        if self.image_size % 16:
            raise InputError(f"image_size must be a positive multiple of 16; got {self.image_size}.")
        if len(self.predictor_channels) != len(self.predictor_kernel_sizes):
            raise InputError("predictor_channels and predictor_kernel_sizes must have the same length.")
        if self.predictor_grid - sum(kernel - 1 for kernel in self.predictor_kernel_sizes) < 1:
            what = "image_size" if self.predictor_grid == self.grid_size else "predictor_grid"
            raise InputError(f"{what} {getattr(self, what)} is too small for kernels {self.predictor_kernel_sizes}.")
        if len(self.local_matching_sigmas) != len(self.local_matching_windows):
            raise InputError("local_matching_sigmas and local_matching_windows need one number a pass, both as many.")
        strides, fused = self.feature_strides, self.fused_strides
        if 16 not in strides or strides != sorted(set(strides)) or not set(strides) <= set(_STRIDES):
            raise InputError(f"feature_strides must rise within 2, 4, 8, 16, 32 and name 16; got {strides}.")
        if fused != sorted(set(fused)) or not set(fused) <= set(strides):
            raise InputError(
                f"fused_strides must rise within the strides of the backbone's chosen stages, {strides} "
                f"(feature_strides); got {fused}."
            )
        if strides[-1] > 16 and strides[-1] not in fused:
            raise InputError(f"feature_strides names {strides[-1]}, which nothing uses: add it to fused_strides.")
        if len(self.fused_weights) != len(fused):
            raise InputError(f"fused_weights needs one number for each of fused_strides; got {self.fused_weights}.")
        if self.feature_blocks is not None and len(self.feature_blocks) != len(strides):
            raise InputError(
                f"feature_blocks needs one number for each of feature_strides, {strides}; got {self.feature_blocks}."
            )


def _checked(name: str, value: Any, default: list[Any] | None = None) -> Any:
    """The value of a setting, as a list of its own where it is one; the default for a list that is not given.

    Raises:
        InputError: if the setting does not take it; the text says what it takes.
    """
    if name in _CHOICES:
        choices = _CHOICES[name]
        if any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
            return value
        takes = f"{', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}"
    elif name in _NUMBERS:
        kind, least, most = _NUMBERS[name]
        if _is_number(value, kind, least, most):
            return value
        takes = f"a {'whole ' if kind is int else ''}number from {least:g} to {most:g}"
    else:
        kind, least, most, fewest, longest = _LISTS[name]
        value = default if value is None and default is not None else value
        fits = isinstance(value, list | tuple) and fewest <= len(value) <= longest
        if fits and all(_is_number(number, kind, least, most) for number in value):
            return list(value)
        count = fewest if fewest == longest else f"{fewest} to {longest}"
        takes = f"a list of {count} {'whole ' if kind is int else ''}numbers from {least:g} to {most:g}"
    raise InputError(f"{name} takes {takes}; got {_shown(value)}.")


def _is_number(value: Any, kind: type[int] | type[float], least: float, most: float) -> bool:
    """Whether it is a number of this kind and range; `True` is none, nor is NaN."""
    return isinstance(value, (int, kind)) and not isinstance(value, bool) and least <= value <= most


def _shown(value: Any) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # Python does not print whole numbers of more than 4,300 digits
        return "a number of thousands of digits"


def _backbone(given: Any) -> PretrainedConfig:
    """The configuration of the encoder, which is an architecture that the installed libraries know by its plain name.

    Raises:
        InputError: if it is not: timm would ask a repository for what `hf-hub:owner/name` stands for.
    """
    if given is None:
        given = _preset_arguments("lite-stride16")["backbone_config"]
    if isinstance(given, dict):
        arguments = dict(given)
        model_type = arguments.pop("model_type", None)
        if model_type is None:
            raise InputError("backbone_config needs a model_type, such as 'timm_backbone' or 'resnet'.")
        if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
            raise InputError(f"backbone_config names an unknown model_type, {_shown(model_type)}.")
        _check_sizes(arguments)
        _check_of_transformers(arguments, "backbone_config.")
        try:
            given = AutoConfig.for_model(model_type, **arguments)
        except Exception as error:  # each kind of backbone raises others
            raise InputError(f"backbone_config cannot be used: {' '.join(str(error).split())}.") from error
    if not isinstance(given, PretrainedConfig):
        raise InputError(f"backbone_config takes a configuration or a dictionary; got {_shown(given)}.")
    name = getattr(given, "backbone", "")
    if given.model_type == "timm_backbone" and not (isinstance(name, str) and re.fullmatch(r"\w+(\.\w+)?", name)):
        raise InputError(
            f"backbone_config.backbone takes the plain name of one of timm's architectures, such as resnet101; got "
            f"{_shown(name)}."
        )
    return given


def _check_sizes(settings: Any, name: str = "backbone_config") -> None:
    """Refuses numbers that no backbone has, in settings and all that is nested in them: one asks for any memory."""
    if isinstance(settings, dict):
        for key, value in settings.items():
            if key not in ("id2label", "label2id"):
                _check_sizes(value, f"{name}.{key}")
    elif isinstance(settings, list | tuple):
        for value in settings:
            _check_sizes(value, name)
    elif isinstance(settings, int | float):
        most = _MOST_LAYERS if "depth" in name or name.endswith("layers") else _MOST_IN_BACKBONE
        if name.endswith(("eps", "epsilon")) and not 0 <= settings <= 1:
            raise InputError(f"{name} takes numbers from 0 to 1; got {_shown(settings)}.")
        if not -most <= settings <= most:
            raise InputError(f"{name} takes numbers up to {most}; got {_shown(settings)}.")


def _check_of_transformers(settings: dict[str, Any], lead: str = "") -> None:
    """Refuses settings that transformers takes from any file, and that cost what they say or run code of others.

    Raises:
        InputError: with the name and what it takes.
    """
    labels = settings.get("num_labels")
    if labels is not None and not _is_number(labels, int, 0, _MOST_LABELS):
        raise InputError(f"{lead}num_labels takes a whole number from 0 to {_MOST_LABELS}; got {_shown(labels)}.")
    for name in ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"):
        chosen = settings.get(name)
        for each in chosen.values() if isinstance(chosen, dict) else [chosen]:
            # owner/name stands for a repository whose code runs, where the package `kernels` is installed.
            if each is not None and not (isinstance(each, str) and re.fullmatch(r"\w*", each)):
                raise InputError(f"{lead}{name} takes a plain name, such as 'sdpa' or 'eager'; got {_shown(each)}.")
    for name, takes in (("return_dict", True), ("quantization_config", None)):
        if settings.get(name, takes) is not takes:
            raise InputError(f"{lead}{name} takes {takes} only; got {_shown(settings[name])}.")


def _check_version(version: Any) -> None:
    if isinstance(version, int) and version > _CONFIG_VERSION:
        raise InputError(
            f"This configuration has version {_shown(version)}, but only versions up to {_CONFIG_VERSION} are known "
            "here; a newer macosnet-hf reads it."
        )
    _checked("config_version", version)


def _preset_arguments(name: str) -> dict[str, Any]:
    if name not in _PRESETS:
        raise InputError(f"There is no preset {name!r}; choose one of {', '.join(sorted(_PRESETS))}.")
    preset = copy.deepcopy(_PRESETS[name])
    backbone, out_indices = preset.pop("backbone"), preset.pop("out_indices")
    if isinstance(backbone, str):
        backbone = {"model_type": "timm_backbone", "backbone": backbone}
    return {"backbone_config": AutoConfig.for_model(**backbone, out_indices=out_indices), **preset}


MaCoSNetConfig.register_for_auto_class()

__all__ = ["MaCoSNetConfig"]
