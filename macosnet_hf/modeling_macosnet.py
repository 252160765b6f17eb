"""MaCoSNet: joint semantic matching and object co-segmentation (Chen, Lin, Yang, Huang, "Show, Match and Segment").

Equation numbers are the paper's. An ordered pair (i, j) of views stands for source i and target j: its transform
T_ij maps points of view j into view i (see `geometry.py`), and its mask is the mask of view i given its partner j.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils import ModelOutput
from transformers.utils.generic import TransformersKwargs, can_return_tuple, maybe_autocast

from .common_object import CONTEXT_CHANNELS, common_context, object_weights
from .configuration_macosnet import MaCoSNetConfig
from .directions import check_orientations
from .encoder import FILLED, MaCoSNetEncoder, MaCoSNetFeatures
from .errors import InputError
from .geometry import TPS_PARAMETERS, Transform, check_sizes, dense_flow, identity_affine, identity_tps, on_device, warp
from .matching import (
    cell_products,
    cell_similarity,
    correlate,
    fit_mutually,
    keypoint_loss,
    match_grid,
    normalize_similarity,
    transfer_points,
    warp_similarity,
)
from .orientation import orient, turn_back
from .saving import AtomicSaving


def ordered_pairs(num_views: int) -> tuple[tuple[int, int], ...]:
    """The ordered pairs (source, target) of 2 or 3 views, each followed by its reverse.

    2 views give ((0, 1), (1, 0)); 3 views give ((0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)).
    """
    return tuple(pair for i, j in itertools.combinations(range(num_views), 2) for pair in ((i, j), (j, i)))


@dataclass
class MaCoSNetModelOutput(ModelOutput):
    """Output of [`MaCoSNetModel`]: B batch, V views (2 or 3), P = V (V - 1) pairs in the order of `ordered_pairs`.

    Args:
        affine (`(B, P, 6)`): affine part of T_ij, target (view j) to source (view i), normalised coordinates.
        tps (`(B, P, 18)`): thin-plate-spline part of T_ij; points go through it first.
        correlation (`(B, P, h*w, h, w)`): S_ij, one channel per position of view i (row by row), spatial layout of
            view j.
        mask_logits (`(B, P, H, W)`): logits of the mask of view i given partner j. For a pair: `[:, 0]`
            source, `[:, 1]` target.
        features (`(B, V, C, h, w)`): stride-16 features, unit length over channels.
        flow (`(B, P, H, W, 2)`, on request): for each pixel of view j at network resolution, where it lies in view i
            minus where it lies in view j, both in pixels of the original images.
        orientation (`(B,)`, of pairs): number in `SYMMETRIES` (`geometry.py`) of the symmetry R that the source shows
            the object moved by, compared with the target; 0 is the identity. The transforms contain it. All maps lie as
            the images do; `features` are what the encoder says of an image seen through its symmetry.
    """

    affine: Tensor = FILLED
    tps: Tensor = FILLED
    correlation: Tensor = FILLED
    mask_logits: Tensor | None = None
    features: Tensor = FILLED
    flow: Tensor | None = None
    orientation: Tensor | None = None


@dataclass
class MaCoSNetKeypointMatchingOutput(ModelOutput):
    """Output of [`MaCoSNetForKeypointMatching`]. N = h*w keypoints on a regular grid over the source.

    Args:
        loss (`()`, when `labels` are given): mean distance of transferred keypoints from their labels, normalised
            to [0, 1].
        matches (`(B, 2, N)`): index of the partner in the other image, -1 for unmatched.
        matching_scores (`(B, 2, N)`): in [0, 1], 0 for unmatched.
        keypoints (`(B, 2, N, 2)`): (x, y) in [0, 1], 0 and 1 the outer edges of the image, as transformers' matchers
            have them: pixel `x * width - 0.5`, see `post_process_keypoint_matching` of the processor.
        mask_logits (`(B, 2, H, W)`), affine (`(B, 2, 6)`), tps (`(B, 2, 18)`), correlation (`(B, 2, h*w, h, w)`),
            features (`(B, 2, C, h, w)`), flow (`(B, 2, H, W, 2)`, on request), orientation (`(B,)`): as in
            [`MaCoSNetModelOutput`]; the transforms, and with them the flow, are those of [`fit_mutually`] where the
            configuration's `mutual_fit` says so.
    """

    loss: Tensor | None = None
    matches: Tensor = FILLED
    matching_scores: Tensor = FILLED
    keypoints: Tensor = FILLED
    mask_logits: Tensor | None = None
    affine: Tensor = FILLED
    tps: Tensor = FILLED
    correlation: Tensor = FILLED
    features: Tensor = FILLED
    flow: Tensor | None = None
    orientation: Tensor | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Sub-networks
# ---------------------------------------------------------------------------------------------------------------------


class MaCoSNetTransformationHead(nn.Module):
    """One head of G: convolutions without padding over a correlation map, then a linear layer to the parameters."""

    def __init__(self, config: MaCoSNetConfig, num_parameters: int):
        super().__init__()
        layers: list[nn.Module] = []
        channels, side = config.predictor_grid**2, config.predictor_grid
        for width, kernel in zip(config.predictor_channels, config.predictor_kernel_sizes, strict=True):
            layers += [nn.Conv2d(channels, width, kernel), nn.BatchNorm2d(width), nn.ReLU()]
            channels, side = width, side - kernel + 1
        self.conv = nn.Sequential(*layers)
        self.linear = nn.Linear(channels * side * side, num_parameters)

    def forward(self, correlation: Tensor) -> Tensor:
        """`(B, h*w, h, w)` to `(B, num_parameters)`, in float32 whatever the precision of the convolutions."""
        hidden = self.conv(correlation).flatten(1)
        # Half precision resolves a coordinate near 1 to half a pixel only, so the last layer never computes in it.
        with maybe_autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.linear.weight.float(), self.linear.bias.float())


class MaCoSNetDecoderBlock(nn.Module):
    """Transposed convolution (x2), then two convolutions over its output and the encoder's map of the same stride."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int):
        super().__init__()
        self.upsample = nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)
        # A 1x1 projection keeps the wide skip connections of ResNet-101 from dominating the cost of the decoder.
        self.skip = nn.Conv2d(skip_channels, out_channels, 1) if skip_channels else None
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)

    def forward(self, hidden: Tensor, skip: Tensor | None, index: Tensor | None = None) -> Tensor:
        """`(P, c, h, w)` to `(P, out, 2h, 2w)`.

        `skip` `(N, out, 2h, 2w)` holds the projected maps of N images; `index` `(P,)` names the image of each row.
        """
        hidden = self.upsample(hidden)
        if skip is not None:
            hidden = hidden + (skip if index is None else skip[index])
        hidden = F.relu(self.norm1(self.conv1(hidden)))
        return F.relu(self.norm2(self.conv2(hidden)))


