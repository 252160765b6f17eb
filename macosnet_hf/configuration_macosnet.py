"""Configuration of MaCoSNet."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, PretrainedConfig

from .directions import check_orientations
from .errors import InputError

if TYPE_CHECKING:
    # transformers copies what a module imports relatively, here too. Hence every module that travels is written by
    # whatever is saved, also by a processor or a configuration alone: beside modules of an older version, which stay
    # in the folder otherwise, those of this version would not load.
    from .modeling_macosnet import MaCoSNetModel  # noqa: F401

# Raised when a setting changes its meaning, or a new one changes what a model answers.
_CONFIG_VERSION = 3

# Encoders by name: an explicit backbone configuration each, since a bare backbone name would call the network.
_PRESETS: dict[str, dict[str, Any]] = {
    # The paper: ResNet-101 through conv4-23 (stride 16, 1024 channels).
    "paper": {"backbone": "resnet101", "out_indices": [0, 1, 2, 3], "decoder_widths": [64, 48, 24, 16]},
    # The embedded checkpoint: EfficientNet-Lite0 to stride 16 (112 channels), about a fortieth of the parameters.
    "lite": {"backbone": "tf_efficientnet_lite0", "out_indices": [0, 1, 2, 3], "decoder_widths": [64, 32, 24, 16]},
    # The same encoder with the stage of stride 32 (192 channels) beside the one of stride 16.
    "lite-fused": {
        "backbone": "tf_efficientnet_lite0",
        "out_indices": [0, 1, 2, 3, 4],
        "decoder_widths": [64, 32, 24, 16],
        "fused_strides": [16, 32],
        "feature_blocks": [0, 1, 2, 4, 5],
    },
    # EfficientNet-Lite2 likewise (120 and 208 channels), and more pixels. With 240, 288, 320, 336, 384 pixels nearest
    # neighbours on leordeanu-cars reach PCK 0.662, 0.675, 0.671, 0.675, 0.648 at 0.1, and a linear probe for the object
    # on msrc-coseg reaches J 0.758, 0.774, 0.781, 0.784, 0.792.
    "base": {
        "backbone": "tf_efficientnet_lite2",
        "out_indices": [0, 1, 2, 3, 4],
        "decoder_widths": [64, 32, 24, 16],
        "fused_strides": [16, 32],
        "feature_blocks": [0, 1, 2, 4, 5],
        "image_size": 336,
    },
    # The paper's second encoder (Table 3): VGG-16 to its last stride-16 convolution (512 channels).
    "vgg16": {"backbone": "vgg16", "out_indices": [1, 2, 3, 4], "decoder_widths": [64, 48, 24, 16]},
}
_STRIDES = [2, 4, 8, 16, 32]


class MaCoSNetConfig(PretrainedConfig):
    r"""Configuration of [`MaCoSNetModel`] and [`MaCoSNetForKeypointMatching`].

    Args:
        backbone_config (`PretrainedConfig` or `dict`, *optional*):
            Encoder E: any timm (`TimmBackboneConfig`) or transformers backbone with a stage of stride 16.
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
        if backbone_config is None:
            backbone_config = _preset_arguments("lite")["backbone_config"]
        if isinstance(backbone_config, dict):
            arguments = dict(backbone_config)
            model_type = arguments.pop("model_type", None)
            if model_type is None:
                raise InputError("backbone_config needs a model_type, such as 'timm_backbone' or 'resnet'.")
            try:
                backbone_config = AutoConfig.for_model(model_type, **arguments)
            except ValueError as error:
                raise InputError(f"backbone_config names an unknown model_type, {model_type!r}.") from error
        self.backbone_config = backbone_config
        self.fused_strides = [16] if fused_strides is None else list(fused_strides)
        self.fused_weights = [1.0] * len(self.fused_strides) if fused_weights is None else list(fused_weights)
        if feature_strides is None:
            known = [stride for stride in _STRIDES if stride <= 16 or stride in self.fused_strides]
            stages = len(getattr(backbone_config, "out_indices", None) or [0])
            feature_strides = known[-max(1, min(len(known), stages)) :]
        self.feature_strides = list(feature_strides)
        self.feature_blocks = None if feature_blocks is None else list(feature_blocks)
        self.image_size = image_size
        self.predictor_channels = list(predictor_channels or [128, 64])
        self.predictor_kernel_sizes = list(predictor_kernel_sizes or [7, 5])
        self.tps_regularization = tps_regularization
        self.cascade = cascade
        self.padding_mode = padding_mode
        self.decoder_widths = list(decoder_widths or [64, 32, 24, 16])
        self.decoder_inputs = decoder_inputs
        self.decoder_input_width = decoder_input_width
        self.decoder_rounds = decoder_rounds
        self.local_matching = local_matching
        self.local_matching_sigmas = [0.3, 0.15] if local_matching_sigmas is None else list(local_matching_sigmas)
        self.local_matching_windows = [0.4, 0.25] if local_matching_windows is None else list(local_matching_windows)
        self.local_matching_temperature = local_matching_temperature
        self.mutual_fit = mutual_fit
        self.orientations = orientations
        self.match_consistency_sigma = match_consistency_sigma
        self.match_mask_threshold = match_mask_threshold
        _check_version(config_version)
        self.config_version = _CONFIG_VERSION  # what is saved has the settings of this version
        if not __name__.startswith("transformers_modules."):
            # The installed package registers its pipelines. A list of those in the model's folder would make
            # `pipeline` ask for `trust_remote_code`.
            kwargs.pop("custom_pipelines", None)
        super().__init__(**kwargs)
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
        """Configuration by name: `"paper"` (ResNet-101), `"vgg16"`, `"lite"` (EfficientNet-Lite0), `"lite-fused"` (the
        same with the stage of stride 32) or `"base"` (EfficientNet-Lite2, likewise, 336 pixels).

        Raises:
            InputError: if there is no such preset.
        """
        return cls(**{**_preset_arguments(name), **kwargs})

    def _check(self) -> None:
        if not isinstance(self.image_size, int) or self.image_size % 16 or self.image_size < 16:
            raise InputError(f"image_size must be a positive multiple of 16; got {self.image_size!r}.")
        if len(self.predictor_channels) != len(self.predictor_kernel_sizes):
            raise InputError("predictor_channels and predictor_kernel_sizes must have the same length.")
        if self.grid_size - sum(kernel - 1 for kernel in self.predictor_kernel_sizes) < 1:
            raise InputError(f"image_size {self.image_size} is too small for kernels {self.predictor_kernel_sizes}.")
        self._check_strides()
        if len(self.decoder_widths) != 4:
            raise InputError(f"decoder_widths needs four numbers, one a block; got {self.decoder_widths}.")
        if self.cascade not in ("exact", "features"):
            raise InputError(f"cascade must be 'exact' or 'features'; got {self.cascade!r}.")
        if self.decoder_inputs not in ("paper", "common"):
            raise InputError(f"decoder_inputs must be 'paper' or 'common'; got {self.decoder_inputs!r}.")
        if self.decoder_rounds not in (1, 2):
            raise InputError(f"decoder_rounds must be 1 or 2; got {self.decoder_rounds!r}.")
        if not isinstance(self.decoder_input_width, int) or self.decoder_input_width < 1:
            raise InputError(f"decoder_input_width must be a positive whole number; got {self.decoder_input_width!r}.")
        if len(self.local_matching_sigmas) != len(self.local_matching_windows):
            raise InputError("local_matching_sigmas and local_matching_windows need one number a pass, both as many.")
        if not all(width > 0 for width in (*self.local_matching_sigmas, *self.local_matching_windows)):
            raise InputError("local_matching_sigmas and local_matching_windows must be positive numbers.")
        check_orientations(self.orientations)
        if self.padding_mode not in ("zeros", "border", "reflection"):
            raise InputError(f"padding_mode must be 'zeros', 'border' or 'reflection'; got {self.padding_mode!r}.")

    def _check_strides(self) -> None:
        strides, fused, weights = self.feature_strides, self.fused_strides, self.fused_weights
        if 16 not in strides or strides != sorted(set(strides)) or not set(strides) <= set(_STRIDES):
            raise InputError(f"feature_strides must rise within 2, 4, 8, 16, 32 and name 16; got {strides}.")
        if not fused or fused != sorted(set(fused)) or not set(fused) <= set(strides):
            raise InputError(
                f"fused_strides must rise within the strides of the backbone's chosen stages, {strides} "
                f"(feature_strides); got {fused}."
            )
        if strides[-1] > 16 and strides[-1] not in fused:
            raise InputError(f"feature_strides names {strides[-1]}, which nothing uses: add it to fused_strides.")
        if len(weights) != len(fused) or not all(0 < weight < float("inf") for weight in weights):
            raise InputError(f"fused_weights needs one positive number for each of fused_strides; got {weights}.")
        blocks = self.feature_blocks
        if blocks is not None and not (len(blocks) == len(strides) and all(isinstance(block, int) for block in blocks)):
            raise InputError(f"feature_blocks needs one number for each of feature_strides, {strides}; got {blocks}.")


def _check_version(version: int) -> None:
    if not isinstance(version, int) or version > _CONFIG_VERSION:
        raise InputError(
            f"This configuration has version {version}, but only versions up to {_CONFIG_VERSION} are known here; a "
            "newer macosnet-hf reads it."
        )


def _preset_arguments(name: str) -> dict[str, Any]:
    if name not in _PRESETS:
        raise InputError(f"There is no preset {name!r}; choose one of {', '.join(sorted(_PRESETS))}.")
    preset = copy.deepcopy(_PRESETS[name])
    backbone = {key: preset.pop(key) for key in ("backbone", "out_indices")}
    return {"backbone_config": AutoConfig.for_model("timm_backbone", **backbone), **preset}


MaCoSNetConfig.register_for_auto_class()

__all__ = ["MaCoSNetConfig"]
