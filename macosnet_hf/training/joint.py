"""The paper's weakly supervised stage: both tasks together, on triplets (or pairs) of images of one class.

[`JointObjective`] is one training step without its backward pass: the images of a group are cropped and mirrored
on the device, encoded once each, matched in every order, segmented with every partner, and judged by the five losses
(`losses.py`). No keypoint and no mask that a person drew is looked at.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import InputError
from ..geometry import Transform, folded, on_device, warp
from ..modeling_macosnet import MaCoSNetModel, MaCoSNetModelOutput, ordered_pairs
from ..orientation import facing_sides
from .distillation import local_matching_loss
from .losses import MaCoSNetObjective
from .objectives import Apart, Objective
from .pretraining import SyntheticObjective
from .pseudo_masks import border_contrast, centre_weight
from .synthetic import paste_on_others, photometric

CASCADES = ("exact", "features")

# An affine transform that shrinks or blows up areas by more than this is no view of the same kind of thing.
LARGEST_AREA_RATIO = 9.0


class JointObjective(Objective):
    """The five losses over a batch of groups, and what keeps an eye on them.

    Args:
        model, mean, std, trained, frozen_statistics: see [`Objective`](objectives.py). A frozen encoder runs without a
            graph.
        losses: the weighted sum of the five losses. A perceptual network in it is no part of this module's parameters,
            state and copies, so that it is neither averaged nor saved.
        cascade: how the spline sees the affinely warped source: `"features"` warps its feature map, `"exact"` encodes
            its warped pixels (one more encoder pass an ordered pair).
        prior_weight: weight of the masks' cross-entropy against pseudo-masks (`pseudo_masks.py`), which anchors area
            and polarity; batches must then hold masks.
        local_weight: weight of the distance between the transforms and what local matching makes of them
            (`distillation.py`), which teaches the predictor what the features of real pairs say.
        synthetic: the first stage's objective, and `synthetic_weight` its weight: known warps of the same images
            (the first of each group) keep what the predictor has learnt there.
        paste_share: share of groups whose objects (by the pseudo-masks) are pasted onto images of other groups,
            see [`paste_on_others`](synthetic.py).
        change_colours: photometric changes of every image.
        mirror_partners: mirrors the images of a group that face another way than its first one, as far as the encoder
            can tell ([`facing_sides`](../orientation.py)). The losses are those of the images as they are under
            transforms that contain the reflection, since no term depends on which side of an image is left.
        statistics: mean and standard deviation `(C,)` of the encoder's unit-length features over a data set, for the
            contrastive form `"features"`; by default those of each batch.
        channels_last: memory layout of the images, the faster one on most devices.

    Raises:
        InputError: if no loss reaches a part that is to be trained, or an option is unknown.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(
        self,
        model: MaCoSNetModel,
        mean: Sequence[float],
        std: Sequence[float],
        losses: MaCoSNetObjective,
        *,
        trained: Sequence[str] = ("predictor", "decoder"),
        frozen_statistics: Sequence[str] = ("predictor",),
        cascade: str = "features",
        prior_weight: float = 0.0,
        local_weight: float = 0.0,
        synthetic: SyntheticObjective | None = None,
        synthetic_weight: float = 0.0,
        paste_share: float = 0.0,
        change_colours: bool = False,
        mirror_partners: bool = False,
        statistics: tuple[Tensor, Tensor] | None = None,
        channels_last: bool = True,
    ):
        super().__init__(model, mean, std, trained, frozen_statistics)
        if cascade not in CASCADES:
            raise InputError(f"cascade is one of {', '.join(CASCADES)}.")
        self.losses = Apart(losses)
        self.synthetic = Apart(synthetic)
        self.prior_weight, self.local_weight, self.paste_share = prior_weight, local_weight, paste_share
        self.synthetic_weight = synthetic_weight if synthetic is not None else 0.0
        self.cascade, self.change_colours, self.channels_last = cascade, change_colours, channels_last
        self.mirror_partners = mirror_partners
        self.has_statistics = statistics is not None
        feature_mean, feature_std = statistics if statistics is not None else (torch.zeros(0), torch.zeros(0))
        # Without any they are no state: of two empty tensors safetensors keeps one, and no run could be resumed.
        self.register_buffer("feature_mean", feature_mean.clone(), persistent=self.has_statistics)
        self.register_buffer("feature_std", feature_std.clone(), persistent=self.has_statistics)
        self._check_reach()

    @property
    def uses_masks(self) -> bool:
        """Whether any loss looks at the masks."""
        objective = self.losses.module
        weights = objective.weights
        return bool(weights.contrast or self.prior_weight or (objective.coupled and (weights.matching or weights.task)))

    def _check_reach(self) -> None:
        """A part that no loss reaches would be trained in name only (and would stop a run on several processes)."""
        objective = self.losses.module
        weights = objective.weights
        task = weights.task if objective.coupled else 0
        matching_masks = weights.matching if objective.coupled and not objective.detach_masks else 0
        matcher = weights.matching + weights.cycle + weights.trans + task
        masks = weights.contrast + task + matching_masks + self.prior_weight
        reach = {
            "encoder": matcher + masks,
            "predictor": matcher + self.synthetic_weight + self.local_weight,
            "decoder": masks,
        }
        for name, sum_of_weights in reach.items():
            if name in self.trained and not sum_of_weights:
                raise InputError(
                    f"No loss reaches the {name}: give one that does a weight, or freeze it (--no-train_{name})."
                )

    def forward(self, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """All losses of a batch of groups.

        Args:
            batch: of [`GroupedImages`](groups.py): `images` uint8 `(B, V, 3, S, S)`, `views` `(B, V, 6)`, and
                `masks` bool `(B, V, S, S)` where the prior has a weight.
            generator: of the random changes of this batch.

        Returns:
            Scalars: `total` with its graph; each term without its weight (those of the objective, `prior`,
            `synthetic`); and to watch: `mask_area`, `polarity` (see [`polarity`]), `folded` (share of transforms that
            turn a part of the image inside out), `degenerate` (share of affine transforms that change areas more
            than nine times).
        """
        pixels, labels = self.prepare_images(batch, generator)
        if self.mirror_partners:
            turned = self.facing_away(pixels)[..., None, None]
            pixels = torch.where(turned.unsqueeze(2), pixels.flip(-1), pixels)
            labels = None if labels is None else torch.where(turned, labels.flip(-1), labels)
        outputs = self.run_model(pixels, with_masks=self.uses_masks)
        transforms = self.model.transforms(outputs)
        losses = self._objective_losses(outputs, transforms, pixels)
        if self.prior_weight:
            if labels is None or outputs.mask_logits is None:
                raise InputError("The prior has a weight, but the batch holds no pseudo-masks.")
            view = on_device([i for i, _ in ordered_pairs(pixels.shape[1])], labels.device)
            losses["prior"] = F.binary_cross_entropy_with_logits(outputs.mask_logits.float(), labels[:, view])
            losses["total"] = losses["total"] + self.prior_weight * losses["prior"]
        if self.local_weight:
            guided = self.losses.module.coupled
            losses["local"] = local_matching_loss(outputs, transforms, self.model.config, guided=guided)
            losses["total"] = losses["total"] + self.local_weight * losses["local"]
        if self.synthetic_weight:
            losses["synthetic"] = self._synthetic_loss(batch["images"], generator)
            losses["total"] = losses["total"] + self.synthetic_weight * losses["synthetic"]
        with torch.no_grad():
            losses.update(watch(outputs, transforms))
        return losses

    @torch.no_grad()
    def prepare_images(
        self, batch: dict[str, Tensor], generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Crops, mirrors and normalises: pixels `(B, V, 3, H, W)` and, where the batch has masks, `(B, V, H, W)`."""
        size = self.model.config.image_size
        shape = batch["images"].shape[:2]
        images = batch["images"].flatten(0, 1).float() / 255
        grid = Transform(batch["views"].flatten(0, 1)).grid((size, size))
        images = warp(images, grid, padding_mode="border")
        labels = None
        if "masks" in batch:
            labels = warp(batch["masks"].flatten(0, 1).unsqueeze(1).float(), grid, padding_mode="border").clamp(0, 1)
            labels = labels.squeeze(1)
            if self.paste_share and generator is not None:
                images, labels = paste_on_others(images, labels, self.paste_share, generator, group_size=shape[1])
            labels = labels.clamp(0, 1).unflatten(0, shape)
        if self.change_colours and generator is not None:
            images = photometric(images, generator)
        return self.normalize(images).unflatten(0, shape), labels

    @torch.no_grad()
    def facing_away(self, pixels: Tensor) -> Tensor:
        """Which images `(B, V)` of groups `(B, V, 3, H, W)` face another way than the first one of their group."""
        images = (self._side_by_side(each) for each in (pixels, pixels.flip(-1)))
        both = [self.model.get_image_features(each).last.unflatten(0, pixels.shape[:2]) for each in images]
        views = range(pixels.shape[1])
        others = on_device([[other for other in views if other != view] for view in views], pixels.device)
        sides = torch.stack([facing_sides(own, mirrored, others) for own, mirrored in zip(*both, strict=True)])
        return (sides * sides[:, :1] < 0).to(pixels.device)

    def _side_by_side(self, pixels: Tensor) -> Tensor:
        """The images `(B * V, 3, H, W)` of groups in the memory layout of this objective."""
        images = pixels.flatten(0, 1)
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images

    def run_model(self, pixels: Tensor, *, with_masks: bool = True) -> MaCoSNetModelOutput:
        """The model's outputs for groups `(B, V, 3, H, W)`, with or without those of the decoder."""
        images = self._side_by_side(pixels)
        features = self.model.get_image_features(images)
        exact = self.cascade == "exact"
        return self.model.relate_views(features, pixels.shape[1], images if exact else None, output_masks=with_masks)

    def feature_statistics(self) -> tuple[Tensor, Tensor] | None:
        """Those given to the constructor."""
        return (self.feature_mean, self.feature_std) if self.has_statistics else None

    def _objective_losses(
        self, outputs: MaCoSNetModelOutput, transforms: Transform, pixels: Tensor
    ) -> dict[str, Tensor]:
        objective = self.losses.on(pixels.device)
        weights = objective.weights
        task = weights.task if objective.coupled else 0
        if not (weights.matching or weights.cycle or weights.trans or weights.contrast or task):
            return {"total": pixels.new_zeros(())}  # the anchors alone
        return objective(outputs, transforms, pixels, self.feature_statistics())

    def _synthetic_loss(self, images: Tensor, generator: torch.Generator) -> Tensor:
        synthetic = self.synthetic.module
        # It shares the model, so only its own buffers may have to follow to the device.
        synthetic.mean, synthetic.std = self.mean, self.std
        # One image of each group is enough of an anchor; its backgrounds are swapped within the batch.
        chosen = images[:, 0] if len(images) > 1 else images.flatten(0, 1)
        loss: Tensor = synthetic(chosen, generator)["total"]
        return loss


# ---------------------------------------------------------------------------------------------------------------------
# What to watch
# ---------------------------------------------------------------------------------------------------------------------


def polarity(mask_logits: Tensor, features: Tensor) -> Tensor:
    """How masks correlate with a prior that knows no label: `(B, P)` in [-1, 1].

    The prior is the contrast to the image's border times a Gaussian around its middle (the first step of
    `pseudo_masks.py`). Positive: the mask is on what stands out in the middle. Negative: object and background are
    swapped. Near zero: the mask says nothing, such as one that is empty or full.

    Args:
        mask_logits: `(B, P, H, W)`.
        features: `(B, V, C, h, w)`.
    """
    views = features.shape[1]
    side = features.shape[-1]
    prior = border_contrast(features.float().flatten(0, 1)) * on_device(centre_weight(side, 0.6), features.device)
    view = on_device([i for i, _ in ordered_pairs(views)], features.device)
    prior = prior.unflatten(0, features.shape[:2])[:, view]
    masks = F.interpolate(mask_logits.float().sigmoid(), size=features.shape[-2:], mode="area")
    return pearson(masks, prior)


def pearson(first: Tensor, second: Tensor) -> Tensor:
    """Correlation coefficients of maps `(..., h, w)`; 0 where one of them is constant."""
    first, second = (maps - maps.mean(dim=(-2, -1), keepdim=True) for maps in (first, second))
    product = (first * second).mean(dim=(-2, -1))
    spread = first.square().mean(dim=(-2, -1)) * second.square().mean(dim=(-2, -1))
    return product / spread.clamp(min=1e-10).sqrt()


def watch(outputs: MaCoSNetModelOutput, transforms: Transform) -> dict[str, Tensor]:
    """Figures that show a collapse early, see [`JointObjective.forward`]."""
    determinant = transforms.determinant()
    sane = (determinant >= 1 / LARGEST_AREA_RATIO) & (determinant <= LARGEST_AREA_RATIO)
    figures = {
        "folded": (folded(transforms.flatten(0, 1)) > 0).float().mean(),
        "degenerate": (~sane).float().mean(),
    }
    if outputs.mask_logits is not None:
        figures["mask_area"] = outputs.mask_logits.float().sigmoid().mean()
        figures["polarity"] = polarity(outputs.mask_logits, outputs.features).mean()
    return figures


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def checkpoint_activations(objective: JointObjective) -> None:
    """Gradient checkpointing of what is trained: its activations are computed again in the backward pass.

    The decoder is treated block by block, each head and (where it is trained) the encoder as a whole. Losses,
    gradients and batch-norm statistics are those of a run without it.
    """
    blocks: list[nn.Module] = []
    if "encoder" in objective.trained:
        blocks += _encoder_stages(objective.model.encoder)
    if "predictor" in objective.trained:
        blocks += [objective.model.affine_head.conv, objective.model.tps_head.conv]
    if objective.uses_masks:
        blocks += list(objective.model.decoder.blocks)
    for block in blocks:
        block.forward = functools.partial(_checkpointed, block, block.forward)


def _encoder_stages(encoder: nn.Module) -> list[nn.Module]:
    """The children of the deepest chain of blocks that is known, else the whole backbone."""
    backbone: Any = getattr(encoder, "backbone", encoder)
    inner = getattr(backbone, "_backbone", backbone)
    for name in ("blocks", "stages"):  # timm's EfficientNets; others
        stages = getattr(inner, name, None)
        if isinstance(stages, (nn.Sequential, nn.ModuleList)):
            return list(stages)
    layers = [child for name, child in inner.named_children() if name.startswith("layer")]  # timm's ResNets
    stages = getattr(getattr(inner, "encoder", None), "stages", None)  # transformers' ResNets
    if isinstance(stages, nn.ModuleList):
        return list(stages)
    return layers or [inner]


def _checkpointed(block: nn.Module, forward: Callable[..., Any], *arguments: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments)
    return checkpoint(
        forward,
        *arguments,
        use_reentrant=False,
        preserve_rng_state=False,  # nothing in these blocks is random
        context_fn=lambda: (contextlib.nullcontext(), _statistics_unchanged(block)),
    )


@contextlib.contextmanager
def _statistics_unchanged(block: nn.Module) -> Iterator[None]:
    """The second forward pass must not move the running statistics a second time. (With `track_running_stats` off it
    would save other tensors than the first, which torch refuses.)"""
    norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [
        (norm, norm.momentum, tracked, tracked.clone())
        for norm in norms
        if (tracked := norm.num_batches_tracked) is not None
    ]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, tracked, count in before:
            norm.momentum = momentum
            tracked.copy_(count)