class MaCoSNetDecoder(nn.Module):
    """D: four blocks from stride 16 to every pixel, one logit each. Shared by both images (siamese).

    Its input is `C_A = [f_A, S]` in the paper, S the correlation map in A's layout. With `decoder_inputs="common"` the
    context beside the features is what A has in common with its partners (`common_object.py`), and two convolutions
    read both before the blocks.
    """

    def __init__(self, config: MaCoSNetConfig, feature_channels: int, skip_channels: dict[int, int]):
        super().__init__()
        width = config.decoder_input_width
        common = config.decoder_inputs == "common"
        self.reduce = nn.Conv2d(feature_channels, width, 1) if common else None
        in_channels = width + CONTEXT_CHANNELS if common else feature_channels + config.grid_size**2
        # Features and context differ in scale by orders of magnitude; this puts them on a common footing.
        self.input_norm = nn.BatchNorm2d(in_channels)
        self.mix = nn.Sequential(*_convolutions(in_channels, width), *_convolutions(width, width)) if common else None
        widths = [width if common else in_channels, *config.decoder_widths]
        self.blocks = nn.ModuleList(
            MaCoSNetDecoderBlock(widths[k], skip_channels.get(stride, 0), widths[k + 1])
            for k, stride in enumerate((8, 4, 2, 1))
        )
        self.classifier = nn.Conv2d(widths[-1], 1, 1)
        self.strides = tuple(skip_channels)

    def project_skips(self, skips: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The encoder's finer maps as the blocks take them: narrow, and the same whoever the partner is."""
        projections: dict[int, Any] = {8 >> number: block.skip for number, block in enumerate(self.blocks)}
        return tuple(projections[stride](skip) for stride, skip in zip(self.strides, skips, strict=True))

    def forward(
        self,
        features: MaCoSNetFeatures,
        context: Tensor,
        index: Tensor | None = None,
        projected: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Mask logits of images, each given its partners.

        Args:
            features: of N images; `skips` is not looked at where `projected` is given.
            context: `(P, c, h, w)`, spatial layout of the image that is segmented: the correlation map with one channel
                per position of its partner (that is S_BA for A), or [`common_context`].
            index: `(P,)` the image of each row; `None` when P = N in the same order.
            projected: what [`project_skips`] made of the skips, for those who keep it.

        Returns:
            `(P, H, W)` logits.
        """
        if self.reduce is None:
            last = features.last
        else:  # unit length, times a constant that makes a channel's values of the order of 1
            last = self.reduce(features.normalized * features.normalized.shape[1] ** 0.5)
        if index is not None:
            last = last[index]
        hidden = self.input_norm(torch.cat((last, context.to(last.dtype)), dim=1))
        if hidden.device.type == "cpu" or _is_channels_last(last):
            # On a CPU convolutions of few channels are up to 20 times faster so; elsewhere the features decide, for two
            # layouts together take the slow path.
            hidden = hidden.contiguous(memory_format=torch.channels_last)
        if self.mix is not None:
            hidden = self.mix(hidden)
        maps = self.project_skips(features.skips) if projected is None else projected
        skips = dict(zip(self.strides, maps, strict=True))
        for block, stride in zip(self.blocks, (8, 4, 2, 1), strict=True):
            hidden = block(hidden, skips.get(stride), index)
        return self.classifier(hidden).squeeze(1)


def _convolutions(in_channels: int, out_channels: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()


def _is_channels_last(maps: Tensor) -> bool:
    """Whether a map has that layout and no other; never while compiling: the question ties a graph to one size."""
    return (
        not torch.compiler.is_compiling()
        and maps.is_contiguous(memory_format=torch.channels_last)
        and not maps.is_contiguous()
    )


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


class MaCoSNetPreTrainedModel(AtomicSaving):
    """Weight initialisation, loading and saving for all MaCoSNet models."""

    config: MaCoSNetConfig
    config_class = MaCoSNetConfig
    base_model_prefix = "macosnet"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = False
    # Of the backbone, where it has any attention.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _no_split_modules = ("MaCoSNetTransformationHead", "MaCoSNetDecoderBlock")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """G starts at the identity transform; convolutions follow He et al.; the encoder initialises itself."""
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            if module.running_mean is not None:
                init.zeros_(module.running_mean)
                init.ones_(module.running_var)
                init.zeros_(module.num_batches_tracked)
        elif isinstance(module, nn.Linear):
            identity = identity_tps(1) if module.out_features == TPS_PARAMETERS else identity_affine(1)
            init.normal_(module.weight, std=1e-3)
            init.copy_(module.bias, identity[0].to(module.bias))

    def make_transform(self, affine: Tensor, tps: Tensor) -> Transform:
        """The transform that parameters `(..., 6)` and `(..., 18)` of this model mean."""
        return Transform(affine, tps, self.config.tps_regularization)

    def transforms(self, outputs: MaCoSNetModelOutput | MaCoSNetKeypointMatchingOutput) -> Transform:
        """T_ij of every ordered pair that the outputs of this model hold: `(B, P)`."""
        return self.make_transform(outputs.affine, outputs.tps)


class MaCoSNetModel(MaCoSNetPreTrainedModel):
    """The paper's joint network: encoder E, correlation, transformation predictor G (affine, then TPS) and decoder D.

    ```python
    >>> outputs = model(pixel_values)        # (B, 2, 3, 240, 240)
    >>> outputs.affine[:, 0]                 # T_AB: points of B into A
    >>> outputs.mask_logits[:, 0].sigmoid()  # mask of A
    ```
    """

    def __init__(self, config: MaCoSNetConfig):
        super().__init__(config)
        self.encoder = MaCoSNetEncoder(config)
        self.affine_head = MaCoSNetTransformationHead(config, 6)
        self.tps_head = MaCoSNetTransformationHead(config, TPS_PARAMETERS)
        self.decoder = MaCoSNetDecoder(config, self.encoder.feature_channels, self.encoder.skip_channels)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor) -> MaCoSNetFeatures:
        """Encodes N single images `(N, 3, H, W)`: the only call that runs the encoder on them.

        Raises:
            InputError: if the images do not have the configuration's `image_size`.
        """
        size = self.config.image_size
        if pixel_values.dim() != 4 or pixel_values.shape[-2:] != (size, size):
            raise InputError(f"Images of shape (N, 3, {size}, {size}) are expected; got {tuple(pixel_values.shape)}.")
        return self.encoder(pixel_values.to(self.dtype))

    def predict_transforms(
        self,
        source: MaCoSNetFeatures,
        target: MaCoSNetFeatures,
        source_pixel_values: Tensor | None = None,
        correlation: Tensor | None = None,
    ) -> Transform:
        """The cascade of G for N ordered pairs: affine on (A, B), A warped by it, TPS on (warped A, B).

        Args:
            source: features of A, one row per pair.
            target: features of B, likewise.
            source_pixel_values: `(N, 3, H, W)` pixels of A, encoded again after the affine warp (the paper, exact).
                Without them the feature map of A is warped instead, which costs no encoder pass.
            correlation: S_AB when it is known already.

        Returns:
            T_AB `(N)`, float32.
        """
        side = self.config.predictor_grid
        source, target = source.on_grid(side), target.on_grid(side)
        if source_pixel_values is None:
            return self.predict_transforms_from_similarity(
                cell_similarity(source.normalized, target.normalized), *cell_products(source.last)
            )
        if correlation is None or side != self.config.grid_size:
            correlation = correlate(source.normalized, target.normalized)
        affine = self.affine_head(correlation)
        grid = Transform(affine).grid(source_pixel_values.shape[-2:])
        warped_pixels = warp(source_pixel_values.to(self.dtype), grid, padding_mode=self.config.padding_mode)
        warped = self.encoder(warped_pixels).on_grid(side).normalized
        return self.make_transform(affine, self.tps_head(correlate(warped, target.normalized)))

    def predict_transforms_from_similarity(
        self, similarity: Tensor, lengths: Tensor, gram: Tensor, maps: Tensor | None = None
    ) -> Transform:
        """The cascade that warps A's feature map, from inner products alone, see [`warp_similarity`](matching.py).

        Args:
            similarity: `(N, h*w, h, w)` of [`cell_similarity`](matching.py), A's cells as channels, B's layout, of
                features on the predictor's grid ([`MaCoSNetFeatures.on_grid`](encoder.py)).
            lengths, gram, maps: as in [`warp_similarity`](matching.py).

        Returns:
            As [`predict_transforms`].
        """
        affine = self.affine_head(normalize_similarity(similarity))
        grid = Transform(affine).grid(similarity.shape[-2:])
        warped = warp_similarity(similarity, lengths, gram, grid, maps, padding_mode=self.config.padding_mode)
        return self.make_transform(affine, self.tps_head(normalize_similarity(warped)))

    def predict_masks(self, features: MaCoSNetFeatures, context: Tensor, index: Tensor | None = None) -> Tensor:
        """Mask logits `(P, H, W)`; see [`MaCoSNetDecoder.forward`]."""
        return self.decoder(features, context, index)

    def predict_common_masks(
        self,
        features: MaCoSNetFeatures,
        partners: Tensor,
        index: Tensor | None = None,
        own_weights: Tensor | None = None,
        partner_weights: Tensor | None = None,
        present: Tensor | None = None,
        projected: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Mask logits `(P, H, W)` of what an image has in common with its K partners together, in one round.

        Args:
            features: of N images.
            partners: `(P, K)` numbers of the partners' images.
            index: `(P,)` the image of each row; `None` when P = N in the same order.
            own_weights, partner_weights: `(P, h, w)` and `(P, K, h, w)`, where the object of the image and those of
                its partners are assumed; the middle of the images if not given.
            present: `(P, K)` bool, which partners count; all if not given.
            projected: as in [`MaCoSNetDecoder.forward`].
        """
        maps = features.normalized
        own = maps if index is None else maps[index]
        context = common_context(own, maps[partners], own_weights, partner_weights, present)
        return self.decoder(features, context, index, projected)

    def predict_masks_of_pairs(
        self, features: MaCoSNetFeatures, source: Tensor, target: Tensor, correlation: Tensor | None = None
    ) -> Tensor:
        """Mask logits `(P, H, W)` of the sources of ordered pairs, each given its target, in all rounds.

        Args:
            features: of N images.
            source, target: `(P,)` numbers of images; every pair is followed by its reverse.
            correlation: `(P, h*w, h, w)` S of these pairs, where it is known already.
        """
        reverse = torch.arange(source.shape[0], device=source.device) ^ 1
        if self.config.decoder_inputs == "paper":
            if correlation is None:
                correlation = correlate(features.normalized[source], features.normalized[target])
            # The mask of view i given j needs S_ji: the layout of i, one channel per position of j.
            return self.predict_masks(features, correlation[reverse], source)
        projected = self.decoder.project_skips(features.skips)
        partners, weights, theirs = target.unsqueeze(1), None, None
        for _ in range(self.config.decoder_rounds):
            logits = self.predict_common_masks(features, partners, source, weights, theirs, projected=projected)
            weights = object_weights(logits.float().sigmoid())
            theirs = weights[reverse].unsqueeze(1)
        return logits

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        output_masks: bool = True,
        output_flow: bool = False,
        image_sizes: Tensor | None = None,
        orientations: str = "none",
        **kwargs: Any,
    ) -> MaCoSNetModelOutput | tuple[Tensor, ...]:
        """Both directions of every pair of views: transforms, correlations and masks.

        Args:
            pixel_values: `(B, V, 3, H, W)`, V = 2 (pairs) or 3 (triplets), resized to `image_size` and normalised.
            output_masks: whether to run the decoder.
            output_flow: whether to add the dense flow of every ordered pair.
            image_sizes: `(B, V, 2)` sizes (height, width) of the original images, the unit of the flow.
            orientations: how the source of a pair may face, compared with the target: one of `ORIENTATIONS`.
            return_dict: whether to return a [`MaCoSNetModelOutput`] (default) or a tuple.

        Raises:
            InputError: if shapes do not fit.
            TypeError: for a keyword that transformers does not pass to models.
        """
        unknown = sorted(kwargs.keys() - TransformersKwargs.__annotations__.keys())
        if unknown:
            raise TypeError(f"forward() got an unexpected keyword argument {unknown[0]!r}")
        if pixel_values.dim() != 5 or pixel_values.shape[1] not in (2, 3):
            raise InputError(
                f"pixel_values must be (B, 2, 3, H, W) or (B, 3, 3, H, W); got {tuple(pixel_values.shape)}."
            )
        check_orientations(orientations)
        views, oriented = pixel_values.shape[1], None
        if orientations != "none":
            if views != 2:
                raise InputError("Only pairs have an orientation: triplets need orientations='none'.")
            oriented = orient(self, pixel_values, orientations)
            images, features = oriented.pixel_values, oriented.features
        else:
            images = pixel_values.flatten(0, 1)
            features = self.get_image_features(images)
        warpable = images if self.config.cascade == "exact" else None
        output = self.relate_views(features, views, warpable, output_masks=output_masks)
        if oriented is not None:
            turn_back(output, self.transforms(output), oriented.symmetries)
        if output_flow:
            output.flow = self.dense_flow(output, image_sizes)
        return output

    def relate_views(
        self,
        features: MaCoSNetFeatures,
        num_views: int,
        pixel_values: Tensor | None = None,
        output_masks: bool = True,
    ) -> MaCoSNetModelOutput:
        """Everything behind the encoder: correlations, transforms and masks of every ordered pair of views.

        Args:
            features: of `B * num_views` images, the views of a group side by side.
            num_views: V, 2 or 3.
            pixel_values: `(B * V, 3, H, W)`, for the exact cascade; see [`predict_transforms`].
            output_masks: whether to run the decoder.
        """
        pairs = ordered_pairs(num_views)
        device = features.last.device
        batch = features.last.shape[0] // num_views
        first_view = torch.arange(batch, device=device).unsqueeze(1) * num_views
        source, target = ((first_view + on_device([pair[side] for pair in pairs], device)).flatten() for side in (0, 1))
        correlation = correlate(features.normalized[source], features.normalized[target])
        without_skips = features.without_skips()
        transform = self.predict_transforms(
            without_skips.select(source),
            without_skips.select(target),
            None if pixel_values is None else pixel_values[source],
            correlation,
        ).unflatten(0, (batch, len(pairs)))
        assert transform.tps is not None  # the cascade predicts both
        masks = None
        if output_masks:
            masks = self.predict_masks_of_pairs(features, source, target, correlation).unflatten(0, (batch, len(pairs)))
        return MaCoSNetModelOutput(
            affine=transform.affine,
            tps=transform.tps,
            correlation=correlation.unflatten(0, (batch, len(pairs))),
            mask_logits=masks,
            features=features.normalized.unflatten(0, (batch, num_views)),
            orientation=torch.zeros(batch, dtype=torch.long, device=device) if num_views == 2 else None,
        )

    def dense_flow(self, output: MaCoSNetModelOutput, image_sizes: Tensor | None) -> Tensor:
        """Flow `(B, P, H, W, 2)` of every ordered pair, see [`MaCoSNetModelOutput`].

        Args:
            output: with the transforms of the pairs.
            image_sizes: `(B, V, 2)` sizes (height, width) of the original images.

        Raises:
            InputError: without sizes, or where they do not fit.
        """
        if image_sizes is None:
            raise InputError("output_flow needs image_sizes: the flow is in pixels of the original images.")
        views = 2 if output.affine.shape[1] == 2 else 3
        image_sizes = on_device(check_sizes(image_sizes, len(output.affine), views), output.affine.device)
        pairs, side = ordered_pairs(views), self.config.image_size
        source_sizes, target_sizes = (
            image_sizes[:, on_device([pair[end] for pair in pairs], image_sizes.device)] for end in (0, 1)
        )
        return dense_flow(self.transforms(output), (side, side), source_sizes, target_sizes, side)


class MaCoSNetForKeypointMatching(MaCoSNetPreTrainedModel):
    """MaCoSNet with the interface of transformers' keypoint matchers, plus masks and point transfer.

    ```python
    >>> inputs = processor([[source, target]], return_tensors="pt")
    >>> outputs = model(**inputs)
    >>> sizes = torch.tensor([[[source.height, source.width], [target.height, target.width]]])
    >>> matches = processor.post_process_keypoint_matching(outputs, sizes, threshold=0.2)[0]
    >>> model.transfer_points(outputs, torch.tensor([[[120.0, 80.0]]]), sizes)  # pixels of the source to the target's
    ```
    """

    def __init__(self, config: MaCoSNetConfig):
        super().__init__(config)
        self.macosnet = MaCoSNetModel(config)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor) -> MaCoSNetFeatures:
        """See [`MaCoSNetModel.get_image_features`]."""
        return self.macosnet.get_image_features(pixel_values)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_flow: bool = False,
        image_sizes: Tensor | None = None,
        output_masks: bool = True,
        orientations: str | None = None,
        **kwargs: Any,
    ) -> MaCoSNetKeypointMatchingOutput | tuple[Tensor, ...]:
        """Matches and masks of a batch of pairs.

        Args:
            pixel_values: `(B, 2, 3, H, W)`.
            labels: `(B, 2, K, 2)` corresponding keypoints as (x, y) in [0, 1], in the coordinates of `keypoints`:
                `(x + 0.5) / width` of a pixel; negative where absent. Asks for `loss`. (The paper's weakly supervised
                objective is in `macosnet_hf.training.losses`.)
            output_flow, image_sizes, return_dict: as in [`MaCoSNetModel`].
            output_masks: whether to run the decoder; without masks the scores have no mask factor.
            orientations: as in [`MaCoSNetModel`]; by default what the configuration says.

        Raises:
            InputError, TypeError: as in [`MaCoSNetModel`].
        """
        if pixel_values.dim() != 5 or pixel_values.shape[1] != 2:
            raise InputError(f"pixel_values must be (B, 2, 3, H, W); got {tuple(pixel_values.shape)}.")
        kwargs["orientations"] = self.config.orientations if orientations is None else orientations
        base = self.macosnet(pixel_values, output_masks=output_masks, return_dict=True, **kwargs)
        loss = None
        if labels is not None:
            loss = keypoint_loss(labels, base.features, self.transforms(base), self.config)
        if self.config.mutual_fit:
            fitted = fit_mutually(
                base.features, self.transforms(base), temperature=self.config.local_matching_temperature
            )
            base.affine, base.tps = fitted.affine, fitted.tps
        if output_flow:
            base.flow = self.macosnet.dense_flow(base, image_sizes)
        keypoints, matches, scores = match_grid(base.features, base.mask_logits, self.transforms(base), self.config)
        return MaCoSNetKeypointMatchingOutput(
            loss=loss, matches=matches, matching_scores=scores, keypoints=keypoints, **base
        )

    def transfer_points(
        self,
        outputs: MaCoSNetModelOutput | MaCoSNetKeypointMatchingOutput,
        points: Tensor,
        image_sizes: Tensor,
        direction: str = "source_to_target",
        local_matching: bool | None = None,
    ) -> Tensor:
        """Where any points of one image lie in the other, in pixels of the original images.

        Args:
            outputs: what `forward` returned for the pairs.
            points: `(B, N, 2)` as (x, y) in pixels of the image that they are on.
            image_sizes: `(B, 2, 2)` sizes (height, width) of source and target.
            direction: `"source_to_target"` or `"target_to_source"`.
            local_matching: whether a point lands on the best feature match near where the transform sends it; default
                is the configuration's `local_matching`.

        Returns:
            `(B, N, 2)` as (x, y) in pixels of the other image; a point may fall outside of it.

        Raises:
            InputError: for another direction or shapes that do not fit.
        """
        return transfer_points(
            points, direction, image_sizes, outputs.features, self.transforms(outputs), self.config, local_matching
        )


MaCoSNetModel.register_for_auto_class("AutoModel")
MaCoSNetForKeypointMatching.register_for_auto_class("AutoModelForKeypointMatching")

__all__ = [
    "MaCoSNetFeatures",
    "MaCoSNetForKeypointMatching",
    "MaCoSNetKeypointMatchingOutput",
    "MaCoSNetModel",
    "MaCoSNetModelOutput",
    "MaCoSNetPreTrainedModel",
    "ordered_pairs",
]
